"""Training under sampled conditions as a callback: one hyper-network for a family of settings, chosen afterwards."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar, Literal

import torch
from lightning.fabric.utilities.data import sized_len
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from lightning_hpo import distributed
from lightning_hpo.callbacks.base import MethodCallback
from lightning_hpo.condition_losses import ConditionLosses
from lightning_hpo.functional.bilevel.condition_draws import sample_conditions
from lightning_hpo.functional.bilevel.condition_spec import ConditionSpec
from lightning_hpo.held_out import HeldOutBatches
from lightning_hpo.module_losses import ModuleLoss, ModuleLosses, NoLossError
from lightning_hpo.nn.mip_hypernetworks import Hypernetized
from lightning_hpo.whole_data import batch_length

__all__ = ["ConditionedTraining"]

_MOST = 1000  # conditions on a grid
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
        checks = {
            f"sampling must be 'stratified' or 'uniform', got {sampling!r}": sampling in ("stratified", "uniform"),
            f"grid must be an integer of at least 0, or a list of conditions, got {grid!r}": _whole(grid)
            or (isinstance(grid, (list, tuple)) and bool(grid) and all(isinstance(at, Mapping) for at in grid)),
            f"refine_steps must be an integer of at least 0, got {refine_steps!r}": _whole(refine_steps),
            "refine_steps needs a grid to begin from": not refine_steps or bool(grid),
            f"lr must be above 0 and at most 1, got {lr!r}": isinstance(lr, (int, float)) and 0 < lr <= 1,
            f"seed must be an integer from 0 to 2**31 - 1, got {seed!r}": _whole(seed) and seed < 2**31,
        }
        if problems := [problem for problem, holds in checks.items() if not holds]:
            raise ValueError(f"`ConditionedTraining`: {'; '.join(problems)}.")
        self.sampling, self.per_example, self.grid, self.condition = sampling, per_example, grid, condition
        self.refine_steps, self.lr, self.seed = refine_steps, lr, seed
        self.val_dataloader, self.val_loss = val_dataloader, val_loss
        self.draws = 0
        self.chosen: dict[str, float] = {}
        self.losses: list[float] = []
        self.held_out = HeldOutBatches()  # drawn from at the end alone, so its position is no state
        self._nets: list[Hypernetized] = []
        self._spec = ConditionSpec()
        self._grid = torch.empty(0)
        self._drawn = 0  # for the present batch
        self._totals: Tensor | None = None  # of losses times examples, and of examples
        self._scored_at = -1  # the optimizer step of the last validation
        self._loader: Any = None

    @override
    def hyperparameters(self) -> dict[str, float | list[float]]:
        """The condition that is used in validation and afterwards."""
        return dict(self._values(self._resting())) if self._nets else {}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refuses a choice among other conditions."""
        super().load_state_dict(state_dict)
        self._check_chosen()

    def _check_chosen(self) -> None:
        if self._nets and self.chosen and set(self.chosen) != set(self._spec):
            self.raise_all([f"the checkpoint chose {list(self.chosen)}, the module has {list(self._spec)}."])

    # Around training

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Finds the hypernetized parts and makes the grid."""
        self.refuse_sharded_strategy(trainer)
        nets = [part for part in pl_module.modules() if isinstance(part, Hypernetized)]
        if not nets:
            self.raise_all(
                [f"no part of `{type(pl_module).__name__}` is hypernetized; make one: `net = hypernetize(net, spec)`."]
            )
        problems = self._prepare(nets[0].spec)
        if any(net.spec != nets[0].spec for net in nets):
            problems.append("hypernetized parts have different conditions; give them the same `ConditionSpec`.")
        if self.grid and stage in ("fit", "validate"):
            problems += self.scoring_problems(pl_module, self.val_loss)
        self.raise_all(problems)
        if stage == "fit" and self._nets and [id(net) for net in nets] != [id(net) for net in self._nets]:
            self.draws, self.chosen, self.losses = 0, {}, []  # another module begins from the beginning
        self._nets, self._scored_at = nets, -1
        self._check_chosen()

    def _prepare(self, spec: ConditionSpec) -> list[str]:
        """Encodes what was given by name; returns what is wrong with it."""
        self._spec, problems = spec, []
        try:
            if not isinstance(self.grid, int):
                self._grid = torch.stack([spec.encode(at) for at in self.grid])
            elif self.grid:
                self._grid = spec.grid(self.grid)
        except ValueError as error:
            problems.append(f"in `grid`, {error}.")
        if len(self._grid) > _MOST:
            problems.append(f"the grid has {len(self._grid)} conditions; use fewer values each, or give a list.")
        try:
            _ = None if self.condition is None else spec.encode(self.condition)
        except ValueError as error:
            problems.append(f"in `condition`, {error}.")
        return problems

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
        ranks = distributed.world_size()
        numbers = range(self.draws + distributed.rank(), self.draws + rows * ranks, ranks)
        uniform = sample_conditions(numbers, len(self._spec.conditions), self.seed, self.sampling == "stratified")
        gamma = self._spec.from_uniform(uniform).to(pl_module.device, non_blocking=True)
        self._hand(gamma if self.per_example else gamma[0])
        self._drawn = rows * ranks

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Counts the draws, and logs the present condition."""
        self.draws += self._drawn
        self.note_values({name: value.float().mean() for name, value in self._nets[0].condition.items()})
        self.log_noted(trainer, pl_module)

    def _length(self, batch: Any) -> int:
        try:
            return batch_length(batch)
        except ValueError as error:
            self.raise_all([f"{error}."])
            raise

    def _hand(self, gamma: Tensor | None) -> None:
        for net in self._nets:
            net.gamma = gamma

    def _resting(self) -> Tensor:
        """The condition in validation and afterwards, in [0, 1]."""
        values = self.chosen if self.condition is None else self.condition
        return self._spec.encode(values) if values else self._spec.centre()

    def _values(self, gamma: Tensor) -> dict[str, float]:
        return {name: value.item() for name, value in self._spec.decode(gamma).items()}

    # Validation

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hands over the condition to validate at."""
        self._rest(pl_module)
        self._totals = torch.zeros(len(self._grid) + 1, device=pl_module.device)

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
        self._totals += self._sums(trainer, pl_module, self._grid, [batch])
        self._rest(pl_module)

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Chooses the best condition, the same on every rank."""
        if self._totals is None or not self.grid or trainer.sanity_checking:
            return
        self._choose(self._grid, self._totals)
        self._scored_at = trainer.global_step
        names = [f"val_loss/{self._spec.label(gamma)}" for gamma in self._grid]
        values = dict(zip(names, self.losses, strict=True))
        values |= {f"chosen_{name}": value for name, value in self.chosen.items()}
        # The same on all ranks anyway; without being told to average, Lightning warns.
        self.log_values(pl_module, values | {"val_loss": min(self.losses)}, sync_dist=True)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes the condition back."""
        self._hand(None)
        self._totals = None

    def _losses(self, trainer: Trainer, pl_module: LightningModule) -> ConditionLosses:
        context: Callable[[], AbstractContextManager[Any]] = trainer.precision_plugin.val_step_context
        return ConditionLosses(ModuleLosses(pl_module, {}, None, self.val_loss, context), self._nets)

    def _sums(self, trainer: Trainer, pl_module: LightningModule, gammas: Tensor, batches: Iterable[Any]) -> Tensor:
        try:
            return self._losses(trainer, pl_module).sums(gammas.to(pl_module.device), batches)
        except NoLossError as error:
            self.raise_all([f"{error}."])
            raise

    def _choose(self, gammas: Tensor, sums: Tensor) -> None:
        """Reads losses that were summed over batches and ranks, and keeps the best of finite ones."""
        *totals, examples = distributed.sum(sums).tolist()
        self.losses = [total / examples if examples else float("nan") for total in totals]
        finite = [index for index, loss in enumerate(self.losses) if abs(loss) < float("inf")]
        if finite:
            self.chosen = self._values(gammas[min(finite, key=self.losses.__getitem__)])
        else:
            rank_zero_warn("No validation loss was finite on the grid; the chosen condition stays what it is.")

    def _rest(self, pl_module: LightningModule) -> None:
        self._hand(self._resting().to(pl_module.device))

    # Test and prediction

    @override
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hands over the chosen condition."""
        self._rest(pl_module)

    @override
    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes it back."""
        self._hand(None)

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hands over the chosen condition."""
        self._rest(pl_module)

    @override
    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes it back."""
        self._hand(None)

    # The end

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refines the choice, if asked to."""
        if self.refine_steps:
            self._refine(trainer, pl_module)
            self.held_out.detach()

    def _refine(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Moves the condition from the best of the grid; kept where the loss on all batches is lower."""
        size = sized_len(self._loader) or _STREAM
        if self._scored_at != trainer.global_step:
            grid = self._sums(trainer, pl_module, self._grid, self._drawn_batches(trainer, pl_module, size))
            self._choose(self._grid, grid)
        if not self.chosen:
            return
        start, free = (t.to(pl_module.device) for t in (self._spec.encode(self.chosen), self._spec.ranges()))
        batches = self._drawn_batches(trainer, pl_module, self.refine_steps)
        found = self._losses(trainer, pl_module).refined(start, free, batches, self.refine_steps, self.lr)
        if not bool(torch.isfinite(found).all()):
            rank_zero_warn("A gradient in the condition was not finite; the choice is the best of the grid.")
            return
        losses, both = self.losses, torch.stack([start, found])
        batches = self._drawn_batches(trainer, pl_module, size)
        self._choose(both.cpu(), self._sums(trainer, pl_module, both, batches))
        self.losses = losses

    def _drawn_batches(self, trainer: Trainer, pl_module: LightningModule, count: int) -> Iterable[Any]:
        """Some validation batches; as many as the loader has are all of them."""
        for _ in range(count):
            yield from self.handed_over(trainer, pl_module, [next(self.held_out)])

    @override
    def release(self) -> None:
        """Takes the condition back from the module."""
        self._hand(None)
        self.held_out.detach()
        self._loader = self._totals = None


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
