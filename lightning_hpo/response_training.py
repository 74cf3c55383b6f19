"""What a step of a self-tuning network computes: no Trainer needed."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn

from lightning_hpo import distributed
from lightning_hpo.batch_parts import part_of, rows_of
from lightning_hpo.module_losses import ModuleLosses
from lightning_hpo.nn.self_tuning_networks import BestResponse
from lightning_hpo.perturbation import Noise, Perturbation

__all__ = ["Mode", "NoResponseError", "ResponseTraining"]

Mode = Literal["delta", "stn"]


class NoResponseError(ValueError):
    """A loss does not depend on what was converted; the message says what to change."""


class ResponseTraining:
    r"""Perturbs hyperparameters, trains the response to them, and differentiates the validation loss through it.

    Args:
        response: The response of a converted network.
        perturbation: Scales of its hyperparameters.
        losses: Losses of the module around the network.
        mode: ``"stn"``: the network responds to :math:`\lambda_i`, all weights learn together. ``"delta"``: it responds
            to :math:`\lambda_i - \lambda`, and the response learns by itself, in the network linearised at 0.
        part: The part of the module whose output is the prediction.
        seed: Decides the noise.
        linearised: Losses for the linearised pass, where they are others: autocast has no forward mode for every layer.
        parts: Into how many parts a batch is cut for the linearised pass, which sees one of them, in turn.

    Example:
        >>> from lightning_hpo import HyperparameterSet, UnitInterval
        >>> from lightning_hpo.nn.self_tuning_networks import convert
        >>> from lightning_hpo.nn.self_tuning_regularisers import TunedDropout
        >>> class Net(nn.Sequential):
        ...     def training_step(self, batch, batch_idx):
        ...         return self(batch).square().mean()
        ...     validation_step = training_step
        >>> hypers = HyperparameterSet(drop=UnitInterval(0.5))
        >>> net = Net(TunedDropout(lambda: hypers["drop"]), nn.Linear(2, 1))
        >>> losses = ModuleLosses(net, {"": hypers})
        >>> perturbation = Perturbation({"": hypers})
        >>> response = convert(net, perturbation.inputs)
        >>> training = ResponseTraining(response, perturbation, losses)
        >>> training.respond(torch.ones(4, 2))
        >>> bool(response.layers["1"].gate.grad.abs().min() > 0)
        True
    """

    def __init__(
        self,
        response: BestResponse,
        perturbation: Perturbation,
        losses: ModuleLosses,
        mode: Mode = "delta",
        part: nn.Module | None = None,
        seed: int = 0,
        linearised: ModuleLosses | None = None,
        parts: int = 1,
    ) -> None:
        self.parts, self._turn = parts, 0
        self.linearised = losses if linearised is None else linearised
        self.response, self.perturbation, self.losses, self.mode = response, perturbation, losses, mode
        self.part = response.network if part is None else part
        self.noise, self.held_out_noise = Noise(len(perturbation), 2 * seed), Noise(len(perturbation), 2 * seed + 1)

    # Training batches

    def begin(self, step: int) -> None:
        """Begins a training step.

        Args:
            step: Its number, on which alone noise and part depend.
        """
        self.noise.begin(step)
        self._turn = step

    def perturb(self, batch: Any) -> None:
        """Gives each example of a batch its hyperparameters, and the network the weights for them.

        Args:
            batch: A training batch.
        """
        with torch.no_grad():
            rows = self._rows(self.noise, batch)
            self.replace(rows)
            self.response.set(self.perturbation.encoded(rows))

    def replace(self, rows: Tensor | None) -> None:
        """Makes the sets tell values of raw ones ``(batch, n)``, or their own again."""
        values = {} if rows is None else self.perturbation.values(rows)
        for label, part in self.perturbation.sets.items():
            part.replace(**values.get(label, {}))

    def settle(self) -> None:
        """Present hyperparameters for all, and the weights for them."""
        self.replace(None)
        self.response.set(self.resting())

    def resting(self) -> Tensor | None:
        """What the network responds to outside of training batches; None where that is nothing."""
        return self.perturbation.encoded(self.perturbation.raw().detach()) if self.mode == "stn" else None

    def respond(self, batch: Any, place: int = 0, of: int = 1) -> None:
        """Adds the gradient of the response on a part of a batch, linearised at the present hyperparameters.

        Args:
            batch: A training batch, or a micro-batch of it.
            place: Which of the micro-batches it is.
            of: How many there are.

        Raises:
            NoResponseError: If the prediction does not come out of the part, or does not depend on the response.
        """
        with torch.no_grad():
            rows = self._rows(self.noise, batch)
            own, weight = part_of((batch, rows), self.parts, self._turn, place, of)
            if own is None:
                return
            batch, rows = own
            direction = self.perturbation.direction(rows)
        general = {name: p.detach() for name, p in self.losses.params.items()}
        self.replace(rows)
        try:
            with self.response.along(direction, self.part) as calls:
                loss = self.linearised.train([batch])(general, self.linearised.hparams)
                outside = forward_ad.unpack_dual(loss).tangent is not None
        finally:
            self.replace(None)
        if outside or not calls:
            name = type(self.part).__name__
            raise NoResponseError(
                f"the training step uses converted layers outside of a call of `{name}`, whose output is taken for the "
                "prediction; name the part that predicts as `network`, or use `mode='stn'`"
            )
        parameters = list(self.response.parameters())
        if not loss.requires_grad:
            raise NoResponseError("the training loss does not depend on the converted layers")
        grads = torch.autograd.grad(loss * weight, parameters, allow_unused=True)
        if all(grad is None for grad in grads):
            raise NoResponseError("the training loss does not depend on the converted layers")
        for parameter, grad in zip(parameters, grads, strict=True):
            if grad is not None:
                parameter.grad = grad if parameter.grad is None else parameter.grad.add_(grad)

    def _rows(self, noise: Noise, batch: Any) -> Tensor:
        return self.perturbation.rows(noise.rows(rows_of(batch), self.perturbation.scale.device))

    # Held-out batches

    def hypergradient(
        self, batches: Sequence[Any], entropy_weight: float | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        r"""The validation loss and its gradient through the response, averaged over ranks.

        Args:
            batches: Held-out batches.
            entropy_weight: :math:`\tau`, the weight of the perturbation's entropy; None leaves the scales alone and
                takes the validation loss at the present hyperparameters.

        Returns:
            The loss, its gradient in the raw values ``(n)``, and that in the scales.

        Raises:
            NoResponseError: If the loss does not depend on the response.
        """
        raws, scale = self.perturbation.raw_parameters(), self.perturbation.scale
        tuned = [scale] if entropy_weight is not None else []
        with torch.enable_grad(), _wanting_gradients([*raws, scale]):
            loss = torch.stack([self._score(batch, bool(tuned)) for batch in batches]).mean()
            objective = loss if entropy_weight is None else loss - entropy_weight * self.perturbation.entropy()
            found = (
                torch.autograd.grad(objective, [*raws, *tuned], allow_unused=True) if objective.requires_grad else ()
            )
        if not any(grad is not None for grad in found[: len(raws)]):
            raise NoResponseError("the validation loss does not depend on the converted layers")
        flat = [
            (torch.zeros_like(p) if g is None else g).flatten() for p, g in zip([*raws, *tuned], found, strict=True)
        ]
        together = distributed.mean(torch.cat([loss.detach().view(1).float(), *flat]))
        size = len(self.perturbation)
        return together[0], together[1 : size + 1], together[size + 1 :] if tuned else None

    def _score(self, batch: Any, perturbed: bool) -> Tensor:
        raw = self._rows(self.held_out_noise, batch) if perturbed else self.perturbation.raw()
        params: dict[str, Tensor] = dict(self.losses.params)
        see = self.perturbation.encoded if self.mode == "stn" else self.perturbation.difference
        with self.response.at(see(raw)):
            return self.losses.val([batch])(params, self.losses.hparams)


@contextmanager
def _wanting_gradients(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    before = [p.requires_grad for p in parameters]
    for p in parameters:
        p.requires_grad_(True)
    try:
        yield
    finally:
        for p, wanted in zip(parameters, before, strict=True):
            p.requires_grad_(wanted)
