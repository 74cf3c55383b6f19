"""Probabilities that mean what they say, by one number."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_hpo.functional.objectives.anyloss_metrics import Task

__all__ = ["cross_entropy", "fit_temperature"]

_HALVINGS = 50


def cross_entropy(logits: Tensor, target: Tensor, task: Task) -> Tensor:
    """Mean cross-entropy of the task.

    Args:
        logits: ``(N,)``, ``(N, C)`` or ``(N, K)``.
        target: Zeros and ones, or class numbers ``(N,)``.
        task: What it is.

    Returns:
        A scalar.

    Example:
        >>> cross_entropy(torch.zeros(2), torch.tensor([0, 1]), "binary")
        tensor(0.6931)
    """
    if task == "multiclass":
        return F.cross_entropy(logits, target.long())
    return F.binary_cross_entropy_with_logits(logits, target.to(logits.dtype))


def fit_temperature(
    logits: Tensor, target: Tensor, task: Task = "binary", limits: tuple[float, float] = (0.01, 100.0)
) -> float:
    r"""The temperature :math:`T` for which :math:`z / T` has the least cross-entropy; decisions at 0.5 stay.

    The cross-entropy is convex in :math:`1 / T`, so that halving finds where its slope changes sign.

    Args:
        logits: Of held-out samples, ``(N,)``, ``(N, C)`` or ``(N, K)``.
        target: Zeros and ones, or class numbers ``(N,)``.
        task: What it is.
        limits: Least and largest temperature; the answer is one of them where samples are all right, or all noise.

    Returns:
        The temperature.

    Raises:
        ValueError: If there is no sample, or a logit is not finite.

    References:
        Guo, Pleiss, Sun and Weinberger, "On Calibration of Modern Neural Networks", ICML 2017, section 4.2.

    Example:
        >>> logits = torch.tensor([8.0, 8.0, 8.0, 8.0, -8.0])  # right in four cases of five
        >>> round(fit_temperature(logits, torch.tensor([1, 1, 1, 0, 0])), 2)  # 8 / ln 4
        5.77
    """
    if not logits.numel() or not bool(logits.isfinite().all()):
        raise ValueError("a temperature needs finite logits of at least one sample")
    logits = logits.double()
    low, high = -math.log(limits[1]), -math.log(limits[0])  # of log 1/T
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if _slope(logits, target, task, math.exp(middle)) < 0:
            low = middle
        else:
            high = middle
    return math.exp(-(low + high) / 2)


def _slope(logits: Tensor, target: Tensor, task: Task, scale: float) -> float:
    """Derivative of the mean cross-entropy of scaled logits in the scale."""
    if task == "multiclass":
        probabilities = (scale * logits).softmax(1)
        of_target = logits.gather(1, target.long()[:, None])[:, 0]
        return ((probabilities * logits).sum(1) - of_target).mean().item()
    return (logits * (torch.sigmoid(scale * logits) - target.to(logits.dtype))).mean().item()
