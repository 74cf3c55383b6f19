"""Batches that change their size in the middle of an epoch: how does Lightning keep count?

Three ways: `plain`, where the size of torch's own batch sampler is set and nothing else; `no length`, a sampler that
refuses to say how many batches there are; `synchronized`, ours, where Lightning's counters are set anew. In each of two
epochs of 192 samples the batch goes from 4 to 16, or from 16 to 4, after a third of the samples. Counted are samples
seen, validations, steps of a schedule by epochs; whether `val_check_interval=0.25` is possible and whether a progress
bar knows its total; and the time of a batch next to an ordinary run with batches of 4.
"""

import logging
import statistics
import time
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from common import conclude, parse, show
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

from lightning_hpo.data import AdaptiveBatchSampler
from lightning_hpo.functional.batching.plan import BatchPlan
from lightning_hpo.live_loader import LiveLoader

SAMPLES = 192


class Unsized(BatchSampler):
    """Refuses to say how many batches there are."""

    def __len__(self) -> int:
        raise TypeError("nobody knows")


class Counting(LightningModule):
    """A linear layer that counts what happens to it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(8, 1)
        self.seen = self.batches = self.validations = 0
        self.total: float = 0.0

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        """Counts."""
        (x,) = batch
        self.seen, self.batches, self.total = self.seen + len(x), self.batches + 1, self.trainer.num_training_batches
        return self.layer(x).square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Does nothing."""

    def on_validation_epoch_end(self) -> None:
        """Counts."""
        self.validations += 1

    def configure_optimizers(self) -> Any:
        """A schedule by epochs."""
        optimizer = torch.optim.SGD(self.parameters(), 1e-3)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)]


def _batch_sampler(trainer: Trainer) -> Any:
    loader: Any = trainer.train_dataloader
    return loader.batch_sampler


class Change(Callback):
    """Changes the size after a third of the samples of each epoch."""

    def __init__(self, first: int, then: int, ours: bool) -> None:
        self.first, self.then, self.ours = first, then, ours
        self.live: LiveLoader | None = None
        self.epoch = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes the loader over."""
        if self.ours:
            self.live = LiveLoader(trainer)
            self.live.restart(0)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begins with the first size."""
        self.epoch = 0
        if self.live is not None:
            self.live.sampler.request(BatchPlan(self.first))
            self.live.begin_epoch()
        else:
            _batch_sampler(trainer).batch_size = self.first

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Keeps count."""
        if self.live is not None:
            self.live.sampler.take()
            self.live.synchronize()

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Changes the size when it is time."""
        self.epoch += len(batch[0])
        size = self.then if self.epoch >= SAMPLES // 3 else self.first
        if self.live is None:
            _batch_sampler(trainer).batch_size = size
        elif self.live.sampler.plan.micro != size:
            self.live.sampler.request(BatchPlan(size))
            self.live.synchronize()


def loader(kind: type[BatchSampler], size: int, workers: int) -> DataLoader[Any]:
    data = TensorDataset(torch.randn(SAMPLES, 8))
    return DataLoader(data, batch_sampler=kind(RandomSampler(data), size, False), num_workers=workers)


def fit(
    way: str, first: int, then: int, workers: int, epochs: int = 2, interval: float = 1.0
) -> tuple[Counting, float]:
    kind = {"plain": BatchSampler, "no length": Unsized, "synchronized": AdaptiveBatchSampler, "ordinary": BatchSampler}
    module = Counting()
    quiet: dict[str, Any] = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar"), False)
    callbacks: list[Callback] = [] if way == "ordinary" else [Change(first, then, way == "synchronized")]
    trainer = Trainer(
        accelerator="cpu", max_epochs=epochs, callbacks=callbacks, num_sanity_val_steps=0, enable_model_summary=False,
        val_check_interval=interval, **quiet,
    )  # fmt: skip
    begun = time.process_time()
    trainer.fit(module, loader(kind[way], first, workers), DataLoader(TensorDataset(torch.zeros(4, 8)), 4))
    return module, (time.process_time() - begun) / max(module.batches, 1)


def fractional(way: str) -> bool:
    """Whether validating four times an epoch is possible, and happens."""
    try:
        return fit(way, 4, 16, 0, interval=0.25)[0].validations == 8
    except MisconfigurationException:
        return False


def run(way: str, first: int, then: int, workers: int) -> dict[str, Any]:
    module, _ = fit(way, first, then, workers)
    decayed = module.trainer.optimizers[0].param_groups[0]["lr"]
    return {
        "way": way,
        "sizes": f"{first} to {then}",
        "workers": workers,
        "samples of 384": module.seen,
        "validations of 2": module.validations,
        "epoch schedule steps of 2": round(torch.tensor(1e-3 / decayed).log2().item()),
        "total known": "yes" if module.total != float("inf") else "no",
        "val_check_interval=0.25": "yes" if fractional(way) else "no",
    }


def main(arguments: Sequence[str] | None = None) -> None:
    chosen = parse(__doc__, arguments)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    ways = ("plain", "no length", "synchronized")
    rows = [
        run(way, *sizes, w) for way in ways for sizes in ((4, 16), (16, 4)) for w in ((0,) if chosen.quick else (0, 2))
    ]
    show("What Lightning makes of it", rows, dict.fromkeys(rows[0], ""))
    times: dict[str, list[float]] = {way: [] for way in ("ordinary", *ways)}
    for _ in range(1 if chosen.quick else 7):
        for way, found in times.items():
            found.append(fit(way, 4, 4, 0, epochs=2 if chosen.quick else 30)[1])
    middle = {way: statistics.median(found) for way, found in times.items()}
    costs = [
        {"way": way, "us a batch": round(1e6 * cost, 1), "ratio": round(cost / middle["ordinary"], 3)}
        for way, cost in middle.items()
    ]
    show("Cost of a batch, CPU time", costs, {"way": "", "us a batch": ".1f", "ratio": ".3f"})
    conclude(__file__, chosen, rows, costs=costs)


if __name__ == "__main__":
    main()
