"""Hypergradient of one inner step, by finite differences."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_hpo.functional.bilevel.linear_system import norm
from lightning_hpo.functional.bilevel.problem import HypergradientResult, Point, Problem, hypergradient
from lightning_hpo.functional.bilevel.products import central_difference

__all__ = ["darts_fd"]


def darts_fd(
    problem: Problem,
    params: Mapping[str, Tensor],
    hparams: Mapping[str, Tensor],
    state: Mapping[str, Any] | None = None,  # noqa: ARG001
    *,
    epsilon: float = 0.01,
) -> HypergradientResult:
    r"""The hypergradient of :func:`~lightning_hpo.functional.bilevel.t1t2.t1t2` from three first derivatives.

    .. math::

        \frac{dL}{d\theta} \approx \partial_\theta L_{val}
        - \frac{\nabla_\theta L_{tr}(w + h v, \theta) - \nabla_\theta L_{tr}(w - h v, \theta)}{2 h},
        \qquad v = \nabla_w L_{val}, \quad h = \frac{\epsilon}{\|v\|}

    Args:
        problem: The problem.
        params: Parameters; the moved ones are copies.
        hparams: Hyperparameters.
        state: Not needed.
        epsilon: How far the parameters are moved, :math:`\epsilon`.

    Returns:
        The hypergradient, without a report and with an empty state.

    Raises:
        ValueError: If ``epsilon`` is not positive, or a hyperparameter is reached by neither loss.

    References:
        Liu, Simonyan and Yang, "DARTS: Differentiable Architecture Search", ICLR 2019, eq. 8.

    Example:
        >>> problem = Problem(lambda w, h: ((w["w"] - h["goal"]) ** 2).sum(), lambda w, h: (w["w"] ** 2).sum())
        >>> darts_fd(problem, {"w": torch.tensor([3.0])}, {"goal": torch.tensor(3.0)}).gradients
        {'goal': tensor(12.0000)}
    """
    point = Point(params, hparams)
    v, direct = point.gradient(problem.val_loss, "val_loss")
    indirect = identity_product(problem, point, problem.reduce(v), epsilon)
    return hypergradient(problem, point, direct, indirect)


def identity_product(problem: Problem, point: Point, v: Tensor, epsilon: float) -> dict[str, Tensor | None]:
    r"""Minus the mixed derivative times a vector, by moving the parameters by :math:`\pm \epsilon v / \|v\|`.

    Args:
        problem: The problem.
        point: Where.
        v: The vector.
        epsilon: How far the parameters are moved.

    Returns:
        By the names of the hyperparameters, None where the training loss is not reached.

    Raises:
        ValueError: If ``epsilon`` is not positive, or the problem has a ``residual``.
    """
    if not epsilon > 0:
        raise ValueError(f"epsilon must be positive, got {epsilon!r}")
    if problem.residual is not None:
        raise ValueError("finite differences are of the gradient of the training loss; they ignore `residual`")
    length = norm(v)
    unit = v / torch.where(length > 0, length, 1)
    _, slopes = central_difference(problem.train_loss, point, unit, epsilon, params=False)
    return {name: None if slope is None else -length * slope for name, slope in slopes.items()}
