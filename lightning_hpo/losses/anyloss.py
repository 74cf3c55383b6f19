"""Any classification metric as a loss."""

import warnings
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_hpo import distributed
from lightning_hpo.functional.objectives.anyloss import dead_share, lacks_a_class, soft_sums
from lightning_hpo.functional.objectives.anyloss_arguments import batch_problems, metric_problems, surrogate_problems
from lightning_hpo.functional.objectives.anyloss_inputs import Inputs, arrange, look_like_probabilities, range_problems
from lightning_hpo.functional.objectives.anyloss_metrics import (
    FROM_MATRIX,
    Average,
    CountsMetric,
    MetricName,
    Task,
    score,
)
from lightning_hpo.functional.objectives.anyloss_surrogates import Surrogate, SurrogateName
from lightning_hpo.losses.value_watch import ValueWatch

__all__ = ["AnyLoss"]


class AnyLoss(nn.Module):
    r"""One minus a metric of the soft confusion matrix of the batch: training maximises the metric itself.

    Each sample counts :math:`a = \sigma(L (p - t))` as predicted positive, nearly 0 or 1 for a large :math:`L`; sums of
    these are a confusion matrix that can be differentiated, and so is every metric of it. Takes the place of
    ``BCEWithLogitsLoss`` or ``CrossEntropyLoss``: logits and targets of the same shapes, no class weights, no decision
    threshold to tune afterwards.

    A confident sample has next to no gradient (at :math:`p = 0.7` a millionth of that at 0.5), so that training must
    not start from confident mistakes: begin with small last-layer weights (:meth:`shrink`), or a small amplification
    that rises (it may be set between batches), or use the callback
    :class:`~lightning_hpo.callbacks.anyloss.MetricObjective`, which does that.

    A batch that lacks a class leaves the undefined terms out; it never gives NaN. In training on several ranks the sums
    are those of all ranks, with gradients, so that the metric is that of the joined batch. Sums are in 32 bits (64 of
    doubles) under autocast, too.

    Args:
        metric: A name, or a function ``(tp, fp, fn, tn)`` of tensors ``(K,)``, one entry a class or label.
        task: ``"binary"`` (logits ``(N,)`` and zeros and ones ``(N,)``), ``"multiclass"`` (``(N, C)``, numbers
            ``(N,)``) or ``"multilabel"`` (``(N, K)``, zeros and ones ``(N, K)``).
        beta: Weight of recall in ``"fbeta"``.
        average: How classes or labels become one number; ``"micro"`` adds their counts up first, ``"weighted"`` weighs
            by support.
        surrogate: The soft decision, see :class:`~lightning_hpo.functional.objectives.anyloss_surrogates.Surrogate`.
        amplification: :math:`L`; 73 for ``"anyloss"``, 1 for ``"sigmoid"``.
        threshold: :math:`t`.
        width: Of ``"sol-cosine"``.
        running: Decay of running sums, for batches too small to tell the metric: the slopes of the metric are taken at
            running sums of earlier batches and only the counts' are the batch's own. ``None`` for plain batch sums.
        ignore_index: Target that does not count.
        from_logits: Whether the first argument is logits; else probabilities.
        sync: Whether to add up over ranks in training.
        detect_nan: Whether a NaN among the logits is an error, which makes a GPU wait; else the loss is NaN.

    Raises:
        ValueError: If an argument is wrong; all are listed. In a call, if shapes do not fit or targets are none; in the
            first, if probabilities or weights are none.

    References:
        Han, Moniz and Chawla, "AnyLoss: Transforming Classification Metrics into Loss Functions", 2024, section 3.

    Example:
        >>> criterion = AnyLoss("f1", task="binary")
        >>> logits = torch.tensor([2.0, -1.0, -3.0, 0.2], requires_grad=True)
        >>> loss = criterion(logits, torch.tensor([1, 1, 0, 0]))
        >>> loss
        tensor(0.4968, grad_fn=<RsubBackward1>)
        >>> AnyLoss("mcc", task="multiclass")(torch.eye(3) * 9, torch.arange(3)).item() < 1e-6
        True
    """

    sums: Tensor
    pending: Tensor

    def __init__(
        self,
        metric: MetricName | CountsMetric = "f1",
        task: Task = "binary",
        beta: float = 1.0,
        average: Average = "macro",
        surrogate: SurrogateName = "anyloss",
        amplification: float | None = None,
        threshold: float = 0.5,
        width: float = 0.1,
        running: float | None = None,
        ignore_index: int | None = None,
        from_logits: bool = True,
        sync: bool = True,
        detect_nan: bool = False,
    ) -> None:
        super().__init__()
        problems = metric_problems(metric, task, average, beta)
        problems += surrogate_problems(surrogate, amplification, threshold, width, task)
        problems += batch_problems(running, ignore_index)
        if problems:
            raise ValueError(f"`AnyLoss`: {'; '.join(problems)}.")
        self.metric: MetricName | CountsMetric = metric
        self.task: Task = task
        self.average: Average = average
        self.beta, self.running, self.ignore_index = beta, running, ignore_index
        self.from_logits, self.sync, self.detect_nan = from_logits, sync, detect_nan
        self.surrogate = Surrogate(surrogate, amplification, threshold, width)
        self.commits = True  # whether each call in training moves the running sums on
        if running is not None:
            self.register_buffer("sums", torch.zeros(0))
            self.register_buffer("pending", torch.zeros(0))
        self._watch = ValueWatch(task)

    @property
    def amplification(self) -> float:
        """The steepness in force; 1 where the surrogate has none. It may be set between batches."""
        return self.surrogate.steepness

    @amplification.setter
    def amplification(self, value: float) -> None:
        old = self.surrogate
        if problems := surrogate_problems(old.name, value, old.threshold, old.width, self.task):
            raise ValueError(f"`AnyLoss`: {'; '.join(problems)}.")
        self.surrogate = replace(old, amplification=float(value))

    @override
    def forward(self, logits: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
        """The loss of a batch; ``weight`` of each sample is optional."""
        return 1 - self.value(self.batch_sums(self.arranged(logits, target, weight)))

    def arranged(self, logits: Tensor, target: Tensor, weight: Tensor | None = None) -> Inputs:
        """Checked logits and targets in full precision."""
        inputs = arrange(logits, target, self.task, weight, self.ignore_index, self.from_logits)
        problems, suspect = [], False
        if not torch.compiler.is_compiling():
            if self._watch.first:
                problems = range_problems(None if self.from_logits else logits, weight)
                suspect = self.from_logits and look_like_probabilities(inputs.logits, self.task)
            problems += self._watch.problems(inputs)
        if problems:
            raise ValueError(f"`AnyLoss`: {'; '.join(problems)}.")
        if suspect:
            warnings.warn(
                "`AnyLoss`: all logits are between 0 and 1 as probabilities are; give logits, or `from_logits=False`.",
                stacklevel=3,
            )
        if self.detect_nan and bool(inputs.logits.isnan().any()):
            raise ValueError("`AnyLoss`: there is a NaN among the logits.")
        return inputs

    def batch_sums(self, inputs: Inputs) -> Tensor:
        """Sums of the batch, of all ranks in training: rows of :func:`soft_sums`, or the C x C matrix."""
        sums = soft_sums(inputs, self.surrogate, self.task, self.needs_matrix)
        return distributed.sum_with_gradient(sums) if self.sync and self.training else sums

    def value(self, sums: Tensor) -> Tensor:
        """The metric of sums, in training of the running ones where there are any."""
        if self.running is not None and self.training:
            sums = self._with_running(sums)
        return score(sums, self.metric, self.task, self.average, self.beta)

    def dead_share(self, inputs: Inputs) -> Tensor:
        """Share of samples that hardly have a gradient."""
        return dead_share(inputs, self.surrogate, self.task)

    def lacks_a_class(self, sums: Tensor) -> Tensor:
        """Whether a batch's sums have nothing of a class."""
        return lacks_a_class(sums, self.task, self.needs_matrix, self.ignore_index)

    @property
    def needs_matrix(self) -> bool:
        """Whether the metric is one of the C x C matrix."""
        return self.task == "multiclass" and self.metric in FROM_MATRIX

    def _with_running(self, sums: Tensor) -> Tensor:
        """Sums of earlier batches, scaled to this one, with the gradient of this one's."""
        before = self.sums if self.sums.shape == sums.shape else sums.detach()  # of as many classes
        self.pending = sums.detach() + (self.pending if self.pending.shape == sums.shape else 0)
        if self.commits:
            self.commit()
        return before * (self._total(sums) / self._total(before)).detach() + (sums - sums.detach())

    def _total(self, sums: Tensor) -> Tensor:
        samples = sums.sum() if self.needs_matrix else sums[3].amax()
        return samples.clamp(min=torch.finfo(sums.dtype).tiny)

    @torch.no_grad()
    def commit(self) -> None:
        """Moves the running sums on by what has been counted since the last time, as an optimizer step would."""
        if self.running is None or not self.pending.numel():
            return
        first = self.sums.shape != self.pending.shape
        counted = self.pending[3] if not self.needs_matrix else self.pending
        moved = self.pending if first else self.running * self.sums + (1 - self.running) * self.pending
        # A batch that is not finite, or in which nothing counts, leaves no trace.
        before = torch.zeros_like(moved) if first else self.sums
        self.sums = torch.where(moved.isfinite().all() & (counted > 0).any(), moved, before)
        self.pending = torch.zeros_like(moved)

    @staticmethod
    @torch.no_grad()
    def shrink(layer: nn.Linear, gain: float = 0.01) -> nn.Linear:
        """Makes the logits of a last layer small, so that no sample starts with a dead gradient.

        Args:
            layer: The last layer; changed in place.
            gain: Factor of its weights; its bias becomes 0.

        Returns:
            The same layer.

        Example:
            >>> AnyLoss.shrink(nn.Linear(4, 1)).weight.abs().max().item() < 0.006
            True
        """
        layer.weight.mul_(gain)
        if layer.bias is not None:
            layer.bias.zero_()
        return layer

    @override
    def extra_repr(self) -> str:
        """The metric and its soft decision."""
        metric = self.metric if isinstance(self.metric, str) else getattr(self.metric, "__name__", "function")
        return f"{metric}, task={self.task}, surrogate={self.surrogate.name}, amplification={self.amplification:g}"

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        # How many classes there are is known after the first batch, or from here.
        for name in ("sums", "pending"):
            if self.running is not None and f"{prefix}{name}" in state_dict:
                own = getattr(self, name)
                setattr(self, name, torch.empty_like(state_dict[f"{prefix}{name}"], device=own.device))
        super()._load_from_state_dict(state_dict, prefix, *args)
