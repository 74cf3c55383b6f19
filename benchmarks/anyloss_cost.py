"""What does a metric cost as a loss, and what does it save?

1. Forward and backward on a million logits, beside torch's cross-entropies.
2. One run on F1, as long as each of a search over nine class weights of the cross-entropy, of which validation chooses
   the best, and one of four fifths of that.
"""

import logging
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from anyloss import SETS, digits, held_out, scores
from anyloss_members import Members, fit_members
from common import alternate, conclude, parse, peak_memory, rounded, show
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_hpo import AnyLoss, MetricObjective
from lightning_hpo.demos import ImbalancedDataModule

WEIGHTS = (0.25, 0.5, 1.0, 2.0, 3.0, 5.0, 8.0, 12.0, 20.0)
TABLES = ("digits, 8", "digits, 8, 5 %", "coarse digits, 8", "coarse digits, 3", "diabetes")
LENGTHS = (1.0, 0.8)  # of the one run, in those of the search


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


def _timed(parts: Sequence[ImbalancedDataModule], quick: bool, **how: Any) -> tuple[Members, float]:
    """Trained members, and seconds of the fit."""
    callbacks = [MetricObjective("f1", "multilabel")] if how.pop("ours", False) else []
    start = time.process_time()
    trained = fit_members(parts, quick, *callbacks, **how)
    return trained, time.process_time() - start


def _f1(trained: Members, parts: Sequence[ImbalancedDataModule]) -> list[tuple[float, float]]:
    """On the validation and the test quarter, member by member."""
    features, labels = (torch.stack([held_out(data)[k] for data in parts], 1) for k in (0, 1))
    cut = len(parts[0].val_set)
    with torch.no_grad():
        logits = trained(features)
    found = [[scores(z[p], y[p], ["f1"])["f1"] for p in (slice(cut), slice(cut, None))]
             for z, y in zip(logits.unbind(1), labels.unbind(1), strict=True)]  # fmt: skip
    return [(val, test) for val, test in found]


def search_rows(quick: bool, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """F1 on the test quarter, over seeds, each with the weight that its validation prefers; seconds of one seed.

    Of the nine runs the seconds are a sum; of the one, whole and shorter, they are the mean of nine, each timed after
    one of the search.
    """
    rows = []
    for name in TABLES[: 1 if quick else None]:
        parts = [ImbalancedDataModule(**SETS[name], seed=seed) for seed in seeds]
        searched, seconds = [], 0.0
        timed: dict[float, list[float]] = {length: [] for length in LENGTHS}
        for weight in WEIGHTS[:: 4 if quick else 1]:
            loss = nn.BCEWithLogitsLoss(pos_weight=torch.tensor(weight))
            searched.append(_f1(_timed(parts, quick, criterion=loss)[0], parts))
            seconds += _timed(parts[:1], quick, criterion=loss)[1]
            for length, spent in timed.items():
                spent.append(_timed(parts[:1], quick, ours=True, length=length)[1])
        chosen = [max(of_seed)[1] for of_seed in zip(*searched, strict=True)]
        row = {"set": name, "search_F1": statistics.mean(chosen), "search_s": seconds}
        for length, spent in timed.items():
            ours = [test for _, test in _f1(_timed(parts, quick, ours=True, length=length)[0], parts)]
            own, what = statistics.mean(spent), "MetricObjective" if length == 1 else f"{length:.0%} of its steps"
            row |= {f"{what}, F1": statistics.mean(ours), f"{what}, s": own, f"{what}, time ratio": own / seconds}
        rows.append(digits(row))
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
