"""The utilities of tasks at values of a hyperparameter, evaluated once each and kept."""

import math
import warnings
from collections.abc import Callable, Iterable, MutableMapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

__all__ = ["Cells", "Map", "TaskCells"]

Cells = MutableMapping[str, float | None]
MOST_FAILED = 0.2


class Map(Protocol):
    """How functions are run over a list: ``map``, or that of a pool; answers come in the order of the list."""

    def __call__(self, function: Callable[[Any], Any], items: Iterable[Any], /) -> Iterable[Any]:
        """Answers in order."""
        ...


class TaskCells:
    """A table of tasks and values that fills itself.

    Args:
        tasks: The tasks.
        keys: Their names.
        upper: H; utilities must lie from 0 to H.
        done: What is known: ``{"key@value": utility}``, None where it failed. It is added to while cells come in.
        run: How to run what is missing.

    Example:
        >>> cells = TaskCells([2.0, 3.0], ["a", "b"], 10.0, {"a@0.5": 7.0})
        >>> cells.utilities(_product, [0.5, 1.0]), sorted(cells.done)
        (tensor([[7.0000, 2.0000],
                [1.5000, 3.0000]], dtype=torch.float64), ['a@0.5', 'a@1.0', 'b@0.5', 'b@1.0'])
    """

    def __init__(
        self, tasks: Sequence[Any], keys: Sequence[str], upper: float, done: Cells | None = None, run: Map = map
    ) -> None:
        self.tasks, self.keys, self.upper, self.run = tasks, keys, upper, run
        self.done: Cells = {} if done is None else done

    def utilities(
        self, utility: Callable[[Any, float], float], values: Sequence[float], *, strict: bool = True
    ) -> Tensor:
        """Utilities of all tasks.

        Args:
            utility: Of a task at a value; NaN where it failed.
            values: The values.
            strict: Whether many failures are an error.

        Returns:
            ``(tasks, values)`` in float64, NaN where it failed.

        Raises:
            ValueError: If a utility lies outside 0 to H, or more than a fifth of all that were asked for failed.
        """
        found = torch.tensor(self._fill(utility, values, ""), dtype=torch.float64).view(len(self.tasks), len(values))
        outside = found[(found < 0) | (found > self.upper) | found.isinf()]
        if len(outside):
            raise ValueError(
                f"utilities must lie from 0 to upper={self.upper!r}, got {outside[0].item()!r}: clip or scale them"
            )
        failed = int(found.isnan().sum())
        if strict and failed > MOST_FAILED * found.numel():
            raise ValueError(f"{failed} of {found.numel()} cells failed, more than a fifth")
        return found

    def slopes(self, slope: Callable[[Any, float], float], value: float) -> Tensor:
        """Slopes of a surrogate loss of all tasks at one value, ``(tasks,)``; NaN where it failed."""
        return torch.tensor(self._fill(slope, [value], "slope "), dtype=torch.float64)

    def recheck(self, utility: Callable[[Any, float], float], value: float) -> None:
        """Asks for one cell again, and warns if the answer is another."""
        first, again = self._fill(utility, [value], "")[0], float(utility(self.tasks[0], value))
        if first != again and not (math.isnan(first) and math.isnan(again)):
            warnings.warn(
                f"the same task at the same value gave {first!r}, then {again!r}: fix seeds and the order of data, or "
                "noise is mistaken for effects and oscillations",
                stacklevel=3,
            )

    def _fill(self, function: Callable[[Any, float], float], values: Sequence[float], kind: str) -> list[float]:
        names = [f"{kind}{key}@{value!r}" for key in self.keys for value in values]
        places = [(task, value) for task in self.tasks for value in values]
        missing = {name: place for name, place in zip(names, places, strict=True) if name not in self.done}
        # One by one, so that what is finished is kept if the next one is interrupted.
        for name, answer in zip(missing, self.run(_Call(function), list(missing.values())), strict=True):
            number = float(answer)
            self.done[name] = None if math.isnan(number) else number
        known = [self.done[name] for name in names]
        return [math.nan if number is None else float(number) for number in known]


class _Call:
    """A function of a pair; a class, because processes cannot be sent closures."""

    def __init__(self, function: Callable[[Any, float], float]) -> None:
        self.function = function

    def __call__(self, place: tuple[Any, float]) -> float:
        return self.function(*place)


def _product(task: float, value: float) -> float:
    """For the example."""
    return task * value
