"""Bilevel problems with everything that MAID's certificates have to know, as the scripts `maid_*.py` need them."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from sklearn.datasets import load_breast_cancer, load_digits
from torch import Tensor
from torch.nn import functional as F

from lightning_hpo.demos import MNISTDataModule
from lightning_hpo.functional.bilevel.maid import BilevelProblem, LowerProblem

Labelled = tuple[Tensor, Tensor]  # inputs and classes


class Task(NamedTuple):
    """A problem, where to begin, and what the outcome is judged by."""

    problem: BilevelProblem
    theta: Tensor
    x: Tensor
    figures: Callable[[Tensor, Tensor], dict[str, float]]  # of theta and x


def quadratic() -> Task:
    """The paper's quadratic: 1000 rows, 10 unknowns, random numbers of torch's seed 29 in the order of its script."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(29)
        A1, A2, A3 = (torch.rand(1000, 10).double() for _ in range(3))
        x1, x2, goal = (torch.rand(10).double() for _ in range(3))
        y1, y2 = (torch.randn(1000).double() for _ in range(2))
    b1, b2 = A1 @ x1 + 0.01 * y1, A2 @ x2 + A3 @ goal + 0.01 * y2
    scales = torch.linalg.eigvalsh(A2.T @ A2)
    norm = torch.linalg.matrix_norm(A2.T @ A3, 2).item()
    lower = LowerProblem(lambda x, t: (A2 @ x + A3 @ t - b2).square().sum() / 2, scales[0].item(), scales[-1].item())

    def upper(x: Tensor) -> Tensor:
        return (A1 @ x - b1).square().sum() / 2

    smoothness = torch.linalg.eigvalsh(A1.T @ A1)[-1].item()
    problem = BilevelProblem(
        lower, upper, smoothness, True, cross_norm=lambda *_: norm, cross_lipschitz=0.0, inverse_lipschitz=0.0
    )

    def figures(theta: Tensor, _: Tensor) -> dict[str, float]:
        return {"f": upper(torch.linalg.solve(A2.T @ A2, A2.T @ (b2 - A3 @ theta))).item()}

    return Task(problem, torch.ones(10).double(), x2, figures)


def digits() -> Task:
    """Multinomial regression on handwritten digits, a log l2 weight for each of 640 coefficients; 900/450/447."""
    data, labels = load_digits(return_X_y=True)
    order = np.random.RandomState(0).permutation(len(labels))
    inputs, classes = torch.tensor(data / 16)[order], torch.tensor(labels)[order]
    parts = (slice(0, 900), slice(900, 1350), slice(1350, None))
    return _multinomial(*((inputs[part], classes[part]) for part in parts))


def mnist_images(quick: bool) -> tuple[Labelled, Labelled]:
    """Training and test images of MNIST, grey between 0 and 1, 12 by 12; the digits of above in a quick run."""
    if quick:
        data, labels = load_digits(return_X_y=True)
        images, classes = torch.tensor(data / 16).view(-1, 1, 8, 8), torch.tensor(labels)
        sets = [(images[part], classes[part]) for part in (slice(0, 1350), slice(1350, None))]
    else:
        sets = [(part.images.double() / 255, part.labels) for part in MNISTDataModule().read()]
    shrunk = [F.interpolate(images, size=(12, 12), mode="bilinear", antialias=True) for images, _ in sets]
    train, test = ((images.flatten(1), classes) for images, (_, classes) in zip(shrunk, sets, strict=True))
    return train, test


def mnist(train: Labelled, test: Labelled, size: int) -> Task:
    """The paper's: the first training images below, the test images above; the last sixth of the former is held out."""
    inputs, classes = train
    first = len(classes) - len(classes) // 6
    if not 0 < size <= first:
        raise ValueError(f"the lower problem has 1 to {first} images, got {size}")
    return _multinomial((inputs[:size], classes[:size]), test, (inputs[first:], classes[first:]))


def _multinomial(train: Labelled, val: Labelled, test: Labelled) -> Task:
    """A log l2 weight for each coefficient, all -3 at first."""
    (x, y), (x_val, y_val), (x_test, y_test) = train, val, test
    bound, smoothness = (_largest(part) / 2 for part in (x, x_val))
    lower = LowerProblem(
        lambda w, t: F.cross_entropy(x @ w, y) + 0.5 * (t.exp() * w * w).sum(),
        lambda t: t.exp().min(),
        lambda t: bound + t.exp().max(),
    )

    def figures(theta: Tensor, w: Tensor) -> dict[str, float]:
        right = ((x_test @ w).argmax(1) == y_test).double().mean().item()
        val_loss, test_loss = (F.cross_entropy(a @ w, b).item() for a, b in (val, test))
        least = theta.min().item()
        return {"val_loss": val_loss, "test_loss": test_loss, "test_accuracy": 100 * right, "least": least}

    problem = BilevelProblem(lower, lambda w: F.cross_entropy(x_val @ w, y_val), smoothness, convex_upper=True)
    shape = (x.shape[1], 10)
    return Task(problem, torch.full(shape, -3.0).double(), torch.zeros(shape).double(), figures)


def breast_cancer(start: float) -> Task:
    """Logistic regression with one log l2 weight for all coefficients; 285/142, inputs standardised."""
    data, labels = load_breast_cancer(return_X_y=True)
    order = np.random.RandomState(0).permutation(len(labels))
    inputs, classes = torch.tensor(data)[order], torch.tensor(labels).double()[order]
    inputs = (inputs - inputs[:285].mean(0)) / inputs[:285].std(0)
    x, y, x_val, y_val = inputs[:285], classes[:285], inputs[285:427], classes[285:427]
    bound, smoothness = (_largest(part) / 4 for part in (x, x_val))
    entropy = F.binary_cross_entropy_with_logits
    lower = LowerProblem(
        lambda w, t: entropy(x @ w, y) + 0.5 * t.exp() * w.square().sum(), lambda t: t.exp(), lambda t: bound + t.exp()
    )
    problem = BilevelProblem(lower, lambda w: entropy(x_val @ w, y_val), smoothness, convex_upper=True)
    return Task(
        problem,
        torch.tensor(start).double(),
        torch.zeros(30).double(),
        lambda theta, w: {"val_loss": entropy(x_val @ w, y_val).item(), "theta": theta.item()},
    )


def conditioned(condition: float) -> tuple[Task, float]:
    """A quadratic whose lower Hessian has the given condition number, and the least value of its outer loss."""
    generator = torch.Generator().manual_seed(0)
    draw = torch.randn(20, 20, generator=generator, dtype=torch.float64)
    basis = torch.linalg.qr(draw)[0]
    matrix = basis @ torch.diag(torch.linspace(1, condition, 20, dtype=torch.float64)) @ basis.T
    B = torch.linalg.qr(torch.randn(20, 5, generator=generator, dtype=torch.float64))[0]
    c, goal = torch.randn(2, 20, generator=generator, dtype=torch.float64)
    lower = LowerProblem(lambda x, t: x @ (0.5 * matrix @ x - B @ t - c), 1.0, condition * (1 + 1e-12))
    problem = BilevelProblem(lower, lambda x: (x - goal).square().sum() / 2, 1.0, convex_upper=True)
    images = torch.linalg.solve(matrix, B)
    base = torch.linalg.solve(matrix, c) - goal
    best = torch.linalg.lstsq(images, -base[:, None]).solution[:, 0]

    def figures(theta: Tensor, _: Tensor) -> dict[str, float]:
        return {"f": (base + images @ theta).square().sum().item() / 2}

    task = Task(problem, torch.full((5,), 3.0).double(), torch.zeros(20).double(), figures)
    return task, figures(best, base)["f"]


def _largest(x: Tensor) -> float:
    """The largest eigenvalue of the mean of outer products."""
    return torch.linalg.eigvalsh(x.T @ x / len(x))[-1].item()
