"""A Vision Transformer that trains in milliseconds, and images for it."""

from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

__all__ = ["ResumableLoader", "TinyClassifier", "TinyImages"]


class TinyClassifier(LightningModule):
    """A classifier of 8x8 grey images into four classes: 16 patches, width 16, no dropout.

    Every instance starts with the same weights, and the loss is a mean over the batch; so two runs can be compared bit
    for bit, and a run on two ranks with a run on the joined batch. SGD with momentum and a falling learning rate give a
    checkpoint something to restore.

    Args:
        depth: Number of blocks.
        lr: First learning rate.

    Example:
        >>> first, second = TinyClassifier(), TinyClassifier()
        >>> images = torch.ones(2, 1, 8, 8)
        >>> first(images).shape, torch.equal(first(images), second(images))
        (torch.Size([2, 4]), True)
    """

    def __init__(self, depth: int = 4, lr: float = 0.1) -> None:
        super().__init__()
        self.lr = lr
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.network = VisionTransformer(
                img_size=8, patch_size=2, in_chans=1, num_classes=4, embed_dim=16, depth=depth, num_heads=2
            )
            for parameter in self.network.parameters():  # timm starts near zero, where little moves in ten steps
                if parameter.ndim > 1:
                    torch.nn.init.normal_(parameter, std=0.2)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of shape ``(batch, 4)``."""
        return self.network(images)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Cross-entropy."""
        images, labels = batch
        loss = F.cross_entropy(self(images), labels)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Cross-entropy on held-out images."""
        images, labels = batch
        self.log("val_loss", F.cross_entropy(self(images), labels), sync_dist=True)

    def configure_optimizers(self) -> Any:
        """SGD with momentum; the learning rate falls after every step."""
        optimizer = torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class ResumableLoader(DataLoader[Any]):
    """A ``DataLoader`` whose position is saved in the checkpoint, for resuming in the middle of an epoch.

    Example:
        >>> loader = ResumableLoader(range(6), batch_size=2)
        >>> batches = iter(loader)
        >>> _, state = next(batches), loader.state_dict()
        >>> other = ResumableLoader(range(6), batch_size=2)
        >>> other.load_state_dict(state)
        >>> [batch.tolist() for batch in other], [batch.tolist() for batch in other]
        ([[2, 3], [4, 5]], [[0, 1], [2, 3], [4, 5]])
    """

    _position = 0
    _resume_at = 0

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        start, self._resume_at = self._resume_at, 0
        for index, batch in enumerate(super().__iter__()):
            if index >= start:
                self._position = index + 1  # before the batch is used: a checkpoint written then counts it
                yield batch

    def state_dict(self) -> dict[str, int]:
        """The number of batches handed out in this epoch."""
        return {"position": self._position}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Makes the next pass begin where the saved one stood."""
        self._resume_at = state_dict["position"] % len(self)


class TinyImages(LightningDataModule):
    """48 training and 16 validation images of four classes, the same ones every time.

    The order of an epoch depends on the number of the epoch alone, and two ranks together see in step ``i`` the images
    that one process with twice the batch size sees in step ``i``.

    Args:
        batch_size: Images in a batch.

    Example:
        >>> data = TinyImages(batch_size=8)
        >>> images, labels = next(iter(data.train_dataloader()))
        >>> images.shape, labels.shape
        (torch.Size([8, 1, 8, 8]), torch.Size([8]))
    """

    def __init__(self, batch_size: int = 8) -> None:
        super().__init__()
        self.batch_size = batch_size
        generator = torch.Generator().manual_seed(0)
        labels = torch.arange(64) % 4
        patterns = torch.randn(4, 1, 8, 8, generator=generator)
        images = patterns[labels] + 0.5 * torch.randn(64, 1, 8, 8, generator=generator)
        self.train_set = TensorDataset(images[:48], labels[:48])
        self.val_set = TensorDataset(images[48:], labels[48:])

    def train_dataloader(self) -> ResumableLoader:
        """Training images in an order that is the epoch's; every second one, if there are two ranks."""
        ranks, rank = (self.trainer.world_size, self.trainer.global_rank) if self.trainer is not None else (1, 0)
        # Lightning leaves a `DistributedSampler` alone and tells it the epoch.
        sampler: DistributedSampler[Any] = DistributedSampler(
            self.train_set, num_replicas=ranks, rank=rank, shuffle=True, seed=0
        )
        return ResumableLoader(self.train_set, batch_size=self.batch_size, sampler=sampler)

    def val_dataloader(self) -> DataLoader[Any]:
        """Validation images in order."""
        return DataLoader(self.val_set, batch_size=self.batch_size)
