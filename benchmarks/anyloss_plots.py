"""Pictures of `anyloss.py`."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from matplotlib.figure import Figure
from torch import Tensor

from lightning_hpo import MetricObjective
from lightning_hpo.demos import ImbalancedDataModule

__all__ = ["draw_histograms", "draw_soft_and_hard"]

ASSETS = Path(__file__).parents[1] / "docs" / "assets"
SETTINGS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "metric alone, L = 2 to 73": {"mix": 1.0, "warmup": 0.0, "amplification": 73.0, "amplification_start": 2.0},
    "after a warm-up, metric alone, L = 73": {"mix": 1.0, "amplification": 73.0, "amplification_start": 73.0},
}


class _Course(Callback):
    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        names = ("anyloss/val_soft", "anyloss/val_f1", "anyloss/val_dead_share")
        self.rows.append({name: trainer.callback_metrics[name].item() for name in names})


def draw_soft_and_hard(data: ImbalancedDataModule, fit: Callable[..., Any]) -> None:
    """Soft and hard F1 of validation and the share of dead gradients over epochs, a panel a setting."""
    figure = Figure(figsize=(11, 3.2), layout="constrained")
    for panel, (title, setting) in zip(figure.subplots(1, 3, sharey=True), SETTINGS.items(), strict=True):
        course = _Course()
        fit(data, 0, False, MetricObjective("f1", **setting), course, validate=True)
        epochs = range(1, len(course.rows) + 1)
        panel.plot(epochs, [row["anyloss/val_soft"] for row in course.rows], label="soft F1")
        panel.plot(epochs, [row["anyloss/val_f1"] for row in course.rows], label="F1")
        panel.plot(epochs, [row["anyloss/val_dead_share"] for row in course.rows], "k:", label="dead share")
        panel.set(title=title, xlabel="epoch", ylim=(-0.02, 1.02))
    panel.legend()
    figure.savefig(ASSETS / "anyloss_soft_and_hard.png", dpi=110)


def draw_histograms(trained: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """Probabilities of positives and negatives, a panel a training."""
    figure = Figure(figsize=(11, 2.8), layout="constrained")
    bins = torch.linspace(0, 1, 21).tolist()
    for panel, (title, (logits, labels)) in zip(figure.subplots(1, len(trained)), trained.items(), strict=True):
        p = logits.sigmoid()
        for label, name in ((0, "negatives"), (1, "positives")):
            chosen = p[labels == label].tolist()
            panel.hist(chosen, bins, weights=[1 / len(chosen)] * len(chosen), alpha=0.6, label=name)
        panel.axvline(0.5, color="k", lw=0.8)
        panel.set(title=title, xlabel="probability", ylim=(0, 1))
    panel.legend()
    figure.savefig(ASSETS / "anyloss_histograms.png", dpi=110)
