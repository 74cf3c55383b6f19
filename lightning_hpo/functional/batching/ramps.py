"""Batch size ramps: schedules in samples that look at no gradient, the baselines of every adaptive policy."""

import math
from dataclasses import KW_ONLY, dataclass

from lightning_hpo.functional.arguments import is_whole
from lightning_hpo.functional.batching.adadagrad import GradientStatistics
from lightning_hpo.functional.batching.policy import Policy, check_arguments

__all__ = ["LinearRamp", "StageWise"]


@dataclass(frozen=True)
class StageWise(Policy):
    """One batch size after the other, each for the same number of samples.

    Args:
        sizes: Batch sizes in order; those of the reference experiments, if left out.
        samples: Samples of all stages together; the last size stays from then on.

    Raises:
        ValueError: If a size or ``samples`` is not a positive integer; all are listed.

    References:
        The baseline of Lau et al., "AdAdaGrad: Adaptive Batch Size Schemes for Adaptive Gradient Methods", 2024.

    Example:
        >>> policy = StageWise((8, 16, 32), samples=300)
        >>> seen = (0, 99, 100, 250, 1000)
        >>> [policy(GradientStatistics(batch_size=8, trace=0.0, square=1.0, samples=n)) for n in seen]
        [8.0, 8.0, 16.0, 32.0, 32.0]
    """

    needs = frozenset[str]()
    shrinks = True  # sizes may be in any order

    sizes: tuple[int, ...] = (512, 1024, 2048, 4096, 8192, 16384, 32768, 60000)
    _: KW_ONLY
    samples: int

    def __post_init__(self) -> None:
        check_arguments(
            self,
            {
                f"sizes must be positive integers, at least one, got {self.sizes!r}": len(self.sizes) > 0
                and all(is_whole(size, 1) for size in self.sizes),
                f"samples must be a positive integer, got {self.samples!r}": is_whole(self.samples, 1),
            },
        )

    def __call__(self, statistics: GradientStatistics) -> float:
        """The batch size of the stage."""
        stage = int(statistics.samples * len(self.sizes) // self.samples)
        return float(self.sizes[min(stage, len(self.sizes) - 1)])


@dataclass(frozen=True)
class LinearRamp(Policy):
    r"""The same increment again and again: after ``every`` steps of one size, the next size.

    Stage :math:`s` has ``every`` steps of :math:`b_0 + s c` samples. The stage is found from the samples seen, so a
    resumed or a rounded ramp stays on course.

    Args:
        increment: Samples :math:`c` to add.
        every: Optimizer steps of each size.
        start: First batch size :math:`b_0`.

    Raises:
        ValueError: If an argument is not a positive integer; all are listed.

    References:
        The baseline of Lau et al., "AdAdaGrad: Adaptive Batch Size Schemes for Adaptive Gradient Methods", 2024.

    Example:
        >>> policy = LinearRamp(increment=4, every=2, start=8)
        >>> seen = (0, 8, 16, 28, 40)  # two steps of 8, then two steps of 12
        >>> [policy(GradientStatistics(batch_size=8, trace=0.0, square=1.0, samples=n)) for n in seen]
        [8.0, 8.0, 12.0, 12.0, 16.0]
    """

    needs = frozenset[str]()

    increment: int = 256
    every: int = 1
    start: int = 256

    def __post_init__(self) -> None:
        arguments = (("increment", self.increment), ("every", self.every), ("start", self.start))
        check_arguments(self, {f"{n} must be a positive integer, got {v!r}": is_whole(v, 1) for n, v in arguments})

    def __call__(self, statistics: GradientStatistics) -> float:
        """The batch size of the stage."""
        # The largest stage s whose beginning, every * (s b0 + c s (s - 1) / 2) samples, is past; exact in integers.
        linear, seen = 2 * self.start - self.increment, int(statistics.samples) // self.every
        stage = (math.isqrt(linear**2 + 8 * self.increment * seen) - linear) // (2 * self.increment)
        return float(self.start + self.increment * stage)
