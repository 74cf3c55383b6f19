"""Projected SGD for strongly convex problems: what brings the inner parameters close to their solution."""

from collections.abc import Callable, Mapping
from math import inf, sqrt

import torch
from torch import Tensor

from lightning_hpo.functional.bilevel.problem import Tensors
from lightning_hpo.functional.bilevel.trees import TreeLayout

__all__ = ["epoch_sgd", "project_ball", "projected_sgd"]

Gradient = Callable[[Tensors], Mapping[str, Tensor]]


def project_ball(params: Mapping[str, Tensor], center: Mapping[str, Tensor], radius: float) -> Tensors:
    r"""The nearest point of a ball: :math:`c + (y - c) \min(1, R / \|y - c\|)`, one norm over all tensors.

    Args:
        params: :math:`y` by name.
        center: :math:`c` by name.
        radius: :math:`R`; infinity leaves everything where it is.

    Returns:
        The point by name.

    Raises:
        ValueError: If the radius is not positive.

    Example:
        >>> project_ball({"w": torch.tensor([3.0, 4.0])}, {"w": torch.zeros(2)}, 1.0)
        {'w': tensor([0.6000, 0.8000])}
    """
    if not radius > 0:
        raise ValueError(f"radius must be positive, got {radius!r}")
    if radius == inf:
        return dict(params)
    apart = {name: value - center[name] for name, value in params.items()}
    distance = torch.linalg.vector_norm(TreeLayout(apart).ravel(apart))
    # The larger of both in the denominator: 1 inside the ball, and nothing is divided by zero.
    factor = radius / distance.clamp(min=radius)
    return {name: center[name] + part * factor for name, part in apart.items()}


def projected_sgd(
    gradient: Gradient, start: Mapping[str, Tensor], *, lr: float, steps: int, radius: float = inf
) -> Tensors:
    r"""Steps :math:`y \leftarrow \Pi_{B(y_0, R)}(y - \gamma g(y))` from a start that is the ball's center.

    Args:
        gradient: A gradient at the point it is given, in most cases of a fresh batch.
        start: :math:`y_0` by name; not written to.
        lr: Step size :math:`\gamma`.
        steps: Number of steps; 0 gives the start back.
        radius: :math:`R`.

    Returns:
        The last iterate by name.

    Example:
        >>> projected_sgd(lambda w: w, {"w": torch.ones(1)}, lr=0.5, steps=2)
        {'w': tensor([0.2500])}
    """
    params = dict(start)
    for _ in range(steps):
        slopes = gradient(params)
        params = project_ball({name: p - lr * slopes[name] for name, p in params.items()}, start, radius)
    return params


def epoch_sgd(
    gradient: Gradient, start: Mapping[str, Tensor], *, lr: float, steps: int, epochs: int, radius: float = inf
) -> Tensors:
    r"""Epoch-SGD: epochs of doubling length with halved steps, each begun at the mean of the one before.

    Epoch :math:`s = 1, 2, \dots` takes :math:`T_s = 2^{s-1} T` steps of size :math:`2^{1-s} \alpha` in a ball of radius
    :math:`2^{(1-s)/2} D` around where it begins; the next begins at the mean of its iterates (its start among them, its
    last one not). On a strongly convex problem with noisy gradients the expected squared distance to the solution
    halves with each epoch, once :math:`T` and :math:`\alpha` suit it.

    Args:
        gradient: A stochastic gradient at the point it is given.
        start: First point by name; not written to.
        lr: First step size :math:`\alpha`.
        steps: Steps of the first epoch, :math:`T`.
        epochs: Number of epochs; there are ``steps * (2**epochs - 1)`` steps in all.
        radius: First radius :math:`D`.

    Returns:
        The mean of the last epoch by name.

    Raises:
        ValueError: If a number is out of range; all are listed.

    References:
        Hazan and Kale, "Beyond the Regret Minimization Barrier: Optimal Algorithms for Stochastic Strongly-Convex
        Optimization", JMLR 2014, alg. 1; Hao, Gong and Liu, ICLR 2024, alg. 2.

    Example:
        >>> epoch_sgd(lambda w: {"w": w["w"] - 1}, {"w": torch.zeros(1)}, lr=0.5, steps=4, epochs=4)
        {'w': tensor([0.9594])}
    """
    checks = {
        f"lr must be positive, got {lr!r}": lr > 0,
        f"steps must be at least 1, got {steps!r}": steps >= 1,
        f"epochs must be at least 1, got {epochs!r}": epochs >= 1,
        f"radius must be positive, got {radius!r}": radius > 0,
    }
    if problems := [problem for problem, holds in checks.items() if not holds]:
        raise ValueError("; ".join(problems))
    center = dict(start)
    for epoch in range(epochs):
        size, within = lr / 2**epoch, radius / sqrt(2) ** epoch
        params, total = dict(center), {name: torch.zeros_like(p) for name, p in center.items()}
        count = steps * 2**epoch
        for _ in range(count):
            total = {name: total[name] + p for name, p in params.items()}
            slopes = gradient(params)
            params = project_ball({name: p - size * slopes[name] for name, p in params.items()}, center, within)
        center = {name: value / count for name, value in total.items()}
    return center
