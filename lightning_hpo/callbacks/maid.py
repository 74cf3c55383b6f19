"""The linear head of a network, solved to the end, with its regularisation tuned by certified steps."""

import math
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from lightning_hpo import distributed
from lightning_hpo.callbacks.base import MethodCallback
from lightning_hpo.functional.bilevel.lower_problem import LowerProblem, LowerSolver
from lightning_hpo.functional.bilevel.lower_solvers import fista, lbfgs
from lightning_hpo.functional.bilevel.maid import MAID, BilevelProblem, MAIDState
from lightning_hpo.module_losses import evaluated
from lightning_hpo.validation_loader import validation_loader
from lightning_hpo.whole_data import whole_data

__all__ = ["ConvexHeadTuning"]

# Little regularisation means a large condition number: more pairs than usual save more than they cost.
_SOLVERS: dict[str, LowerSolver] = {"lbfgs": partial(lbfgs, memory=40), "fista": fista}
_CLOSE = 1e-3  # how far from the solution a head may be, relative to its length


class ConvexHeadTuning(MethodCallback):
    r"""Solves a classifier's linear head and tunes its l2 regularisation, at the end of every epoch.

    The features that reach the head are taken over the training and the validation data; on them the head is a convex
    problem,

    .. math:: h(W, \theta) = \mathrm{CE}(W; \mathrm{train}) + \tfrac12 \sum_j e^{\theta_j} W_j^2,

    the bias among its coefficients. Some steps of MAID lower the cross-entropy on the validation data in
    :math:`\theta`, each with a certificate, and the solution is written into the head. There is no learning rate and
    no number of iterations to choose. The backbone may be frozen or in training, and the module is an ordinary one:
    its ``forward`` takes the first element of a batch, the second is the label.

    Args:
        head: Name of the ``nn.Linear`` in the module; the last one by default.
        weights: ``"shared"`` for one weight, ``"coefficient"`` for one weight for each coefficient; these many fit
            small validation sets too well.
        log_l2: First :math:`\theta`.
        steps: Steps of MAID at a time.
        every_n_epochs: Epochs from one tuning to the next; it comes after the epoch's last batch.
        every_n_steps: Optimizer steps from one tuning to the next, in place of epochs.
        bounds: Lowest and highest :math:`\theta`; close to no regularisation the head takes very long to solve.
        solver: ``"lbfgs"`` or ``"fista"``.
        maid_args: Further settings of :class:`~lightning_hpo.functional.bilevel.maid.MAID`, by name.
        val_dataloader: The data to be good on; the validation data of the fit by default.

    Raises:
        ValueError: If an argument is wrong; all are listed.
        MisconfigurationException: If there is no such head, or data or batches are not what is needed.

    References:
        Salehi, Mukherjee, Roberts, Ehrhardt, "An adaptively inexact first-order method for bilevel optimization with
        application to hyperparameter learning", SIAM J. Math. Data Sci. 7(3), 2025.

    Example:
        >>> from lightning_hpo.testing import TinyClassifier, TinyImages, tiny_trainer
        >>> tuning = ConvexHeadTuning(steps=2)
        >>> tiny_trainer(tuning, max_epochs=1).fit(TinyClassifier(), TinyImages())
        >>> 0 < tuning.hyperparameters()["l2"] < 0.05  # it began at exp(-3)
        True
    """

    KNOB: ClassVar[str] = "l2 regularisation of a linear head, and how long and how fast it is trained"
    _STATE = ("state",)
    _KEY = ("head",)

    def __init__(
        self,
        head: str | None = None,
        weights: Literal["shared", "coefficient"] = "shared",
        log_l2: float = -3.0,
        steps: int = 5,
        every_n_epochs: int = 1,
        every_n_steps: int | None = None,
        bounds: tuple[float, float] = (-9.0, 6.0),
        solver: Literal["lbfgs", "fista"] = "lbfgs",
        maid_args: dict[str, Any] | None = None,
        val_dataloader: Iterable[Any] | None = None,
    ) -> None:
        super().__init__()
        self.head, self.weights, self.log_l2, self.steps = head, weights, log_l2, steps
        self.every_n_epochs, self.every_n_steps, self.bounds = every_n_epochs, every_n_steps, bounds
        self.solver, self.maid_args, self.val_dataloader = solver, dict(maid_args or {}), val_dataloader
        if problems := self._argument_problems():
            raise ValueError(f"`ConvexHeadTuning`: {'; '.join(problems)}.")
        self.state: dict[str, Any] | None = None  # of MAID, in plain types
        self._linear: nn.Linear | None = None
        self._loaders: tuple[Iterable[Any], Iterable[Any]] | None = None
        self._seen = 0

    def _argument_problems(self) -> list[str]:
        ordered = len(self.bounds) == 2 and -math.inf < self.bounds[0] < self.bounds[1] < math.inf
        checks = {
            f"weights must be 'shared' or 'coefficient', got {self.weights!r}": self.weights
            in ("shared", "coefficient"),
            f"steps must be at least 1, got {self.steps!r}": self.steps >= 1,
            f"every_n_epochs must be at least 1, got {self.every_n_epochs!r}": self.every_n_epochs >= 1,
            f"every_n_steps must be at least 1, got {self.every_n_steps!r}": self.every_n_steps is None
            or self.every_n_steps >= 1,
            f"bounds must be two numbers low < high, got {self.bounds!r}": ordered,
            f"solver must be one of {sorted(_SOLVERS)}, got {self.solver!r}": self.solver in _SOLVERS,
        }
        problems = [problem for problem, holds in checks.items() if not holds]
        if ordered and not self.bounds[0] <= self.log_l2 <= self.bounds[1]:
            problems.append(f"log_l2 must be within bounds {self.bounds!r}, got {self.log_l2!r}")
        own = sorted({"solver", "bounds"} & set(self.maid_args))
        if own:
            problems.append(f"maid_args must not hold {', '.join(own)}: these are arguments of the callback")
        try:
            MAID(_probe(), **{k: v for k, v in self.maid_args.items() if k not in own})
        except (TypeError, ValueError) as error:
            problems.append(f"maid_args: {error}")
        return problems

    @override
    def hyperparameters(self) -> dict[str, float | list[float]]:
        r"""The weights :math:`e^\theta`."""
        if self.state is None:
            return {"l2": math.exp(self.log_l2)} if self.weights == "shared" else {}
        found = self.state["theta"].exp()
        return {"l2": found.item() if self.weights == "shared" else found.flatten().tolist()}

    # Around training

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Finds the head."""
        if stage != "fit":
            return
        self.refuse_sharded_strategy(trainer)
        linear = {name: part for name, part in pl_module.named_modules() if isinstance(part, nn.Linear)}
        name = self.head if self.head is not None else next(reversed(linear), None)
        if name not in linear:
            known = ", ".join(f"`{known}`" for known in linear) or "none at all"
            self.raise_all([f"there is no `nn.Linear` named {self.head!r}; there are {known}."])
        self._linear, self.state = linear[str(name)], None  # a checkpoint is read after this

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Looks at the data, and goes on from a checkpoint."""
        self.restore_pending()
        self._seen = trainer.global_step
        val: Any = self.val_dataloader
        try:
            val = validation_loader(trainer) if val is None else val
        except ValueError as error:
            self.raise_all([f"{error}."])
        train: Any = trainer.train_dataloader
        self._loaders = (train, val)
        problems = []
        for kind, loader in (("training", train), ("validation", val)):
            try:
                next(iter(whole_data(loader)))
            except ValueError as error:
                problems.append(f"{kind} data: {error}.")
        self.raise_all(problems)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Tunes, after an optimizer step, if it is time."""
        stepped, self._seen = trainer.global_step != self._seen, trainer.global_step
        if self.every_n_steps is not None:
            due = stepped and trainer.global_step % self.every_n_steps == 0
        else:  # here and not at the epoch's end, so that checkpoints and validation see the new head
            due = trainer.is_last_batch and (trainer.current_epoch + 1) % self.every_n_epochs == 0
        if due:
            self._tune(trainer, pl_module)

    # Tuning

    def _tune(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._linear is None or self._loaders is None:
            raise RuntimeError("training has not started")
        train, val = (self._features(trainer, pl_module, loader) for loader in self._loaders)
        maid = MAID(_problem(*train, *val), solver=_SOLVERS[self.solver], bounds=self.bounds, **self.maid_args)
        state = maid.run(self._begin(maid, train[0]), max_steps=self.steps)
        # The descent may have needed less accuracy than a head that is to be used.
        close = _CLOSE * max(torch.linalg.vector_norm(state.x).item(), 1.0)
        solution = _SOLVERS[self.solver](maid.problem.lower, state.theta, state.x, close)
        state = replace(state, x=solution.x, error=solution.error)
        self.state = state.state_dict()
        with torch.no_grad():
            rows = state.x if self._linear.bias is None else state.x[:-1]
            self._linear.weight.copy_(rows.T)
            if self._linear.bias is not None:
                self._linear.bias.copy_(state.x[-1])
        l2 = state.theta.exp().mean().item()
        values = {"l2": l2, "val_loss": (state.lower + state.upper) / 2, "certificate": state.upper - state.lower}
        values |= {"gradient_norm": state.gradient_norm, "eps": state.eps, "work": float(state.work)}
        self.log_values(pl_module, values)

    def _begin(self, maid: MAID, features: Tensor) -> MAIDState:
        """The state of before on the features of now: accuracies and step go on, averages of values do not."""
        linear = self._linear
        if self.state is None and linear is not None:
            parts = [linear.weight.detach().T] + ([] if linear.bias is None else [linear.bias.detach()[None]])
            x = torch.cat(parts).to(features)
            shape = () if self.weights == "shared" else x.shape
            return maid.init(torch.full(shape, self.log_l2, dtype=x.dtype, device=x.device), x)
        moved = {k: v.to(features.device) if isinstance(v, Tensor) else v for k, v in (self.state or {}).items()}
        before = MAIDState.from_state_dict(moved | {"previous": None})
        kept = ["q", "alpha", "iteration", "lower_iterations", "cg_iterations", "trials", "failures"]
        kept += ["eps", "delta"] if before.status == "running" else []
        return replace(maid.init(before.theta, before.x), **{name: getattr(before, name) for name in kept})

    @torch.no_grad()
    def _features(self, trainer: Trainer, pl_module: LightningModule, loader: Iterable[Any]) -> tuple[Tensor, Tensor]:
        """What reaches the head, with a column of ones for its bias, and the labels."""
        if self._linear is None:
            raise RuntimeError("training has not started")
        dtype = torch.float32 if pl_module.device.type == "mps" else torch.float64
        caught: list[Tensor] = []
        features, labels = [], []
        hook = self._linear.register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0].detach()))
        try:
            with evaluated(pl_module), trainer.precision_plugin.forward_context():
                for raw in whole_data(loader):
                    [batch] = self.handed_over(trainer, pl_module, [raw])
                    if not isinstance(batch, (tuple, list)) or len(batch) != 2 or not isinstance(batch[1], Tensor):
                        self.raise_all(["batches must be pairs of inputs and labels."])
                    pl_module(batch[0])
                    self.raise_all(_batch_problems(caught, batch[1], self._linear.out_features))
                    labels.append(batch[1])
                    features.append(caught.pop().to(dtype))
        finally:
            hook.remove()
        joined = torch.cat(features)
        if self._linear.bias is not None:
            joined = torch.cat([joined, torch.ones_like(joined[:, :1])], dim=1)
        return joined, torch.cat(labels).long()

    # The end

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lets go of module and data; what was learned stays."""
        self._linear = self._loaders = None

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Lets go of module and data."""
        self._linear = self._loaders = None


def _batch_problems(caught: list[Tensor], labels: Tensor, classes: int) -> list[str]:
    if len(caught) != 1:
        return [f"the head must be used once in a forward pass, it was used {len(caught)} times."]
    problems = []
    if caught[0].dim() != 2:
        problems.append(f"the head must get one vector for each sample, got shape {tuple(caught[0].shape)}.")
    if labels.is_floating_point() or labels.dim() != 1 or len(labels) != len(caught[0]):
        problems.append(f"labels must be one class index for each sample, got {labels.dtype} {tuple(labels.shape)}.")
    elif bool((labels < 0).any() | (labels >= classes).any()):
        problems.append(f"labels must be from 0 to {classes - 1}, the head has {classes} outputs.")
    return problems


def _problem(x: Tensor, y: Tensor, x_val: Tensor, y_val: Tensor) -> BilevelProblem:
    """Multinomial regression with log l2 weights, averaged over ranks."""
    bound, smoothness = (_curvature(part) for part in (x, x_val))
    lower = LowerProblem(
        lambda w, theta: F.cross_entropy(x @ w, y) + 0.5 * (theta.exp() * w * w).sum(),
        lambda theta: theta.exp().min(),
        lambda theta: bound + theta.exp().max(),
        reduce=distributed.mean,
    )
    return BilevelProblem(lower, lambda w: F.cross_entropy(x_val @ w, y_val), smoothness, convex_upper=True)


def _curvature(x: Tensor) -> float:
    """The cross-entropy's largest curvature: half the largest eigenvalue of the mean of outer products."""
    return torch.linalg.eigvalsh(distributed.mean(x.T @ x / len(x)))[-1].item() / 2


def _probe() -> BilevelProblem:
    """A problem to check settings with."""
    return BilevelProblem(LowerProblem(_square, 1.0, 1.0), _norm, 1.0)


def _square(x: Tensor, theta: Tensor) -> Tensor:
    return (x - theta).square().sum() / 2


def _norm(x: Tensor) -> Tensor:
    return x.square().sum() / 2
