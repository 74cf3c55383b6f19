"""Norms of the gradients of single micro-batches, read while the user's own backward pass runs."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

__all__ = ["GroupNorms", "squared_norm", "sum_of_squares"]

_SMALL = 2**14  # numbers; a call takes longer than the sum
_KEPT = 64  # small gradients that are held at most until their norm is taken


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
    return sum_of_squares(_norms(tensor.detach() for tensor in tensors))


class GroupNorms:
    r"""Sum of :math:`n_j \|g_j\|^2` over micro-batches, on this rank, before gradients add up or are averaged.

    A hook on each parameter sees the gradient of one backward pass alone: before it is accumulated, before ranks
    average it, and still multiplied by what the loss was multiplied by. It costs one reduction a large parameter;
    small gradients are kept and reduced together.

    Args:
        parameters: Those that are trained.

    Example:
        >>> weight = torch.zeros(2, requires_grad=True)
        >>> norms = GroupNorms([weight])
        >>> for factor, samples in ((1.0, 10), (2.0, 5)):
        ...     (factor * weight.sum()).backward()
        ...     norms.close(samples)
        >>> round(norms.weighted_squares().item(), 4)
        60.0
        >>> norms.remove()
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self.enabled = True
        trained = [p for p in parameters if p.requires_grad]
        self._device = trained[0].device if trained else torch.device("cpu")
        hooks = [self._note_small if p.numel() < _SMALL else self._note for p in trained]
        self._handles: list[RemovableHandle] = [p.register_hook(hook) for p, hook in zip(trained, hooks, strict=True)]
        self._norms: list[Tensor] = []  # of large gradients of the micro-batch that runs
        self._small: list[Tensor] = []  # its small gradients
        self._closed: dict[int, tuple[list[Tensor], list[Tensor]]] = {}  # both, of those before, by their samples

    def _note_small(self, gradient: Tensor) -> None:
        if self.enabled:
            self._small.append(gradient)

    def _note(self, gradient: Tensor) -> None:
        """Takes the norm at once: autograd would copy a gradient that somebody holds."""
        if self.enabled:
            self._norms.append(_norm(gradient.detach()))

    def close(self, samples: int) -> None:
        """Ends a micro-batch: what has been noted since the one before is its gradient.

        Args:
            samples: The weight :math:`n_j` of its squared norm.
        """
        if not self.enabled:
            return
        norms, small = self._closed.setdefault(samples, ([], []))
        norms += self._norms
        small += self._small
        self.drop()
        if len(small) > _KEPT:
            norms.append(_norm(torch.cat([gradient.flatten() for gradient in small]).detach()))
            small.clear()

    def drop(self) -> None:
        """Forgets what has been noted since the last micro-batch: ``torch.autograd.grad`` runs the hooks, too."""
        self._norms, self._small = [], []

    def weighted_squares(self) -> Tensor:
        """The sum over the micro-batches since :meth:`clear`, a scalar in float64."""
        total = torch.zeros((), dtype=torch.double, device=self._device)
        for samples, (norms, small) in self._closed.items():
            if norms or small:
                total = total + sum_of_squares([*norms, *_norms(small)]) * samples
        return total.detach()

    def clear(self) -> None:
        """Forgets what has been noted."""
        self.drop()
        self._closed = {}

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


def _norms(tensors: Iterable[Tensor]) -> Sequence[Tensor]:
    wide = [tensor if tensor.dtype.itemsize >= 4 else tensor.float() for tensor in tensors]
    return torch._foreach_norm(wide) if wide else []


def _norm(tensor: Tensor) -> Tensor:
    """In float32 at least: half precision would overflow."""
    return torch.linalg.vector_norm(tensor, dtype=None if tensor.dtype.itemsize >= 4 else torch.float32)
