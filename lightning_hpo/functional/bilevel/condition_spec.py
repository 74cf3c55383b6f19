"""Named conditions of a hyper-network: the maps to [0, 1] and back, and grids."""

import math
from collections.abc import Iterator, Mapping
from itertools import product

import torch
from torch import Tensor

from lightning_hpo.functional.bilevel.condition import Condition

__all__ = ["ConditionSpec"]


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
            TypeError: If the name is no text, or an end of the range no number.
        """
        if not isinstance(name, str) or not name:
            raise TypeError(f"the name of a condition must be a text, got {name!r}")
        if name in self.conditions:
            raise ValueError(f"there is a condition `{name}` already")
        try:
            self.conditions[name] = Condition(low, high, log, categories)
        except (TypeError, ValueError) as error:
            raise type(error)(f"`{name}`: {error}") from None
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

    def check(self, gamma: Tensor) -> None:
        """Refuses what stands for no values.

        Tensors on the CPU are read; reading others would make the host wait for the device. In a compiled function, and
        under a transform of ``torch.func``, only shapes are looked at.

        Args:
            gamma: ``(k)``, or ``(batch, k)``.

        Raises:
            ValueError: If there are not k numbers, or some are outside of [0, 1] or nan; all are listed.

        Example:
            >>> ConditionSpec().add("noise", 0.0, 0.5).check(torch.tensor([2.0]))
            Traceback (most recent call last):
            ValueError: `noise` must be from 0 to 0.5, got 1.0 (gamma 2.0)
        """
        if gamma.ndim not in (1, 2) or gamma.shape[-1] != len(self):
            raise ValueError(
                f"a condition has {len(self)} numbers, or so many for each example, got shape {tuple(gamma.shape)}"
            )
        if gamma.device.type != "cpu" or torch.compiler.is_compiling() or _is_transformed():
            return
        parts = self._parts(gamma.detach())
        if problems := [problem for name, c, part in parts if (problem := c.problem_of_gamma(name, part))]:
            raise ValueError("; ".join(problems))

    def decode(self, gamma: Tensor) -> dict[str, Tensor]:
        """The values that :meth:`encode` takes to ``gamma``.

        Args:
            gamma: ``(..., k)``.

        Returns:
            By name ``(...)``, differentiable for ranges.
        """
        return {name: condition.decode(part) for name, condition, part in self._parts(gamma)}

    def _parts(self, gamma: Tensor) -> list[tuple[str, Condition, Tensor]]:
        parts = gamma.split([condition.width for condition in self.conditions.values()], -1)
        return [(name, c, part) for (name, c), part in zip(self.conditions.items(), parts, strict=True)]

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

    def combinations(self, points: int) -> int:
        """How many conditions :meth:`grid` has."""
        return math.prod(condition.categories or points for condition in self.conditions.values())

    def ranges(self) -> Tensor:
        """Which of the k numbers belong to a range, and may take any value from 0 to 1, ``(k)``."""
        return torch.cat([torch.full((c.width,), c.categories is None) for c in self.conditions.values()])

    def labels(self, gammas: Tensor) -> list[str]:
        """Conditions in words, with as many digits as tell them apart.

        Args:
            gammas: ``(n, k)`` on the CPU.

        Returns:
            Texts such as ``"noise_0.25_task_1"``, which every logger takes as a part of a name.

        Example:
            >>> ConditionSpec().add("x", 100.0, 100.1).labels(torch.tensor([[0.2], [0.4]]))
            ['x_100.02', 'x_100.04']
        """
        values = [{name: value.item() for name, value in self.decode(gamma).items()} for gamma in gammas]
        for digits in range(4, 10):
            found = ["_".join(f"{name}_{value:.{digits}g}" for name, value in at.items()) for at in values]
            if len(set(found)) == len(found):
                break
        return found

    @staticmethod
    def _points(condition: Condition, points: int) -> Tensor:
        if condition.categories:
            return torch.eye(condition.categories)
        return torch.linspace(0, 1, points)[:, None] if points > 1 else torch.tensor([[0.5]])


def _is_transformed() -> bool:
    return torch._C._functorch.maybe_current_level() is not None
