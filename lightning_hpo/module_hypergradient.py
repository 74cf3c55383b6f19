"""Hypergradients of a module that is being trained, from its losses and its optimizer; no Trainer is needed."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from torch import Tensor

from lightning_hpo import distributed
from lightning_hpo.functional.bilevel.estimators import ESTIMATORS, Estimator, HypergradientResult, Problem
from lightning_hpo.functional.bilevel.problem import UnreachedError, identity
from lightning_hpo.functional.bilevel.second_derivatives import second_derivatives_missing
from lightning_hpo.hypergradient_arguments import choose_estimator
from lightning_hpo.module_losses import ModuleLosses, twice_differentiable
from lightning_hpo.tuned_optimizer import TunedOptimizer

__all__ = ["ModuleHypergradient", "may_go_on"]

# Steps of a solve for weight decay and nothing else: it acts on every weight alike, so more of them change little
# (benchmarks/layer_decay.py), and with one an update every 20 steps adds about a quarter to a run.
_FOR_DECAY_ALONE = 1


class ModuleHypergradient:
    """Estimates the hypergradient at a module's present weights, on batches that it is given.

    Call :meth:`before_step` before the optimizer's step and :meth:`estimate` after it.

    Args:
        losses: The module's losses.
        optimizer: Its optimizer, where its settings are tuned or an estimator looks at its steps; without it, weight
            decay of the optimizer is not part of the training loss.
        estimator: A name in :data:`~lightning_hpo.functional.bilevel.estimators.ESTIMATORS`, or ``"auto"``.
        estimator_args: Settings of the estimator.
        tune: The settings of the optimizer that are tuned.
        product: ``"exact"`` differentiates twice, ``"fd"`` takes differences of gradients; ``"auto"`` is exact until
            something cannot be differentiated twice.
        sync: ``"exact"`` averages every product over ranks, ``"local"`` only the hypergradient, which is biased.

    Attributes:
        product: As given; ``"fd"`` once ``"auto"`` had to fall back.
        entry: The estimator.

    Example:
        >>> import torch
        >>> class Net(torch.nn.Linear):
        ...     def training_step(self, batch, batch_idx):
        ...         return (self(batch) - 1).square().mean()
        ...     validation_step = training_step
        >>> net, batch = Net(1, 1), torch.ones(2, 1)
        >>> sgd = torch.optim.SGD(net.parameters(), lr=0.1, weight_decay=0.01)
        >>> tuned = TunedOptimizer(sgd, ["weight_decay"], dict(net.named_parameters()))
        >>> losses = ModuleLosses(net, {"": tuned.hypers})
        >>> found = ModuleHypergradient(losses, tuned, tune=["weight_decay"]).estimate([batch], [batch])
        >>> list(found.gradients)
        ['weight_decay']
    """

    def __init__(
        self,
        losses: ModuleLosses,
        optimizer: TunedOptimizer | None = None,
        estimator: str = "auto",
        estimator_args: Mapping[str, Any] | None = None,
        tune: Sequence[str] = (),
        product: Literal["auto", "exact", "fd"] = "auto",
        sync: Literal["exact", "local"] = "exact",
    ) -> None:
        self.losses, self.optimizer, self.product, self.sync = losses, optimizer, product, sync
        self.entry: Estimator = ESTIMATORS[choose_estimator(estimator, tune)]
        self.settings: dict[str, Any] = dict(self.entry.cheap) if estimator == "auto" else {}
        if "maxiter" in self.settings and len(tune) == len(losses.hparams):
            self.settings["maxiter"] = _FOR_DECAY_ALONE
        self.settings |= estimator_args or {}
        self._before: dict[str, Any] = {}  # parameters and states, or slopes, when the step began

    def before_step(self) -> None:
        """Keeps where the step begins, for an estimator that repeats it."""
        if self.optimizer is None:
            return
        params = self.losses.params
        if self.entry.follows_steps:
            copies = {name: param.detach().clone() for name, param in params.items()}
            self._before = {"params": copies, "states": self.optimizer.states(copies=True)}
        elif self.entry.needs_slope:
            self._before = {"slope": self.optimizer.slopes(params)}

    def forget_step(self) -> None:
        """Lets go of what :meth:`before_step` kept."""
        self._before = {}

    def estimate(
        self, train: Sequence[Any], val: Sequence[Any], state: Mapping[str, Any] | None = None
    ) -> HypergradientResult:
        """The hypergradient, the same on every rank.

        Args:
            train: The batches of the step, on the module's device.
            val: Validation batches, on the module's device.
            state: What the call before returned, to go on from.

        Returns:
            Gradients of the raw hyperparameters by name.

        Raises:
            NoLossError: If the module gives no loss.
            UnreachedError: If neither loss reads a hyperparameter.
            RuntimeError: If something cannot be differentiated twice, with ``product="exact"``.
        """
        problem, params, settings = self._inputs(train, val)
        kind = "exact" if self.product == "auto" else self.product
        try:
            result = self._run(problem, params, state, settings, kind)
        except UnreachedError as error:
            raise UnreachedError(f"{error}: the training step does not read it") from error
        except RuntimeError as error:
            if not (self.product == "auto" and self.entry.has_product and second_derivatives_missing(error)):
                raise
            self._fall_back(error)
            result = self._run(problem, params, state, settings, "fd")
        if self.sync == "exact":
            return result
        return result._replace(gradients={name: distributed.mean(part) for name, part in result.gradients.items()})

    def _inputs(self, train: Sequence[Any], val: Sequence[Any]) -> tuple[Problem, Mapping[str, Tensor], dict[str, Any]]:
        loss, params, settings = self.losses.train(train), self.losses.params, dict(self.settings)
        if self.entry.follows_steps and self.optimizer is not None:
            params = self._before["params"]
            settings |= {"optimizer": self.optimizer.functional(), "states": self._before["states"]}
        elif self.optimizer is not None:
            loss = self.optimizer.decayed(loss)
        if self.entry.needs_slope:
            settings["slope"] = self._before["slope"]
        if self.entry.iterative:
            settings.setdefault("strict", None)  # a solve that is cut short is no news
        several = self.sync == "exact" and distributed.world_size() > 1
        return Problem(loss, self.losses.val(val), distributed.mean if several else identity), params, settings

    def _run(
        self,
        problem: Problem,
        params: Mapping[str, Tensor],
        state: Mapping[str, Any] | None,
        settings: dict[str, Any],
        product: str,
    ) -> HypergradientResult:
        if self.entry.has_product:
            settings = settings | {"product": product}
            if product == "exact":
                problem = replace(problem, train_loss=twice_differentiable(problem.train_loss, self.losses.recurrent))
        return self.entry(problem, params, self.losses.hparams, state, **settings)

    def _fall_back(self, error: RuntimeError) -> None:
        self.product = "fd"
        if distributed.rank() == 0:
            warnings.warn(
                f"`Hypergradient` goes on with differences of gradients (`product='fd'`): {str(error).splitlines()[0]}",
                stacklevel=4,
            )


def may_go_on(result: HypergradientResult) -> bool:
    """Whether the next solve may begin where this one ended: one that went astray would go on doing so.

    Args:
        result: What an estimator returned.

    Returns:
        True where nothing was solved, or the solve converged without meeting negative curvature.
    """
    return result.info is None or bool(result.info.converged & ~result.info.negative_curvature)
