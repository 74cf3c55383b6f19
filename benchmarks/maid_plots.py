"""Pictures of `maid_quality.py`."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt

mpl.use("Agg")

Course = Sequence[Mapping[str, float]]


def draw(path: Path, courses: Mapping[str, Course]) -> None:
    """Loss against work, the staircase of the accuracies, and the band that is certain to hold the loss."""
    figure, (loss, stairs, band) = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    for name, course in courses.items():
        loss.plot([at["work"] for at in course], [at["val_loss"] for at in course], label=name, linewidth=1.4)
    loss.set(xscale="log", yscale="log", xlabel="lower and conjugate gradient iterations", ylabel="validation loss")
    loss.legend(fontsize=7)
    adaptive = next(iter(courses.values()))
    steps = range(1, len(adaptive) + 1)
    for name, label in (("eps", "accuracy of the lower solve, ε"), ("delta", "residual of the adjoint, δ")):
        stairs.step(steps, [at[name] for at in adaptive], where="post", label=label)
    stairs.set(yscale="log", xlabel="outer step")
    stairs.legend(fontsize=8)
    band.fill_between(
        steps,
        [at["lower"] for at in adaptive],
        [at["upper"] for at in adaptive],
        alpha=0.3,
        label="certain to hold the true loss",
    )
    band.plot(steps, [at["val_loss"] for at in adaptive], linewidth=1, label="loss at the inexact solution")
    band.set(xlabel="outer step", ylabel="validation loss", ylim=(0, None))
    band.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
