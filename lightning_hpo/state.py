"""What an object remembers, in the plain types that weights-only loading accepts, and back."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["restored", "saved"]


def saved(value: Any, name: str) -> Any:
    """A deep copy of an object's state.

    Args:
        value: Something with ``state_dict``, or a tensor, container, number, string or ``None``.
        name: What to call it in the error.

    Returns:
        Tensors, dicts, lists, tuples, numbers, strings and ``None`` only.

    Raises:
        TypeError: If anything else is inside; it is named with its place.

    Example:
        >>> saved({"seen": (3, torch.zeros(2))}, name="counter")
        {'seen': (3, tensor([0., 0.]))}
    """
    if hasattr(value, "state_dict"):
        value = value.state_dict()
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, Mapping):
        return {key: saved(item, f"{name}[{key!r}]") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        items = [saved(item, f"{name}[{i}]") for i, item in enumerate(value)]
        return tuple(items) if isinstance(value, tuple) else items
    if value is None or type(value) in (bool, int, float, complex, str, bytes):
        return value
    raise TypeError(
        f"`{name}` is a `{type(value).__name__}`; state holds tensors, containers, numbers and strings only"
    )


def restored(value: Any, state: Any, name: str) -> Any:
    """The object with its saved state: the same object where it can take the state in, else a copy of the state.

    Args:
        value: The object as it is now.
        state: What :func:`saved` gave; ``None`` leaves an object with ``load_state_dict`` as it is.
        name: What to call it in an error.

    Returns:
        What to store in the object's place.

    Example:
        >>> average = torch.zeros(2)
        >>> restored(average, torch.ones(2), name="average") is average, average
        (True, tensor([1., 1.]))
    """
    if hasattr(value, "load_state_dict"):
        if state is not None:  # None: the checkpoint is older than the object
            value.load_state_dict(state)
        return value
    if isinstance(value, Tensor) and isinstance(state, Tensor) and value.shape == state.shape:
        with torch.no_grad():
            return value.copy_(state)  # in place: an optimizer may hold this very tensor
    return saved(state, name)
