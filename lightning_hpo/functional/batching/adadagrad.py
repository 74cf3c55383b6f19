r"""What the noise of a gradient says about the batch size: statistics from reduced sums, and the tests made of them.

Notation: :math:`g_i` is the gradient of sample :math:`i`, :math:`g` the gradient of the whole batch of :math:`b`
samples, :math:`S` the trace of the covariance of :math:`g_i`, :math:`G` the squared norm of the true gradient.

Variances come from sums on the device (:mod:`.variances`); the tests here are arithmetic on the host.
"""

import math
import sys
from dataclasses import dataclass

from lightning_hpo.functional.batching.smoothing import Smoothed
from lightning_hpo.functional.batching.variances import (
    coordinate_batch,
    group_trace,
    inner_product_variance,
    orthogonality_variance,
)

__all__ = [
    "GradientStatistics",
    "Smoothed",
    "coordinate_batch",
    "group_trace",
    "inner_product_test",
    "inner_product_variance",
    "norm_test",
    "orthogonality_test",
    "orthogonality_variance",
]

_TINY = sys.float_info.min


@dataclass(frozen=True)
class GradientStatistics:
    """Numbers about the gradient of a step, on the host: the sums behind them are already reduced over ranks.

    Args:
        batch_size: Samples of the optimizer step, over all ranks and micro-batches.
        trace: Trace of the covariance of one sample's gradient, ``S``.
        square: Squared norm of the true gradient, ``G``: that of the batch gradient less ``S / batch_size``.
        inner: Variance of the inner products of the samples' gradients with the batch gradient.
        orthogonal: Variance of what is orthogonal to the batch gradient.
        coordinate: Batch that the coordinate-wise test asks for at ``eta = 1``.
        loss: Training loss.
        lr: Learning rate of the step.
        samples: Samples seen since training began.

    Example:
        >>> statistics = GradientStatistics(batch_size=8, trace=24.0, square=2.0)
        >>> statistics.noise_scale, statistics.biased_square
        (12.0, 5.0)
    """

    batch_size: float
    trace: float
    square: float
    inner: float | None = None
    orthogonal: float | None = None
    coordinate: float | None = None
    loss: float | None = None
    lr: float | None = None
    samples: float = 0.0

    @property
    def biased_square(self) -> float:
        """Squared norm of the batch gradient, which noise makes larger than that of the true one."""
        return self.square + self.trace / self.batch_size

    @property
    def noise_scale(self) -> float:
        """The gradient noise scale ``S / G`` (McCandlish et al., 2018); huge where ``G`` is not positive."""
        return self.trace / max(self.square, _TINY)

    def required(self, name: str) -> float:
        """The optional field ``name``; ValueError if it was not estimated."""
        value = getattr(self, name)
        if value is None:
            raise ValueError(f"the statistics have no `{name}`; choose an estimator that gives it.")
        return float(value)


def norm_test(statistics: GradientStatistics, eta: float, debias: bool = True) -> float:
    r"""Batch at which the noise of the gradient is a fraction of its length: :math:`S / (\eta^2 G)`.

    Args:
        statistics: Statistics of the step.
        eta: The fraction.
        debias: Whether :math:`G` is that of the true gradient; otherwise, as in the paper, that of the batch gradient,
            so that the batch settles at :math:`S (1 - \eta^2) / (\eta^2 G)`.

    Returns:
        The batch asked for: 0 without noise, infinite where the gradient drowns in it.

    References:
        Byrd, Chin, Nocedal and Wu, "Sample Size Selection in Optimization Methods for Machine Learning", 2012.

    Example:
        >>> statistics = GradientStatistics(batch_size=8, trace=24.0, square=2.0)
        >>> norm_test(statistics, eta=1.0), norm_test(statistics, eta=0.5, debias=False)
        (12.0, 19.2)
    """
    return ratio(statistics.trace, eta**2 * (statistics.square if debias else statistics.biased_square))


def inner_product_test(statistics: GradientStatistics, theta: float) -> float:
    r"""Batch at which the step is a descent direction often enough: :math:`V_{ip} / (\theta^2 \|g\|^4)`.

    Args:
        statistics: Statistics of the step, with ``inner``.
        theta: The tolerance.

    Returns:
        The batch asked for.

    Raises:
        ValueError: If ``inner`` is missing.

    References:
        Bollapragada, Byrd and Nocedal, "Adaptive Sampling Strategies for Stochastic Optimization", 2018.

    Example:
        >>> inner_product_test(GradientStatistics(batch_size=8, trace=24.0, square=2.0, inner=50.0), theta=0.5)
        8.0
    """
    return ratio(statistics.required("inner"), (theta * statistics.biased_square) ** 2)


def orthogonality_test(statistics: GradientStatistics, nu: float) -> float:
    r"""Batch at which the step strays little from the gradient: :math:`V_{or} / (\nu^2 \|g\|^2)`.

    Args:
        statistics: Statistics of the step, with ``orthogonal``.
        nu: The tolerance.

    Returns:
        The batch asked for.

    Raises:
        ValueError: If ``orthogonal`` is missing.

    References:
        Bollapragada, Byrd and Nocedal, "Adaptive Sampling Strategies for Stochastic Optimization", 2018.

    Example:
        >>> orthogonality_test(GradientStatistics(batch_size=8, trace=24.0, square=2.0, orthogonal=20.0), nu=0.5)
        16.0
    """
    return ratio(statistics.required("orthogonal"), nu**2 * statistics.biased_square)


def ratio(noise: float, signal: float) -> float:
    """The quotient, for a noise that is at least 0: 0 without noise, else infinite where the signal is not positive.

    Args:
        noise: The numerator.
        signal: The denominator.

    Returns:
        The quotient; not a number if an argument is not.

    Example:
        >>> ratio(6.0, 2.0), ratio(0.0, -1.0), ratio(6.0, -1.0)
        (3.0, 0.0, inf)
    """
    if math.isnan(noise) or math.isnan(signal):
        return math.nan
    if noise <= 0:
        return 0.0
    return noise / signal if signal > 0 else math.inf
