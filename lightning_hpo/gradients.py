"""Norms of the gradients of single micro-batches, read while the user's own backward pass runs."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

__all__ = ["GroupNorms", "squared_norm", "sum_of_squares"]

_SMALL = 2**14  # numbers; a call takes longer than the sum


def squared_norm(tensors: Iterable[Tensor]) -> Tensor:
    """Sum of the squares of all entries, in float64, without a copy of the tensors.

    Args:
        tensors: Any shapes, on one device.

    Returns:
        A scalar on that device.

    Example:
        >>> squared_norm([torch.tensor([3.0]), torch.tensor([0.0, 4.0])])
        tensor(25., dtype=torch.float64)
    """
    wide = [tensor.detach() if tensor.dtype.itemsize >= 4 else tensor.detach().float() for tensor in tensors]
    return sum_of_squares(torch._foreach_norm(wide))


class GroupNorms:
    """Squared norm of each micro-batch's own gradient, on this rank, before it is added up or averaged.

    A hook on each parameter sees the gradient of one backward pass alone: before it is accumulated, before ranks
    average it, and still multiplied by what the loss was multiplied by. It costs one reduction a parameter.

    Args:
        parameters: Those that are trained.

    Example:
        >>> weight = torch.zeros(2, requires_grad=True)
        >>> norms = GroupNorms([weight])
        >>> for factor in (1.0, 2.0):
        ...     (factor * weight.sum()).backward()
        ...     round(norms.take().item(), 6)
        2.0
        8.0
        >>> norms.remove()
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self.enabled = True
        self._norms: list[Tensor] = []
        self._small: list[Tensor] = []  # gradients, all of whose norms one call takes later
        trained = [p for p in parameters if p.requires_grad]
        self._device = trained[0].device if trained else torch.device("cpu")
        self._handles: list[RemovableHandle] = [p.register_hook(self._note) for p in trained]

    def _note(self, gradient: Tensor) -> None:
        if not self.enabled:
            return
        if gradient.numel() < _SMALL:
            self._small.append(gradient.detach())
        else:  # at once: autograd would copy a gradient that somebody holds
            # half precision would overflow; float32 is what the sum is taken in
            self._norms.append(torch.linalg.vector_norm(gradient.detach(), dtype=_wide(gradient.dtype)))

    def norms(self) -> list[Tensor]:
        """Norms that add up to that of the latest backward pass, as scalars; take their squares once a window."""
        norms, small = self._norms, self._small
        self.clear()
        if small:
            norms += torch._foreach_norm([gradient.to(_wide(gradient.dtype)) for gradient in small])
        return norms

    def take(self) -> Tensor:
        """The sum of squares over all parameters of the latest backward pass, a scalar in float64."""
        norms = self.norms()
        return sum_of_squares(norms) if norms else torch.zeros((), dtype=torch.double, device=self._device)

    def clear(self) -> None:
        """Forgets what has been noted."""
        self._norms, self._small = [], []

    def remove(self) -> None:
        """Removes the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.clear()


def sum_of_squares(norms: Sequence[Tensor]) -> Tensor:
    """Sum of the squares of at least one scalar, in float64.

    Args:
        norms: Scalars on one device.

    Returns:
        A scalar on that device.

    Example:
        >>> sum_of_squares([torch.tensor(3.0), torch.tensor(4.0)])
        tensor(25., dtype=torch.float64)
    """
    return torch.linalg.vector_norm(torch.stack(tuple(norms)), dtype=torch.double).square()


def _wide(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype.itemsize >= 4 else torch.float32
