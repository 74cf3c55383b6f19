"""Questions that checks of arguments ask."""

from numbers import Real

__all__ = ["is_number", "is_whole"]


def is_number(value: object) -> bool:
    """Whether an argument is a number, so that it can be compared with its bounds.

    Args:
        value: Anything; a bool is no number.

    Returns:
        The answer.

    Example:
        >>> is_number(0.5), is_number(3), is_number("0.5"), is_number(True)
        (True, True, False, False)
    """
    return isinstance(value, Real) and not isinstance(value, bool)


def is_whole(value: object, least: int = 0) -> bool:
    """Whether an argument is a whole number, and not too small.

    Args:
        value: Anything; a bool is no number.
        least: The smallest that will do.

    Returns:
        The answer.

    Example:
        >>> is_whole(3, least=1), is_whole(0, least=1), is_whole(True), is_whole(2.0)
        (True, False, False, False)
    """
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
