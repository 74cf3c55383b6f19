"""Pictures of bilevel training: the outer loss against gradients and products."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib import pyplot as plt

mpl.use("Agg")


def draw_curves(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """One panel a task, one line a run with the chosen step size."""
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    figure, panels = plt.subplots(1, len(tasks), figsize=(5.5 * len(tasks), 4), layout="constrained", squeeze=False)
    for panel, task in zip(panels[0], tasks, strict=True):
        chosen = [row for row in rows if row["task"] == task and row["chosen"]]
        for number, method in enumerate(dict.fromkeys(row["method"] for row in chosen)):
            for row in (row for row in chosen if row["method"] == method):
                calls, losses = zip(*row["curve"], strict=True)
                label = f"{method}, step {row['lr']:g}" if row["seed"] == 0 else None
                panel.plot(calls, losses, color=f"C{number}", label=label)
        title = {"representation": "an LSTM encoder is outer", "cleaning": "weights of sentences are outer"}[task]
        panel.set(xlabel="gradients and products", ylabel="outer loss", title=title)
        panel.legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
