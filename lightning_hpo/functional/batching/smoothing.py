"""Exponential moving averages of named numbers."""

import math
from collections.abc import Mapping
from typing import Any

__all__ = ["Smoothed"]


class Smoothed:
    r"""Exponential moving averages of named numbers, each with its own correction of the start.

    Of a quantity :math:`x` it keeps :math:`a \leftarrow \beta a + (1 - \beta) x` and, in the same way, the weight
    :math:`w` of what it has seen, and gives :math:`a / w`. Numerator and denominator of a ratio are to be smoothed each
    on its own: the average of a ratio is dominated by its outliers.

    Args:
        decay: The decay :math:`\beta`; 0 smooths nothing.

    Raises:
        ValueError: If ``decay`` is not in ``[0, 1)``.

    Example:
        >>> smoothed = Smoothed(decay=0.5)
        >>> smoothed.update({"trace": 3.0, "square": 1.0}), smoothed.update({"trace": 6.0})
        ({'trace': 3.0, 'square': 1.0}, {'trace': 5.0})
    """

    def __init__(self, decay: float = 0.9) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be at least 0 and below 1, got {decay!r}")
        self.decay = decay
        self._averages: dict[str, tuple[float, float]] = {}  # of each quantity: weighted sum, weight

    def update(self, values: Mapping[str, float]) -> dict[str, float]:
        """Takes in new values and returns the averages of the same names.

        Args:
            values: Finite numbers by name; a name that is missing keeps its average as it is.

        Returns:
            The averages, as plain floats.

        Raises:
            ValueError: If a value is not finite; then nothing is taken in.
        """
        if wrong := [f"{name} is {value}" for name, value in values.items() if not math.isfinite(value)]:
            raise ValueError(f"only finite numbers can be averaged: {', '.join(wrong)}")
        for name, value in values.items():
            total, weight = self._averages.get(name, (0.0, 0.0))
            kept, new = self.decay, 1 - self.decay
            self._averages[name] = (kept * total + new * float(value), kept * weight + new)
        return {name: self._averages[name][0] / self._averages[name][1] for name in values}

    def state_dict(self) -> dict[str, Any]:
        """Sums and weights by name, as plain types; the decay belongs to the constructor."""
        return {name: list(pair) for name, pair in self._averages.items()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restores what :meth:`state_dict` gave."""
        self._averages = {name: (float(total), float(weight)) for name, (total, weight) in state_dict.items()}
