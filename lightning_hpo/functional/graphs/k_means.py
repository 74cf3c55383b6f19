"""Centres of a cloud of points: where a readout of communities begins."""

import torch
from torch import Tensor

__all__ = ["k_means"]


def k_means(points: Tensor, count: int, generator: torch.Generator | None = None, iterations: int = 30) -> Tensor:
    """Centres by k-means++ and Lloyd's iterations.

    A centre that loses all of its points stays where it is. Points stay on their device, and draws come from a
    generator whose position can be saved.

    Args:
        points: Shape ``(N, F)``.
        count: Number of centres, at most N.
        generator: On the CPU, so that devices agree.
        iterations: Lloyd's iterations; with 0 the centres are those of k-means++.

    Returns:
        Centres, shape ``(count, F)``.

    Raises:
        ValueError: If there are fewer points than centres, or points are not finite.

    References:
        Arthur and Vassilvitskii, "k-means++: The Advantages of Careful Seeding", SODA 2007.

    Example:
        >>> points = torch.tensor([[0.0], [1.0], [10.0], [11.0]])
        >>> k_means(points, 2, torch.Generator().manual_seed(0)).sort(0).values
        tensor([[ 0.5000],
                [10.5000]])
    """
    if not 1 <= count <= len(points):
        raise ValueError(f"count must lie between 1 and the {len(points)} points, got {count}")
    if not points.isfinite().all():
        raise ValueError("points must be finite")
    centres = _careful_seeds(points, count, generator)
    for _ in range(iterations):
        nearest = torch.cdist(points, centres).argmin(1)
        sizes = nearest.bincount(minlength=count).to(points.dtype)
        sums = torch.zeros_like(centres).index_add_(0, nearest, points)
        centres = torch.where(sizes[:, None] > 0, sums / sizes.clamp_min(1)[:, None], centres)
    return centres


def _careful_seeds(points: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
    """Each next centre is a point, the likelier the farther it is from those there are, squared."""
    draws = torch.rand(count, generator=generator, dtype=torch.float64).to(points.device)
    chosen = (draws[:1] * len(points)).long()
    distance = (points - points[chosen]).square().sum(1)
    seeds = [chosen]
    for draw in draws[1:]:
        weights = distance.double().cumsum(0)
        # Where all points are on centres, every point is as good as another.
        chosen = torch.searchsorted(weights, draw * weights[-1], right=True).clamp_max(len(points) - 1)[None]
        distance = torch.minimum(distance, (points - points[chosen]).square().sum(1))
        seeds.append(chosen)
    return points[torch.cat(seeds)]
