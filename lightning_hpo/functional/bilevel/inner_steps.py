"""Steps of inner training on copies of the parameters, forward and back."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_hpo.functional.bilevel.optimizer_steps import FunctionalOptimizer, State
from lightning_hpo.functional.bilevel.problem import Loss, Partial, Point, Problem, Tensors
from lightning_hpo.functional.bilevel.products import Product, products

__all__ = ["Batches", "Moment", "add", "advance", "losses_of", "pull_back", "unroll"]

Batches = Sequence[Loss] | Callable[[int], Loss] | None


class Moment(NamedTuple):
    """Where an inner step begins: parameters and the optimizer's states by name."""

    params: Tensors
    states: dict[str, State]


def unroll(
    problem: Problem,
    params: Mapping[str, Tensor],
    hparams: Mapping[str, Tensor],
    *,
    steps: int,
    optimizer: FunctionalOptimizer,
    train_losses: Batches = None,
    states: Mapping[str, State] | None = None,
    first: int = 0,
) -> Moment:
    """The parameters and the optimizer's states after some inner steps, without a graph.

    Args:
        problem: The problem.
        params: Where training begins; they are read, never written.
        hparams: Hyperparameters.
        steps: How many steps.
        optimizer: As for :func:`~lightning_hpo.functional.bilevel.unrolled.unrolled`.
        train_losses: As for :func:`~lightning_hpo.functional.bilevel.unrolled.unrolled`.
        states: As for :func:`~lightning_hpo.functional.bilevel.unrolled.unrolled`.
        first: Number of the first step, where ``train_losses`` is a function.

    Returns:
        Parameters and states.

    Raises:
        ValueError: If ``steps`` does not fit ``train_losses``.

    Example:
        >>> from lightning_hpo.functional.bilevel.optimizer_steps import functional_optimizer, sgd
        >>> problem = Problem(lambda w, h: ((w["w"] - h["goal"]) ** 2).sum(), lambda w, h: (w["w"] ** 2).sum())
        >>> start, goal = {"w": torch.tensor([1.0])}, {"goal": torch.tensor(3.0)}
        >>> unroll(problem, start, goal, steps=2, optimizer=functional_optimizer(sgd, lr=0.25)).params
        {'w': tensor([2.5000])}
    """
    moment = Moment({name: value.detach() for name, value in params.items()}, dict(states or {}))
    fixed = {name: value.detach() for name, value in hparams.items()}
    for loss in losses_of(problem, steps, train_losses, first):
        moment = advance(problem, loss, moment, fixed, optimizer)
    return moment


def losses_of(problem: Problem, steps: int, train_losses: Batches, first: int = 0) -> list[Loss]:
    """The training loss of each step.

    Args:
        problem: The problem.
        steps: How many.
        train_losses: As for :func:`~lightning_hpo.functional.bilevel.unrolled.unrolled`.
        first: Number of the first step.

    Returns:
        As many losses as steps.

    Raises:
        ValueError: If there are no steps, a list of another length, or a problem with a ``residual``.
    """
    problems = [] if steps >= 1 else [f"steps must be at least 1, got {steps!r}"]
    if isinstance(train_losses, Sequence) and len(train_losses) != steps:
        problems.append(f"there are {len(train_losses)} train_losses for {steps} steps")
    if problem.residual is not None:
        problems.append("unrolling follows the optimizer, not `residual`; leave that out")
    if problems:
        raise ValueError("; ".join(problems))
    if train_losses is None:
        return [problem.train_loss] * steps
    if isinstance(train_losses, Sequence):
        return list(train_losses)
    return [train_losses(first + index) for index in range(steps)]


def advance(problem: Problem, loss: Loss, moment: Moment, hparams: Tensors, optimizer: FunctionalOptimizer) -> Moment:
    """One inner step, without a graph.

    Args:
        problem: The problem, whose ranks average the gradient.
        loss: The training loss of this step.
        moment: Where it begins.
        hparams: Hyperparameters.
        optimizer: The optimizer.

    Returns:
        Where the next step begins.
    """
    point = Point(moment.params, hparams)
    gradient, _ = point.gradient(lambda params, _: loss(params, hparams), "train_loss", hparams=False)
    with torch.no_grad():
        return Moment(*optimizer(moment.params, point.unravel(problem.reduce(gradient)), moment.states, hparams))


def pull_back(
    problem: Problem,
    loss: Loss,
    moment: Moment,
    hparams: Mapping[str, Tensor],
    optimizer: FunctionalOptimizer,
    adjoint: tuple[Tensor, dict[str, State]],
    product: Product = "exact",
) -> tuple[tuple[Tensor, dict[str, State]], Partial]:
    """What an adjoint at the end of an inner step is at its beginning.

    Args:
        problem: The problem.
        loss: The training loss of this step.
        moment: Where the step begins.
        hparams: Hyperparameters.
        optimizer: The optimizer.
        adjoint: Of the parameters, a vector, and of the optimizer's states.
        product: ``"exact"`` or ``"fd"``.

    Returns:
        The adjoint at the beginning, and by name what the step adds to the hypergradient.
    """
    point = Point(moment.params, hparams)
    second = products(problem, point, product, loss=loss)
    taken = Point(moment.params, hparams)
    grads = Point(point.unravel(problem.reduce(second.residual)), hparams).params
    states = {key: {slot: _leaf(value) for slot, value in slots.items()} for key, slots in moment.states.items()}
    flat = [(key, slot) for key, slots in states.items() for slot, value in slots.items() if _is_leaf(value)]
    with torch.enable_grad():
        new = Moment(*optimizer(taken.params, grads, states, taken.hparams))
    ends = [(new.params[key], part) for key, part in point.unravel(adjoint[0]).items()]
    ends += [(new.states[key][slot], part) for key, slots in adjoint[1].items() for slot, part in slots.items()]
    ends = [(end, part) for end, part in ends if end.requires_grad]
    inputs = [*grads.values(), *taken.params.values(), *taken.hparams.values(), *(states[k][s] for k, s in flat)]
    found = iter(torch.autograd.grad([e for e, _ in ends], inputs, [part for _, part in ends], allow_unused=True))
    bar_g, bar_w = (point.vector({key: next(found) for key in point.params}) for _ in range(2))
    of_step = {key: next(found) for key in taken.hparams}
    earlier: dict[str, State] = {}
    for key, slot in flat:
        if (part := next(found)) is not None:
            earlier.setdefault(key, {})[slot] = part
    curved, of_loss = second.pull_back(bar_g)
    return (bar_w + problem.reduce(curved), earlier), add(of_step, of_loss)


def add(*parts: Partial) -> Partial:
    """The sum of parts of a hypergradient.

    Args:
        parts: By the names of the hyperparameters, None where one is not reached.

    Returns:
        The sums; None where all are.

    Example:
        >>> add({"a": torch.ones(1), "b": None}, {"a": torch.ones(1), "b": None})
        {'a': tensor([2.]), 'b': None}
    """
    found = {name: [value for part in parts if (value := part[name]) is not None] for name in parts[0]}
    return {name: torch.stack(values).sum(0) if values else None for name, values in found.items()}


def _leaf(value: Tensor) -> Tensor:
    return value.detach().requires_grad_() if _is_leaf(value) else value


def _is_leaf(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()
