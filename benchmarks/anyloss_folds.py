"""Ten-fold cross-validation of trainings on a rare class.

A share is made by thinning the training folds alone. All samples of the class that are there are judged, those left out
of training among them, and their weights give them the share that they have in training: a table that keeps 37 of 110
positives is judged by 110.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from anyloss_members import Members
from sklearn.model_selection import StratifiedKFold
from torch import Tensor
from torch.utils.data import TensorDataset

from lightning_hpo import SoftConfusionMatrix
from lightning_hpo.demos import ImbalancedDataModule
from lightning_hpo.demos.imbalanced_data import rare

__all__ = ["FOLDS", "Fold", "cross_validated", "folds_of"]

FOLDS = 10


@dataclass
class Fold:
    """What one network is trained on, and the rest, with weights."""

    train_set: TensorDataset
    test_set: TensorDataset
    seed: int
    batch_size: int = 64


def folds_of(setting: Mapping[str, Any], seed: int, again: int = 0) -> list[Fold]:
    """The folds of a table.

    Args:
        setting: Arguments of ``ImbalancedDataModule``.
        seed: Decides about folds, thinning, first weights and order.
        again: Anything but 0 changes first weights and order only.

    Returns:
        As many as there are folds.
    """
    whole = ImbalancedDataModule(**{**setting, "share": None}, seed=seed)
    parts = [part.tensors for part in (whole.train_set, whole.val_set, whole.test_set)]
    features, targets = (torch.cat(part) for part in zip(*parts, strict=True))
    splits = StratifiedKFold(FOLDS, shuffle=True, random_state=seed).split(features, targets)
    found = []
    for number, (train, test) in enumerate(splits):
        generator, kept = torch.Generator().manual_seed(FOLDS * seed + number), torch.from_numpy(train)
        if share := setting.get("share"):
            kept = kept[rare(targets[kept].long(), [1], share, generator)]
        mean, deviation = features[kept].mean(0), features[kept].std(0) + 1e-6
        scaled, held = (features - mean) / deviation, torch.from_numpy(test)
        training = TensorDataset(scaled[kept], targets[kept])
        judging = TensorDataset(scaled[held], targets[held], _weights(targets, share)[held])
        found.append(Fold(training, judging, seed=FOLDS * (seed + again) + number))
    return found


def _weights(targets: Tensor, share: float | None) -> Tensor:
    """Of each sample, so that positives have their share of the weight."""
    few = targets.sum() / len(targets)
    return (
        torch.ones_like(targets) if share is None else torch.where(targets == 1, share / few, (1 - share) / (1 - few))
    )


def cross_validated(trained: Members, folds: Sequence[Fold], metrics: Sequence[str]) -> dict[str, list[float]]:
    """Metrics of the decisions on all folds of each seed together.

    Args:
        trained: A member for each fold.
        folds: Those of the first seed, then those of the next.
        metrics: Their names.

    Returns:
        A value for each seed, of every metric.
    """
    found: dict[str, list[float]] = {metric: [] for metric in metrics}
    for start in range(0, len(folds), FOLDS):
        counts = SoftConfusionMatrix("binary", hard=True)
        for member in range(start, start + FOLDS):
            features, targets, weights = folds[member].test_set.tensors
            with torch.no_grad():
                logits = trained(features[:, None].expand(-1, len(folds), -1))[:, member]
            counts.update(logits, targets.long(), weights)
        for metric, values in found.items():
            values.append(round(counts.score(metric).item(), 4))  # type: ignore[arg-type]
    return found
