"""Pictures of `denoising.py`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio

mpl.use("Agg")

SIDE = 128  # of the part that is shown
CORNERS = {0: (40, 70), 3: (60, 60), 8: (180, 180)}  # image of Set12: top and left


def draw_work(path: Path, courses: Mapping[str, Sequence[Mapping[str, float]]], grid: Mapping[str, Any]) -> None:
    """How good the training crops have become after how much work, beside the grid's end."""
    figure, axes = plt.subplots(figsize=(6.5, 4), layout="constrained")
    for name, course in courses.items():
        axes.plot([at["work"] for at in course], [at["train_db"] for at in course], label=f"{name}, MAID")
    axes.plot(grid["work"], grid["train_db"], "k*", markersize=11, label="total variation, best of the grid")
    axes.axhline(grid["train_db"], color="k", linewidth=0.7, linestyle=":")
    axes.set(xscale="log", xlabel="lower and conjugate gradient iterations", ylabel="training crops, dB")
    axes.legend()
    _save(figure, path)


def draw_images(path: Path, images: Mapping[str, Sequence[Tensor]], clean: Sequence[Tensor]) -> None:
    """Parts of three images as each setting leaves them, with the ratios of the whole images."""
    columns = [*images, "clean"]
    figure, axes = plt.subplots(
        len(CORNERS), len(columns), figsize=(2 * len(columns), 2.25 * len(CORNERS)), layout="constrained", squeeze=False
    )
    for row, (number, (top, left)) in zip(axes, CORNERS.items(), strict=True):
        for axis, name in zip(row, columns, strict=True):
            image = clean[number] if name == "clean" else images[name][number]
            shown = image[top : top + SIDE, left : left + SIDE].clamp(0, 1)
            axis.imshow(shown.numpy(), cmap="gray", vmin=0, vmax=1)
            axis.set_axis_off()
            if name == "clean":
                axis.set_title(name, fontsize=8)
                continue
            ratio = peak_signal_noise_ratio(image, clean[number], data_range=1.0).item()
            axis.set_title(f"{name.replace(', ', chr(10))}\n{ratio:.2f} dB", fontsize=7)
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
