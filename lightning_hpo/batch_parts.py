"""Parts of a batch, also where it comes in micro-batches."""

from collections.abc import Mapping
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

__all__ = ["part_of", "rows_of"]

_CONSTANTS = (bool, int, float, str, bytes, type(None))


def rows_of(batch: Any) -> int:
    """How many examples a batch has: the first dimension of the first tensor in it.

    Args:
        batch: Tensors in any nesting.

    Returns:
        The number.

    Raises:
        ValueError: If there is no tensor.

    Example:
        >>> rows_of({"x": [torch.zeros(5, 2)]})
        5
    """
    if isinstance(batch, torch.Tensor) and batch.ndim:
        return batch.shape[0]
    inside = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (list, tuple)) else ()
    for item in inside:
        try:
            return rows_of(item)
        except ValueError:
            continue
    raise ValueError(f"a batch must hold a tensor with examples along its first dimension, got {type(batch).__name__}")


def part_of(batch: Any, parts: int, turn: int, place: int = 0, of: int = 1) -> tuple[Any, float]:
    """What a micro-batch has of one of several consecutive parts of a batch, in views of its tensors.

    Args:
        batch: Tensors in dictionaries, lists and tuples; those with as many rows as the first are cut, and lists of
            as many constants.
        parts: How many parts the batch is cut into.
        turn: Which one is next, modulo their number.
        place: Which of its micro-batches this is.
        of: How many of the same size make the batch.

    Returns:
        The examples that are in both, None where there are none, and their share of the part. Everything, with the
        share 1 / ``of``, if a part had less than two examples, which batch norm would refuse, or if there is something
        besides tensors and constants in it, which may hold examples.

    Example:
        >>> part_of({"x": torch.arange(5), "weight": 0.5}, parts=2, turn=3)
        ({'x': tensor([2, 3, 4]), 'weight': 0.5}, 1.0)
        >>> [part_of(micro, parts=2, turn=0, place=i, of=2) for i, micro in enumerate(torch.arange(8).split(4))]
        [(tensor([0, 1, 2, 3]), 1.0), (None, 0.0)]
    """
    size = rows_of(batch)
    if parts == 1 or size * of < 2 * parts:
        return batch, 1 / of
    first, last = (_border(turn % parts + end, parts, size, of) for end in (0, 1))

    def listed(node: Any) -> bool:  # names or numbers, one for each example
        return isinstance(node, (list, tuple)) and len(node) == size and all(isinstance(e, _CONSTANTS) for e in node)

    leaves, structure = tree_flatten(batch, is_leaf=listed)
    if not all(isinstance(leaf, (torch.Tensor, *_CONSTANTS)) or listed(leaf) for leaf in leaves):
        return batch, 1 / of
    own = slice(max(first - place * size, 0), min(last - place * size, size))
    if own.start >= own.stop:
        return None, 0.0

    def cut(leaf: Any) -> Any:
        return leaf[own] if listed(leaf) or (isinstance(leaf, torch.Tensor) and leaf.shape[:1] == (size,)) else leaf

    return tree_unflatten([cut(leaf) for leaf in leaves], structure), (own.stop - own.start) / (last - first)


def _border(index: int, parts: int, size: int, of: int) -> int:
    """Where a part begins, moved by one where it would leave a single example of a micro-batch by itself."""
    border = index * size * of // parts
    inside = border % size
    if size > 1 and inside == 1:
        return border - 1
    return border + 1 if size > 1 and inside == size - 1 else border
