r"""How far the mean utility over some tasks may be from that over all: bounds for a hyperparameter tuned across tasks.

Tasks are drawn independently from one distribution; :math:`u_\alpha(x) \in [0, H]` is the utility of task x at the
hyperparameter :math:`\alpha`, a number. A gap bounds :math:`\sup_\alpha |\frac1m \sum_i u_\alpha(x_i) -
\mathbb E\, u_\alpha|` with probability at least :math:`1 - \delta`; the best value on the tasks is then within twice
the gap of the best there is. Counts of oscillations are astronomically large, so they are given and kept as logarithms.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

__all__ = ["Gap", "empirical_gap", "grid_gap", "pdim_from_oscillations", "pdim_order", "tasks_needed", "uniform_gap"]

MOST_TASKS = 10**18


@dataclass(frozen=True)
class Gap:
    """A bound on the distance between the mean over tasks and the expectation.

    Args:
        value: The bound.
        upper: H; utilities lie between 0 and H.
        kind: ``"uniform"``, ``"empirical"`` or ``"grid"``.
        certified: Whether it is proven for the numbers that went in; not where these are estimates themselves.

    Example:
        >>> print(Gap(0.25, upper=1.0, kind="grid"))
        0.25 (grid)
        >>> print(Gap(7.5, upper=1.0, kind="uniform", certified=False))
        vacuous (uniform, not certified)
    """

    value: float
    upper: float
    kind: str
    certified: bool = True

    @property
    def vacuous(self) -> bool:
        """Whether it says no more than that utilities lie between 0 and H."""
        return not self.value < self.upper

    def __float__(self) -> float:
        return self.value

    def __str__(self) -> str:
        label = self.kind if self.certified else f"{self.kind}, not certified"
        return f"{'vacuous' if self.vacuous else format(self.value, '.4g')} ({label})"


def pdim_from_oscillations(log2_b: float) -> int:
    r"""Pseudo-dimension of utilities that oscillate at most B times.

    .. math:: \operatorname{Pdim} \le \max\{n : 2^n \le n B + 1\}

    B counts how often :math:`1[u_\alpha(x) \ge t]` changes along :math:`\alpha`, at the worst threshold t; a value that
    is taken at one point alone counts twice. Then n tasks show at most n B + 1 patterns.

    Args:
        log2_b: :math:`\log_2 B`; minus infinity where utilities do not oscillate.

    Returns:
        The bound.

    Raises:
        ValueError: If ``log2_b`` is neither minus infinity nor a finite number of at least 0.

    References:
        Balcan, Nguyen and Sharma, "Sample complexity of data-driven tuning of model hyperparameters in neural networks
        with structured parameter-dependent dual function", NeurIPS 2025.

    Example:
        >>> [pdim_from_oscillations(log2_b) for log2_b in (0, 10, 100, 20000)]
        [1, 13, 106, 20014]
    """
    _refuse(_count_problems(log2_b))
    if log2_b == -math.inf:
        return 0
    dimension = math.floor(log2_b)
    while dimension + 1 <= _log2_one_more(math.log2(dimension + 1) + log2_b):
        dimension += 1
    return dimension


def pdim_order(log2_pieces: float, variables: int, degree: int, polynomials: int) -> float:
    r"""Order of the pseudo-dimension of piecewise polynomial utilities, up to an unknown constant: not certified.

    .. math:: \operatorname{Pdim} = O(\log N + d \log(\Delta M))

    Args:
        log2_pieces: :math:`\log_2 N`, connected pieces.
        variables: d, weights.
        degree: :math:`\Delta`, of boundaries and pieces, at least 1.
        polynomials: M, boundaries, at least 1.

    Returns:
        The expression in the bracket, with logarithms to base 2; a figure to compare networks by, no bound.

    Raises:
        ValueError: If an argument is out of range; all are listed.

    References:
        Balcan, Nguyen and Sharma, NeurIPS 2025 (order of the main theorem).

    Example:
        >>> pdim_order(log2_pieces=10.0, variables=3, degree=2, polynomials=4)
        19.0
    """
    least = {"variables": (variables, 0), "degree": (degree, 1), "polynomials": (polynomials, 1)}
    problems = [f"{name} must be at least {low}, got {value!r}" for name, (value, low) in least.items() if value < low]
    _refuse([*problems, *([] if 0 <= log2_pieces < math.inf else [f"log2_pieces must be finite, got {log2_pieces!r}"])])
    return log2_pieces + variables * math.log2(degree * polynomials)


def uniform_gap(tasks: int, log2_b: float, delta: float = 0.05, upper: float = 1.0) -> Gap:
    r"""Gap over all values of the hyperparameter, from the largest number of oscillations of any task.

    .. math:: 2 H \sqrt{\frac{2 \ln(2 (m B + 1))}{m}} + H \sqrt{\frac{\ln(1 / \delta)}{2 m}}

    By symmetrisation, Massart's lemma at each threshold and McDiarmid's inequality.

    Args:
        tasks: m.
        log2_b: :math:`\log_2 B`, as for :func:`pdim_from_oscillations`.
        delta: Probability of failure.
        upper: H.

    Returns:
        The gap.

    Raises:
        ValueError: If an argument is out of range; all are listed.

    Example:
        >>> print(uniform_gap(100, log2_b=0.0))
        0.774 (uniform)
        >>> print(uniform_gap(100, log2_b=20000.0))
        vacuous (uniform)
    """
    _refuse([*_problems(tasks, delta, upper), *_count_problems(log2_b)])
    patterns = math.log(2) * _log2_one_more(math.log2(tasks) + log2_b)
    return Gap(_massart(patterns, tasks, upper) + _tail(math.log(1 / delta), tasks, upper), upper, "uniform")


def empirical_gap(oscillations: Sequence[int], delta: float = 0.05, upper: float = 1.0, *, exact: bool = False) -> Gap:
    r"""Gap over all values of the hyperparameter, from the oscillations that these tasks have.

    .. math:: 2 H \sqrt{\frac{2 \ln(2 (\sum_i B_i + 1))}{m}} + 3 H \sqrt{\frac{\ln(4 / \delta)}{2 m}}

    Args:
        oscillations: :math:`B_i` of each task.
        delta: Probability of failure.
        upper: H.
        exact: Whether they are exact. Counts on a grid are lower bounds, and their gap is not certified.

    Returns:
        The gap.

    Raises:
        ValueError: If an argument is out of range; all are listed.

    Example:
        >>> print(empirical_gap([1] * 400, exact=True), empirical_gap([1] * 400))
        0.5877 (empirical) 0.5877 (empirical, not certified)
    """
    negative = [f"oscillations must be at least 0, got {b!r}" for b in oscillations if not b >= 0]
    tasks = len(oscillations)
    _refuse([*_problems(tasks, delta, upper), *negative])
    value = _massart(math.log(sum(oscillations) + 1), tasks, upper) + 3 * _tail(math.log(4 / delta), tasks, upper)
    return Gap(value, upper, "empirical", certified=exact)


def grid_gap(tasks: int, points: int, delta: float = 0.05, upper: float = 1.0) -> Gap:
    r"""Gap over a finite grid that was chosen before the tasks were seen; any training, any utility.

    .. math:: H \sqrt{\frac{\ln(2 |G| / \delta)}{2 m}}

    Args:
        tasks: m.
        points: :math:`|G|`, at least 1; where a search adds points, all that it might have added.
        delta: Probability of failure.
        upper: H.

    Returns:
        The gap.

    Raises:
        ValueError: If an argument is out of range; all are listed.

    Example:
        >>> print(grid_gap(100, points=9))
        0.1716 (grid)
    """
    _refuse([*_problems(tasks, delta, upper), *([] if points >= 1 else [f"points must be at least 1, got {points!r}"])])
    return Gap(_tail(math.log(2 * points) - math.log(delta), tasks, upper), upper, "grid")


def tasks_needed(eps: float, gap: Callable[[int], Gap]) -> int:
    """The fewest tasks whose gap is at most ``eps``, by bisection.

    Args:
        eps: The gap asked for, positive. The tuned value is within twice of it of the best there is.
        gap: The gap as a function of the number of tasks; it must fall.

    Returns:
        The number of tasks.

    Raises:
        ValueError: If ``eps`` is not positive, or 10^18 tasks are too few.

    Example:
        >>> tasks_needed(0.1, lambda m: grid_gap(m, points=9)), tasks_needed(0.1, lambda m: uniform_gap(m, log2_b=0.0))
        (295, 10277)
    """
    _refuse([] if 0 < eps < math.inf else [f"eps must be positive and finite, got {eps!r}"])
    high = 1
    while gap(high).value > eps:
        high *= 2
        if high > MOST_TASKS:
            raise ValueError(f"the gap stays above eps={eps!r} for {MOST_TASKS:.0e} tasks: it is {gap(high).value:.3g}")
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if gap(middle).value > eps else (low, middle)
    return high


def _massart(log_patterns: float, tasks: int, upper: float) -> float:
    """Twice the Rademacher complexity of so many patterns and their negatives, natural logarithm given."""
    return 2 * upper * math.sqrt(2 * (math.log(2) + log_patterns) / tasks)


def _tail(log_inverse_delta: float, tasks: int, upper: float) -> float:
    return upper * math.sqrt(log_inverse_delta / (2 * tasks))


def _log2_one_more(log2_x: float) -> float:
    """log2(x + 1) of a number given by its logarithm."""
    return math.log2(2.0**log2_x + 1) if log2_x < 50 else log2_x + 2.0**-log2_x / math.log(2)


def _count_problems(log2_b: float) -> list[str]:
    known = log2_b == -math.inf or 0 <= log2_b < math.inf
    return [] if known else [f"log2_b must be at least 0 and finite, or -inf for none, got {log2_b!r}"]


def _problems(tasks: int, delta: float, upper: float) -> list[str]:
    checks = {
        f"tasks must be at least 1, got {tasks!r}": tasks >= 1,
        f"delta must be strictly between 0 and 1, got {delta!r}": 0 < delta < 1,
        f"upper must be positive and finite, got {upper!r}": 0 < upper < math.inf,
    }
    return [text for text, holds in checks.items() if not holds]


def _refuse(problems: Sequence[str]) -> None:
    if problems:
        raise ValueError("; ".join(problems))
