"""Checks of the arguments of everything that is made of a soft confusion matrix."""

import math
from collections.abc import Iterator
from typing import Any, get_args

from lightning_hpo.functional.objectives.anyloss_metrics import METRICS, OF_THE_WHOLE, Average, Task
from lightning_hpo.functional.objectives.anyloss_surrogates import SURROGATES

__all__ = ["metric_problems", "surrogate_problems"]


def metric_problems(metric: Any, task: Any, average: Any, beta: Any) -> list[str]:
    """What is wrong with the choice of a metric.

    Args:
        metric: A name or a function.
        task: What the targets are.
        average: How columns become one number.
        beta: Of ``"fbeta"``.

    Returns:
        Sentences without a full stop; none if all is well.

    Example:
        >>> metric_problems("f1", "binary", "macro", beta=2.0)
        ["beta=2.0 has no effect on metric='f1'; use metric='fbeta'"]
    """
    return list(_metric_problems(metric, task, average, beta))


def _metric_problems(metric: Any, task: Any, average: Any, beta: Any) -> Iterator[str]:
    if not callable(metric) and metric not in METRICS:
        yield f"metric must be one of {sorted(METRICS)} or a function (tp, fp, fn, tn), got {metric!r}"
    if task not in get_args(Task):
        yield f"task must be one of {list(get_args(Task))}, got {task!r}"
    if average not in get_args(Average):
        yield f"average must be one of {list(get_args(Average))}, got {average!r}"
    elif task == "binary" and average != "macro":
        yield f"average={average!r} has no effect on task='binary'"
    elif task == "multiclass" and metric in OF_THE_WHOLE and average != "macro":
        yield f"metric={metric!r} is not averaged over classes: average={average!r} has no effect on it"
    if not _is_number(beta) or not 0 < beta < math.inf:
        yield f"beta must be a positive number, got {beta!r}"
    elif beta != 1 and metric != "fbeta":
        yield f"beta={beta!r} has no effect on metric={metric!r}; use metric='fbeta'"


def surrogate_problems(name: Any, amplification: Any, threshold: Any, width: Any, task: Any) -> list[str]:
    """What is wrong with the choice of a soft decision.

    Args:
        name: Of the surrogate.
        amplification: Its steepness, or ``None``.
        threshold: Where it is a half.
        width: Of the raised cosine.
        task: What the targets are.

    Returns:
        Sentences without a full stop; none if all is well.

    Example:
        >>> surrogate_problems("anyloss", -1.0, 0.5, 0.1, "binary")
        ['amplification must be a positive number, got -1.0']
    """
    return list(_surrogate_problems(name, amplification, threshold, width, task))


def _surrogate_problems(name: Any, amplification: Any, threshold: Any, width: Any, task: Any) -> Iterator[str]:
    if name not in SURROGATES:
        yield f"surrogate must be one of {list(SURROGATES)}, got {name!r}"
    if amplification is not None and not (_is_number(amplification) and 0 < amplification < math.inf):
        yield f"amplification must be a positive number, got {amplification!r}"
    elif amplification is not None and name in ("sol-uniform", "sol-cosine"):
        yield f"amplification={amplification!r} has no effect on surrogate={name!r}"
    if not _is_number(threshold) or not 0 < threshold < 1:
        yield f"threshold must be between 0 and 1, got {threshold!r}"
    elif threshold != 0.5 and task == "multiclass":
        yield f"threshold={threshold!r} has no effect on task='multiclass': the largest logit wins"
    elif threshold != 0.5 and name == "sol-uniform":
        yield f"threshold={threshold!r} has no effect on surrogate='sol-uniform', whose threshold is any"
    if not _is_number(width) or not 0 < width <= 0.5:
        yield f"width must be above 0 and at most 0.5, got {width!r}"
    elif width != 0.1 and name != "sol-cosine":
        yield f"width={width!r} has no effect on surrogate={name!r}"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
