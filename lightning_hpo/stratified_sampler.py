"""Batches in which no class is missing."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DistributedSampler
from typing_extensions import override

from lightning_hpo import distributed
from lightning_hpo.functional.arguments import is_whole

__all__ = ["StratifiedSampler"]


class StratifiedSampler(DistributedSampler[Any]):
    r"""Orders samples so that every batch has each class in its share, and never fewer than a few of it.

    Give it to a loader as ``sampler`` with the same ``batch_size``: it yields single indices, :math:`b` of which in a
    row are a batch. A class of :math:`n_c` samples has its share :math:`b n_c / n` in each, rounded up or down in turn,
    so that an epoch sees each sample once; a class whose share is below ``min_per_class`` is drawn from again and again
    instead, in a new order each time, and others give way. Batches are always full: the last is filled up or left out.

    With several ranks, of which it asks when it is read, the guarantee is for the joined batch, whose classes are dealt
    out evenly: the ranks together see what one process with as many times the batch size sees. Lightning leaves a
    sampler of this kind as it is, and tells it the epoch. The order depends on seed and epoch alone, so that a loader
    that can go on in the middle of an epoch goes on with the same batches.

    Args:
        labels: The class of each sample, whole numbers ``(N,)``; zeros and ones, for instance.
        batch_size: Samples in a batch of one rank.
        min_per_class: Least samples of each class in a joined batch.
        drop_last: Leaves out what would not fill a batch instead of filling it up.
        seed: Decides the order.

    Raises:
        ValueError: If an argument is wrong, or batches are too small for the guarantee; all problems are listed.

    Example:
        >>> labels = torch.tensor([1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0])
        >>> [labels[index].item() for index in StratifiedSampler(labels, batch_size=4)]
        [0, 1, 0, 0, 0, 0, 1, 0, 1, 0, 0, 0]
    """

    def __init__(
        self,
        labels: Tensor | Sequence[int],
        batch_size: int,
        min_per_class: int = 1,
        drop_last: bool = False,
        seed: int = 0,
    ) -> None:
        # The parent would ask for the ranks now, before there are any; it is a parent so that Lightning knows us.
        labels = torch.as_tensor(labels)
        problems = [
            f"{name} must be a whole number of at least {least}, got {value!r}"
            for name, value, least in (("batch_size", batch_size, 1), ("min_per_class", min_per_class, 1))
            if not is_whole(value, least)
        ]
        if labels.ndim != 1 or not labels.numel():
            problems.append(f"labels must be one whole number a sample, got shape {tuple(labels.shape)}")
        if labels.is_floating_point() and bool((labels != labels.round()).any()):
            problems.append("labels must be whole numbers")
        if not problems:
            classes = labels.unique().numel()
            joined = batch_size * distributed.world_size()
            if classes * min_per_class > joined:
                problems.append(f"{classes} classes of at least {min_per_class} do not fit into {joined} samples")
        if problems:
            raise ValueError(f"`StratifiedSampler`: {'; '.join(problems)}.")
        self.members = [(labels == label).nonzero().flatten() for label in labels.unique()]
        self.samples, self.batch_size, self.min_per_class = labels.numel(), batch_size, min_per_class
        self.drop_last, self.seed, self.epoch = drop_last, seed, 0

    @override
    def set_epoch(self, epoch: int) -> None:
        """Says which epoch is next, so that its order is another."""
        self.epoch = epoch

    @property
    def steps(self) -> int:
        """Batches of each rank in an epoch."""
        joined = self.batch_size * distributed.world_size()
        return self.samples // joined if self.drop_last else -(-self.samples // joined)

    @override
    def __len__(self) -> int:
        return self.steps * self.batch_size

    @override
    def __iter__(self) -> Iterator[int]:
        # Two of them: how many a rank shuffles must not decide what is drawn next.
        generator, shuffling = (torch.Generator().manual_seed(2 * (self.seed + self.epoch) + n) for n in (0, 1))
        ranks, rank = distributed.world_size(), distributed.rank()
        streams = [_Endless(members, generator) for members in self.members]
        for quota in self._quotas(self.batch_size * ranks):
            drawn = [index for stream, count in zip(streams, quota, strict=True) for index in stream.take(count)]
            mine = drawn[rank::ranks]  # classes lie one after another: each is dealt out evenly
            order = torch.randperm(len(mine), generator=shuffling).tolist()
            yield from (mine[place] for place in order)

    def _quotas(self, joined: int) -> Iterator[list[int]]:
        """How many of each class the joined batches hold."""
        shares = self._shares(joined)
        owed = torch.zeros_like(shares)
        for _ in range(self.steps):
            owed += shares
            quota = owed.floor().clamp(min=self.min_per_class)
            while quota.sum() < joined:  # whoever is owed most
                quota[(owed - quota).argmax()] += 1
            while quota.sum() > joined:  # whoever got most beyond its due, but for the guarantee
                spare = torch.where(quota > self.min_per_class, quota - owed, -torch.inf)
                quota[spare.argmax()] -= 1
            owed -= quota
            yield [int(count) for count in quota.tolist()]

    def _shares(self, joined: int) -> Tensor:
        """Mean number of each class in a joined batch: what it is due, or the least where that is more."""
        sizes = torch.tensor([len(members) for members in self.members], dtype=torch.float64)
        rare = torch.zeros(len(sizes), dtype=torch.bool)
        while True:
            rest = joined - self.min_per_class * int(rare.sum())
            shares = torch.where(rare, float(self.min_per_class), rest * sizes / sizes[~rare].sum().clamp(min=1))
            short = ~rare & (shares < self.min_per_class)
            if not bool(short.any()):
                return shares
            rare |= short


class _Endless:
    """Samples of a class, shuffled anew whenever all have been drawn."""

    def __init__(self, members: Tensor, generator: torch.Generator) -> None:
        self.members, self.generator = members, generator
        self.left: list[int] = []

    def take(self, count: int) -> list[int]:
        while len(self.left) < count:
            order = torch.randperm(len(self.members), generator=self.generator)
            self.left += self.members[order].tolist()
        taken, self.left = self.left[:count], self.left[count:]
        return taken
