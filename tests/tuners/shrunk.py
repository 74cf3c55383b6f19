"""A problem whose every utility is known: a mean, shrunk by a penalty that is to be tuned."""

from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_hpo import HyperparameterSet, Positive

UPPER = 4.0
MEANS = (1.3, 1.6, 1.45, 1.8, 1.2)
QUICK = {"max_epochs": 1, "accelerator": "cpu"}


class Shrunk(LightningModule):
    """One step of SGD reaches the solution: the mean of the training data divided by one more than the penalty."""

    made = 0

    def __init__(self, decay: float) -> None:
        super().__init__()
        type(self).made += 1
        self.decay = decay
        self.mean = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def penalty(self) -> Any:
        return self.decay

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return (batch[0] - self.mean).square().mean() + self.penalty() * self.mean.square()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", (batch[0] - self.mean).square().mean())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.5 / (1 + self.decay))


class Learned(Shrunk):
    """The same; slopes are asked for where it stands in a set."""

    def __init__(self, decay: float) -> None:
        super().__init__(decay)
        self.hypers = HyperparameterSet(decay=Positive(torch.tensor(decay, dtype=torch.float64)))

    def penalty(self) -> Any:
        return self.hypers["decay"]


def loader(mean: float, **settings: Any) -> DataLoader[Any]:
    values = torch.tensor([mean - 0.1, mean, mean + 0.1], dtype=torch.float64)
    return DataLoader(TensorDataset(values), batch_size=3, **settings)


def pairs(means: Any = MEANS) -> list[Any]:
    return [(loader(mean), loader(1.0)) for mean in means]


class Shrinking(LightningDataModule):
    """The same data; what it is asked for is counted."""

    def __init__(self, mean: float) -> None:
        super().__init__()
        self.mean, self.prepared = mean, 0

    def prepare_data(self) -> None:
        self.prepared += 1

    def setup(self, stage: str) -> None:
        self.pair = (loader(self.mean), loader(1.0))

    def train_dataloader(self) -> Any:
        return self.pair[0]

    def val_dataloader(self) -> Any:
        return self.pair[1]


def utility(mean: float, decay: float) -> float:
    """In closed form: the three validation values spread by 0.02 / 3 around 1."""
    return UPPER - (mean / (1 + decay) - 1) ** 2 - 0.02 / 3
