"""Metrics as functions of a confusion matrix that need not hold whole numbers."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

__all__ = ["METRICS", "Average", "Counts", "CountsMetric", "MetricName", "Task", "score"]

Task = Literal["binary", "multiclass", "multilabel"]
Average = Literal["macro", "micro", "weighted"]
MetricName = Literal[
    "accuracy", "balanced_accuracy", "f1", "fbeta", "gmean", "jaccard", "kappa", "mcc", "precision", "recall",
    "specificity", "youden",
]  # fmt: skip
CountsMetric = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
OF_THE_WHOLE = ("balanced_accuracy", "gmean", "kappa", "mcc")  # with several classes there is nothing to average
FROM_MATRIX = ("kappa", "mcc")  # with several classes they need the C x C matrix


class Counts(NamedTuple):
    """Soft numbers of true and false positives and negatives, each of shape ``(K,)``."""

    tp: Tensor
    fp: Tensor
    fn: Tensor
    tn: Tensor

    @classmethod
    def of(cls, sums: Tensor) -> "Counts":
        """From rows of true positives, predicted positives, positives and samples, ``(4, K)``."""
        tp, predicted, positive, total = sums.unbind(0)
        rest = (total - positive - predicted + tp).clamp(min=0)  # rounding may leave less than nothing
        return cls(tp, (predicted - tp).clamp(min=0), (positive - tp).clamp(min=0), rest)


class _Value(NamedTuple):
    """A metric of each column, and where it is defined; 0 elsewhere."""

    value: Tensor
    defined: Tensor


def _ratio(part: Tensor, whole: Tensor) -> _Value:
    defined = whole != 0  # true for NaN, which must not be hidden
    return _Value(torch.where(defined, part / torch.where(defined, whole, 1.0), 0.0), defined)


def _recall(c: Counts) -> _Value:
    return _ratio(c.tp, c.tp + c.fn)


def _specificity(c: Counts) -> _Value:
    return _ratio(c.tn, c.tn + c.fp)


def _fbeta(c: Counts, beta: float) -> _Value:
    square = beta**2
    return _ratio((1 + square) * c.tp, (1 + square) * c.tp + square * c.fn + c.fp)


def _root(value: Tensor) -> Tensor:
    """Square root whose slope at 0 is finite: a NaN there would reach every weight."""
    tiny = torch.finfo(value.dtype).tiny
    return value.clamp(min=tiny).sqrt() * (value != 0)


def _balanced(c: Counts) -> _Value:
    both = (_recall(c), _specificity(c))
    defined = torch.stack([part.defined for part in both])
    return _Value(torch.stack([part.value for part in both]).sum(0) / defined.sum(0).clamp(min=1), defined.any(0))


def _gmean(c: Counts) -> _Value:
    parts = (_recall(c), _specificity(c))
    defined = parts[0].defined | parts[1].defined
    first, second = (torch.where(part.defined, part.value, 1.0) for part in parts)
    return _Value(torch.where(defined, _root(first * second), 0.0), defined)


def _youden(c: Counts) -> _Value:
    value, defined = _balanced(c)
    return _Value(torch.where(defined, 2 * value - 1, 0.0), defined)


def _mcc(c: Counts) -> _Value:
    whole = _root((c.tp + c.fp) * (c.tp + c.fn)) * _root((c.tn + c.fp) * (c.tn + c.fn))
    return _ratio(c.tp * c.tn - c.fp * c.fn, whole)


def _kappa(c: Counts) -> _Value:
    whole = (c.tp + c.fp) * (c.fp + c.tn) + (c.tp + c.fn) * (c.fn + c.tn)
    return _ratio(2 * (c.tp * c.tn - c.fn * c.fp), whole)


METRICS: dict[str, Callable[[Counts], _Value]] = {
    "accuracy": lambda c: _ratio(c.tp + c.tn, c.tp + c.fp + c.fn + c.tn),
    "balanced_accuracy": _balanced,
    "f1": lambda c: _fbeta(c, 1.0),
    "fbeta": lambda c: _fbeta(c, 1.0),  # `score` gives it its beta
    "gmean": _gmean,
    "jaccard": lambda c: _ratio(c.tp, c.tp + c.fp + c.fn),
    "kappa": _kappa,
    "mcc": _mcc,
    "precision": lambda c: _ratio(c.tp, c.tp + c.fp),
    "recall": _recall,
    "specificity": _specificity,
    "youden": _youden,
}


@dataclass(frozen=True)
class _OfCallable:
    """A user's function; a column in which a class is missing gets a trace of everything, so that 0/0 cannot happen."""

    function: CountsMetric

    def __call__(self, c: Counts) -> _Value:
        missing = ((c.tp + c.fn) == 0) | ((c.tn + c.fp) == 0)
        trace = missing * torch.finfo(c.tp.dtype).eps
        value = self.function(*(part + trace for part in c))
        if not isinstance(value, Tensor) or value.shape != c.tp.shape:
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"the metric must give a tensor shaped like its arguments, {tuple(c.tp.shape)}, got {got}")
        return _Value(value, torch.ones_like(missing))


def score(
    sums: Tensor,
    metric: MetricName | CountsMetric,
    task: Task = "binary",
    average: Average = "macro",
    beta: float = 1.0,
) -> Tensor:
    r"""A metric of a soft confusion matrix, as torchmetrics defines it where it does.

    Terms that are undefined, 0/0, are left out: balanced accuracy without positives is the other recall, a mean over
    classes is one over classes that are there. Where nothing is defined the value is 0. Of several classes, accuracy is
    recall (averaged as torchmetrics does), balanced accuracy and G-mean are the mean and the geometric mean of recalls,
    and MCC and kappa are those of the C x C matrix; the rest is one against the rest.

    Args:
        sums: Rows of true positives, predicted positives, positives and samples, ``(4, K)``; or the C x C matrix, true
            classes in rows.
        metric: A name, or a function ``(tp, fp, fn, tn)`` of tensors ``(K,)``.
        task: What the columns are: one, classes or labels.
        average: How columns become one number.
        beta: Of ``"fbeta"``.

    Returns:
        A scalar.

    Example:
        >>> sums = torch.tensor([[6.0], [8.0], [10.0], [50.0]])  # 6 of 10 positives found, with 2 false alarms
        >>> score(sums, "f1"), score(sums, "recall")
        (tensor(0.6667), tensor(0.6000))
        >>> score(sums, lambda tp, fp, fn, tn: tp / (tp + fp))
        tensor(0.7500)
    """
    if task == "multiclass" and metric in FROM_MATRIX:
        return (_matrix_mcc if metric == "mcc" else _matrix_kappa)(sums)
    counts = Counts.of(sums)
    if task == "multiclass" and metric == "gmean":
        return _geometric_mean(_recall(counts))
    if average == "micro":
        counts = Counts(*(part.sum(0, keepdim=True) for part in counts))
    value, defined = _function(metric, task, beta)(counts)
    if len(value) == 1:  # nothing to average; undefined values are 0
        return value[0]
    if average == "weighted" and task != "binary":
        support = counts.tp + counts.fn
        return _ratio((support * value).sum(), support.sum()).value
    return _ratio(value.sum(), defined.sum()).value


def _function(metric: MetricName | CountsMetric, task: Task, beta: float) -> Callable[[Counts], _Value]:
    if not isinstance(metric, str):
        return _OfCallable(metric)
    if metric == "fbeta":
        return lambda c: _fbeta(c, beta)
    if task == "multiclass" and metric in ("accuracy", "balanced_accuracy"):
        return _recall
    return METRICS[metric]


def _geometric_mean(recalls: _Value) -> Tensor:
    tiny = torch.finfo(recalls.value.dtype).tiny
    logs = torch.where(recalls.defined, recalls.value, 1.0).clamp(min=tiny).log()
    missed = (recalls.defined & (recalls.value == 0)).any()
    mean = (logs.sum() / recalls.defined.sum().clamp(min=1)).exp()
    return torch.where(missed | ~recalls.defined.any(), 0.0 * mean, mean)


def _shares(matrix: Tensor) -> Tensor:
    return matrix / matrix.sum().clamp(min=torch.finfo(matrix.dtype).tiny)


def _matrix_mcc(matrix: Tensor) -> Tensor:
    shares = _shares(matrix)
    true, predicted = shares.sum(1), shares.sum(0)
    whole = _root(1 - predicted.square().sum()) * _root(1 - true.square().sum())
    return _ratio(shares.trace() - true.dot(predicted), whole).value


def _matrix_kappa(matrix: Tensor) -> Tensor:
    shares = _shares(matrix)
    chance = shares.sum(1).dot(shares.sum(0))  # unlike `@` it keeps its precision under autocast
    return _ratio(shares.trace() - chance, 1 - chance).value
