"""Pictures of what token compression learned: accuracy against cost, kept tokens, token groups."""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import matplotlib as mpl
import torch
from matplotlib import pyplot as plt
from torch import nn

from lightning_hpo import TokenCompression, apply_token_compression
from lightning_hpo.demos.image_data import ImageDataModule
from lightning_hpo.nn.diffrate import token_groups

mpl.use("Agg")
MARKS = {
    "learned": "o-",
    "learned pairs": "D-",
    "constant merging": "s--",
    "ToMe": "^--",
    "constant pruning": "v:",
    "random pruning": "x:",
}


class LearnedCourse(Protocol):
    """What was learned for one budget, and how."""

    compression: TokenCompression
    steps: list[int]
    kept: list[tuple[int, ...]]


def draw_accuracy(path: Path, means: Sequence[Mapping[str, Any]]) -> None:
    """Accuracy against multiply-accumulates, one panel a data set."""
    names = list(dict.fromkeys(row["data"] for row in means))
    figure, panels = plt.subplots(1, len(names), figsize=(4.2 * len(names), 3.4), squeeze=False, layout="constrained")
    for panel, name in zip(panels[0], names, strict=True):
        rows = [row for row in means if row["data"] == name]
        for method, mark in MARKS.items():
            points = [row for row in rows if row["method"] == method]
            cost, right, spread = ([row[key] for row in points] for key in ("macs", "accuracy", "spread"))
            panel.errorbar(cost, right, spread, fmt=mark, label=method, capsize=2, markersize=4, linewidth=1)
        whole = next(row["accuracy"] for row in rows if row["method"] == "dense")
        panel.axhline(whole, color="grey", linewidth=0.8, label="dense")
        panel.set(title=name, xlabel="multiply-accumulates, share of the dense network", ylabel="test accuracy in %")
        panel.set_ylim(bottom=max(whole - 25, 0))
    panels[0][0].legend(fontsize=7)
    _save(figure, path)


def draw_rates(path: Path, name: str, courses: Mapping[float, LearnedCourse]) -> None:
    """Kept tokens of each block over training, one panel a budget."""
    figure, panels = plt.subplots(
        1, len(courses), figsize=(3 * len(courses), 3), sharey=True, squeeze=False, layout="constrained"
    )
    for panel, (target, course) in zip(panels[0], courses.items(), strict=True):
        for block, kept in enumerate(zip(*course.kept, strict=True)):
            panel.plot(course.steps, kept, label=f"block {block}")
        panel.set(title=f"{name}, budget {target:.0%}", xlabel="step")
    panels[0][0].set_ylabel("tokens after the block")
    panels[0][-1].legend(fontsize=7)
    _save(figure, path)


def draw_groups(
    path: Path, model: nn.Module, data: ImageDataModule, courses: Mapping[float, LearnedCourse], images: int = 6
) -> None:
    """Test images, and below them the groups of patches under each budget; pruned patches are black."""
    pictures, _ = next(iter(data.test_dataloader()))
    pictures = pictures[:images]
    rows = 1 + len(courses)
    figure, panels = plt.subplots(rows, images, figsize=(1.3 * images, 1.3 * rows), layout="constrained")
    low, high = pictures.amin((1, 2, 3), True), pictures.amax((1, 2, 3), True)
    shown = ((pictures - low) / (high - low)).permute(0, 2, 3, 1).expand(-1, -1, -1, 3).numpy()
    for column in range(images):
        panels[0, column].imshow(shown[column])
    for row, (target, course) in enumerate(courses.items(), 1):
        network = apply_token_compression(copy.deepcopy(model).cpu().eval(), course.compression.schedule, trace=True)
        with torch.inference_mode():
            network(pictures)
        groups = token_groups(network)
        for column in range(images):
            panels[row, column].imshow(_overlay(shown[column], groups[column]))
        panels[row, 0].set_ylabel(f"{target:.0%}", rotation=0, labelpad=14)
    for panel in panels.flat:
        panel.set(xticks=[], yticks=[])
    _save(figure, path)


def _overlay(image: Any, groups: torch.Tensor) -> Any:
    """The image tinted by the group of each patch; groups of one patch keep their own grey."""
    side = round(len(groups) ** 0.5)
    scale = image.shape[0] // side
    grid = groups.view(side, side).repeat_interleave(scale, 0).repeat_interleave(scale, 1).numpy()
    size = torch.bincount(groups.clamp(min=0), minlength=len(groups)).numpy()[grid.clip(0)]
    tint = mpl.colormaps["tab20"]((grid * 7) % 20)[..., :3]
    merged = 0.45 * image + 0.55 * tint
    alone = (size == 1)[..., None]
    return (alone * image + ~alone * merged) * (grid >= 0)[..., None]


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)
    plt.close(figure)
