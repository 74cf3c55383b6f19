r"""Variances of per-sample gradients from reduced sums, on the device; notation as in :mod:`.adadagrad`."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["coordinate_batch", "group_trace", "inner_product_variance", "orthogonality_variance"]

_COORDINATES = 2**20  # a quantile over more coordinates is taken from an evenly spaced subset of about this many


def group_trace(
    weighted_squares: Tensor, samples: Tensor | float, groups: Tensor | float, mean_square: Tensor
) -> Tensor:
    r"""Unbiased trace of the covariance of one sample's gradient, from the gradients of groups of samples.

    .. math:: S = \frac{1}{J - 1} \Big( \sum_{j=1}^J n_j \|g_j\|^2 - n \|g\|^2 \Big), \qquad n = \sum_j n_j

    where :math:`g_j` is the mean gradient of the :math:`n_j` samples of group :math:`j` and
    :math:`g = \sum_j n_j g_j / n`. Groups may differ in size; samples are groups of one. Nothing is read to the host.

    Args:
        weighted_squares: The sum of :math:`n_j \|g_j\|^2`, any shape.
        samples: The number of samples :math:`n`.
        groups: The number of groups :math:`J`.
        mean_square: :math:`\|g\|^2`, of the same shape.

    Returns:
        The trace, at least 0, since rounding may leave the difference slightly below; not a number for a single group.

    References:
        Lau et al., "AdAdaGrad: Adaptive Batch Size Schemes for Adaptive Gradient Methods", 2024.

    Example:
        >>> gradients = torch.tensor([[1.0, 0.0], [3.0, 0.0], [2.0, 3.0]])
        >>> group_trace(gradients.square().sum(), 3, 3, gradients.mean(0).square().sum())
        tensor(4.)
        >>> gradients.var(0).sum()
        tensor(4.)
    """
    return _per_freedom(weighted_squares - samples * mean_square, groups).clamp(min=0)


def inner_product_variance(
    sum_inner_squares: Tensor, samples: Tensor | float, mean_square: Tensor, sum_inner: Tensor | None = None
) -> Tensor:
    r"""Unbiased variance of the inner products :math:`q_i = \langle g_i, g \rangle` over the samples.

    .. math:: V_{ip} = \frac{1}{n - 1} \Big( \sum_i q_i^2 - n \bar q^2 \Big)

    Inner products are those of the whole parameter vector: a sum over layers of one variance a layer would lose the
    covariance between layers.

    Args:
        sum_inner_squares: The sum of :math:`q_i^2`.
        samples: The number of samples :math:`n` in the sums.
        mean_square: :math:`\|g\|^2`.
        sum_inner: The sum of :math:`q_i`; needed if the samples are only a part of the batch of :math:`g`, since the
            mean :math:`\bar q` is :math:`\|g\|^2` for the whole batch only.

    Returns:
        The variance, at least 0; not a number for a single sample.

    References:
        Bollapragada, Byrd and Nocedal, "Adaptive Sampling Strategies for Stochastic Optimization", 2018.

    Example:
        >>> gradients = torch.tensor([[1.0, 0.0], [3.0, 0.0], [2.0, 3.0]])
        >>> mean = gradients.mean(0)
        >>> inner = gradients @ mean
        >>> inner_product_variance(inner.square().sum(), 3, mean @ mean), inner.var()
        (tensor(7.), tensor(7.))
    """
    mean = mean_square if sum_inner is None else sum_inner / samples
    return _per_freedom(sum_inner_squares - samples * mean.square(), samples).clamp(min=0)


def orthogonality_variance(
    sum_squares: Tensor,
    sum_inner_squares: Tensor,
    samples: Tensor | float,
    mean_square: Tensor,
    sum_inner: Tensor | None = None,
    sample_mean_square: Tensor | None = None,
) -> Tensor:
    r"""Unbiased variance of what is left of the samples' gradients once their part along :math:`g` is taken out.

    With :math:`o_i = g_i - (q_i / \|g\|^2) g` it is the trace of the covariance of :math:`o_i`, and

    .. math:: V_{or} = S - V_{ip} / \|g\|^2

    holds exactly, for a part of the batch as well.

    Args:
        sum_squares: The sum of :math:`\|g_i\|^2`.
        sum_inner_squares: The sum of :math:`q_i^2`, where :math:`q_i = \langle g_i, g \rangle`.
        samples: The number of samples in the sums.
        mean_square: :math:`\|g\|^2`.
        sum_inner: The sum of :math:`q_i`; as for :func:`inner_product_variance`.
        sample_mean_square: Squared norm of the mean gradient of the samples in the sums; :math:`\|g\|^2`, if left out.

    Returns:
        The variance, at least 0; not a number for a single sample or where :math:`g` is 0.

    References:
        Bollapragada, Byrd and Nocedal, "Adaptive Sampling Strategies for Stochastic Optimization", 2018.

    Example:
        >>> gradients = torch.tensor([[1.0, 0.0], [3.0, 0.0], [2.0, 3.0]])
        >>> mean = gradients.mean(0)
        >>> inner = gradients @ mean
        >>> orthogonality_variance(gradients.square().sum(), inner.square().sum(), 3, mean @ mean)
        tensor(2.6000)
        >>> (gradients - (inner / (mean @ mean))[:, None] * mean).var(0).sum()
        tensor(2.6000)
    """
    own = mean_square if sample_mean_square is None else sample_mean_square
    trace = _per_freedom(sum_squares - samples * own, samples)
    along = inner_product_variance(sum_inner_squares, samples, mean_square, sum_inner) / mean_square
    return (trace - along).clamp(min=0)


def coordinate_batch(
    second_moments: Sequence[Tensor],
    gradients: Sequence[Tensor],
    batch_size: Tensor | float,
    quantile: float = 0.9,
) -> Tensor:
    r"""Batch that the norm test of a single coordinate asks for at :math:`\eta = 1`, as a quantile over coordinates.

    .. math:: S_j / g_j^2, \qquad S_j = \frac{1}{n - 1} \Big( \sum_i g_{ij}^2 - n g_j^2 \Big)

    The paper's test is the maximum (``quantile=1``), which explodes as soon as one :math:`g_j` is near 0. Coordinates
    without any gradient have no say. Beyond :math:`2^{20}` coordinates a quantile below 1 is that of an evenly spaced
    subset.

    Args:
        second_moments: For each parameter the sums :math:`\sum_i g_{ij}^2`, in its shape.
        gradients: For each parameter the mean gradient of the same samples.
        batch_size: The number of samples :math:`n`.
        quantile: Which coordinate decides, from 0 to 1.

    Returns:
        A scalar; 0 if no coordinate has a gradient, not a number if a gradient is not finite.

    References:
        Lau et al., "AdAdaGrad: Adaptive Batch Size Schemes for Adaptive Gradient Methods", 2024.

    Example:
        >>> samples = torch.tensor([[1.0, 1.0, 0.0], [3.0, 2.0, 0.0]])
        >>> coordinate_batch([samples.square().sum(0)], [samples.mean(0)], batch_size=2, quantile=1.0)
        tensor(0.5000)
    """
    total = sum(gradient.numel() for gradient in gradients)
    stride = 1 if quantile >= 1 else -(-total // _COORDINATES)
    moments, means = (torch.cat([t.flatten()[::stride] for t in tensors]) for tensors in (second_moments, gradients))
    moments, squares = moments.to(torch.promote_types(moments.dtype, torch.float32)), means.square()
    noise = _per_freedom(moments - batch_size * squares, batch_size).clamp(min=0)
    silent = (moments == 0) & (squares == 0)
    ratios, _ = torch.where(silent, -math.inf, noise / squares).sort()  # the silent ones first
    first = silent.sum()
    position = first + torch.ceil(quantile * (ratios.numel() - 1 - first)).long()
    chosen = ratios.gather(0, position.clamp(0, ratios.numel() - 1)[None])[0].clamp(min=0)
    return torch.where(torch.isfinite(moments).all() & torch.isfinite(squares).all(), chosen, math.nan)


def _per_freedom(scatter: Tensor, count: Tensor | float) -> Tensor:
    """The sum of squared deviations per degree of freedom; not a number where there is none."""
    if not isinstance(count, Tensor):
        return scatter / (count - 1) if count > 1 else torch.full_like(scatter, math.nan)
    freedom = count.to(scatter) - 1
    return torch.where(freedom > 0, scatter / freedom, math.nan)
