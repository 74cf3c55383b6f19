"""The metric that a classifier is judged by as the objective it is trained on."""

import math
from collections.abc import Callable
from typing import Any, ClassVar, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from typing_extensions import override

from lightning_hpo.callbacks.base import MethodCallback
from lightning_hpo.criterion_call import (
    CriterionCall,
    criterion_problems,
    ignored_target,
    logits_and_target,
    one_number,
)
from lightning_hpo.functional.objectives.anyloss_arguments import schedule_problems
from lightning_hpo.functional.objectives.anyloss_metrics import Average, CountsMetric, MetricName, Task
from lightning_hpo.functional.objectives.anyloss_schedule import blend_at
from lightning_hpo.functional.objectives.anyloss_surrogates import STEEPNESS, SurrogateName
from lightning_hpo.functional.objectives.temperature import cross_entropy, fit_temperature
from lightning_hpo.losses.anyloss import AnyLoss
from lightning_hpo.losses.blended import BlendedLoss
from lightning_hpo.losses.epoch_metrics import EpochMetrics
from lightning_hpo.validation_loader import validation_loader

__all__ = ["MetricObjective"]

_STEEP = {**STEEPNESS, "anyloss": 10.0}  # at the end of training


class MetricObjective(MethodCallback):
    r"""Trains an existing classifier on the metric that it is judged by, through its ``criterion`` (AnyLoss).

    While the fit lasts, ``self.criterion(logits, targets)`` in the training step gives

    .. math:: (1 - r)\,\mathrm{criterion} + r\,(1 - m(TP, FP, FN, TN))

    with the soft confusion matrix of :class:`~lightning_hpo.losses.anyloss.AnyLoss`. The criterion's own loss alone
    (:math:`r = 0`) trains first, and the amplification :math:`L` then rises geometrically, because a steep soft
    decision has no gradient for confident samples. In validation the criterion stays what it is, so that ``val_loss``
    keeps its meaning, and its logits are counted: the metric itself, over all batches and ranks, is logged as
    ``anyloss/val_<metric>``.

    The module stays yours: it gains no parameter and no key, and after the fit its criterion is what it was.

    Args:
        metric: A name, or a function ``(tp, fp, fn, tn)`` of tensors ``(K,)``.
        task: ``"binary"``, ``"multiclass"`` or ``"multilabel"``.
        criterion: Name of the module's attribute, a loss that takes logits and targets; dots lead further in.
        beta: Weight of recall in ``"fbeta"``.
        average: How classes or labels become one number.
        surrogate: The soft decision.
        amplification: :math:`L` at the end; 10 for ``"anyloss"``, 20 where it trains on accuracy, whose soft form leans
            to the frequent class otherwise; 1 for ``"sigmoid"``.
        amplification_start: :math:`L` at first; half of that at the end by default.
        threshold: Where the decision falls.
        warmup: Share of the training steps with the criterion's loss alone.
        anneal: Share of the training steps at which the amplification has reached its end.
        mix: :math:`r` after the warm-up.
        running: Decay of running sums, for batches that are too small to tell the metric; ``None`` for none.
        ignore_index: Target that does not count; by default that of the criterion, if it is a cross-entropy.
        calibrate: Whether to fit a temperature to the logits of the last validation when training ends; it is kept in
            ``temperature`` and the module is not changed.
        total_steps: Optimizer steps of the whole training, where the Trainer cannot tell.

    Raises:
        ValueError: If an argument is wrong; all are listed.
        MisconfigurationException: If the module has no such criterion, or one that cannot be replaced; says what to do.

    References:
        Han, Moniz and Chawla, "AnyLoss: Transforming Classification Metrics into Loss Functions", 2024, section 3.

    Example:
        >>> from lightning_hpo.demos import ImbalancedDataModule, TabularClassifier
        >>> from lightning_hpo.testing import tiny_trainer
        >>> objective = MetricObjective("f1", task="binary")
        >>> trainer = tiny_trainer(objective, max_epochs=2)
        >>> trainer.fit(TabularClassifier(inputs=30), ImbalancedDataModule("breast_cancer"))
        >>> objective.hyperparameters()
        {'amplification': 10.0, 'mix': 0.5}
        >>> "anyloss/val_f1" in trainer.callback_metrics
        True
    """

    KNOB: ClassVar[str] = "class weights, resampling ratio and decision threshold: the metric itself is trained on"
    _KEY: ClassVar[tuple[str, ...]] = ("criterion", "task")
    _STATE: ClassVar[tuple[str, ...]] = ("objective", "calibration")

    def __init__(
        self,
        metric: MetricName | CountsMetric = "f1",
        task: Task = "binary",
        criterion: str = "criterion",
        beta: float = 1.0,
        average: Average = "macro",
        surrogate: SurrogateName = "anyloss",
        amplification: float | None = None,
        amplification_start: float | None = None,
        threshold: float = 0.5,
        warmup: float = 0.2,
        anneal: float = 1.0,
        mix: float = 0.5,
        running: float | None = None,
        ignore_index: int | None = None,
        calibrate: bool = False,
        total_steps: int | None = None,
    ) -> None:
        super().__init__()
        self.metric, self.task, self.criterion, self.beta, self.average = metric, task, criterion, beta, average
        self.surrogate, self.amplification_start = surrogate, amplification_start
        self.amplification = _steepness(surrogate, metric) if amplification is None else amplification
        self.threshold, self.warmup, self.anneal, self.mix, self.running = threshold, warmup, anneal, mix, running
        self.ignore_index, self.calibrate, self.total_steps = ignore_index, calibrate, total_steps
        problems = schedule_problems(warmup, anneal, mix, amplification_start, total_steps, surrogate)
        if not isinstance(criterion, str) or not criterion:
            problems.append(f"criterion must be the name of an attribute, got {criterion!r}")
        try:
            self.objective = self._make()
        except ValueError as error:
            problems.append(str(error).removeprefix("`AnyLoss`: ").rstrip("."))
        if problems:
            raise ValueError(f"`MetricObjective`: {'; '.join(problems)}.")
        self.calibration: dict[str, float] = {}
        self._end = self.objective.amplification
        self._total, self._seen = 1, 0
        self._phase: Literal["", "training", "validation"] = ""
        self._call: CriterionCall | None = None
        self._blended, self._epoch = BlendedLoss(self.objective), EpochMetrics(self.objective)

    def _make(self) -> AnyLoss:
        return AnyLoss(
            self.metric, self.task, self.beta, self.average, self.surrogate, self.amplification, self.threshold,
            running=self.running, ignore_index=self.ignore_index,
        )  # fmt: skip

    @override
    def hyperparameters(self) -> dict[str, float | list[float]]:
        """Amplification and mix at present, and the temperature once there is one."""
        learned = {"temperature": self.temperature} if self.calibration else {}
        return {"amplification": self.objective.amplification, "mix": self._blended.mix, **learned}

    @property
    def temperature(self) -> float:
        """By what to divide logits so that probabilities are calibrated; 1 before the end of a fit that was asked."""
        return self.calibration.get("temperature", 1.0)

    # Around training

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Takes the calls of the criterion, of a validation by itself, too."""
        if stage not in ("fit", "validate"):
            return
        self.raise_all(criterion_problems(pl_module, self.criterion, self.task))
        self.release()
        if stage == "fit":
            self.refuse_sharded_strategy(trainer)
            self.require_automatic_optimization(pl_module)
            self.objective, self.calibration = self._make(), {}
            self._blended = BlendedLoss(self.objective)
        if self.ignore_index is None:
            self.objective.ignore_index = ignored_target(pl_module, self.criterion)
        self._call = CriterionCall(pl_module, self.criterion, self._answer)
        self._epoch = EpochMetrics(self.objective, keep=self.calibrate and stage == "fit")

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores running sums, if there are any, and the temperature."""
        sums = bool(state_dict.get("objective"))
        were, are = ("with" if there else "without" for there in (sums, self.running is not None))
        if were != are:
            self.raise_all([f"the checkpoint was written {were} running sums, this is {are}: change `running`."])
        super().load_state_dict(state_dict)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finds out how long training is."""
        total = self.total_steps or trainer.estimated_stepping_batches
        if not 0 < total < math.inf:
            self.raise_all(["how long training is, is not known; give `total_steps`, or the Trainer `max_steps`."])
        if trainer.accumulate_grad_batches > 1 and self.running is None:
            rank_zero_info(
                "`MetricObjective`: with accumulated gradients the metric is that of each micro-batch; `running=0.9` "
                "takes its slopes at running sums."
            )
        if self.calibrate:
            try:
                validation_loader(trainer)
            except ValueError as error:
                self.raise_all([f"`calibrate` needs validation data: {error}."])
        self._total, self._seen, self._shown = int(total), trainer.global_step, False
        self._epoch.reset()  # what was counted before training says nothing
        self.objective.to(pl_module.device)
        self.objective.commits = False  # optimizer steps do
        self._schedule(trainer)

    def _schedule(self, trainer: Trainer) -> None:
        """Mix and amplification of the coming step; a function of the step alone."""
        end = self._end
        start = self.amplification_start or end / 2
        blend = blend_at(trainer.global_step / self._total, self.warmup, self.anneal, self.mix, start, end)
        self._blended.mix = blend.mix
        if self.surrogate in _STEEP:
            self.objective.amplification = blend.amplification

    # Every step

    def _answer(self, criterion: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        if self._phase == "training":
            return self._blended(criterion, args, kwargs)
        loss = criterion(*args, **kwargs)
        if self._phase == "validation":
            self._epoch.add(*logits_and_target(criterion, args, kwargs), one_number(loss))
        return loss

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """From here on calls are training's."""
        every, step = max(trainer.log_every_n_steps, 1), trainer.global_step + 1  # type: ignore[attr-defined]
        self._blended.observes = step % every == 0 or step == self._total or not self._shown
        self._phase, self._blended.calls = "training", 0

    @override
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Looks whether the training step called the criterion once."""
        calls, self._blended.calls = self._blended.calls, 0
        if calls != 1:
            why = f"called {calls} times" if calls else "did not call"
            self.raise_all([f"`training_step` {why} `self.{self.criterion}`; it is to be called once a batch."])

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After an optimizer step the running sums, the mix and the amplification move on."""
        self._phase = ""
        if trainer.global_step != self._seen:
            self._seen = trainer.global_step
            self.objective.commit()
            if self._blended.observes:
                present = {"amplification": self.objective.amplification, "mix": self._blended.mix}
                self.log_values(pl_module, {**self._blended.noted, **present})
                self._shown = True
            self._schedule(trainer)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Says how many batches lacked a class."""
        share = self._blended.incomplete_share()
        if share and self.running is None:
            rank_zero_warn(
                f"`MetricObjective`: {100 * share:.3g}% of the epoch's batches lacked a class, and taught nothing "
                "about it; use larger batches, `StratifiedSampler`, or `running=0.9`."
            )

    # Validation

    @override
    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begins to count."""
        self._epoch.reset()

    @override
    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """From here on calls are validation's; of several loaders the first counts."""
        self._phase = "validation" if self._call is not None and dataloader_idx == 0 else ""

    @override
    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Calls that come now are nobody's."""
        self._phase = ""

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Logs the metric over all batches and ranks."""
        if self._call is None:
            return
        if not self._epoch.seen():
            if self._epoch.keep:
                self.raise_all([f"`calibrate` needs a `validation_step` that calls `self.{self.criterion}`."])
            return
        name = self.metric if isinstance(self.metric, str) else "metric"
        found = self._epoch.results()
        # They are the same on all ranks; Lightning wants to hear that somebody thought of it.
        values = {f"val_{name if key == 'metric' else key}": value for key, value in found.items()}
        self.log_values(pl_module, values, sync_dist=True)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Fits the temperature, if asked."""
        if not self.calibrate:
            return
        if not self._epoch.seen():
            rank_zero_warn("`MetricObjective`: training ended before any validation: no temperature has been fitted.")
            return
        logits, target = self._epoch.kept()
        fitted = fit_temperature(logits, target, self.task)
        before, after = (cross_entropy(logits / t, target, self.task).item() for t in (1.0, fitted))
        self.calibration = {"temperature": fitted, "cross_entropy": before, "calibrated_cross_entropy": after}

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Gives the criterion back, also after a validation by itself."""
        self.release()

    @override
    def release(self) -> None:
        """Gives the criterion back, and forgets what was counted."""
        if self._call is not None:
            self._call.release()
        self._call, self._phase = None, ""
        self._epoch.reset()


def _steepness(surrogate: SurrogateName, metric: MetricName | CountsMetric) -> float | None:
    return 20.0 if (surrogate, metric) == ("anyloss", "accuracy") else _STEEP.get(str(surrogate))
