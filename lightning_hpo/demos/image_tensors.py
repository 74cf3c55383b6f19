"""Whole image data sets as tensors in memory, read from files that are already on the machine."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

__all__ = ["SUFFIXES", "ImageTensors", "data_root", "random_flip", "random_shift", "read_folder", "stratified_split"]

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp"}


def data_root(root: str | Path | None) -> Path:
    """Folder of the data sets: the argument, else the environment variable ``LIGHTNING_HPO_DATA``.

    Raises:
        FileNotFoundError: If neither is given.
    """
    chosen = root or os.environ.get("LIGHTNING_HPO_DATA")
    if not chosen:
        raise FileNotFoundError(
            "No folder of images: pass `root=...` or set the environment variable LIGHTNING_HPO_DATA to a folder "
            "that holds the data set. (`DigitsDataModule` needs no files.)"
        )
    return Path(chosen)


class ImageTensors(Dataset[tuple[Tensor, Tensor]]):
    """Images that lie in memory as bytes, standardised when a batch is taken.

    ``DataLoader`` asks for a whole batch at once, which is why two cores are enough.

    Args:
        images: Bytes of shape ``(images, channels, height, width)``.
        labels: Integers of shape ``(images,)``.
        mean: Mean of each channel, in units of the brightest value.
        std: Standard deviation of each channel, in the same units.
        brightest: The value that counts as one.

    Example:
        >>> data = ImageTensors(torch.full((4, 1, 2, 2), 255, dtype=torch.uint8), torch.arange(4), [0.5], [0.25])
        >>> images, labels = data.__getitems__([1, 3])
        >>> images.shape, images.max().item(), labels.tolist()
        (torch.Size([2, 1, 2, 2]), 2.0, [1, 3])
    """

    def __init__(
        self, images: Tensor, labels: Tensor, mean: Sequence[float], std: Sequence[float], brightest: int = 255
    ) -> None:
        self.images = images
        self.labels = labels
        self.mean = torch.tensor(mean).view(-1, 1, 1)
        self.std = torch.tensor(std).view(-1, 1, 1)
        self.brightest = brightest

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        images, labels = self.__getitems__([index])
        return images[0], labels[0]

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        chosen = torch.as_tensor(indices)
        images = self.images[chosen].float().div_(self.brightest)
        return images.sub_(self.mean).div_(self.std), self.labels[chosen]


def random_shift(images: Tensor, most: int) -> Tensor:
    """Moves every image by its own whole number of pixels, at most ``most`` along each axis; gaps take the edge.

    Args:
        images: Shape ``(batch, channels, height, width)``.
        most: Largest shift.

    Returns:
        Images of the same shape.

    Example:
        >>> image = torch.arange(9.0).view(1, 1, 3, 3)
        >>> bool(torch.equal(random_shift(image, 0), image))
        True
    """
    if most == 0:
        return images
    batch, _, height, width = images.shape
    at = images.device
    # Clamped coordinates repeat the edge: no padded copy, one gather for the batch.
    rows = torch.randint(-most, most + 1, (batch, 1), device=at) + torch.arange(height, device=at)
    columns = torch.randint(-most, most + 1, (batch, 1), device=at) + torch.arange(width, device=at)
    rows, columns = rows.clamp_(0, height - 1), columns.clamp_(0, width - 1)
    which = torch.arange(batch, device=at)
    moved = images[which[:, None, None], :, rows[:, :, None], columns[:, None, :]]  # (batch, height, width, channels)
    return moved.permute(0, 3, 1, 2)


def random_flip(images: Tensor) -> Tensor:
    """Mirrors every second image or so, left to right.

    Args:
        images: Shape ``(batch, channels, height, width)``.

    Returns:
        Images of the same shape.
    """
    mirrored = torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5
    return torch.where(mirrored, images.flip(-1), images)


def stratified_split(labels: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Splits positions in two so that every class gives the same share.

    Args:
        labels: Integers of shape ``(images,)``.
        fraction: Share of the second part, in ``[0, 1)``; zero leaves it empty.
        seed: The same seed always gives the same split.

    Returns:
        Positions of the first and of the second part, both in random order.

    Raises:
        ValueError: If ``fraction`` is not in ``[0, 1)``.

    Example:
        >>> rest, held_out = stratified_split(torch.tensor([0, 1] * 10), 0.2, seed=0)
        >>> len(rest), torch.tensor([0, 1] * 10)[held_out].bincount().tolist()
        (16, [2, 2])
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"a share of the images lies in [0, 1), got {fraction}")
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    first, second = [order[:0]], [order[:0]]
    for label in labels.unique():
        members = order[labels[order] == label]
        cut = len(members) - round(fraction * len(members))
        first.append(members[:cut])
        second.append(members[cut:])
    shuffled = [torch.cat(part) for part in (first, second)]
    return tuple(part[torch.randperm(len(part), generator=generator)] for part in shuffled)  # type: ignore[return-value]


def _decode(size: int | None) -> Callable[[Path], Tensor]:
    def read(path: Path) -> Tensor:
        with Image.open(path) as file:
            image = file.convert("RGB")
        if size is not None and image.size != (size, size):
            side = min(image.size)
            left, top = (image.width - side) // 2, (image.height - side) // 2
            box = (left, top, left + side, top + side)
            image = image.resize((size, size), Image.Resampling.BICUBIC, box=box)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)

    return read


@lru_cache(maxsize=8)  # a data set is decoded once in a process, however many data modules look at it
def read_folder(folder: Path, size: int | None = None, limit: int | None = None) -> tuple[Tensor, Tensor, list[str]]:
    """Decodes ``folder/<class>/<image>`` into one tensor of bytes.

    Args:
        folder: One folder a class; classes are numbered in alphabetical order.
        size: Side in pixels to which the largest centred square is resized; images of one size may leave it out.
        limit: Number of images a class, the first in alphabetical order.

    Returns:
        Bytes of shape ``(images, 3, height, width)``, labels of shape ``(images,)`` and the names of the classes.

    Raises:
        FileNotFoundError: If there is no image, saying what was looked for.
        ValueError: If the images differ in size and ``size`` is not given.
    """
    folder = Path(folder)
    classes = sorted(entry.name for entry in folder.iterdir() if entry.is_dir()) if folder.is_dir() else []
    paths, labels = [], []
    for label, name in enumerate(classes):
        found = sorted(path for path in (folder / name).iterdir() if path.suffix.lower() in SUFFIXES)[:limit]
        paths += found
        labels += [label] * len(found)
    if not paths:
        raise FileNotFoundError(f"no images: looked for {folder}/<class>/*.jpg (or .png, .bmp, .webp)")
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # decoding releases the interpreter lock
        images = list(pool.map(_decode(size), paths))
    shapes = {tuple(image.shape) for image in images}
    if len(shapes) > 1:
        raise ValueError(
            f"images in {folder} differ in size ({len(shapes)} sizes): pass the side in pixels to resize to"
        )
    return torch.stack(images), torch.tensor(labels), classes
