r"""One hyperparameter tuned over many tasks: a grid, finer around its best point, then slopes of a surrogate."""

import math
from collections.abc import Callable, Sequence
from typing import Literal, TypeVar

import torch
from torch import Tensor

from lightning_hpo.functional.bilevel.task_cells import Cells, Map, TaskCells
from lightning_hpo.functional.bilevel.task_keys import check_tasks, task_keys
from lightning_hpo.functional.bilevel.task_tuning import TaskTuning

__all__ = ["Refine", "grid_between", "tune_over_tasks"]

T = TypeVar("T")
Refine = Literal["golden", "bisect"]
GOLDEN = (math.sqrt(5) - 1) / 2


def grid_between(low: float, high: float, points: int = 9, *, log: bool = False) -> list[float]:
    """Values from ``low`` to ``high``, both included.

    Args:
        low: The smallest.
        high: The largest.
        points: How many, at least 2.
        log: Whether ratios are equal instead of differences.

    Returns:
        The values.

    Raises:
        ValueError: If an argument is out of range; all are listed.

    Example:
        >>> grid_between(0.0, 1.0, 5), grid_between(1.0, 4.0, 3, log=True)
        ([0.0, 0.25, 0.5, 0.75, 1.0], [1.0, 2.0, 4.0])
    """
    problems = [] if -math.inf < low < high < math.inf else [f"low={low!r} and high={high!r} must be finite and rise"]
    problems += [] if points >= 2 else [f"a grid needs at least 2 points, got {points!r}"]
    problems += [f"a logarithmic grid needs a positive low, got {low!r}"] if log and not low > 0 else []
    if problems:
        raise ValueError("; ".join(problems))
    inner = [_between(low, high, index / (points - 1), log) for index in range(1, points - 1)]
    return [float(low), *inner, float(high)]


def tune_over_tasks(
    tasks: Sequence[T],
    utility: Callable[[T, float], float],
    grid: Sequence[float],
    *,
    upper: float = 1.0,
    log: bool = False,
    refine: Refine | None = "golden",
    refine_steps: int = 4,
    slope: Callable[[T, float], float] | None = None,
    slope_steps: int = 20,
    held_out: Sequence[T] = (),
    keys: Sequence[str] | None = None,
    held_out_keys: Sequence[str] | None = None,
    done: Cells | None = None,
    run: Map = map,
    recheck: bool = True,
) -> TaskTuning:
    r"""The value of a hyperparameter with the largest mean utility over tasks.

    1. Every task at every value of the grid.
    2. ``"golden"``: golden section on the mean between the neighbours of the best point. ``"bisect"``: in rounds, the
       middle of all neighbours between which the utility of some task changes.
    3. With ``slope``, Adam on the mean of a surrogate loss, from the best point of the grid and never beyond its
       neighbours. It cannot replace the grid: far from the best value slopes are often flat or point away from it, and
       through a long training they may be exact and huge, because the loss is rugged.

    The best of all that was evaluated is returned. What is random in a utility must be fixed by the caller, with the
    same seeds and order of data for all values of a task.

    Args:
        tasks: At least 2, drawn independently.
        utility: Utility of a task at a value, from 0 to ``upper``; NaN where training failed.
        grid: Rising values, at least 2; see :func:`grid_between`.
        upper: H.
        log: Whether middles and steps are taken in the logarithm.
        refine: How to go on after the grid; not at all where None.
        refine_steps: Values of the golden section, or rounds of bisection.
        slope: Derivative of a surrogate loss of a task, to be made small, at a value; NaN where it failed. The
            estimators of hypergradients give it; if the surrogate is the training loss itself, its partial derivative
            at the trained weights is enough.
        slope_steps: Adam's steps.
        held_out: Other tasks, to judge the best value by.
        keys: Names of the tasks; made from their contents where None.
        held_out_keys: Likewise.
        done: Cells of a search before; they are not evaluated again. It is filled while cells come in, with plain
            numbers under plain names, so it may be saved at any time.
        run: ``map``, or that of a pool of workers.
        recheck: Whether to evaluate one cell twice, to find out if seeds are fixed.

    Returns:
        The best value, all utilities, and what they say about tasks to come.

    Raises:
        ValueError: If an argument is wrong (all are listed), a task is both tuned on and held out, a utility is out of
            range, or more than a fifth of the cells failed.

    References:
        Balcan, Nguyen and Sharma, "Sample complexity of data-driven tuning of model hyperparameters in neural networks
        with structured parameter-dependent dual function", NeurIPS 2025.

    Example:
        >>> tuning = tune_over_tasks([0.3, 0.4, 0.5], lambda task, value: 1 - abs(task - value), [0.0, 0.5, 1.0])
        >>> round(tuning.best, 1), tuning.tasks_needed(eps=0.1)
        (0.4, 382)
    """
    keys = list(keys if keys is not None else task_keys(tasks))
    others = list(held_out_keys if held_out_keys is not None else task_keys(held_out))
    _check(tasks, grid, log, upper, refine_steps, slope_steps, refine, keys, held_out, others)
    table = _Table(TaskCells(tasks, keys, upper, done, run), utility, grid, log)
    if recheck:
        table.cells.recheck(utility, table.values[0])
    if refine == "golden":
        table.golden(refine_steps)
    elif refine == "bisect":
        table.bisect(refine_steps)
    path = table.descend(slope, slope_steps) if slope is not None else []
    best = table.best()
    judge = TaskCells(held_out, others, upper, table.cells.done, run)
    extra = {"golden": len(grid) * 2**refine_steps, "bisect": (len(grid) - 1) * (2**refine_steps - 1)}
    return TaskTuning(
        values=tuple(table.values),
        origin=tuple(table.origin[value] for value in table.values),
        utilities=table.utilities,
        best=best,
        upper=upper,
        reachable=len(grid) + (extra[refine] if refine is not None else 0),
        held_out=judge.utilities(utility, [best], strict=False).flatten(),
        path=tuple(path),
        cells=table.cells.done,
    )


class _Table:
    """The values tried so far and their utilities."""

    def __init__(
        self, cells: TaskCells, utility: Callable[[T, float], float], grid: Sequence[float], log: bool
    ) -> None:
        self.cells, self.utility, self.log = cells, utility, log
        self.grid = [float(value) for value in grid]
        self.values: list[float] = []
        self.origin: dict[float, str] = {}
        self.utilities: Tensor = torch.empty(len(cells.tasks), 0)
        self.add("grid", self.grid)

    def add(self, origin: str, values: Sequence[float]) -> None:
        """Evaluates values that are new; the whole table is asked for, since failures are counted over all of it."""
        for value in values:
            self.origin.setdefault(value, origin)
        self.values = sorted(self.origin)
        self.utilities = self.cells.utilities(self.utility, self.values)

    def mean(self, value: float) -> float:
        column = self.utilities[:, self.values.index(value)].nan_to_num(0.0).tolist()
        return math.fsum(column) / len(column)  # exactly rounded, whatever the order of tasks

    def best(self, among: Sequence[float] | None = None) -> float:
        """The value with the largest mean; the smallest of them if there are many."""
        return max(among if among is not None else self.values, key=lambda value: (self.mean(value), -value))

    def neighbours(self) -> tuple[float, float, float]:
        """The best point of the grid between its neighbours there."""
        best = self.best(self.grid)
        place = self.grid.index(best)
        return self.grid[max(place - 1, 0)], best, self.grid[min(place + 1, len(self.grid) - 1)]

    def golden(self, evaluations: int) -> None:
        low, _, high = self.neighbours()
        left = right = None
        for _ in range(evaluations):
            if left is None:
                left = self.try_between(low, high, 1 - GOLDEN)
            else:
                right = self.try_between(low, high, GOLDEN)
            if left is None or right is None:
                continue
            if self.mean(left) >= self.mean(right):
                high, left, right = right, None, left
            else:
                low, left, right = left, right, None

    def try_between(self, low: float, high: float, share: float) -> float:
        value = _between(low, high, share, self.log)
        self.add("refine", [value])
        return value

    def bisect(self, rounds: int) -> None:
        for _ in range(rounds):
            jumps = (self.utilities.nan_to_num(0.0).diff(dim=1) != 0).any(0).tolist()
            ends = zip(self.values[:-1], self.values[1:], jumps, strict=True)
            self.add("refine", [_between(low, high, 0.5, self.log) for low, high, jump in ends if jump])

    def descend(self, slope: Callable[[T, float], float], steps: int) -> list[float]:
        """Adam in a coordinate that goes from 0 to 1 between the neighbours; its steps shrink to nothing."""
        low, value, high = self.neighbours()
        path = [value]
        width = math.log(high / low) if self.log else high - low
        place = (math.log(value / low) if self.log else value - low) / width
        first = second = 0.0
        for step in range(1, steps + 1):
            slopes = self.cells.slopes(slope, value)
            if slopes.isnan().all():
                raise ValueError(f"slope failed for every task at {value!r}")
            down = float(slopes.nanmean()) * width * (value if self.log else 1.0)
            first, second = 0.9 * first + 0.1 * down, 0.99 * second + 0.01 * down**2
            unbiased = math.sqrt(second / (1 - 0.99**step))
            rate = 0.1 * (1 - (step - 1) / steps)
            place -= rate * first / (1 - 0.9**step) / (unbiased + 1e-12)
            place = min(max(place, 0.0), 1.0)
            value = _between(low, high, place, self.log)
            path.append(value)
        self.add("slope", [value])
        return path


def _between(low: float, high: float, share: float, log: bool) -> float:
    value = low * (high / low) ** share if log else low + share * (high - low)
    return min(max(value, low), high)


def _check(
    tasks: Sequence[object],
    grid: Sequence[float],
    log: bool,
    upper: float,
    refine_steps: int,
    slope_steps: int,
    refine: str | None,
    keys: Sequence[str],
    held_out: Sequence[object],
    others: Sequence[str],
) -> None:
    values = list(grid)
    checks = {
        f"grid must have at least 2 values, got {values!r}": len(values) > 1,
        f"grid must be finite and rise, got {values!r}": all(map(math.isfinite, values))
        and values == sorted(set(values)),
        f"a logarithmic search needs a positive grid, got {values[:1]!r}": not log or not values or values[0] > 0,
        f"upper must be positive and finite, got {upper!r}": 0 < upper < math.inf,
        f"refine must be 'golden', 'bisect' or None, got {refine!r}": refine in ("golden", "bisect", None),
        f"refine_steps must be at least 1, got {refine_steps!r}": refine_steps >= 1,
        f"slope_steps must be at least 1, got {slope_steps!r}": slope_steps >= 1,
        f"keys must name each task: {len(tasks)}, got {len(keys)}": len(keys) == len(tasks),
        f"held_out_keys must name each task: {len(held_out)}, got {len(others)}": len(others) == len(held_out),
    }
    problems = [text for text, holds in checks.items() if not holds]
    problems += check_tasks(keys, others)
    if problems:
        raise ValueError("; ".join(problems))
