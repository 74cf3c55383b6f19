"""Learning rate schedules in samples: a step that uses twice the samples moves twice as far along them."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

__all__ = ["SampleCosine", "SampleLR", "SampleLinear"]


class SampleLR(LRScheduler):
    """Learning rate as a function of the samples seen, times the learning rate the optimizer started with.

    Like ``LambdaLR``, but in samples, so that a batch size that changes does not bend the schedule. Whoever trains
    says with :meth:`advance` how many samples a step used, before :meth:`step`; ``AdaptiveBatchSize`` does that.

    Args:
        optimizer: The optimizer.
        lr_lambda: Factor as a function of the samples seen; a sequence gives each parameter group its own. Functions
            are not saved: construct the scheduler with the same ones on resume.

    Raises:
        ValueError: If there are not as many functions as parameter groups.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
        >>> scheduler = SampleLR(optimizer, lambda samples: 1 / (1 + samples / 100))
        >>> for batch_size in (100, 200):
        ...     optimizer.step()
        ...     scheduler.advance(batch_size)
        ...     scheduler.step()
        >>> scheduler.samples, scheduler.get_last_lr()
        (300, [0.125])
    """

    def __init__(
        self, optimizer: Optimizer, lr_lambda: Callable[[int], float] | Sequence[Callable[[int], float]]
    ) -> None:
        groups = len(optimizer.param_groups)
        self.lr_lambdas = list(lr_lambda) if isinstance(lr_lambda, Sequence) else [lr_lambda] * groups
        if len(self.lr_lambdas) != groups:
            raise ValueError(f"{len(self.lr_lambdas)} functions were given for {groups} parameter groups")
        self.samples = 0
        self._told = False  # not saved: a resumed run must be told as well
        super().__init__(optimizer)

    def advance(self, samples: int) -> None:
        """Adds the samples of an optimizer step, over all ranks, to those seen.

        Args:
            samples: How many.

        Raises:
            ValueError: If the number is negative.
        """
        if samples < 0:
            raise ValueError(f"samples must not be negative, got {samples}")
        self.samples += int(samples)
        self._told = True

    def step(self, epoch: int | None = None) -> None:
        """Sets the learning rate for the samples seen.

        Args:
            epoch: As for any scheduler; it does not move the schedule.

        Raises:
            RuntimeError: If :meth:`advance` was never called.
        """
        if self._step_count and not self._told:
            raise RuntimeError(
                f"`{type(self).__name__}` counts samples and nobody tells it how many: put `AdaptiveBatchSize` into "
                "the Trainer's callbacks, or call `scheduler.advance(samples)` after each optimizer step."
            )
        super().step(epoch)

    def get_lr(self) -> list[float | Tensor]:
        """Learning rates in closed form, so that nobody's change to ``group["lr"]`` is compounded."""
        return [base * factor(self.samples) for base, factor in zip(self.base_lrs, self.lr_lambdas, strict=True)]

    def state_dict(self) -> dict[str, Any]:
        """Samples seen and first learning rates, without the functions."""
        return {name: value for name, value in super().state_dict().items() if name not in ("lr_lambdas", "_told")}


class SampleCosine(SampleLR):
    r"""Linear warm-up, then half a cosine, in samples.

    Args:
        optimizer: The optimizer.
        total: Samples of the whole schedule; the last factor stays after that.
        warmup: Samples of the warm-up, which rises from ``min_factor`` to 1.
        min_factor: Last factor, and the first one if there is a warm-up.

    Raises:
        ValueError: If an argument is out of range; all are listed.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        >>> scheduler = SampleCosine(optimizer, total=1000, warmup=200, min_factor=0.1)
        >>> [round(factor(n), 3) for factor in scheduler.lr_lambdas for n in (0, 100, 200, 600, 1000, 2000)]
        [0.1, 0.55, 1.0, 0.55, 0.1, 0.1]
    """

    def __init__(self, optimizer: Optimizer, total: int, warmup: int = 0, min_factor: float = 0.1) -> None:
        _check(self, total, warmup, min_factor)
        super().__init__(optimizer, partial(_factor, _cosine, total, warmup, min_factor))


class SampleLinear(SampleLR):
    """Linear warm-up, then a straight line down, in samples.

    Args:
        optimizer: The optimizer.
        total: Samples of the whole schedule; the last factor stays after that.
        warmup: Samples of the warm-up, which rises from ``min_factor`` to 1.
        min_factor: Last factor, and the first one if there is a warm-up.

    Raises:
        ValueError: If an argument is out of range; all are listed.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        >>> scheduler = SampleLinear(optimizer, total=1000, min_factor=0.2)
        >>> [round(factor(n), 3) for factor in scheduler.lr_lambdas for n in (0, 500, 1000, 2000)]
        [1.0, 0.6, 0.2, 0.2]
    """

    def __init__(self, optimizer: Optimizer, total: int, warmup: int = 0, min_factor: float = 0.1) -> None:
        _check(self, total, warmup, min_factor)
        super().__init__(optimizer, partial(_factor, _line, total, warmup, min_factor))


def _cosine(progress: float) -> float:
    return (1 + math.cos(math.pi * progress)) / 2


def _line(progress: float) -> float:
    return 1 - progress


def _factor(fall: Callable[[float], float], total: int, warmup: int, min_factor: float, samples: int) -> float:
    """``min_factor`` plus what is above it: the share of the warm-up that is done, then what ``fall`` leaves."""
    above = samples / warmup if samples < warmup else fall(min((samples - warmup) / (total - warmup), 1.0))
    return min_factor + (1 - min_factor) * above


def _check(scheduler: SampleLR, total: int, warmup: int, min_factor: float) -> None:
    checks = {
        f"warmup must not be negative and total must be larger, got warmup={warmup!r}, total={total!r}": 0
        <= warmup
        < total,
        f"min_factor must lie between 0 and 1, got {min_factor!r}": 0 <= min_factor <= 1,
    }
    if problems := [problem for problem, fine in checks.items() if not fine]:
        raise ValueError(f"`{type(scheduler).__name__}`: {'; '.join(problems)}.")
