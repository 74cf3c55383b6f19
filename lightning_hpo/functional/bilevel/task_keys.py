"""Names for tasks, made from what is in them."""

import hashlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["check_tasks", "task_key", "task_keys"]


def task_key(task: object) -> str | None:
    """The beginning of a SHA-256 of a task's contents.

    Args:
        task: Tensors, numbers, strings, bytes, None, and lists, tuples, mappings and dataclasses of them.

    Returns:
        16 digits, the same in every process; None if something else is in it.

    Example:
        >>> task_key({"seed": 3, "x": torch.zeros(2)}) == task_key({"x": torch.zeros(2), "seed": 3})
        True
        >>> task_key(object()) is None
        True
    """
    digest = hashlib.sha256()
    try:
        for part in _parts(task):
            digest.update(len(part).to_bytes(8, "big") + part)
    except TypeError:
        return None
    return digest.hexdigest()[:16]


def task_keys(tasks: Sequence[object]) -> list[str]:
    """A name for each task: its :func:`task_key`, or its place where it has none.

    Args:
        tasks: The tasks.

    Returns:
        One name a task; the same for identical tasks.

    Example:
        >>> task_keys([object(), object()])
        ['task 0', 'task 1']
    """
    return [task_key(task) or f"task {index}" for index, task in enumerate(tasks)]


def check_tasks(keys: Sequence[str], held_out: Sequence[str]) -> list[str]:
    """What is wrong with a list of tasks; identical ones are warned of.

    Args:
        keys: Names of tasks to tune on.
        held_out: Names of tasks to judge by.

    Returns:
        Problems in words.

    Example:
        >>> check_tasks(["a"], ["b"])
        ['at least 2 tasks are needed, got 1']
    """
    problems = [] if len(keys) > 1 else [f"at least 2 tasks are needed, got {len(keys)}"]
    both = sorted(set(keys) & set(held_out))
    if both:
        problems.append(f"tasks to judge by must not be tuned on: {', '.join(both)}")
    if len(set(keys)) < len(keys):
        warnings.warn(
            f"{len(keys) - len(set(keys))} of {len(keys)} tasks repeat others: they are not independent, so no bound "
            "holds for their number",
            stacklevel=3,
        )
    return problems


def _parts(value: Any) -> Iterator[bytes]:
    """The contents one after the other, each announced by its type and size."""
    if value is None or isinstance(value, bool | int | float | str | bytes):
        yield f"{type(value).__name__} {value!r}".encode()
    elif isinstance(value, Tensor):
        yield f"{value.dtype} {tuple(value.shape)}".encode()
        yield value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    elif isinstance(value, Mapping):
        yield f"mapping {len(value)}".encode()
        for name in sorted(value, key=repr):
            yield from _parts(name)
            yield from _parts(value[name])
    elif isinstance(value, list | tuple):
        yield f"sequence {len(value)}".encode()
        for item in value:
            yield from _parts(item)
    elif is_dataclass(value) and not isinstance(value, type):
        yield type(value).__qualname__.encode()
        yield from _parts({field.name: getattr(value, field.name) for field in fields(value)})
    else:
        raise TypeError(f"{type(value).__name__} has no contents that are known")
