"""Checks that the sets to project on are not empty."""

import torch
from torch import Tensor

__all__ = ["require"]


def require(*checks: tuple[str, bool | Tensor]) -> None:
    """Refuses empty sets: raises with every message whose condition does not hold everywhere.

    Conditions on another device are not looked at, which would make the host wait for it, nor those under
    :func:`torch.func.vmap`.

    Args:
        checks: What is wrong if not, and the condition.

    Raises:
        ValueError: If a condition does not hold; all are listed.

    Example:
        >>> require(("radius must be positive", True), ("lower must not exceed upper", torch.tensor([True, False])))
        Traceback (most recent call last):
        ValueError: lower must not exceed upper
    """
    problems = [message for message, condition in checks if not holds(condition)]
    if problems:
        raise ValueError("; ".join(problems))


def holds(condition: bool | Tensor) -> bool:
    """Whether a condition holds, as far as the host can see it."""
    if not isinstance(condition, Tensor):
        return bool(condition)
    if condition.device.type != "cpu":
        return True
    try:
        return bool(torch.all(condition))
    except RuntimeError:  # vmap refuses to show the values
        return True
