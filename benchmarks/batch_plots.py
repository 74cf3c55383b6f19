"""Pictures of batches that grow by themselves: their course, loss beside a constant batch, steps to a target."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib import pyplot as plt

mpl.use("Agg")
SAMPLES, STEPS, CPU, _, LOSS, ACCURACY, BATCH, NOISE = range(8)
ADAPTIVE, ADASCALE = "AdaptiveBatchSize()", "AdaptiveBatchSize(), AdaScale"
PICTURED = ("constant 64", "constant, same mean", ADAPTIVE, ADASCALE)  # whose courses are kept


def draw_courses(path: Path, courses: Sequence[Mapping[str, Any]]) -> None:
    """Batch size and noise scale against samples, above, and against time, below; one column an optimizer."""
    mine = [course for course in courses if course["method"] in (ADAPTIVE, ADASCALE)]
    figure, panels = _panels(2, len(mine))
    for column, course in enumerate(mine):
        for row, (key, label) in enumerate(((SAMPLES, "thousand samples"), (CPU, "seconds (CPU)"))):
            panel = panels[row][column]
            x = _values(course, key)
            panel.plot(x, _values(course, BATCH), label="batch size")
            panel.plot(x, _values(course, NOISE), linewidth=0.8, label="gradient noise scale")
            panel.axhline(64, color="grey", linewidth=0.8, label="first batch")
            panel.set(xlabel=label, yscale="log")
        panels[0][column].set_title(course["optimizer"] + course["method"].removeprefix(ADAPTIVE))
    panels[0][0].legend(fontsize=7)
    _save(figure, path)


def draw_loss(path: Path, courses: Sequence[Mapping[str, Any]]) -> None:
    """Training loss against samples, above, and test accuracy against optimizer steps, below."""
    names = list(dict.fromkeys(course["optimizer"] for course in courses))
    figure, panels = _panels(2, len(names))
    for column, name in enumerate(names):
        for course in courses:
            if course["optimizer"] == name and course["method"] in PICTURED:
                panels[0][column].plot(_values(course, SAMPLES), _values(course, LOSS), label=course["method"])
                right = [100 * value for value in _values(course, ACCURACY)]
                panels[1][column].plot(_values(course, STEPS), right, label=course["method"])
        panels[0][column].set(title=name, xlabel="thousand samples", yscale="log")
        panels[1][column].set(xlabel="optimizer steps", xscale="log", ylim=(92, 98.5))
    panels[0][0].set_ylabel("training loss")
    panels[1][0].set_ylabel("test accuracy in %")
    panels[0][-1].legend(fontsize=7)
    _save(figure, path)


def draw_steps(path: Path, table: Sequence[Mapping[str, Any]]) -> None:
    """Optimizer steps and time to the target accuracy; a method that missed it in some seed has no bar."""
    names = list(dict.fromkeys(row["optimizer"] for row in table))
    figure, panels = _panels(2, len(names))
    for column, name in enumerate(names):
        rows = [row for row in table if row["optimizer"] == name][::-1]
        labels = [row["method"] for row in rows]
        for panel, key in ((panels[0][column], "target_steps"), (panels[1][column], "target_cpu_s")):
            colors = ["C1" if label in (ADAPTIVE, ADASCALE) else "C0" for label in labels]
            panel.barh(labels, [row[key] or 0 for row in rows], color=colors)
            panel.tick_params(labelsize=7, labelleft=column == 0)
        panels[0][column].set(title=name, xlabel="steps to 97 %")
        panels[1][column].set(xlabel="seconds (CPU) to 97 %")
    _save(figure, path)


def draw_rules(path: Path, table: Sequence[Mapping[str, Any]]) -> None:
    """Accuracy of the learning rate rules on the digits, under the same policy, beside a constant 64 and the defaults.

    A bar ends at the median, a dot is a seed; those below the axis are counted.
    """
    rules = ["constant 64", "defaults", "none", "sqrt", "linear", "AdaScale", "AdaScale, power 0.5"]
    least, most = 88, 99
    names = list(dict.fromkeys(row["optimizer"] for row in table))
    figure, panels = _panels(1, len(names))
    for panel, name in zip(panels[0], names, strict=True):
        rows = {row["method"]: row for row in table if row["optimizer"] == name}
        shown = [rows[rule] for rule in rules if rule in rows]
        labels = [f"{row['method']}\n{row['steps']} steps" for row in shown]
        panel.barh(labels, [row["accuracy_median"] for row in shown], alpha=0.6)
        for place, row in enumerate(shown):
            seen = [value for value in row["accuracies"] if value >= least]
            panel.plot(seen, [place] * len(seen), "k.", markersize=3)
            if below := len(row["accuracies"]) - len(seen):
                panel.text(least + 0.2, place, f"{below} below", fontsize=7, va="center")
        panel.invert_yaxis()
        panel.set(title=name, xlabel="validation accuracy in %", xlim=(least, most))
        panel.tick_params(labelsize=7)
    _save(figure, path)


def draw_noise(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Gradient noise scale along a run: ours, by AdaptDL's formula, exact."""
    figure, panels = _panels(1, 1)
    panel = panels[0][0]
    samples = [row["samples"] / 1000 for row in rows]
    for key, mark in (("noise_exact", "k-"), ("noise_ours", "o-"), ("noise_adaptdl", "s--")):
        panel.plot(samples, [row[key] for row in rows], mark, markersize=3, label=key.removeprefix("noise_"))
    panel.plot(samples, [row["batch"] for row in rows], color="grey", linewidth=0.8, label="batch size")
    panel.set(xlabel="thousand samples", ylabel="gradient noise scale", yscale="log", title="digits, SGD")
    panel.legend(fontsize=7)
    _save(figure, path)


def _panels(rows: int, columns: int) -> tuple[Any, Any]:
    size = (3.6 * columns + 0.6, 2.6 * rows)
    return plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")


def _values(course: Mapping[str, Any], key: int) -> list[float]:
    values = [point[key] for point in course["points"]]
    if key == SAMPLES:
        return [value / 1000 for value in values]
    return [value or float("nan") for value in values] if key == NOISE else values


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)
    plt.close(figure)
