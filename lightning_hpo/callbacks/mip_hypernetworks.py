"""Training under sampled conditions as a callback: one hyper-network for a family of settings, chosen afterwards."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from lightning.fabric.utilities.data import sized_len
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from lightning_hpo import distributed
from lightning_hpo.callbacks.base import MethodCallback
from lightning_hpo.condition_arguments import argument_problems, choice_problems, encoded_grid, shared_parameters
from lightning_hpo.condition_losses import ConditionLosses, lowest, mean_losses
from lightning_hpo.conditioned_parts import ConditionedParts
from lightning_hpo.held_out import HeldOutBatches
from lightning_hpo.module_losses import ModuleLoss, ModuleLosses, NoLossError
from lightning_hpo.whole_data import batch_length

__all__ = ["ConditionedTraining"]

_STREAM = 16  # batches that stand for validation data without a length


class ConditionedTraining(MethodCallback):
    r"""Trains a hyper-network under sampled conditions, and chooses the condition on validation data.

    For modules with a part made by :func:`~lightning_hpo.hypernetize`. Before each training batch a condition
    :math:`\gamma` is drawn and handed to that part, which then predicts its weights; your ``training_step`` reads the
    values from ``net.condition`` (the weight of a term of the loss, a strength of augmentation). At each validation the
    validation loss is computed on a grid of conditions, too; the best one is chosen, and used from then on whenever
    your ``validation_step``, ``test_step`` or ``predict_step`` runs. With ``refine_steps`` the choice is refined when
    training ends, by the gradient of the validation loss in :math:`\gamma`, with all weights fixed.

    Every micro-batch, and every rank, has a condition of its own; draws are numbered, and stratified over steps and
    ranks.

    Args:
        sampling: ``"stratified"``: of 32 draws in a row each lies in another 32nd of a range; ``"uniform"``.
        per_example: Whether each example has a condition of its own. The hypernetized part must not mix examples, and
            ``net.condition`` holds ``(batch)`` values.
        grid: Where the validation loss is computed: a number of values for each range, or a list of conditions by name;
            0 for nowhere.
        condition: What is used in validation, test and prediction; the chosen one by default, and the middle before.
        refine_steps: Steps of Adam on the chosen condition when training ends, each on a validation batch.
        lr: First learning rate of these, in units of the range; it falls linearly to zero.
        val_dataloader: Where these batches come from; the validation data of the fit by default.
        val_loss: A function ``(module, batch)``, or the name under which ``validation_step`` logs the loss; by default
            the module's ``outer_loss(batch)``, what ``validation_step`` returns, or what it logs as ``val_loss``.
        seed: Decides the draws.

    Attributes:
        chosen: The best condition of the last validation by name, empty before.
        losses: The validation loss at each condition of the grid, empty before.
        draws: How many conditions have been drawn, on all ranks.

    Raises:
        ValueError: If an argument is wrong.
        MisconfigurationException: In ``setup`` or when training starts, if no part is hypernetized, a condition is not
            one of its own, or nothing scores a validation batch; says what to change.

    References:
        Gonzalez Ortiz, Guttag and Dalca, "Magnitude Invariant Parametrizations Improve Hypernetwork Learning", ICLR
        2024.

    Example:
        >>> from lightning_hpo import ConditionSpec, hypernetize
        >>> from lightning_hpo.testing import TinyClassifier, TinyImages, tiny_trainer
        >>> module = TinyClassifier()
        >>> module.network = hypernetize(module.network, ConditionSpec().add("weight"), include=["head.*"])
        >>> training = ConditionedTraining(grid=3)
        >>> tiny_trainer(training, max_epochs=1).fit(module, TinyImages())
        >>> list(training.chosen), len(training.losses)
        (['weight'], 3)
    """

    KNOB: ClassVar[str] = "weights of losses and regularisers: one network for all of them, the value chosen afterwards"
    _STATE = ("draws", "chosen", "losses")

    def __init__(
        self,
        sampling: Literal["stratified", "uniform"] = "stratified",
        per_example: bool = False,
        grid: int | Sequence[Mapping[str, float]] = 5,
        condition: Mapping[str, float] | None = None,
        refine_steps: int = 0,
        lr: float = 0.05,
        val_dataloader: Iterable[Any] | None = None,
        val_loss: ModuleLoss | str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.sampling, self.per_example, self.grid, self.condition = sampling, per_example, grid, condition
        self.refine_steps, self.lr, self.seed = refine_steps, lr, seed
        self.val_dataloader, self.val_loss = val_dataloader, val_loss
        if problems := argument_problems(self):
            raise ValueError(f"`ConditionedTraining`: {'; '.join(problems)}.")
        self.draws = 0
        self.chosen: dict[str, float] = {}
        self.losses: list[float] = []
        self.held_out = HeldOutBatches()  # drawn from at the end alone, so its position is no state
        self._parts = ConditionedParts(torch.nn.Module())  # none before a setup
        self._grid = self._tried = torch.empty(0)
        self._drawn = 0  # for the present batch
        self._totals: Tensor | None = None  # of losses times examples, and of examples
        self._scored_at = -1  # the optimizer step of the last validation
        self._loader: Any = None

    @override
    def hyperparameters(self) -> dict[str, float | list[float]]:
        """The condition that is used in validation and afterwards."""
        return dict(self._parts.values(self._resting())) if self._parts.nets else {}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refuses a choice among other conditions."""
        super().load_state_dict(state_dict)
        if self._parts.nets:
            self.raise_all(choice_problems(self._parts.spec, self.chosen))

    # Around training

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Finds the hypernetized parts and makes the grid."""
        self.refuse_sharded_strategy(trainer)
        before, self._parts, self._scored_at = self._parts, ConditionedParts(pl_module), -1
        if not self._parts.nets:
            self.raise_all(
                [f"no part of `{type(pl_module).__name__}` is hypernetized; make one: `net = hypernetize(net, spec)`."]
            )
        self._grid, problems = encoded_grid(self._parts.spec, self.grid, self.condition)
        problems += self._parts.problems()
        if self.refine_steps and not self._parts.spec.ranges().any():
            problems.append("`refine_steps` moves ranges, and all conditions are categories; leave it out.")
        if self.grid and stage in ("fit", "validate"):
            problems += self.scoring_problems(pl_module, self.val_loss)
        self.raise_all(problems)
        if shared := shared_parameters(pl_module):
            rank_zero_warn(
                f"{shared} are also predicted by a hypernetized part, and never change here. Use that part alone, or "
                "hypernetize the whole that contains both."
            )
        if stage == "fit" and before.nets and not before.same(self._parts):
            self.draws, self.chosen, self.losses = 0, {}, []  # another module begins from the beginning
        self.raise_all(choice_problems(self._parts.spec, self.chosen))

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finds the data to refine the choice on; whoever tries a training step before the first has a condition."""
        self._rest(pl_module)
        if self.refine_steps:
            self._loader = self.attach_held_out(trainer, self.held_out, self.val_dataloader)

    # Every batch

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Draws a condition, and hands it over."""
        rows = self._length(batch) if self.per_example else 1
        drawn = self._parts.draw(self.draws, rows, self.seed, self.sampling == "stratified")
        gamma = drawn.to(pl_module.device, non_blocking=True)
        self._parts.hand_over(gamma if self.per_example else gamma[0])
        self._drawn = rows * distributed.world_size()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Counts the draws, and logs the present condition."""
        self.draws += self._drawn
        self.note_values({name: value.float().mean() for name, value in self._parts.nets[0].condition.items()})
        self.log_noted(trainer, pl_module)

    def _length(self, batch: Any) -> int:
        try:
            return batch_length(batch)
        except ValueError as error:
            self.raise_all([f"{error}."])
            raise

    def _resting(self) -> Tensor:
        """The condition in validation and afterwards, in [0, 1]."""
        values = self.chosen if self.condition is None else self.condition
        return self._parts.spec.encode(values) if values else self._parts.spec.centre()

    # Validation

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hands over the condition to validate at; outside of a fit it is compared with the grid."""
        self._rest(pl_module)
        tried = [*self._grid]
        if self.chosen and trainer.state.fn != TrainerFn.FITTING:  # refined, perhaps, and better than the grid
            tried.append(self._parts.spec.encode(self.chosen))
        self._tried = torch.stack(tried) if self.grid else self._grid
        self._totals = torch.zeros(len(self._tried) + 1, device=pl_module.device)

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
        """Computes the loss of the batch at each condition of the grid; of the first loader only."""
        if self._totals is None or not self.grid or dataloader_idx or trainer.sanity_checking:
            return
        self._totals += self._sums(trainer, pl_module, self._tried, [batch])
        self._rest(pl_module)

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Chooses the best condition, the same on every rank."""
        if self._totals is None or not self.grid or trainer.sanity_checking:
            return
        losses = self._choose(self._tried, self._totals)
        self.losses, self._scored_at = losses[: len(self._grid)], trainer.global_step
        names = [f"val_loss/{label}" for label in self._parts.spec.labels(self._grid)]
        values = dict(zip(names, self.losses, strict=True))
        values |= {f"chosen_{name}": value for name, value in self.chosen.items()}
        best = lowest(losses)
        values["val_loss"] = float("nan") if best is None else losses[best]
        # The same on all ranks anyway; without being told to average, Lightning warns.
        self.log_values(pl_module, values, sync_dist=True)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes the condition back."""
        self._parts.hand_over(None)
        self._totals = None

    def _losses(self, trainer: Trainer, pl_module: LightningModule) -> ConditionLosses:
        context: Callable[[], AbstractContextManager[Any]] = trainer.precision_plugin.val_step_context
        return ConditionLosses(ModuleLosses(pl_module, {}, None, self.val_loss, context), self._parts.nets)

    def _sums(self, trainer: Trainer, pl_module: LightningModule, gammas: Tensor, batches: Iterable[Any]) -> Tensor:
        try:
            return self._losses(trainer, pl_module).sums(gammas.to(pl_module.device), batches)
        except NoLossError as error:
            self.raise_all([f"{error}."])
            raise

    def _choose(self, gammas: Tensor, sums: Tensor) -> list[float]:
        """Reads the losses of all ranks, and takes the condition of the lowest one."""
        losses = mean_losses(sums)
        best = lowest(losses)
        if best is None:
            rank_zero_warn("No validation loss was finite on the grid; the chosen condition stays what it is.")
        else:
            self.chosen = self._parts.values(gammas[best])
        return losses

    def _rest(self, pl_module: LightningModule) -> None:
        self._parts.hand_over(self._resting().to(pl_module.device))

    # Test and prediction

    @override
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hands over the chosen condition."""
        self._rest(pl_module)

    @override
    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes it back."""
        self._parts.hand_over(None)

    on_predict_start, on_predict_end = on_test_start, on_test_end

    # The end

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refines the choice, if asked to."""
        if self.refine_steps:
            self._refine(trainer, pl_module)
            self.held_out.detach()

    def _refine(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Moves the condition from the best of the grid; kept where the loss on all batches is lower."""
        size, draw = sized_len(self._loader) or _STREAM, partial(self._drawn_batches, trainer, pl_module)
        if self._scored_at != trainer.global_step:
            self.losses = self._choose(self._grid, self._sums(trainer, pl_module, self._grid, draw(size)))
        if not self.chosen:
            return
        spec, losses = self._parts.spec, self._losses(trainer, pl_module)
        start, free = (t.to(pl_module.device) for t in (spec.encode(self.chosen), spec.ranges()))
        try:
            found = losses.improved(start, free, draw, self.refine_steps, self.lr, size)
        except NoLossError as error:  # training is over, and is not to be lost
            rank_zero_warn(f"The choice is the best of the grid, because {error}.")
        else:
            self.chosen = self._parts.values(found.cpu())

    def _drawn_batches(self, trainer: Trainer, pl_module: LightningModule, count: int) -> Iterable[Any]:
        """Some validation batches; as many as the loader has are all samples, but for a last batch that is not full."""
        for _ in range(count):
            yield from self.handed_over(trainer, pl_module, [next(self.held_out)])

    @override
    def release(self) -> None:
        """Takes the condition back from the module."""
        self._parts.hand_over(None)
        self.held_out.detach()
        self._loader = self._totals = None
