"""Metrics as losses: a soft confusion matrix of a batch, and one minus a metric of it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_hpo.functional.objectives.anyloss_arguments import metric_problems
from lightning_hpo.functional.objectives.anyloss_inputs import Inputs, arrange, without_autocast
from lightning_hpo.functional.objectives.anyloss_metrics import (
    FROM_MATRIX,
    Average,
    Counts,
    CountsMetric,
    MetricName,
    Task,
    score,
)
from lightning_hpo.functional.objectives.anyloss_surrogates import Surrogate

__all__ = ["anyloss", "dead_share", "lacks_a_class", "soft_counts", "soft_sums"]

_CHUNK = 131_072  # samples whose intermediate values stay in the processor's cache


def soft_sums(inputs: Inputs, surrogate: Surrogate, task: Task = "binary", matrix: bool = False) -> Tensor:
    r"""What a soft confusion matrix is made of; sums of batches and of ranks simply add up.

    Of several classes soft decisions are divided by their sum over classes, so that every sample counts once.

    Args:
        inputs: What :func:`~lightning_hpo.functional.objectives.anyloss_inputs.arrange` gave.
        surrogate: How much a sample counts as predicted positive.
        task: What the columns are: one, classes or labels.
        matrix: Of several classes, whether to give the C x C matrix :math:`\sum_i e_{y_i} a_i^T`.

    Returns:
        Rows :math:`\sum w a y`, :math:`\sum w a`, :math:`\sum w y` and :math:`\sum w`, ``(4, K)``; or ``(C, C)``.

    Example:
        >>> soft_sums(arrange(torch.tensor([5.0, -5.0, 5.0]), torch.tensor([1, 0, 0]), "binary"), Surrogate()).squeeze()
        tensor([1., 2., 1., 3.])
    """
    logits, target, weight = inputs
    if task == "multiclass":
        with without_autocast(logits):
            return _class_sums(inputs, surrogate, matrix)
    if task == "binary" and weight is None and logits.numel() > _CHUNK and not torch.compiler.is_compiling():
        tp, predicted = _SoftSums.apply(logits, target, surrogate)
        return torch.stack([tp, predicted, target.sum(), torch.full_like(tp, target.numel())])[:, None]
    soft = surrogate(logits)
    if weight is None:
        rows = [(soft * target).sum(0), soft.sum(0), target.sum(0), torch.full_like(soft[0], soft.shape[0])]
    else:
        weighed = weight * target
        rows = [(soft * weighed).sum(0), (soft * weight).sum(0), weighed.sum(0), weight.sum(0)]
    return torch.stack(rows).reshape(4, -1)


def _class_sums(inputs: Inputs, surrogate: Surrogate, matrix: bool) -> Tensor:
    logits, target, weight = inputs
    soft = surrogate.of_classes(logits.T, 0)  # classes in rows: torch is several times as quick along long rows
    share = 1 / soft.sum(0)  # the winner has at least a half: never 0
    weight = torch.ones_like(share) if weight is None else weight

    def placed(values: Tensor) -> Tensor:  # to each sample's class; products with it are deterministic everywhere
        return torch.zeros_like(soft).scatter(0, target[None], values[None])

    if matrix:
        return placed(weight * share) @ soft.T
    members = placed(weight)
    tp = members @ (soft.gather(0, target[None])[0] * share)
    positive = members.sum(1)
    return torch.stack([tp, soft @ (weight * share), positive, positive.sum().expand_as(positive)])


class _SoftSums(torch.autograd.Function):
    """Sums of many soft decisions, in pieces that fit into the cache: as quick as a cross-entropy.

    Nothing is kept for the backward pass but the inputs; a piece's decisions are cheaper to make again than to store.
    Second derivatives, forward mode and ``torch.func`` work as for any function of torch.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(logits: Tensor, target: Tensor, surrogate: Surrogate) -> tuple[Tensor, Tensor]:
        tp, predicted = [], []
        for part in _pieces(logits):
            soft = surrogate(logits[part])
            tp.append(soft.dot(target[part]))
            predicted.append(soft.sum())
        return torch.stack(tp).sum(), torch.stack(predicted).sum()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:  # noqa: ARG004
        logits, target, ctx.surrogate = inputs
        ctx.save_for_backward(logits, target)
        ctx.save_for_forward(logits, target)

    @staticmethod
    def backward(ctx: Any, of_tp: Tensor, of_predicted: Tensor) -> Any:
        logits, target = ctx.saved_tensors
        if torch.is_grad_enabled():  # somebody will differentiate this once more
            return (of_predicted + target * of_tp) * ctx.surrogate.slope(logits), None, None
        gradient = torch.empty_like(logits)
        for part in _pieces(logits):
            torch.mul(target[part], of_tp, out=gradient[part]).add_(of_predicted)
            gradient[part].mul_(ctx.surrogate.slope(logits[part]))
        return gradient, None, None

    @staticmethod
    def jvp(ctx: Any, of_logits: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        logits, target = ctx.saved_tensors
        moved = ctx.surrogate.slope(logits) * of_logits
        return moved.dot(target), moved.sum()


def _pieces(logits: Tensor) -> list[slice]:
    size = _CHUNK if logits.device.type == "cpu" else max(logits.numel(), 1)
    return [slice(start, start + size) for start in range(0, logits.numel(), size)]


def anyloss(
    logits: Tensor,
    target: Tensor,
    metric: MetricName | CountsMetric = "f1",
    task: Task = "binary",
    average: Average = "macro",
    beta: float = 1.0,
    surrogate: Surrogate | None = None,
    weight: Tensor | None = None,
    ignore_index: int | None = None,
    reduce: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    r"""One minus a metric of the soft confusion matrix of a batch.

    With soft decisions :math:`a_i` and labels :math:`y_i`,

    .. math:: TP = \sum_i a_i y_i, \quad FP = \sum_i a_i - TP, \quad FN = \sum_i y_i - TP, \quad
              TN = N - TP - FP - FN, \qquad \ell = 1 - m(TP, FP, FN, TN)

    Args:
        logits: ``(N,)``, ``(N, C, ...)`` of several classes, or ``(N, K)`` of labels.
        target: Zeros and ones like the logits, or class numbers ``(N, ...)``.
        metric: A name, or a function ``(tp, fp, fn, tn)`` of tensors ``(K,)``.
        task: ``"binary"``, ``"multiclass"`` or ``"multilabel"``.
        average: How classes or labels become one number.
        beta: Of ``"fbeta"``.
        surrogate: The soft decision; ``Surrogate("anyloss")`` by default.
        weight: Of each sample.
        ignore_index: Target that does not count.
        reduce: Applied to the sums, such as a sum over ranks.

    Returns:
        A scalar.

    Raises:
        ValueError: If shapes or arguments do not fit; values of targets are not looked at here.

    References:
        Han, Moniz and Chawla, "AnyLoss: Transforming Classification Metrics into Loss Functions", 2024, section 3.

    Example:
        >>> logits, target = torch.tensor([2.0, -1.0, -3.0, 0.2]), torch.tensor([1, 1, 0, 0])
        >>> anyloss(logits, target, "f1")
        tensor(0.4968)
        >>> 1 - anyloss(logits, target, "f1", surrogate=Surrogate(amplification=1e6))  # 1 found, 1 missed, 1 false
        tensor(0.5000)
    """
    if problems := metric_problems(metric, task, average, beta):
        raise ValueError(f"`anyloss`: {'; '.join(problems)}.")
    inputs = arrange(logits, target, task, weight, ignore_index)
    sums = soft_sums(inputs, surrogate or Surrogate(), task, task == "multiclass" and metric in FROM_MATRIX)
    return 1 - score(sums if reduce is None else reduce(sums), metric, task, average, beta)


def soft_counts(sums: Tensor) -> Tensor:
    """True and false positives and negatives from sums.

    Args:
        sums: Rows of :func:`soft_sums`, ``(4, K)``.

    Returns:
        Rows of true positives, false positives, false negatives and true negatives, ``(4, K)``.

    Example:
        >>> soft_counts(torch.tensor([[6.0], [8.0], [10.0], [50.0]])).flatten()
        tensor([ 6.,  2.,  4., 38.])
    """
    return torch.stack(Counts.of(sums))


def dead_share(inputs: Inputs, surrogate: Surrogate, task: Task = "binary", below: float = 1e-4) -> Tensor:
    """Share of samples whose soft decisions hardly move with the logits: they learn nothing.

    Args:
        inputs: What :func:`~lightning_hpo.functional.objectives.anyloss_inputs.arrange` gave.
        surrogate: The soft decision.
        task: What it is.
        below: Slope that counts as dead; of several classes or labels the largest is looked at.

    Returns:
        A scalar between 0 and 1; samples of weight 0 are left out.

    Example:
        >>> dead_share(arrange(torch.tensor([0.0, 2.0, -2.0, 0.1]), torch.zeros(4), "binary"), Surrogate())
        tensor(0.5000)
    """
    logits, _, weight = inputs
    slopes = surrogate.class_slopes(logits) if task == "multiclass" else surrogate.slope(logits)
    dead = (slopes if task == "binary" else slopes.amax(1)) < below
    if weight is None:
        return dead.to(logits.dtype).mean()
    counted = (weight if weight.ndim == 1 else weight.amax(1)) > 0
    return (dead & counted).sum() / counted.sum().clamp(min=1)


def lacks_a_class(sums: Tensor, task: Task = "binary", matrix: bool = False, ignore_index: int | None = None) -> Tensor:
    """Whether a batch has nothing of a class, or of a label's positives or negatives.

    Args:
        sums: Of :func:`soft_sums`, or a stack of those of several batches.
        task: What it is.
        matrix: Whether they are the C x C matrix.
        ignore_index: A class that never counts is not missed.

    Returns:
        True or false, one a batch.

    Example:
        >>> lacks_a_class(torch.tensor([[0.0], [1.0], [0.0], [50.0]]))
        tensor(True)
    """
    positive = sums.sum(-1) if matrix else sums[..., 2, :]
    missing = positive <= 0
    if task == "multiclass":
        if ignore_index is not None:
            missing = missing & (torch.arange(missing.shape[-1], device=missing.device) != ignore_index)
        return missing.any(-1)
    return missing.any(-1) | (positive >= sums[..., 3, :]).any(-1)
