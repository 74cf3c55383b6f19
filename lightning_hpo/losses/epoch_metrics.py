"""A metric of everything that was seen in an epoch, soft and hard, with the cross-entropy beside it."""

from dataclasses import replace

import torch
from torch import Tensor

from lightning_hpo import distributed
from lightning_hpo.functional.objectives.anyloss import soft_sums
from lightning_hpo.functional.objectives.anyloss_inputs import arrange
from lightning_hpo.functional.objectives.anyloss_metrics import score
from lightning_hpo.losses.anyloss import AnyLoss
from lightning_hpo.losses.value_watch import ValueWatch

__all__ = ["EpochMetrics"]


class EpochMetrics:
    """Counts validation batches; ratios are taken once, at the end, over all batches and ranks.

    Args:
        objective: Whose metric, and whose soft decisions.
        keep: Whether to keep logits and targets on the host.

    Example:
        >>> epoch = EpochMetrics(AnyLoss("f1"))
        >>> epoch.add(torch.tensor([1.0, -1.0]), torch.tensor([1, 1]), torch.tensor(0.8))
        >>> {name: round(value.item(), 3) for name, value in epoch.results().items()}
        {'metric': 0.667, 'soft': 0.667, 'gap': 0.0, 'criterion': 0.8, 'dead_share': 1.0}
    """

    def __init__(self, objective: AnyLoss, keep: bool = False) -> None:
        self.objective, self.keep = objective, keep
        self._watch = ValueWatch(objective.task)
        self._counts: Tensor | None = None  # what soft and hard confusion matrices are made of
        self._sums: Tensor | None = None  # over samples: of losses, of dead ones, of all
        self._kept: list[tuple[Tensor, Tensor]] = []

    def add(self, logits: Tensor, target: Tensor, loss: Tensor) -> None:
        """Counts a batch; ``loss`` is the mean that the module's own criterion gave."""
        own = self.objective
        inputs = arrange(logits.detach(), target, own.task, None, own.ignore_index)
        if problems := self._watch.problems(inputs):
            raise ValueError(f"validation {'; '.join(problems)}.")
        decisions = (own.surrogate, replace(own.surrogate, name="hard"))
        counts = torch.stack([soft_sums(inputs, decision, own.task, own.needs_matrix) for decision in decisions])
        self._counts = counts if self._counts is None else self._counts + counts
        samples = float(len(inputs.target)) if inputs.weight is None else inputs.weight.sum()
        counted = torch.as_tensor(samples, device=logits.device)
        parts = torch.stack([loss.detach().float() * samples, own.dead_share(inputs).float() * samples, counted])
        self._sums = parts if self._sums is None else self._sums + parts
        if self.keep:
            real = slice(None) if inputs.weight is None else inputs.weight > 0
            self._kept.append((inputs.logits[real].cpu(), inputs.target[real].cpu()))

    def results(self) -> dict[str, Tensor]:
        """Metric, soft metric, the excess of that, criterion, and share of dead samples; empty if nothing came.

        A collective: call it on all ranks.
        """
        if self._sums is None or self._counts is None:
            return {}
        loss, dead, samples = distributed.sum(self._sums).unbind(0)
        own = self.objective
        soft, hard = (score(c, own.metric, own.task, own.average, own.beta) for c in distributed.sum(self._counts))
        shares = {"criterion": loss / samples, "dead_share": dead / samples}
        return {"metric": hard, "soft": soft, "gap": soft - hard, **shares}

    def seen(self) -> bool:
        """Whether every rank has counted something; a collective."""
        here = torch.tensor(int(self._sums is not None), device=distributed.device())
        return bool(distributed.minimum(here).item())

    def kept(self) -> tuple[Tensor, Tensor]:
        """Logits and targets of all ranks, on the host; a collective."""
        device = distributed.device()
        columns = [torch.cat(part).to(device) for part in zip(*self._kept, strict=True)]
        logits, target = (_joined(column).cpu() for column in columns)
        return logits, target

    def reset(self) -> None:
        """Forgets everything."""
        self._counts, self._sums, self._kept = None, None, []


def _joined(column: Tensor) -> Tensor:
    """Rows of all ranks; ``gather`` stacks where ranks have as many."""
    gathered = distributed.gather(column)
    return gathered if gathered.ndim == column.ndim else gathered.flatten(0, 1)
