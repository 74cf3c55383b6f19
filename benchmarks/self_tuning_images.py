"""Fifteen hyperparameters of a network like AlexNet on part of CIFAR-10, for `self_tuning_search.py`."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from self_tuning_tasks import Range, SearchTask, TunedModule, settings_of
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_hpo.demos.image_data import LabelledImages
from lightning_hpo.demos.image_files import CIFAR10DataModule
from lightning_hpo.nn.self_tuning_augmentation import TunedColorJitter, TunedCutout
from lightning_hpo.nn.self_tuning_regularisers import TunedDropout, TunedInputScale

__all__ = ["image_task"]

TRAIN, VAL, TEST = 3000, 1000, 2000
EPOCHS, TRIALS, RANDOM = 28, 4, 2
WIDTHS = (16, 32, 48, 48, 32)
RANGES = {
    **{f"conv_{i}": Range(0.0, 0.9) for i in range(5)},
    **{f"linear_{i}": Range(0.0, 0.9) for i in range(2)},
    "input": Range(0.0, 0.9),
    "input_scale": Range(0.0, 0.3),
    "hue": Range(0.0, 0.5),
    **{name: Range(0.0, 1.0) for name in ("contrast", "saturation", "brightness")},
    "cutout_length": Range(0, 24, init=4, kind="whole"),
    "cutout_holes": Range(0, 4, init=1, kind="whole"),
}


class Normalise(nn.Module):
    """Bytes' share of the brightest to mean zero and deviation one, by the training images."""

    def __init__(self, images: Tensor) -> None:
        super().__init__()
        pixels = images.float() / 255
        self.register_buffer("mean", pixels.mean((0, 2, 3), keepdim=True))
        self.register_buffer("std", pixels.std((0, 2, 3), keepdim=True))

    mean: Tensor
    std: Tensor

    def forward(self, images: Tensor) -> Tensor:
        """The same shape."""
        return (images - self.mean) / self.std


class AlexNetLike(TunedModule):
    """Five convolutions, the first with a stride, the second and the last with pooling, and three linear layers."""

    def __init__(self, normalise: Normalise, classes: int, fixed: Mapping[str, float] | None) -> None:
        super().__init__()
        self.lr = 0.01
        hypers, at = settings_of(RANGES, fixed)
        if hypers is not None:
            self.hypers = hypers
        jitter = TunedColorJitter(at["brightness"], at["contrast"], at["saturation"], at["hue"])
        cutout = TunedCutout(at["cutout_length"], at["cutout_holes"])
        # A cut-out square has the mean colour: it is cut where that is 0.
        self.augment = nn.Sequential(
            jitter, normalise, cutout, TunedInputScale(at["input_scale"]), TunedDropout(at["input"])
        )
        layers: list[nn.Module] = []
        for i, (before, after) in enumerate(zip((3, *WIDTHS), WIDTHS, strict=False)):
            layers += [nn.Conv2d(before, after, 5, 2, 2) if i == 0 else nn.Conv2d(before, after, 3, 1, 1), nn.ReLU()]
            layers += [nn.MaxPool2d(2)] if i in (1, 4) else []
            layers += [TunedDropout(at[f"conv_{i}"])]
        layers += [nn.Flatten(), nn.Linear(WIDTHS[-1] * 16, 128), nn.ReLU(), TunedDropout(at["linear_0"])]
        layers += [nn.Linear(128, 64), nn.ReLU(), TunedDropout(at["linear_1"]), nn.Linear(64, classes)]
        self.net = nn.Sequential(*layers)
        for layer in self.net:
            if isinstance(layer, (nn.Conv2d, nn.Linear)) and layer is not self.net[-1]:
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")

    def predict(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Logits and labels."""
        return self.net(self.augment(batch[0].float() / 255)), batch[1]


def image_task(quick: bool) -> SearchTask:
    """The task; noise in the place of photographs where it is to be quick."""
    if quick:
        images, labels = torch.randint(0, 256, (96, 3, 32, 32), dtype=torch.uint8), torch.arange(96) % 10
        parts = [TensorDataset(images, labels)] * 3
    else:
        # Its training images are decoded as many as are used, in the same number of every class.
        train, test = CIFAR10DataModule(limit=TRAIN + VAL).read()
        mixed, kept = _mixed(train), _mixed(test)
        parts = [TensorDataset(*(t[part] for t in mixed)) for part in (slice(TRAIN), slice(TRAIN, TRAIN + VAL))]
        parts.append(TensorDataset(*(t[:TEST] for t in kept)))
    normalise = Normalise(parts[0].tensors[0])
    build = partial(AlexNetLike, normalise, 10)
    common: dict[str, Any] = {"warmup_steps": 2 if quick else 190, "train_steps": 2}
    delta = {"scale": 0.5, "entropy_weight": 1e-4, "lr": 0.02}
    tuning: dict[str, dict[str, Any]] = {"STN": common, "Δ-STN": common | delta}
    return SearchTask("CIFAR-10", "images", RANGES, parts, build, EPOCHS, TRIALS, RANDOM, 32, tuning)


def _mixed(images: LabelledImages) -> tuple[Tensor, Tensor]:
    """In an order that is the same whatever the seed of a run."""
    order = torch.randperm(len(images.labels), generator=torch.Generator().manual_seed(0))
    return images.images[order], images.labels[order]
