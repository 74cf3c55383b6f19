"""What every batch size policy has."""

import math
from collections.abc import Mapping
from typing import ClassVar, Literal, Protocol, runtime_checkable

from lightning_hpo.functional.batching.adadagrad import GradientStatistics

__all__ = ["Policy", "check_arguments", "positive"]


@runtime_checkable
class Policy(Protocol):
    """Which batch size do the statistics of the gradient ask for? A pure function of them.

    ``needs`` names the statistics that a policy reads: ``"trace"`` (``trace`` and ``square``), ``"inner"`` (``inner``
    and ``orthogonal``), ``"coordinate"``, ``"loss"``; a ramp, which reads ``batch_size`` and ``samples`` only, names
    none. ``when`` says whether it decides after steps or at the end of epochs, ``shrinks`` whether it may ask for less.
    Inherit from this class, so that the command line knows your policy by its short name.

    Example:
        >>> class Double(Policy):
        ...     needs = frozenset()
        ...     def __call__(self, statistics):
        ...         return 2 * statistics.batch_size
        >>> double = Double()
        >>> double(GradientStatistics(batch_size=8, trace=0.0, square=1.0)), double.when, double.shrinks
        (16, 'step', False)
    """

    needs: ClassVar[frozenset[str]]
    when: ClassVar[Literal["step", "epoch"]] = "step"
    shrinks: ClassVar[bool] = False

    def __call__(self, statistics: GradientStatistics) -> float:
        """The batch size asked for, from 0 to infinity; the caller rounds and limits it."""
        ...


def positive(**values: float) -> dict[str, bool]:
    """Statements that values are positive and finite, for :func:`check_arguments`.

    Args:
        values: Numbers by name.

    Returns:
        For each what to say if it is not, and whether it is.

    Example:
        >>> positive(eta=0.5)
        {'eta must be positive and finite, got 0.5': True}
    """
    return {f"{name} must be positive and finite, got {v!r}": 0 < v < math.inf for name, v in values.items()}


def check_arguments(owner: object, checks: Mapping[str, bool]) -> None:
    """Refuses wrong arguments.

    Args:
        owner: The object under construction.
        checks: Problems, and whether each is absent.

    Raises:
        ValueError: If a problem is there; all are listed.

    Example:
        >>> check_arguments("text", positive(eta=0.5))
    """
    if problems := [problem for problem, fine in checks.items() if not fine]:
        raise ValueError(f"`{type(owner).__name__}`: {'; '.join(problems)}.")
