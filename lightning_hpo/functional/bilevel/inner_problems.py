"""Inner problems of optimizers that do more than follow a loss down: weight decay, and steps of any kind."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from lightning_hpo.functional.bilevel.problem import Loss, Residual, Tensors

__all__ = ["decayed", "fixed_point"]


def decayed(loss: Loss, name: str = "weight_decay", scale: Mapping[str, Tensor | float] | None = None) -> Loss:
    r"""The training loss whose stationary points are those of an optimizer with weight decay.

    .. math::

        L(w, \theta) + \tfrac12 \lambda \sum_k \langle s_k, w_k^2 \rangle

    SGD stops where :math:`\nabla L + \lambda w = 0`, whether its decay is coupled or decoupled: s = 1. AdamW stops
    where :math:`\nabla L / (\sqrt v + \epsilon) + \lambda w = 0`: with :math:`s = \sqrt{\hat v} + \epsilon`, taken
    from its state and held fixed, that is the same form. A hypergradient without this term is wrong.

    Args:
        loss: The training loss without the decay.
        name: The hyperparameter :math:`\lambda`, a scalar.
        scale: The factors s by the names of the parameters, tensors or numbers; 0 for a parameter that does not decay,
            for example a bias. 1 everywhere where None.

    Returns:
        The loss with the decay.

    Raises:
        ValueError: When called, if the names in ``scale`` are not those of the parameters.

    Example:
        >>> loss = decayed(lambda w, h: w["w"].sum())
        >>> loss({"w": torch.tensor([1.0, 2.0])}, {"weight_decay": torch.tensor(0.1)})
        tensor(3.2500)
    """

    def total(params: Tensors, hparams: Tensors) -> Tensor:
        factors = dict.fromkeys(params, 1.0) if scale is None else scale
        if factors.keys() != params.keys():
            raise ValueError(f"scale must name the parameters {sorted(params)}, got {sorted(factors)}")
        penalty = torch.stack([(factors[key] * param.square()).sum() for key, param in params.items()]).sum()
        return loss(params, hparams) + 0.5 * hparams[name] * penalty

    return total


def fixed_point(step: Callable[[Tensors, Tensors], Tensors]) -> Residual:
    r"""The residual :math:`F(w, \theta) = w - T(w, \theta)` of a step, for ``Problem(residual=...)``.

    Its derivative is that of the condition :math:`w = T(w, \theta)`. Step sizes cancel where the linear system is
    solved, but not in ``t1t2`` or a truncated Neumann series, to which a small step looks like a small curvature.

    Args:
        step: :math:`T(w, \theta)`, differentiable; gradients inside are taken with ``create_graph=True`` or by
            ``torch.func.grad``.

    Returns:
        The residual.

    Example:
        >>> shrink = fixed_point(lambda w, h: {"w": w["w"] - 0.1 * (w["w"] - h["goal"])})
        >>> shrink({"w": torch.tensor([3.0])}, {"goal": torch.tensor(1.0)})
        {'w': tensor([0.2000])}
    """

    def residual(params: Tensors, hparams: Tensors) -> Tensors:
        moved = step(params, hparams)
        return {key: param - moved[key] for key, param in params.items()}

    return residual
