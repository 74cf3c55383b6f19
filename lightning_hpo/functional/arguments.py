"""Questions that checks of arguments ask."""

__all__ = ["is_whole"]


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
