"""Tables and pictures of `self_tuning_search.py`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from self_tuning_tasks import SearchTask

__all__ = ["draw_progress", "draw_schedules", "summary"]

Run = dict[str, Any]


def summary(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Means over seeds, and what three seeds differ by."""
    found = []
    for task, method in dict.fromkeys((r["task"], r["method"]) for r in runs):
        own = [r for r in runs if (r["task"], r["method"]) == (task, method)]
        val, test, accuracy, seconds = (
            [r[name] for r in own] for name in ("val_loss", "test_loss", "test_accuracy", "cpu_s")
        )
        row: dict[str, Any] = {"task": task, "method": method, "seeds": len(own)}
        row |= {"val_loss": round(float(np.mean(val)), 3), "test_loss": round(float(np.mean(test)), 3)}
        row["test_losses"] = f"{min(test):.3f} to {max(test):.3f}"
        row["test_accuracy"] = round(float(np.mean(accuracy)), 3)
        row["test_perplexity"] = round(float(np.mean(np.exp(test))), 1) if "word" in task else None
        found.append(row | {"cpu_s": round(float(np.mean(seconds)), 1)})
    return found


def draw_schedules(task: SearchTask, runs: Sequence[Run], names: Sequence[str], path: Path) -> None:
    """Values over epochs: a panel a hyperparameter, a line a seed; what the searches found stands at the end."""
    columns = min(len(task.ranges), 5)
    lines = -(-len(task.ranges) // columns)
    figure = Figure(figsize=(2.3 * columns, 1.8 * lines + 0.5), layout="constrained")
    panels = figure.subplots(lines, columns, sharex=True, squeeze=False).flatten()
    for panel, (name, range_) in zip(panels, task.ranges.items(), strict=False):
        for number, method in enumerate(names):
            for run in _of(runs, method):
                values = [values[name] for values in run["values"]]
                panel.plot(range(1, len(values) + 1), values, color=f"C{number}", lw=1, label=method)
        for method, mark in (("random search", "x"), ("TPE", "+")):
            for run in _of(runs, method):
                best = int(np.argmin([min(course) for course in run["course"]]))
                panel.plot([task.epochs + 1], [run["values"][best][name]], mark, color="grey", ms=5, label=method)
        panel.set_title(name.replace("_", " "), fontsize=9)
        panel.set_ylim(range_.low, range_.high)
        if range_.kind == "log":
            panel.set_yscale("log")
    for panel in panels[len(task.ranges) :]:
        panel.set_visible(False)
    for panel in panels[len(task.ranges) - columns : len(task.ranges)]:
        panel.set_xlabel("epoch")
        panel.tick_params(labelbottom=True)
    found = dict(zip(*panels[0].get_legend_handles_labels()[::-1], strict=True))
    figure.legend(found.values(), found.keys(), loc="outside upper center", ncols=len(found))
    figure.savefig(path)


def draw_progress(tasks: Sequence[SearchTask], runs: Sequence[Run], path: Path) -> None:
    """The lowest validation loss so far over epochs and over CPU seconds: thick the mean, thin the seeds."""
    figure = Figure(figsize=(10, 3.4 * len(tasks)), layout="constrained")
    panels = figure.subplots(len(tasks), 2, sharey="row", squeeze=False)
    methods = list(dict.fromkeys(r["method"] for r in runs))
    for row, task in zip(panels, tasks, strict=True):
        for number, method in enumerate(methods):
            own = _of([r for r in runs if r["task"] == task.name], method)
            best = [np.minimum.accumulate(np.concatenate(run["course"])) for run in own]
            spent = [_elapsed(run["seconds"]) for run in own]
            epochs = np.arange(1, len(best[0]) + 1)
            for panel, along in ((row[0], [epochs] * len(own)), (row[1], spent)):
                for x, y in zip(along, best, strict=True):
                    panel.plot(x, y, color=f"C{number}", lw=0.5, alpha=0.5)
                panel.plot(np.mean(along, 0), np.mean(best, 0), color=f"C{number}", lw=2, label=method)
        row[0].set(title=task.name, xlabel="epochs in all", ylabel="lowest validation loss so far")
        row[1].set(title=task.name, xlabel="CPU seconds in all")
        ends = [min(min(course) for course in run["course"]) for run in runs if run["task"] == task.name]
        row[0].set_ylim(min(ends) - 0.02, max(ends) + 0.6 * (max(ends) - min(ends)) + 0.1)
    panels[0][1].legend()
    figure.savefig(path)


def _of(runs: Sequence[Run], method: str) -> list[Run]:
    return [r for r in runs if r["method"] == method]


def _elapsed(trials: Sequence[Sequence[float]]) -> np.ndarray[Any, Any]:
    """Seconds from the start of the first trial."""
    before = np.cumsum([0.0, *(trial[-1] for trial in trials[:-1])])
    return np.concatenate([start + np.asarray(trial) for start, trial in zip(before, trials, strict=True)])
