"""How much of the saved arithmetic becomes saved time at inference?

Throughput of timm's ViT-S and ViT-B (random weights: speed does not depend on them) with the published schedules,
against the same dense model with fused attention and against constant merging at equal multiply-accumulates: the
nearest feature (`constant`) and ToMe's bipartite matching (`ToMe`). One batch each in turn; `realised` is the median of
dense time over compressed time within a round, `ideal` the ratio of multiply-accumulates. float32 on the CPU, bfloat16
on a GPU.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import timm
import torch
from common import alternate, conclude, device, parse, rounded, show
from torch import nn

from lightning_hpo import PUBLISHED_SCHEDULES, TokenCompressionSchedule, apply_token_compression
from lightning_hpo.functional.compression.schedule import constant_at_macs

MODELS = {
    "ViT-S": ("vit_small_patch16_224", "vit_small_deit", ("2.9",)),
    "ViT-B": ("vit_base_patch16_224", "vit_base_deit", ("11.5",)),
    "ViT-Ti": ("vit_tiny_patch16_224", "vit_tiny_deit", ("0.8",)),
}


def variants(model: nn.Module, key: str, target: str) -> dict[str, tuple[nn.Module, TokenCompressionSchedule | None]]:
    published = PUBLISHED_SCHEDULES[key][target]
    constant = constant_at_macs(PUBLISHED_SCHEDULES.cost(key), float(published.macs or 0))
    return {
        "dense": (model, None),
        "learned": (apply_token_compression(copy.deepcopy(model), published), published),
        "constant": (apply_token_compression(copy.deepcopy(model), constant), constant),
        "ToMe": (apply_token_compression(copy.deepcopy(model), constant, matching="bipartite"), constant),
    }


def run(name: str, target: str, batch: int, rounds: int) -> list[dict[str, Any]]:
    timm_name, key, _ = MODELS[name]
    where = device()
    precision = torch.bfloat16 if where.type == "cuda" else torch.float32
    model = timm.create_model(timm_name).eval().to(where, precision)
    images = torch.randn(batch, 3, 224, 224, device=where, dtype=precision)
    forms = variants(model, key, target)

    def call(network: nn.Module) -> Callable[[], Any]:
        return lambda: network(images)

    with torch.inference_mode():
        times = alternate({form: call(network) for form, (network, _) in forms.items()}, rounds)
    rows: list[dict[str, Any]] = []
    for form, (_, schedule) in forms.items():
        macs = PUBLISHED_SCHEDULES.cost(key).full if schedule is None else schedule.macs or 0
        ideal, realised = PUBLISHED_SCHEDULES.cost(key).full / macs, 1 / times[form].ratio
        row = {"model": name, "form": form, "batch": batch, "precision": str(precision).rpartition(".")[2]}
        speed = {"images_per_s": round(batch / times[form].median, 2), "realised": round(realised, 3)}
        rows.append(
            row
            | {"gmacs": round(macs / 1e9, 3), **speed, "ideal": round(ideal, 3)}
            | {"share": round(realised / ideal, 3), "seconds": rounded(times[form])}
        )
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    names = ("--models", {"nargs": "+", "choices": list(MODELS), "default": None, "help": "ViT-S and ViT-B by default"})
    batch = ("--batch", {"type": int, "default": None, "help": "64 by default"})
    rounds = ("--rounds", {"type": int, "default": None, "help": "5 by default, 20 on a GPU"})
    chosen = parse(__doc__, arguments, names, batch, rounds)
    torch.manual_seed(0)
    default = (2, 1, ["ViT-Ti"]) if chosen.quick else (64, 20 if device().type == "cuda" else 5, ["ViT-S", "ViT-B"])
    settings = (chosen.batch or default[0], chosen.rounds or default[1])
    rows: list[dict[str, Any]] = []
    for name in chosen.models or default[2]:
        for target in MODELS[name][2]:
            rows += run(name, target, *settings)
    columns = {"model": "", "form": "", "gmacs": ".3f", "images_per_s": ".1f", "realised": ".3f", "ideal": ".3f"}
    show(f"Inference, batch {settings[0]}; share = realised / ideal speed-up", rows, {**columns, "share": ".3f"})
    conclude(__file__, chosen, rows)


if __name__ == "__main__":
    main()
