"""Pictures of `dag.py`: communities over training, who is linked with whom, and the codes in two dimensions."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import torch
from torch import Tensor
from torch_geometric.data import Data

from lightning_hpo import DAGCommunityDetector

mpl.use("Agg")

__all__ = ["draw", "edge_density"]


def edge_density(labels: Tensor, edge_index: Tensor) -> Tensor:
    """Edges between each two communities, as a share of all pairs of their nodes."""
    count = int(labels.max()) + 1
    cells = labels[edge_index[0]] * count + labels[edge_index[1]]
    edges = cells.bincount(minlength=count**2).view(count, count).double()
    sizes = labels.bincount(minlength=count).double()
    pairs = torch.outer(sizes, sizes) - torch.diag(sizes)
    return edges / pairs.clamp_min(1)


def draw(
    folder: Path, models: Mapping[str, tuple[DAGCommunityDetector, Data]], courses: Sequence[Mapping[str, Any]]
) -> None:
    """Writes the three pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    _draw_courses(folder / "dag_communities.png", courses)
    _draw_density(folder / "dag_density.png", models)
    _draw_projection(folder / "dag_projection.png", models)


def _draw_courses(path: Path, courses: Sequence[Mapping[str, Any]]) -> None:
    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    colours = {name: f"C{i}" for i, name in enumerate(dict.fromkeys(course["graph"] for course in courses))}
    for course in courses:
        epochs = [155 + 5 * i for i in range(len(course["communities"]))]
        label = course["graph"] if course["seed"] == 0 else None
        axes.step(epochs, course["communities"], where="post", color=colours[course["graph"]], alpha=0.7, label=label)
    axes.set(xlabel="epoch", ylabel="communities", title="communities found, three seeds each, up to 32 allowed")
    axes.set_ylim(bottom=0)
    axes.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_density(path: Path, models: Mapping[str, tuple[DAGCommunityDetector, Data]]) -> None:
    figure, panels = plt.subplots(1, len(models), figsize=(5 * len(models), 4), layout="constrained", squeeze=False)
    for axes, (name, (model, data)) in zip(panels[0], models.items(), strict=True):
        density = edge_density(model.predict_communities(data).labels, data.edge_index)
        image = axes.imshow(density.clamp_min(1e-6).log10(), cmap="viridis")
        figure.colorbar(image, ax=axes, label="edges a pair of nodes, log10")
        axes.set(title=name, xlabel="community", ylabel="community")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_projection(path: Path, models: Mapping[str, tuple[DAGCommunityDetector, Data]]) -> None:
    """The two directions in which centres of communities differ most."""
    figure, panels = plt.subplots(1, len(models), figsize=(5 * len(models), 4.4), layout="constrained", squeeze=False)
    for axes, (name, (model, data)) in zip(panels[0], models.items(), strict=True):
        codes, labels = model.codes(model.prepare(data)), model.predict_communities(data).labels
        centres = torch.stack([codes[labels == k].mean(0) for k in labels.unique()])
        directions = torch.linalg.svd(centres - centres.mean(0), full_matrices=False).Vh[:2]
        place = (codes - codes.mean(0)) @ directions.T
        axes.scatter(*place.T, c=labels, cmap="tab10", s=5, linewidths=0)
        axes.set(title=f"{name}, {len(centres)} communities", xticks=[], yticks=[])
    figure.savefig(path, dpi=110)
    plt.close(figure)
