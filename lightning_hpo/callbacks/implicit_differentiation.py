"""Hypergradients as a callback: continuous hyperparameters follow the gradient of the validation loss."""

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_hpo import distributed
from lightning_hpo.callbacks.base import MethodCallback
from lightning_hpo.functional.bilevel.estimators import ESTIMATORS, HypergradientResult, Problem
from lightning_hpo.functional.bilevel.problem import identity
from lightning_hpo.functional.bilevel.second_derivatives import second_derivatives_missing
from lightning_hpo.held_out import HeldOutBatches
from lightning_hpo.hyper import HyperparameterSet
from lightning_hpo.module_losses import (
    ModuleLoss,
    ModuleLosses,
    NoLossError,
    hyperparameter_sets,
    twice_differentiable,
)
from lightning_hpo.scaled_step import ScaledStep
from lightning_hpo.tuned_optimizer import TunedOptimizer
from lightning_hpo.validation_loader import validation_loader

__all__ = ["Hypergradient"]

_FOLLOWING = ("unrolled", "truncated", "forward", "es", "pes")  # estimators that take the optimizer's steps
_ITERATIVE = ("ift_cg", "ift_normal_cg", "ift_gmres", "ift_bicgstab", "ift_neumann")
_USELESS = 10  # hypergradients in a row that are not finite, after which training ends
_TUNABLE = ("lr", "weight_decay", "momentum", "beta2")
# A solve cut short goes along the large curvatures alone. Begun where the last one ended it would reach the small and
# the negative ones, too, which are noise: the hypergradient of a network then grows without end.
_CHEAP: dict[str, dict[str, Any]] = {
    "ift_cg": {"maxiter": 5, "tol": 0.0, "warm_start": False},
    "unrolled": {"steps": 1},
}


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
            (``"unrolled"``) where learning rate or momentum is tuned, and takes five conjugate gradient steps
            (``"ift_cg"``) otherwise.
        estimator_args: Its settings, by name.
        every_n_steps: Optimizer steps from one update to the next.
        warmup_steps: Optimizer steps before the first update.
        lr: Learning rate of the raw hyperparameters.
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
        lr: float = 0.01,
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
        if problems := self._argument_problems():
            raise ValueError(f"`Hypergradient`: {'; '.join(problems)}.")
        self.tuned: HyperparameterSet | None = None  # settings of the optimizer, once it is there
        self.optimizer: Optimizer | None = None
        self.held_out = HeldOutBatches()
        self.steps = self.useless = 0
        self.carried: dict[str, Any] = {}  # what the estimator hands to its next call
        self._reset()

    def _argument_problems(self) -> list[str]:
        checks = {
            f"tune may name {_TUNABLE}, got {self.tune!r}": all(name in _TUNABLE for name in self.tune),
            f"estimator must be 'auto' or one of {sorted(ESTIMATORS)}, got {self.estimator!r}": self.estimator == "auto"
            or self.estimator in ESTIMATORS,
            f"every_n_steps must be a positive integer, got {self.every_n_steps!r}": _whole(self.every_n_steps, 1),
            f"warmup_steps must be an integer of at least 0, got {self.warmup_steps!r}": _whole(self.warmup_steps, 0),
            f"lr must be positive, got {self.lr!r}": self.lr > 0,
            f"max_norm must be positive, got {self.max_norm!r}": self.max_norm is None or self.max_norm > 0,
            f"product must be 'auto', 'exact' or 'fd', got {self.product!r}": self.product in ("auto", "exact", "fd"),
            f"sync must be 'exact' or 'local', got {self.sync!r}": self.sync in ("exact", "local"),
            f"bounds must be pairs low < high, got {self.bounds!r}": all(map(_ordered, self.bounds.values())),
            f"bounds may name what is tuned, {self.tune!r}, got {sorted(self.bounds)}": set(self.bounds)
            <= set(self.tune),
        }
        problems = [problem for problem, holds in checks.items() if not holds]
        if not problems and self._follows() is False and set(self.tune) - {"weight_decay"}:
            problems.append(
                f"{self.estimator!r} looks at where training ends, which {sorted(set(self.tune) - {'weight_decay'})} "
                f"do not change; use one of {_FOLLOWING}"
            )
        return problems

    def _follows(self) -> bool:
        """Whether the estimator takes the optimizer's steps."""
        if self.estimator == "auto":
            return bool(set(self.tune) - {"weight_decay"})
        return self.estimator in _FOLLOWING

    def _reset(self) -> None:
        self._sets: dict[str, HyperparameterSet] = {}
        self._losses: ModuleLosses | None = None
        self._settings: TunedOptimizer | None = None
        self._scaled: ScaledStep | None = None
        self._hidden: list[nn.Parameter] = []  # raw hyperparameters that required a gradient
        self._window: list[Any] = []  # batches of the coming optimizer step
        self._before: dict[str, Any] = {}  # parameters, states, slopes when the step began
        self._seen = 0

    # What has been learned

    @override
    def hyperparameters(self) -> dict[str, float | list[float]]:
        """The values by name."""
        sets = self._all_sets()
        if self.hypers is not None and not sets:
            sets = {"": self.hypers}
        return {
            f"{label}.{name}" if len(sets) > 1 else name: value
            for label, part in sets.items()
            for name, value in part.numbers().items()
        }

    # Around training

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Finds the hyperparameters and takes them out of training's gradient."""
        if stage != "fit":
            return
        self.refuse_sharded_strategy(trainer)
        self.require_automatic_optimization(pl_module)
        inside = hyperparameter_sets(pl_module)
        found = {name.rpartition(".")[2]: part for name, part in inside.items()}
        self._sets = found if len(found) == len(inside) else inside
        if self.hypers is not None and all(self.hypers is not part for part in inside.values()):
            self._sets = {**self._sets, "hypers" if "hypers" not in self._sets else "given": self.hypers}
        problems = []
        if not self._sets and not self.tune:
            problems.append(
                "there is nothing to tune: name settings of the optimizer (`tune=('weight_decay',)`), or give the "
                "module a `HyperparameterSet` that its training step reads."
            )
        scored = self.val_loss is not None or callable(getattr(pl_module, "outer_loss", None))
        if not scored and not is_overridden("validation_step", pl_module):
            problems.append("nothing scores a validation batch: define `validation_step`, or give `val_loss`.")
        self.raise_all(problems)
        self._hide()

    def _hide(self) -> None:
        """DDP must not wait for gradients that training does not compute, and no optimizer must step these."""
        for part in self._sets.values():
            self._hidden += [raw for raw in part.parameters() if raw.requires_grad]
        for raw in self._hidden:
            raw.requires_grad_(False)

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
        self._make_own_optimizer(sets)
        self.restore_pending()
        if self._settings is not None:
            self._settings.refresh()
        for part in sets.values():
            for raw in part.parameters():
                raw.data.copy_(distributed.broadcast(raw.data))
        self._losses = ModuleLosses(
            pl_module, sets, self.train_loss, self.val_loss, trainer.precision_plugin.train_step_context
        )
        self._attach_data(trainer)
        self._seen, self._window, self._before = trainer.global_step, [], {}

    def _read_optimizer(self, trainer: Trainer, pl_module: LightningModule) -> None:
        optimizer, named = trainer.optimizers[0], dict(pl_module.named_parameters())
        try:
            self._settings = TunedOptimizer(optimizer, self.tune, named, self.bounds)
        except ValueError as error:
            if self.tune or self._follows() or self._estimator() == "sama":
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

    def _make_own_optimizer(self, sets: Mapping[str, HyperparameterSet]) -> None:
        if self.optimizer is None:
            raws = [raw for part in sets.values() for raw in part.parameters()]
            self.optimizer = self._make_optimizer(raws) if self._make_optimizer else torch.optim.Adam(raws, lr=self.lr)

    def _attach_data(self, trainer: Trainer) -> None:
        loader: Any = self.val_dataloader
        try:
            loader = validation_loader(trainer) if loader is None else loader
            if hasattr(loader, "__len__") and not len(loader):
                raise ValueError("the validation loader is empty; give one with data as `val_dataloader`.")
            self.held_out.attach(loader)
        except ValueError as error:
            self.raise_all([f"{str(error).rstrip('.')}."])

    # Every step

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Keeps the batches of the coming optimizer step."""
        self._window.append(batch)

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Keeps where the step begins, for estimators that repeat it."""
        if self._losses is None or self._settings is None or not self._due(self.steps + 1):
            return
        params = self._losses.params
        if self._follows():
            copies = {name: param.detach().clone() for name, param in params.items()}
            self._before = {"params": copies, "states": self._settings.states(copies=True)}
        elif self._estimator() == "sama":
            self._before = {"slope": self._settings.slopes(params)}

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Updates the hyperparameters, if an optimizer step was taken and it is time."""
        if trainer.global_step == self._seen:
            return
        self._seen = trainer.global_step
        self.steps += 1
        if self._due(self.steps):
            with torch.enable_grad():
                self._update(trainer, pl_module)
        self._window, self._before = [], {}

    def _due(self, step: int) -> bool:
        return step > self.warmup_steps and step % self.every_n_steps == 0

    def _update(self, trainer: Trainer, pl_module: LightningModule) -> None:
        drawn = [next(self.held_out) for _ in self._window]  # as many as the step has micro-batches
        result = self._estimate([trainer.strategy.batch_to_device(batch, pl_module.device) for batch in drawn])
        gradients = result.gradients
        if self.sync == "local":
            gradients = {name: distributed.mean(gradient) for name, gradient in gradients.items()}
        norm = torch.stack([g.double().square().sum() for g in gradients.values()]).sum().sqrt().item()
        if not math.isfinite(norm):
            self._skip()
        else:
            self.useless, self.carried = 0, result.state if _sound(result) else {}
            self._step(gradients, norm)
        values = {name: _mean(value) for name, value in self.hyperparameters().items()}
        info = {"residual": result.info.residual.float()} if result.info is not None else {}
        self.log_values(pl_module, {**values, **info, "hypergradient_norm": norm})

    def _estimator(self) -> str:
        if self.estimator != "auto":
            return self.estimator
        return "unrolled" if self._follows() else "ift_cg"

    def _estimate(self, held_out: list[Any]) -> HypergradientResult:
        losses = self._losses
        if losses is None:
            raise RuntimeError("training has not started")
        train = losses.train(self._window)
        params: Mapping[str, Tensor] = losses.params
        name = self._estimator()
        settings = {**(_CHEAP.get(name, {}) if self.estimator == "auto" else {}), **self.estimator_args}
        if self._follows() and self._settings is not None:
            params = self._before["params"]
            settings |= {"optimizer": self._settings.functional(), "states": self._before["states"]}
        elif self._settings is not None:
            train = self._settings.decayed(train)
        if name == "sama":
            settings["slope"] = self._before["slope"]
        reduce = distributed.mean if self.sync == "exact" else identity
        problem = Problem(train, losses.val(held_out), reduce)
        accepted = inspect.signature(ESTIMATORS[name]).parameters
        takes_product = "product" in accepted or name.startswith("ift_")
        kind = "exact" if self.product == "auto" else self.product
        extra = {"product": kind} if takes_product else {}
        if takes_product and kind == "exact":
            problem = replace(problem, train_loss=twice_differentiable(train, losses.recurrent))
        quiet = {"strict": None} if name in _ITERATIVE and "strict" not in settings else {}

        def run(**product: str) -> HypergradientResult:
            carried = self.carried or None
            return ESTIMATORS[name](problem, params, losses.hparams, carried, **settings, **quiet, **product)

        try:
            return run(**extra)
        except NoLossError as error:
            self.raise_all([f"{error}."])
            raise
        except ValueError as error:
            if "zero hypergradient" not in str(error):
                raise
            self.raise_all([f"{error}: the training step does not read it."])
            raise
        except RuntimeError as error:
            if not (self.product == "auto" and takes_product and second_derivatives_missing(error)):
                raise
            self.product = "fd"
            rank_zero_warn(
                f"`Hypergradient` goes on with differences of gradients (`product='fd'`): {str(error).splitlines()[0]}"
            )
            return run(product="fd")

    def _step(self, gradients: Mapping[str, Tensor], norm: float) -> None:
        losses, optimizer = self._losses, self.optimizer
        if losses is None or optimizer is None:
            raise RuntimeError("training has not started")
        shrink = min(1.0, self.max_norm / norm) if self.max_norm is not None and norm > 0 else 1.0
        for name, raw in losses.hparams.items():
            raw.grad = gradients[name].to(raw.dtype) * shrink
        optimizer.step()
        optimizer.zero_grad()
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
        self._release()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Gives the module's hyperparameters back as they were."""
        if stage == "fit":
            self._release()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Gives everything back: neither the end of training nor teardown follows an exception."""
        self._release()

    def _release(self) -> None:
        if self._scaled is not None:
            self._scaled.remove()
        for raw in self._hidden:
            raw.requires_grad_(True)
        self.held_out.detach()
        self._losses = self._settings = self._scaled = None
        self._hidden, self._window, self._before = [], [], {}


def _sound(result: HypergradientResult) -> bool:
    """Whether the next solve may begin where this one ended: one that went astray would go on doing so."""
    return result.info is None or bool(result.info.converged & ~result.info.negative_curvature)


def _ordered(pair: Any) -> bool:
    return isinstance(pair, (list, tuple)) and len(pair) == 2 and -math.inf < pair[0] < pair[1] < math.inf


def _mean(value: float | list[float]) -> float:
    return value if isinstance(value, float) else sum(value) / len(value)


def _whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
