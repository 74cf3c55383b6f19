"""Endless batches of data that nobody trains on."""

from collections.abc import Iterable, Iterator, Sized
from typing import Any

import torch
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, RandomSampler, Sampler, SequentialSampler
from typing_extensions import override

from lightning_hpo import distributed
from lightning_hpo.functional.seeding import mix_seed

__all__ = ["HeldOutBatches"]

_OVER = object()
_PLAIN = (SequentialSampler, RandomSampler, DistributedSampler)


class HeldOutBatches:
    """Draws batches without end, each rank its own, and knows where it stands.

    Of a ``DataLoader`` over a data set with a length the samples are shuffled anew in every epoch, the same way
    whatever the number of ranks: the batches of all ranks together are those that one process would draw with as many
    times the batch size. An incomplete last batch is left out. Loaders with a sampler of their own, over streams, and
    other iterables are read as they are; each rank takes every so many batches, and going on after a restart reads
    them up to where it stood. None of training's random numbers is used up. The position counts samples of all ranks,
    batches where the loader is read as it is.

    Args:
        seed: Decides the order.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> batches = HeldOutBatches()
        >>> batches.attach(DataLoader(TensorDataset(torch.arange(4.0)), batch_size=2))
        >>> [samples.tolist() for _ in range(3) for samples in next(batches)]
        [[0.0, 1.0], [3.0, 2.0], [1.0, 3.0]]
        >>> batches.state_dict()
        {'epoch': 1, 'position': 2}
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        self.epoch = self.position = 0  # of the next batch
        self._loader: Iterable[Any] | None = None
        self._order: _Order | None = None  # where the order is ours
        self._batches: Iterator[Any] | None = None

    def attach(self, loader: Iterable[Any]) -> None:
        """Says where batches come from; a position that was loaded before holds.

        Args:
            loader: A ``DataLoader``, or anything that can be iterated over again and again.

        Raises:
            ValueError: If the loader is empty, or has not one sample for each rank.
        """
        self.detach()
        if _is_empty(loader):
            raise ValueError("the validation loader is empty; give one with data as `val_dataloader`")
        if isinstance(loader, DataLoader) and _is_plain(loader):
            self._order = _Order(len(loader.dataset), loader.batch_size or 1, self.seed)  # type: ignore[arg-type]
            self._loader = _with_order(loader, self._order)
        else:
            self._loader = loader

    def detach(self) -> None:
        """Lets go of the loader and its workers; the position stays."""
        self._loader = self._order = self._batches = None

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if self._loader is None:
            raise RuntimeError("attach a loader first")
        batch = self._draw(self._loader)
        if batch is _OVER:
            self.epoch, self.position, self._batches = self.epoch + 1, 0, None
            batch = self._draw(self._loader)
        if batch is _OVER:
            raise ValueError("the held-out loader has no batch for each rank, or can be read only once")
        self.position += self._step()
        return batch

    def _step(self) -> int:
        return distributed.world_size() if self._order is None else self._order.joined

    def _draw(self, loader: Iterable[Any]) -> Any:
        with torch.random.fork_rng(devices=[]):
            if self._batches is None:
                self._batches = self._begin(loader)
            self._seed(self.position)
            return next(self._batches, _OVER)

    def _begin(self, loader: Iterable[Any]) -> Iterator[Any]:
        """The rest of the present epoch."""
        self._seed(0)
        if self._order is not None:
            self._order.epoch, self._order.first = self.epoch, self.position
            return iter(loader)
        ranks, rank = distributed.world_size(), distributed.rank()
        own = (batch for index, batch in enumerate(loader) if index % ranks == rank)
        for position in range(0, self.position, ranks):
            self._seed(position)
            next(own, None)
        return own

    def _seed(self, position: int) -> None:
        """Makes the random numbers of samplers and augmentations follow from the position."""
        torch.default_generator.manual_seed(mix_seed(self.seed, self.epoch, position))

    def state_dict(self) -> dict[str, int]:
        """Epoch and position of the next batch, for any number of ranks and any batch size."""
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Goes on where the state stood, with the next batch that is drawn.

        Args:
            state_dict: What :meth:`state_dict` returned.
        """
        self.epoch, self.position = state_dict["epoch"], state_dict["position"]
        self._batches = None


class _Order(Sampler[list[int]]):
    """Indices of this rank's batches in one epoch, from a given batch on."""

    def __init__(self, samples: int, batch_size: int, seed: int) -> None:
        self.samples, self.seed = samples, seed
        self.epoch = self.first = 0  # the first sample
        self.batch_size = min(batch_size, samples // distributed.world_size())
        if not self.batch_size:
            raise ValueError(f"{samples} held-out samples are not one for each of {distributed.world_size()} ranks")
        self.joined = self.batch_size * distributed.world_size()  # samples that all ranks draw at a time

    @override
    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(self.samples, generator=generator)
        for start in range(self.first, self.samples - self.joined + 1, self.joined):
            yield order[start + distributed.rank() : start + self.joined : distributed.world_size()].tolist()


def _is_empty(loader: Iterable[Any]) -> bool:
    try:
        return isinstance(loader, Sized) and not len(loader)
    except (TypeError, NotImplementedError):  # a loader of a stream has a length only in name
        return False


def _is_plain(loader: DataLoader[Any]) -> bool:
    sized = not isinstance(loader.dataset, IterableDataset) and hasattr(loader.dataset, "__len__")
    return sized and loader.batch_size is not None and isinstance(loader.sampler, _PLAIN)


def _with_order(loader: DataLoader[Any], order: _Order) -> DataLoader[Any]:
    """A loader like the user's with batches in our order."""
    return DataLoader(
        loader.dataset,
        batch_sampler=order,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        generator=torch.Generator().manual_seed(order.seed),
        prefetch_factor=loader.prefetch_factor,
    )
