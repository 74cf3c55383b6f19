"""Norms of gradients of which every rank holds a part."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_hpo import distributed
from lightning_hpo.gradients import squared_norm

__all__ = ["ShardedGradients", "shard_problems"]


def shard_problems(parameters: Iterable[Tensor]) -> list[str]:
    """Why the norms of sharded gradients cannot be taken; empty if they can.

    Args:
        parameters: Those that are trained.

    Returns:
        One sentence a problem, each with what to change.

    Example:
        >>> shard_problems([torch.zeros(3)])
        []
    """
    for parameter in parameters:
        if isinstance(parameter, DTensor) and _parts(parameter) != distributed.world_size():
            return [
                f"parameters are shared out over {_parts(parameter)} of {distributed.world_size()} ranks; shard them "
                "over all ranks, without replicas or tensor parallelism, or use `strategy='ddp'`."
            ]
    return []


class ShardedGradients:
    r"""Squared norms of micro-batches' gradients, averaged over ranks, where each rank holds a part of the gradient.

    Strategies that shard parameters average a micro-batch's gradient over ranks and add it up out of the sight of
    tensor hooks. So the sum so far is copied before a backward pass and compared with the sum after it. A group is
    a micro-batch of all ranks together: a step over :math:`K` micro-batches has :math:`K` groups.

    Args:
        parameters: Those that are trained.

    References:
        Lau et al., "Adaptive Batch Size Schedules for Distributed Training of Language Models with Data and Model
        Parallelism", CPAL 2025.

    Example:
        >>> weight = torch.zeros(4, requires_grad=True)
        >>> gradients = ShardedGradients([weight])
        >>> for factor in (1.0, 3.0):
        ...     gradients.before_backward()
        ...     (factor * weight.sum()).backward()
        ...     gradients.after_backward()
        >>> [found.item() for found in gradients.read(sizes=[8, 8], unscale=2.0)]
        [1280.0, 64.0]

    which is 8 * (4 + 36) * 2**2, and the square of (4, 4, 4, 4).
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self.enabled = True
        self._parameters = list(parameters)
        self._before: list[Tensor | None] = []
        self._squares: list[Tensor] = []

    def clear(self) -> None:
        """Begins a window: the next backward pass begins from nothing, whatever gradients there are."""
        self._before, self._squares = [], []

    @torch.no_grad()
    def before_backward(self) -> None:
        """Notes the sum so far; call it where nothing changes gradients any more before they are added to."""
        if self.enabled and self._squares:
            self._before = [None if g is None else g.clone() for g in self._local()]

    @torch.no_grad()
    def after_backward(self) -> None:
        """Notes what one backward pass has added."""
        if not self.enabled:
            return
        before = self._before or [None] * len(self._parameters)
        pairs = [(g, b) for g, b in zip(self._local(), before, strict=True) if g is not None]
        added = [g if b is None else g - b for g, b in pairs]
        self._squares.append(squared_norm(added) if added else self._zero())
        self._before = []

    def read(self, sizes: Sequence[int], unscale: Tensor | float) -> tuple[Tensor, Tensor]:
        """Sums over the window and over ranks, in one message.

        Args:
            sizes: Samples of the window's micro-batches on this rank.
            unscale: What turns what a backward pass adds into the gradient of its micro-batch's mean loss.

        Returns:
            The sum of n_j |g_j|^2 over the micro-batches, n_j over all ranks, and the squared norm of the gradient.
        """
        gradients = [g for g in self._local() if g is not None]
        square = squared_norm(gradients) if gradients else self._zero()
        counts = torch.tensor(sizes, dtype=torch.double, device=square.device)
        local = torch.cat([torch.stack([*self._squares, square]), counts])
        squares, square, counts = distributed.sum(local).split([len(sizes), 1, len(sizes)])
        return (squares * counts).sum() * (unscale * unscale), square.squeeze(0)

    def _local(self) -> list[Tensor | None]:
        gradients = [p.grad for p in self._parameters]
        return [g.to_local() if isinstance(g, DTensor) else g for g in gradients]

    def _zero(self) -> Tensor:
        return torch.zeros((), dtype=torch.double, device=self._parameters[0].device)


def _parts(parameter: DTensor) -> int:
    """Ranks that hold different parts of a parameter."""
    parts = 1
    for dimension, placement in enumerate(parameter.placements):
        if placement.is_shard():
            parts *= parameter.device_mesh.size(dimension)
    return parts
