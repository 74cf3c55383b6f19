"""Integers that count tokens: checks and runs of blocks, without torch."""

import operator
from collections.abc import Iterable, Iterator, Sequence

__all__ = ["kept_counts", "segments", "store_integers", "whole_number"]


def whole_number(value: object) -> int | None:
    """`value` as an `int`, or None where it is not of an integer type.

    Booleans are refused, and so are floats that happen to be whole. Integers of numpy are fine.

    Args:
        value: Anything.

    Returns:
        A plain `int`, or None.

    Example:
        >>> whole_number(3), whole_number(3.0), whole_number(True)
        (3, None, None)
    """
    if isinstance(value, bool) or "bool" in str(getattr(value, "dtype", "")):
        return None
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError):
        return None


def segments(entry: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Ranges of blocks between which the tokens start anew.

    Args:
        entry: Tokens entering each block when nothing is compressed.

    Yields:
        First block and one past the last, for every run of equal values.

    Example:
        >>> list(segments([196, 196, 49]))
        [(0, 2), (2, 3)]
    """
    start = 0
    for stop in range(1, len(entry) + 1):
        if stop == len(entry) or entry[stop] != entry[start]:
            yield start, stop
            start = stop


def kept_counts(name: str, values: Iterable[object], depth: int) -> tuple[int, ...]:
    """Checks a list with one non-negative integer a block.

    Args:
        name: What the list is called in the error.
        values: The list.
        depth: Blocks of the model.

    Returns:
        Plain integers.

    Raises:
        ValueError: If the length is another one, or an entry is not a non-negative integer.

    Example:
        >>> kept_counts("prune", [3, 2], depth=2)
        (3, 2)
    """
    listed = tuple(values)
    integers = tuple(integer for value in listed if (integer := whole_number(value)) is not None and integer >= 0)
    if len(integers) != len(listed):
        raise ValueError(f"`{name}` must hold non-negative integers, got {listed}.")
    if len(integers) != depth:
        raise ValueError(f"`{name}` has {len(integers)} entries, the model has {depth} blocks.")
    return integers


def store_integers(owner: object, names: Sequence[str]) -> None:
    """Replaces the named fields of a frozen dataclass by plain integers.

    Args:
        owner: The dataclass.
        names: Its fields to convert.

    Raises:
        ValueError: If a field is not a non-negative integer; all of them are listed.
    """
    values = {name: whole_number(getattr(owner, name)) for name in names}
    wrong = [f"`{name}`={getattr(owner, name)!r}" for name, value in values.items() if value is None or value < 0]
    if wrong:
        raise ValueError(f"{type(owner).__name__} takes non-negative integers, got {', '.join(wrong)}.")
    for name, value in values.items():
        object.__setattr__(owner, name, value)
