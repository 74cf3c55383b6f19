"""A weight decay for each block of a Vision Transformer, learned from one small value: groups of the optimizer do it.

`python examples/layer_decay.py` takes about a minute; `--quick` shows nothing but that it runs. The course of
the values is written to `demo_output/layer_decay/`.
"""

import logging
import sys
import warnings
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer, seed_everything

from lightning_hpo import Hypergradient, HyperparameterReport
from lightning_hpo.demos import DigitsDataModule, ImageClassifier

VIT = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 32, "depth": 4, "num_heads": 4}


class LayeredClassifier(ImageClassifier):
    """An image classifier whose optimizer has one group for each block, one for what is before and one for the head."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW; `tune` gives each group a value of its own."""
        return torch.optim.AdamW(list(self.groups().values()), lr=self.lr, weight_decay=self.weight_decay)

    def groups(self) -> dict[str, dict[str, Any]]:
        """Parameters by the part of the network that they are in."""
        found: dict[str, dict[str, Any]] = {}
        for name, parameter in self.model.named_parameters():
            first, second, *_ = [*name.split("."), ""]
            part = f"block {second}" if first == "blocks" else "head" if first in ("norm", "head") else "patches"
            found.setdefault(part, {"params": []})["params"].append(parameter)
        return found


logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", message=".*(does not have many workers|LeafSpec|logging interval).*")
torch.set_num_threads(1)
quick = "--quick" in sys.argv
data = DigitsDataModule(batch_size=60, limit=600, val_fraction=0.5)  # 300 images to train on, 300 to steer by


def run(title: str, *callbacks: Callback) -> LayeredClassifier:
    """Trains once and prints what came of it."""
    seed_everything(0, verbose=False)
    quiet: dict[str, Any] = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    )
    trainer = Trainer(
        max_steps=10 if quick else 600,
        accelerator="cpu",
        num_sanity_val_steps=0,
        check_val_every_n_epoch=1000,
        callbacks=list(callbacks),
        **quiet,
    )
    module = LayeredClassifier(model_args=VIT, lr=3e-3, weight_decay=0.01, cosine=False)
    trainer.fit(module, data)
    (val,), (test,) = trainer.validate(module, data, verbose=False), trainer.test(module, data, verbose=False)
    print(f"{title}: validation loss {val['val_loss']:.3f}, test accuracy {test['test_acc']:.1%}", flush=True)
    return module


run("weight decay 0.01 everywhere")
tuning = Hypergradient(tune=("weight_decay",), every_n_steps=5, warmup_steps=0 if quick else 100, lr=0.2)
module = run(
    "learned, a block at a time", tuning, HyperparameterReport(dirpath="demo_output/layer_decay", every_n_steps=5)
)
decays = tuning.hyperparameters()["weight_decay"]
for part, decay in zip(module.groups(), decays if isinstance(decays, list) else [decays], strict=True):
    print(f"{part:>8}  {decay:.4f}")
