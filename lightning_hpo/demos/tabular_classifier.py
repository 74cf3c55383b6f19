"""An ordinary classifier of tables, with a `criterion`."""

from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

__all__ = ["TabularClassifier"]


class TabularClassifier(LightningModule):
    """One hidden layer, trained with Adam; its loss is ``self.criterion(logits, targets)``.

    Logs ``train_loss``, ``val_loss`` and ``test_loss``.

    Args:
        inputs: Features of a sample.
        outputs: Logits of a sample; one logit is of shape ``(batch,)`` and has a binary cross-entropy.
        hidden: Units; 0 for a linear model.
        lr: Learning rate.
        criterion: Another loss.

    Example:
        >>> TabularClassifier(inputs=30)(torch.zeros(4, 30)).shape
        torch.Size([4])
    """

    def __init__(
        self, inputs: int, outputs: int = 1, hidden: int = 64, lr: float = 1e-3, criterion: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.lr = lr
        layers: list[nn.Module] = [nn.Linear(inputs, hidden), nn.ReLU()] if hidden else []
        self.network = nn.Sequential(*layers, nn.Linear(hidden or inputs, outputs))
        self.criterion = criterion or (nn.BCEWithLogitsLoss() if outputs == 1 else nn.CrossEntropyLoss())
        self.one = outputs == 1

    def forward(self, features: Tensor) -> Tensor:
        """Logits."""
        logits = self.network(features)
        return logits.squeeze(1) if self.one else logits

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The criterion."""
        features, targets = batch
        loss = self.criterion(self(features), targets)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """The criterion on held-out samples."""
        features, targets = batch
        self.log("val_loss", self.criterion(self(features), targets), sync_dist=True)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """The criterion on test samples."""
        features, targets = batch
        self.log("test_loss", self.criterion(self(features), targets), sync_dist=True)

    def configure_optimizers(self) -> Any:
        """Adam."""
        return torch.optim.Adam(self.parameters(), lr=self.lr)
