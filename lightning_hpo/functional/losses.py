"""What every method asks of a loss."""

from typing import Any

from torch import Tensor

__all__ = ["scalar_of"]


def scalar_of(value: Any, name: str) -> Tensor:
    """A loss as a tensor without dimensions.

    Args:
        value: What a loss function returned.
        name: What to call it in an error.

    Returns:
        The value, of shape ``()``.

    Raises:
        ValueError: If it is not a tensor of one element.

    Example:
        >>> import torch
        >>> scalar_of(torch.ones(1, 1), "the loss")
        tensor(1.)
    """
    if not isinstance(value, Tensor) or value.numel() != 1:
        shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{name} must be a scalar tensor, got {shape}")
    return value.reshape(())
