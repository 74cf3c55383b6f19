"""Attributes that are hidden and found again: the draw, and the error."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["AttributeMask", "draw_mask", "scaled_cosine_errors"]


class AttributeMask(NamedTuple):
    """Which nodes hide their attributes, and how.

    Args:
        masked: Nodes that are to be reconstructed, shape ``(M,)``.
        replaced: Those of them that show another node's attributes instead of the token; shape ``(R,)``.
        sources: Whose attributes they show, shape ``(R,)``.
    """

    masked: Tensor
    replaced: Tensor
    sources: Tensor

    @property
    def tokens(self) -> Tensor:
        """Masked nodes that show the token, shape ``(M - R,)``: those after the replaced ones."""
        return self.masked[len(self.replaced) :]


def draw_mask(
    num_nodes: int, rate: float, replace_rate: float = 0.0, generator: torch.Generator | None = None
) -> AttributeMask:
    r"""Draws :math:`\lfloor r N \rfloor` nodes without replacement.

    Args:
        num_nodes: N.
        rate: Share r of nodes to mask.
        replace_rate: Share of the masked nodes that get another node's attributes; rounded down.
        generator: On the CPU, so that devices agree.

    Returns:
        Node numbers on the CPU.

    Raises:
        ValueError: If a rate is out of range, or no node would be masked, or none left.

    Example:
        >>> mask = draw_mask(10, 0.55, replace_rate=0.2, generator=torch.Generator().manual_seed(0))
        >>> len(mask.masked), len(mask.replaced), len(mask.tokens)
        (5, 1, 4)
    """
    count = int(rate * num_nodes) if 0 < rate < 1 else 0
    problems = []
    if not 0 < rate < 1:
        problems.append(f"mask_rate must lie between 0 and 1, got {rate!r}")
    elif not 0 < count < num_nodes:
        problems.append(f"mask_rate {rate!r} masks {count} of {num_nodes} nodes: some must be masked and some kept")
    if not 0 <= replace_rate < 1:
        problems.append(f"replace_rate must be at least 0 and below 1, got {replace_rate!r}")
    if problems:
        raise ValueError("; ".join(problems))
    masked = torch.randperm(num_nodes, generator=generator)[:count]
    replaced = masked[: int(replace_rate * count)]  # at the front: a slice from the end would be all of them for 0
    sources = torch.randint(num_nodes, (len(replaced),), generator=generator)
    return AttributeMask(masked, replaced, sources)


def scaled_cosine_errors(reconstruction: Tensor, target: Tensor, gamma: float = 3.0) -> tuple[Tensor, Tensor]:
    r"""Sum of :math:`(1 - \cos(\hat x_i, x_i))^\gamma` over rows, and how many rows there are.

    Rows whose target is zero have no direction and do not count. The mean is the quotient; on several ranks, of both
    sums over all of them.

    Args:
        reconstruction: Shape ``(M, F)``; half precision is computed in float32.
        target: Shape ``(M, F)``.
        gamma: At least 1: how much more large errors count.

    Returns:
        Two scalars.

    References:
        Hou et al., "GraphMAE: Self-Supervised Masked Graph Autoencoders", KDD 2022.

    Example:
        >>> scaled_cosine_errors(torch.eye(2), torch.tensor([[1.0, 0.0], [0.0, -1.0]]), gamma=2.0)
        (tensor(4.), tensor(2.))
    """
    dtype = torch.float64 if reconstruction.dtype == torch.float64 else torch.float32
    found, right = reconstruction.to(dtype), target.to(dtype)
    there = right.square().sum(1) > 0
    cosine = F.cosine_similarity(found, right, dim=1, eps=1e-12)
    # Rounding may take the cosine above 1, where a fractional power has no value.
    errors = (1 - cosine).clamp_min(0).pow(gamma)
    return torch.where(there, errors, errors.new_zeros(())).sum(), there.sum().to(dtype)
