"""Hypergradient of one adaptive inner step, by finite differences."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_hpo.functional.bilevel.darts_fd import identity_product
from lightning_hpo.functional.bilevel.optimizer_steps import Step
from lightning_hpo.functional.bilevel.problem import HypergradientResult, Point, Problem, hypergradient

__all__ = ["adam_slope", "sama", "step_slope"]


def sama(
    problem: Problem,
    params: Mapping[str, Tensor],
    hparams: Mapping[str, Tensor],
    state: Mapping[str, Any] | None = None,  # noqa: ARG001
    *,
    slope: Mapping[str, Tensor],
    alpha: float = 1.0,
) -> HypergradientResult:
    r"""Hypergradient of one step of the inner optimizer, whichever it is.

    .. math::

        \frac{dL}{d\theta} \approx \partial_\theta L_{val}
        - \frac{\nabla_\theta L_{tr}(w + h v', \theta) - \nabla_\theta L_{tr}(w - h v', \theta)}{2 h},
        \qquad v' = D \circ \nabla_w L_{val}, \quad h = \frac{\alpha}{\|v'\|}

    The step :math:`w - U(g)` of the optimizer has the diagonal slope :math:`D = \partial U / \partial g`: the learning
    rate for SGD, much more varied for Adam.

    Args:
        problem: The problem.
        params: Parameters; the moved ones are copies.
        hparams: Hyperparameters.
        state: Not needed.
        slope: D by the names of the parameters, from :func:`adam_slope` or :func:`step_slope`.
        alpha: How far the parameters are moved, :math:`\alpha`.

    Returns:
        The hypergradient, without a report and with an empty state.

    Raises:
        ValueError: If ``alpha`` is not positive, a name or shape in ``slope`` does not fit, or a hyperparameter is
            reached by neither loss.

    References:
        Choe et al., "Making Scalable Meta Learning Practical", NeurIPS 2023, eq. 5.

    Example:
        >>> problem = Problem(lambda w, h: ((w["w"] - h["goal"]) ** 2).sum(), lambda w, h: (w["w"] ** 2).sum())
        >>> rate = {"w": torch.tensor([0.1])}
        >>> sama(problem, {"w": torch.tensor([3.0])}, {"goal": torch.tensor(3.0)}, slope=rate).gradients
        {'goal': tensor(1.2000)}
    """
    point = Point(params, hparams)
    scale = point.layout.ravel(dict(slope), "slope", point.dtype)
    v, direct = point.gradient(problem.val_loss, "val_loss")
    indirect = identity_product(problem, point, scale * problem.reduce(v), alpha)
    return hypergradient(problem, point, direct, indirect)


def adam_slope(
    grad: Tensor, state: Mapping[str, Tensor], *, lr: float | Tensor, beta1: float, beta2: float, eps: float
) -> Tensor:
    r"""The slope D of Adam's step in the gradient, from the state that the step left behind; no bias correction.

    .. math::

        D = \eta \frac{(1 - \beta_1) \beta_2 v_{old} - \beta_1 (1 - \beta_2)\, g\, m_{old}}{(\sqrt v + \epsilon)^3},
        \qquad m_{old} = \frac{m - (1 - \beta_1) g}{\beta_1}, \quad v_{old} = \frac{v - (1 - \beta_2) g^2}{\beta_2}

    Exact for :math:`\epsilon = 0`. Early in training, where the bias correction matters, and for other optimizers take
    :func:`step_slope` with the state before the step.

    Args:
        grad: The gradient g that the step used.
        state: With :math:`m` under ``"exp_avg"`` and :math:`v` under ``"exp_avg_sq"``, after the step.
        lr: :math:`\eta`.
        beta1: :math:`\beta_1`.
        beta2: :math:`\beta_2`.
        eps: :math:`\epsilon`.

    Returns:
        D in the shape of the gradient.

    References:
        Choe et al., 2023, appendix on Adam.

    Example:
        >>> state = {"exp_avg": torch.tensor([0.5]), "exp_avg_sq": torch.tensor([0.25])}
        >>> adam_slope(torch.tensor([0.5]), state, lr=0.1, beta1=0.9, beta2=0.99, eps=0.0)
        tensor([0.0180])
    """
    mean, square = state["exp_avg"], state["exp_avg_sq"]
    # The numerator, with m and v of after the step: (1 - beta1) v - (1 - beta2) g m.
    slope = (square * (1 - beta1)).addcmul_(grad, mean, value=beta2 - 1)
    root = square.sqrt().add_(eps).clamp_(min=torch.finfo(square.dtype).tiny)  # where v is 0, so is the numerator
    return slope.div_(root).div_(root).div_(root).mul_(lr)


def step_slope(
    step: Step, param: Tensor, grad: Tensor, state: Mapping[str, Tensor], settings: Mapping[str, Any]
) -> Tensor:
    r"""The slope :math:`D = -\partial w' / \partial g` of any elementwise optimizer's step, by differentiating it.

    Args:
        step: One of :mod:`~lightning_hpo.functional.bilevel.optimizer_steps`.
        param: The parameter before the step.
        grad: Its gradient.
        state: Its state before the step.
        settings: Settings of the step.

    Returns:
        D in the shape of the gradient.

    Example:
        >>> from lightning_hpo.functional.bilevel.optimizer_steps import sgd
        >>> step_slope(sgd, torch.ones(2), torch.ones(2), {}, {"lr": 0.1})
        tensor([0.1000, 0.1000])
    """
    with torch.enable_grad():
        leaf = grad.detach().requires_grad_()
        new, _ = step(param.detach(), leaf, state, **settings)
        return -torch.autograd.grad(new, leaf, torch.ones_like(new))[0]
