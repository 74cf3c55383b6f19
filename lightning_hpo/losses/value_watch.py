"""A look at the values of targets in every batch that never makes a GPU wait."""

from typing import Any

import torch
from torch import Tensor

from lightning_hpo.functional.objectives.anyloss_inputs import Inputs, suspicion, value_problems
from lightning_hpo.functional.objectives.anyloss_metrics import Task

__all__ = ["ValueWatch"]


class ValueWatch:
    """Checks targets, on the CPU at once, elsewhere as soon as the numbers have arrived by themselves.

    The first batch is always looked at before anything else happens. Of later ones three numbers
    are computed where they are. On an accelerator these travel while training goes on; a wrong target is reported some
    batches later, without its value.

    Args:
        task: What the targets are.

    Attributes:
        first: Whether nothing has been looked at yet.

    Example:
        >>> from lightning_hpo.functional.objectives.anyloss_inputs import arrange
        >>> ValueWatch("binary").problems(arrange(torch.zeros(2), torch.tensor([1, 7]), "binary"))
        ['targets must be 0 or 1, got 7']
    """

    def __init__(self, task: Task) -> None:
        self.task: Task = task
        self.first = True
        self._travelling: list[tuple[Tensor, Any, int]] = []  # numbers, the event that says they are here, classes

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_travelling": []}  # events cannot be copied

    def problems(self, inputs: Inputs) -> list[str]:
        """What is wrong with this batch, or was with one before it."""
        self.first, first = False, self.first
        classes = inputs.logits.shape[1] if self.task == "multiclass" else 2
        seen = suspicion(inputs, self.task)
        if first or seen.device.type == "cpu":
            return value_problems(inputs, self.task, seen.tolist())
        self._send(seen, classes)
        return self._arrived()

    def _send(self, seen: Tensor, classes: int) -> None:
        if seen.device.type != "cuda":  # nothing is known of when a copy has arrived: the first batch must do
            return
        host = torch.empty(seen.shape, dtype=seen.dtype, pin_memory=True)
        host.copy_(seen, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._travelling.append((host, event, classes))

    def _arrived(self) -> list[str]:
        found = []
        while self._travelling and self._travelling[0][1].query():
            host, _, classes = self._travelling.pop(0)
            low, high, *fraction = host.tolist()
            if not 0 <= low <= high <= classes - 1:
                found.append(f"targets must be from 0 to {classes - 1}, got some from {low:g} to {high:g}")
            elif any(abs(part) > 1e-3 * max(high, 1) for part in fraction):
                found.append("targets must be 0 or 1, got some between")
        return found
