"""Logits and targets as a soft confusion matrix wants them, and what can be wrong with them."""

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_hpo.functional.objectives.anyloss_metrics import Task

__all__ = [
    "Inputs",
    "arrange",
    "look_like_probabilities",
    "range_problems",
    "suspicion",
    "value_problems",
    "without_autocast",
]

_FEW = 8  # logits of fewer samples may lie between 0 and 1 by chance


class Inputs(NamedTuple):
    """Arranged logits and targets.

    Args:
        logits: ``(N,)``, ``(N, C)`` or ``(N, K)`` for the three tasks, in 32 or 64 bits.
        target: ``(N,)``, of class numbers, or ``(N, K)``; zeros and ones are of the type of the logits.
        weight: Like the target, or ``None`` where every sample counts once.
    """

    logits: Tensor
    target: Tensor
    weight: Tensor | None


def arrange(
    logits: Tensor,
    target: Tensor,
    task: Task,
    weight: Tensor | None = None,
    ignore_index: int | None = None,
    from_logits: bool = True,
) -> Inputs:
    """Checks shapes, drops what is ignored by weighing it with 0, and turns everything to full precision.

    Args:
        logits: ``(N,)`` or, of any task, with further dimensions as for a cross-entropy: ``(N, C, ...)`` of several
            classes. Probabilities where ``from_logits`` is false.
        target: Zeros and ones of the same shape, or class numbers ``(N, ...)``.
        task: What it is.
        weight: Of each sample, like the target; of labels also ``(N,)``.
        ignore_index: Target that does not count.
        from_logits: Whether logits are logits.

    Returns:
        What can be summed.

    Raises:
        ValueError: If shapes do not fit, naming them.

    Example:
        >>> arrange(torch.zeros(3, 1), torch.tensor([[0], [1], [-1]]), "binary", ignore_index=-1)
        Inputs(logits=tensor([0., 0., 0.]), target=tensor([0., 1., 0.]), weight=tensor([1., 1., 0.]))
    """
    _check_shapes(logits, target, task)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if not from_logits:
        smallest = torch.finfo(logits.dtype).eps
        logits = logits.clamp(min=smallest).log() if task == "multiclass" else torch.logit(logits, eps=smallest)
    weight = None if weight is None else _weight(weight, target, logits.dtype)
    if ignore_index is not None:
        ignored = target == ignore_index
        kept = (~ignored).to(logits.dtype)
        weight = kept if weight is None else weight * kept
        target = target.masked_fill(ignored, 0)
        # A NaN in a row that does not count must not count either.
        logits = logits.masked_fill(ignored.unsqueeze(1) if task == "multiclass" else ignored, 0.0)
    if task == "multiclass":
        classes = logits.shape[1]
        logits = logits.movedim(1, -1).reshape(-1, classes) if logits.ndim > 2 else logits
        target, weight = target.reshape(-1), None if weight is None else weight.reshape(-1)
        return Inputs(logits, target.long(), weight)
    target = target.to(logits.dtype)
    if task == "binary":
        return Inputs(logits.reshape(-1), target.reshape(-1), None if weight is None else weight.reshape(-1))
    return Inputs(logits, target, weight)


def _check_shapes(logits: Tensor, target: Tensor, task: Task) -> None:
    shapes = f"logits of shape {tuple(logits.shape)} and targets of shape {tuple(target.shape)}"
    if not logits.is_floating_point():
        raise ValueError(f"logits must be floating point numbers, got {logits.dtype}")
    if task == "multiclass":
        if logits.ndim < 2 or logits.shape[1] < 2:
            raise ValueError(f"task='multiclass' needs logits of shape (N, C, ...) with C >= 2, got {shapes}")
        if (logits.shape[0], *logits.shape[2:]) != tuple(target.shape):
            raise ValueError(f"{shapes} do not fit: task='multiclass' needs (N, C, ...) and class numbers (N, ...)")
        if target.is_floating_point() or target.is_complex():
            raise ValueError(f"task='multiclass' needs class numbers, got targets of type {target.dtype}")
    elif task == "multilabel":
        if logits.ndim != 2 or logits.shape != target.shape:
            raise ValueError(f"{shapes} do not fit: task='multilabel' needs (N, K) for both")
    elif logits.ndim == 2 and logits.shape[1] > 1:
        hint = "task='multilabel'" if logits.shape == target.shape else "task='multiclass'"
        raise ValueError(f"task='binary' takes one logit a sample, got {shapes}; did you mean {hint}?")
    elif logits.shape != target.shape:
        raise ValueError(f"{shapes} differ; reshape one of them, they are not broadcast")
    if not target.numel():
        raise ValueError(f"the batch is empty: {shapes}")


def _weight(weight: Tensor, target: Tensor, dtype: torch.dtype) -> Tensor:
    if weight.shape == target.shape:
        return weight.to(dtype)
    if target.ndim == 2 and weight.shape == target.shape[:1]:
        return weight.to(dtype)[:, None].expand(target.shape)
    raise ValueError(f"weights of shape {tuple(weight.shape)} do not fit targets of shape {tuple(target.shape)}")


def suspicion(inputs: Inputs, task: Task) -> Tensor:
    """Three numbers that say whether values need a closer look; they are computed where the inputs are.

    Args:
        inputs: What :func:`arrange` gave.
        task: What it is.

    Returns:
        Smallest target, largest target, and for zeros and ones how much their sum differs from that of their squares.

    Example:
        >>> suspicion(arrange(torch.zeros(2), torch.tensor([0.5, 1.0]), "binary"), "binary")
        tensor([0.5000, 1.0000, 0.2500])
    """
    target = inputs.target
    low, high = target.aminmax()
    if task == "multiclass":
        return torch.stack([low, high])
    flat = target.reshape(-1)
    return torch.stack([low, high, flat.sum() - flat.dot(flat)])


def value_problems(inputs: Inputs, task: Task, seen: list[float] | None = None) -> list[str]:
    """What is wrong with the values of targets, with the values themselves; reads them.

    Args:
        inputs: What :func:`arrange` gave.
        task: What it is.
        seen: :func:`suspicion` on the host, which saves the closer look.

    Returns:
        Sentences; none if all is well.

    Example:
        >>> value_problems(arrange(torch.zeros(3), torch.tensor([0, 1, 2]), "binary"), "binary")
        ['targets must be 0 or 1, got 2']
    """
    classes = inputs.logits.shape[1] if task == "multiclass" else 2
    if seen is not None and seen[0] >= 0 and seen[1] <= classes - 1 and not any(seen[2:]):
        return []
    target = inputs.target
    wrong = (target < 0) | (target >= classes) if task == "multiclass" else (target != 0) & (target != 1)
    values = list(dict.fromkeys(f"{value:g}" for value in target[wrong].unique()[:5].tolist()))  # a NaN once
    if not values:
        return []
    allowed = f"class numbers from 0 to {classes - 1}" if task == "multiclass" else "0 or 1"
    return [f"targets must be {allowed}, got {', '.join(values)}"]


def range_problems(probabilities: Tensor | None, weight: Tensor | None) -> list[str]:
    """What is wrong with the range of probabilities and weights; reads them. A NaN is not looked for.

    Args:
        probabilities: Announced as such, or ``None``.
        weight: Of samples, or ``None``.

    Returns:
        Sentences; none if all is well.

    Example:
        >>> range_problems(torch.tensor([0.5, 2.0]), torch.tensor([-1.0, 1.0]))
        ['probabilities must be from 0 to 1, got some from 0.5 to 2', 'weights must not be negative, got -1']
    """
    problems = []
    if probabilities is not None:
        low, high = (value.item() for value in probabilities.detach().aminmax())
        if low < 0 or high > 1:
            problems.append(f"probabilities must be from 0 to 1, got some from {low:g} to {high:g}")
    if weight is not None and (least := weight.detach().amin().item()) < 0:
        problems.append(f"weights must not be negative, got {least:g}")
    return problems


def look_like_probabilities(logits: Tensor, task: Task) -> bool:
    """Whether logits are suspiciously between 0 and 1, not all the same, and sum to 1 over classes; reads them.

    Args:
        logits: What :func:`arrange` gave.
        task: What it is.

    Returns:
        Whether to warn.

    Example:
        >>> look_like_probabilities(torch.rand(100), "binary"), look_like_probabilities(torch.randn(100), "binary")
        (True, False)
    """
    low, high = logits.detach().aminmax()
    if logits.shape[0] < _FEW or not bool((low >= 0) & (high <= 1) & (high > low)):
        return False
    return task != "multiclass" or bool(((logits.detach().sum(1) - 1).abs() < 1e-2).all())


def without_autocast(tensor: Tensor) -> AbstractContextManager[None]:
    """Where products of counts are not rounded to 16 bits.

    Args:
        tensor: On the device that is meant.

    Returns:
        A context.

    Example:
        >>> counts = torch.tensor([[301.0]])
        >>> with torch.autocast("cpu", torch.bfloat16):
        ...     with without_autocast(counts):
        ...         counts @ torch.ones(1, 1)
        tensor([[301.]])
    """
    kind = tensor.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()
