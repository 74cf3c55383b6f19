"""Smooth stand-ins for the decision of a classifier: what a sample counts in a soft confusion matrix."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

__all__ = ["STEEPNESS", "SURROGATES", "Surrogate", "SurrogateName"]

SurrogateName = Literal["anyloss", "sol-uniform", "sol-cosine", "sigmoid"]
SURROGATES = ("anyloss", "sol-uniform", "sol-cosine", "sigmoid")
STEEPNESS = {"anyloss": 73.0, "sigmoid": 1.0}  # of those that have an amplification; the papers'


@dataclass(frozen=True)
class Surrogate:
    r"""How much a sample counts as predicted positive, between 0 and 1.

    With :math:`p = \sigma(z)` and threshold :math:`t`,

    .. math:: a = \sigma(L (p - t)), \quad a = p, \quad
              a = \tfrac12 + \tfrac{u}{2} + \tfrac{\sin \pi u}{2 \pi}, \quad a = \sigma(L (z - \sigma^{-1}(t)))

    for ``"anyloss"``, ``"sol-uniform"``, ``"sol-cosine"`` (:math:`u = (p - t) / \delta` within -1 and 1) and
    ``"sigmoid"``. Of several classes, :math:`p - \tfrac12` is half of :math:`q_c - \max_{j \ne c} q_j` and :math:`z` is
    :math:`z_c - \max_{j \ne c} z_j`, so that two classes are the binary case; ``"sol-uniform"`` takes :math:`q_c`.

    Args:
        name: Which; ``"hard"`` besides, which is 0 or 1 and has no gradient.
        amplification: :math:`L`; 73 for ``"anyloss"`` and 1 for ``"sigmoid"`` by default, which alone have it.
        threshold: :math:`t`.
        width: :math:`\delta`.

    References:
        Han, Moniz and Chawla, "AnyLoss", 2024, section 3; Marchetti, Guastavino, Piana and Campi, "Score-oriented loss
        (SOL) functions", 2022, sections 3 and 4; Bénédict, Koops, Odijk and de Rijke, "sigmoidF1", 2022, section 3.

    Example:
        >>> Surrogate("anyloss")(torch.tensor([-0.1, 0.0, 0.1]))
        tensor([0.1390, 0.5000, 0.8610])
        >>> Surrogate("sol-uniform")(torch.tensor([-0.1, 0.0, 0.1]))
        tensor([0.4750, 0.5000, 0.5250])
    """

    name: str = "anyloss"
    amplification: float | None = None
    threshold: float = 0.5
    width: float = 0.1

    @property
    def steepness(self) -> float:
        """The amplification in force; 1 where there is none."""
        return self.amplification if self.amplification is not None else STEEPNESS.get(self.name, 1.0)

    def __call__(self, logits: Tensor) -> Tensor:
        """Soft decisions of the same shape."""
        if self.name == "sigmoid":
            return torch.sigmoid(self.steepness * (logits - self._logit()))
        if self.name == "hard":
            return (logits > self._logit()).to(logits.dtype)
        p = torch.sigmoid(logits)
        return p if self.name == "sol-uniform" else self._decision(p - self.threshold)

    def slope(self, logits: Tensor) -> Tensor:
        """Derivative of each soft decision in its logit."""
        if self.name == "sigmoid":
            return _bell(self(logits)) * self.steepness
        if self.name == "hard":
            return torch.zeros_like(logits)
        p = torch.sigmoid(logits)
        if self.name == "sol-uniform":
            return _bell(p)
        slope = self._slope(p - self.threshold)
        if torch.is_grad_enabled():
            return slope * _bell(p)
        return slope.mul_(p).mul_(1 - p)  # the same, in place: this decides the cost

    def of_classes(self, logits: Tensor, dim: int = 1) -> Tensor:
        """Soft decisions for the classes along a dimension; they do not sum to 1 over classes."""
        if self.name == "sigmoid":
            return torch.sigmoid(self.steepness * _margins(logits, dim))
        if self.name == "hard":
            return torch.zeros_like(logits).scatter(dim, logits.max(dim, keepdim=True).indices, 1.0)
        q = logits.softmax(dim)
        return q if self.name == "sol-uniform" else self._decision(0.5 * _margins(q, dim))

    def class_slopes(self, logits: Tensor) -> Tensor:
        """Derivative of the soft decision for each class in the class's own logit, ``(N, C)``."""
        if self.name == "sigmoid":
            return _bell(self.of_classes(logits)) * self.steepness
        if self.name == "hard":
            return torch.zeros_like(logits)
        q = logits.softmax(1)
        if self.name == "sol-uniform":
            return _bell(q)
        margins = _margins(q, 1)
        return self._slope(0.5 * margins) * 0.5 * q * (1 - margins)

    def _logit(self) -> float:
        return math.log(self.threshold / (1 - self.threshold))

    def _decision(self, ahead: Tensor) -> Tensor:
        """Of how far the probability is above the threshold."""
        if self.name == "anyloss":
            return torch.sigmoid(self.steepness * ahead)
        angle = self._angle(ahead)
        return (angle + torch.sin(angle)) * (0.5 / math.pi) + 0.5

    def _slope(self, ahead: Tensor) -> Tensor:
        """Derivative of :meth:`_decision`."""
        if self.name == "anyloss":
            soft = self._decision(ahead)
            return (1 - soft) * soft * self.steepness
        return (1 + torch.cos(self._angle(ahead))) * (0.5 / self.width)

    def _angle(self, ahead: Tensor) -> Tensor:
        return (ahead * (math.pi / self.width)).clamp(-math.pi, math.pi)


def _bell(p: Tensor) -> Tensor:
    return p * (1 - p)


def _margins(values: Tensor, dim: int) -> Tensor:
    """What each class is ahead of the best of the others."""
    first, best = values.max(dim, keepdim=True)
    second = values.scatter(dim, best, -torch.inf).max(dim, keepdim=True).values
    return (values - first).scatter(dim, best, first - second)
