"""Is a classifier better at a metric when it is trained on it?

1. Fifteen real tables with a rare class, ten folds for each of five seeds (in one fit): one hidden layer of 64 units
   trained on the cross-entropy, and with `MetricObjective` at its defaults on each of five metrics; both for at least
   20 epochs and 500 steps. Judged are the decisions on all ten folds together. What chance does shows the cross-entropy
   once more, from other first weights.
2. The paper's kind of experiment: a linear model, all data in each step, trained on six metrics of a synthetic set.
3. Tables of several classes, half of which keep a tenth of their samples.
4. What becomes of the probabilities, and of what a temperature repairs.
"""

import logging
import statistics
import warnings
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from anyloss_folds import FOLDS, cross_validated, folds_of
from anyloss_members import FEWEST, fit_members
from anyloss_plots import draw_histograms, draw_soft_and_hard
from anyloss_synthetic import synthetic_rows
from common import conclude, parse, show, write
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from lightning_hpo import MetricObjective, SoftConfusionMatrix
from lightning_hpo.demos import ImbalancedDataModule, TabularClassifier
from lightning_hpo.functional.objectives.temperature import cross_entropy, fit_temperature

METRICS = ("accuracy", "f1", "balanced_accuracy", "gmean", "mcc")
SETS: dict[str, dict[str, Any]] = {
    "breast cancer": {"name": "breast_cancer"},
    "digits, 8": {"name": "digits", "positive": 8},
    "breast cancer, 10 %": {"name": "breast_cancer", "share": 0.1},
    "digits, 8, 5 %": {"name": "digits", "positive": 8, "share": 0.05},
    "digits, 3, 5 %": {"name": "digits", "positive": 3, "share": 0.05},
    "digits, 9": {"name": "digits", "positive": 9},
    "coarse digits, 8": {"name": "digits", "positive": 8, "coarse": True},
    "coarse digits, 3": {"name": "digits", "positive": 3, "coarse": True},
    "coarse digits, 1": {"name": "digits", "positive": 1, "coarse": True},
    "coarse digits, 9, 5 %": {"name": "digits", "positive": 9, "share": 0.05, "coarse": True},
    "diabetes": {"name": "diabetes"},
    "diabetes, 10 %": {"name": "diabetes", "share": 0.1},
    "wine, 1, 20 %": {"name": "wine", "share": 0.2},
    "iris, 1": {"name": "iris"},
    "iris, 1, 20 %": {"name": "iris", "share": 0.2},
}
SEVERAL: dict[str, dict[str, Any]] = {
    "digits": {"name": "digits", "positive": None},
    "coarse digits": {"name": "digits", "positive": None, "coarse": True},
    "wine": {"name": "wine", "positive": None},
}


def thinned(data: ImbalancedDataModule, keep: float = 0.1) -> ImbalancedDataModule:
    """Leaves every second class a tenth of its training samples."""
    features, labels = data.train_set.tensors
    kept = torch.cat([rows if c % 2 == 0 else rows[: max(2, round(keep * len(rows)))] for c, rows in _rows(labels)])
    data.train_set.tensors = (features[kept], labels[kept])
    return data


def _rows(labels: Tensor) -> list[tuple[int, Tensor]]:
    return [(int(c), (labels == c).nonzero().flatten()) for c in labels.unique()]


def fit(data: ImbalancedDataModule, seed: int, quick: bool, *callbacks: Callback, validate: bool = False) -> Tensor:
    """Logits of the half that is not trained on."""
    torch.manual_seed(seed)
    features, labels = data.train_set.tensors
    classes = 1 if labels.is_floating_point() else int(labels.max()) + 1
    module = TabularClassifier(features.shape[1], classes)
    epochs = 2 if quick else max(20, -(-FEWEST // -(-len(labels) // data.batch_size)))
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=1.0 if validate else 0,
    )
    trainer.fit(module, data)
    with torch.no_grad():
        return module(held_out(data)[0])


def held_out(data: ImbalancedDataModule) -> tuple[Tensor, Tensor]:
    """The validation and the test quarter: nothing is chosen on either."""
    parts = zip(data.val_set.tensors, data.test_set.tensors, strict=True)
    features, labels = (torch.cat(pair) for pair in parts)
    return features, labels.long()


def scores(logits: Tensor, labels: Tensor, metrics: Sequence[str]) -> dict[str, float]:
    """Metrics of hard decisions."""
    several = logits.ndim == 2
    counts = SoftConfusionMatrix("multiclass" if several else "binary", logits.shape[1] if several else None, hard=True)
    counts.update(logits, labels)
    return {metric: counts.score(metric).item() for metric in metrics}  # type: ignore[arg-type]


def compare(name: str, setting: Mapping[str, Any], seeds: Sequence[int], quick: bool) -> dict[str, Any]:
    """Both trainings on a table, for every metric; all folds of all seeds in one fit."""
    folds, others = ([fold for seed in seeds for fold in folds_of(setting, seed, again)] for again in (0, 1000))
    plain, again = (cross_validated(fit_members(part, quick), part, METRICS) for part in (folds, others))
    ours = {}
    for metric in METRICS:
        trained = fit_members(folds, quick, MetricObjective(metric, "multilabel"))  # type: ignore[arg-type]
        ours[metric] = cross_validated(trained, folds, [metric])[metric]
    judged = torch.cat([fold.test_set.tensors[1] for fold in folds[:FOLDS]])
    trained_on = sum(int(fold.train_set.tensors[1].sum()) for fold in folds[:FOLDS]) / FOLDS
    found = {"set": name, "positives": round(trained_on), "judged": int(judged.sum())}
    for metric in METRICS:
        found[metric] = f"{statistics.mean(plain[metric]):.3f} → {statistics.mean(ours[metric]):.3f}"
    return found | {"plain": plain, "again": again, "ours": ours}


def summary(found: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row a metric, over all tables."""
    rows = []
    for metric in METRICS:
        gains, chance = (_gains(found, metric, what) for what in ("ours", "again"))
        means, every = [statistics.mean(gain) for gain in gains], list(chain(*gains))
        plain = statistics.mean(statistics.mean(s["plain"][metric]) for s in found)
        rows.append(
            digits(
                {
                    "metric": metric,
                    "cross_entropy": plain,
                    "MetricObjective": plain + statistics.mean(means),
                    "gain": statistics.mean(means),
                    "standard_error": statistics.stdev(every) / len(every) ** 0.5 if len(every) > 1 else None,
                    "tables_at_least_as_good": f"{sum(mean >= -1e-9 for mean in means)} of {len(means)}",
                    "worst_table": min(means),
                    "worst_seed": min(every),
                    "seeds_worse_by_0.05": _worse(every),
                    "cross_entropy_again": _worse(list(chain(*chance))),
                }
            )
        )
    return rows


def _gains(found: Sequence[Mapping[str, Any]], metric: str, what: str) -> list[list[float]]:
    """What each seed of each table has more than with the cross-entropy; ours, or that of other first weights."""
    return [[b - a for a, b in zip(s["plain"][metric], s[what][metric], strict=True)] for s in found]


def _worse(gains: Sequence[float]) -> str:
    return f"{sum(gain < -0.05 for gain in gains)} of {len(gains)}"


def digits(row: Mapping[str, Any]) -> dict[str, Any]:
    """Figures to four places."""
    return {name: round(value, 4) if isinstance(value, float) else value for name, value in row.items()}


def several_rows(seeds: Sequence[int], quick: bool) -> list[dict[str, Any]]:
    """Macro-F1 where half of the classes are rare in training."""
    rows = []
    for name, setting in SEVERAL.items():
        found: dict[str, list[float]] = {"cross_entropy": [], "MetricObjective": [], "running=0.9": []}
        for seed in seeds:
            data = thinned(ImbalancedDataModule(**setting, seed=seed))
            plain, running = (MetricObjective("f1", "multiclass", running=decay) for decay in (None, 0.9))
            for what, callbacks in zip(found, ([], [plain], [running]), strict=True):
                found[what].append(scores(fit(data, seed, quick, *callbacks), held_out(data)[1], ["f1"])["f1"])
        row: dict[str, Any] = {"set": name, **{what: statistics.mean(values) for what, values in found.items()}}
        for what in ("MetricObjective", "running=0.9"):
            gains = [b - a for a, b in zip(found["cross_entropy"], found[what], strict=True)]
            row |= {f"gain, {what}": statistics.mean(gains), f"worst seed, {what}": min(gains)}
        rows.append(digits(row))
    return rows


def calibration_rows(quick: bool) -> list[dict[str, Any]]:
    """Log-loss, calibration error and AUC of both trainings, and with a temperature that validation fits."""
    rows = []
    for name in ("digits, 8", "coarse digits, 8", "diabetes"):
        data = ImbalancedDataModule(**SETS[name])
        cut = len(data.val_set)
        logits: dict[str, Tensor] = {"cross-entropy": fit(data, 0, quick)}
        objective = MetricObjective("f1", calibrate=True)
        logits["F1"] = fit(data, 0, quick, objective, validate=True)
        logits["F1, temperature"] = logits["F1"] / objective.temperature
        plain = logits["cross-entropy"]
        logits["cross-entropy, temperature"] = plain / fit_temperature(plain[:cut], held_out(data)[1][:cut])
        test, labels = slice(cut, None), held_out(data)[1][cut:]
        rows += [{"set": name, "trained on": what, **digits(quality(z[test], labels))} for what, z in logits.items()]
        if name == "coarse digits, 8" and not quick:
            draw_histograms({what: (z[test], labels) for what, z in logits.items()})
    return rows


def quality(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """What probabilities are worth."""
    from torchmetrics.functional.classification import binary_auroc, binary_calibration_error

    p = logits.sigmoid()
    return {
        "F1": scores(logits, labels, ["f1"])["f1"],
        "log_loss": cross_entropy(logits, labels, "binary").item(),
        "calibration_error": binary_calibration_error(p, labels).item(),
        "AUC": binary_auroc(p, labels).item(),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and prints."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    chosen = parse(__doc__, arguments)
    seeds = range(1 if chosen.quick else 5)
    names = ["breast cancer", "iris, 1"] if chosen.quick else list(SETS)
    facts: dict[str, Any] = {"synthetic": synthetic_rows(chosen.quick)}
    show("synthetic", facts["synthetic"], dict.fromkeys(facts["synthetic"][0], ""))
    facts["several"] = several_rows(seeds, chosen.quick)
    show("several classes", facts["several"], dict.fromkeys(facts["several"][0], ""))
    facts["calibration"] = calibration_rows(chosen.quick)
    show("probabilities", facts["calibration"], dict.fromkeys(facts["calibration"][0], ""))
    if not chosen.quick:
        draw_soft_and_hard(ImbalancedDataModule(**SETS["coarse digits, 8"]), fit)
    facts["sets"] = []
    for name in names:
        facts["sets"].append(compare(name, SETS[name], seeds, chosen.quick))
        write(__file__, chosen, summary(facts["sets"]), **facts)  # so that nothing is lost
    rows = summary(facts["sets"])
    show("tables", facts["sets"], dict.fromkeys(("set", "positives", "judged", *METRICS), ""))
    show("metrics", rows, dict.fromkeys(rows[0], ""))
    conclude(__file__, chosen, rows, **facts)


if __name__ == "__main__":
    main()
