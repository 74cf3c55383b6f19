"""Three problems whose figures an independent implementation has given, through the functional engine alone."""

from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import Normalizer
from torch import Tensor
from torch.nn import functional as F

from lightning_hpo.functional.bilevel.estimators import ESTIMATORS, Problem
from lightning_hpo.functional.bilevel.implicit_differentiation import implicit_fixed_point
from lightning_hpo.functional.bilevel.optimality import proximal_gradient
from lightning_hpo.functional.bilevel.problem import Loss, Tensors
from lightning_hpo.functional.bilevel.proximal import prox_lasso

__all__ = ["figures"]


def figures(quick: bool) -> list[dict[str, Any]]:
    """A row for each figure: what is expected, what was found, and whether they agree."""
    return [*lasso(), *penalties(5 if quick else 100), *distillation(2 if quick else 100)]


def _row(problem: str, figure: str, expected: float, found: float, tolerance: float, relative: bool) -> dict[str, Any]:
    bound = tolerance * abs(expected) if relative else tolerance
    agrees = "yes" if abs(found - expected) <= bound else "no"
    return {"problem": problem, "figure": figure, "expected": expected, "found": found, "agrees": agrees}


def _loss_row(problem: str, figure: str, expected: float, found: float) -> dict[str, Any]:
    return _row(problem, figure, expected, float(f"{found:.8g}"), 0.05, relative=True)


def solve(loss: Loss, params: Tensors, hparams: Tensors) -> Tensors:
    """The minimum of a smooth convex loss, from where the last one was."""
    found = {name: value.detach().clone().requires_grad_() for name, value in params.items()}
    fixed = {name: value.detach() for name, value in hparams.items()}
    optimizer = torch.optim.LBFGS(
        list(found.values()), max_iter=500, tolerance_grad=1e-9, tolerance_change=0.0, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(found, fixed)
        value.backward()
        return value

    optimizer.step(closure)
    return {name: value.detach() for name, value in found.items()}


def learn(problem: Problem, params: Tensors, hparams: Tensors, lr: float, steps: int) -> list[tuple[Tensors, Tensors]]:
    """Adam on the hyperparameters, the inner problem solved before each step: all solutions, and where they are."""
    optimizer, state, course = torch.optim.Adam(list(hparams.values()), lr=lr), None, []
    for _ in range(steps + 1):
        params = solve(problem.train_loss, params, hparams)
        course.append((params, {name: value.detach().clone() for name, value in hparams.items()}))
        result = ESTIMATORS["ift_cg"](problem, params, hparams, state, maxiter=1000, tol=1e-8)
        for name, value in hparams.items():
            value.grad = result.gradients[name]
        optimizer.step()
        state = result.state
    return course


def lasso() -> list[dict[str, Any]]:
    """Diabetes, rows of unit length, a third held out: a penalty of 1, through the proximal gradient map."""
    x, y = load_diabetes(return_X_y=True)
    parts = train_test_split(Normalizer().fit_transform(x), y, test_size=0.33, random_state=0)
    x_train, x_val, y_train, y_val = (torch.tensor(part, dtype=torch.float64) for part in parts)
    theta = torch.zeros((), dtype=torch.float64, requires_grad=True)
    step = 1 / torch.linalg.matrix_norm(x_train, 2).square().item() * len(y_train)
    mapping = proximal_gradient(lambda w: 0.5 * (x_train @ w - y_train).square().mean(), prox_lasso, step)

    def solver(start: Tensor, penalty: Tensor) -> Tensor:
        w, ahead, pace = start, start, 1.0  # accelerated proximal gradient
        for _ in range(20000):
            new, before = mapping(ahead, penalty), pace
            pace = (1 + (1 + 4 * pace * pace) ** 0.5) / 2
            ahead, w = new + (before - 1) / pace * (new - w), new
        return w

    w = implicit_fixed_point(mapping, solver)(x_train.new_zeros(x_train.shape[1]), theta.exp())
    loss = (x_val @ w - y_val).square().mean()
    (gradient,) = torch.autograd.grad(loss, theta)
    name = "diabetes, lasso"
    return [
        _loss_row(name, "validation MSE at log penalty 0", 27214.584, loss.item()),
        _loss_row(name, "hypergradient there", -175.647, gradient.item()),
    ]


def penalties(steps: int) -> list[dict[str, Any]]:
    """Breast cancer, logistic regression without intercept: a penalty for each of 30 features, or one for all."""
    x, y = load_breast_cancer(return_X_y=True)
    order = np.random.RandomState(0).permutation(len(y))  # the split of the figures
    train, val = torch.tensor(order[:285]), torch.tensor(order[285:427])
    inputs, labels = torch.tensor(x), torch.tensor(y, dtype=torch.float64)
    inputs = (inputs - inputs[train].mean(0)) / inputs[train].std(0)

    def fit(params: Tensors, part: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(inputs[part] @ params["w"], labels[part])

    problem = Problem(
        lambda w, h: fit(w, train) + 0.5 * (h["log"].exp() * w["w"].square()).sum(), lambda w, _: fit(w, val)
    )
    start = {"w": inputs.new_zeros(30)}
    found = {}
    for shape in ((30,), ()):
        course = learn(problem, start, {"log": inputs.new_zeros(shape).requires_grad_()}, 0.2, steps)
        found[shape] = [fit(params, val).item() for params, _ in (course[0], course[-1])]
    grid = {}
    for log in torch.linspace(-10, 4, 57).tolist():
        start = solve(problem.train_loss, start, {"log": torch.tensor(log)})
        grid[log] = fit(start, val).item()
    best = min(grid, key=lambda log: grid[log])
    name = "breast cancer, log l2"
    return [
        _loss_row(name, "validation loss at 0", 0.334, found[30,][0]),
        _loss_row(name, f"after {steps} steps, one a feature", 0.078, found[30,][1]),
        _loss_row(name, f"after {steps} steps, one for all", 0.127, found[()][1]),
        _loss_row(name, f"best of a grid of 57, at {best:g}", 0.1272, grid[best]),
    ]


def distillation(steps: int) -> list[dict[str, Any]]:
    """Digits: ten images, one a class, such that regression on them is right on the whole training set."""
    x, y = load_digits(return_X_y=True)
    order = np.random.RandomState(0).permutation(len(y))
    inputs, labels = torch.tensor(x / 16)[torch.tensor(order)], torch.tensor(y)[torch.tensor(order)]
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(10, 64, generator=generator, dtype=torch.float64).div(64).requires_grad_()
    classes = torch.arange(10)
    problem = Problem(
        lambda w, h: F.cross_entropy(h["images"] @ w["w"], classes) + 0.05 * w["w"].square().sum(),
        lambda w, _: F.cross_entropy(inputs[:1200] @ w["w"], labels[:1200]),
    )
    course = learn(problem, {"w": inputs.new_zeros(64, 10)}, {"images": images}, 0.05, steps)
    right = [((inputs[1200:] @ params["w"]).argmax(1) == labels[1200:]).double().mean().item() for params, _ in course]
    name = "digits, ten distilled images"
    rows = [(0, 0.107), (min(20, steps), 0.918), (steps, 0.928)]
    return [
        _row(name, f"test accuracy after {step} steps", expected, round(right[step], 4), 0.01, relative=False)
        for step, expected in rows
    ]
