"""A metric's loss beside somebody else's, and what is worth knowing about its batches."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_hpo import distributed
from lightning_hpo.criterion_call import logits_and_target
from lightning_hpo.losses.anyloss import AnyLoss

__all__ = ["BlendedLoss"]


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
        self._incomplete: Tensor | None = None
        self._batches = 0

    def __call__(self, criterion: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """The blend for a batch, given as the criterion is."""
        self.calls += 1
        logits, target = logits_and_target(args, kwargs)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.mix > 0):
            value = self._metric(logits, target)
        if self.mix == 1:
            return 1 - value
        return (1 - self.mix) * criterion(*args, **kwargs) + self.mix * (1 - value)

    def _metric(self, logits: Tensor, target: Tensor) -> Tensor:
        own = self.objective
        inputs = own.arranged(logits, target)
        sums = own.batch_sums(inputs)
        value = own.value(sums)
        with torch.no_grad():
            lacks = own.lacks_a_class(sums).float()
            self._incomplete = lacks if self._incomplete is None else self._incomplete + lacks
            self._batches += 1
            if self.observes:
                dead = distributed.mean(own.dead_share(inputs))
                self.noted = {"soft_metric": value.detach(), "dead_share": dead}
        return value

    def incomplete_share(self) -> float | None:
        """Share of the batches that lacked a class since this was asked last; ``None`` without batches."""
        counted, batches = self._incomplete, self._batches
        self._incomplete, self._batches = None, 0
        return None if counted is None else counted.item() / batches
