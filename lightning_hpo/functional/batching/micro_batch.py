"""Search for the largest size that fits."""

from collections.abc import Callable

__all__ = ["largest_fitting"]


def largest_fitting(
    fits: Callable[[int], bool], start: int, maximum: int, factor: int = 2, refine: bool = False
) -> int:
    """The largest size that fits, by growing geometrically and, if wanted, by bisection after that.

    What fits must still fit when it is smaller. No size is tried twice, and none above ``maximum``.

    Args:
        fits: Whether a size fits; where ranks must agree, the answer must be the same on all of them.
        start: First size to try; if it does not fit, smaller ones are.
        maximum: Largest size to try.
        factor: Ratio of one size to the next, at least 2.
        refine: Whether to bisect between the last size that fits and the first that does not; otherwise the result
            is ``start`` times or over a power of ``factor``, or ``maximum``.

    Returns:
        The size.

    Raises:
        ValueError: If an argument is out of range (all are listed), or if even 1 does not fit.

    Example:
        >>> largest_fitting(lambda size: size <= 100, start=1, maximum=4096)
        64
        >>> largest_fitting(lambda size: size <= 100, start=1, maximum=4096, refine=True)
        100
    """
    checks = {
        f"start must be at least 1, got {start!r}": start >= 1,
        f"maximum must be at least start={start!r}, got {maximum!r}": maximum >= start,
        f"factor must be at least 2, got {factor!r}": factor >= 2,
    }
    if problems := [problem for problem, fine in checks.items() if not fine]:
        raise ValueError("; ".join(problems))
    good, bad = _bracket(fits, start, maximum, factor)
    while refine and bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    return good


def _bracket(fits: Callable[[int], bool], start: int, maximum: int, factor: int) -> tuple[int, int]:
    """The last size tried that fits, and the next larger one tried, which does not."""
    size = start
    if fits(size):
        while size < maximum:
            larger = min(size * factor, maximum)
            if not fits(larger):
                return size, larger
            size = larger
        return size, size + 1
    while size > 1:
        smaller = size // factor or 1
        if fits(smaller):
            return smaller, size
        size = smaller
    raise ValueError("not even 1 fits")
