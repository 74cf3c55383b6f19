"""A metric's loss beside somebody else's, and what is worth knowing about its batches."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_hpo import distributed
from lightning_hpo.criterion_call import logits_and_target, one_number
from lightning_hpo.functional.objectives.anyloss_inputs import Inputs
from lightning_hpo.losses.anyloss import AnyLoss

__all__ = ["BlendedLoss"]

_MANY = 32


class BlendedLoss:
    r"""The loss :math:`(1 - r)\,c + r\,(1 - m)` of a criterion and a metric, and statistics of the batches it saw.

    Args:
        objective: Whose metric.

    Attributes:
        mix: Present :math:`r`.
        observes: Whether to note statistics of the next batch in :attr:`noted`.
        calls: Calls since somebody set it to 0.

    Example:
        >>> blended = BlendedLoss(AnyLoss("f1"))
        >>> blended.mix = 0.5
        >>> criterion = torch.nn.functional.binary_cross_entropy_with_logits
        >>> blended(criterion, (torch.zeros(4), torch.tensor([0.0, 0.0, 1.0, 1.0])), {})  # half of ln 2 and a half
        tensor(0.5966)
    """

    def __init__(self, objective: AnyLoss) -> None:
        self.objective = objective
        self.mix = 0.0
        self.observes = False
        self.calls = 0
        self.noted: dict[str, Tensor] = {}
        self._seen: list[Tensor] = []  # sums of batches that have not been looked at
        self._incomplete: list[Tensor] = []  # whether batches lacked a class

    def __call__(self, criterion: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """The blend for a batch, given as the criterion is."""
        self.calls += 1
        logits, target = logits_and_target(criterion, args, kwargs)
        inputs = self.objective.arranged(logits, target)
        if not self.mix:
            if self.objective.running is not None or self.observes:
                with torch.no_grad():
                    self._metric(inputs)
                self._incomplete, self._seen = [], []  # they teach with the criterion alone
            return one_number(criterion(*args, **kwargs))
        value = self._metric(inputs)
        if self.mix == 1:
            return 1 - value
        return (1 - self.mix) * one_number(criterion(*args, **kwargs)) + self.mix * (1 - value)

    def _metric(self, inputs: Inputs) -> Tensor:
        own = self.objective
        sums = own.batch_sums(inputs)
        value = own.value(sums)
        self._seen.append(sums.detach())
        if len(self._seen) == _MANY:
            self._look()
        if self.observes:
            self._look()
            with torch.no_grad():
                dead = distributed.mean(own.dead_share(inputs))
            incomplete = torch.cat(self._incomplete).float().mean()
            self.noted = {"soft_metric": value.detach(), "dead_share": dead, "incomplete_batches": incomplete}
        return value

    def incomplete_share(self) -> float | None:
        """Share of the batches that lacked a class since this was asked last; ``None`` without batches.

        Batches of a warm-up are not counted.
        """
        self._look()
        found, self._incomplete = self._incomplete, []
        return torch.cat(found).float().mean().item() if found else None

    def _look(self) -> None:
        """At many batches in one go: a step has enough small operations."""
        if self._seen:
            self._incomplete.append(self.objective.lacks_a_class(torch.stack(self._seen)))
            self._seen = []
