"""Named conditions of a hyper-network: their ranges, the maps to [0, 1] and back, and grids."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Condition", "ConditionSpec"]


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

    Example:
        >>> Condition(1e-4, 1.0, log=True).width, Condition(categories=5).width
        (1, 5)
    """

    low: float = 0.0
    high: float = 1.0
    log: bool = False
    categories: int | None = None

    def __post_init__(self) -> None:
        count, ordered = self.categories, self.low < self.high and math.isfinite(self.high - self.low)
        checks = {
            f"a range must be finite with low < high, got {self.low!r} and {self.high!r}": ordered,
            f"a range on the logarithm must lie above 0, got low={self.low!r}": not self.log or self.low > 0,
            f"categories must be an integer of at least 2, got {count!r}": count is None
            or (isinstance(count, int) and not isinstance(count, bool) and count > 1),
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
        value = torch.as_tensor(value, dtype=torch.float64)
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


class ConditionSpec:
    r"""What a network is conditioned on: named ranges and categories, seen by a hyper-network as :math:`[0, 1]^k`.

    A range is mapped linearly, or linearly in its logarithm; categories are one number each, one of which is 1.

    Example:
        >>> spec = ConditionSpec().add("decay", 1e-4, 1.0, log=True).add("task", categories=3)
        >>> gamma = spec.encode({"decay": 1e-2, "task": 2})
        >>> gamma
        tensor([0.5000, 0.0000, 0.0000, 1.0000])
        >>> {name: round(value.item(), 4) for name, value in spec.decode(gamma).items()}
        {'decay': 0.01, 'task': 2}
    """

    def __init__(self) -> None:
        self.conditions: dict[str, Condition] = {}

    def add(
        self, name: str, low: float = 0.0, high: float = 1.0, log: bool = False, categories: int | None = None
    ) -> "ConditionSpec":
        """Adds a condition.

        Args:
            name: Its name.
            low: Smallest value.
            high: Largest value.
            log: Whether equal ratios are equally far apart.
            categories: Number of categories, instead of a range.

        Returns:
            This very object.

        Raises:
            ValueError: If the name is taken, or the range wrong.
        """
        if name in self.conditions:
            raise ValueError(f"there is a condition `{name}` already")
        try:
            self.conditions[name] = Condition(low, high, log, categories)
        except ValueError as error:
            raise ValueError(f"`{name}`: {error}") from None
        return self

    def __iter__(self) -> Iterator[str]:
        return iter(self.conditions)

    def __len__(self) -> int:
        return sum(condition.width for condition in self.conditions.values())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ConditionSpec) and list(self.conditions.items()) == list(other.conditions.items())

    __hash__ = None  # type: ignore[assignment]

    def encode(self, values: Mapping[str, float | Tensor]) -> Tensor:
        """What the hyper-network is given for some values.

        Numbers and tensors on the CPU are checked; reading others would make the host wait for the device.

        Args:
            values: By name, a number or ``(batch)`` each.

        Returns:
            ``(k)``, or ``(batch, k)``.

        Raises:
            ValueError: If a name is missing or unknown, or a value not in its range; all are listed.
        """
        problems = [
            f"there is no condition `{name}`, but {list(self)}" for name in values if name not in self.conditions
        ]
        problems += [f"`{name}` is missing" for name in self if name not in values]
        known = [(name, values[name], c) for name, c in self.conditions.items() if name in values]
        problems += [problem for name, value, c in known if (problem := c.problem(name, value))]
        if problems:
            raise ValueError("; ".join(problems))
        tensors = [torch.as_tensor(value, dtype=torch.get_default_dtype()) for _, value, _ in known]
        shape = torch.broadcast_shapes(*(value.shape for value in tensors))
        return torch.cat([c.encode(v.expand(shape)) for v, (_, _, c) in zip(tensors, known, strict=True)], -1)

    def decode(self, gamma: Tensor) -> dict[str, Tensor]:
        """The values that :meth:`encode` takes to ``gamma``.

        Args:
            gamma: ``(..., k)``.

        Returns:
            By name ``(...)``, differentiable for ranges.
        """
        parts = gamma.split([condition.width for condition in self.conditions.values()], -1)
        return {name: c.decode(part) for (name, c), part in zip(self.conditions.items(), parts, strict=True)}

    def from_uniform(self, uniform: Tensor) -> Tensor:
        """Draws of all conditions.

        Args:
            uniform: In [0, 1), ``(..., number of names)``.

        Returns:
            ``(..., k)``.
        """
        columns = zip(self.conditions.values(), uniform.unbind(-1), strict=True)
        return torch.cat([condition.from_uniform(column) for condition, column in columns], -1)

    def centre(self) -> Tensor:
        """The middle of every range, and the first category, ``(k)``."""
        return torch.cat([self._points(condition, 1)[0] for condition in self.conditions.values()])

    def grid(self, points: int) -> Tensor:
        """All combinations of equally spaced values, both ends included, and of categories.

        Args:
            points: How many values of each range; one is the middle.

        Returns:
            ``(combinations, k)``.

        Example:
            >>> ConditionSpec().add("noise").add("task", categories=2).grid(3)[:, 0]
            tensor([0.0000, 0.0000, 0.5000, 0.5000, 1.0000, 1.0000])
        """
        parts = [self._points(condition, points) for condition in self.conditions.values()]
        return torch.stack([torch.cat(rows) for rows in product(*(part.unbind() for part in parts))])

    def ranges(self) -> Tensor:
        """Which of the k numbers belong to a range, and may take any value from 0 to 1, ``(k)``."""
        return torch.cat([torch.full((c.width,), c.categories is None) for c in self.conditions.values()])

    def label(self, gamma: Tensor) -> str:
        """One condition in words.

        Args:
            gamma: ``(k)`` on the CPU.

        Returns:
            Text such as ``"noise_0.25_task_1"``, which every logger takes as a part of a name.
        """
        return "_".join(f"{name}_{value.item():.4g}" for name, value in self.decode(gamma).items())

    @staticmethod
    def _points(condition: Condition, points: int) -> Tensor:
        if condition.categories:
            return torch.eye(condition.categories)
        return torch.linspace(0, 1, points)[:, None] if points > 1 else torch.tensor([[0.5]])
