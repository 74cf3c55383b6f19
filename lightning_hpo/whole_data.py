"""All samples of a loader's data set, once, in order, each rank its share."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, IterableDataset, Subset

from lightning_hpo import distributed

__all__ = ["batch_length", "whole_data"]


def whole_data(loader: Iterable[Any], seed: int = 0) -> Iterable[Any]:
    """Batches of all samples of a loader's data set, in order; the loader itself is left where it stands.

    Each rank gets every so many samples, the same number on every rank; what is left over is left out. Random
    augmentation sees the same numbers in every pass, and uses up none of training's.

    Args:
        loader: A ``DataLoader`` over a data set with a length.
        seed: Of augmentation.

    Yields:
        Batches as the loader collates them.

    Raises:
        ValueError: If there is no such data set, or not one sample for each rank.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> loader = DataLoader(TensorDataset(torch.arange(5.0)), batch_size=2, shuffle=True)
        >>> [samples.tolist() for (samples,) in whole_data(loader)]
        [[0.0, 1.0], [2.0, 3.0], [4.0]]
    """
    dataset = getattr(loader, "dataset", None)
    if not isinstance(loader, DataLoader) or isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        raise ValueError("a DataLoader over a data set with a length is needed, to read all of it in order")
    ranks, rank = distributed.world_size(), distributed.rank()
    each = len(dataset) // ranks  # type: ignore[arg-type]
    if not each:
        raise ValueError(f"{len(dataset)} samples are not one for each of {ranks} ranks")  # type: ignore[arg-type]
    share = Subset(dataset, range(rank, each * ranks, ranks))  # type: ignore[arg-type]
    size = loader.batch_size or getattr(loader.batch_sampler, "batch_size", None) or 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield from DataLoader(
            share,
            batch_size=size,
            num_workers=loader.num_workers,
            collate_fn=loader.collate_fn,
            worker_init_fn=loader.worker_init_fn,
            generator=torch.Generator().manual_seed(seed),
        )


def batch_length(batch: Any) -> int:
    """The number of samples of a batch: the length of its first tensor.

    Args:
        batch: Tensors in dicts, lists and tuples.

    Returns:
        The number.

    Raises:
        ValueError: If there is no tensor with a length.

    Example:
        >>> batch_length({"image": torch.zeros(3, 2), "label": torch.zeros(3)})
        3
    """
    found = next((leaf for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.dim()), None)
    if found is None:
        raise ValueError("a batch without a tensor has no number of samples")
    return len(found)
