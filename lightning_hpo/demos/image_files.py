"""Data modules on images that are already on the machine; nothing is downloaded."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_hpo.demos.image_data import ImageDataModule, LabelledImages
from lightning_hpo.demos.image_tensors import data_root, read_folder

__all__ = ["CIFAR10DataModule", "FashionMNISTDataModule", "ImageFolderDataModule", "MNISTDataModule"]


class _RootedDataModule(ImageDataModule):
    def __init__(self, root: str | Path | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.root = root


class MNISTDataModule(_RootedDataModule):
    """Handwritten digits, 28x28 grey, from ``root/MNIST/raw``; nothing is downloaded.

    Args:
        root: Folder of the data sets; the environment variable ``LIGHTNING_HPO_DATA`` by default.
        kwargs: Arguments of :class:`ImageDataModule`.
    """

    folder = "MNIST"

    def read(self) -> tuple[LabelledImages, LabelledImages]:
        """The official training and test images.

        Raises:
            FileNotFoundError: If the files are absent, saying which were looked for.
        """
        from torchvision import datasets

        root = data_root(self.root)
        kind = getattr(datasets, self.folder)
        try:
            parts = [kind(str(root), train=train, download=False) for train in (True, False)]
        except RuntimeError as error:
            looked_for = root / self.folder / "raw"
            raise FileNotFoundError(
                f"{self.folder} not found: looked for {looked_for}/train-images-idx3-ubyte, "
                "train-labels-idx1-ubyte, t10k-images-idx3-ubyte and t10k-labels-idx1-ubyte."
            ) from error
        train, test = (LabelledImages(part.data.unsqueeze(1), part.targets) for part in parts)
        return train, test


class FashionMNISTDataModule(MNISTDataModule):
    """Pieces of clothing, 28x28 grey, from ``root/FashionMNIST/raw``; nothing is downloaded.

    Args:
        root: Folder of the data sets; the environment variable ``LIGHTNING_HPO_DATA`` by default.
        kwargs: Arguments of :class:`ImageDataModule`.
    """

    folder = "FashionMNIST"


class CIFAR10DataModule(_RootedDataModule):
    """Small photographs, 32x32 in colour; nothing is downloaded.

    Reads ``root/cifar-10-batches-py`` where it is present, else ``root/cifar10/{train,test}/<class>/*.jpg`` (or
    ``.png``), which is decoded once in a process.

    Args:
        root: Folder of the data sets; the environment variable ``LIGHTNING_HPO_DATA`` by default.
        kwargs: Arguments of :class:`ImageDataModule`.
    """

    def read(self) -> tuple[LabelledImages, LabelledImages]:
        """The official training and test images.

        Raises:
            FileNotFoundError: If neither form is present, naming both.
        """
        root = data_root(self.root)
        pickled, folder = root / "cifar-10-batches-py", root / "cifar10"
        if pickled.is_dir():
            return self._read_pickled(root)
        if not all((folder / part).is_dir() for part in ("train", "test")):
            raise FileNotFoundError(
                f"CIFAR-10 not found: looked for {pickled} and for {folder}/train/<class>/*.jpg with "
                f"{folder}/test/<class>/*.jpg."
            )
        per_class = None if self.limit is None else -(-self.limit // 10)  # decode no more than is used
        train, test = (LabelledImages(*read_folder(folder / p, limit=per_class)[:2]) for p in ("train", "test"))
        return train, test

    @staticmethod
    def _read_pickled(root: Path) -> tuple[LabelledImages, LabelledImages]:
        from torchvision.datasets import CIFAR10

        parts = [CIFAR10(str(root), train=train, download=False) for train in (True, False)]
        train, test = (
            LabelledImages(torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(part.targets))
            for part in parts
        )
        return train, test


class ImageFolderDataModule(_RootedDataModule):
    """Photographs of any kind: ``root/train/<class>/*`` and ``root/val/<class>/*`` or ``root/test/<class>/*``.

    Every image is decoded once, its largest centred square resized to ``image_size``, and kept in memory.

    Args:
        root: Folder with ``train`` and ``test`` (or ``val``); ``LIGHTNING_HPO_DATA`` by default.
        image_size: Side in pixels.
        mean: Mean of each channel for a network that was trained with one; measured by default.
        std: Standard deviation of each channel, likewise.
        kwargs: Arguments of :class:`ImageDataModule`.
    """

    def __init__(
        self,
        root: str | Path | None = None,
        image_size: int = 224,
        mean: list[float] | None = None,
        std: list[float] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(root, **kwargs)
        if (mean is None) != (std is None):
            raise ValueError("pass both `mean` and `std`, or neither")
        self.image_size = image_size
        self.mean = mean
        self.std = std

    def statistics(self, images: Tensor) -> tuple[Sequence[float], Sequence[float]]:
        """The values passed, else those of the training images."""
        if self.mean is None or self.std is None:
            return super().statistics(images)
        return self.mean, self.std

    def read(self) -> tuple[LabelledImages, LabelledImages]:
        """Training and test images.

        Raises:
            FileNotFoundError: If a folder is absent, naming what was looked for.
            ValueError: If the two folders hold different classes.
        """
        root = data_root(self.root)
        held_out = next((root / name for name in ("test", "val") if (root / name).is_dir()), None)
        if held_out is None or not (root / "train").is_dir():
            raise FileNotFoundError(
                f"no image folder: looked for {root}/train/<class>/* with {root}/test/<class>/* or {root}/val/<class>/*"
            )
        images, labels, classes = read_folder(root / "train", self.image_size)
        test_images, test_labels, test_classes = read_folder(held_out, self.image_size)
        if classes != test_classes:
            raise ValueError(f"{root}/train and {held_out} hold different classes: {classes} and {test_classes}")
        return LabelledImages(images, labels), LabelledImages(test_images, test_labels)
