"""What the two tasks of `self_tuning_search.py` have in common: hyperparameters, fixed or tuned, and a score."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_hpo import HyperparameterSet, Integer, Interval, Positive
from lightning_hpo.hyper import Domain
from lightning_hpo.nn.setting import Setting

__all__ = ["Range", "SearchTask", "settings_of"]


@dataclass(frozen=True)
class Range:
    """Where a hyperparameter begins, and where a search draws it from.

    Args:
        low: Lower end.
        high: Upper end.
        init: First value of a run that tunes itself.
        kind: ``"log"`` is drawn uniformly on a logarithmic scale, and tuned without an upper end.
    """

    low: float
    high: float
    init: float = 0.05
    kind: Literal["uniform", "whole", "log"] = "uniform"

    def domain(self) -> Domain:
        """What :class:`SelfTuning` tunes it in."""
        if self.kind == "whole":
            return Integer(self.init, int(self.low), int(self.high))
        return Positive(self.init) if self.kind == "log" else Interval(self.init, self.low, self.high)

    def at(self, share: float) -> float:
        """The value below which a share of all draws lies."""
        if self.kind == "log":
            return math.exp(math.log(self.low) + share * math.log(self.high / self.low))
        if self.kind == "whole":
            return min(math.floor(self.low + share * (self.high - self.low + 1)), self.high)
        return self.low + share * (self.high - self.low)


def settings_of(
    ranges: Mapping[str, Range], fixed: Mapping[str, float] | None
) -> tuple[HyperparameterSet | None, dict[str, Setting]]:
    """The hyperparameters that tune themselves, if any, and what a layer is to be given by name."""
    if fixed is not None:
        return None, dict(fixed)
    hypers = HyperparameterSet(**{name: range_.domain() for name, range_ in ranges.items()})
    return hypers, {name: partial(hypers.__getitem__, name) for name in hypers}


@dataclass(frozen=True)
class SearchTask:
    """A network, its data, its hyperparameters, and how long it is trained.

    Args:
        name: What it is.
        short: The same in the name of a file.
        ranges: Its hyperparameters.
        parts: Training, validation and test data.
        build: From fixed values, or None, to the module, whose ``net`` ends in logits.
        epochs: Of a run that tunes itself, and of a search in all.
        trials: Of a search.
        random_trials: How many of them are random before the estimator begins.
        batch: Examples a batch.
        tuning: Arguments of :class:`SelfTuning` by method.
        clip: Largest norm of a gradient.
    """

    name: str
    short: str
    ranges: Mapping[str, Range]
    parts: Sequence[TensorDataset]
    build: Callable[[Mapping[str, float] | None], LightningModule]
    epochs: int
    trials: int
    random_trials: int
    batch: int
    tuning: Mapping[str, Mapping[str, Any]]
    clip: float | None = None

    def initial(self) -> dict[str, float]:
        """Where a run that tunes itself begins."""
        return {name: range_.init for name, range_ in self.ranges.items()}

    def loaders(self, seed: int) -> tuple[DataLoader[Any], DataLoader[Any]]:
        """Training and validation batches."""
        order = torch.Generator().manual_seed(seed)
        train, val, _ = self.parts
        return DataLoader(train, self.batch, shuffle=True, generator=order, drop_last=True), DataLoader(val, self.batch)

    @torch.no_grad()
    def score(self, module: Any, part: int) -> tuple[float, float]:
        """Mean loss and accuracy of what is not padding; 1 is validation, 2 the test."""
        loss, right, count = 0.0, 0, 0
        for batch in DataLoader(self.parts[part], 250):
            logits, labels = module.predict(batch)
            loss += F.cross_entropy(logits, labels, reduction="sum").item()
            right += int((logits.argmax(1) == labels).sum())
            count += len(labels)
        return loss / count, right / count


class TunedModule(LightningModule):
    """The module of a task: its loss is that of its logits, and SGD steps it."""

    net: nn.Module
    lr: float
    hypers: HyperparameterSet

    def predict(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Logits ``(n, classes)`` and labels ``(n)``."""
        raise NotImplementedError

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Cross-entropy."""
        return F.cross_entropy(*self.predict(batch))

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Cross-entropy, and nothing else."""
        return F.cross_entropy(*self.predict(batch))

    def configure_optimizers(self) -> Any:
        """SGD with momentum."""
        return torch.optim.SGD(self.net.parameters(), lr=self.lr, momentum=0.9)
