"""One condition of a hyper-network: a range or categories, and the map to [0, 1] and back."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_hpo.functional.arguments import is_whole

__all__ = ["Condition"]


@dataclass(frozen=True)
class Condition:
    """One condition: a range, or a number of categories.

    Args:
        low: Smallest value.
        high: Largest value.
        log: Whether equal ratios are equally far apart, instead of equal differences.
        categories: Number of categories; a range where None.

    Raises:
        ValueError: If a range is empty or endless, not above zero with ``log``, or there are fewer than two categories;
            all problems are listed.
        TypeError: If an end of a range is no number.

    Example:
        >>> Condition(1e-4, 1.0, log=True).width, Condition(categories=5).width
        (1, 5)
    """

    low: float = 0.0
    high: float = 1.0
    log: bool = False
    categories: int | None = None

    def __post_init__(self) -> None:
        if not all(isinstance(end, (int, float)) for end in (self.low, self.high)):
            raise TypeError(f"low and high must be numbers, got {self.low!r} and {self.high!r}")
        count, ordered = self.categories, self.low < self.high and math.isfinite(self.high - self.low)
        checks = {
            f"a range must be finite with low < high, got {self.low!r} and {self.high!r}": ordered,
            f"a range on the logarithm must lie above 0, got low={self.low!r}": not self.log or self.low > 0,
            f"categories must be an integer of at least 2, got {count!r}": count is None or is_whole(count, 2),
            "categories have no range": count is None or (self.low, self.high, self.log) == (0.0, 1.0, False),
        }
        if problems := [problem for problem, holds in checks.items() if not holds]:
            raise ValueError("; ".join(problems))

    @property
    def width(self) -> int:
        """How many numbers in [0, 1] stand for it: one, or one a category."""
        return self.categories or 1

    def problem(self, name: str, value: float | Tensor) -> str | None:
        """What is wrong with a value, in words; tensors on other devices are not read."""
        if isinstance(value, Tensor) and value.device.type != "cpu":
            return None
        try:
            value = torch.as_tensor(value, dtype=torch.float64)
        except (TypeError, ValueError, RuntimeError):
            return f"`{name}` must be a number, or one for each example, got {value!r}"
        low, high = (0, self.categories - 1) if self.categories else (self.low, self.high)
        slack = 1e-6 * max(abs(low), abs(high))  # of a value that has been there and back in 32 bits
        fine = (value >= (low * (1 - 1e-6) if self.log else low - slack)) & (value <= high + slack)  # false for nan
        if self.categories:
            fine &= value == value.round()
        if value.ndim > 1:
            return f"`{name}` must be a number, or one for each example, got shape {tuple(value.shape)}"
        if bool(fine.all()):
            return None
        wanted = f"a category from 0 to {high}" if self.categories else f"from {low:g} to {high:g}"
        return f"`{name}` must be {wanted}, got {value.tolist()}"

    def problem_of_gamma(self, name: str, gamma: Tensor) -> str | None:
        """What is wrong with numbers ``(..., width)`` that should lie in [0, 1], in words."""
        fine = (gamma >= 0) & (gamma <= 1)  # false for nan
        if bool(fine.all()):
            return None
        if self.categories:
            return f"`{name}` must be {self.categories} numbers from 0 to 1, got {gamma.tolist()}"
        values = self.decode(gamma).tolist()
        return f"`{name}` must be from {self.low:g} to {self.high:g}, got {values} (gamma {gamma[..., 0].tolist()})"

    def encode(self, value: Tensor) -> Tensor:
        """``(...)`` to ``(..., width)`` in [0, 1]."""
        if self.categories:
            return F.one_hot(value.long(), self.categories).to(torch.get_default_dtype())
        low, high, value = (self.low, self.high, value)
        if self.log:
            low, high, value = math.log(low), math.log(high), value.log()
        return ((value - low) / (high - low)).clamp(0, 1)[..., None]

    def decode(self, gamma: Tensor) -> Tensor:
        """``(..., width)`` back to ``(...)``; differentiable for a range."""
        if self.categories:
            return gamma.argmax(-1)
        gamma = gamma[..., 0]
        if self.log:
            return torch.exp(math.log(self.low) + gamma * math.log(self.high / self.low))
        return self.low + (self.high - self.low) * gamma

    def from_uniform(self, uniform: Tensor) -> Tensor:
        """Numbers in [0, 1) ``(...)`` to ``(..., width)``: themselves, or a category each."""
        if self.categories:
            return self.encode((uniform * self.categories).floor().clamp(max=self.categories - 1))
        return uniform[..., None]
