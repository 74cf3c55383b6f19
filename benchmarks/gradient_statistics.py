"""What do statistics of single samples' gradients cost on top of a plain training step?

The plain step is zero_grad, forward, backward and SGD with momentum. `micro_batch` also takes the norm of every
parameter's gradient by tensor hooks; `ghost` the norms of all samples' gradients by layer rules while the backward pass
runs, and `ghost, 32` those of 32 samples. `vmap` adds a pass in which `per_sample_statistics` differentiates the loss
sample by sample, and `vmap, 32` for 32 samples. Memory is what is allocated at the peak of a step beyond what was there
before it.
"""

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from common import alternate, conclude, device, parse, peak_memory, rounded, show
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_hpo.gradients import GroupNorms
from lightning_hpo.stateless import PerSampleGradients, loss_of, per_sample_statistics

SUBSET = 32
SLOWER = {"MLP": 1, "CNN": 1, "CNN-padded": 1, "ViT": 3}  # fewer rounds where a step takes seconds
CHUNK = {"MLP": 8, "CNN": 64, "CNN-padded": 64, "ViT": 16}  # samples that vmap differentiates at a time


class Classifier(nn.Module):
    """A network with its loss, as `loss_of` wants it."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Mean cross-entropy."""
        images, labels = batch
        return F.cross_entropy(self.network(images), labels)


def mlp() -> nn.Module:
    """784-512-512-10."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)
    )


def cnn(padding: int = 0) -> nn.Module:
    """Convolutions of 32, 64 and 64 channels on 28x28 with pooling between them, as in beginners' tutorials."""
    layers: list[nn.Module] = []
    for before, after in ((1, 32), (32, 64)):
        layers += [nn.Conv2d(before, after, 3, padding=padding), nn.ReLU(), nn.MaxPool2d(2)]
    layers += [nn.Conv2d(64, 64, 3, padding=padding), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*layers, nn.LazyLinear(64), nn.ReLU(), nn.Linear(64, 10))


def vit() -> nn.Module:
    """Width 192, depth 6, 65 tokens."""
    return VisionTransformer(img_size=32, patch_size=4, num_classes=10, embed_dim=192, depth=6, num_heads=3)


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "MLP": (mlp, (1, 28, 28)),
    "CNN": (cnn, (1, 28, 28)),
    "CNN-padded": (partial(cnn, padding=1), (1, 28, 28)),
    "ViT": (vit, (3, 32, 32)),
}


def plain(model: Classifier, batch: tuple[Tensor, Tensor]) -> Callable[[], Any]:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        model.training_step(batch).backward()
        optimizer.step()

    return step


def micro_batch(model: Classifier, batch: tuple[Tensor, Tensor]) -> Callable[[], Any]:
    step, norms = plain(model, batch), GroupNorms(model.parameters())

    def observed() -> Tensor:
        step()
        return norms.take()

    return observed


def ghost(model: Classifier, batch: tuple[Tensor, Tensor], max_samples: int | None = None) -> Callable[[], Any]:
    step, samples = plain(model, batch), PerSampleGradients(model, max_samples).attach()

    def observed() -> Tensor:
        step()
        return samples.take()

    return observed


def vmap(
    model: Classifier, batch: tuple[Tensor, Tensor], chunk_size: int, max_samples: int | None = None
) -> Callable[[], Any]:
    step, loss, parameters = plain(model, batch), loss_of(model), dict(model.named_parameters())

    def observed() -> Any:
        step()
        return per_sample_statistics(loss, parameters, batch, chunk_size, max_samples=max_samples)

    return observed


def run(name: str, size: int, rounds: int) -> list[dict[str, Any]]:
    make, shape = MODELS[name]
    model = Classifier(make()).to(device())
    model.network(torch.randn(1, *shape, device=device()))  # lazy layers take their shapes
    batch = torch.randn(size, *shape, device=device()), torch.randint(0, 10, (size,), device=device())
    chunk = CHUNK[name]
    steps = {
        "plain": plain(copy.deepcopy(model), batch),
        "micro_batch": micro_batch(copy.deepcopy(model), batch),
        "ghost": ghost(copy.deepcopy(model), batch),
        f"ghost, {SUBSET}": ghost(copy.deepcopy(model), batch, SUBSET),
        "vmap": vmap(copy.deepcopy(model), batch, chunk),
        f"vmap, {SUBSET}": vmap(copy.deepcopy(model), batch, chunk, SUBSET),
    }
    times = alternate(steps, rounds, warmup=2)
    memory = {form: peak_memory(step) for form, step in steps.items()}
    return [
        {
            "model": name,
            "batch": size,
            "step": form,
            "seconds": times[form].median,
            "cost": round(times[form].ratio, 3),
            "peak_mib": round(memory[form] / 2**20, 1),
            "memory": round(memory[form] / memory["plain"], 3),
            "timing": rounded(times[form]),
        }
        for form in steps
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    batch = ("--batch", {"type": int, "nargs": "+", "default": [64, 256]})
    rounds = ("--rounds", {"type": int, "default": 15, "help": "a third of it for the ViT"})
    models = ("--models", {"nargs": "+", "default": list(MODELS), "choices": list(MODELS)})
    chosen = parse(__doc__, arguments, batch, rounds, models)
    torch.manual_seed(0)
    rows: list[dict[str, Any]] = []
    for name in chosen.models[:1] if chosen.quick else chosen.models:
        for size in [8] if chosen.quick else chosen.batch:
            rows += run(name, size, 2 if chosen.quick else max(3, chosen.rounds // SLOWER[name]))
    columns = {
        "model": "",
        "batch": "d",
        "step": "",
        "seconds": ".3g",
        "cost": ".3f",
        "peak_mib": ".0f",
        "memory": ".2f",
    }
    show("A step; cost and memory over the plain step", rows, columns)
    conclude(__file__, chosen, rows, plain_step=(__doc__ or "").split("\n\n")[1].replace("\n", " "))


if __name__ == "__main__":
    main()
