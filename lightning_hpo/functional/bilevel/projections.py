r"""Euclidean projections :math:`\mathrm{proj}_C(x) = \arg\min_{p \in C} \|p - x\|^2` on simple sets.

All have the form ``projection(x, hyper)``, where ``hyper`` describes the set, are differentiable in both in reverse and
in forward mode and under :func:`torch.func.vmap`, and give no NaN. Vectors lie along the last dimension, the others are
batch dimensions.
"""

import torch
from torch import Tensor

from lightning_hpo.functional.bilevel.sets import require

__all__ = [
    "projection_box",
    "projection_kl_simplex",
    "projection_l1_ball",
    "projection_l2_ball",
    "projection_l2_sphere",
    "projection_linf_ball",
    "projection_non_negative",
    "projection_simplex",
    "projection_sparse_simplex",
]


def projection_non_negative(x: Tensor, hyper: None = None) -> Tensor:  # noqa: ARG001
    """On the non-negative orthant.

    Args:
        x: Any shape.
        hyper: Not used.

    Returns:
        The shape of ``x``.

    Example:
        >>> projection_non_negative(torch.tensor([1.0, -1.0]))
        tensor([1., 0.])
    """
    return torch.relu(x)


def projection_box(x: Tensor, hyper: tuple[float | Tensor, float | Tensor]) -> Tensor:
    r"""On the box :math:`l \le p \le u`.

    Args:
        x: Any shape.
        hyper: The bounds :math:`(l, u)`, each of a shape that broadcasts with ``x``.

    Returns:
        The shape of ``x``.

    Raises:
        ValueError: If a lower bound exceeds its upper one.

    Example:
        >>> projection_box(torch.tensor([1.0, -1.0, 0.3]), (0.0, 0.5))
        tensor([0.5000, 0.0000, 0.3000])
    """
    lower, upper = (torch.as_tensor(bound, dtype=x.dtype, device=x.device) for bound in hyper)
    require(("the box is empty: a lower bound exceeds its upper bound", lower <= upper))
    return torch.where(x < lower, lower, torch.where(x > upper, upper, x))


def projection_linf_ball(x: Tensor, hyper: float | Tensor = 1.0) -> Tensor:
    r"""On the ball :math:`\max_i |p_i| \le r`.

    Args:
        x: Any shape.
        hyper: The radius r, positive.

    Returns:
        The shape of ``x``.

    Raises:
        ValueError: If the radius is not positive.

    Example:
        >>> projection_linf_ball(torch.tensor([1.0, -3.0]), 2.0)
        tensor([ 1., -2.])
    """
    require(positive(hyper))
    return projection_box(x, (-hyper, hyper))


def projection_simplex(x: Tensor, hyper: float | Tensor = 1.0) -> Tensor:
    r"""On the simplex :math:`\{p \ge 0, \sum_i p_i = s\}`: :math:`(x - \tau)_+`, along the last dimension.

    With :math:`S = 1[p > 0]` its derivative is :math:`J v = S \circ v - S (S^\top v) / |S|`.

    Args:
        x: Shape ``(..., d)``.
        hyper: The sum s, positive, a number or of shape ``(...)``.

    Returns:
        The shape of ``x``.

    Raises:
        ValueError: If s is not positive.

    References:
        Held, Wolfe and Crowder, "Validation of Subgradient Optimization", 1974; Duchi et al., "Efficient Projections
        onto the l1-Ball for Learning in High Dimensions", ICML 2008.

    Example:
        >>> projection_simplex(torch.tensor([0.9, 0.3, -2.0]))
        tensor([0.8000, 0.2000, 0.0000])
    """
    require(positive(hyper, "the sum"))
    total = torch.as_tensor(hyper, dtype=x.dtype, device=x.device)[..., None]
    x = x - x.detach().amax(-1, keepdim=True)  # changes nothing but the rounding
    ordered = torch.sort(x.detach(), dim=-1, descending=True).values
    count = torch.arange(1, x.shape[-1] + 1, dtype=x.dtype, device=x.device)
    excess = torch.cumsum(ordered, -1) - total.detach()
    size = (ordered * count > excess).sum(-1, keepdim=True).clamp(min=1)  # of the support; 0 with NaN in x
    outside = x.detach() <= torch.gather(excess, -1, size - 1) / size
    nothing = torch.zeros_like(x)
    mass = torch.where(outside, nothing, x).sum(-1, keepdim=True)
    return torch.where(outside, nothing, x - (mass - total) / (~outside).sum(-1, keepdim=True))


def projection_sparse_simplex(x: Tensor, nonzero: int, hyper: float | Tensor = 1.0) -> Tensor:
    """On the vectors of the simplex with few entries that are not 0: the simplex on the largest entries.

    Args:
        x: Shape ``(..., d)``.
        nonzero: How many entries may differ from 0; bind it with :func:`functools.partial`.
        hyper: The sum, positive.

    Returns:
        The shape of ``x``.

    Raises:
        ValueError: If ``nonzero`` is not between 1 and d, or the sum is not positive.

    References:
        Kyrillidis et al., "Sparse Projections onto the Simplex", ICML 2013.

    Example:
        >>> projection_sparse_simplex(torch.tensor([0.5, 0.4, 0.3]), 2)
        tensor([0.5500, 0.4500, 0.0000])
    """
    require((f"nonzero must lie between 1 and {x.shape[-1]}, got {nonzero}", 1 <= nonzero <= x.shape[-1]))
    kept = torch.topk(x.detach(), nonzero, dim=-1).indices
    inside = projection_simplex(torch.gather(x, -1, kept), hyper)
    return torch.zeros_like(x).scatter(-1, kept, inside)


def projection_kl_simplex(x: Tensor, hyper: float | Tensor | None = None) -> Tensor:
    r"""On the simplex in the Kullback-Leibler divergence, from the dual space: :math:`s\, \mathrm{softmax}(x)`.

    Args:
        x: Shape ``(..., d)``, logarithms.
        hyper: The sum s, positive; 1 where None.

    Returns:
        The shape of ``x``.

    Raises:
        ValueError: If s is not positive.

    References:
        Beck and Teboulle, "Mirror Descent and Nonlinear Projected Subgradient Methods", 2003.

    Example:
        >>> projection_kl_simplex(torch.tensor([0.0, 0.0]))
        tensor([0.5000, 0.5000])
    """
    if hyper is None:
        return torch.softmax(x, -1)
    require(positive(hyper, "the sum"))
    return torch.as_tensor(hyper, dtype=x.dtype, device=x.device)[..., None] * torch.softmax(x, -1)


def projection_l1_ball(x: Tensor, hyper: float | Tensor = 1.0) -> Tensor:
    r"""On the ball :math:`\sum_i |p_i| \le r`, along the last dimension.

    Args:
        x: Shape ``(..., d)``.
        hyper: The radius r, positive, a number or of shape ``(...)``.

    Returns:
        The shape of ``x``.

    Raises:
        ValueError: If the radius is not positive.

    References:
        Duchi et al., "Efficient Projections onto the l1-Ball for Learning in High Dimensions", ICML 2008.

    Example:
        >>> projection_l1_ball(torch.tensor([2.0, -1.5])), projection_l1_ball(torch.tensor([0.2, -0.1]))
        (tensor([ 0.7500, -0.2500]), tensor([ 0.2000, -0.1000]))
    """
    require(positive(hyper))
    radius = torch.as_tensor(hyper, dtype=x.dtype, device=x.device)[..., None]
    outside = x.abs().sum(-1, keepdim=True) > radius
    return torch.where(outside, torch.sign(x) * projection_simplex(x.abs(), hyper), x)


def projection_l2_ball(x: Tensor, hyper: float | Tensor = 1.0) -> Tensor:
    r"""On the ball :math:`\|p\|_2 \le r`, along the last dimension: :math:`r x / \|x\|` outside.

    Args:
        x: Shape ``(..., d)``.
        hyper: The radius r, positive, a number or of shape ``(...)``.

    Returns:
        The shape of ``x``.

    Raises:
        ValueError: If the radius is not positive.

    References:
        Parikh and Boyd, "Proximal Algorithms", 2014, sec. 6.5.1.

    Example:
        >>> projection_l2_ball(torch.tensor([3.0, 4.0])), projection_l2_ball(torch.zeros(2))
        (tensor([0.6000, 0.8000]), tensor([0., 0.]))
    """
    require(positive(hyper))
    radius = torch.as_tensor(hyper, dtype=x.dtype, device=x.device)[..., None]
    square = x.square().sum(-1, keepdim=True)
    outside = square > radius**2
    length = torch.where(outside, square, torch.ones_like(square)).sqrt()  # the root has no derivative at 0
    return torch.where(outside, radius / length * x, x)


def projection_l2_sphere(x: Tensor, hyper: float | Tensor = 1.0) -> Tensor:
    r"""On the sphere :math:`\|p\|_2 = r`, along the last dimension: :math:`r x / \|x\|`.

    Every point of the sphere is nearest to 0; there the first coordinate axis is returned, with derivative 0 in x.

    Args:
        x: Shape ``(..., d)``.
        hyper: The radius r, positive, a number or of shape ``(...)``.

    Returns:
        The shape of ``x``.

    Raises:
        ValueError: If the radius is not positive.

    Example:
        >>> projection_l2_sphere(torch.tensor([0.3, 0.4]), 2.0), projection_l2_sphere(torch.zeros(2), 2.0)
        (tensor([1.2000, 1.6000]), tensor([2., 0.]))
    """
    require(positive(hyper))
    radius = torch.as_tensor(hyper, dtype=x.dtype, device=x.device)[..., None]
    square = x.square().sum(-1, keepdim=True)
    away = square > 0
    length = torch.where(away, square, torch.ones_like(square)).sqrt()
    axis = (torch.arange(x.shape[-1], device=x.device) == 0).to(x.dtype)
    return torch.where(away, radius / length * x, radius * axis)


def positive(hyper: float | Tensor, name: str = "the radius") -> tuple[str, bool | Tensor]:
    """The check that a number that describes a set is positive."""
    got = "" if isinstance(hyper, Tensor) else f", got {hyper}"  # a tensor may be on another device
    return f"{name} must be positive{got}", hyper > 0
