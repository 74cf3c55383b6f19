"""Hypergradient with the identity in place of the inverse Hessian."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lightning_hpo.functional.bilevel.problem import HypergradientResult, Point, Problem, hypergradient
from lightning_hpo.functional.bilevel.products import Product, products

__all__ = ["t1t2"]


def t1t2(
    problem: Problem,
    params: Mapping[str, Tensor],
    hparams: Mapping[str, Tensor],
    state: Mapping[str, Any] | None = None,  # noqa: ARG001
    *,
    product: Product = "exact",
) -> HypergradientResult:
    r"""Hypergradient with the identity for the inverse Hessian: one inner step of size 1, looked at backwards.

    .. math::

        \frac{dL}{d\theta} \approx \partial_\theta L_{val} - (\partial_\theta \nabla_w L_{tr})^\top \nabla_w L_{val}

    Directions of small curvature count too little, so its length means nothing; its sign often does.

    Args:
        problem: The problem.
        params: Parameters.
        hparams: Hyperparameters.
        state: Not needed.
        product: ``"exact"`` or ``"fd"``.

    Returns:
        The hypergradient, without a report and with an empty state.

    Raises:
        ValueError: If a hyperparameter is reached by neither loss.

    References:
        Luketina et al., "Scalable Gradient-Based Tuning of Continuous Regularization Hyperparameters", ICML 2016.

    Example:
        >>> import torch
        >>> problem = Problem(lambda w, h: ((w["w"] - h["goal"]) ** 2).sum(), lambda w, h: (w["w"] ** 2).sum())
        >>> t1t2(problem, {"w": torch.tensor([3.0])}, {"goal": torch.tensor(3.0)}).gradients
        {'goal': tensor(12.)}
    """
    point = Point(params, hparams)
    v, direct = point.gradient(problem.val_loss, "val_loss")
    _, mixed = products(problem, point, product).pull_back(problem.reduce(v), params=False)
    indirect = {name: None if part is None else -part for name, part in mixed.items()}
    return hypergradient(problem, point, direct, indirect)
