"""Hypergradients through the steps of the inner optimizer, in forward mode."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_hpo.functional.bilevel.inner_steps import Batches, Moment, losses_of
from lightning_hpo.functional.bilevel.optimizer_steps import FunctionalOptimizer, State
from lightning_hpo.functional.bilevel.problem import (
    HypergradientResult,
    Loss,
    Point,
    Problem,
    hypergradient,
    scalar,
    wide_dtype,
)
from lightning_hpo.functional.bilevel.second_derivatives import naming_the_remedy, require_whole_graph
from lightning_hpo.functional.bilevel.trees import TreeLayout

__all__ = ["forward"]

Slots = dict[str, dict[str, Tensor]]


def forward(
    problem: Problem,
    params: Mapping[str, Tensor],
    hparams: Mapping[str, Tensor],
    state: Mapping[str, Any] | None = None,
    *,
    optimizer: FunctionalOptimizer,
    steps: int = 1,
    train_losses: Batches = None,
    states: Mapping[str, State] | None = None,
) -> HypergradientResult:
    r"""Hypergradient of the validation loss after some inner steps, with derivatives carried along.

    The derivative :math:`Z = dw / d\theta` of n columns moves with the parameters,

    .. math::

        Z_{t+1} = (\partial_w T) Z_t + (\partial_g T) (\nabla^2_{ww} L_t Z_t + \partial_\theta \nabla_w L_t)
        + \partial_\theta T, \qquad \frac{dL}{d\theta} = \partial_\theta L_{val} + Z_T^\top \partial_w L_{val}

    and so do the derivatives of the optimizer's states. Time and memory are those of training times n, so n must be
    small; nothing is kept of the steps, so training may be as long as it likes: with ``state`` the derivatives are
    those since the first call. Let each call begin where the one before ended, with the optimizer's ``states`` as they
    were there. Needs second derivatives; ``unrolled(product="fd")`` does not.

    Args:
        problem: The problem.
        params: Where these steps begin.
        hparams: Hyperparameters, n numbers together, those of the optimizer among them.
        state: That of the result before; without it Z begins at 0.
        optimizer: As for :func:`~lightning_hpo.functional.bilevel.unrolled.unrolled`.
        steps: How many steps.
        train_losses: As for :func:`~lightning_hpo.functional.bilevel.unrolled.unrolled`.
        states: The optimizer's states at the start; empty where None.

    Returns:
        The hypergradient, no report, and ``{"tangent": Z as (n, d), "slots": (n, ...) by parameter and state}``.

    Raises:
        ValueError: If ``steps`` does not fit ``train_losses``, or a hyperparameter is not reached.

    References:
        Franceschi et al., "Forward and Reverse Gradient-Based Hyperparameter Optimization", ICML 2017, alg. 2.

    Example:
        >>> from lightning_hpo.functional.bilevel.optimizer_steps import functional_optimizer, sgd
        >>> problem = Problem(lambda w, h: ((w["w"] - h["goal"]) ** 2).sum(), lambda w, h: (w["w"] ** 2).sum())
        >>> start, goal = {"w": torch.tensor([3.0])}, {"goal": torch.tensor(3.0)}
        >>> result = forward(problem, start, goal, steps=3, optimizer=functional_optimizer(sgd, lr=0.25))
        >>> result.gradients, result.state["tangent"]
        ({'goal': tensor(5.2500)}, tensor([[0.8750]]))
    """
    point, layout = Point(params, hparams), TreeLayout(dict(hparams))
    values = {name: value.detach() for name, value in hparams.items()}
    some = next(iter(values.values()))
    units = torch.eye(layout.size, dtype=wide_dtype(values), device=some.device)
    tangent = torch.zeros(layout.size, point.layout.size, dtype=point.dtype, device=some.device)
    slots: Slots = {}
    if state:
        tangent, slots = state["tangent"], state["slots"]
    moment = Moment({name: value.detach() for name, value in params.items()}, dict(states or {}))
    seen: set[str] = set()
    for loss in losses_of(problem, steps, train_losses):
        at = Point(moment.params, values)
        gradient, moved, reached = _gradient_tangents(problem, loss, at, tangent, units)
        seen |= reached
        moment, tangent, slots = _step(optimizer, at, moment, gradient, moved, tangent, slots, units, layout)
    v, direct = Point(moment.params, values).gradient(problem.val_loss, "val_loss")
    rows = dict(zip(values, tangent.split(layout.sizes), strict=True))
    # Only a name that no loss has seen costs a look at its derivative: the optimizer may know it.
    known = {name: name in seen or direct[name] is not None or bool(row.any()) for name, row in rows.items()}
    indirect = {name: (rows[name] @ v).view_as(value) if known[name] else None for name, value in values.items()}
    return hypergradient(problem, point, direct, indirect, state={"tangent": tangent, "slots": slots})


def _gradient_tangents(
    problem: Problem, loss: Loss, at: Point, tangent: Tensor, units: Tensor
) -> tuple[Tensor, Tensor, set[str]]:
    """The gradient, its derivatives in all hyperparameters, and which of those the loss knows."""
    inputs = [*at.params.values(), *at.hparams.values()]
    with torch.enable_grad(), naming_the_remedy():
        value = scalar(loss(at.params, at.hparams), "train_loss")
        found = torch.autograd.grad(value, inputs, create_graph=True, allow_unused=True)
        gradient = at.vector(dict(zip(at.params, found, strict=False)))
        require_whole_graph(gradient)
        slopes = dict(zip(at.hparams, found[len(at.params) :], strict=True))
        filled = {name: torch.zeros_like(at.hparams[name]) if s is None else s for name, s in slopes.items()}
        slope = TreeLayout(at.hparams).ravel(filled, dtype=units.dtype)
        # By symmetry of second derivatives, one backward pass gives H z and the mixed derivative together.
        rows = [
            at.pull_back(gradient @ z + (slope @ e).to(z.dtype), hparams=False, keep=True)[0]
            for z, e in zip(tangent, units, strict=True)
        ]
    both = problem.reduce(torch.cat([gradient.detach(), *rows])).view(len(units) + 1, -1)
    return both[0], both[1:], {name for name, found_slope in slopes.items() if found_slope is not None}


def _step(
    optimizer: FunctionalOptimizer,
    at: Point,
    moment: Moment,
    gradient: Tensor,
    moved: Tensor,
    tangent: Tensor,
    slots: Slots,
    units: Tensor,
    layout: TreeLayout,
) -> tuple[Moment, Tensor, Slots]:
    """One step of the optimizer with the tangents of everything that it reads."""
    hparams = {name: value.detach() for name, value in at.hparams.items()}
    primals = (moment.params, _pieces(at, gradient), moment.states, hparams)
    news, rows = [], []
    new = moment
    for index, unit in enumerate(units):
        tangents = (
            _pieces(at, tangent[index]),
            _pieces(at, moved[index]),
            {
                key: {
                    slot: slots[key][slot][index] if key in slots else torch.zeros_like(value)
                    for slot, value in of.items()
                }
                for key, of in moment.states.items()
            },
            layout.unravel(unit),
        )
        with torch.no_grad():
            out, (params_dot, states_dot) = torch.func.jvp(optimizer, primals, tangents)[:2]
        new = Moment(*out)
        rows.append(at.vector(params_dot))
        news.append(states_dot)
    stacked = {
        key: {slot: torch.stack([dots[key][slot] for dots in news]) for slot in of} for key, of in new.states.items()
    }
    return new, torch.stack(rows), stacked


def _pieces(at: Point, vector: Tensor) -> dict[str, Tensor]:
    # Clones, because forward mode would give each view of a vector a tangent as long as the whole vector.
    return {name: piece.clone() for name, piece in at.unravel(vector).items()}
