"""BO-REP with several tasks: one set of outer parameters, inner parameters for each task (meta-learning)."""

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_hpo.functional.bilevel.bo_rep import SingleLoopBilevel, SingleLoopInfo
from lightning_hpo.functional.bilevel.outer_gradient import OuterGradient
from lightning_hpo.functional.bilevel.problem import Tensors
from lightning_hpo.functional.bilevel.single_loop_state import judge, wide_zeros

__all__ = ["SingleLoopTasks", "TasksState"]

Batches = Mapping[str, Iterator[Any]]


class TasksState(NamedTuple):
    """Where a run stands; ``_asdict()`` is plain types, and ``TasksState(**saved)`` goes on from there.

    Attributes:
        inner: Inner parameters of each task, by task and name.
        outer: Outer parameters by name.
        z: Running solution of each task's linear system.
        m: Momentum, by the names of the outer parameters.
        steps: Iterations of each task so far.
        watch: What :class:`~lightning_hpo.functional.bilevel.adjoint_watch.Watch` remembers.
    """

    inner: dict[str, Tensors]
    outer: Tensors
    z: dict[str, Tensors]
    m: Tensors
    steps: dict[str, int]
    watch: tuple[int, int, float, float] = (0, 0, 0.0, 0.0)


@dataclass(frozen=True)
class SingleLoopTasks:
    r"""Minimises :math:`\frac1T \sum_i f_i(x, y_i^*(x))` with :math:`y_i^*(x) = \arg\min_y g_i(x, y)`.

    Each task :math:`i` has inner parameters :math:`y_i`, a running solution :math:`z_i` and a schedule of inner steps
    of its own. A step visits some of the tasks one after the other, so that one graph at a time is in memory. The
    outer parameters then take one step along the mean of their hypergradients:

    .. math::

        m \leftarrow \beta m + (1 - \beta) \frac1T \sum_i h_i, \qquad x \leftarrow x - \eta\, m / \max(\|m\|, m_0)

    Args:
        method: Losses and settings. Losses are those of every task: what tells tasks apart is in their batches.

    References:
        Hao, Gong and Liu, "Bilevel Optimization under Unbounded Smoothness", ICLR 2024, section on hyper-representation
        learning; Ji, Lee, Liang and Poor, "Convergence of Meta-Learning with Task-Specific Adaptation", NeurIPS 2020.

    Example:
        >>> from itertools import repeat
        >>> tasks = SingleLoopTasks(SingleLoopBilevel(
        ...     inner_loss=lambda y, x, _: ((y["y"] - x["x"]) ** 2).sum() / 2,
        ...     outer_loss=lambda y, x, goal: ((y["y"] - goal) ** 2).sum() / 2,
        ...     lr=0.02, inner_lr=0.5, z_lr=0.5,
        ... ))
        >>> state = tasks.start({name: {"y": torch.zeros(1)} for name in "ab"}, {"x": torch.tensor([-2.0])})
        >>> for _ in range(200):
        ...     state, _ = tasks.step(state, dict.fromkeys("ab", repeat(None)), {"a": repeat(0.0), "b": repeat(2.0)})
        >>> bool((state.outer["x"] - 1).abs() < 0.3)  # between the goals of both
        True
    """

    method: SingleLoopBilevel

    def start(self, inner: Mapping[str, Mapping[str, Tensor]], outer: Mapping[str, Tensor]) -> TasksState:
        """The first state: m and every z are zero.

        Args:
            inner: Inner parameters by task and name.
            outer: Outer parameters by name.

        Returns:
            The state, on copies.

        Raises:
            ValueError: If there is no task, or a tensor is both inner and outer.
        """
        if not inner:
            raise ValueError("there must be at least one task")
        states = {task: self.method.start(params, outer) for task, params in inner.items()}
        copy = next(iter(states.values())).outer
        own = {task: state.inner for task, state in states.items()}
        z = {task: wide_zeros(params) for task, params in own.items()}
        return TasksState(own, copy, z, wide_zeros(copy), dict.fromkeys(own, 0))

    def refine(self, state: TasksState, train: Batches, **settings: Any) -> TasksState:
        """Brings the inner parameters of tasks close to their solutions for the present x.

        Args:
            state: Where to begin.
            train: Training batches by task; other tasks stay where they are.
            **settings: As for :meth:`~lightning_hpo.functional.bilevel.bo_rep.SingleLoopBilevel.refine`.

        Returns:
            The state with other inner parameters.

        Raises:
            ValueError: If there is an unknown task.
        """
        _require_tasks(state, train, train)
        found = {task: self.adapt(state.inner[task], state.outer, train[task], **settings) for task in train}
        return state._replace(inner={**state.inner, **found})

    def adapt(
        self, inner: Mapping[str, Tensor], outer: Mapping[str, Tensor], train: Iterator[Any], **settings: Any
    ) -> Tensors:
        """Inner parameters for a task, with x held still: how a task is evaluated that training has not seen.

        Args:
            inner: Where to begin.
            outer: Outer parameters.
            train: Its training batches (the support set).
            **settings: As for :meth:`~lightning_hpo.functional.bilevel.bo_rep.SingleLoopBilevel.refine`.

        Returns:
            The inner parameters; score them on the query set.
        """
        return self.method.refine(self.method.start(inner, outer), train, **settings).inner

    def step(
        self, state: TasksState, train: Batches, val: Batches, *, lr: float | None = None
    ) -> tuple[TasksState, SingleLoopInfo]:
        """One step of the outer parameters.

        Args:
            state: Where it begins.
            train: Training batches of the tasks to visit, in this order, the same on every rank.
            val: Validation batches of the same tasks.
            lr: Length of this step in place of the usual one, for schedules.

        Returns:
            The next state, and how it went: the mean outer loss, and root mean squares over tasks of the lengths that
            belong to one. If one task's numbers are not finite, x, m and every z stay.

        Raises:
            ValueError: If tasks are unknown or differ, or as
                :func:`~lightning_hpo.functional.bilevel.outer_gradient.outer_gradient`.
            FloatingPointError: If hypergradients were not finite ten times in a row.
        """
        _require_tasks(state, train, val)
        inner, steps, found, taken = dict(state.inner), dict(state.steps), {}, 0
        batches = {}
        for task in train:
            inner[task], count = self.method.inner_update(inner[task], state.outer, steps[task], train[task])
            batches[task] = next(train[task])
            found[task] = self.method.estimate(inner[task], state.outer, state.z[task], batches[task], next(val[task]))
            steps[task], taken = steps[task] + 1, taken + count
        mean = {name: _mean([part.gradients[name] for part in found.values()]) for name in state.outer}
        outer, m = self.method.outer_update(state.outer, state.m, mean, lr)
        loss = _mean([part.loss for part in found.values()])
        watch, info, grown = judge(state.watch, _norms(mean, found), loss, m, taken, self.method.z_lr)
        if grown:
            highest = max(self.method.curvature(inner[task], state.outer, batches[task]) for task in train)
            warnings.warn(watch.words(self.method.z_lr, highest), stacklevel=2)
        if info.skipped:
            return state._replace(inner=inner, steps=steps, watch=watch.plain()), info
        z = {**state.z, **{task: part.z for task, part in found.items()}}
        return TasksState(inner, outer, z, m, steps, watch.plain()), info


def _norms(mean: Tensors, found: Mapping[str, OuterGradient]) -> Tensor:
    """Length of the mean hypergradient, and root mean squares of the other lengths; shape ``(4,)``."""
    own = torch.stack([part.norms[1:] for part in found.values()])
    whole = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(value) for value in mean.values()]))
    return torch.cat([whole.to(own).reshape(1), torch.linalg.vector_norm(own, dim=0) / len(own) ** 0.5])


def _mean(values: list[Tensor]) -> Tensor:
    return torch.stack(values).mean(0)


def _require_tasks(state: TasksState, train: Batches, val: Batches) -> None:
    problems = [f"'{task}' is no task: {list(state.inner)}" for task in {**train, **val} if task not in state.inner]
    problems += [f"'{task}' has no training batches" for task in val if task not in train]
    problems += [f"'{task}' has no validation batches" for task in train if task not in val]
    if not train:
        problems.append("no task is visited")
    if problems:
        raise ValueError("; ".join(problems))
