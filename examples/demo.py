"""Watch an ordinary Trainer learn what people otherwise set by hand, on real images: `make demo`.

1. trains a small Vision Transformer on scikit-learn's handwritten digits with an ordinary Trainer,
2. freezes it and learns how many tokens each block can drop, for 70 % of its multiply-accumulates,
3. compares accuracy before and after,
4. trains a small network twice, with batches of 8 and with batches that grow as the noise of the gradient says,
5. trains it twice on 300 images, without weight decay and with one that follows the gradient of the validation loss,
6. trains a wider one twice on 300 images, with dropout of 0.05 and with rates that tune themselves from there,

and writes tables, CSV and pictures into `demo_output/`. Two to three minutes on two cores; `--quick` takes seconds and
shows nothing but that it runs.
"""

import argparse
import copy
import logging
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn import functional as F

from lightning_hpo import (
    AdaptiveBatchSize,
    Hypergradient,
    HyperparameterReport,
    SelfTuning,
    TokenCompression,
    TokenCompressionSchedule,
    apply_token_compression,
)
from lightning_hpo.demos import DigitsDataModule, ImageClassifier

OUTPUT = Path("demo_output")
TARGET = 0.7
VIT = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 64, "depth": 6, "num_heads": 4, "qk_norm": True}
console = Console(highlight=False)


class SmallNetwork(LightningModule):
    """Two linear layers and SGD, as anybody would write them."""

    def __init__(self, lr: float = 0.005) -> None:
        super().__init__()
        self.lr = lr
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> torch.Tensor:
        """Cross-entropy."""
        images, labels = batch
        return F.cross_entropy(self.net(images), labels)

    def validation_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> None:
        """Cross-entropy on images that it is not trained on."""
        images, labels = batch
        self.log("val_loss", F.cross_entropy(self.net(images), labels), batch_size=len(labels))

    def test_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> None:
        """Share of the images that are right."""
        images, labels = batch
        self.log("test_acc", (self.net(images).argmax(-1) == labels).float().mean(), batch_size=len(labels))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD with momentum."""
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


class DropoutNetwork(SmallNetwork):
    """The same with three layers and dropout before each."""

    def __init__(self) -> None:
        super().__init__(lr=0.01)
        first = nn.Sequential(nn.Flatten(), nn.Dropout(0.05), nn.Linear(64, 256), nn.ReLU())
        self.net = nn.Sequential(
            *first, nn.Dropout(0.05), nn.Linear(256, 256), nn.ReLU(), nn.Dropout(0.05), nn.Linear(256, 10)
        )


class Watch(Callback):
    """Prints a line now and then."""

    def __init__(self, compression: TokenCompression | None = None) -> None:
        self.compression = compression
        self.losses: list[torch.Tensor] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *batch: Any) -> None:
        """Notes the loss."""
        self.losses.append(outputs["loss"])

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prints the mean loss and, where they are being learned, the tokens kept."""
        if trainer.current_epoch % 5 == 4:
            kept = "" if self.compression is None else f", tokens kept {list(self.compression.schedule.merge)}"
            console.print(f"   epoch {trainer.current_epoch + 1:>2}, loss {torch.stack(self.losses).mean():.2f}{kept}")
            self.losses.clear()


def trainer(*callbacks: Callback, **limits: Any) -> Trainer:
    quiet: dict[str, Any] = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    settings = {"limit_val_batches": 0, **quiet, **limits}
    return Trainer(accelerator="cpu", logger=False, callbacks=list(callbacks), **settings)


def accuracy(classifier: LightningModule, digits: DigitsDataModule) -> float:
    (figures,) = trainer().test(classifier, digits, verbose=False)
    return figures["test_acc"]


def show(schedule: TokenCompressionSchedule) -> None:
    table = Table(title="Tokens in each block, the class token included")
    for heading in ("block", "enter", "after pruning", "after merging"):
        table.add_column(heading, justify="right")
    for block, counts in enumerate(schedule.running()):
        table.add_row(str(block), *map(str, counts))
    console.print(table)


def batches(quick: bool) -> None:
    console.print("4. A small network, with batches of 8 and with `AdaptiveBatchSize()`, which begins there and grows.")
    adaptive = AdaptiveBatchSize(max_micro_batch_size=1024)
    report = HyperparameterReport(dirpath=OUTPUT / "batch_size", every_n_steps=1)
    for name, callbacks in (("batches of 8", []), ("adaptive", [adaptive, report])):
        seed_everything(0, verbose=False)
        digits = DigitsDataModule(batch_size=8, seed=0, val_fraction=0.0, limit=128 if quick else None)
        network, runner = SmallNetwork(), trainer(*callbacks, max_epochs=2 if quick else 40)
        begun = time.perf_counter()
        runner.fit(network, digits)
        spent, right = time.perf_counter() - begun, accuracy(network, digits)
        console.print(f"   {name}: {runner.global_step} steps, {spent:.0f} s, test accuracy {right:.1%}")
    console.print(
        f"   the last batches had {adaptive.batch_size} samples; gradient noise scale {adaptive.noise_scale:.0f}"
    )


def decay(quick: bool) -> None:
    console.print("5. 300 images, without weight decay and with one that `Hypergradient` tunes, from 1e-6.")
    tuning = Hypergradient(tune=("weight_decay",), every_n_steps=5, warmup_steps=0 if quick else 200, lr=0.1)
    report = HyperparameterReport(dirpath=OUTPUT / "weight_decay", every_n_steps=5)
    for name, callbacks in (("no weight decay", []), ("learned", [tuning, report])):
        seed_everything(0, verbose=False)
        compare(name, SmallNetwork(lr=0.1), 300, callbacks, max_steps=20 if quick else 2000)
    console.print(f"   weight decay learned: {tuning.hyperparameters()['weight_decay']:.4f}")


def dropout(quick: bool) -> None:
    console.print("6. 300 images, with dropout of 0.05 and with rates that `SelfTuning` tunes from there.")
    patterns = ("net.1", "net.4", "net.7")
    tuning = SelfTuning(dropout=patterns, mode="stn", encoding="identity", warmup_steps=0 if quick else 50)
    report = HyperparameterReport(dirpath=OUTPUT / "dropout", every_n_steps=5)
    for name, callbacks in (("dropout 0.05", []), ("learned", [tuning, report])):
        seed_everything(0, verbose=False)
        compare(name, DropoutNetwork(), 32, callbacks, max_epochs=2 if quick else 80)
    rates = [tuning.hyperparameters()[pattern.replace(".", "/")] for pattern in patterns]
    console.print(f"   dropout learned: {', '.join(f'{rate:.2f}' for rate in rates)}")


def compare(name: str, network: LightningModule, batch_size: int, callbacks: list[Callback], **limits: Any) -> None:
    """Trains on 300 images, validates on 300 others, and prints a line."""
    digits = DigitsDataModule(batch_size=batch_size, seed=0, val_fraction=0.5, limit=600)
    looks = {"limit_val_batches": 1.0, "num_sanity_val_steps": 0, "check_val_every_n_epoch": 10_000}
    runner = trainer(*callbacks, **looks, **limits)
    begun = time.perf_counter()
    runner.fit(network, digits)
    spent = time.perf_counter() - begun
    (figures,) = runner.validate(network, digits, verbose=False)
    right = accuracy(network, digits)
    console.print(f"   {name}: {spent:.0f} s, validation loss {figures['val_loss']:.3f}, test accuracy {right:.1%}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few steps only")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)  # for a network this small a second thread costs more than it brings
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    known = "does not have many workers|LeafSpec|logging interval"
    warnings.filterwarnings("ignore", message=f".*({known}).*")
    seed_everything(0, verbose=False)
    started = time.perf_counter()

    console.print("1. An ordinary Trainer teaches a Vision Transformer handwritten digits.")
    digits = DigitsDataModule(batch_size=64, seed=0, val_fraction=0.0, limit=128 if quick else None)
    classifier = ImageClassifier(model_args=VIT, lr=3e-3, weight_decay=0.2, label_smoothing=0.1, warmup_steps=100)
    trainer(Watch(), max_epochs=1 if quick else 60).fit(classifier, digits)
    before = accuracy(classifier, digits)
    console.print(f"   {before:.1%} of the test images are right, after {time.perf_counter() - started:.0f} s.")

    console.print(f"2. `TokenCompression({TARGET})` learns how few tokens each block needs; weights stay.")
    compression = TokenCompression(TARGET)
    report = HyperparameterReport(dirpath=OUTPUT, every_n_steps=10)
    trainer(compression, report, Watch(compression), max_steps=20 if quick else 900).fit(classifier, digits)

    console.print("3. From now on the sequences are really shorter.")
    schedule = compression.schedule
    schedule.to_json(OUTPUT / "schedule.json")
    classifier.model = apply_token_compression(copy.deepcopy(classifier.model), schedule)
    after = accuracy(classifier, digits)
    show(schedule)
    macs, dense = schedule.macs or 0, schedule.full_macs or 1
    console.print(f"   multiply-accumulates: {dense:,} -> {macs:,}, {macs / dense:.1%} (asked for: {TARGET:.0%})")
    console.print(f"   test accuracy: {before:.1%} -> {after:.1%}")
    batches(quick)
    decay(quick)
    dropout(quick)
    for file in sorted(path for path in OUTPUT.rglob("*") if path.is_file()):
        console.print(f"   written: {file.resolve()}", soft_wrap=True)
    console.print(f"   {time.perf_counter() - started:.0f} s in all")
    if quick or abs(macs / dense / TARGET - 1) <= 0.02:
        return 0
    console.print("   The cost is more than 2 % off its target.", style="red")
    return 1


if __name__ == "__main__":
    sys.exit(main())
