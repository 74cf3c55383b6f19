"""What does a metric cost as a loss, and what does it save?

1. Forward and backward on a million logits, beside torch's cross-entropies.
2. One run on F1 beside a search over nine class weights of the cross-entropy, the best of which validation chooses.
"""

import logging
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from anyloss import SETS, digits, held_out, scores
from common import alternate, conclude, parse, peak_memory, rounded, show
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_hpo import AnyLoss, MetricObjective
from lightning_hpo.demos import ImbalancedDataModule, TabularClassifier

WEIGHTS = (0.25, 0.5, 1.0, 2.0, 3.0, 5.0, 8.0, 12.0, 20.0)
TABLES = ("digits, 8", "digits, 8, 5 %", "coarse digits, 8", "coarse digits, 3", "diabetes")


def _call(loss: Callable[[Tensor, Tensor], Tensor], logits: Tensor, target: Tensor) -> Callable[[], None]:
    def run() -> None:
        leaf = logits.detach().requires_grad_()
        loss(leaf, target).backward()

    return run


def speed_rows(quick: bool) -> list[dict[str, Any]]:
    """Milliseconds and memory of one forward and backward pass."""
    n = 10_000 if quick else 1_000_000
    generator = torch.Generator().manual_seed(0)
    z = 2 * torch.randn(n, generator=generator)
    y = (torch.rand(n, generator=generator) < 0.1).float()
    classes = torch.randint(10, (n // 10,), generator=generator)
    groups: dict[str, dict[str, Callable[[], None]]] = {
        "binary": {"cross-entropy": _call(F.binary_cross_entropy_with_logits, z, y)},
        "10 classes": {"cross-entropy": _call(F.cross_entropy, z.view(-1, 10), classes)},
    }
    for metric in ("f1", "gmean", "mcc"):
        groups["binary"][metric] = _call(AnyLoss(metric), z, y)
    groups["binary"]["f1, sol-cosine"] = _call(AnyLoss("f1", surrogate="sol-cosine"), z, y)
    groups["10 classes"]["f1"] = _call(AnyLoss("f1", "multiclass"), z.view(-1, 10), classes)
    groups["10 classes"]["mcc"] = _call(AnyLoss("mcc", "multiclass"), z.view(-1, 10), classes)
    rows = []
    for task, losses in groups.items():
        timings = alternate(losses, 3 if quick else 60, warmup=1 if quick else 5)
        base = peak_memory(losses["cross-entropy"])
        for name, timing in timings.items():
            figures = rounded(timing)
            row = {"task": task, "loss": name, "ms": round(1e3 * figures["median"], 2), "time_ratio": figures["ratio"]}
            rows.append(row | {"memory_ratio": round(peak_memory(losses[name]) / base, 2)})
    return rows


def _run(data: ImbalancedDataModule, quick: bool, criterion: nn.Module | None, *callbacks: Any) -> tuple[Tensor, float]:
    """Logits of validation and test, and seconds of the fit."""
    torch.manual_seed(0)
    features, labels = data.train_set.tensors
    module = TabularClassifier(features.shape[1], criterion=criterion)
    epochs = 2 if quick else max(20, -(-500 // -(-len(labels) // data.batch_size)))
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
    )
    start = time.process_time()
    trainer.fit(module, data)
    seconds = time.process_time() - start
    with torch.no_grad():
        return module(held_out(data)[0]), seconds


def search_rows(quick: bool, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """F1 on the test quarter, and seconds."""
    rows = []
    for name in TABLES[: 1 if quick else None]:
        found: list[dict[str, float]] = []
        for seed in seeds:
            data = ImbalancedDataModule(**SETS[name], seed=seed)
            labels, cut = held_out(data)[1], len(data.val_set)
            searched, seconds = [], 0.0
            for weight in WEIGHTS[:: 4 if quick else 1]:
                logits, spent = _run(data, quick, nn.BCEWithLogitsLoss(pos_weight=torch.tensor(weight)))
                val, test = (scores(logits[p], labels[p], ["f1"])["f1"] for p in (slice(cut), slice(cut, None)))
                searched.append((val, test))
                seconds += spent
            logits, own = _run(data, quick, None, MetricObjective("f1"))
            ours = scores(logits[cut:], labels[cut:], ["f1"])["f1"]
            found.append({"search": max(searched)[1], "ours": ours, "time": own / seconds, "seconds": seconds})
        mean = {key: sum(row[key] for row in found) / len(found) for key in found[0]}
        row = {"set": name, "search_F1": mean["search"], "MetricObjective_F1": mean["ours"]}
        rows.append(digits(row | {"search_s": mean["seconds"], "time_ratio": mean["time"]}))
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and prints."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    chosen = parse(__doc__, arguments)
    rows = speed_rows(chosen.quick)
    show("a million logits", rows, dict.fromkeys(rows[0], ""))
    search = search_rows(chosen.quick, range(1 if chosen.quick else 5))
    show("a search", search, dict.fromkeys(search[0], ""))
    conclude(__file__, chosen, rows, search=search)


if __name__ == "__main__":
    main()
