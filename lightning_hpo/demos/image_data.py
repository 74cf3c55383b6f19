"""The data module that all image sets share, and the one that comes with scikit-learn."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_hpo.demos.image_tensors import (
    ImageTensors,
    random_flip,
    random_shift,
    stratified_split,
)

__all__ = ["DigitsDataModule", "ImageDataModule", "LabelledImages"]


class LabelledImages(NamedTuple):
    """Bytes of shape ``(images, channels, height, width)`` and labels of shape ``(images,)``."""

    images: Tensor
    labels: Tensor


def _channel_statistics(images: Tensor, brightest: int) -> tuple[list[float], list[float]]:
    values = torch.arange(256, dtype=torch.float64) / brightest
    means, stds = [], []
    for channel in images.unbind(1):  # a histogram of bytes: exact, and no float copy of the data set
        share = torch.bincount(channel.flatten(), minlength=256).double() / channel.numel()
        mean = (share * values).sum()
        means.append(mean.item())
        stds.append((share * (values - mean) ** 2).sum().sqrt().clamp(min=1e-8).item())
    return means, stds


def _as_is(batch: Any) -> Any:
    return batch  # `ImageTensors` hands over whole batches


class ImageDataModule(LightningDataModule):
    """Images in memory, split into training, validation and test; a subclass says where they come from.

    A batch is ``(images, labels)`` with images of shape ``(batch, channels, height, width)``, standardised by the mean
    and standard deviation of the training images. The validation images are taken from the training images; the test
    images are the data set's own. Training images are moved and mirrored after they have reached the device.

    Args:
        batch_size: Images in a batch.
        num_workers: Processes that load; zero is quickest here, since the images lie in memory.
        seed: Decides which training images become validation images.
        val_fraction: Share of the training images used for validation; zero for none.
        shift: Largest random shift of a training image in pixels.
        flip: Whether training images are mirrored at random.
        limit: Number of training and of test images to use; all of them by default.
    """

    brightest = 255

    def __init__(
        self,
        batch_size: int = 64,
        num_workers: int = 0,
        seed: int = 0,
        val_fraction: float = 0.1,
        shift: int = 0,
        flip: bool = False,
        limit: int | None = None,
    ) -> None:
        super().__init__()
        if shift < 0:
            raise ValueError(f"`shift` is a number of pixels, got {shift}")
        if not 0 <= val_fraction < 1:
            raise ValueError(f"`val_fraction` lies in [0, 1), got {val_fraction}")
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.val_fraction = val_fraction
        self.shift = shift
        self.flip = flip
        self.limit = limit
        self.train_set: ImageTensors | None = None

    def read(self) -> tuple[LabelledImages, LabelledImages]:
        """All training images and all test images."""
        raise NotImplementedError

    def statistics(self, images: Tensor) -> tuple[Sequence[float], Sequence[float]]:
        """Mean and standard deviation of each channel, used to standardise."""
        return _channel_statistics(images, self.brightest)

    def setup(self, stage: str | None = None) -> None:
        """Reads and splits the images, once."""
        if self.train_set is not None:
            return
        train, test = (self._limited(part) for part in self.read())
        kept, held_out = stratified_split(train.labels, self.val_fraction, self.seed)
        mean, std = self.statistics(train.images[kept])

        def standardised(images: Tensor, labels: Tensor) -> ImageTensors:
            return ImageTensors(images, labels, mean, std, self.brightest)

        self.train_set = standardised(train.images[kept], train.labels[kept])
        self.val_set = standardised(train.images[held_out], train.labels[held_out])
        self.test_set = standardised(*test)

    def _limited(self, part: LabelledImages) -> LabelledImages:
        if self.limit is None or self.limit >= len(part.labels):
            return part
        order = torch.randperm(len(part.labels), generator=torch.Generator().manual_seed(self.seed))[: self.limit]
        return LabelledImages(part.images[order], part.labels[order])

    def _loader(self, images: ImageTensors | None, shuffle: bool = False) -> DataLoader[Any]:
        if images is None:
            raise RuntimeError("call `setup()` before asking for a data loader")
        return DataLoader(
            images,
            batch_size=self.batch_size,
            shuffle=shuffle,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            collate_fn=_as_is,
        )

    def train_dataloader(self) -> DataLoader[Any]:
        """Training images in random order."""
        return self._loader(self.train_set, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        """Validation images, or an empty list where ``val_fraction`` is zero."""
        return self._loader(self.val_set) if len(self.val_set) else []

    def test_dataloader(self) -> DataLoader[Any]:
        """The data set's own test images."""
        return self._loader(self.test_set)

    def predict_dataloader(self) -> DataLoader[Any]:
        """The test images once more."""
        return self._loader(self.test_set)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Moves and mirrors training images, a batch at a time."""
        if self.trainer is None or not self.trainer.training:
            return batch
        images, labels = batch
        images = random_shift(images, self.shift)
        return (random_flip(images) if self.flip else images), labels


class DigitsDataModule(ImageDataModule):
    """Scikit-learn's 1797 handwritten digits, 8x8 grey; they come with the package.

    A quarter of the images, the same share of every digit, is kept for testing; ``seed`` decides which.

    Args:
        batch_size: Images in a batch.
        num_workers: Processes that load; zero is quickest here.
        seed: Decides which images are for testing and validation.
        val_fraction: Share of the training images used for validation; zero for none.
        shift: Largest random shift of a training image in pixels.
        limit: Number of training and of test images to use; all of them by default.

    Example:
        >>> digits = DigitsDataModule(batch_size=32)
        >>> digits.setup()
        >>> images, labels = next(iter(digits.train_dataloader()))
        >>> images.shape, len(digits.train_set), len(digits.val_set), len(digits.test_set)
        (torch.Size([32, 1, 8, 8]), 1211, 136, 450)
    """

    brightest = 16

    def __init__(
        self,
        batch_size: int = 64,
        num_workers: int = 0,
        seed: int = 0,
        val_fraction: float = 0.1,
        shift: int = 0,
        limit: int | None = None,
    ) -> None:
        super().__init__(batch_size, num_workers, seed, val_fraction, shift, flip=False, limit=limit)

    def read(self) -> tuple[LabelledImages, LabelledImages]:
        """The digits, three quarters and one quarter."""
        from sklearn.datasets import load_digits  # takes a second to import

        digits = load_digits()
        images = torch.from_numpy(digits.images).to(torch.uint8).unsqueeze(1)
        labels = torch.from_numpy(digits.target)
        train, test = stratified_split(labels, 0.25, self.seed)
        return LabelledImages(images[train], labels[train]), LabelledImages(images[test], labels[test])
