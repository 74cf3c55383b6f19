"""BO-REP as a callback: outer parameters take steps of fixed length while an ordinary loop trains the inner ones."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from typing_extensions import override

from lightning_hpo import distributed
from lightning_hpo.callbacks.base import MethodCallback
from lightning_hpo.functional.arguments import is_whole
from lightning_hpo.functional.bilevel.adjoint_watch import Watch
from lightning_hpo.functional.bilevel.outer_gradient import OuterGradient, largest_curvature, outer_gradient
from lightning_hpo.functional.bilevel.problem import Problem, Tensors, UnreachedError
from lightning_hpo.functional.bilevel.products import Product
from lightning_hpo.functional.bilevel.second_derivatives import second_derivatives_missing
from lightning_hpo.functional.optim.normalized_momentum import Normalize, NormalizedMomentum, momentum_problems
from lightning_hpo.held_out import HeldOutBatches
from lightning_hpo.hyper import HyperparameterSet
from lightning_hpo.module_losses import (
    ModuleLoss,
    ModuleLosses,
    NoLossError,
    twice_differentiable,
)
from lightning_hpo.outer_parameters import OuterParameters
from lightning_hpo.raw_hyperparameters import step_raw

__all__ = ["SingleLoopHypergradient"]


class SingleLoopHypergradient(MethodCallback):
    r"""Trains outer parameters on validation data by steps of fixed length, in one loop with the inner ones (BO-REP).

    Your optimizer trains the inner parameters as ever. Every so many of its steps the outer ones follow the gradient of
    the validation loss *through* the inner parameters: with one running vector :math:`z` for the solution of the linear
    system, and normalised momentum, so that the scale of the validation loss and of its gradient (recurrent networks,
    transformers) does not matter. Outer are

    - **parts of your network**, named by ``outer`` or returned by the module's ``outer_parameters()``: an encoder whose
      head is the inner problem (hyper-representation);
    - **hyperparameters that the loss reads**: a :class:`~lightning_hpo.HyperparameterSet` of the module, or ``hypers``.

    They are taken out of training's gradient while the fit lasts, so they may be among ``self.parameters()``.

    How the paper's schedule maps onto an ordinary loop: each optimizer step is an inner step on its own batch, and an
    outer step follows every ``every_n_steps`` of them, on the batch of the last one and a validation batch. This is
    :math:`N` inner steps every :math:`I` outer ones with :math:`N / I` = ``every_n_steps``, spread evenly. The first
    ``refine_steps`` optimizer steps are the initialisation refinement. There is no projection: :math:`R = \infty`.

    On several ranks the answer is that of one process on the joined batches.

    Args:
        outer: Names of parameters of the module, or of parts of it: ``"encoder"`` is all that is in it.
        hypers: Hyperparameters that the loss reads, where they are no attribute of the module.
        lr: Length of an outer step, :math:`\eta`.
        momentum: :math:`\beta`.
        z_lr: Step size on the linear system, :math:`\nu`; below two over the largest curvature of the training loss.
        every_n_steps: Optimizer steps from one outer step to the next.
        refine_steps: Optimizer steps before the first one.
        normalize: ``"global"``: one norm for all; ``"per_group"``: one for the network's part and one for each set;
            False: none (MA-SOBA).
        min_norm: Shorter momenta give shorter steps.
        scheduler: Makes a schedule of ``lr`` from the callback's optimizer; it is stepped after each outer step.
        val_dataloader: Where validation batches come from; the validation data of the fit by default.
        train_loss: A function ``(module, batch)``; by default the module's ``inner_loss(batch)`` or ``training_step``.
        val_loss: A function ``(module, batch)``, or the name under which ``validation_step`` logs the loss; by default
            the module's ``outer_loss(batch)``, what ``validation_step`` returns, or what it logs as ``val_loss``.
        product: ``"exact"`` differentiates twice, ``"fd"`` takes differences of gradients; ``"auto"`` is exact until
            something cannot be differentiated twice.

    Raises:
        ValueError: If an argument is wrong.
        MisconfigurationException: In ``setup`` or when training starts, if nothing is outer, nothing is left to be
            inner, or there is nothing to score it with; says what to change.

    References:
        Hao, Gong and Liu, "Bilevel Optimization under Unbounded Smoothness: A New Algorithm and Convergence Analysis",
        ICLR 2024.

    Example:
        >>> from lightning_hpo.testing import TinyClassifier, TinyImages, tiny_trainer
        >>> training = SingleLoopHypergradient(outer=("network.patch_embed",), refine_steps=2, z_lr=0.1)
        >>> tiny_trainer(training, max_steps=6).fit(TinyClassifier(), TinyImages())
        >>> sorted(training.hyperparameters())  # lengths of the tensors
        ['network.patch_embed.proj.bias', 'network.patch_embed.proj.weight']
    """

    KNOB: ClassVar[str] = "step size of bilevel training, whatever the scale of its gradients"
    _STATE = ("hypers", "optimizer", "scheduler", "held_out", "z", "watch", "steps")

    def __init__(
        self,
        outer: Sequence[str] = (),
        hypers: HyperparameterSet | None = None,
        lr: float = 0.01,
        momentum: float = 0.9,
        z_lr: float = 0.01,
        every_n_steps: int = 2,
        refine_steps: int = 200,
        normalize: Normalize = "global",
        min_norm: float = 1e-10,
        scheduler: Callable[[Optimizer], LRScheduler] | None = None,
        val_dataloader: Iterable[Any] | None = None,
        train_loss: ModuleLoss | None = None,
        val_loss: ModuleLoss | str | None = None,
        product: Literal["auto", "exact", "fd"] = "auto",
    ) -> None:
        super().__init__()
        self.outer, self.hypers = (outer,) if isinstance(outer, str) else tuple(outer), hypers
        self.lr, self.momentum, self.z_lr, self.normalize, self.min_norm = lr, momentum, z_lr, normalize, min_norm
        self.every_n_steps, self.refine_steps, self._make_scheduler = every_n_steps, refine_steps, scheduler
        self.val_dataloader, self.train_loss, self.val_loss, self.product = (
            val_dataloader,
            train_loss,
            val_loss,
            product,
        )
        checks = {
            f"z_lr must be positive, got {z_lr!r}": 0 < z_lr < float("inf"),
            f"every_n_steps must be a positive integer, got {every_n_steps!r}": is_whole(every_n_steps, 1),
            f"refine_steps must be an integer of at least 0, got {refine_steps!r}": is_whole(refine_steps, 0),
            f"product must be 'auto', 'exact' or 'fd', got {product!r}": product in ("auto", "exact", "fd"),
        }
        problems = momentum_problems(lr, momentum, normalize, min_norm)
        if problems := problems + [problem for problem, holds in checks.items() if not holds]:
            raise ValueError(f"`SingleLoopHypergradient`: {'; '.join(problems)}.")
        self.optimizer: NormalizedMomentum | None = None
        self.scheduler: LRScheduler | None = None
        self.held_out = HeldOutBatches()
        self.z: Tensors = {}  # zeros while it is empty
        self.watch = Watch().plain()
        self.steps = 0
        self._reset()

    def _reset(self) -> None:
        self._outer: OuterParameters | None = None
        self._losses: ModuleLosses | None = None
        self._window: list[Any] = []  # batches of the coming optimizer step
        self._seen = 0

    # What has been learned

    @override
    def hyperparameters(self) -> dict[str, float | list[float]]:
        """The values of hyperparameters by name, and the lengths of outer tensors of the network."""
        if self._outer is not None:
            return self._outer.numbers()
        return {} if self.hypers is None else dict(self.hypers.numbers())

    # Around training

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Finds the outer parameters and takes them out of training's gradient."""
        if stage != "fit":
            return
        self.refuse_sharded_strategy(trainer)
        self.require_automatic_optimization(pl_module)
        self._outer = OuterParameters(pl_module, self.outer, self.hypers)
        problems = list(self._outer.problems)
        problems += self.scoring_problems(pl_module, self.val_loss)
        self.raise_all(problems)
        self._outer.hide()
        self._forget_others(self._outer)

    def _forget_others(self, outer: OuterParameters) -> None:
        """Another module begins from the beginning; here, because a checkpoint is read after `setup`."""
        if self.optimizer is not None:
            known = [id(p) for group in self.optimizer.param_groups for p in group["params"]]
            if known != [id(p) for group in outer.groups() for p in group]:
                self.optimizer = self.scheduler = None
                self.z, self.watch, self.steps = {}, Watch().plain(), 0

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Makes the optimizer of the outer parameters and attaches the validation data."""
        outer = self._outer
        if outer is None:
            raise RuntimeError("`setup` has not been called")
        groups = outer.groups()
        inner = {id(p) for p in pl_module.parameters()} - {id(p) for group in groups for p in group}
        if not any(id(p) in inner for o in trainer.optimizers for group in o.param_groups for p in group["params"]):
            self.raise_all(["no optimizer steps an inner parameter; return one from `configure_optimizers`."])
        for part in outer.sets.values():
            part.to(pl_module.device)
        if self.optimizer is None:
            parts = [{"params": group} for group in groups]
            self.optimizer = NormalizedMomentum(parts, self.lr, self.momentum, self.normalize, self.min_norm)
            self.scheduler = self._make_scheduler(self.optimizer) if self._make_scheduler else None
        self.restore_pending()
        for group in groups:
            for parameter in group:
                parameter.data.copy_(distributed.broadcast(parameter.data))
        context = trainer.precision_plugin.train_step_context
        losses = ModuleLosses(pl_module, outer.sets, self.train_loss, self.val_loss, context, list(outer.parts))
        self.z = {name: value.to(pl_module.device) for name, value in self.z.items()}
        self.attach_held_out(trainer, self.held_out, self.val_dataloader)
        self._losses, self._seen, self._window = losses, trainer.global_step, []

    # Every step

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Keeps the batches of the coming optimizer step."""
        self._window.append(batch)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Takes an outer step, if an optimizer step was taken and it is time."""
        if trainer.global_step == self._seen:
            return
        self._seen = trainer.global_step
        self.steps += 1
        after = self.steps - self.refine_steps
        if after > 0 and after % self.every_n_steps == 0:
            with torch.enable_grad():
                self._update(trainer, pl_module)
        self.log_noted(trainer, pl_module)
        self._window = []

    def _update(self, trainer: Trainer, pl_module: LightningModule) -> None:
        losses, optimizer = self._losses, self.optimizer
        if losses is None or optimizer is None:
            raise RuntimeError("training has not started")
        drawn = [next(self.held_out) for _ in self._window]  # as many as the step has micro-batches
        held_out = self.handed_over(trainer, pl_module, drawn)
        found = self._estimate(losses, held_out)
        gradient, length, slope, _ = found.norms.tolist()  # the one time that the host waits for the device
        try:
            watch, usable, grown = Watch(*self.watch).after(gradient, length, slope, self.z_lr)
        except FloatingPointError as error:
            self.raise_all([f"{error}."])
            raise
        if grown:
            problem = self._problem(losses, held_out)
            kind: Product = "exact" if self.product == "auto" else self.product
            curvature = largest_curvature(problem, losses.params, losses.hparams, product=kind).item()
            rank_zero_warn(f"`SingleLoopHypergradient`: {watch.words(self.z_lr, curvature)}.")
        self.watch = watch.plain()
        if usable:
            self.z = found.z
            step_raw(optimizer, losses.hparams, found.gradients, gradient)
            if self.scheduler is not None:
                self.scheduler.step()
        else:
            rank_zero_warn("A hypergradient was not finite; the outer parameters stay what they are.")
        self.note_values(self._logged(found, optimizer))

    def _logged(self, found: OuterGradient, optimizer: NormalizedMomentum) -> dict[str, Tensor]:
        """Tensors on the device: a logger reads them when it writes."""
        gradient, z, slope, residual = found.norms
        momenta = [state["momentum_buffer"] for state in optimizer.state.values()]
        lengths = [torch.linalg.vector_norm(m).to(found.norms) for m in momenta] or [torch.zeros_like(gradient)]
        return {
            **({} if self._outer is None else self._outer.summary()),
            "outer_loss": found.loss,
            "gradient_norm": gradient,
            "momentum_norm": torch.linalg.vector_norm(torch.stack(lengths)),
            "z_norm": z,
            "residual": residual / torch.where(slope > 0, slope, 1.0),
        }

    def _problem(self, losses: ModuleLosses, held_out: Sequence[Any]) -> Problem:
        train = losses.train(self._window)
        if self.product != "fd":
            train = twice_differentiable(train, losses.recurrent)
        return Problem(train, losses.val(held_out), distributed.mean)

    def _estimate(self, losses: ModuleLosses, held_out: Sequence[Any]) -> OuterGradient:
        def run(product: Product) -> OuterGradient:
            problem = self._problem(losses, held_out)
            return outer_gradient(
                problem, losses.params, losses.hparams, self.z or None, z_lr=self.z_lr, product=product
            )

        try:
            return run("exact" if self.product == "auto" else self.product)
        except NoLossError as error:
            self.raise_all([f"{error}."])
            raise
        except UnreachedError as error:
            self.raise_all([f"{error}: does the training step read it?"])
            raise
        except RuntimeError as error:
            if self.product != "auto" or not second_derivatives_missing(error):
                raise
            self.product = "fd"
            first = str(error).splitlines()[0]
            rank_zero_warn(f"`SingleLoopHypergradient` goes on with differences of gradients (`product='fd'`): {first}")
            return run("fd")

    # The end

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Says if there was no outer step at all; lets go of the data."""
        if 0 < self.steps < self.refine_steps + self.every_n_steps:
            rank_zero_warn(
                f"`SingleLoopHypergradient`: training ended after {self.steps} steps, before the first outer step "
                f"(`refine_steps={self.refine_steps}`, `every_n_steps={self.every_n_steps}`): nothing outer has moved."
            )
        self.release()

    @override
    def release(self) -> None:
        """Gives the module's parameters back as they were."""
        if self._outer is not None:
            self._outer.release()
        self.held_out.detach()
        self._losses, self._window = None, []
