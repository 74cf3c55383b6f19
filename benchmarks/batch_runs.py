"""Training runs of which batch sizes are the subject: the data, the network, and what is written down on the way."""

import logging
import math
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from common import console
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from lightning_hpo import AdaptiveBatchSize
from lightning_hpo.demos import MNISTDataModule

OPTIMIZERS: dict[str, Any] = {
    "SGD": lambda parameters, scale: torch.optim.SGD(parameters, 0.02 * scale, momentum=0.9),
    "Adam": lambda parameters, scale: torch.optim.Adam(parameters, 1e-3 * scale),
    "Adagrad": lambda parameters, scale: torch.optim.Adagrad(parameters, 0.02 * scale),
}


class Held(Dataset[tuple[Tensor, Tensor]]):
    """Samples in memory, handed out a batch at a time, so that it is not the loader that is timed."""

    def __init__(self, inputs: Tensor, labels: Tensor) -> None:
        self.inputs, self.labels = inputs, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.inputs[index], self.labels[index]

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        chosen = torch.as_tensor(indices)
        return self.inputs[chosen], self.labels[chosen]


@dataclass
class Data:
    """A data set, the width of the network's hidden layer, how long it is trained, and the accuracy to reach."""

    train: Held
    test: Held
    width: int
    epochs: int
    target: float
    every: int  # samples between two looks at the test set

    def network(self) -> nn.Module:
        """Two layers, untrained."""
        return nn.Sequential(nn.Linear(self.train.inputs.shape[1], self.width), nn.ReLU(), nn.Linear(self.width, 10))


def digits(epochs: int = 40) -> Data:
    """scikit-learn's digits, 1437 for training and 360 for validation: always the same ones."""
    images, labels = (torch.from_numpy(part) for part in load_digits(return_X_y=True))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, test = (Held(images[part].float() / 16, labels[part]) for part in (order[:1437], order[1437:]))
    return Data(train, test, width=64, epochs=epochs, target=0.95, every=1437)


def mnist() -> Data:
    """MNIST: 60,000 training and 10,000 test images."""
    module = MNISTDataModule(val_fraction=0.0)
    module.setup()
    train, test = (part.__getitems__(range(len(part))) for part in (module.train_set, module.test_set))  # type: ignore[union-attr,arg-type]
    held = [Held(images.flatten(1).contiguous(), labels) for images, labels in (train, test)]
    return Data(held[0], held[1], width=256, epochs=10, target=0.97, every=6000)


class Classifier(LightningModule):
    """What a user would write; it knows of no batch size."""

    def __init__(self, network: nn.Module, optimizer: str, scale: float = 1.0) -> None:
        super().__init__()
        self.network, self.optimizer, self.scale = network, optimizer, scale

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Mean cross-entropy."""
        return F.cross_entropy(self.network(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        """One of three; the learning rate is that of the first batch size, times ``scale``."""
        return OPTIMIZERS[self.optimizer](self.parameters(), self.scale)


@torch.no_grad()
def measure(network: nn.Module, data: Held) -> tuple[float, float]:
    """Loss and accuracy."""
    scores = network(data.inputs)
    return F.cross_entropy(scores, data.labels).item(), (scores.argmax(1) == data.labels).double().mean().item()


@dataclass
class Point:
    """Where a run stands."""

    samples: int
    steps: int
    cpu: float
    wall: float
    loss: float
    accuracy: float
    batch: int
    noise: float


@dataclass
class Watch(Callback):
    """Writes down the course of a run; looking at the test set is not on the clock."""

    data: Data
    first: int
    method: AdaptiveBatchSize | None = None
    course: list[Point] = field(default_factory=list)

    def on_train_start(self, *_: Any) -> None:
        """Starts both clocks."""
        self.samples = self.seen_steps = 0
        self.losses: list[Tensor] = []
        self.start = (time.process_time(), time.perf_counter())

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Looks at the test set after so many samples, between two optimizer steps."""
        self.samples += len(batch[1])
        self.losses.append(outputs["loss"].detach() * trainer.accumulate_grad_batches)
        stepped = trainer.global_step > self.seen_steps
        self.seen_steps = trainer.global_step
        if stepped and self.samples >= (len(self.course) + 1) * self.data.every:
            self._look(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Looks once more."""
        if self.losses:
            self._look(trainer, pl_module)

    def _look(self, trainer: Trainer, pl_module: Any) -> None:
        now = (time.process_time(), time.perf_counter())
        cpu, wall = (a - b for a, b in zip(now, self.start, strict=True))
        loss, self.losses = torch.stack(self.losses).mean().item(), []
        accuracy = measure(pl_module.network, self.data.test)[1]
        noise = self.method.noise_scale if self.method else 0.0
        size = self.method.batch_size if self.method else self.first
        noise = noise if math.isfinite(noise) else 0.0
        self.course.append(Point(self.samples, trainer.global_step, cpu, wall, loss, accuracy, size, noise))
        later = (time.process_time(), time.perf_counter())
        self.start = (self.start[0] + later[0] - now[0], self.start[1] + later[1] - now[1])


@dataclass(frozen=True)
class Method:
    """How a run chooses its batches.

    Args:
        name: As in the tables.
        batch: Samples of the loader's batches.
        accumulation: Batches of an optimizer step at the beginning.
        scale: Factor on the learning rate, for a constant batch.
        adaptive: Arguments of ``AdaptiveBatchSize``; None for a constant batch.
    """

    name: str
    batch: int
    accumulation: int = 1
    scale: float = 1.0
    adaptive: dict[str, Any] | None = None
    drop_last: bool = False


def train(data: Data, optimizer: str, method: Method, seed: int, *more: Callback) -> tuple[dict[str, Any], Watch]:
    """One run; its figures, and its course."""
    seed_everything(seed, verbose=False)
    module = Classifier(data.network(), optimizer, method.scale)
    loader = DataLoader(
        data.train, batch_size=method.batch, shuffle=True, drop_last=method.drop_last, collate_fn=lambda batch: batch
    )
    adaptive = None if method.adaptive is None else AdaptiveBatchSize(**method.adaptive)
    watch = Watch(data, method.batch * method.accumulation, adaptive)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    callbacks: list[Callback] = [*([] if adaptive is None else [adaptive]), *more, watch]
    trainer = Trainer(
        max_epochs=data.epochs,
        accelerator="cpu",
        devices=1,
        callbacks=callbacks,
        accumulate_grad_batches=method.accumulation,
        **quiet,  # type: ignore[arg-type]
    )
    trainer.fit(module, loader)
    loss = measure(module.network, data.train)[0]
    accuracy = measure(module.network, data.test)[1]
    last = watch.course[-1]
    row = {"optimizer": optimizer, "method": method.name, "seed": seed, "steps": trainer.global_step}
    row |= {"samples": watch.samples, "mean_batch": round(watch.samples / trainer.global_step, 1)}
    row |= {"last_batch": adaptive.batch_size if adaptive else watch.first}
    row |= {"train_loss": round(loss, 4), "accuracy": round(100 * accuracy, 2)}
    row |= {"cpu_s": round(last.cpu, 2), "wall_s": round(last.wall, 2)}
    reached = next((point for point in watch.course if point.accuracy >= data.target), None)
    row |= {
        "target_steps": reached and reached.steps,
        "target_samples": reached and reached.samples,
        "target_cpu_s": reached and round(reached.cpu, 2),
        "target_wall_s": reached and round(reached.wall, 2),
    }
    console.print(f"{optimizer}, {method.name}, seed {seed}: {row['steps']} steps, {row['accuracy']:.2f} %")
    return row, watch


def be_quiet() -> None:
    """Silences what says nothing about the figures."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*(does not have many workers|logging interval|LeafSpec).*")
