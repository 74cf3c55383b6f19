"""Hypergradients as a callback: continuous hyperparameters follow the gradient of the validation loss."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_hpo.callbacks.base import MethodCallback
from lightning_hpo.functional.bilevel.estimators import ESTIMATORS, HypergradientResult
from lightning_hpo.functional.bilevel.problem import UnreachedError
from lightning_hpo.held_out import HeldOutBatches
from lightning_hpo.hyper import HyperparameterSet
from lightning_hpo.hypergradient_arguments import argument_problems, choose_estimator
from lightning_hpo.module_hypergradient import ModuleHypergradient, may_go_on
from lightning_hpo.module_losses import ModuleLoss, ModuleLosses, NoLossError
from lightning_hpo.raw_hyperparameters import HiddenParameters, named_sets, numbers, share, step_raw
from lightning_hpo.scaled_step import ScaledStep
from lightning_hpo.tuned_optimizer import TunedOptimizer

__all__ = ["Hypergradient"]

_USELESS = 10  # hypergradients in a row that are not finite, after which training ends


class Hypergradient(MethodCallback):
    r"""Tunes continuous hyperparameters by the gradient of the validation loss while training runs.

    Every so many optimizer steps a batch is drawn from the validation data, the hypergradient
    :math:`\mathrm d L_{val}(w(\theta), \theta) / \mathrm d \theta` is estimated at the present weights, and the
    callback's own optimizer steps the hyperparameters. Two kinds of them:

    - **of your optimizer**: ``tune=("weight_decay",)`` and its like work on a module that knows nothing of it;
    - **of your loss**: a :class:`~lightning_hpo.HyperparameterSet` that ``training_step`` reads, as an attribute of the
      module, where it is found, or given as ``hypers``. Its raw parameters are taken out of the gradient of training,
      so they may be among ``self.parameters()``.

    On several ranks the answer is that of one process on the joined batches.

    Args:
        tune: Settings of SGD, Adam or AdamW: ``"lr"`` (a factor on the schedule), ``"weight_decay"``, ``"momentum"``,
            ``"beta2"``; one value for each group.
        hypers: Hyperparameters that the loss reads, where they are no attribute of the module.
        estimator: How the hypergradient is estimated; a name in
            :data:`~lightning_hpo.functional.bilevel.estimators.ESTIMATORS`. ``"auto"`` looks one step ahead
            (``"unrolled"``) where learning rate or momentum is tuned; otherwise it takes conjugate gradient steps
            (``"ift_cg"``), five, and a single one where weight decay is all that is tuned.
        estimator_args: Its settings, by name.
        every_n_steps: Optimizer steps from one update to the next.
        warmup_steps: Optimizer steps before the first update.
        lr: Learning rate of the raw hyperparameters. Values move by a tenth an update with 0.1, once they are small.
        optimizer: Makes their optimizer from them; Adam with ``lr`` by default.
        max_norm: Largest norm of a hypergradient; longer ones are scaled down.
        bounds: Lowest and highest value by the name of a tuned setting.
        val_dataloader: Where validation batches come from; the validation data of the fit by default.
        train_loss: A function ``(module, batch)``; by default the module's ``inner_loss(batch)`` or ``training_step``.
        val_loss: A function ``(module, batch)``, or the name under which ``validation_step`` logs the loss; by default
            the module's ``outer_loss(batch)``, what ``validation_step`` returns, or what it logs as ``val_loss``.
        product: ``"exact"`` differentiates twice, ``"fd"`` takes differences of gradients, ``"gauss_newton"`` is not
            offered here; ``"auto"`` is exact until something cannot be differentiated twice.
        sync: ``"exact"`` averages every product over ranks, ``"local"`` only the hypergradient, which is biased.

    Raises:
        ValueError: If an argument is wrong.
        MisconfigurationException: In ``setup`` or when training starts, if there is nothing to tune or nothing to tune
            it on; says what to change.

    References:
        Lorraine, Vicol, Duvenaud, "Optimizing Millions of Hyperparameters by Implicit Differentiation", AISTATS 2020;
        Blondel et al., "Efficient and Modular Implicit Differentiation", NeurIPS 2022.

    Example:
        >>> from lightning_hpo.demos import DigitsDataModule, ImageClassifier
        >>> from lightning.pytorch import Trainer
        >>> small = dict(img_size=8, patch_size=2, in_chans=1, embed_dim=16, depth=1, num_heads=2)
        >>> module = ImageClassifier("vit_tiny_patch16_224", num_classes=10, model_args=small)
        >>> hypergradient = Hypergradient(tune=("weight_decay",), every_n_steps=2)
        >>> trainer = Trainer(max_steps=4, accelerator="cpu", logger=False, callbacks=[hypergradient],
        ...     enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
        >>> trainer.fit(module, DigitsDataModule())
        >>> list(hypergradient.hyperparameters())
        ['weight_decay']
    """

    KNOB: ClassVar[str] = "any continuous hyperparameter: weight decay, learning rate, loss weights, augmentation ..."
    _STATE = ("tuned", "hypers", "optimizer", "held_out", "steps", "useless", "carried")

    def __init__(
        self,
        tune: Sequence[str] = (),
        hypers: HyperparameterSet | None = None,
        estimator: str = "auto",
        estimator_args: dict[str, Any] | None = None,
        every_n_steps: int = 20,
        warmup_steps: int = 0,
        lr: float = 0.1,
        optimizer: Callable[[Iterable[Tensor]], Optimizer] | None = None,
        max_norm: float | None = None,
        bounds: dict[str, tuple[float, float]] | None = None,
        val_dataloader: Iterable[Any] | None = None,
        train_loss: ModuleLoss | None = None,
        val_loss: ModuleLoss | str | None = None,
        product: Literal["auto", "exact", "fd"] = "auto",
        sync: Literal["exact", "local"] = "exact",
    ) -> None:
        super().__init__()
        self.tune, self.hypers = tuple(tune), hypers
        self.estimator, self.estimator_args = estimator, dict(estimator_args or {})
        self.every_n_steps, self.warmup_steps, self.lr, self.max_norm = every_n_steps, warmup_steps, lr, max_norm
        self.bounds, self.val_dataloader = dict(bounds or {}), val_dataloader
        self.train_loss, self.val_loss, self.product, self.sync = train_loss, val_loss, product, sync
        self._make_optimizer = optimizer
        problems = argument_problems(
            self.tune, self.bounds, estimator, product, sync, every_n_steps, warmup_steps, lr, max_norm
        )
        if problems:
            raise ValueError(f"`Hypergradient`: {'; '.join(problems)}.")
        self.tuned: HyperparameterSet | None = None  # settings of the optimizer, once it is there
        self.optimizer: Optimizer | None = None
        self.held_out = HeldOutBatches()
        self.steps = self.useless = 0
        self.carried: dict[str, Any] = {}  # what the estimator hands to its next call
        self._reset()

    def _reset(self) -> None:
        self._sets: dict[str, HyperparameterSet] = {}
        self._estimate: ModuleHypergradient | None = None
        self._settings: TunedOptimizer | None = None
        self._scaled: ScaledStep | None = None
        self._hidden = HiddenParameters()
        self._window: list[Any] = []  # batches of the coming optimizer step
        self._seen = 0

    # What has been learned

    @override
    def hyperparameters(self) -> dict[str, float | list[float]]:
        """The values by name."""
        sets = self._all_sets()
        if self.hypers is not None and not sets:
            sets = {"": self.hypers}
        return numbers(sets)

    # Around training

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Finds the hyperparameters and takes them out of training's gradient."""
        if stage != "fit":
            return
        self.refuse_sharded_strategy(trainer)
        self.require_automatic_optimization(pl_module)
        self._sets = named_sets(pl_module, self.hypers)
        problems = []
        if not self._sets and not self.tune:
            problems.append(
                "there is nothing to tune: name settings of the optimizer (`tune=('weight_decay',)`), or give the "
                "module a `HyperparameterSet` that its training step reads."
            )
        problems += self.scoring_problems(pl_module, self.val_loss)
        self.raise_all(problems)
        self._hidden.hide(raw for part in self._sets.values() for raw in part.parameters())

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Looks at the optimizer and attaches the validation data."""
        own = {id(parameter) for parameter in pl_module.parameters()}
        if not any(id(p) in own for o in trainer.optimizers for group in o.param_groups for p in group["params"]):
            self.raise_all(["no optimizer steps the module's parameters; return one from `configure_optimizers`."])
        if self.tuned is None and trainer.global_step == 0:
            self.steps = 0
        self._read_optimizer(trainer, pl_module)
        sets = self._all_sets()
        for part in sets.values():
            part.to(pl_module.device)
        if self.optimizer is None:
            raws = [raw for part in sets.values() for raw in part.parameters()]
            self.optimizer = self._make_optimizer(raws) if self._make_optimizer else torch.optim.Adam(raws, lr=self.lr)
        self.restore_pending()
        if self._settings is not None:
            self._settings.refresh()
        share(sets)
        context = trainer.precision_plugin.train_step_context
        losses = ModuleLosses(pl_module, sets, self.train_loss, self.val_loss, context)
        self._estimate = ModuleHypergradient(
            losses, self._settings, self.estimator, self.estimator_args, self.tune, self.product, self.sync
        )
        self.attach_held_out(trainer, self.held_out, self.val_dataloader)
        self._seen, self._window = trainer.global_step, []

    def _read_optimizer(self, trainer: Trainer, pl_module: LightningModule) -> None:
        optimizer, named = trainer.optimizers[0], dict(pl_module.named_parameters())
        try:
            self._settings = TunedOptimizer(optimizer, self.tune, named, self.bounds)
        except ValueError as error:
            entry = ESTIMATORS[choose_estimator(self.estimator, self.tune)]
            if self.tune or entry.follows_steps or entry.needs_slope:
                self.raise_all([f"{error}."])
            return  # an optimizer that nobody looks at
        if self.tune:
            if self.tuned is not None:  # this callback goes on
                self._settings.hypers = self.tuned
            self.tuned = self._settings.hypers
            self._scaled = ScaledStep(optimizer, self._settings.group_settings)

    def _all_sets(self) -> dict[str, HyperparameterSet]:
        own = {"optimizer": self.tuned} if self.tuned is not None else {}
        return {**self._sets, **own}

    # Every step

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Keeps the batches of the coming optimizer step, if an update is due after it."""
        if self._due(self.steps + 1):
            self._window.append(batch)

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Keeps where the step begins, for estimators that repeat it."""
        if self._estimate is not None and self._due(self.steps + 1):
            self._estimate.before_step()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Updates the hyperparameters, if an optimizer step was taken and it is time."""
        if trainer.global_step == self._seen or self._estimate is None:
            return
        self._seen = trainer.global_step
        self.steps += 1
        if self._due(self.steps):
            with torch.enable_grad():
                self._update(trainer, pl_module, self._estimate)
            self._estimate.forget_step()
        self._window = []
        self.log_noted(trainer, pl_module)

    def _due(self, step: int) -> bool:
        return step > self.warmup_steps and step % self.every_n_steps == 0

    def _update(self, trainer: Trainer, pl_module: LightningModule, estimate: ModuleHypergradient) -> None:
        drawn = [next(self.held_out) for _ in self._window]  # as many as the step has micro-batches
        held_out = self.handed_over(trainer, pl_module, drawn)
        result = self._hypergradient(estimate, held_out)
        gradients = result.gradients
        norm = torch.stack([g.double().square().sum() for g in gradients.values()]).sum().sqrt().item()
        if not math.isfinite(norm):
            self._skip()
        else:
            self.useless, self.carried = 0, result.state if may_go_on(result) else {}
            self._step(gradients, norm)
        values = {name: _mean(value) for name, value in self.hyperparameters().items()}
        info = {"residual": result.info.residual.float()} if result.info is not None else {}
        self.note_values({**values, **info, "hypergradient_norm": norm})

    def _hypergradient(self, estimate: ModuleHypergradient, held_out: list[Any]) -> HypergradientResult:
        try:
            return estimate.estimate(self._window, held_out, self.carried or None)
        except (NoLossError, UnreachedError) as error:
            self.raise_all([f"{error}."])
            raise
        finally:
            self.product = estimate.product  # a fallback holds for fits to come

    def _step(self, gradients: Mapping[str, Tensor], norm: float) -> None:
        if self._estimate is None or self.optimizer is None:
            raise RuntimeError("training has not started")
        step_raw(self.optimizer, self._estimate.losses.hparams, gradients, norm, self.max_norm)
        if self._settings is not None:
            self._settings.refresh()

    def _skip(self) -> None:
        self.useless, self.carried = self.useless + 1, {}
        rank_zero_warn("A hypergradient was not finite; the hyperparameters stay what they are.")
        if self.useless >= _USELESS:
            self.raise_all(
                [
                    f"{_USELESS} hypergradients in a row were not finite: either training has diverged (lower its "
                    "learning rate), or the solve (another `estimator`, fewer of its steps, a `ridge`)."
                ]
            )

    # The end

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lets go of the optimizer and the data."""
        self.release()

    @override
    def release(self) -> None:
        """Gives the module's hyperparameters back as they were."""
        if self._scaled is not None:
            self._scaled.remove()
        self._hidden.show()
        self.held_out.detach()
        self._estimate = self._settings = self._scaled = None
        self._window = []


def _mean(value: float | list[float]) -> float:
    return value if isinstance(value, float) else sum(value) / len(value)
