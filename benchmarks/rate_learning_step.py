"""What does a step of rate learning cost over a plain step of the same frozen network?

The plain step is a forward and a backward pass of the same timm model in train mode, with its fused attention and every
weight frozen, in which the gradient flows back through all blocks to the output of block 0, the block that never
compresses: a zero that requires a gradient is added there. `plain, short` adds it after block 1 instead, which is as
far back as the rates need it: those of block 1 are first felt in the attention of block 2. The rate-learning step is
the forward and backward pass under the masks of `TokenCompression`, budget gradient and optimizer step of the rates
included. `explicit` is the same with the attention map of the formula (`masked_softmax`) in place of fused attention.
Memory is what is allocated at the peak of a step beyond what was there before it.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import timm
import torch
from common import alternate, conclude, device, parse, peak_memory, rounded, show
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_hpo.functional.compression.diffrate import candidate_counts, kept_tokens
from lightning_hpo.functional.compression.masked_attention import masked_softmax
from lightning_hpo.nn import timm_attention
from lightning_hpo.nn.diffrate import attach
from lightning_hpo.nn.timm_models import describe

SMALL = {"img_size": 28, "patch_size": 4, "in_chans": 1, "embed_dim": 64, "depth": 6, "num_heads": 4, "num_classes": 10}
MODELS: dict[str, tuple[str, dict[str, Any], int]] = {
    "ViT-S/16, 224": ("vit_small_patch16_224", {}, 16),
    "ViT 64x6, 28": ("vit_tiny_patch16_224", SMALL, 64),
}
TARGET = 0.6


def plain_step(model: Any, images: Tensor, labels: Tensor, after: int) -> Callable[[], Any]:
    zero = torch.zeros(1, device=images.device, requires_grad=True)

    model.blocks[after].register_forward_hook(lambda *passed: passed[-1] + zero)

    def step() -> None:
        F.cross_entropy(model(images), labels).backward()

    return step


def rate_step(model: nn.Module, images: Tensor, labels: Tensor) -> Callable[[], Any]:
    anatomy = describe(model)
    layout = anatomy.layout
    candidates = candidate_counts(layout.patches, device=images.device)
    logits = torch.zeros(layout.kinds, len(layout.blocks), len(candidates), device=images.device, requires_grad=True)
    attach(anatomy, probabilities=lambda: logits.softmax(-1)).learning = True
    optimizer = torch.optim.AdamW([logits], lr=0.01, weight_decay=0.0)
    full = float(layout.cost.full)

    def step() -> None:
        F.cross_entropy(model(images), labels).backward()
        kept = kept_tokens(logits.softmax(-1), candidates, prefix=0)
        kept.backward(layout.budget_slope(kept, TARGET * full, 100.0, full)[2])
        optimizer.step()
        optimizer.zero_grad()

    return step


def explicit_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, bias: Tensor, scale: float | None = None
) -> Tensor:
    logits = query * (scale or query.shape[-1] ** -0.5) @ key.transpose(-2, -1) + bias[:, None, None, :]
    return masked_softmax(logits.float(), mask).to(value.dtype) @ value


def explicit_step(model: nn.Module, images: Tensor, labels: Tensor) -> Callable[[], Any]:
    step = rate_step(model, images, labels)

    def patched() -> None:
        with mock.patch.object(timm_attention, "masked_attention", explicit_attention):
            step()

    return patched


def run(name: str, batch: int, rounds: int) -> list[dict[str, Any]]:
    timm_name, options, _ = MODELS[name]
    model = timm.create_model(timm_name, **options).train().to(device()).requires_grad_(False)
    size, channels = options.get("img_size", 224), options.get("in_chans", 3)
    images = torch.randn(batch, channels, size, size, device=device())
    labels = torch.randint(0, 10, (batch,), device=device())
    steps = {
        "plain": plain_step(copy.deepcopy(model), images, labels, after=0),
        "plain, short": plain_step(copy.deepcopy(model), images, labels, after=1),
        "rate learning": rate_step(copy.deepcopy(model), images, labels),
        "explicit": explicit_step(copy.deepcopy(model), images, labels),
    }
    times = alternate(steps, rounds, warmup=2)
    memory = {form: peak_memory(step) for form, step in steps.items()}
    base = memory["plain"]
    return [
        {
            "model": name,
            "batch": batch,
            "step": form,
            "seconds": times[form].median,
            "cost": round(times[form].ratio, 3),
        }
        | {
            "peak_mib": round(memory[form] / 2**20, 1),
            "memory": round(memory[form] / base, 3),
            "timing": rounded(times[form]),
        }
        for form in steps
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    batch = ("--batch", {"type": int, "default": None, "help": "16 for ViT-S, 64 for the small one by default"})
    rounds = ("--rounds", {"type": int, "default": None, "help": "15 by default"})
    chosen = parse(__doc__, arguments, batch, rounds)
    torch.manual_seed(0)
    names = list(MODELS)[1:] if chosen.quick else list(MODELS)
    rows: list[dict[str, Any]] = []
    for name in names:
        rows += run(
            name, chosen.batch or (4 if chosen.quick else MODELS[name][2]), chosen.rounds or (2 if chosen.quick else 15)
        )
    columns = {
        "model": "",
        "batch": "d",
        "step": "",
        "seconds": ".3g",
        "cost": ".2f",
        "peak_mib": ".0f",
        "memory": ".2f",
    }
    show("A step; cost and memory over the plain step", rows, columns)
    conclude(__file__, chosen, rows, plain_step=(__doc__ or "").split("\n\n")[1].replace("\n", " "))


if __name__ == "__main__":
    main()
