"""Batches whose size changes while they are being drawn."""

from collections import deque
from collections.abc import Iterator
from itertools import chain, islice
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor
from torch.utils.data import BatchSampler

from lightning_hpo.functional.batching.plan import BatchPlan

__all__ = ["AdaptiveBatchSampler", "DrawnBatch"]


class DrawnBatch(NamedTuple):
    """What the sampler knows of a batch that it has drawn.

    Args:
        size: Samples in it.
        accumulation: Micro-batches in a full window of the plan that it belongs to.
    """

    size: int
    accumulation: int


class _Position(NamedTuple):
    samples: int
    batches: int


_START = _Position(0, 0)


class AdaptiveBatchSampler(BatchSampler):
    """A batch sampler whose batch size may change between any two batches; no sample is lost or drawn twice.

    A new plan takes effect with the next window of micro-batches whose number in the epoch is a multiple of the old and
    the new accumulation, which is where Lightning can change its accumulation without mixing windows. Every batch drawn
    leaves a :class:`DrawnBatch` in :attr:`drawn`, in the order in which a loader hands batches out, however many its
    workers draw ahead; whoever consumes the batches takes them with :meth:`take`. The length counts the batches already
    drawn and those to come under the plans known so far.

    Args:
        sampler: Indices of one epoch.
        batch_size: Samples of a micro-batch.
        drop_last: Leaves out a last micro-batch that is not full.

    Attributes:
        share: Share of the epoch's samples that is drawn at all; 1 at first.

    Raises:
        ValueError: If ``batch_size`` is not a positive integer.

    Example:
        >>> sampler = AdaptiveBatchSampler(range(10), batch_size=2)
        >>> batches = iter(sampler)
        >>> next(batches), len(sampler)
        ([0, 1], 5)
        >>> sampler.request(BatchPlan(micro=4, accumulation=1))
        >>> len(sampler), list(batches)
        (3, [[2, 3, 4, 5], [6, 7, 8, 9]])
    """

    def __init__(self, sampler: Any, batch_size: int, drop_last: bool = False) -> None:
        super().__init__(sampler, batch_size, drop_last)
        self._prepare(1)

    @classmethod
    def adopt(cls, batch_sampler: BatchSampler, accumulation: int = 1) -> "AdaptiveBatchSampler":
        """Makes an adaptive sampler of a plain one, in place: its loader need not be touched.

        Args:
            batch_sampler: A ``BatchSampler`` of torch's own class.
            accumulation: Micro-batches in an optimizer step so far.

        Returns:
            The same object.

        Raises:
            TypeError: If it is of another class, whose rule for drawing would be lost.
        """
        if not isinstance(batch_sampler, cls):
            if type(batch_sampler) is not BatchSampler:
                raise TypeError(f"`{type(batch_sampler).__name__}` draws batches by a rule of its own.")
            batch_sampler.__class__ = cls
        adopted: AdaptiveBatchSampler = batch_sampler  # type: ignore[assignment]
        adopted._prepare(accumulation)
        return adopted

    def release(self) -> None:
        """Gives a plain ``BatchSampler`` of the first batch size back."""
        self.batch_size = self._first_size
        for name in vars(self).keys() - self._users:
            delattr(self, name)
        self.__class__ = BatchSampler  # type: ignore[assignment]

    def _prepare(self, accumulation: int) -> None:
        self._users: frozenset[str] = getattr(self, "_users", frozenset(vars(self)))  # what stays
        self.drawn: deque[DrawnBatch] = deque()
        self.share = 1.0
        self._first_size = self.batch_size
        self._plan = BatchPlan(self.batch_size, accumulation)
        self._next_plan: BatchPlan | None = None
        self._replay: deque[DrawnBatch] = deque()  # batches that were drawn, but not consumed, when the state was saved
        self._seed, self._epoch = int(torch.empty((), dtype=torch.int64).random_(2**32)), 0
        self._passes = 0
        self._own_state: Tensor | None = None  # of the sampler's own generator, when the epoch's order was drawn
        self._resuming = False  # whether the next pass goes on where a state stood
        self._fresh = True  # whether it begins an epoch
        self._taken = _START  # of this epoch
        self._ahead = _START  # of this epoch: drawn

    @property
    def _generator(self) -> Generator | None:
        own = getattr(self.sampler, "generator", None)
        return own if isinstance(own, Generator) else None

    @property
    def plan(self) -> BatchPlan:
        """The newest plan, which the batches drawn ahead may not follow yet."""
        return self._next_plan or self._plan

    @property
    def epoch_samples(self) -> int:
        """Samples of a whole epoch on this rank."""
        return int(self.share * len(self.sampler))  # type: ignore[arg-type] # torch types it as any iterable

    @property
    def samples_taken(self) -> int:
        """Samples consumed in this epoch."""
        return 0 if self._fresh else self._taken.samples

    @property
    def batches_taken(self) -> int:
        """Batches consumed in this epoch."""
        return 0 if self._fresh else self._taken.batches

    def sizes_ahead(self) -> list[int]:
        """Samples of the batches that were drawn and not taken yet."""
        return [] if self._fresh else [batch.size for batch in (*self.drawn, *self._replay)]

    def request(self, plan: BatchPlan) -> None:
        """Asks for another plan from the next possible window on."""
        self._next_plan = plan

    def take(self) -> DrawnBatch:
        """The oldest batch drawn and not taken yet.

        Raises:
            RuntimeError: If there is none, because somebody else iterates over the sampler.
        """
        if not self.drawn:
            raise RuntimeError("more batches arrived than the sampler has drawn; does something else iterate over it?")
        batch = self.drawn.popleft()
        self._taken = _Position(self._taken.samples + batch.size, self._taken.batches + 1)
        return batch

    def __iter__(self) -> Iterator[list[int]]:
        self._fresh = not self._resuming  # a loader with workers calls this twice for one pass
        return self._draw()

    def _draw(self) -> Iterator[list[int]]:
        if self._fresh:
            self._taken = self._ahead = _START
            self._epoch, self._own_state = self._epoch + 1, None
            self._replay.clear()
        self._fresh = self._resuming = False
        self.drawn.clear()
        self._passes += 1
        mine = self._passes
        indices = self._order()
        while True:
            wanted = self._next_batch()
            batch = list(islice(indices, min(wanted.size, self.epoch_samples - self._ahead.samples)))
            if not batch or (self.drop_last and len(batch) < wanted.size):
                return
            self._ahead = _Position(self._ahead.samples + len(batch), self._ahead.batches + 1)
            self.drawn.append(DrawnBatch(len(batch), wanted.accumulation))
            yield batch
            if mine != self._passes:
                raise RuntimeError("something else iterates over the training loader; give it a loader of its own.")

    def _next_batch(self) -> DrawnBatch:
        if self._replay:
            return self._replay.popleft()
        rest = self.epoch_samples - self._ahead.samples
        if self._next_plan is not None and self._may_follow(self._plan, self._next_plan, self._ahead.batches, rest):
            self._plan, self._next_plan = self._next_plan, None
            self.batch_size = self._plan.micro
        return DrawnBatch(self._plan.micro, self._plan.accumulation)

    def _may_follow(self, plan: BatchPlan, following: BatchPlan, batches: int, rest: int) -> bool:
        """Whether another plan may begin at this batch.

        Where a last batch that is not full is left out, the last batches keep their size: a change would decide after
        the fact which batch was the last.
        """
        return plan.may_give_way(following, batches) and (
            batches == 0 or not self.drop_last or rest >= max(plan.micro, following.micro)
        )

    def _order(self) -> Iterator[int]:
        """The epoch's indices from the present position on.

        What is drawn at random depends on a seed and the number of the epoch, so that a resumed run draws it again.
        """
        outside = torch.get_rng_state()
        if self._generator is not None:
            if self._own_state is None:
                self._own_state = self._generator.get_state()
            self._generator.set_state(self._own_state)
        torch.default_generator.manual_seed(self._seed + self._epoch)
        indices, done = iter(self.sampler), self._ahead.samples
        first = list(islice(indices, max(done, 1)))  # the order is drawn with the first index
        torch.set_rng_state(outside)
        if len(first) < done:
            raise RuntimeError(f"the checkpoint was {done} samples into an epoch of {len(first)}.")
        return chain(first[done:], indices)

    def __len__(self) -> int:
        ahead, replayed = (_START, ()) if self._fresh else (self._ahead, self._replay)
        rest, batches, plan = self.epoch_samples - ahead.samples, ahead.batches, self._plan
        for batch in replayed:
            batches, rest = batches + 1, rest - batch.size
        following = self._next_plan
        while following is not None and rest > 0 and not self._may_follow(plan, following, batches, rest):
            batches, rest = batches + 1, rest - plan.micro
        if rest < 0:  # the batch that was counted last is not full
            return batches - self.drop_last
        size = (following or plan).micro
        return batches + (rest // size if self.drop_last else -(-rest // size))

    def state_dict(self) -> dict[str, Any]:
        """The position among the samples consumed, not among those drawn ahead, in plain types."""
        following = self._next_plan
        return {
            "taken": [self.samples_taken, self.batches_taken],
            "ahead": [] if self._fresh else [list(batch) for batch in (*self.drawn, *self._replay)],
            "fresh": self._fresh,
            "plan": [self._plan.micro, self._plan.accumulation],
            "next_plan": following and [following.micro, following.accumulation],
            "seed": self._seed,
            "epoch": self._epoch,
            "generator": [self._own_state, self._generator and self._generator.get_state()],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Makes the next pass begin where the saved one stood.

        Args:
            state_dict: What :meth:`state_dict` returned.
        """
        share, first = self.share, self._first_size
        self._prepare(1)
        self.share, self._first_size = share, first
        self._plan = BatchPlan(*state_dict["plan"])
        self._next_plan = state_dict["next_plan"] and BatchPlan(*state_dict["next_plan"])
        self.batch_size = self._plan.micro
        self._taken = self._ahead = _Position(*state_dict["taken"])
        self._replay = deque(DrawnBatch(*batch) for batch in state_dict["ahead"])
        self._seed, self._epoch = state_dict["seed"], state_dict["epoch"]
        self._own_state, now = state_dict["generator"]
        if self._generator is not None and now is not None:
            self._generator.set_state(now)
        self._fresh = state_dict["fresh"]
        self._resuming = not self._fresh

    def skip(self, batches: int) -> None:
        """Makes the next pass begin behind as many batches of the present size, whatever was in them.

        Args:
            batches: Batches of the epoch that were consumed before this sampler was there.
        """
        self._taken = self._ahead = _Position(min(batches * self._plan.micro, self.epoch_samples), batches)
        self._resuming, self._fresh = batches > 0, batches == 0

    def follow(self, before: "AdaptiveBatchSampler") -> None:
        """Begins the next epoch as the sampler of a loader that was replaced would have.

        Args:
            before: That sampler.
        """
        self._plan = before.plan
        self.batch_size = self._plan.micro
        self._seed, self._epoch = before._seed, before._epoch

    def finish(self) -> None:
        """Makes the next pass begin a new epoch, whatever was loaded."""
        self._resuming, self._fresh = False, True
