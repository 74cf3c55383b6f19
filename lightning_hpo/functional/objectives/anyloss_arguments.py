"""Checks of the arguments of everything that is made of a soft confusion matrix."""

import math
from collections.abc import Iterator
from typing import Any, get_args

from lightning_hpo.functional.arguments import is_number, is_whole
from lightning_hpo.functional.objectives.anyloss_metrics import METRICS, OF_THE_WHOLE, Average, Task
from lightning_hpo.functional.objectives.anyloss_surrogates import STEEPNESS, SURROGATES

__all__ = ["batch_problems", "metric_problems", "schedule_problems", "surrogate_problems"]


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
    if not callable(metric) and metric not in list(METRICS):  # a list: whatever was given need not have a hash
        yield f"metric must be one of {sorted(METRICS)} or a function (tp, fp, fn, tn), got {metric!r}"
    if task not in get_args(Task):
        yield f"task must be one of {list(get_args(Task))}, got {task!r}"
    if average not in get_args(Average):
        yield f"average must be one of {list(get_args(Average))}, got {average!r}"
    elif task == "binary" and average != "macro":
        yield f"average={average!r} has no effect on task='binary'"
    elif task == "multiclass" and metric in OF_THE_WHOLE and average != "macro":
        yield f"metric={metric!r} is not averaged over classes: average={average!r} has no effect on it"
    if not _is_positive(beta):
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
    yield from _amplification_problems("amplification", amplification, name)
    if not is_number(threshold) or not 0 < threshold < 1:
        yield f"threshold must be between 0 and 1, got {threshold!r}"
    elif threshold != 0.5 and task == "multiclass":
        yield f"threshold={threshold!r} has no effect on task='multiclass': the largest logit wins"
    elif threshold != 0.5 and name == "sol-uniform":
        yield f"threshold={threshold!r} has no effect on surrogate='sol-uniform', whose threshold is any"
    if not is_number(width) or not 0 < width <= 0.5:
        yield f"width must be above 0 and at most 0.5, got {width!r}"
    elif width != 0.1 and name != "sol-cosine":
        yield f"width={width!r} has no effect on surrogate={name!r}"


def batch_problems(running: Any, ignore_index: Any) -> list[str]:
    """What is wrong with the choice of what is counted.

    Args:
        running: Decay of running sums, or ``None``.
        ignore_index: Target that does not count, or ``None``.

    Returns:
        Sentences without a full stop; none if all is well.

    Example:
        >>> batch_problems(1.0, ignore_index=-100)
        ['running must be None or a decay from 0 to below 1, got 1.0']
    """
    problems = []
    if running is not None and not (is_number(running) and 0 <= running < 1):
        problems.append(f"running must be None or a decay from 0 to below 1, got {running!r}")
    if ignore_index is not None and type(ignore_index) is not int:
        problems.append(f"ignore_index must be None or a whole number, got {ignore_index!r}")
    return problems


def schedule_problems(warmup: Any, anneal: Any, mix: Any, start: Any, total_steps: Any, surrogate: Any) -> list[str]:
    """What is wrong with the choice of when a metric takes over.

    Args:
        warmup: Share of training without the metric.
        anneal: Share of training at which the amplification has reached its end.
        mix: Weight of the metric.
        start: First amplification, or ``None``.
        total_steps: Length of training, or ``None``.
        surrogate: The soft decision.

    Returns:
        Sentences without a full stop; none if all is well.

    Example:
        >>> schedule_problems(0.2, 0.1, mix=0.5, start=None, total_steps=None, surrogate="anyloss")
        ['anneal must be from warmup to 1, got 0.1']
    """
    problems = [
        f"{name} must be a number, got {value!r}"
        for name, value in (("warmup", warmup), ("anneal", anneal), ("mix", mix))
        if not is_number(value)
    ]
    if not problems:
        checks = {
            f"warmup must be from 0 to below 1, got {warmup!r}": 0 <= warmup < 1,
            f"anneal must be from warmup to 1, got {anneal!r}": warmup <= anneal <= 1,
            f"mix must be above 0 and at most 1, got {mix!r}": 0 < mix <= 1,
        }
        problems = [problem for problem, holds in checks.items() if not holds]
    problems += _amplification_problems("amplification_start", start, surrogate)
    if total_steps is not None and not is_whole(total_steps, 1):
        problems.append(f"total_steps must be a whole number of at least 1, got {total_steps!r}")
    return problems


def _amplification_problems(argument: str, value: Any, surrogate: Any) -> Iterator[str]:
    if value is not None and not _is_positive(value):
        yield f"{argument} must be a positive number, got {value!r}"
    elif value is not None and surrogate in SURROGATES and surrogate not in list(STEEPNESS):
        yield f"{argument}={value!r} has no effect on surrogate={surrogate!r}"


def _is_positive(value: Any) -> bool:
    return is_number(value) and 0 < value < math.inf
