"""Soft confusion matrices of many batches, as a metric that can be differentiated."""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from typing_extensions import override

from lightning_hpo.functional.arguments import is_whole
from lightning_hpo.functional.objectives.anyloss import soft_counts, soft_sums
from lightning_hpo.functional.objectives.anyloss_arguments import metric_problems, surrogate_problems
from lightning_hpo.functional.objectives.anyloss_inputs import arrange, suspicion, value_problems
from lightning_hpo.functional.objectives.anyloss_metrics import (
    FROM_MATRIX,
    Average,
    CountsMetric,
    MetricName,
    Task,
    score,
)
from lightning_hpo.functional.objectives.anyloss_surrogates import Surrogate, SurrogateName

__all__ = ["SoftConfusionMatrix"]


class SoftConfusionMatrix(Metric):
    r"""Soft true and false positives and negatives, added up over batches and ranks.

    Args:
        task: ``"binary"``, ``"multiclass"`` or ``"multilabel"``; shapes as in
            :class:`~lightning_hpo.losses.anyloss.AnyLoss`.
        num_classes: Number of classes or labels; not for ``"binary"``.
        surrogate: The soft decision.
        amplification: Its steepness.
        threshold: Where it is a half.
        width: Of ``"sol-cosine"``.
        hard: Counts whole samples instead, as a usual confusion matrix.
        ignore_index: Target that does not count.
        validate_args: Whether to look at the values of targets, which makes a GPU wait.
        kwargs: Of ``torchmetrics.Metric``.

    Raises:
        ValueError: If an argument is wrong; all are listed.

    Example:
        >>> counts = SoftConfusionMatrix("binary", amplification=10.0)
        >>> counts.update(torch.tensor([1.0, -1.0]), torch.tensor([1, 1]))
        >>> counts.update(torch.tensor([1.0]), torch.tensor([0]))
        >>> counts.compute()  # tp, fp, fn, tn
        tensor([1.0000, 0.9097, 1.0000, 0.0903])
        >>> counts.score("recall")
        tensor(0.5000)
    """

    is_differentiable = True
    full_state_update = False
    sums: Tensor

    def __init__(
        self,
        task: Task = "binary",
        num_classes: int | None = None,
        surrogate: SurrogateName = "anyloss",
        amplification: float | None = None,
        threshold: float = 0.5,
        width: float = 0.1,
        hard: bool = False,
        ignore_index: int | None = None,
        validate_args: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        problems = metric_problems("f1", task, "macro", 1.0)
        problems += surrogate_problems(surrogate, amplification, threshold, width, task)
        if (task == "binary") != (num_classes is None):
            problems.append(f"num_classes is for several classes or labels; got {num_classes!r} with task={task!r}")
        elif num_classes is not None and not is_whole(num_classes, least := 2 if task == "multiclass" else 1):
            problems.append(f"num_classes must be a whole number of at least {least}, got {num_classes!r}")
        if hard and (surrogate, amplification, width) != ("anyloss", None, 0.1):
            problems.append("surrogate, amplification and width have no effect with hard=True")
        if problems:
            raise ValueError(f"`SoftConfusionMatrix`: {'; '.join(problems)}.")
        self.task: Task = task
        self.num_classes, self.ignore_index, self.validate_args = num_classes, ignore_index, validate_args
        self.surrogate = Surrogate("hard" if hard else surrogate, amplification, threshold, width)
        shape = (num_classes, num_classes) if task == "multiclass" else (4, num_classes or 1)
        self.add_state("sums", torch.zeros(shape), dist_reduce_fx="sum")  # type: ignore[arg-type]

    @override
    def update(self, logits: Tensor, target: Tensor, weight: Tensor | None = None) -> None:
        """Adds a batch."""
        inputs = arrange(logits, target, self.task, weight, self.ignore_index)
        if self.num_classes is not None and logits.shape[1] != self.num_classes:
            raise ValueError(f"num_classes is {self.num_classes}, logits have shape {tuple(logits.shape)}")
        if self.validate_args:
            seen = suspicion(inputs, self.task).tolist()
            if problems := value_problems(inputs, self.task, seen):
                raise ValueError(f"`SoftConfusionMatrix`: {'; '.join(problems)}.")
        self.sums = self.sums + soft_sums(inputs, self.surrogate, self.task, self.task == "multiclass")

    @override
    def compute(self) -> Tensor:
        """True and false positives and negatives: ``(4,)``, or ``(4, K)`` for classes or labels."""
        counts = soft_counts(self._rows())
        return counts[:, 0] if self.task == "binary" else counts

    def score(self, metric: MetricName | CountsMetric, average: Average = "macro", beta: float = 1.0) -> Tensor:
        """A metric of everything that was counted, on all ranks.

        Args:
            metric: A name, or a function ``(tp, fp, fn, tn)``.
            average: How classes or labels become one number.
            beta: Of ``"fbeta"``.

        Returns:
            A scalar.

        Raises:
            ValueError: If an argument is wrong; all are listed.
        """
        if problems := metric_problems(metric, self.task, average, beta):
            raise ValueError(f"`SoftConfusionMatrix`: {'; '.join(problems)}.")
        with self.sync_context(should_sync=self._to_sync, should_unsync=self._should_unsync):
            whole = self.task == "multiclass" and metric in FROM_MATRIX
            return score(self.sums if whole else self._rows(), metric, self.task, average, beta)

    def _rows(self) -> Tensor:
        if self.task != "multiclass":
            return self.sums
        matrix = self.sums
        return torch.stack([matrix.diagonal(), matrix.sum(0), matrix.sum(1), matrix.sum().expand(matrix.shape[0])])
