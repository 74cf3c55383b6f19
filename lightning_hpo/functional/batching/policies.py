"""Policies: which batch size do the statistics of the gradient ask for?

A policy is a pure function of :class:`~lightning_hpo.functional.batching.adadagrad.GradientStatistics`; it returns a
number that the caller rounds, limits and clips with :func:`~lightning_hpo.functional.batching.plan.next_batch_size`.
"""

import math
from dataclasses import dataclass

from lightning_hpo.functional.batching.adadagrad import (
    GradientStatistics,
    inner_product_test,
    norm_test,
    orthogonality_test,
    ratio,
)
from lightning_hpo.functional.batching.policy import Policy, check_arguments, positive
from lightning_hpo.functional.batching.ramps import LinearRamp, StageWise

__all__ = [
    "CABS",
    "AugmentedTest",
    "CoordinateTest",
    "DiveBatch",
    "InnerProductTest",
    "LinearRamp",
    "NoiseScale",
    "NormTest",
    "Policy",
    "SimiGrad",
    "StageWise",
]


@dataclass(frozen=True)
class NormTest(Policy):
    r"""Norm test of AdAdaGrad: grow until the noise of the gradient is a fraction ``eta`` of its length.

    It asks for :math:`S / (\eta^2 G)`. With the default ``eta=1`` and the debiased :math:`G` that is the gradient noise
    scale; the paper's setting is ``NormTest(eta=0.5, debias=False)``.

    Args:
        eta: The fraction, above 0; below 1 without ``debias``.
        debias: Whether to subtract from :math:`\|g\|^2` what noise adds to it.

    Raises:
        ValueError: If ``eta`` is not positive, or at least 1 without ``debias``.

    References:
        Lau et al., "AdAdaGrad: Adaptive Batch Size Schemes for Adaptive Gradient Methods", 2024.

    Example:
        >>> statistics = GradientStatistics(batch_size=8, trace=24.0, square=2.0)
        >>> NormTest()(statistics), NormTest(eta=0.5, debias=False)(statistics)
        (12.0, 19.2)
    """

    needs = frozenset({"trace"})

    eta: float = 1.0
    debias: bool = True

    def __post_init__(self) -> None:
        check_arguments(
            self,
            {
                **positive(eta=self.eta),
                f"eta must be below 1 unless debias=True, got {self.eta!r}: the fixed point of the batch, "
                "b* = S(1-eta^2)/(eta^2 G), is not positive, so the test would pass whatever the batch": self.debias
                or self.eta < 1,
            },
        )

    def __call__(self, statistics: GradientStatistics) -> float:
        """The batch size asked for."""
        return norm_test(statistics, self.eta, self.debias)


@dataclass(frozen=True)
class InnerProductTest(Policy):
    r"""Inner-product test: grow until :math:`\langle g_i, g \rangle` varies little, so that steps descend.

    It asks for :math:`V_{ip} / (\theta^2 \|g\|^4)`, usually less than the norm test.

    Args:
        theta: The tolerance, above 0.

    Raises:
        ValueError: If ``theta`` is not positive.

    References:
        Bollapragada, Byrd and Nocedal, "Adaptive Sampling Strategies for Stochastic Optimization", 2018.

    Example:
        >>> statistics = GradientStatistics(batch_size=8, trace=24.0, square=2.0, inner=50.0)
        >>> InnerProductTest(theta=0.5)(statistics)
        8.0
    """

    needs = frozenset({"trace", "inner"})

    theta: float = 0.9

    def __post_init__(self) -> None:
        check_arguments(self, positive(theta=self.theta))

    def __call__(self, statistics: GradientStatistics) -> float:
        """The batch size asked for."""
        return inner_product_test(statistics, self.theta)


@dataclass(frozen=True)
class AugmentedTest(Policy):
    r"""Inner-product and orthogonality test: the larger of :math:`V_{ip} / (\theta^2 \|g\|^4)` and the other's demand.

    The orthogonality test asks for :math:`V_{or} / (\nu^2 \|g\|^2)`, which bounds how far steps stray sideways.

    Args:
        theta: Tolerance of the inner-product test, above 0.
        nu: Tolerance of the orthogonality test, above 0.

    Raises:
        ValueError: If a tolerance is not positive; all are listed.

    References:
        Bollapragada, Byrd and Nocedal, "Adaptive Sampling Strategies for Stochastic Optimization", 2018.

    Example:
        >>> statistics = GradientStatistics(batch_size=8, trace=24.0, square=2.0, inner=50.0, orthogonal=20.0)
        >>> AugmentedTest(theta=0.5, nu=0.5)(statistics)
        16.0
    """

    needs = frozenset({"trace", "inner"})

    theta: float = 0.9
    nu: float = 5.84

    def __post_init__(self) -> None:
        check_arguments(self, positive(theta=self.theta, nu=self.nu))

    def __call__(self, statistics: GradientStatistics) -> float:
        """The batch size asked for."""
        inner, across = inner_product_test(statistics, self.theta), orthogonality_test(statistics, self.nu)
        return inner if inner >= across or math.isnan(inner) else across


@dataclass(frozen=True)
class CoordinateTest(Policy):
    r"""Norm test coordinate by coordinate, for AdaGrad and Adam: a quantile of :math:`S_j / (\eta^2 g_j^2)`.

    Args:
        eta: Noise of a coordinate as a fraction of its gradient, above 0.
        quantile: Which coordinate decides, from 0 to 1; 1, the maximum, is the paper's and explodes as soon as the
            gradient of one coordinate is near 0.

    Raises:
        ValueError: If an argument is out of range; all are listed.

    References:
        Lau et al., "AdAdaGrad: Adaptive Batch Size Schemes for Adaptive Gradient Methods", 2024.

    Example:
        >>> CoordinateTest(eta=0.5)(GradientStatistics(batch_size=8, trace=24.0, square=2.0, coordinate=10.0))
        40.0
    """

    needs = frozenset({"coordinate"})

    eta: float = 1.0
    quantile: float = 0.9

    def __post_init__(self) -> None:
        within = 0 <= self.quantile <= 1
        check_arguments(
            self, {**positive(eta=self.eta), f"quantile must lie between 0 and 1, got {self.quantile!r}": within}
        )

    def __call__(self, statistics: GradientStatistics) -> float:
        """The batch size asked for."""
        return statistics.required("coordinate") / self.eta**2


@dataclass(frozen=True)
class NoiseScale(Policy):
    r"""Follows the gradient noise scale, up and down: :math:`c S / G`.

    ``NormTest(eta=1)`` asks for the same batch and never shrinks.

    Args:
        scale: The factor :math:`c`, above 0.

    Raises:
        ValueError: If ``scale`` is not positive.

    References:
        McCandlish, Kaplan, Amodei et al., "An Empirical Model of Large-Batch Training", 2018.

    Example:
        >>> NoiseScale(scale=2.0)(GradientStatistics(batch_size=8, trace=24.0, square=2.0))
        24.0
    """

    needs = frozenset({"trace"})
    shrinks = True

    scale: float = 1.0

    def __post_init__(self) -> None:
        check_arguments(self, positive(scale=self.scale))

    def __call__(self, statistics: GradientStatistics) -> float:
        """The batch size asked for."""
        return self.scale * ratio(statistics.trace, statistics.square)


@dataclass(frozen=True)
class CABS(Policy):
    r"""Coupled adaptive batch size: learning rate times noise over loss, :math:`\alpha S / L`; follows it up and down.

    The loss must be bounded below by 0 and get near it, as the cross-entropy of a network that can fit its data.

    References:
        Balles, Romero and Hennig, "Coupling Adaptive Batch Sizes with Learning Rates", 2017.

    Example:
        >>> CABS()(GradientStatistics(batch_size=8, trace=24.0, square=2.0, loss=0.5, lr=0.25))
        12.0
    """

    needs = frozenset({"trace", "loss"})
    shrinks = True

    def __call__(self, statistics: GradientStatistics) -> float:
        """The batch size asked for; infinite where the loss is not positive."""
        return ratio(statistics.required("lr") * statistics.trace, statistics.required("loss"))


@dataclass(frozen=True)
class DiveBatch(Policy):
    r"""Gradient diversity, at the end of each epoch: :math:`\delta n \Delta`, up and down.

    The diversity of an epoch of :math:`n` samples is :math:`\Delta = \sum_i \|g_i\|^2 / \|\sum_i g_i\|^2`. In terms of
    the noise it is :math:`(S + G) / (n G)`, so the batch asked for, :math:`\delta (S + G) / G`, is a share
    :math:`\delta` of the noise scale plus one.

    Args:
        delta: The share :math:`\delta`, above 0.

    Raises:
        ValueError: If ``delta`` is not positive.

    References:
        Chen et al., "DiveBatch: Accelerating Model Training Through Gradient-Diversity Aware Batch Size Adaptation",
        2025; Yin et al., "Gradient Diversity: a Key Ingredient for Scalable Distributed Learning", 2018.

    Example:
        >>> DiveBatch(delta=0.5)(GradientStatistics(batch_size=8, trace=24.0, square=2.0))
        6.5
    """

    needs = frozenset({"trace"})
    when = "epoch"
    shrinks = True

    delta: float = 0.1

    def __post_init__(self) -> None:
        check_arguments(self, positive(delta=self.delta))

    def __call__(self, statistics: GradientStatistics) -> float:
        """The batch size asked for."""
        return self.delta * (ratio(statistics.trace, statistics.square) + 1)


@dataclass(frozen=True)
class SimiGrad(Policy):
    r"""Gradient similarity: grow by a step while the two halves of a batch disagree, shrink while they agree.

    The cosine of the gradients of two halves of :math:`b / 2` samples is, in expectation,
    :math:`G / (G + 2 S / b)`. It reaches the target :math:`c` at :math:`b = 2 S c / (G (1 - c))`: twice the noise scale
    for one half, 18 times for 0.9.

    Args:
        target: The cosine to hold, between 0 and 1.
        step: Relative change of the batch in each decision, between 0 and 1.

    Raises:
        ValueError: If an argument is out of range; all are listed.

    References:
        Qin et al., "SimiGrad: Fine-Grained Adaptive Batching for Large Scale Training using Gradient Similarity
        Measurement", NeurIPS 2021.

    Example:
        >>> SimiGrad()(GradientStatistics(batch_size=10, trace=24.0, square=2.0))
        11.0
    """

    needs = frozenset({"trace"})
    shrinks = True

    target: float = 0.5
    step: float = 0.1

    def __post_init__(self) -> None:
        between = {
            f"{name} must lie between 0 and 1, got {value!r}": 0 < value < 1
            for name, value in (("target", self.target), ("step", self.step))
        }
        check_arguments(self, between)

    def __call__(self, statistics: GradientStatistics) -> float:
        """The batch size asked for; as it is, where the target is met exactly."""
        balance = ratio(2 * self.target * statistics.trace, (1 - self.target) * statistics.square)
        if math.isnan(balance):
            return balance
        direction = (balance > statistics.batch_size) - (balance < statistics.batch_size)
        return statistics.batch_size * (1 + direction * self.step)
