"""A table, a CSV file and a picture of a search over tasks."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import rich
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from rich.table import Table

from lightning_hpo import distributed
from lightning_hpo.functional.bilevel.guarantees import grid_gap
from lightning_hpo.functional.bilevel.task_tuning import TaskTuning

__all__ = ["TaskDistributionResult"]

STEM = "task_tuning"


@dataclass(frozen=True)
class TaskDistributionResult(TaskTuning):
    """What came out of tuning over tasks, and its report.

    Args:
        hparam: Name of the hyperparameter.
        log: Whether it was searched for in the logarithm.
        keys: Names of the tasks.

    Example:
        >>> import torch
        >>> utilities = torch.tensor([[0.0, 1.0], [0.5, 1.0]], dtype=torch.float64)
        >>> tuning = TaskTuning((0.1, 0.2), ("grid",) * 2, utilities, 0.2, upper=1.0, reachable=2)
        >>> result = TaskDistributionResult.of(tuning, "sigma", True, ["a", "b"])
        >>> result.hparam, result.best, result.rows()[0]
        ('sigma', 0.2, {'task': 'a', 'sigma': 0.1, 'origin': 'grid', 'utility': 0.0})
    """

    hparam: str = "value"
    log: bool = False
    keys: tuple[str, ...] = ()

    @classmethod
    def of(cls, tuning: TaskTuning, hparam: str, log: bool, keys: Sequence[str]) -> "TaskDistributionResult":
        """What a search found, with the names that its report needs.

        Args:
            tuning: What it found.
            hparam: Name of the hyperparameter.
            log: Whether it was searched for in the logarithm.
            keys: Names of the tasks.

        Returns:
            The same with names.
        """
        known = {field.name: getattr(tuning, field.name) for field in fields(TaskTuning)}
        return cls(**known, hparam=hparam, log=log, keys=tuple(keys))

    def rows(self) -> list[dict[str, str | float]]:
        """One row a cell: task, value, where the value came from, utility.

        Returns:
            The rows, of tasks in their order; NaN where a cell failed.
        """
        return [
            {"task": key, self.hparam: value, "origin": origin, "utility": utility}
            for key, line in zip(self.keys, self.utilities.tolist(), strict=True)
            for value, origin, utility in zip(self.values, self.origin, line, strict=True)
        ]

    def report(self, dirpath: str | Path, delta: float = 0.05, plot: bool = True) -> None:
        """Prints a table and writes ``task_tuning.csv`` and ``task_tuning.png``; of several ranks only the first.

        Args:
            dirpath: Folder of the files.
            delta: Probability of failure of the bounds.
            plot: Whether to draw the picture.
        """
        if distributed.rank() != 0:
            return
        folder = Path(dirpath)
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / f"{STEM}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, ["task", self.hparam, "origin", "utility"])
            writer.writeheader()
            writer.writerows(self.rows())
        rich.print(self._table())
        console = rich.get_console()
        for line in self.lines(delta):
            console.print(line, soft_wrap=True, highlight=False, markup=False)
        if plot:
            self._draw(delta).savefig(folder / f"{STEM}.png")

    def lines(self, delta: float = 0.05) -> list[str]:
        """What is to be said besides the table.

        Args:
            delta: Probability of failure of the bounds.

        Returns:
            Sentences.
        """
        alone = self.leave_one_out()
        lines = [
            f"best {self.hparam}: {self.best:.4g}, mean utility {self.means[self.values.index(self.best)]:.4f}",
            f"chosen without each task, on that task: {alone.mean():.4f}",
            f"oscillations seen, task by task: {' '.join(map(str, self.oscillations.tolist()))}",
            f"gap to tasks to come, with probability {1 - delta:g}: {'; '.join(map(str, self.bounds(delta)))}",
        ]
        half = self.upper / 20
        lines.append(f"tasks needed for a gap of {half:g}: {self.tasks_needed(half, delta)}")
        failed = int(self.utilities.isnan().sum())
        lines += [f"failed cells, counted as 0: {failed} of {self.utilities.numel()}"] if failed else []
        lines += [f"on {len(self.held_out)} other tasks: {self.held_out.nanmean():.4f}"] if len(self.held_out) else []
        return lines

    def _table(self) -> Table:
        table = Table(title=f"{self.hparam} over {len(self.keys)} tasks")
        for name in (self.hparam, "from", "mean utility", "standard error"):
            table.add_column(name)
        for value, origin, mean, error in zip(
            self.values, self.origin, self.means.tolist(), self.standard_errors.tolist(), strict=True
        ):
            mark = "*" if value == self.best else ""
            table.add_row(f"{value:.4g}{mark}", origin, f"{mean:.4f}", f"{error:.4f}")
        return table

    def _draw(self, delta: float) -> Figure:
        """Utilities of each task and their mean; beside it what more tasks would prove."""
        figure = Figure(figsize=(9.6, 3.6), dpi=120, layout="constrained")
        FigureCanvasAgg(figure)  # never a window, whatever the user's backend
        left, right = figure.subplots(1, 2)
        for line in self.utilities.tolist():
            left.plot(self.values, line, color="tab:blue", alpha=0.25, linewidth=1, marker=".", markersize=3)
        means, errors = self.means.tolist(), self.standard_errors.tolist()
        left.errorbar(self.values, means, errors, color="black", linewidth=1.6, capsize=2, label="mean, standard error")
        left.axvline(self.best, color="tab:red", linestyle="--", linewidth=1.2, label=f"best: {self.best:.3g}")
        if self.log:
            left.set_xscale("log")
            left.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            left.xaxis.set_major_formatter("{x:g}")
            left.xaxis.set_minor_formatter(NullFormatter())
        left.set(xlabel=self.hparam, ylabel="utility", title=f"{len(self.keys)} tasks")
        tasks = len(self.utilities)
        counts = sorted({tasks, *(round(10 ** (power / 8)) for power in range(41))})
        gaps = [grid_gap(count, self.reachable, delta, self.upper).value for count in counts]
        right.loglog(counts, gaps, color="tab:blue", linewidth=1.6, label="grid and refinement")
        right.plot([tasks], [gaps[counts.index(tasks)]], "o", color="tab:red", label="these tasks")
        right.axhline(self.upper, color="gray", linestyle=":", linewidth=1.2, label="vacuous above")
        right.set(xlabel="tasks", ylabel="gap", title=f"bound, probability {1 - delta:g}")
        for axes in (left, right):
            _tidy(axes)
        return figure


def _tidy(axes: Axes) -> None:
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False)
