"""Losses for any training step."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_hpo.losses.anyloss import AnyLoss
    from lightning_hpo.losses.soft_confusion_matrix import SoftConfusionMatrix

__all__ = ["AnyLoss", "SoftConfusionMatrix"]

_HOME = {"AnyLoss": "anyloss", "SoftConfusionMatrix": "soft_confusion_matrix"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)  # torchmetrics loads on first use
