"""A batch size that changes in the loader of a Trainer while it runs."""

import math
import warnings
from contextlib import ExitStack
from typing import Any, cast

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from lightning_hpo.data import AdaptiveBatchSampler

__all__ = ["LiveLoader", "loader_problems"]

_ROUNDING = 1e-9  # of a fraction of an epoch


def loader_problems(loader: object) -> list[str]:
    """Why the batch size of a training loader cannot be changed while it runs; empty if it can.

    Args:
        loader: What ``trainer.train_dataloader`` holds.

    Returns:
        One sentence a problem, each with what to change.

    Example:
        >>> loader_problems(DataLoader(range(6), batch_size=2)), len(loader_problems([1, 2, 3]))
        ([], 1)
    """
    cure = "use `mode='accumulate'`, which leaves the loader alone"
    if not isinstance(loader, DataLoader):
        return [f"the training loader is a `{type(loader).__name__}`, not one torch `DataLoader`; {cure}."]
    if isinstance(loader.dataset, IterableDataset):
        return [f"an `IterableDataset` decides its batches itself; {cure}."]
    if loader.batch_sampler is None:
        return [f"the training loader has no automatic batching (`batch_size=None`); {cure}."]
    problems = []
    if not hasattr(getattr(loader.batch_sampler, "sampler", None) or loader.batch_sampler, "__len__"):
        problems.append(f"nobody knows how many samples an epoch has; give the sampler a length, or {cure}.")
    if type(loader.batch_sampler) not in (BatchSampler, AdaptiveBatchSampler):
        problems.append(f"`{type(loader.batch_sampler).__name__}` draws batches by a rule of its own; {cure}.")
    if hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict"):
        problems.append(f"`{type(loader).__name__}` restores its position itself; use a plain `DataLoader`, or {cure}.")
    if not getattr(loader, "in_order", True):
        problems.append("the loader hands batches out of order; set `in_order=True`.")
    return problems


class LiveLoader:
    """The loader of a Trainer that is running, made adaptive, and Lightning's counters kept in step with it.

    Lightning counts the batches of an epoch once. When their number changes, so do the end of the epoch, the batches
    after which it validates, and the total of the progress bar: :meth:`synchronize` sets them anew.

    Args:
        trainer: A Trainer whose training has begun; call it in ``on_train_start`` or later.
        accumulation: Micro-batches in an optimizer step so far.

    Raises:
        TypeError: If the loader is of a kind that :func:`loader_problems` names.
        AttributeError: If this version of Lightning keeps its counters elsewhere.
    """

    def __init__(self, trainer: Trainer, accumulation: int = 1) -> None:
        self.trainer, self._loop = trainer, trainer.fit_loop
        missing = [n for n in ("fetched", "length", "done") if not hasattr(self._fetcher, n)]
        missing += [n for n in ("limits", "flattened") if not hasattr(self._combined, n)]
        if missing:
            raise AttributeError(f"this version of Lightning has no {missing}; `lightning-hpo` needs them to count.")
        self.loader: DataLoader[Any] = self._combined.flattened[0]
        self.sampler = AdaptiveBatchSampler.adopt(cast(BatchSampler, self.loader.batch_sampler), accumulation)
        limit = trainer.limit_train_batches
        self.sampler.share = limit if isinstance(limit, float) else 1.0
        self._quiet = ExitStack()

    @property
    def _fetcher(self) -> Any:  # a Trainer that asks for its loader again makes new ones
        return self._loop._data_fetcher

    @property
    def _combined(self) -> Any:
        return self._loop._combined_loader

    def restart(self, epoch: int) -> None:
        """Begins the epoch's batches again, from where the sampler's state stands.

        The loader has been iterated over before the sampler was adopted, and its workers may have drawn batches.

        Args:
            epoch: Number of the epoch, for samplers that shuffle by it.
        """
        taken, over = self.sampler.batches_taken, self.is_over()
        for sampler in (self.loader.sampler, self.sampler.sampler):
            if callable(set_epoch := getattr(sampler, "set_epoch", None)):
                set_epoch(epoch)
        if taken:
            self._quiet.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("ignore", message=".*your dataloader is not resumable.*")
        self.begin_epoch()
        iter(self._fetcher)
        if over:
            # By which Lightning sees that the checkpoint's epoch is over, and was validated.
            self._loop.max_batches = taken
            if isinstance(self.trainer.val_check_interval, float) and self.trainer.val_check_batch is not None:
                self.trainer.val_check_batch = taken

    def stale(self) -> bool:
        """Whether the Trainer has a new loader by now."""
        return self._combined.flattened[0] is not self.loader

    def begin_epoch(self) -> None:
        """Counts the batches of an epoch that is about to begin, or to go on."""
        if self.is_over():
            self.sampler.finish()
        limit = self._limit()
        self._combined.limits = [limit]
        self._set(limit)

    def is_over(self) -> bool:
        """Whether all batches of an epoch have been taken."""
        return 0 < self.sampler.batches_taken >= self._limit()

    def synchronize(self) -> None:
        """Counts the batches anew; call it whenever one was taken or the plan has changed."""
        self._quiet.close()
        limit = self._limit()
        self._fetcher.length = limit
        changed = self._loop.max_batches != limit
        self._set(limit)
        if changed:
            self._show_total(limit)

    def release(self) -> None:
        """Gives the loader its own sampler back."""
        self._quiet.close()
        if isinstance(self.sampler, AdaptiveBatchSampler):
            self.sampler.release()

    def _limit(self) -> int:
        batches, limit = len(self.sampler), self.trainer.limit_train_batches
        return min(batches, limit) if isinstance(limit, int) else batches

    def _set(self, limit: int) -> None:
        self._loop.max_batches = limit
        interval = self.trainer.val_check_interval
        if self.trainer.val_check_batch is None:  # it counts time
            return
        if isinstance(interval, float):
            self.trainer.val_check_batch = limit if interval == 1.0 else self._next_validation(limit, interval)
        elif self.trainer.check_val_every_n_epoch is not None:  # an epoch may have become shorter than the interval
            self.trainer.val_check_batch = min(interval, limit)

    def _next_validation(self, limit: int, interval: float) -> int:
        """Number of the batch after which a fraction of the epoch's samples is reached.

        Lightning validates where the number of the batch is a multiple of this; the number itself is the first one.
        """
        done, taken, total = self.sampler.samples_taken, self.sampler.batches_taken, self.sampler.epoch_samples
        if taken and taken == self.trainer.val_check_batch:  # this is where it validates now
            return taken
        due = (math.floor(done / (total * interval) + _ROUNDING) + 1) * total * interval
        if due > total * (1 + _ROUNDING):  # not in this epoch any more
            return limit + 1
        for size in self.sampler.sizes_ahead():
            if done >= due:
                break
            done, taken = done + size, taken + 1
        plan = self.sampler.plan
        taken += max(0, math.ceil((due - done) / plan.micro - _ROUNDING))
        return min(limit, -(-taken // plan.accumulation) * plan.accumulation)  # not within a window

    def _show_total(self, limit: int) -> None:
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, TQDMProgressBar) and not callback.is_disabled:
                callback.train_progress_bar.total = limit
                callback.train_progress_bar.refresh()
            elif (
                isinstance(callback, RichProgressBar)
                and callback.progress
                and callback.train_progress_bar_id is not None
            ):
                callback.progress.update(callback.train_progress_bar_id, total=limit)
