"""A budget of multiply-accumulates, as people write it."""

import math
import re

__all__ = ["parse_budget"]

_UNITS = {"": 1.0, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
_FEWEST = 1000  # a smaller count is a number of G, or a percentage, that lost its unit
_FORMS = "give a fraction of the dense cost (0.6), multiply-accumulates (2.9e9), or a string with a unit ('2.9G')"


def parse_budget(target: float | int | str) -> tuple[float | None, float | None]:
    """Reads a budget given as a fraction, a number of multiply-accumulates or a string with a unit.

    Args:
        target: ``0 < target < 1``, a number of at least 1000, or a string such as ``"2.9G"``, ``"850M"``, ``"0.6"``.

    Returns:
        The fraction and the multiply-accumulates; the one that was not given is None.

    Raises:
        ValueError: If it is none of the three.

    Example:
        >>> parse_budget("2.9G"), parse_budget(0.6)
        ((None, 2900000000.0), (0.6, None))
    """
    value = _number(target)
    if value is not None and 0 < value < 1:
        return value, None
    if value is not None and value >= _FEWEST:
        return None, value
    raise ValueError(f"target {target!r} is no budget: {_FORMS}.")


def _number(target: float | int | str) -> float | None:
    if isinstance(target, str):
        match = re.fullmatch(r"\s*(\d+\.?\d*(?:e[+-]?\d+)?)\s*([KMGT]?)(?:MACs?)?\s*", target, re.IGNORECASE)
        return float(match[1]) * _UNITS[match[2].upper()] if match else None
    if isinstance(target, bool) or not isinstance(target, (int, float)) or not math.isfinite(target):
        return None
    return float(target)
