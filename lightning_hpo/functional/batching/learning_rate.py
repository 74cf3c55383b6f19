r"""Learning rate rules: what a batch that is :math:`\kappa` times the first one is worth.

A rule gives a factor for the learning rate that the user's schedule sets. It is always relative to the first batch
size, so it never compounds.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

from torch.optim import Adagrad, Optimizer

from lightning_hpo.functional.batching.policy import check_arguments
from lightning_hpo.functional.optim.adagrad_norm import AdaGradNorm

__all__ = [
    "AdaScale",
    "AdamSDE",
    "LearningRateRule",
    "LinearScaling",
    "NoScaling",
    "NoiseScaleLR",
    "SqrtScaling",
    "default_rule",
    "gain",
]


def gain(kappa: float, trace: float, square: float) -> float:
    r"""Steps of the first batch that one step of a batch :math:`\kappa` times as large is worth.

    .. math:: r = \frac{S_1 + G}{S_1 / \kappa + G}

    It is 1 at :math:`\kappa = 1`, approaches :math:`\kappa` where noise dominates and 1 where there is none. The
    statistical efficiency of the batch is :math:`r / \kappa`.

    Args:
        kappa: The batch size in units of the first one, above 0; below 1 for a batch that shrank.
        trace: Trace of the covariance of the gradient of one first batch: that of a sample over the first batch size.
        square: Squared norm of the true gradient; an estimate below 0 counts as 0.

    Returns:
        The gain, between 1 and ``kappa``; 1 if there is neither noise nor gradient.

    References:
        Johnson et al., "AdaScale SGD: A User-Friendly Algorithm for Distributed Training", 2020.

    Example:
        >>> gain(4.0, trace=3.0, square=1.0), gain(4.0, trace=3.0, square=0.0)
        (2.2857142857142856, 4.0)
    """
    trace, square = max(trace, 0.0), max(square, 0.0)
    below = trace / kappa + square
    return (trace + square) / below if below > 0 else 1.0


@runtime_checkable
class LearningRateRule(Protocol):
    """What every learning rate rule has; inherit from it, so that the command line knows a rule by its short name.

    ``needs`` names the statistics that it reads, as for :class:`~lightning_hpo.functional.batching.policy.Policy`.

    Example:
        >>> isinstance(AdaScale(), LearningRateRule), AdaScale.needs
        (True, frozenset({'trace'}))
    """

    needs: ClassVar[frozenset[str]] = frozenset()

    def factor(self, batch_size: float, base_batch_size: float, trace: float = 0.0, square: float = 0.0) -> float:
        """The factor by which to multiply the learning rate that was chosen for the first batch size.

        Args:
            batch_size: The batch size of the coming step.
            base_batch_size: The first batch size.
            trace: Trace of the covariance of one sample's gradient.
            square: Squared norm of the true gradient.

        Returns:
            The factor, above 0, at most the rule's cap.

        Raises:
            ValueError: If a batch size is not positive, or a number that the rule reads is missing.
        """
        ...


@dataclass(frozen=True)
class NoScaling(LearningRateRule):
    """Leaves the learning rate as it is.

    Example:
        >>> NoScaling().factor(32, 8)
        1.0
    """

    def factor(self, batch_size: float, base_batch_size: float, trace: float = 0.0, square: float = 0.0) -> float:
        """1; see :meth:`LearningRateRule.factor`."""
        _kappa(batch_size, base_batch_size)
        return 1.0


@dataclass(frozen=True)
class SqrtScaling(LearningRateRule):
    r"""Square root of the batch size, :math:`\sqrt\kappa`: keeps the noise of a step of Adam or AdaGrad.

    Args:
        cap: Largest factor, at least 1.

    Raises:
        ValueError: If ``cap`` is below 1.

    References:
        Krizhevsky, "One weird trick for parallelizing convolutional neural networks", 2014.

    Example:
        >>> SqrtScaling().factor(32, 8), SqrtScaling().factor(2, 8)
        (2.0, 0.5)
    """

    cap: float = 10.0

    def __post_init__(self) -> None:
        _check_cap(self, self.cap)

    def factor(self, batch_size: float, base_batch_size: float, trace: float = 0.0, square: float = 0.0) -> float:
        """The square root; see :meth:`LearningRateRule.factor`."""
        return min(math.sqrt(_kappa(batch_size, base_batch_size)), self.cap)


@dataclass(frozen=True)
class LinearScaling(LearningRateRule):
    r"""In proportion to the batch size, :math:`\kappa`: right for SGD while noise dominates; too much for AdaGrad.

    Args:
        cap: Largest factor, at least 1.

    Raises:
        ValueError: If ``cap`` is below 1.

    References:
        Goyal et al., "Accurate, Large Minibatch SGD: Training ImageNet in 1 Hour", 2017.

    Example:
        >>> LinearScaling().factor(32, 8), LinearScaling(cap=3.0).factor(32, 8)
        (4.0, 3.0)
    """

    cap: float = 10.0

    def __post_init__(self) -> None:
        _check_cap(self, self.cap)

    def factor(self, batch_size: float, base_batch_size: float, trace: float = 0.0, square: float = 0.0) -> float:
        """The ratio of the batch sizes; see :meth:`LearningRateRule.factor`."""
        return min(_kappa(batch_size, base_batch_size), self.cap)


@dataclass(frozen=True)
class AdaScale(LearningRateRule):
    r"""The gain of the larger batch, :math:`r^p` with :func:`gain`: linear in noise, nothing without.

    Args:
        cap: Largest factor, at least 1.
        power: The power :math:`p`, between 0 and 1; 0.5 is AdaptDL's choice for Adam.

    Raises:
        ValueError: If an argument is out of range; all are listed.

    References:
        Johnson et al., "AdaScale SGD: A User-Friendly Algorithm for Distributed Training", 2020; Qiao et al.,
        "Pollux: Co-adaptive Cluster Scheduling for Goodput-Optimized Deep Learning", 2021.

    Example:
        >>> AdaScale().factor(32, 8, trace=24.0, square=1.0)
        2.2857142857142856
    """

    needs = frozenset({"trace"})

    cap: float = 10.0
    power: float = 1.0

    def __post_init__(self) -> None:
        _check_cap(self, self.cap, {f"power must be above 0 and at most 1, got {self.power!r}": 0 < self.power <= 1})

    def factor(self, batch_size: float, base_batch_size: float, trace: float = 0.0, square: float = 0.0) -> float:
        """The gain to the power; see :meth:`LearningRateRule.factor`."""
        kappa = _kappa(batch_size, base_batch_size, trace, square)
        return min(gain(kappa, trace / base_batch_size, square) ** self.power, self.cap)


@dataclass(frozen=True)
class NoiseScaleLR(LearningRateRule):
    r"""The optimal learning rate of a batch, :math:`\eta_{max} / (1 + B / b)` with the noise scale :math:`B = S / G`.

    Args:
        cap: Largest factor, at least 1.
        reference: Noise scale at which the learning rate was chosen for the first batch. By default that is the
            present one, and the factor equals :func:`gain`; with a number, a falling noise scale alone raises the
            learning rate too, and a rising one lowers it, at most to the inverse of the cap.

    Raises:
        ValueError: If an argument is out of range; all are listed.

    References:
        McCandlish, Kaplan, Amodei et al., "An Empirical Model of Large-Batch Training", 2018.

    Example:
        >>> NoiseScaleLR(reference=8.0).factor(32, 8, trace=32.0, square=1.0)
        1.0
    """

    needs = frozenset({"trace"})

    cap: float = 10.0
    reference: float | None = None

    def __post_init__(self) -> None:
        fine = self.reference is None or 0 <= self.reference < math.inf
        _check_cap(self, self.cap, {f"reference must not be negative, got {self.reference!r}": fine})

    def factor(self, batch_size: float, base_batch_size: float, trace: float = 0.0, square: float = 0.0) -> float:
        """The ratio of the optimal learning rates; see :meth:`LearningRateRule.factor`."""
        kappa = _kappa(batch_size, base_batch_size, trace, square)
        found = gain(kappa, trace / base_batch_size, square)
        if self.reference is not None:
            # (1 + reference / b0) / (1 + B / b): the gain, with the reference in the place of B in the numerator only.
            now = max(trace, 0.0) + base_batch_size * max(square, 0.0)
            then = (base_batch_size + self.reference) * max(square, 0.0)
            found = max(found * then / now, 1 / self.cap) if now > 0 else 1.0
        return min(found, self.cap)


@dataclass(frozen=True)
class AdamSDE(LearningRateRule):
    r"""Adam's rule from its stochastic differential equation.

    The learning rate goes with :math:`\sqrt\kappa`, and :meth:`moments` gives
    :math:`1 - \beta' = \kappa (1 - \beta)` and :math:`\epsilon' = \epsilon / \sqrt\kappa`.

    Args:
        cap: Largest factor of the learning rate, at least 1.

    Raises:
        ValueError: If ``cap`` is below 1.

    References:
        Malladi, Lyu, Panigrahi and Arora, "On the SDEs and Scaling Rules for Adaptive Gradient Algorithms", 2022.

    Example:
        >>> AdamSDE().factor(32, 8)
        2.0
    """

    cap: float = 10.0

    def __post_init__(self) -> None:
        _check_cap(self, self.cap)

    def factor(self, batch_size: float, base_batch_size: float, trace: float = 0.0, square: float = 0.0) -> float:
        """The square root; see :meth:`LearningRateRule.factor`."""
        return min(math.sqrt(_kappa(batch_size, base_batch_size)), self.cap)

    def moments(self, kappa: float, betas: tuple[float, float], eps: float) -> tuple[tuple[float, float], float]:
        r"""The decays and the epsilon that go with a batch :math:`\kappa` times the first one.

        Args:
            kappa: The batch size in units of the first one.
            betas: The decays at the first batch size.
            eps: The epsilon at the first batch size.

        Returns:
            The new decays and the new epsilon.

        Raises:
            ValueError: If ``kappa`` is not positive, or so large that a decay would not be positive.

        Example:
            >>> (first, second), eps = AdamSDE().moments(4.0, (0.9, 0.999), 1e-8)
            >>> round(first, 6), round(second, 6), eps
            (0.6, 0.996, 5e-09)
        """
        if not 0 < kappa < self.largest_kappa(betas):
            raise ValueError(
                f"`AdamSDE`: a batch {kappa:.4g} times the first one makes a decay of {betas} not positive; it must be "
                f"above 0 and below {self.largest_kappa(betas):.4g}: lower the largest batch size or choose `AdaScale`."
            )
        first, second = (1 - kappa * (1 - beta) for beta in betas)
        return (first, second), eps / math.sqrt(kappa)

    @staticmethod
    def largest_kappa(betas: tuple[float, float]) -> float:
        """The ratio of batch sizes below which :meth:`moments` exist.

        Args:
            betas: The decays at the first batch size.

        Returns:
            The bound, which is itself too large.

        Example:
            >>> AdamSDE.largest_kappa((0.75, 0.999))
            4.0
        """
        return 1 / (1 - min(betas))


def default_rule(optimizer: Optimizer) -> LearningRateRule:
    """The rule to use where nobody has chosen one: :class:`AdaScale`, but :class:`SqrtScaling` for Adagrad.

    Adagrad's own steps grow as batches do, because larger batches have smaller gradients; what it has accumulated from
    one step that was too long it never forgets. On MNIST, AdaScale costs Adagrad three points, the square root 0.3.

    Args:
        optimizer: The user's optimizer.

    Returns:
        The rule.

    Example:
        >>> import torch
        >>> weights = [torch.zeros(1, requires_grad=True)]
        >>> default_rule(torch.optim.SGD(weights)), default_rule(torch.optim.Adagrad(weights))
        (AdaScale(cap=10.0, power=1.0), SqrtScaling(cap=10.0))
    """
    return SqrtScaling() if isinstance(optimizer, (Adagrad, AdaGradNorm)) else AdaScale()


def _check_cap(rule: LearningRateRule, cap: float, further: dict[str, bool] | None = None) -> None:
    check_arguments(rule, {f"cap must be at least 1, got {cap!r}": cap >= 1, **(further or {})})


def _kappa(batch_size: float, base_batch_size: float, *numbers: float) -> float:
    """Ratio of the batch sizes; refuses what is not a number."""
    sizes = (batch_size, base_batch_size)
    if not all(0 < size < math.inf for size in sizes) or not all(map(math.isfinite, numbers)):
        raise ValueError(f"no learning rate for batch sizes {sizes} and statistics {numbers}: they must be finite")
    return batch_size / base_batch_size
