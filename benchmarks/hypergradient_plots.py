"""Pictures of hypergradients: direction against cost, and validation loss against weight decay."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib import pyplot as plt

mpl.use("Agg")


def draw_bias(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Cosine to the exact hypergradient against the cost; early on the left, late on the right."""
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.5), sharey=True, layout="constrained")
    rows = [row for row in rows if row["cost"] is not None]
    families = list(dict.fromkeys(row["estimator"].partition("(")[0] for row in rows))
    colors = plt.get_cmap("tab20")
    for panel, key, title in zip(
        panels,
        ("cosine_ahead", "cosine_late"),
        ("early: to 1000 steps ahead", "at the minimum: to a dense solve"),
        strict=True,
    ):
        for number, family in enumerate(families):
            same = [row for row in rows if row["estimator"].partition("(")[0] == family]
            costs, values = [row["cost"] for row in same], [row[key] for row in same]
            panel.plot(costs, values, "o", color=colors(number), label=family)
            for row in same:
                if "(" in row["estimator"]:
                    text = row["estimator"].partition("(")[2].replace(")", "")
                    spot = (row["cost"], row[key])
                    panel.annotate(text, spot, fontsize=6, xytext=(3, 3), textcoords="offset points")
        panel.axhline(1.0, color="grey", linewidth=0.8)
        panel.set(xscale="log", xlabel="cost in forward and backward passes", title=title)
    panels[0].set_ylabel("cosine to the exact hypergradient")
    panels[1].legend(fontsize=7, loc="lower left")
    _save(figure, path)


def draw_decay(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Validation loss of one shared decay, a line a seed, and what learning ended with."""
    figure, panel = plt.subplots(figsize=(7, 4), layout="constrained")
    learned = list(dict.fromkeys(r["method"] for r in rows if not r["method"].startswith(("shared", "none"))))
    for seed in sorted({row["seed"] for row in rows}):
        grid = [row for row in rows if row["seed"] == seed and row["method"].startswith("shared")]
        label = "one shared decay, a line a seed" if not seed else None
        panel.plot([float(row["decay"]) for row in grid], [row["val_loss"] for row in grid], color="grey", label=label)
        for number, method in enumerate(learned):
            (row,) = (row for row in rows if row["seed"] == seed and row["method"] == method)
            values = [float(value) for value in row["decay"].split()]
            panel.plot(
                values,
                [row["val_loss"]] * len(values),
                ".-",
                color=f"C{number}",
                label=None if seed else f"{method}, its three layers",
            )
    panel.set(xscale="log", xlabel="weight decay", ylabel="validation loss at the end", ylim=(None, 0.6))
    panel.legend(fontsize=7)
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
