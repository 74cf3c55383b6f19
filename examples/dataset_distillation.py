"""Dataset distillation: ten images, one a class, on which a classifier learns what the whole data set would teach it.

`python examples/dataset_distillation.py` takes half a minute; `--quick` shows nothing but that it runs. The digits are
scikit-learn's, or MNIST's if `LIGHTNING_HPO_DATA` names the folder that holds them. Writes
`demo_output/distilled_images.png`.
"""

import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_hpo import Hypergradient, HyperparameterSet, Interval
from lightning_hpo.demos import DigitsDataModule, MNISTDataModule

PATIENCE = 20  # steps of the classifier from one step of the images to the next


class Distillation(LightningModule):
    """A linear classifier that never sees the data: its training loss knows ten images alone."""

    def __init__(self, pixels: int) -> None:
        super().__init__()
        self.network = nn.Linear(pixels, 10, bias=False)
        self.hypers = HyperparameterSet(images=Interval(torch.randn(10, pixels) / pixels, low=-3.0, high=3.0))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy on the ten images, and a penalty that makes the minimum unique."""
        logits = self.network(self.hypers["images"])
        return F.cross_entropy(logits, batch[0]) + 0.05 * self.network.weight.square().sum()

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy on the real images, which the ten follow."""
        return F.cross_entropy(self.network(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD with momentum."""
        return torch.optim.SGD(self.network.parameters(), lr=0.3, momentum=0.9)


logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", message=".*(does not have many workers|LeafSpec|logging interval).*")
torch.set_num_threads(1)
seed_everything(0, verbose=False)
quick = "--quick" in sys.argv
data = (MNISTDataModule if os.environ.get("LIGHTNING_HPO_DATA") else DigitsDataModule)(val_fraction=0.0)
data.setup()
sets: Any = (data.train_dataloader().dataset, data.test_dataloader().dataset)
real, test = ((part.images.flatten(1) / data.brightest, part.labels) for part in sets)


def fit(module: Distillation, steps: int, *callbacks: Callback) -> float:
    """Trains on the ten images; returns the accuracy on the test images."""
    classes = DataLoader(TensorDataset(torch.arange(10).repeat(steps)), batch_size=10)
    everything = DataLoader(TensorDataset(*real), batch_size=min(2000, len(real[1])))
    quiet: dict[str, Any] = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    )
    trainer = Trainer(max_epochs=1, accelerator="cpu", num_sanity_val_steps=0, callbacks=list(callbacks), **quiet)
    trainer.fit(module, classes, everything)
    return (module.network(test[0]).argmax(1) == test[1]).float().mean().item()


module = Distillation(real[0].shape[1])
print(f"trained on ten images of noise: test accuracy {fit(module, 2 if quick else 200):.1%}")
distilling = Hypergradient(estimator="ift_cg", every_n_steps=PATIENCE, lr=0.05)
for steps in (1, 1) if quick else (20, 80):
    right = fit(module, steps * PATIENCE, distilling)
    print(f"after {steps} more steps of the images: test accuracy {right:.1%}")

fresh = Distillation(real[0].shape[1])
fresh.hypers = module.hypers
print(f"another classifier, trained on the ten images from the start: {fit(fresh, 2 if quick else 200):.1%}")

figure = Figure(figsize=(10, 1.4), layout="constrained")
for axes, image in zip(figure.subplots(1, 10), module.hypers["images"].detach(), strict=True):
    side = round(len(image) ** 0.5)
    axes.imshow(image.reshape(side, side), cmap="gray")
    axes.axis("off")
picture = Path("demo_output") / "distilled_images.png"
picture.parent.mkdir(exist_ok=True)
figure.savefig(picture)
print(f"written: {picture.resolve()}")
