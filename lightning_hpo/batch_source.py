"""Where the batches of a running Trainer come from, and how many make up an optimizer step: one face for both ways."""

import math
from typing import Any, Protocol, cast

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.data import extract_batch_size

from lightning_hpo.data import DrawnBatch
from lightning_hpo.functional.batching.plan import BatchPlan, plan_for
from lightning_hpo.live_loader import LiveLoader, loader_problems

__all__ = ["AccumulatedBatches", "BatchSource", "LoaderBatches", "source_problems"]


class BatchSource(Protocol):
    """Batches of a training loader whose number of samples a step can be changed.

    Attributes:
        first: The plan that training begins with.
        epoch_samples: Samples of an epoch over all ranks; 0 if nobody knows.
        alike: Whether all ranks have batches of the same sizes.
    """

    first: BatchPlan
    epoch_samples: int
    alike: bool

    @property
    def plan(self) -> BatchPlan:
        """The newest plan."""

    def load_state_dict(self, state_dict: dict[str, Any] | None, ranks: int) -> None:
        """Goes on where a state stood; None if a checkpoint was written without one.

        Args:
            state_dict: What :meth:`state_dict` returned.
            ranks: Ranks that were there when it did.
        """

    def state_dict(self) -> dict[str, Any]:
        """Plans, and the position among the samples where it is ours to keep; plain types."""

    def begin(self) -> None:
        """Draws the first batches of training."""

    def begin_epoch(self) -> None:
        """Counts the batches of an epoch."""

    def is_over(self) -> bool:
        """Whether it is known that the epoch has no more batches."""

    def take(self, batch: Any, batch_idx: int) -> DrawnBatch:
        """What the batch that has arrived was drawn for.

        Args:
            batch: The batch.
            batch_idx: Its number in the epoch.
        """

    def end_batch(self) -> None:
        """Counts the batches that are left, after one was used."""

    def request(self, wanted: int, largest: int, limit: int) -> None:
        """Asks for another number of samples in a step, from the next possible window on.

        Args:
            wanted: Samples over all ranks.
            largest: Samples that one rank may hold at a time.
            limit: Samples over all ranks that a step may have.
        """

    def release(self) -> None:
        """Gives the loader back as it was."""


def source_problems(trainer: Trainer, mode: str) -> list[str]:
    """Why the batches of a Trainer cannot be changed; empty if they can.

    Args:
        trainer: A Trainer whose training has begun.
        mode: ``"loader"`` or ``"accumulate"``.

    Returns:
        One sentence a problem, each with what to change.
    """
    if mode == "loader":
        return loader_problems(trainer.train_dataloader)
    if getattr(trainer.train_dataloader, "batch_size", None):
        return []
    return ["the size of the loader's batches is unknown; give a `DataLoader` with `batch_size`."]


class LoaderBatches:
    """The Trainer's loader, whose sampler is made to draw batches of any size.

    Args:
        trainer: A Trainer whose training has begun and in which :func:`source_problems` finds nothing.
    """

    alike = True

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._live = LiveLoader(trainer, trainer.accumulate_grad_batches)
        self.first = self._live.sampler.plan
        self.epoch_samples = self._live.sampler.epoch_samples * trainer.world_size

    @property
    def plan(self) -> BatchPlan:
        """The newest plan."""
        return self._live.sampler.plan

    def load_state_dict(self, state_dict: dict[str, Any] | None, ranks: int) -> None:
        """Goes on where a state stood, also that of another number of ranks."""
        sampler, loop = self._live.sampler, self._trainer.fit_loop
        if state_dict is None:
            sampler.skip(loop.epoch_loop.batch_progress.current.ready)
            return
        sampler.load_state_dict(_for_ranks(state_dict, ranks, self._trainer.world_size))
        if not loop.restarting:  # the same Trainer goes on, and begins an epoch
            sampler.finish()

    def state_dict(self) -> dict[str, Any]:
        """That of the sampler."""
        return self._live.sampler.state_dict()

    def begin(self) -> None:
        """Draws the first batches of training."""
        self._live.restart(self._trainer.current_epoch)

    def begin_epoch(self) -> None:
        """Counts the batches of an epoch, and takes over the loader anew if the Trainer has asked for another one."""
        if not self._live.stale():
            self._live.begin_epoch()
            return
        before, self._live = self._live, LiveLoader(self._trainer)
        self._live.sampler.follow(before.sampler)
        before.release()
        self.begin()

    def is_over(self) -> bool:
        """Whether all batches of the epoch have been taken."""
        return self._live.is_over()

    def take(self, batch: Any, batch_idx: int) -> DrawnBatch:
        """What the batch that has arrived was drawn for."""
        drawn = self._live.sampler.take()
        self._live.synchronize()
        return drawn

    def end_batch(self) -> None:
        """Counts the batches that are left, after one was used."""
        self._live.synchronize()

    def request(self, wanted: int, largest: int, limit: int) -> None:
        """Asks for another number of samples in a step: larger micro-batches first, then more of them."""
        most = None if limit == self.epoch_samples else limit  # a whole epoch may be rounded up: one short window
        plan = plan_for(wanted, self._trainer.world_size, largest, self.first.accumulation, max_batch=most)
        self._live.sampler.request(plan)

    def release(self) -> None:
        """Gives the loader its own sampler back."""
        self._live.release()


class AccumulatedBatches:
    """The batches of a loader that nobody may touch: only the number that makes up an optimizer step changes.

    Args:
        trainer: A Trainer whose training has begun and in which :func:`source_problems` finds nothing.
    """

    alike = False  # ranks that draw from streams need not have the same numbers

    def __init__(self, trainer: Trainer) -> None:
        micro = cast(int, getattr(trainer.train_dataloader, "batch_size", None))
        self.first = self._plan = BatchPlan(micro, trainer.accumulate_grad_batches)
        self._next_plan: BatchPlan | None = None
        batches, self._ranks = trainer.num_training_batches, trainer.world_size
        self.epoch_samples = int(batches) * micro * self._ranks if math.isfinite(batches) else 0

    @property
    def plan(self) -> BatchPlan:
        """The newest plan."""
        return self._next_plan or self._plan

    def load_state_dict(self, state_dict: dict[str, Any] | None, ranks: int) -> None:
        """Goes on with the saved plans."""
        if state_dict is not None:
            self._plan = BatchPlan(*state_dict["plan"])
            self._next_plan = state_dict["next_plan"] and BatchPlan(*state_dict["next_plan"])

    def state_dict(self) -> dict[str, Any]:
        """The plans, in plain types."""
        following = self._next_plan
        return {
            "plan": [self._plan.micro, self._plan.accumulation],
            "next_plan": following and [following.micro, following.accumulation],
        }

    def begin(self) -> None:
        """Nothing: the Trainer draws its batches."""

    def begin_epoch(self) -> None:
        """Nothing: the number of batches stays what it is."""

    def is_over(self) -> bool:
        """False: nobody knows."""
        return False

    def take(self, batch: Any, batch_idx: int) -> DrawnBatch:
        """The size of the batch that has arrived, and the accumulation that holds for it."""
        following = self._next_plan
        if following and self._plan.may_give_way(following, batch_idx):
            self._plan, self._next_plan = following, None
        size = getattr(batch, "num_graphs", None) or extract_batch_size(batch)
        return DrawnBatch(size, self._plan.accumulation)

    def end_batch(self) -> None:
        """Nothing: the number of batches stays what it is."""

    def request(self, wanted: int, largest: int, limit: int) -> None:
        """Asks for as many whole batches as are not too many: a power of two times the first accumulation."""
        accumulation, batch = self.first.accumulation, self.first.micro * self._ranks
        while 2 * accumulation * batch <= min(wanted, limit):
            accumulation *= 2
        self._next_plan = BatchPlan(self.first.micro, accumulation)

    def release(self) -> None:
        """Nothing: nothing was touched."""


def _for_ranks(state: dict[str, Any], before: int, ranks: int) -> dict[str, Any]:
    """The sampler's state for another number of ranks: samples consumed are shared out anew."""
    if before == ranks:
        return state
    samples, batches = state["taken"]
    return {**state, "taken": [-(-samples * before // ranks), batches], "ahead": []}
