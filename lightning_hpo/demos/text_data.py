"""Sentences that are already on the machine, as numbers; nothing is downloaded."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_hpo.demos.image_tensors import data_root

__all__ = ["SST2DataModule", "encode", "vocabulary_of"]

PAD, UNKNOWN = 0, 1


def vocabulary_of(sentences: Sequence[str], min_count: int = 1) -> dict[str, int]:
    """A number for each word that occurs often enough, the most frequent first; 0 is padding and 1 any other word.

    Args:
        sentences: Words with spaces between them.
        min_count: How often a word must occur.

    Returns:
        Numbers from 2 on, by word.

    Example:
        >>> vocabulary_of(["a good film", "a film"], min_count=2)
        {'a': 2, 'film': 3}
    """
    counts = Counter(word for sentence in sentences for word in sentence.split())
    kept = sorted((word for word, count in counts.items() if count >= min_count), key=lambda w: (-counts[w], w))
    return {word: number for number, word in enumerate(kept, start=2)}


def encode(sentences: Sequence[str], vocabulary: Mapping[str, int], max_length: int) -> Tensor:
    """Sentences as numbers, cut or padded to one length.

    Args:
        sentences: Words with spaces between them.
        vocabulary: Numbers by word.
        max_length: Words of a sentence that count.

    Returns:
        Shape ``(sentences, max_length)``; 0 after the end.

    Example:
        >>> encode(["a bad film"], {"a": 2, "film": 3}, max_length=4)
        tensor([[2, 1, 3, 0]])
    """
    numbers = torch.full((len(sentences), max_length), PAD)
    for row, sentence in enumerate(sentences):
        words = [vocabulary.get(word, UNKNOWN) for word in sentence.split()[:max_length]]
        numbers[row, : len(words)] = torch.tensor(words, dtype=torch.long)
    return numbers


class SST2DataModule(LightningDataModule):
    """Sentences of film reviews, good or bad (SST-2), from ``root/sst2/{train,dev,test}.tsv``; nothing is downloaded.

    A line is a sentence, a tab and a label, 0 or 1. A batch is ``(words, labels)`` with words of shape
    ``(batch, max_length)`` as numbers: 0 is padding, 1 a word that the training sentences do not have often enough.

    Args:
        root: Folder of the data sets; the environment variable ``LIGHTNING_HPO_DATA`` by default.
        batch_size: Sentences in a batch.
        max_length: Words of a sentence that count.
        min_count: How often a word must occur in the training sentences to have a number.
        num_workers: Processes that load; zero is quickest here.

    Raises:
        ValueError: If a number is out of range; all are listed.
    """

    def __init__(
        self,
        root: str | Path | None = None,
        batch_size: int = 32,
        max_length: int = 24,
        min_count: int = 2,
        num_workers: int = 0,
    ) -> None:
        numbers = {"batch_size": batch_size, "max_length": max_length, "min_count": min_count}
        if problems := [f"`{name}` must be at least 1, got {value!r}" for name, value in numbers.items() if value < 1]:
            raise ValueError("; ".join(problems))
        super().__init__()
        self.root, self.batch_size, self.max_length = root, batch_size, max_length
        self.min_count, self.num_workers = min_count, num_workers
        self.vocabulary: dict[str, int] = {}
        self.train_set: TensorDataset | None = None

    @property
    def words(self) -> int:
        """How many numbers there are, padding and the unknown word among them."""
        return len(self.vocabulary) + 2

    def setup(self, stage: str | None = None) -> None:
        """Reads the sentences, once.

        Raises:
            FileNotFoundError: If a file is absent, saying which were looked for.
        """
        if self.train_set is not None:
            return
        folder = data_root(self.root) / "sst2"
        files = [folder / f"{part}.tsv" for part in ("train", "dev", "test")]
        if not all(path.exists() for path in files):
            raise FileNotFoundError(f"SST-2 not found: looked for {folder}/train.tsv, dev.tsv and test.tsv.")
        train, val, test = (_read(path) for path in files)
        self.vocabulary = vocabulary_of(train[0], self.min_count)
        self.train_set, self.val_set, self.test_set = (
            TensorDataset(encode(part[0], self.vocabulary, self.max_length), part[1]) for part in (train, val, test)
        )

    def _loader(self, part: TensorDataset | None, shuffle: bool = False) -> DataLoader[Any]:
        if part is None:
            raise RuntimeError("call `setup()` before asking for a data loader")
        return DataLoader(part, batch_size=self.batch_size, shuffle=shuffle, num_workers=self.num_workers)

    def train_dataloader(self) -> DataLoader[Any]:
        """Training sentences in random order."""
        return self._loader(self.train_set, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        """Validation sentences."""
        return self._loader(self.train_set and self.val_set)

    def test_dataloader(self) -> DataLoader[Any]:
        """Test sentences."""
        return self._loader(self.train_set and self.test_set)


def _read(path: Path) -> tuple[list[str], Tensor]:
    """Sentences and labels of one file."""
    lines = [line.rsplit("\t", 1) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if wrong := [number for number, line in enumerate(lines, 1) if len(line) != 2 or line[1] not in ("0", "1")]:
        raise ValueError(f"{path}: lines must be a sentence, a tab and 0 or 1; others are {wrong[:5]}")
    return [sentence for sentence, _ in lines], torch.tensor([int(label) for _, label in lines])
