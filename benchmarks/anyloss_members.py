"""Several seeds in one fit: a module whose every label is a network of its own, with samples of its own.

Sums of soft counts are taken label by label and the metric is averaged over labels, so that each network gets its own
gradient divided by the number of seeds, which Adam does not notice.
"""

import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

__all__ = ["FEWEST", "Members", "Table", "fit_members"]

FEWEST = 500  # steps of a run


class Members(LightningModule):
    """Networks of one hidden layer, side by side.

    Logits are ``(batch, members)``, features ``(batch, members, columns)``.

    Args:
        columns: Features of a sample.
        seeds: One for each member's first weights.
        hidden: Units.
        criterion: The loss; a cross-entropy by default.
    """

    def __init__(
        self, columns: int, seeds: Sequence[int], hidden: int = 64, criterion: nn.Module | None = None
    ) -> None:
        super().__init__()
        layers = []
        for seed in seeds:
            torch.manual_seed(seed)
            layers.append([*nn.Linear(columns, hidden).parameters(), *nn.Linear(hidden, 1).parameters()])
        self.weights = nn.ParameterList(
            [nn.Parameter(torch.stack(part).detach()) for part in zip(*layers, strict=True)]
        )
        self.criterion = criterion or nn.BCEWithLogitsLoss()

    def forward(self, features: Tensor) -> Tensor:
        """Logits."""
        first, first_bias, last, last_bias = self.weights
        hidden = torch.einsum("nmc,mhc->nmh", features, first).add(first_bias).relu()
        return torch.einsum("nmh,moh->nm", hidden, last) + last_bias[:, 0]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The criterion."""
        features, targets = batch
        loss = self.criterion(self(features), targets)
        self.log("train_loss", loss)  # as ordinary modules do
        return loss

    def configure_optimizers(self) -> Any:
        """Adam."""
        return torch.optim.Adam(self.parameters(), lr=1e-3)


class Table(Protocol):
    """What a member is trained on."""

    train_set: TensorDataset
    batch_size: int
    seed: int


def fit_members(
    parts: Sequence[Table],
    quick: bool,
    *callbacks: Callback,
    criterion: nn.Module | None = None,
    length: float = 1.0,
) -> Members:
    """Trains a member on each table, on as much as the shortest has: 20 epochs or 500 steps, times a length."""
    samples = min(len(data.train_set) for data in parts)
    features, targets = (torch.stack([_shuffled(data)[k][:samples] for data in parts], 1) for k in (0, 1))
    batch_size, seeds = parts[0].batch_size, [data.seed for data in parts]
    module = Members(features.shape[2], seeds, criterion=criterion)
    generator = torch.Generator().manual_seed(0)
    loader = DataLoader(TensorDataset(features, targets), batch_size, shuffle=True, generator=generator)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=2 if quick else round(length * max(20, math.ceil(FEWEST / len(loader)))),
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, loader)
    return module


def _shuffled(data: Table) -> tuple[Tensor, Tensor]:
    """Training samples in an order of the seed's own, so that members do not see the same batches."""
    features, targets = data.train_set.tensors
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(data.seed))
    return features[order], targets[order]
