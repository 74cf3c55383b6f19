"""Data sets that say which sample each one is."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

__all__ = ["IndexedDataset"]


class IndexedDataset(Dataset[Any]):
    """A data set whose samples carry their index in front, for whatever is learned for each sample.

    Args:
        dataset: A data set with a length; a sample that is no tuple or list becomes one.

    Raises:
        TypeError: If the data set has no length.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> IndexedDataset(TensorDataset(torch.tensor([5.0, 6.0])))[1]
        (tensor(1), tensor(6.))
    """

    def __init__(self, dataset: Dataset[Any]) -> None:
        if not hasattr(dataset, "__len__"):
            raise TypeError(f"a data set with a length is needed, got `{type(dataset).__name__}`")
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        sample = self.dataset[index]
        number: Tensor = torch.tensor(index if index >= 0 else index + len(self))
        return (number, *sample) if isinstance(sample, (list, tuple)) else (number, sample)
