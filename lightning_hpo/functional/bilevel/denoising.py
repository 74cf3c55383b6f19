r"""Image denoising as a bilevel problem: regularisers that are learned from pairs of noisy and clean images.

Every image is a lower problem of its own, :math:`h_i(x, \theta) = \tfrac12 \|x - y_i\|^2 + R(x, \theta)`. The data term
makes it strongly convex with :math:`\mu = 1` whatever :math:`\theta` is, and each regulariser knows a bound on its own
curvature: MAID's certificates need nothing else.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_hpo.functional.bilevel.lower_problem import LowerProblem
from lightning_hpo.functional.bilevel.maid_problem import BilevelProblem

__all__ = [
    "Experts",
    "FieldOfExperts",
    "Regularizer",
    "TotalVariation",
    "cosine_filters",
    "denoising_loss",
    "denoising_problem",
    "reconstruction_loss",
]

_GRID = 128  # frequencies an axis at which the filters' spectrum is looked at


class Regularizer(Protocol):
    r"""A convex, smooth function R of images, with parameters."""

    def __call__(self, x: Tensor, theta: Tensor) -> Tensor:
        r""":math:`R(x_i, \theta)` for each of m images of shape ``(m, height, width)``; shape ``(m,)``."""
        ...

    def smoothness(self, theta: Tensor) -> Tensor:
        r"""A Lipschitz constant of :math:`\nabla_x R`, for images of any size."""
        ...


@dataclass(frozen=True)
class TotalVariation:
    r"""Smoothed isotropic total variation; its parameters are the logarithms of weight and smoothing.

    .. math:: R(x, \theta) = e^{\theta_1} \sum_{p} \sqrt{|(Dx)_p|^2 + e^{2 \theta_2}}

    D takes differences to the pixel below and to the right, 0 at the last row and column.

    References:
        Rudin, Osher, Fatemi, "Nonlinear total variation based noise removal algorithms", 1992.

    Example:
        >>> x = torch.tensor([[[0.0, 3.0], [4.0, 0.0]]])  # at the first pixel |Dx| = 5, then 3 and 4
        >>> TotalVariation()(x, torch.tensor([0.0, -20.0]))
        tensor([12.])
    """

    def __call__(self, x: Tensor, theta: Tensor) -> Tensor:
        r""":math:`R(x_i, \theta)`, shape ``(m,)``.

        Args:
            x: Images, shape ``(m, height, width)``.
            theta: Shape ``(2,)``.

        Returns:
            One value an image.
        """
        down = F.pad(x.diff(dim=1), (0, 0, 0, 1))
        right = F.pad(x.diff(dim=2), (0, 1))
        return theta[0].exp() * (down.square() + right.square() + (2 * theta[1]).exp()).sqrt().sum((1, 2))

    def smoothness(self, theta: Tensor) -> Tensor:
        r""":math:`8 e^{\theta_1 - \theta_2}`, since :math:`\|D\|^2 \le 8`.

        Args:
            theta: Shape ``(2,)``.

        Returns:
            A scalar.
        """
        return 8 * (theta[0] - theta[1]).exp()


class Experts(NamedTuple):
    r"""What the parameters of a field of experts are.

    Attributes:
        weights: :math:`e^{\theta_0 + \theta_k}`, shape ``(K,)``.
        smoothings: :math:`\nu_k`, shape ``(K,)``.
        filters: :math:`c_k`, shape ``(K, size, size)``.
    """

    weights: Tensor
    smoothings: Tensor
    filters: Tensor


@dataclass(frozen=True)
class FieldOfExperts:
    r"""A field of experts: K filters, each with a weight and a smoothing, all of which are learned.

    .. math:: R(x, \theta) = \sum_{k=1}^K w_k \sum_p \sqrt{(c_k * x)_p^2 + \nu_k^2}

    The first K parameters are :math:`\log w_k`, the next K :math:`\log \nu_k`, the rest coefficients of the filters in
    :func:`cosine_filters` without the constant one. The sum is over windows that lie within the image.

    The paper's filters may have a mean, and a weight of all filters comes besides. Both are directions in which the
    loss is far steeper than in all others, so that steps are short: ``free=True`` is for comparison.

    Args:
        count: K.
        size: Side of the filters.
        free: Whether filters may have a mean, and the first parameter is the logarithm of a factor of all weights.

    Raises:
        ValueError: If a number is out of range.

    References:
        Roth and Black, "Fields of Experts", IJCV 2009; Chen, Ranftl, Pock, "Insights into analysis operator learning",
        IEEE Trans. Image Process. 2014; Salehi et al., SIAM J. Math. Data Sci. 7(3), 2025, sec. 4.

    Example:
        >>> FieldOfExperts(count=48, size=7, free=True).parameters  # as in the paper
        2449
        >>> experts = FieldOfExperts(count=2, size=3)
        >>> experts(torch.ones(1, 5, 5), experts.start(log_smoothing=-20.0)) < 1e-5
        tensor([True])
    """

    count: int = 24
    size: int = 5
    free: bool = False

    def __post_init__(self) -> None:
        checks = {"count": (self.count, 1), "size": (self.size, 2)}
        wrong = [f"{name} must be at least {least}, got {v!r}" for name, (v, least) in checks.items() if v < least]
        if wrong:
            raise ValueError("; ".join(wrong))

    @property
    def coefficients(self) -> int:
        """The number of coefficients of a filter."""
        return self.size**2 - 1 + self.free

    @property
    def parameters(self) -> int:
        r"""The number of entries of :math:`\theta`."""
        return self.free + self.count * (2 + self.coefficients)

    def experts(self, theta: Tensor) -> Experts:
        r"""Weights, smoothings and filters.

        Args:
            theta: Shape ``(parameters,)``.

        Returns:
            They.

        Raises:
            ValueError: If theta has another shape.
        """
        if tuple(theta.shape) != (self.parameters,):
            raise ValueError(f"theta must have shape ({self.parameters},), got {tuple(theta.shape)}")
        sizes = [int(self.free), self.count, self.count, self.count * self.coefficients]
        overall, weights, smoothings, coefficients = theta.split(sizes)
        basis = cosine_filters(self.size)[1 - self.free :].to(theta)
        filters = torch.einsum("kc,cij->kij", coefficients.view(self.count, -1), basis)
        return Experts((weights + overall.sum()).exp(), smoothings.exp(), filters)

    def start(self, log_weight: float = -5.0, log_smoothing: float = -6.0, dtype: torch.dtype | None = None) -> Tensor:
        r"""A :math:`\theta` to begin with: the cosine filters that are not constant, low frequencies first.

        Args:
            log_weight: Of all filters.
            log_smoothing: Of all filters.
            dtype: Of the result.

        Returns:
            Shape ``(parameters,)``.

        Raises:
            ValueError: If there are fewer such filters than experts.
        """
        if self.count > self.size**2 - 1:
            raise ValueError(f"there are {self.size**2 - 1} cosine filters of size {self.size}, not {self.count}")
        rows = torch.eye(self.coefficients)[int(self.free) :][: self.count]
        scalars = [torch.full((self.count,), log_weight), torch.full((self.count,), log_smoothing)]
        return torch.cat([torch.zeros(int(self.free)), *scalars, rows.flatten()]).to(dtype or rows.dtype)

    def __call__(self, x: Tensor, theta: Tensor) -> Tensor:
        r""":math:`R(x_i, \theta)`, shape ``(m,)``.

        Args:
            x: Images, shape ``(m, height, width)``.
            theta: Shape ``(parameters,)``.

        Returns:
            One value an image.

        Raises:
            ValueError: If theta has another shape, or the filters do not fit into the image.
        """
        weights, smoothings, filters = self.experts(theta)
        if min(x.shape[1:]) < self.size:
            raise ValueError(f"images must be at least {self.size} pixels high and wide, got {tuple(x.shape[1:])}")
        answers = F.conv2d(x[:, None], filters[:, None])
        return torch.hypot(answers, smoothings[:, None, None]).sum((2, 3)) @ weights

    def smoothness(self, theta: Tensor) -> Tensor:
        r"""A bound on the curvature, from the filters' common spectrum.

        The Hessian of R is at most :math:`\sum_k w_k / \nu_k C_k^\top C_k`, and that at most the largest value of the
        power spectrum :math:`\sum_k w_k / \nu_k |\hat c_k|^2`. This is a trigonometric polynomial of degree
        ``size - 1`` along each axis: it exceeds its largest value on a grid of N frequencies an axis at most by the
        factor :math:`\cos^{-2}(\pi (\mathrm{size} - 1) / N)`.

        Args:
            theta: Shape ``(parameters,)``.

        Returns:
            A scalar in float64.

        References:
            Ehlich and Zeller, "Schwankung von Polynomen zwischen Gitterpunkten", Math. Z. 86, 1964.
        """
        weights, smoothings, filters = self.experts(theta.double())
        grid = max(_GRID, 16 * self.size)
        power = torch.fft.rfft2(filters, s=(grid, grid)).abs().square()
        largest = ((weights / smoothings)[:, None, None] * power).sum(0).max()
        return largest / math.cos(math.pi * (self.size - 1) / grid) ** 2


@lru_cache(maxsize=8)
def cosine_filters(size: int) -> Tensor:
    """Orthogonal cosine filters, from low frequencies to high ones; the constant comes first.

    Their lengths grow with the frequency, as the amplitudes in photographs fall with it: so all filters but the first
    answer about alike, and a descent takes all of them alike. The mean square of these lengths is 1.

    Args:
        size: Side.

    Returns:
        Shape ``(size**2, size, size)`` in float64.

    References:
        Ahmed, Natarajan, Rao, "Discrete Cosine Transform", 1974; Field, "Relations between the statistics of natural
        images and the response properties of cortical cells", 1987, for the amplitudes.

    Example:
        >>> filters = cosine_filters(3).flatten(1)
        >>> (filters @ filters.T).diagonal()[:4]
        tensor([1.0000, 0.2667, 0.2667, 1.0667], dtype=torch.float64)
    """
    at = torch.arange(size, dtype=torch.float64)
    rows = torch.cos(math.pi / size * at[:, None] * (at + 0.5))
    rows = rows / torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    both = torch.einsum("ai,bj->abij", rows, rows).reshape(-1, size, size)
    order = torch.argsort((at[:, None] + at).flatten(), stable=True)
    lengths = torch.hypot(at[:, None], at).flatten()[order]
    lengths = lengths / lengths[1:].square().mean().sqrt()
    lengths[0] = 1.0
    return lengths[:, None, None] * both[order]


def denoising_loss(x: Tensor, theta: Tensor, noisy: Tensor, regularizer: Regularizer) -> Tensor:
    r"""The lower loss of every image, :math:`\tfrac12 \|x_i - y_i\|^2 + R(x_i, \theta)`.

    Args:
        x: Images, shape ``(m, height, width)``.
        theta: Parameters of the regulariser.
        noisy: What was observed, like x.
        regularizer: R.

    Returns:
        Shape ``(m,)``.

    Example:
        >>> noisy = torch.zeros(1, 2, 2)
        >>> denoising_loss(noisy + 1, torch.tensor([0.0, -20.0]), noisy, TotalVariation())  # no variation
        tensor([2.])
    """
    return (x - noisy).square().sum((1, 2)) / 2 + regularizer(x, theta)


def reconstruction_loss(x: Tensor, clean: Tensor) -> Tensor:
    r"""The upper loss of every image, :math:`\tfrac12 \|x_i - \bar x_i\|^2`; its gradient has the constant 1.

    Args:
        x: Images, shape ``(m, height, width)``.
        clean: What they should be.

    Returns:
        Shape ``(m,)``.

    Example:
        >>> reconstruction_loss(torch.ones(1, 2, 2), torch.zeros(1, 2, 2))
        tensor([2.])
    """
    return (x - clean).square().sum((1, 2)) / 2


def denoising_problem(noisy: Tensor, clean: Tensor, regularizer: Regularizer) -> BilevelProblem:
    r"""Learns a regulariser from pairs of images: the mean of :math:`\tfrac12 \|\hat x_i(\theta) - \bar x_i\|^2`.

    Args:
        noisy: Shape ``(m, height, width)``.
        clean: Of the same shape.
        regularizer: R.

    Returns:
        The problem, every image a lower problem of its own; ``noisy`` is a good start of x.

    Raises:
        ValueError: If shapes differ or are not of images.

    References:
        Salehi et al., SIAM J. Math. Data Sci. 7(3), 2025, sec. 4.

    Example:
        >>> from lightning_hpo.functional.bilevel.maid import MAID
        >>> clean = torch.zeros(1, 8, 8)
        >>> clean[:, :, 4:] = 1.0
        >>> noisy = clean + 0.2 * torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(0))
        >>> problem = denoising_problem(noisy, clean, TotalVariation())
        >>> end = MAID(problem).run(torch.tensor([-3.0, -3.0]), noisy, max_steps=10)
        >>> bool(reconstruction_loss(end.x, clean) < 0.3 * reconstruction_loss(noisy, clean))
        True
    """
    if noisy.dim() != 3 or noisy.shape != clean.shape:
        raise ValueError(
            f"noisy and clean must both have shape (m, height, width), got {tuple(noisy.shape)}, {tuple(clean.shape)}"
        )
    lower = LowerProblem(
        lambda x, theta: denoising_loss(x, theta, noisy, regularizer),
        mu=1.0,
        smoothness=lambda theta: 1 + regularizer.smoothness(theta),
        batched=True,
    )
    return BilevelProblem(lower, lambda x: reconstruction_loss(x, clean), upper_smoothness=1.0, convex_upper=True)
