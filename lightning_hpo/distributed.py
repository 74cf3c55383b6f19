"""The only file that talks to other ranks; without an initialised process group every function is the identity.

Everything copies: an argument is never changed in place, except the gradients in :func:`mean_gradients`.
Every function is a collective: call it on all ranks or on none.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = [
    "agree",
    "broadcast",
    "device",
    "gather",
    "in_one_message",
    "mean",
    "mean_gradients",
    "minimum",
    "rank",
    "sum",
    "sum_with_gradient",
    "world_size",
]


def world_size() -> int:
    """Number of ranks; 1 without a process group.

    Example:
        >>> world_size()
        1
    """
    return dist.get_world_size() if _initialized() else 1


def rank() -> int:
    """This process's number; 0 without a process group.

    Example:
        >>> rank()
        0
    """
    return dist.get_rank() if _initialized() else 0


def device() -> torch.device:
    """Where tensors must be to be sent: this rank's CUDA device with NCCL, else the CPU.

    Example:
        >>> device()
        device(type='cpu')
    """
    if _initialized() and dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def sum(tensor: Tensor) -> Tensor:  # noqa: A001 - read as `distributed.sum`
    """Sum over ranks.

    Args:
        tensor: Any shape and number type, the same on every rank.

    Returns:
        A new tensor of the same shape, detached.

    Example:
        >>> sum(torch.tensor([1, 2]))
        tensor([1, 2])
    """
    total = tensor.detach().clone(memory_format=torch.contiguous_format)
    if world_size() > 1:
        dist.all_reduce(total)
    return total


def sum_with_gradient(tensor: Tensor) -> Tensor:
    """Sum over ranks that is differentiated, for losses that are no mean over samples.

    The gradient of every rank's share is multiplied by the number of ranks, which takes back the mean that
    ``DistributedDataParallel`` takes later: the ranks together then follow the gradient of the loss of all samples.
    What is computed from the sum must be alike on all ranks. Nothing is sent in the backward pass.

    Args:
        tensor: Any shape, floating point, the same shape on every rank.

    Returns:
        A new tensor of the same shape.

    Example:
        >>> share = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> sum_with_gradient(share).square().sum().backward()
        >>> share.grad
        tensor([2., 4.])
    """
    return tensor if world_size() == 1 else _SumOverRanks.apply(tensor)


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(_: Any, tensor: Tensor) -> Tensor:
        return sum(tensor)

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> Tensor:
        return gradient * world_size()


def mean(tensor: Tensor) -> Tensor:
    """Mean over ranks.

    Args:
        tensor: Any shape, floating point or complex, the same shape on every rank.

    Returns:
        A new tensor of the same shape, detached.

    Raises:
        ValueError: For integer tensors, whose mean would be truncated.

    Example:
        >>> mean(torch.tensor([1.0, 2.0]))
        tensor([1., 2.])
    """
    if not (tensor.is_floating_point() or tensor.is_complex()):
        raise ValueError(f"the mean of a tensor of type {tensor.dtype} would be truncated; convert it with `.float()`")
    return sum(tensor).div_(world_size())


def minimum(tensor: Tensor) -> Tensor:
    """Smallest value over ranks, entry by entry.

    Args:
        tensor: Any shape and real number type, the same on every rank.

    Returns:
        A new tensor of the same shape, detached.

    Example:
        >>> minimum(torch.tensor([1, 2]))
        tensor([1, 2])
    """
    least = tensor.detach().clone(memory_format=torch.contiguous_format)
    if world_size() > 1:
        dist.all_reduce(least, op=dist.ReduceOp.MIN)
    return least


def gather(tensor: Tensor) -> Tensor:
    """Every rank's tensor, in the order of ranks.

    Where first dimensions differ (checked on all ranks), the results are concatenated along the first dimension, since
    they cannot be stacked.

    Args:
        tensor: ``(...)`` or ``(n_r, ...)`` where only ``n_r`` may differ between ranks.

    Returns:
        ``(ranks, ...)``, or ``(sum of n_r, ...)`` where the first dimensions differ.

    Example:
        >>> gather(torch.tensor([1.0, 2.0])).shape
        torch.Size([1, 2])
    """
    tensor = tensor.detach().contiguous()
    if world_size() == 1:
        return tensor.clone()[None]
    length = tensor.shape[0] if tensor.ndim else 0
    lengths = _all_gather(torch.tensor([length], device=tensor.device)).flatten().tolist()
    if len(set(lengths)) == 1:
        return _all_gather(tensor)
    padding = tensor.new_zeros(max(lengths) - length, *tensor.shape[1:])
    rows = _all_gather(torch.cat([tensor, padding]))
    return torch.cat([row[:n] for row, n in zip(rows, lengths, strict=True)])


def agree(value: bool, device: torch.device | str = "cpu") -> bool:
    """Whether ``value`` is true on every rank.

    Args:
        value: This rank's opinion.
        device: Where the vote is counted; NCCL needs this rank's CUDA device.

    Returns:
        The same answer on every rank.

    Example:
        >>> agree(True), agree(False)
        (True, False)
    """
    return bool(sum(torch.tensor(int(value), device=device)).item() == world_size())


def broadcast(tensor: Tensor, source: int = 0) -> Tensor:
    """The tensor of rank ``source``, on every rank.

    Args:
        tensor: The same shape and type on every rank.
        source: Whose values to take.

    Returns:
        A new tensor of the same shape, detached.

    Raises:
        ValueError: If there is no rank ``source``.

    Example:
        >>> broadcast(torch.tensor(3.0))
        tensor(3.)
    """
    if not 0 <= source < world_size():
        raise ValueError(f"source must be one of the {world_size()} ranks, got {source}")
    copy = tensor.detach().clone(memory_format=torch.contiguous_format)
    if world_size() > 1:
        dist.broadcast(copy, src=source)
    return copy


def in_one_message(send: Callable[[Tensor], Tensor], parts: Sequence[Tensor]) -> list[Tensor]:
    """Sends several tensors as one.

    Args:
        send: A function of a vector that keeps its shape, such as :func:`sum` or :func:`broadcast`.
        parts: Tensors of one type and device, of the same shapes on every rank.

    Returns:
        What comes back, in the shapes of the parts.

    Example:
        >>> in_one_message(sum, [torch.tensor(1), torch.tensor([[2, 3]])])
        [tensor(1), tensor([[2, 3]])]
    """
    pieces = send(torch.cat([part.reshape(-1) for part in parts])).split([part.numel() for part in parts])
    return [piece.view_as(part) for piece, part in zip(pieces, parts, strict=True)]


@torch.no_grad()
def mean_gradients(parameters: Iterable[Tensor]) -> None:
    """Averages ``.grad`` over ranks, in one message for each type and device.

    A gradient that is missing counts as zero, and is there afterwards if there is more than one rank, so that ranks
    whose losses do not touch the same parameters still take the same step.

    Args:
        parameters: The same tensors in the same order on every rank.

    Example:
        >>> weight = torch.zeros(2, requires_grad=True)
        >>> weight.sum().backward()
        >>> mean_gradients([weight])
        >>> weight.grad
        tensor([1., 1.])
    """
    if world_size() == 1:
        return
    groups: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for parameter in parameters:
        groups.setdefault((parameter.dtype, parameter.device), []).append(parameter)
    for group in groups.values():
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in group])
        averaged = mean(flat).split([p.numel() for p in group])
        for parameter, values in zip(group, averaged, strict=True):
            if parameter.grad is None:
                parameter.grad = torch.empty_like(parameter)
            parameter.grad.copy_(values.view_as(parameter))


def _initialized() -> bool:
    return dist.is_available() and dist.is_initialized()


def _all_gather(tensor: Tensor) -> Tensor:
    copies = [torch.empty_like(tensor) for _ in range(world_size())]
    dist.all_gather(copies, tensor)
    return torch.stack(copies)
