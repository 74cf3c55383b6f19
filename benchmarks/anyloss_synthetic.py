"""A linear model trained on a metric with the whole data in each step, as the paper's single layer is."""

from typing import Any

import numpy as np
import torch
from sklearn.datasets import make_classification
from sklearn.decomposition import PCA
from sklearn.model_selection import StratifiedKFold
from torch import Tensor
from torch.nn import functional as F

from lightning_hpo.functional.objectives.anyloss import anyloss
from lightning_hpo.functional.objectives.anyloss_surrogates import Surrogate

__all__ = ["COLUMNS", "TRAINED_ON", "synthetic_row", "synthetic_rows"]

COLUMNS: dict[str, tuple[str, float]] = {
    "accuracy": ("accuracy", 1.0),
    "F1": ("f1", 1.0),
    "F0.5": ("fbeta", 0.5),
    "F2": ("fbeta", 2.0),
    "G-mean": ("gmean", 1.0),
    "balanced accuracy": ("balanced_accuracy", 1.0),
}
TRAINED_ON = ("cross-entropy", *COLUMNS)


def _data() -> tuple[Tensor, Tensor]:
    features, labels = make_classification(
        10_000,
        weights=[0.9, 0.1],
        class_sep=1.2,
        n_features=5,
        n_informative=3,
        n_redundant=1,
        n_clusters_per_class=1,
        random_state=0,
    )
    features = PCA(2, random_state=0).fit_transform(features)
    return torch.tensor(features, dtype=torch.float32), torch.tensor(labels, dtype=torch.float32)


def _train(x: Tensor, y: Tensor, trained_on: str, steps: int) -> Tensor:
    """Weights and bias after gradient descent from 0."""
    theta = torch.zeros(x.shape[1] + 1, requires_grad=True)
    for _ in range(steps):
        logits = x @ theta[:-1] + theta[-1]
        if trained_on == "cross-entropy":
            loss = F.binary_cross_entropy_with_logits(logits, y)
        else:
            metric, beta = COLUMNS[trained_on]
            loss = anyloss(logits, y, metric, beta=beta)  # type: ignore[arg-type]
        (slope,) = torch.autograd.grad(loss, theta)
        with torch.no_grad():
            theta -= 0.1 * slope
    return theta.detach()


def synthetic_row(trained_on: str, quick: bool = False) -> dict[str, Any]:
    """Means over ten folds, a column a metric."""
    x, y = _data()
    folds = list(StratifiedKFold(10, shuffle=True, random_state=2).split(x, y))[: 2 if quick else None]
    found = []
    for train, test in folds:
        theta = _train(x[train], y[train], trained_on, 20 if quick else 1000)
        logits = x[test] @ theta[:-1] + theta[-1]
        hard = Surrogate("hard")
        found.append(
            [1 - anyloss(logits, y[test], m, beta=b, surrogate=hard).item() for m, b in COLUMNS.values()]  # type: ignore[arg-type]
        )
    means = np.mean(found, axis=0)
    return {"trained on": trained_on} | {n: round(float(v), 4) for n, v in zip(COLUMNS, means, strict=True)}


def synthetic_rows(quick: bool) -> list[dict[str, Any]]:
    """A row an objective."""
    return [synthetic_row(trained_on, quick) for trained_on in TRAINED_ON]
