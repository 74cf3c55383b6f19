"""Projection on the section of a box by a hyperplane."""

import torch
from torch import Tensor

from lightning_hpo.functional.bilevel.sets import require

__all__ = ["projection_box_section"]


def projection_box_section(
    x: Tensor, hyper: tuple[float | Tensor, float | Tensor, float | Tensor, float | Tensor]
) -> Tensor:
    r"""On :math:`\{l \le p \le u, w^\top p = c\}`, along the last dimension: :math:`\mathrm{clip}(w \tau + x, l, u)`.

    Bisection finds which entries lie strictly between their bounds; the root :math:`\tau` of :math:`w^\top p = c` is
    then linear in everything, which makes it exact and gives the derivative.

    Args:
        x: Shape ``(..., d)``.
        hyper: Bounds l and u, weights w, of shapes that broadcast with ``x``, and c, a number or of shape ``(...)``.

    Returns:
        The shape of ``x``.

    Raises:
        ValueError: If the set is empty; all reasons are listed.

    References:
        Brucker, "An O(n) Algorithm for Quadratic Knapsack Problems", 1984.

    Example:
        >>> projection_box_section(torch.tensor([0.9, 0.3, 0.0]), (0.0, 0.6, 1.0, 1.0))
        tensor([0.6000, 0.3500, 0.0500])
    """
    lower, upper, weights = (torch.as_tensor(part, dtype=x.dtype, device=x.device).expand_as(x) for part in hyper[:3])
    level = torch.as_tensor(hyper[3], dtype=x.dtype, device=x.device).expand(x.shape[:-1])[..., None]
    ends = (weights * lower, weights * upper)
    slack = 10 * torch.finfo(x.dtype).eps * (ends[0].abs() + ends[1].abs()).sum(-1, keepdim=True)
    least, most = (pick(*ends).sum(-1, keepdim=True) for pick in (torch.minimum, torch.maximum))
    require(
        ("the box is empty: a lower bound exceeds its upper bound", lower <= upper),
        ("no point of the box has the weighted sum asked for", (least - slack <= level) & (level <= most + slack)),
    )
    shift = bisect(*(part.detach() for part in (x, lower, upper, weights, level)))
    moved = x.detach() + weights.detach() * shift
    free = (moved > lower.detach()) & (moved < upper.detach())
    bound = torch.where(moved <= lower, lower, upper)
    slope = torch.where(free, weights.square(), 0.0).sum(-1, keepdim=True)
    rest = level - torch.where(free, weights * x, weights * bound).sum(-1, keepdim=True)
    exact = torch.where(slope > 0, rest / torch.where(slope > 0, slope, torch.ones_like(slope)), shift)
    return torch.where(free, (x + weights * exact).clamp(lower.detach(), upper.detach()), bound)


def bisect(x: Tensor, lower: Tensor, upper: Tensor, weights: Tensor, level: Tensor) -> Tensor:
    """Where the weighted sum, which does not fall in the shift, reaches its level; up to the rounding of the dtype."""
    used = weights != 0
    safe = torch.where(used, weights, torch.ones_like(weights))
    kinks = torch.cat([torch.where(used, (end - x) / safe, torch.zeros_like(x)) for end in (lower, upper)], -1)
    left, right = kinks.amin(-1, keepdim=True), kinks.amax(-1, keepdim=True)
    for _ in range(torch.finfo(x.dtype).bits):  # more halvings than the mantissa has digits
        middle = (left + right) / 2
        total = (weights * torch.clamp(x + weights * middle, lower, upper)).sum(-1, keepdim=True)
        left, right = torch.where(total < level, middle, left), torch.where(total < level, right, middle)
    return (left + right) / 2
