"""A number of a layer that may be fixed, learned like a weight, or read from elsewhere in each pass."""

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["Setting", "current", "setting_problems"]

Setting = float | Tensor | Callable[[], Tensor]


def current(setting: Setting) -> float | Tensor:
    """What a setting is now.

    Args:
        setting: A number, a tensor, or a function that returns one.

    Returns:
        The number or tensor.

    Example:
        >>> current(0.5), current(lambda: torch.tensor(2.0))
        (0.5, tensor(2.))
    """
    return setting() if callable(setting) else setting


def setting_problems(name: str, setting: Setting, inside: Callable[[Tensor], Tensor], demand: str) -> list[str]:
    """What is wrong with a setting; functions are not asked.

    Args:
        name: Its name.
        setting: The setting.
        inside: Which values may be.
        demand: The same in words, after "must".

    Returns:
        Problems in words.

    Example:
        >>> setting_problems("width", -1.0, lambda x: x > 0, "be positive")
        ['width must be positive, got -1.0']
    """
    if not isinstance(setting, Tensor):
        values = None if callable(setting) else torch.tensor(float(setting), dtype=torch.float64)
    elif setting.requires_grad and not setting.is_leaf:
        return [f"{name} is the result of one computation, whose graph the first backward frees: give a function"]
    else:
        values = setting.detach()
    wrong = values is not None and not bool((inside(values) & values.isfinite()).all())
    return [f"{name} must {demand}, got {setting!r}"] if wrong else []
