"""Pictures of `maid_quality.py` and `maid_mnist.py`."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt

mpl.use("Agg")

Course = Sequence[Mapping[str, float]]


def draw(path: Path, courses: Mapping[str, Course], quadratic: Course) -> None:
    """Loss against work, the staircase of the accuracies, and how wide the band is that holds the true loss."""
    figure, (loss, stairs, band) = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    for name, course in courses.items():
        if len(course) > 1:
            loss.plot([at["work"] for at in course], [at["val_loss"] for at in course], label=name, linewidth=1.4)
    loss.set(xscale="log", xlabel="lower and conjugate gradient iterations", ylabel="validation loss", title="digits")
    loss.legend(fontsize=7, loc="lower left")
    steps = range(1, len(quadratic) + 1)
    stairs.step(steps, [at["eps"] for at in quadratic], where="post", label="accuracy of the lower solve, ε")
    stairs.step(steps, [at["delta"] for at in quadratic], "--", where="post", label="residual of the adjoint, δ")
    stairs.set(yscale="log", xlabel="outer step", title="quadratic")
    stairs.legend(fontsize=8)
    adaptive = next(iter(courses.values()))
    steps = range(2, len(adaptive) + 1)
    fallen = [before["val_loss"] - after["val_loss"] for before, after in pairwise(adaptive)]
    band.plot(steps, fallen, label="what the step gained")
    band.plot(
        steps, [at["upper"] - at["lower"] for at in adaptive[1:]], label="upper less lower bound on the true loss"
    )
    band.set(yscale="log", xlabel="outer step", ylabel="validation loss", title=f"digits: {next(iter(courses))}")
    band.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_work(path: Path, courses: Mapping[str, Course]) -> None:
    """Loss against work, and how small the smallest weight gets, which is what makes lower problems hard."""
    figure, (loss, least) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for name, course in courses.items():
        work = [at["work"] for at in course]
        loss.plot(work, [at["val_loss"] for at in course], marker=".", label=name, linewidth=1.4)
        least.plot(work, [at["least"] for at in course], marker=".", label=name, linewidth=1.4)
    xlabel = "lower and conjugate gradient iterations"
    loss.set(xscale="log", xlabel=xlabel, ylabel="validation loss", title="MNIST, 1440 weights")
    least.set(xscale="log", xlabel=xlabel, ylabel="smallest log l2 weight", title="how hard the lower problem is")
    loss.legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
