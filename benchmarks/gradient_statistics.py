"""What do statistics of single samples' gradients cost on top of a plain training step?

The plain step is zero_grad, forward, backward and SGD with momentum. `micro_batch` also takes the norm of every
parameter's gradient by tensor hooks; `ghost` the norms of all samples' gradients by layer rules while the backward pass
runs, and `ghost, 32` those of 32 samples. `vmap` is the estimator of that name: layer rules, and a further pass that
differentiates sample by sample what has none. `vmap alone` differentiates everything sample by sample, rules or not.
`MLP-gated` and `CNN-gated` have a layer of the user's own, and most of the weights in `Transformer` belong to
`nn.MultiheadAttention`; there `ghost` leaves out what has no rule, while both forms of `vmap` look at everything.
Memory is what is allocated at the peak of a step beyond what was there before it.

What `micro_batch` costs is too little for so few rounds: see micro_batch_cost.py.
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
from lightning_hpo.single_samples import SingleSamples
from lightning_hpo.stateless import PerSampleGradients, loss_of, per_sample_statistics

SUBSET = 32
SLOWER = {"ViT": 3, "Transformer": 3}  # fewer rounds where a step takes seconds
CHUNK = {"MLP": 8, "MLP-gated": 8, "ViT": 16, "Transformer": 16}  # samples that `vmap alone` differentiates at a time


class Classifier(nn.Module):
    """A network with its loss, as `loss_of` wants it."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Mean cross-entropy."""
        images, labels = batch
        return F.cross_entropy(self.network(images), labels)


class Gate(nn.Module):
    """A learned activation, a product with a sigmoid that has a slope for each channel: no rule knows it."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.ones(shape))

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return x * torch.sigmoid(self.slope * x)


def mlp(gated: bool = False) -> nn.Module:
    """784-512-512-10."""
    activations = [Gate(512) if gated else nn.ReLU() for _ in range(2)]
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 512), activations[0], nn.Linear(512, 512), activations[1], nn.Linear(512, 10)
    )


def cnn(padding: int = 0, gated: bool = False) -> nn.Module:
    """Convolutions of 32, 64 and 64 channels on 28x28 with pooling between them, as in beginners' tutorials."""
    layers: list[nn.Module] = []
    for before, after in ((1, 32), (32, 64)):
        activation = Gate(after, 1, 1) if gated else nn.ReLU()
        layers += [nn.Conv2d(before, after, 3, padding=padding), activation, nn.MaxPool2d(2)]
    layers += [nn.Conv2d(64, 64, 3, padding=padding), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*layers, nn.LazyLinear(64), nn.ReLU(), nn.Linear(64, 10))


def vit() -> nn.Module:
    """Width 192, depth 6, 65 tokens."""
    return VisionTransformer(img_size=32, patch_size=4, num_classes=10, embed_dim=192, depth=6, num_heads=3)


class Transformer(nn.Module):
    """Torch's own encoder: width 128, depth 3, over the 28 rows of an image."""

    def __init__(self) -> None:
        super().__init__()
        block = nn.TransformerEncoderLayer(128, 4, 512, dropout=0.0, batch_first=True, norm_first=True)
        self.embed, self.head = nn.Linear(28, 128), nn.Linear(128, 10)
        self.blocks = nn.TransformerEncoder(block, 3, enable_nested_tensor=False)

    def forward(self, images: Tensor) -> Tensor:  # noqa: D102
        return self.head(self.blocks(self.embed(images.squeeze(1))).mean(1))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "MLP": (mlp, (1, 28, 28)),
    "CNN": (cnn, (1, 28, 28)),
    "CNN-padded": (partial(cnn, padding=1), (1, 28, 28)),
    "ViT": (vit, (3, 32, 32)),
    "MLP-gated": (partial(mlp, gated=True), (1, 28, 28)),
    "CNN-gated": (partial(cnn, gated=True), (1, 28, 28)),
    "Transformer": (Transformer, (1, 28, 28)),
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
        norms.clear()
        step()
        norms.close(len(batch[0]))
        return norms.weighted_squares()

    return observed


def ghost(model: Classifier, batch: tuple[Tensor, Tensor], max_samples: int | None = None) -> Callable[[], Any]:
    step, samples = plain(model, batch), PerSampleGradients(model, max_samples).attach()

    def observed() -> Tensor:
        step()
        return samples.take()

    return observed


def vmap(model: Classifier, batch: tuple[Tensor, Tensor], max_samples: int | None = None) -> Callable[[], Any]:
    step, samples = plain(model, batch), SingleSamples(model, dict(model.named_parameters()), max_samples)

    def observed() -> Any:
        samples.enabled = True
        step()
        return samples.take(batch, len(batch[0]))

    return observed


def vmap_alone(
    model: Classifier, batch: tuple[Tensor, Tensor], chunk_size: int, max_samples: int | None = None
) -> Callable[[], Any]:
    step, loss, parameters = plain(model, batch), loss_of(model), dict(model.named_parameters())

    def observed() -> Any:
        step()
        return per_sample_statistics(loss, parameters, batch, chunk_size, max_samples=max_samples, sums=False)

    return observed


def setting(name: str, size: int) -> tuple[Classifier, tuple[Tensor, Tensor]]:
    make, shape = MODELS[name]
    model = Classifier(make()).to(device())
    model.network(torch.randn(1, *shape, device=device()))  # lazy layers take their shapes
    return model, (torch.randn(size, *shape, device=device()), torch.randint(0, 10, (size,), device=device()))


def run(name: str, size: int, rounds: int) -> list[dict[str, Any]]:
    model, batch = setting(name, size)
    chunk = CHUNK.get(name, 64)
    steps = {
        "plain": plain(copy.deepcopy(model), batch),
        "micro_batch": micro_batch(copy.deepcopy(model), batch),
        "ghost": ghost(copy.deepcopy(model), batch),
        f"ghost, {SUBSET}": ghost(copy.deepcopy(model), batch, SUBSET),
        "vmap": vmap(copy.deepcopy(model), batch),
        f"vmap, {SUBSET}": vmap(copy.deepcopy(model), batch, SUBSET),
        "vmap alone": vmap_alone(copy.deepcopy(model), batch, chunk),
        f"vmap alone, {SUBSET}": vmap_alone(copy.deepcopy(model), batch, chunk, SUBSET),
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
    rounds = ("--rounds", {"type": int, "default": 15, "help": "a third of it for the ViT and the transformer"})
    models = ("--models", {"nargs": "+", "default": list(MODELS), "choices": list(MODELS)})
    chosen = parse(__doc__, arguments, batch, rounds, models)
    torch.manual_seed(0)
    rows: list[dict[str, Any]] = []
    for name in chosen.models[:1] if chosen.quick else chosen.models:
        for size in [8] if chosen.quick else chosen.batch:
            slower = SLOWER.get(name, 1)
            rows += run(name, size, 2 if chosen.quick else max(3, chosen.rounds // slower))
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
