"""Learning rate and weight decay that begin wrong and adapt while an unchanged module trains: one more callback.

`python examples/adapt_optimizer.py` takes half a minute; `--quick` shows nothing but that it runs. Looking one step
ahead, which is what `Hypergradient` does where a learning rate is tuned, is short-sighted: it likes small rates. One
that is far too low comes up until training works, but no further, and decay does not grow there; where the rate is
high, it comes down and decay grows to what a grid would choose. Pictures are written to `demo_output/`.
"""

import logging
import sys
import warnings
from itertools import product
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_hpo import Hypergradient, HyperparameterReport
from lightning_hpo.demos import DigitsDataModule

OUTPUT = Path("demo_output") / "adapt_optimizer"


class Classifier(LightningModule):
    """Three linear layers and SGD, as anybody would write them."""

    def __init__(self, lr: float, weight_decay: float) -> None:
        super().__init__()
        self.save_hyperparameters()
        widths = (nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        self.network = nn.Sequential(nn.Flatten(), *widths)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy."""
        return F.cross_entropy(self.network(batch[0]), batch[1])

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Logs cross-entropy and accuracy."""
        self._score(batch, "val")

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Logs cross-entropy and accuracy."""
        self._score(batch, "test")

    def _score(self, batch: tuple[Tensor, Tensor], stage: str) -> None:
        logits, labels = self.network(batch[0]), batch[1]
        self.log(f"{stage}_loss", F.cross_entropy(logits, labels), batch_size=len(labels))
        self.log(f"{stage}_acc", (logits.argmax(1) == labels).float().mean(), batch_size=len(labels))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD with momentum."""
        return torch.optim.SGD(self.parameters(), momentum=0.9, **self.hparams)


logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", message=".*(does not have many workers|LeafSpec|logging interval).*")
torch.set_num_threads(1)
quick = "--quick" in sys.argv
data = DigitsDataModule(batch_size=50, limit=600, val_fraction=0.5)  # 300 images to train on, which are soon overfitted


def run(title: str, lr: float, weight_decay: float, *callbacks: Callback) -> None:
    """Trains once and prints what came of it."""
    seed_everything(0, verbose=False)
    quiet: dict[str, Any] = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    )
    trainer = Trainer(
        max_steps=10 if quick else 1000,
        accelerator="cpu",
        num_sanity_val_steps=0,
        check_val_every_n_epoch=1000,
        callbacks=list(callbacks),
        **quiet,
    )
    module = Classifier(lr, weight_decay)
    trainer.fit(module, data)
    (val,), (test,) = trainer.validate(module, data, verbose=False), trainer.test(module, data, verbose=False)
    print(f"{title:>13}: validation loss {val['val_loss']:.3f}, test accuracy {test['test_acc']:.1%}", flush=True)


for lr in (0.0002, 0.2):
    print(f"begun with a learning rate of {lr:g} and no weight decay")
    run("as it is", lr, 0.0)
    tuning = Hypergradient(tune=("lr", "weight_decay"), every_n_steps=5, lr=0.1)
    report = HyperparameterReport(dirpath=OUTPUT / f"lr_{lr:g}", every_n_steps=5)
    run("adapted", lr, 0.0, tuning, report)

print("a grid, each with its learning rate and weight decay kept")
for lr, decay in product((0.0002, 0.002, 0.02, 0.2), (0.0, 1e-3, 1e-2)):
    run(f"{lr:g}, {decay:g}", lr, decay)
for picture in sorted(OUTPUT.rglob("*.png")):
    print(f"written: {picture.resolve()}")
