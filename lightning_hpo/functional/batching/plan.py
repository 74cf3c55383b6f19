"""How a batch size becomes micro-batches, and how far it may move at once."""

import math
from dataclasses import dataclass

from lightning_hpo.functional.batching.policy import check_arguments

__all__ = ["BatchPlan", "next_batch_size", "plan_for"]


@dataclass(frozen=True)
class BatchPlan:
    """How the samples of one optimizer step are laid out.

    Args:
        micro: Samples of one forward pass on one rank.
        accumulation: Micro-batches of one rank in one optimizer step.

    Raises:
        ValueError: If a number is below 1; both are listed.

    Example:
        >>> BatchPlan(micro=16, accumulation=4).samples(ranks=2)
        128
    """

    micro: int
    accumulation: int = 1

    def __post_init__(self) -> None:
        numbers = (("micro", self.micro), ("accumulation", self.accumulation))
        check_arguments(self, {f"{name} must be at least 1, got {value!r}": value >= 1 for name, value in numbers})

    def samples(self, ranks: int = 1) -> int:
        """Samples of one optimizer step over all ranks: the batch size."""
        return ranks * self.accumulation * self.micro

    def may_give_way(self, following: "BatchPlan", batches: int) -> bool:
        """Whether another plan may begin after so many micro-batches of an epoch: at multiples of both accumulations.

        Lightning clears gradients and steps by the number of the batch, so anywhere else windows would mix.
        """
        return batches % self.accumulation == 0 and batches % following.accumulation == 0


def plan_for(
    batch_size: int,
    ranks: int,
    max_micro: int,
    accumulation_multiple_of: int = 1,
    min_groups: int = 1,
    max_batch: int | None = None,
) -> BatchPlan:
    """The plan with the fewest micro-batches for a batch size.

    The accumulation is a power of two times ``accumulation_multiple_of``, so that plans can follow one another at
    common multiples. The batch is rounded up to a whole number of micro-batches, but not beyond ``max_batch``.

    Args:
        batch_size: Samples of one optimizer step, over all ranks.
        ranks: Number of ranks.
        max_micro: Largest micro-batch.
        accumulation_multiple_of: What the accumulation must be a multiple of.
        min_groups: Fewest micro-batches of one step over all ranks; the noise is estimated from the differences
            between them.
        max_batch: Largest batch size.

    Returns:
        The plan.

    Raises:
        ValueError: If a number is below 1, or ``max_batch`` has no room for one sample in each micro-batch; all
            problems are listed.

    Example:
        >>> plan_for(100, ranks=2, max_micro=16)
        BatchPlan(micro=13, accumulation=4)
        >>> plan_for(100, ranks=2, max_micro=16, max_batch=100)
        BatchPlan(micro=12, accumulation=4)
    """
    numbers = {
        "batch_size": batch_size,
        "ranks": ranks,
        "max_micro": max_micro,
        "accumulation_multiple_of": accumulation_multiple_of,
        "min_groups": min_groups,
        "max_batch": batch_size if max_batch is None else max_batch,
    }
    if problems := [f"{name} must be at least 1, got {value!r}" for name, value in numbers.items() if not value >= 1]:
        raise ValueError("; ".join(problems))
    wanted = batch_size if max_batch is None else min(batch_size, max_batch)
    accumulation = accumulation_multiple_of
    while ranks * accumulation < min_groups:
        accumulation *= 2
    fewest = ranks * accumulation
    if max_batch is not None and fewest > max_batch:
        raise ValueError(
            f"max_batch={max_batch} has no room for {fewest} micro-batches ({ranks} ranks, accumulation a multiple of "
            f"{accumulation_multiple_of}, at least {min_groups} groups)"
        )
    while -(-wanted // (ranks * accumulation)) > max_micro:
        accumulation *= 2
    while max_batch is not None and ranks * accumulation > max_batch:  # tiny micro-batches: rather fewer samples
        accumulation //= 2
    micro = min(-(-wanted // (ranks * accumulation)), max_micro)
    if max_batch is not None:
        micro = min(micro, max_batch // (ranks * accumulation))
    return BatchPlan(micro, accumulation)


def next_batch_size(
    asked: float, current: int, minimum: int, maximum: int, growth: float = 2.0, shrinks: bool = False
) -> int:
    """The batch size to use next: what a policy asks for, rounded up, within what one decision may change.

    Near a minimum of the loss a policy may ask for everything at once; a bounded growth gives the estimate time to
    prove itself.

    Args:
        asked: What the policy asks for; may be infinite.
        current: The present batch size.
        minimum: Smallest batch size.
        maximum: Largest batch size.
        growth: Largest factor of one decision, above 1; its inverse bounds shrinking. One sample more or less is
            always allowed.
        shrinks: Whether the batch may become smaller than ``current``.

    Returns:
        The batch size, from ``minimum`` to ``maximum``.

    Raises:
        ValueError: If ``asked`` is not a number, ``growth`` not above 1, or the bounds are in disorder; all problems
            are listed.

    Example:
        >>> next_batch_size(33.2, 32, 8, 1024), next_batch_size(500.0, 32, 8, 1024), next_batch_size(20.0, 32, 8, 1024)
        (34, 64, 32)
        >>> next_batch_size(20.0, 32, 8, 1024, shrinks=True), next_batch_size(2.0, 32, 8, 1024, shrinks=True)
        (20, 16)
    """
    checks = {
        "the policy asks for a batch size that is not a number": not math.isnan(asked),
        f"growth must be above 1, got {growth!r}": growth > 1,
        f"sizes must be in the order 1 <= minimum <= maximum, got {minimum!r}, {maximum!r}": 1 <= minimum <= maximum,
        f"current must be at least 1, got {current!r}": current >= 1,
    }
    if problems := [problem for problem, fine in checks.items() if not fine]:
        raise ValueError("; ".join(problems))
    highest = maximum if current * growth >= maximum else max(math.floor(current * growth), current + 1)
    lowest = min(math.ceil(current / growth), current - 1) if shrinks else current
    wanted = highest if asked >= highest else math.ceil(max(asked, lowest))
    return min(max(wanted, minimum), maximum)
