"""Learns how to denoise: every image is a lower problem, and MAID takes the steps of the Trainer.

`python examples/denoising.py` takes a few minutes: a total variation, then a field of experts, learned on tiles of one
photograph and tested on tiles of another. With `--data` they are learned on crops of BSD68 and tested on Set12,
from the folder that LIGHTNING_HPO_DATA names; `--quick` shows nothing but that it runs.
"""

import logging
import sys
import warnings
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torchmetrics.image import PeakSignalNoiseRatio

from lightning_hpo import PerSampleMAIDModule
from lightning_hpo.demos import DenoisingDataModule, PhotoDenoisingDataModule
from lightning_hpo.functional.bilevel.denoising import (
    FieldOfExperts,
    Regularizer,
    TotalVariation,
    denoising_loss,
    reconstruction_loss,
)
from lightning_hpo.functional.bilevel.lower_solvers import lbfgs

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", message=".*(does not have many workers|LeafSpec|logging interval).*")
torch.set_num_threads(1)
quick = "--quick" in sys.argv
data = DenoisingDataModule() if "--data" in sys.argv else PhotoDenoisingDataModule(size=32 if quick else 64)


class Denoiser(PerSampleMAIDModule):
    """A regulariser to be learned from pairs of noisy and clean images."""

    def __init__(self, regularizer: Regularizer, theta0: Tensor, **maid_args: Any) -> None:
        super().__init__(
            lambda x, theta, batch: denoising_loss(x, theta, batch[0], regularizer),
            lambda x, batch: reconstruction_loss(x, batch[1]),
            x0=lambda batch: batch[0],
            theta0=theta0,
            mu=1.0,  # the data term's
            smoothness=lambda theta: 1 + regularizer.smoothness(theta),
            upper_smoothness=1.0,
            convex_upper=True,
            solver=lbfgs,
            **maid_args,
        )


def run(title: str, module: Denoiser, steps: int) -> None:
    """Learns, and prints how close the test images come to the clean ones."""
    options: dict[str, Any] = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    )
    trainer = Trainer(max_epochs=steps, accelerator="cpu", num_sanity_val_steps=0, limit_val_batches=0, **options)
    trainer.fit(module, data)
    ratio = PeakSignalNoiseRatio(data_range=1.0, reduction="none", dim=(1, 2))
    for image, (_, clean) in zip(trainer.predict(module, data) or [], data.test_dataloader(), strict=True):
        ratio.update(image, clean)
    work = 0 if module.state is None else module.state.work
    print(f"{title}: {ratio.compute().mean():.2f} dB after {work} iterations", flush=True)


variation, experts = TotalVariation(), FieldOfExperts(8, 3)
start = torch.full((2,), -5.0, dtype=torch.float64)
run("as it begins", Denoiser(variation, start), 0)
run("total variation", Denoiser(variation, start), 2 if quick else 8)
accelerated: dict[str, Any] = {"bb_init": True, "nonmonotone": True, "alpha0": 1.0}
run("field of experts", Denoiser(experts, experts.start(dtype=start.dtype), **accelerated), 2 if quick else 25)
