"""Self-tuning networks as a callback: regularisation follows the validation loss through weights that respond to it."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_hpo import distributed
from lightning_hpo.callbacks.base import MethodCallback
from lightning_hpo.functional.bilevel.best_response import Encoding
from lightning_hpo.held_out import HeldOutBatches
from lightning_hpo.hyper import HyperparameterSet
from lightning_hpo.matching_dropout import tune_matching_dropout
from lightning_hpo.module_losses import ModuleLoss, ModuleLosses, NoLossError
from lightning_hpo.nn.self_tuning_networks import BestResponse, convert
from lightning_hpo.nn.self_tuning_regularisers import tune_dropout
from lightning_hpo.perturbation import Perturbation
from lightning_hpo.raw_hyperparameters import HiddenParameters, named_sets, numbers, share
from lightning_hpo.response_optimizer import clip_as_user, optimizer_like, zero_if_useless
from lightning_hpo.response_training import Mode, NoResponseError, ResponseTraining
from lightning_hpo.self_tuning_arguments import argument_problems
from lightning_hpo.state import saved

__all__ = ["SelfTuning"]

_USELESS = 10  # validation losses in a row that are not finite, after which training ends


class SelfTuning(MethodCallback):
    r"""Tunes dropout, augmentation and other regularisation online, through weights that respond to it (STN, Δ-STN).

    In training each example sees hyperparameters of its own, drawn around the present ones, and the network's linear
    layers, convolutions, embeddings and LSTMs learn how their weights respond. Every so many steps the present
    hyperparameters follow the gradient of the validation loss *through that response*; they may be anything that the
    training step reads, differentiable or not, whole numbers among them.

    What is tuned: a :class:`~lightning_hpo.HyperparameterSet` that ``training_step`` reads, as an attribute of the
    module or given as ``hypers``, for example in layers such as
    :class:`~lightning_hpo.nn.self_tuning_regularisers.TunedDropout`; and rates of the network's own dropout layers,
    named by ``dropout``. While a batch is trained on, ``hypers[name]`` is one value for each example.

    The network stays yours: layers change their class while the fit lasts, the response belongs to this callback, which
    steps it by an optimizer like yours, and your optimizer, checkpoints and ``global_step`` are what they were.

    Args:
        hypers: Hyperparameters that the training step reads, where they are no attribute of the module.
        dropout: Patterns of names of ``torch.nn.Dropout`` layers; layers of one pattern share a rate, from 0 to 0.95.
        mode: ``"delta"`` (Δ-STN): your training step learns the weights for the present hyperparameters, and a second
            pass a batch learns the response, in the network linearised at them. ``"stn"``: one pass for both.
        train_steps: Optimizer steps from one update of the hyperparameters to the next.
        valid_steps: Validation batches, each with an update, at a time.
        warmup_steps: Optimizer steps before the first update.
        response_every: Optimizer steps from one second pass of ``"delta"`` to the next.
        response_parts: Into how many parts a batch is cut for that pass, which sees one of them, in turn: it costs
            more than a plain step on the same examples. 1 shows it the whole batch.
        scale: Standard deviation of the perturbation in units of raw values, one or by name.
        tune_scales: Whether the validation loss tunes it, too.
        entropy_weight: :math:`\tau`, what keeps a tuned scale from vanishing.
        per_batch: Names of hyperparameters that are the same for all examples of a batch.
        lr: Learning rate of hyperparameters and scales.
        hyper_optimizer: Makes their optimizer from them; RMSprop with ``lr`` by default.
        response_optimizer: Makes the response's optimizer from its parameters; by default one like yours, whose
            learning rate follows that of your first group.
        max_change: Largest change of a raw value in an update.
        encoding: What the hyper-network sees: ``"cos_sin"`` has the same length for all hyperparameters, ``"identity"``
            is the papers'.
        network: Name of the part that predicts, and is converted; found by itself.
        exclude: Patterns of names of layers that do not respond.
        val_dataloader: Where validation batches come from; the validation data of the fit by default.
        train_loss: A function ``(module, batch)`` for the second pass; ``training_step`` by default.
        val_loss: A function ``(module, batch)``, or the name under which ``validation_step`` logs the loss; by default
            the module's ``outer_loss(batch)``, what ``validation_step`` returns, or what it logs as ``val_loss``.
        seed: Decides perturbations, and the first response.

    Raises:
        ValueError: If an argument is wrong.
        MisconfigurationException: In ``setup`` or when training starts, if there is nothing to tune, nothing that can
            respond, or nothing to score it with; says what to change.

    References:
        MacKay, Vicol, Lorraine, Duvenaud and Grosse, "Self-Tuning Networks", ICLR 2019; Bae and Grosse, "Delta-STN",
        NeurIPS 2020; Gonzalez Ortiz, Guttag and Dalca, "Magnitude Invariant Parametrizations", ICLR 2024 (encoding).

    Example:
        >>> from lightning_hpo.testing import TinyClassifier, TinyImages, tiny_trainer
        >>> tuning = SelfTuning(dropout=("*mlp*",), warmup_steps=2, train_steps=2)
        >>> tiny_trainer(tuning, max_steps=6).fit(TinyClassifier(), TinyImages())
        >>> list(tuning.hyperparameters())
        ['*mlp*', 'scale.*mlp*']
    """

    KNOB: ClassVar[str] = "regularisation and augmentation strengths, whole numbers too, and their schedules"
    _KEY: ClassVar[tuple[str, ...]] = ("mode", "encoding")  # a response means something else under another
    _STATE = (
        *("hypers", "rates", "perturbation", "response", "optimizer", "response_optimizer", "held_out"),
        *("steps", "updates", "useless"),
    )

    def __init__(
        self,
        hypers: HyperparameterSet | None = None,
        dropout: Sequence[str] = (),
        mode: Mode = "delta",
        train_steps: int = 5,
        valid_steps: int = 1,
        warmup_steps: int = 500,
        response_every: int = 1,
        response_parts: int = 2,
        scale: float | dict[str, float] = 1.0,
        tune_scales: bool = True,
        entropy_weight: float = 1e-3,
        per_batch: Sequence[str] = (),
        lr: float = 1e-2,
        hyper_optimizer: Callable[[Iterable[Tensor]], Optimizer] | None = None,
        response_optimizer: Callable[[Iterable[Tensor]], Optimizer] | None = None,
        max_change: float = 0.5,
        encoding: Encoding = "cos_sin",
        network: str | None = None,
        exclude: Sequence[str] = (),
        val_dataloader: Iterable[Any] | None = None,
        train_loss: ModuleLoss | None = None,
        val_loss: ModuleLoss | str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.hypers, self.dropout = hypers, (dropout,) if isinstance(dropout, str) else tuple(dropout)
        self.mode, self.train_steps, self.valid_steps, self.warmup_steps = mode, train_steps, valid_steps, warmup_steps
        self.response_every, self.response_parts = response_every, response_parts
        self.scale, self.tune_scales, self.entropy_weight = scale, tune_scales, entropy_weight
        self.per_batch, self.lr, self.max_change, self.encoding = tuple(per_batch), lr, max_change, encoding
        self.network, self.exclude, self.val_dataloader = network, tuple(exclude), val_dataloader
        self.train_loss, self.val_loss, self.seed = train_loss, val_loss, seed
        self._make_hyper, self._make_response = hyper_optimizer, response_optimizer
        if problems := argument_problems(self):
            raise ValueError(f"`SelfTuning`: {'; '.join(problems)}.")
        self.rates: HyperparameterSet | None = None  # of the network's own dropout layers
        self.perturbation: Perturbation | None = None
        self.response: BestResponse | None = None
        self.optimizer: Optimizer | None = None
        self.response_optimizer: Optimizer | None = None
        self.held_out = HeldOutBatches()
        self.steps = self.updates = self.useless = 0
        self._sets: dict[str, HyperparameterSet] = {}
        self._training: ResponseTraining | None = None
        self._hidden = HiddenParameters()
        self._swapped: tune_dropout | None = None
        self._hook: Any = None
        self._seen = self._window = 0
        self._lost: Tensor | None = None  # whether a gradient of the response was not finite since the last update
        self._left: Any = None  # the response's state when the last fit ended

    # What has been learned

    @override
    def hyperparameters(self) -> dict[str, float | list[float]]:
        """The values by name, and the scales of their perturbations."""
        if self.perturbation is None:
            return {} if self.hypers is None else dict(self.hypers.numbers())
        scales = {f"scale.{name}": value.item() for name, value in self.perturbation.scales().items()}
        return numbers(self._sets) | scales

    @override
    def state_dict(self) -> dict[str, Any]:
        """Also after a fit, or in its exception: the response is what it was at the end."""
        state = super().state_dict()
        return state if state["response"] is not None else state | {"response": saved(self._left, "SelfTuning")}

    # Around training

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Converts the network and takes the hyperparameters out of training's gradient."""
        if stage != "fit":
            return
        self.refuse_sharded_strategy(trainer)
        self.require_automatic_optimization(pl_module)
        problems = self.scoring_problems(pl_module, self.val_loss)
        compiled = [n or "the module" for n, m in pl_module.named_modules() if _is_compiled(m)]
        if compiled:
            problems.append(f"layers of compiled modules cannot change ({compiled}): compile after the fit.")
        self.raise_all(problems)
        network = self._find(pl_module)
        self._sets = named_sets(pl_module, self.hypers)
        self._add_rates(network)
        if not self._sets:
            self.raise_all(
                [
                    "there is nothing to tune: give the module a `HyperparameterSet` that its training step reads, or "
                    "name dropout layers (`dropout=('*',)`)."
                ]
            )
        try:
            self._prepare(network)
        except ValueError as error:
            self.release()
            self.raise_all([f"{error}."])
        self._hidden.hide(raw for part in self._sets.values() for raw in part.parameters())

    def _find(self, pl_module: LightningModule) -> nn.Module:
        try:
            return pl_module if self.network is None else pl_module.get_submodule(self.network)
        except AttributeError:
            named = sorted(name for name, _ in pl_module.named_children())
            self.raise_all([f"network={self.network!r} is not in `{type(pl_module).__name__}`, which has {named}."])
            raise

    def _add_rates(self, network: nn.Module) -> None:
        """Hyperparameters for the network's own dropout layers."""
        if not self.dropout:
            return
        try:
            self.rates, self._swapped = tune_matching_dropout(network, self.dropout, self.rates)
        except ValueError as error:
            self.raise_all([f"{error}."])
        self._sets["dropout" if self._sets else ""] = cast(HyperparameterSet, self.rates)

    def _prepare(self, network: nn.Module) -> None:
        perturbation = Perturbation(self._sets, self.scale, self.per_batch, self.encoding)
        before = self.perturbation
        if before is None or [id(p) for p in before.raw_parameters()] != [id(p) for p in perturbation.raw_parameters()]:
            self.perturbation, self.optimizer = perturbation, None
        self.response = convert(network, perturbation.inputs, exclude=self.exclude, seed=self.seed)
        self.response_optimizer, self.steps, self.updates, self.useless = None, 0, 0, 0
        if self.mode == "stn":  # whoever reads the file gets the weights that are in force
            self.response.keeps_general = True
            # A function of its own, because torch leaves a note on it.
            self._hook = network.register_state_dict_post_hook(lambda *args: self._fold_into(*args))

    def _fold_into(self, _network: nn.Module, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
        resting = self._training.resting() if self._training is not None else None
        if self.response is not None and resting is not None:
            with torch.no_grad():
                folded = self.response.folded(resting)
            state.update({f"{prefix}{name}": value for name, value in folded.items()})

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Moves what is learned to the device, alike on all ranks, and gets ready for the first validation."""
        response, perturbation = self._learner()
        for part in (*self._sets.values(), perturbation):
            part.to(pl_module.device)
        response.follow()
        share(self._sets)
        for parameter in (*perturbation.parameters(), *response.parameters()):
            parameter.data.copy_(distributed.broadcast(parameter.data))
        context = trainer.precision_plugin.train_step_context
        losses = full = ModuleLosses(pl_module, self._sets, self.train_loss, self.val_loss, context)
        if isinstance(trainer.precision_plugin, MixedPrecision):
            full = ModuleLosses(pl_module, self._sets, self.train_loss, self.val_loss)  # without autocast
        name = response.common_part()
        part = response.network.get_submodule(name) if self.network is None else response.network
        self._training = ResponseTraining(
            response, perturbation, losses, self.mode, part, self.seed, full, self.response_parts
        )
        self._training.settle()

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Makes the optimizers and attaches the validation data."""
        response, perturbation = self._learner()
        trained = {id(p) for p in response.general().values()}
        if not any(id(p) in trained for o in trainer.optimizers for group in o.param_groups for p in group["params"]):
            self.raise_all(["no optimizer steps the converted layers; return one from `configure_optimizers`."])
        if self.optimizer is None:
            tuned: list[Tensor] = list(perturbation.raw_parameters())
            tuned += [perturbation.scale] if self.tune_scales else []
            make = self._make_hyper or (lambda raws: torch.optim.RMSprop(raws, lr=self.lr))
            self.optimizer = make(tuned)
        self.response_optimizer = self._response_optimizer(trainer.optimizers[0], response)
        self.restore_pending()
        for optimizer in (self.optimizer, self.response_optimizer):
            optimizer.load_state_dict(optimizer.state_dict())  # takes restored moments to where the parameters are
        self._attach_data(trainer)
        self._seen, self._window = trainer.global_step, 0
        for part in self._sets.values():
            part.read.clear()

    def _response_optimizer(self, theirs: Optimizer, response: BestResponse) -> Optimizer:
        if self._make_response is not None:
            return self._make_response(list(response.parameters()))
        try:
            return optimizer_like(theirs, response.named_parameters())
        except (TypeError, ValueError) as error:
            kind = type(theirs).__name__
            self.raise_all([f"no second `{kind}` could be made ({error}); give `response_optimizer`."])
            raise

    def _attach_data(self, trainer: Trainer) -> None:
        loader = self.attach_held_out(trainer, self.held_out, self.val_dataloader)
        training = getattr(trainer.train_dataloader, "dataset", None)
        if training is not None and getattr(loader, "dataset", None) is training:
            rank_zero_warn("`SelfTuning`: the validation data are the training data: no regularisation is best there.")

    # Every step

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Perturbs the hyperparameters of the batch, or learns the response to them on it."""
        training = self._loop()
        if not self._window:
            training.begin(self.steps)
        self._window += 1
        try:
            if self.mode == "stn":
                training.perturb(batch)
            elif self._responds():
                with torch.enable_grad():
                    training.respond(batch, self._window - 1, trainer.accumulate_grad_batches)
        except (NoResponseError, NoLossError) as error:
            self.raise_all([f"{error}."])

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Steps the response, by the mean of all ranks' gradients."""
        if not self._responds():
            return
        own, (response, _) = self.response_optimizer, self._learner()
        if own is None:
            raise RuntimeError("training has not started")
        if not self._reached(trainer.accumulate_grad_batches):
            own.zero_grad()
            return
        parameters = list(response.parameters())
        if all(p.grad is None for p in parameters):
            if all(p.grad is None for group in optimizer.param_groups for p in group["params"]):
                return  # `training_step` returned None: the batch is left out
            if self.mode == "stn":
                self.raise_all(["the training loss does not depend on the converted layers."])
        distributed.mean_gradients(parameters)
        if self.mode == "delta":  # in the other mode a loss that is not finite is the user's own
            useless = zero_if_useless(parameters)  # rather than spoil the response
            self._lost = useless if self._lost is None else self._lost | useless
        if self.mode == "stn":  # these come from the user's backward pass, scaled like it
            self.unscale_own(trainer, own)
        clip_as_user(trainer, parameters)
        if self._make_response is None:
            for group in own.param_groups:
                group["lr"] = optimizer.param_groups[0]["lr"]
        if self.mode == "stn":
            self.step_own(trainer, own)
        else:
            own.step()
            own.zero_grad()

    def _reached(self, micro_batches: int) -> bool:
        """Whether a window that an epoch's end cut short came to the part whose turn it was; alike on all ranks."""
        parts = self.response_parts if self.mode == "delta" else 1
        return self.steps % parts * micro_batches < self._window * parts

    def _responds(self) -> bool:
        return self.mode == "stn" or self.steps % self.response_every == 0

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Updates the hyperparameters, if an optimizer step was taken and it is time."""
        training = self._loop()
        training.settle()
        if trainer.global_step == self._seen:
            return
        self._seen = trainer.global_step
        self.steps += 1
        if self.steps == 1:
            self._refuse_unread()
        after = self.steps - self.warmup_steps
        if after > 0 and after % self.train_steps == 0:
            for _ in range(self.valid_steps):
                self._update(trainer, pl_module, training)
            training.settle()
        self.log_noted(trainer, pl_module)
        self._window = 0

    def _refuse_unread(self) -> None:
        unread = [name for part in self._sets.values() for name in part if name not in part.read]
        if unread:
            self.raise_all([f"the training step does not read {unread}; use them (`hypers[name]`), or leave them out."])

    def _update(self, trainer: Trainer, pl_module: LightningModule, training: ResponseTraining) -> None:
        # As many as the step has micro-batches.
        held_out = self.handed_over(trainer, pl_module, [next(self.held_out) for _ in range(self._window)])
        training.held_out_noise.begin(self.updates)
        self.updates += 1
        try:
            loss, slope, widths = training.hypergradient(held_out, self.entropy_weight if self.tune_scales else None)
        except (NoResponseError, NoLossError) as error:
            self.raise_all([f"{error}."])
            raise
        parts = torch.cat([loss.view(1), slope, *([] if widths is None else [widths])])
        lost = parts.new_zeros((), dtype=torch.bool) if self._lost is None else self._lost
        finite, lost_some = torch.stack([parts.isfinite().all(), lost]).tolist()  # all that the host waits for
        self._lost = None
        if lost_some:
            rank_zero_warn(
                "`SelfTuning`: the linearised training loss was not finite; the response did not learn then."
            )
        if finite:
            self.useless = 0
            self._step(slope, widths)
        else:
            self._skip()
        perturbation = training.perturbation
        scales = {f"scale.{name}": value for name, value in perturbation.scales().items()}
        values = _means(self._sets)
        entropy = perturbation.entropy().detach()
        self.note_values({**values, **scales, "held_out_loss": loss, "entropy": entropy})

    def _step(self, slope: Tensor, widths: Tensor | None) -> None:
        _, perturbation = self._learner()
        if self.optimizer is None:
            raise RuntimeError("training has not started")
        before = perturbation.raw().detach().clone()
        for columns, raw in zip(perturbation.columns.values(), perturbation.raw_parameters(), strict=True):
            raw.grad = slope[columns].view_as(raw).to(raw.dtype)
        if widths is not None:
            perturbation.scale.grad = widths.to(perturbation.scale.dtype)
        self.optimizer.step()
        self.optimizer.zero_grad()
        perturbation.confine(before, self.max_change)

    def _skip(self) -> None:
        self.useless += 1
        if self.useless == _USELESS:
            self.raise_all([f"{_USELESS} validation losses in a row were not finite; look at the loss."])
        rank_zero_warn("A validation loss or its gradient was not finite; the hyperparameters stay what they are.")

    # The end

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Says if nothing was tuned."""
        if 0 < self.steps < self.warmup_steps + self.train_steps:
            rank_zero_warn(
                f"`SelfTuning`: training ended after {self.steps} steps, before the first update "
                f"(`warmup_steps={self.warmup_steps}`, `train_steps={self.train_steps}`): nothing was tuned."
            )
        self.held_out.detach()

    @override
    def release(self) -> None:
        """Gives the network back as an ordinary one, with the weights for the hyperparameters that were found."""
        if self._hook is not None:
            self._hook.remove()
        if self._training is not None:
            self._training.settle()
        if self.response is not None:
            self._left = saved(self.response, "SelfTuning.response")
            self.response.revert(self._training.resting() if self._training is not None else None)
        if self._swapped is not None:
            self._swapped.undo()
        self._hidden.show()
        self.held_out.detach()
        self.response = self._training = self._swapped = self._hook = None

    def _learner(self) -> tuple[BestResponse, Perturbation]:
        if self.response is None or self.perturbation is None:
            raise RuntimeError("`setup` has not been called")
        return self.response, self.perturbation

    def _loop(self) -> ResponseTraining:
        if self._training is None:
            raise RuntimeError("training has not started")
        return self._training


def _is_compiled(module: nn.Module) -> bool:
    # The last is what Lightning leaves on a module that was compiled as a whole.
    notes = ("_orig_mod", "_compiled_call_impl", "_compiler_ctx")
    return any(getattr(module, note, None) is not None for note in notes)


def _means(sets: Mapping[str, HyperparameterSet]) -> dict[str, Tensor]:
    """Values under the names of `numbers`, on their device: nothing waits for the log."""
    return {
        f"{label}.{name}" if len(sets) > 1 else name: value.detach().float().mean()
        for label, part in sets.items()
        for name, value in part.values().items()
    }
