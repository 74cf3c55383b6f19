"""Data modules of grey images with noise that stays the same, so that a loss over them is a function."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset
from typing_extensions import override

from lightning_hpo.demos.image_tensors import SUFFIXES, data_root

__all__ = ["DenoisingDataModule", "PhotoDenoisingDataModule", "read_grey"]


class NoisyPair(NamedTuple):
    """A noisy and a clean image, shape ``(height, width)``, or of several images ``(images, height, width)``."""

    noisy: Tensor
    clean: Tensor


class NoisyImages(Dataset[NoisyPair]):
    """Images of any sizes with Gaussian noise that is drawn once.

    Args:
        images: Clean images in [0, 1], each of shape ``(height, width)``.
        noise: Its standard deviation.
        generator: Of the noise.

    Example:
        >>> data = NoisyImages([torch.zeros(2, 3), torch.ones(4, 4)], 0.1, torch.Generator().manual_seed(0))
        >>> len(data), data[0].noisy.shape, torch.equal(data[0].noisy, data[0].noisy)
        (2, torch.Size([2, 3]), True)
    """

    def __init__(self, images: Sequence[Tensor], noise: float, generator: torch.Generator) -> None:
        self.pairs = [NoisyPair(i + noise * torch.randn(i.shape, generator=generator).to(i), i) for i in images]

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> NoisyPair:
        return self.pairs[index]


def read_grey(folder: Path) -> list[Tensor]:
    """All images of a folder, in alphabetical order.

    Args:
        folder: With ``.png``, ``.jpg``, ``.bmp`` or ``.webp`` files.

    Returns:
        Brightness in [0, 1], each of shape ``(height, width)`` in float64.

    Raises:
        FileNotFoundError: If there is none, saying what was looked for.
    """
    found = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES) if folder.is_dir() else []
    if not found:
        raise FileNotFoundError(f"no images: looked for {folder}/*.png (or .jpg, .bmp, .webp)")
    return [torch.from_numpy(np.array(Image.open(path).convert("L"), dtype=np.float64) / 255) for path in found]


class DenoisingDataModule(LightningDataModule):
    """Crops of the images in ``root/denoising/bsd68`` to learn from, the images in ``root/denoising/set12`` to test on.

    A batch is a pair of noisy and clean images in float64, shape ``(images, height, width)``. Training and validation
    crops come from different images, one from each. Noise is drawn once. Test images are of several sizes and come
    one at a time.

    Args:
        root: Folder of the data sets; the environment variable ``LIGHTNING_HPO_DATA`` by default.
        noise: Standard deviation of the noise; grey values lie in [0, 1].
        size: Side of the crops.
        crops: Number of training crops.
        val_crops: Number of validation crops.
        seed: Decides on crops and noise.
        folders: Where training and test images are, below ``root``.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        root: str | Path | None = None,
        noise: float = 0.1,
        size: int = 64,
        crops: int = 20,
        val_crops: int = 10,
        seed: int = 0,
        folders: tuple[str, str] = ("denoising/bsd68", "denoising/set12"),
    ) -> None:
        super().__init__()
        checks = {
            f"noise must be positive, got {noise!r}": noise > 0,
            f"size must be at least 8, got {size!r}": size >= 8,
            f"crops must be at least 1, got {crops!r}": crops >= 1,
            f"val_crops must be at least 1, got {val_crops!r}": val_crops >= 1,
        }
        if problems := [problem for problem, holds in checks.items() if not holds]:
            raise ValueError("; ".join(problems))
        self.root, self.noise, self.size, self.folders = root, noise, size, folders
        self.crops, self.val_crops, self.seed = crops, val_crops, seed
        self.train_set: TensorDataset | None = None

    def read(self) -> tuple[list[Tensor], list[Tensor]]:
        """Training and test images, grey in [0, 1].

        Raises:
            FileNotFoundError: If a folder has none.
        """
        root = data_root(self.root)
        train, test = (read_grey(root / folder) for folder in self.folders)
        return train, test

    @override
    def setup(self, stage: str | None = None) -> None:
        """Reads the images, cuts the crops and draws the noise, once.

        Raises:
            ValueError: If there are too few images, or too small ones.
        """
        if self.train_set is not None:
            return
        images, test = self.read()
        large = [image for image in images if min(image.shape) >= self.size]
        if len(large) < self.crops + self.val_crops:
            raise ValueError(
                f"{self.crops} training and {self.val_crops} validation crops need as many images of at least "
                f"{self.size} pixels a side; there are {len(large)}"
            )
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.randperm(len(large), generator=generator)[: self.crops + self.val_crops].tolist()
        clean = torch.stack([self._crop(large[i], generator) for i in order])
        noisy = clean + self.noise * torch.randn(clean.shape, generator=generator, dtype=clean.dtype)
        self.train_set = TensorDataset(noisy[: self.crops], clean[: self.crops])
        self.val_set = TensorDataset(noisy[self.crops :], clean[self.crops :])
        self.test_set = NoisyImages(test, self.noise, generator)

    def _crop(self, image: Tensor, generator: torch.Generator) -> Tensor:
        top, left = (int(torch.randint(side - self.size + 1, (), generator=generator)) for side in image.shape)
        return image[top : top + self.size, left : left + self.size]

    def _loader(
        self, data: Dataset[tuple[Tensor, ...]] | Dataset[NoisyPair] | None, batch_size: int
    ) -> DataLoader[Any]:
        if data is None:
            raise RuntimeError("call `setup()` before asking for a data loader")
        return DataLoader(data, batch_size=batch_size)

    @override
    def train_dataloader(self) -> DataLoader[Any]:
        """All training crops as one batch."""
        return self._loader(self.train_set, self.crops)

    @override
    def val_dataloader(self) -> DataLoader[Any]:
        """All validation crops as one batch."""
        return self._loader(self.train_set and self.val_set, self.val_crops)

    @override
    def test_dataloader(self) -> DataLoader[Any]:
        """The test images one at a time."""
        return self._loader(self.train_set and self.test_set, 1)

    @override
    def predict_dataloader(self) -> DataLoader[Any]:
        """The test images once more."""
        return self.test_dataloader()


class PhotoDenoisingDataModule(DenoisingDataModule):
    """Two photographs that come with scikit-learn: tiles of a temple to learn from, of a flower to test on.

    Args:
        noise: Standard deviation of the noise.
        size: Side of the crops.
        crops: Number of training crops.
        val_crops: Number of validation crops.
        seed: Decides on crops and noise.

    Example:
        >>> photos = PhotoDenoisingDataModule(size=32, crops=4, val_crops=2)
        >>> photos.setup()
        >>> noisy, clean = next(iter(photos.train_dataloader()))
        >>> noisy.shape, len(photos.test_set), round((noisy - clean).std().item(), 1)
        (torch.Size([4, 32, 32]), 8, 0.1)
    """

    def __init__(self, noise: float = 0.1, size: int = 64, crops: int = 16, val_crops: int = 8, seed: int = 0) -> None:
        super().__init__(None, noise, size, crops, val_crops, seed)

    @override
    def read(self) -> tuple[list[Tensor], list[Tensor]]:
        """Tiles that do not overlap: of the first photograph as many as are needed, eight of the second.

        Raises:
            ValueError: If it is too small for so many tiles.
        """
        from sklearn.datasets import load_sample_image  # takes a second to import

        temple, flower = (
            torch.from_numpy(np.array(Image.fromarray(load_sample_image(f"{name}.jpg")).convert("L")) / 255.0)
            for name in ("china", "flower")
        )
        tiles = [_tiles(photo, self.size) for photo in (temple, flower)]
        return tiles[0], tiles[1][:: max(len(tiles[1]) // 8, 1)][:8]


def _tiles(image: Tensor, size: int) -> list[Tensor]:
    rows, columns = (side // size * size for side in image.shape)
    tiles = image[:rows, :columns].unfold(0, size, size).unfold(1, size, size)
    return list(tiles.reshape(-1, size, size))
