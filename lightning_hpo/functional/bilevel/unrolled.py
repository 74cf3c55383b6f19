"""Hypergradients through the steps of the inner optimizer, in reverse mode."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lightning_hpo.functional.bilevel.inner_steps import Batches, Moment, add, advance, losses_of, pull_back
from lightning_hpo.functional.bilevel.optimizer_steps import FunctionalOptimizer, State
from lightning_hpo.functional.bilevel.problem import HypergradientResult, Point, Problem, hypergradient
from lightning_hpo.functional.bilevel.products import Product

__all__ = ["truncated", "unrolled"]


def unrolled(
    problem: Problem,
    params: Mapping[str, Tensor],
    hparams: Mapping[str, Tensor],
    state: Mapping[str, Any] | None = None,
    *,
    steps: int,
    optimizer: FunctionalOptimizer,
    train_losses: Batches = None,
    states: Mapping[str, State] | None = None,
    product: Product = "exact",
) -> HypergradientResult:
    r"""Hypergradient of the validation loss after T inner steps from here.

    The steps :math:`w_{t+1} = T(w_t, g_t, \theta)` with :math:`g_t = \nabla_w L_t(w_t, \theta)` are taken on copies.
    Then, from :math:`\bar w_T = \partial_w L_{val}` and :math:`\bar\theta = \partial_\theta L_{val}` back to the start,

    .. math::

        \bar g = (\partial_g T)^\top \bar w_{t+1}, \qquad
        \bar w_t = (\partial_w T)^\top \bar w_{t+1} + \nabla^2_{ww} L_t\, \bar g, \qquad
        \bar\theta \mathrel{+}= (\partial_\theta T)^\top \bar w_{t+1} + (\partial_\theta \nabla_w L_t)^\top \bar g

    and the same for the optimizer's states. Only the start of each step is kept and its graph is built anew on the way
    back: memory is T times parameters and states, whatever the network. Losses must give the same value when asked
    again.

    Args:
        problem: The problem.
        params: Where training begins.
        hparams: Hyperparameters, those of the optimizer among them.
        state: Not needed.
        steps: T, at least 1.
        optimizer: See :func:`~lightning_hpo.functional.bilevel.optimizer_steps.functional_optimizer`.
        train_losses: The training loss of each step, a list or a function of the step's number; the problem's where
            None.
        states: The optimizer's states at the start; empty where None.
        product: ``"exact"`` or ``"fd"``.

    Returns:
        The hypergradient, without a report and with an empty state.

    Raises:
        ValueError: If ``steps`` does not fit ``train_losses``, or a hyperparameter is not reached.

    References:
        Franceschi et al., "Forward and Reverse Gradient-Based Hyperparameter Optimization", ICML 2017, alg. 1.

    Example:
        >>> import torch
        >>> from lightning_hpo.functional.bilevel.optimizer_steps import functional_optimizer, sgd
        >>> problem = Problem(lambda w, h: ((w["w"] - h["goal"]) ** 2).sum(), lambda w, h: (w["w"] ** 2).sum())
        >>> start, goal = {"w": torch.tensor([3.0])}, {"goal": torch.tensor(3.0)}
        >>> unrolled(problem, start, goal, steps=3, optimizer=functional_optimizer(sgd, lr=0.25)).gradients
        {'goal': tensor(5.2500)}
    """
    return truncated(
        problem,
        params,
        hparams,
        state,
        steps=steps,
        keep=steps,
        optimizer=optimizer,
        train_losses=train_losses,
        states=states,
        product=product,
    )


def truncated(
    problem: Problem,
    params: Mapping[str, Tensor],
    hparams: Mapping[str, Tensor],
    state: Mapping[str, Any] | None = None,  # noqa: ARG001
    *,
    steps: int,
    keep: int,
    optimizer: FunctionalOptimizer,
    train_losses: Batches = None,
    states: Mapping[str, State] | None = None,
    product: Product = "exact",
) -> HypergradientResult:
    r""":func:`unrolled` through the last k of T inner steps alone.

    What the hyperparameters did before counts as given. Near a solution with curvature at least :math:`\mu` the error
    falls like :math:`(1 - \eta\mu)^k`.

    Args:
        problem: The problem.
        params: Where training begins.
        hparams: Hyperparameters.
        state: Not needed.
        steps: T, at least 1.
        keep: k, from 1 to T.
        optimizer: As for :func:`unrolled`.
        train_losses: As for :func:`unrolled`.
        states: As for :func:`unrolled`.
        product: ``"exact"`` or ``"fd"``.

    Returns:
        As for :func:`unrolled`.

    Raises:
        ValueError: If ``steps`` or ``keep`` is out of range, or a hyperparameter is not reached.

    References:
        Shaban et al., "Truncated Back-propagation for Bilevel Optimization", AISTATS 2019.

    Example:
        >>> import torch
        >>> from lightning_hpo.functional.bilevel.optimizer_steps import functional_optimizer, sgd
        >>> problem = Problem(lambda w, h: ((w["w"] - h["goal"]) ** 2).sum(), lambda w, h: (w["w"] ** 2).sum())
        >>> start, goal = {"w": torch.tensor([3.0])}, {"goal": torch.tensor(3.0)}
        >>> truncated(problem, start, goal, steps=3, keep=1, optimizer=functional_optimizer(sgd, lr=0.25)).gradients
        {'goal': tensor(3.)}
    """
    losses = losses_of(problem, steps, train_losses)
    if not 1 <= keep <= steps:
        raise ValueError(f"keep must be from 1 to steps={steps}, got {keep!r}")
    point = Point(params, hparams)
    fixed = {name: value.detach() for name, value in hparams.items()}
    moments = [Moment({name: value.detach() for name, value in params.items()}, dict(states or {}))]
    for loss in losses:
        moments = [*moments[-keep:], advance(problem, loss, moments[-1], fixed, optimizer)]
    end = Point(moments.pop().params, hparams)
    adjoint, direct = end.gradient(problem.val_loss, "val_loss")
    back: tuple[Tensor, dict[str, State]] = problem.reduce(adjoint), {}
    parts = [direct]
    for loss, moment in zip(reversed(losses), reversed(moments), strict=False):
        back, part = pull_back(problem, loss, moment, hparams, optimizer, back, product)
        parts = [add(*parts, part)]
    return hypergradient(problem, point, *parts)
