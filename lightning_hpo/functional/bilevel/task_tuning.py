r"""What came out of tuning one hyperparameter over many tasks, and what it says about tasks to come."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_hpo.functional.bilevel.guarantees import Gap, empirical_gap, grid_gap, tasks_needed, uniform_gap
from lightning_hpo.functional.bilevel.piecewise import count_oscillations
from lightning_hpo.functional.bilevel.task_cells import Cells

__all__ = ["TaskTuning"]


def _nothing() -> Tensor:
    return torch.empty(0, dtype=torch.float64)


@dataclass(frozen=True)
class TaskTuning:
    r"""Utilities of tasks at all values that were tried, and the best value.

    A failed cell counts as utility 0 in means: it is the worst that can happen, so bounds go on to hold.

    Args:
        values: What was tried, rising.
        origin: Of each value: ``"grid"``, ``"refine"`` or ``"slope"``.
        utilities: ``(tasks, values)`` in float64, NaN where it failed.
        best: The value with the largest mean; the smallest of them if there are many.
        upper: H.
        reachable: How many values the grid and its refinement could have tried, whatever the tasks.
        held_out: Utilities of other tasks at the best value.
        path: Values of the slope phase.
        cells: All that was evaluated, to go on from.

    Example:
        >>> utilities = torch.tensor([[0.0, 1.0, 0.0], [0.5, 1.0, 1.0]], dtype=torch.float64)
        >>> tuning = TaskTuning((0.1, 0.2, 0.3), ("grid",) * 3, utilities, 0.2, upper=1.0, reachable=3)
        >>> tuning.means.tolist(), tuning.oscillations.tolist(), tuning.leave_one_out().tolist()
        ([0.25, 1.0, 0.5], [2, 1], [1.0, 1.0])
        >>> print(tuning.bounds()[0])
        vacuous (grid)
    """

    values: tuple[float, ...]
    origin: tuple[str, ...]
    utilities: Tensor
    best: float
    upper: float
    reachable: int
    held_out: Tensor = field(default_factory=_nothing)
    path: tuple[float, ...] = ()
    cells: Cells | None = None

    @property
    def means(self) -> Tensor:
        """``(values,)``: mean over tasks."""
        return self.utilities.nan_to_num(0.0).mean(0)

    @property
    def standard_errors(self) -> Tensor:
        """``(values,)``: of the means."""
        return self.utilities.nan_to_num(0.0).std(0) / len(self.utilities) ** 0.5

    @property
    def oscillations(self) -> Tensor:
        """``(tasks,)``: oscillations that were seen; between the values tried there may be more."""
        counts = [count_oscillations(row[~row.isnan()]) if not row.isnan().all() else 0 for row in self.utilities]
        return torch.tensor([int(count) for count in counts])

    def leave_one_out(self) -> Tensor:
        """``(tasks,)``: utility of each task at the point of the grid that is best for all others."""
        grid = torch.tensor([origin == "grid" for origin in self.origin])
        utilities = self.utilities[:, grid].nan_to_num(0.0)
        others = utilities.sum(0) - utilities
        return utilities.gather(1, others.argmax(1, keepdim=True)).squeeze(1)

    def bounds(
        self, delta: float = 0.05, *, log2_b: float | None = None, exact: Sequence[int] | None = None
    ) -> list[Gap]:
        r"""Gaps between means over these tasks and expectations, the smallest first.

        The gap of the grid counts every value that the search might have tried. It says nothing of a value that the
        slope phase found, and is not certified if that is the best. Gaps for all values in the range need the
        oscillations: exact ones, or a bound from :mod:`~lightning_hpo.functional.bilevel.component_counts`.

        Args:
            delta: Probability of failure of each; to choose between several by looking, divide it by their number.
            log2_b: :math:`\log_2` of a bound on the oscillations of any task.
            exact: Oscillations of each of these tasks, counted exactly.

        Returns:
            The gaps; that from the oscillations seen is not certified.

        Raises:
            ValueError: If ``exact`` has not one count a task.
        """
        tasks = len(self.utilities)
        if exact is not None and len(exact) != tasks:
            raise ValueError(f"exact must have one count a task: {tasks}, got {len(exact)}")
        covered = self.origin[self.values.index(self.best)] != "slope"
        grid = grid_gap(tasks, self.reachable, delta, self.upper)
        gaps = [Gap(grid.value, grid.upper, grid.kind, certified=covered)]
        counts = self.oscillations.tolist() if exact is None else exact
        gaps.append(empirical_gap(counts, delta, self.upper, exact=exact is not None))
        if log2_b is not None:
            gaps.append(uniform_gap(tasks, log2_b, delta, self.upper))
        return sorted(gaps, key=float)

    def tasks_needed(self, eps: float, delta: float = 0.05) -> int:
        """How many tasks make the gap of the same search at most ``eps``.

        Args:
            eps: The gap asked for, positive; the best value found is within twice of it of the best it might find.
            delta: Probability of failure.

        Returns:
            The number of tasks.
        """
        return tasks_needed(eps, lambda tasks: grid_gap(tasks, self.reachable, delta, self.upper))
