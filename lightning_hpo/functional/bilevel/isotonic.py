"""Isotonic regression by pooling adjacent violators."""

import torch
from torch import Tensor

from lightning_hpo.functional.bilevel.transforms import black_box

__all__ = ["isotonic_l2"]


def isotonic_l2(x: Tensor, increasing: bool = True) -> Tensor:
    r"""Projection on the monotone vectors: :math:`\arg\min \|p - x\|^2` with :math:`p_1 \le p_2 \le \dots`.

    The solution is constant on blocks, at the mean of x; its derivative averages within them. Blocks are found on the
    host, in linear time.

    Args:
        x: Shape ``(..., d)``; the last dimension is ordered.
        increasing: Whether the order is ascending.

    Returns:
        The shape of ``x``.

    Raises:
        ValueError: If x is not finite.

    References:
        Best and Chakravarti, "Active Set Algorithms for Isotonic Regression", 1990; Blondel et al., "Fast
        Differentiable Sorting and Ranking", ICML 2020, for the derivative.

    Example:
        >>> isotonic_l2(torch.tensor([1.0, 3.0, 2.0, 4.0]))
        tensor([1.0000, 2.5000, 2.5000, 4.0000])
    """
    if not increasing:
        return -isotonic_l2(-x)
    block = black_box(lambda plain: torch.stack([pool(row) for row in plain.reshape(-1, plain.shape[-1])]), x)
    block = block.reshape(x.shape).to(x.device)
    sums = torch.zeros_like(x).scatter_add(-1, block, x)
    sizes = torch.zeros_like(x).scatter_add(-1, block, torch.ones_like(x))
    return torch.gather(sums, -1, block) / torch.gather(sizes, -1, block)


def pool(row: Tensor) -> Tensor:
    """Number of the block of each entry."""
    if not bool(torch.isfinite(row).all()):
        raise ValueError("isotonic regression needs finite values")
    totals: list[float] = []
    sizes: list[int] = []
    for value in row.tolist():
        totals.append(value)
        sizes.append(1)
        while len(sizes) > 1 and totals[-2] * sizes[-1] >= totals[-1] * sizes[-2]:
            total, size = totals.pop(), sizes.pop()
            totals[-1] += total
            sizes[-1] += size
    return torch.repeat_interleave(torch.tensor(sizes))
