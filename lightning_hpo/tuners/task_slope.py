"""How the validation loss of a trained module changes with its hyperparameter."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import LightningModule

from lightning_hpo.functional.bilevel.estimators import ESTIMATORS
from lightning_hpo.functional.bilevel.problem import Problem
from lightning_hpo.module_losses import ModuleLosses, hyperparameter_sets

__all__ = ["SLOPES", "slope"]

# Estimators that look at the trained weights alone, and the partial derivative of the training loss.
SLOPES = ("envelope", *(name for name in ESTIMATORS if name.startswith("ift_") or name == "t1t2"))


def slope(
    module: LightningModule,
    loaders: tuple[Iterable[Any], Iterable[Any]],
    hparam: str,
    estimator: str,
    settings: Mapping[str, Any] | None = None,
) -> float:
    r"""Slope of a trained module's validation loss in a hyperparameter.

    ``"envelope"`` is :math:`\partial_\alpha L_{tr}` at the trained weights, which is the slope of the smallest training
    loss; the others are estimators of :math:`dL_{val} / d\alpha` through the solution.

    Args:
        module: The module. One of its sets of hyperparameters holds ``hparam``, and its losses read it there.
        loaders: Batches for training and for validation; all are taken at once.
        hparam: The name.
        estimator: One of ``SLOPES``.
        settings: Those of the estimator.

    Returns:
        The slope, NaN where it is not finite.

    Raises:
        ValueError: If no set of the module holds ``hparam``.
    """
    owner = next((part for part in hyperparameter_sets(module).values() if hparam in part.raw), None)
    if owner is None:
        raise ValueError(f"slopes need a HyperparameterSet in `{type(module).__name__}` that holds {hparam!r}")
    losses = ModuleLosses(module, {"": owner})
    train = losses.train(_batches(loaders[0], module))
    raw = owner.raw[hparam].detach().requires_grad_()
    params = {name: parameter.detach() for name, parameter in losses.params.items()}
    if estimator == "envelope":
        (found,) = torch.autograd.grad(train(params, {hparam: raw}), raw)
    else:
        val = losses.val(_batches(loaders[1], module))
        result = ESTIMATORS[estimator](Problem(train, val), params, {hparam: raw.detach()}, **(settings or {}))
        found = result.gradients[hparam]
    (stretch,) = torch.autograd.grad(owner.domains[hparam].value(raw), raw)
    number = float(found / stretch)
    return number if math.isfinite(number) else math.nan


def _batches(loader: Iterable[Any], module: LightningModule) -> list[Any]:
    return [move_data_to_device(batch, module.device) for batch in loader]
