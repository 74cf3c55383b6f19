"""Integers that count tokens: checks and runs of blocks, without torch."""

import math
import operator
from collections.abc import Iterable, Iterator, Sequence

__all__ = [
    "constant_drop",
    "halved_at_most",
    "kept_counts",
    "running_counts",
    "segments",
    "store_integers",
    "whole_number",
]


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


def running_counts(
    entry: Sequence[int], prune: Sequence[int], merge: Sequence[int]
) -> tuple[tuple[int, int, int], ...]:
    """Tokens alive in every block: the running minimum of the listed counts, anew in every segment.

    Args:
        entry: Tokens entering each block when nothing is compressed.
        prune: Listed tokens kept after pruning.
        merge: Listed tokens kept after merging.

    Returns:
        For every block the tokens that enter it, those left after pruning and those left after merging.

    Example:
        >>> running_counts([9, 9, 4], [8, 9, 4], [5, 6, 3])
        ((9, 8, 5), (5, 5, 5), (4, 4, 3))
    """
    counts = []
    for start, stop in segments(entry):
        alive = entry[start]
        for after_prune, after_merge in zip(prune[start:stop], merge[start:stop], strict=True):
            pruned = min(alive, after_prune)
            merged = min(pruned, after_merge)
            counts.append((alive, pruned, merged))
            alive = merged
    return tuple(counts)


def halved_at_most(kept: Sequence[int], entry: Sequence[int], prefix: int) -> tuple[int, ...]:
    """Tokens that really stay where patches merge in pairs, so that a block gives up at most half of them.

    Args:
        kept: Tokens that each block is to keep.
        entry: Tokens entering each block when nothing is compressed.
        prefix: Tokens among them that never merge.

    Returns:
        Tokens that leave each block.

    Example:
        >>> halved_at_most([9, 4, 2], [9, 9, 9], prefix=1)
        (9, 5, 3)
    """
    left = []
    for start, stop in segments(entry):
        alive = entry[start] - prefix
        for count in kept[start:stop]:
            alive = min(alive, max(count - prefix, (alive + 1) // 2))
            left.append(alive + prefix)
    return tuple(left)


def constant_drop(
    r: float, entry: Sequence[int], floor: int, first: int = 0, halves: bool = False
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Tokens before and after each block when every block from `first` on gives up `r`.

    Whole tokens go: the drop since the start of the segment is rounded, halves upwards, not the drop of one block.

    Args:
        r: Tokens fewer a block; need not be whole.
        entry: Tokens entering each block when nothing is compressed.
        floor: Fewest tokens ever left.
        first: Blocks before this one give up nothing.
        halves: Whether no block can give up more than half of its patches, as where they merge in pairs; ``floor``
            then counts one patch and the prefix.

    Returns:
        Tokens that enter each block and tokens that leave it.

    Example:
        >>> constant_drop(1.5, [9, 9, 9, 9], floor=2)
        ((9, 7, 6, 4), (7, 6, 4, 3))
        >>> constant_drop(4, [9, 9, 9, 9], floor=2, first=1)
        ((9, 9, 5, 2), (9, 5, 2, 2))
        >>> constant_drop(4, [9, 9, 9, 9], floor=2, first=1, halves=True)
        ((9, 9, 5, 3), (9, 5, 3, 2))
    """
    entering: list[int] = []
    leaving: list[int] = []
    for start, stop in segments(entry):
        steps = [max(0, block + 1 - max(start, first)) for block in range(start, stop)]
        left = [max(floor, entry[start] - math.floor(r * step + 0.5)) for step in steps]
        left = list(halved_at_most(left, entry[start:stop], floor - 1)) if halves else left
        entering += [entry[start], *left[:-1]]
        leaving += left
    return tuple(entering), tuple(leaving)


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


def schedule_problems(entry: Sequence[object], prefix: object, **kept: Sequence[object]) -> list[str]:
    """Everything that is wrong with the lists of a schedule.

    Args:
        entry: Tokens entering each block when nothing is compressed.
        prefix: Class, distillation and register tokens among them.
        kept: Lists of kept tokens by name.

    Returns:
        One sentence a problem, naming the block; none when all is well.

    Example:
        >>> schedule_problems([9, 9], 1, prune=[9, 10], merge=[9])
        ['block 1: `prune` keeps 10 of 9 tokens', '`merge` has 1 entries for 2 blocks']
    """
    problems = [] if len(entry) else ["a schedule needs at least one block"]
    fewest = whole_number(prefix)
    if fewest is None or fewest < 0:
        problems.append(f"`prefix` must be a non-negative integer, got {prefix!r}")
    fewest = max(fewest or 0, 0) + 1
    tokens = [whole_number(value) for value in entry]
    for name, values in {"entry": entry, **kept}.items():
        if len(values) != len(entry):
            problems.append(f"`{name}` has {len(values)} entries for {len(entry)} blocks")
        for block, value in enumerate(values):
            count, entering = whole_number(value), tokens[block] if block < len(tokens) else None
            if count is None:
                problems.append(f"block {block}: `{name}` is not an integer: {value!r}")
            elif count < fewest:
                problems.append(f"block {block}: `{name}` is {count}, at least prefix + 1 = {fewest} tokens must stay")
            elif entering is not None and count > entering:
                problems.append(f"block {block}: `{name}` keeps {count} of {entering} tokens")
    return problems
