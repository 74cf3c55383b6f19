"""Hyperparameters that learn themselves inside an ordinary Lightning Trainer.

The public names below are imported on first use, so that ``import lightning_hpo`` costs nothing: neither torch nor
Lightning is loaded by it.

Example:
    >>> import lightning_hpo
    >>> "TokenCompression" in dir(lightning_hpo)
    True
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:  # what type checkers and editors read; `_HOME` below is what Python reads
    from lightning_hpo.callbacks.base import MethodCallback
    from lightning_hpo.callbacks.diffrate import TokenCompression
    from lightning_hpo.callbacks.report import HyperparameterReport
    from lightning_hpo.functional.compression.schedule import PUBLISHED_SCHEDULES, TokenCompressionSchedule
    from lightning_hpo.hyper import Choice, HyperparameterSet, Integer, Interval, Positive, Simplex, UnitInterval
    from lightning_hpo.models.diffrate import TokenCompressionMixin
    from lightning_hpo.nn.diffrate import apply_token_compression, remove_token_compression, vit_macs

__all__ = [
    "PUBLISHED_SCHEDULES",
    "Choice",
    "HyperparameterReport",
    "HyperparameterSet",
    "Integer",
    "Interval",
    "MethodCallback",
    "Positive",
    "Simplex",
    "TokenCompression",
    "TokenCompressionMixin",
    "TokenCompressionSchedule",
    "UnitInterval",
    "apply_token_compression",
    "remove_token_compression",
    "vit_macs",
]

_HOME = {
    "PUBLISHED_SCHEDULES": "functional.compression.schedule",
    "Choice": "hyper",
    "HyperparameterReport": "callbacks.report",
    "HyperparameterSet": "hyper",
    "Integer": "hyper",
    "Interval": "hyper",
    "MethodCallback": "callbacks.base",
    "Positive": "hyper",
    "Simplex": "hyper",
    "TokenCompression": "callbacks.diffrate",
    "TokenCompressionMixin": "models.diffrate",
    "TokenCompressionSchedule": "functional.compression.schedule",
    "UnitInterval": "hyper",
    "apply_token_compression": "nn.diffrate",
    "remove_token_compression": "nn.diffrate",
    "vit_macs": "nn.diffrate",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value  # the next access does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
