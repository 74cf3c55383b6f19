"""Named tensors from a condition, with magnitudes that do not depend on it (MIP)."""

import warnings
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_hpo.functional.bilevel.conditioning import ConditionEncoding, encode_condition

__all__ = ["HyperNetwork"]

_GAIN = (2 / (1 + 0.01**2)) ** 0.5  # of a leaky ReLU


class HyperNetwork(nn.Module):
    r"""Predicts named tensors from a condition, with magnitudes that do not depend on it (MIP).

    .. math:: \theta(\gamma) = \theta^0 + h(E(\gamma); \omega)

    with an encoding :math:`E` of constant length and parameters :math:`\theta^0` with an ordinary initialisation. Each
    is a switch, because both are needed: without the encoding what is added is proportional to :math:`\gamma`, without
    :math:`\theta^0` nothing has the scale that layers need.

    Args:
        targets: Tensors by name: their shapes, and :math:`\theta^0`.
        conditions: Number k of conditions.
        hidden: Sizes of hidden layers, each followed by a leaky ReLU; none for a linear map.
        encoding: What is seen of a condition.
        residual: Whether :math:`\theta^0` begins as the targets; without it, at zero, as the bias of an ordinary last
            layer does.
        delta_init: ``"fan_out"``: what is added to a matrix or kernel begins as large as an ordinary initialisation,
            and at zero for vectors (biases, scales of norms); ``"zeros"``: all of it begins at zero, so that
            :math:`\theta(\gamma) = \theta^0`.
        rank: Rank of the last layers, one for each tensor; by default they are full. A tensor of n numbers costs n
            times the last hidden size, or n times the rank.

    Raises:
        ValueError: If an argument is wrong; all problems are listed.
        TypeError: If a target is no floating-point tensor.

    References:
        Gonzalez Ortiz, Guttag and Dalca, "Magnitude Invariant Parametrizations Improve Hypernetwork Learning", ICLR
        2024.

    Example:
        >>> network = HyperNetwork({"weight": torch.ones(3, 2), "bias": torch.zeros(3)}, conditions=1)
        >>> {name: tuple(value.shape) for name, value in network(torch.tensor([0.5])).items()}
        {'weight': (3, 2), 'bias': (3,)}
    """

    def __init__(
        self,
        targets: Mapping[str, Tensor],
        conditions: int,
        hidden: Sequence[int] = (16, 128),
        encoding: ConditionEncoding = "cos_sin",
        residual: bool = True,
        delta_init: Literal["fan_out", "zeros"] = "fan_out",
        rank: int | None = None,
    ) -> None:
        super().__init__()
        whole = [name for name, target in targets.items() if not target.is_floating_point()]
        if whole:
            raise TypeError(f"only floating-point tensors can be predicted, not {whole}")
        checks = {
            "there is nothing to predict": bool(targets),
            f"conditions must be positive, got {conditions!r}": conditions > 0,
            f"hidden sizes must be positive, got {tuple(hidden)}": all(size > 0 for size in hidden),
            f"encoding must be 'cos_sin', 'complement' or 'none', got {encoding!r}": encoding
            in ("cos_sin", "complement", "none"),
            f"delta_init must be 'fan_out' or 'zeros', got {delta_init!r}": delta_init in ("fan_out", "zeros"),
            f"rank must be a positive integer, got {rank!r}": rank is None or (isinstance(rank, int) and rank > 0),
        }
        if problems := [problem for problem, holds in checks.items() if not holds]:
            raise ValueError("; ".join(problems))
        if encoding == "none" and not residual:
            warnings.warn(
                "without an encoding and a residual the predicted magnitudes are proportional to the condition",
                stacklevel=2,
            )
        self.conditions, self.encoding = conditions, encoding
        self.shapes = {name: target.shape for name, target in targets.items()}
        sizes = [conditions if encoding == "none" else 2 * conditions, *hidden]
        layers: list[nn.Module] = []
        for before, after in pairwise(sizes):
            layers += [_kaiming(nn.Linear(before, after)), nn.LeakyReLU(0.01)]
        self.body = nn.Sequential(*layers)
        self.heads = nn.ModuleDict()
        for name, target in targets.items():
            zeros = delta_init == "zeros" or (residual and target.ndim < 2)
            self.heads[_key(name)] = _head(sizes[-1], target.numel(), zeros, rank)
        base = {
            name: target.detach().clone() if residual else torch.zeros_like(target) for name, target in targets.items()
        }
        self.base = nn.ParameterDict({_key(name): nn.Parameter(value) for name, value in base.items()})

    def forward(self, gamma: Tensor) -> dict[str, Tensor]:
        """The predicted tensors.

        Args:
            gamma: A condition in [0, 1], ``(k)``; with ``(batch, k)`` each tensor gets a first dimension.

        Returns:
            Tensors by name.

        Raises:
            ValueError: If there are not k conditions.
        """
        if gamma.shape[-1:] != (self.conditions,):
            raise ValueError(f"a condition has {self.conditions} numbers, got shape {tuple(gamma.shape)}")
        with torch.autocast(gamma.device.type, enabled=False):  # a network this small is not worth a coarse weight
            gamma = gamma.to(next(self.heads.parameters()).dtype)
            features = self.body(encode_condition(gamma, self.encoding))
            return {
                name: self.base[_key(name)] + self._delta(name, shape, features) for name, shape in self.shapes.items()
            }

    def _delta(self, name: str, shape: torch.Size, features: Tensor) -> Tensor:
        flat = self.heads[_key(name)](features)
        return flat.unflatten(-1, shape) if shape else flat[..., 0]

    def parameter_groups(self, weight_decay: float = 0.0) -> list[dict[str, Any]]:
        r"""Groups for an optimizer: decay of :math:`\omega` would only shrink what depends on the condition.

        Args:
            weight_decay: That of :math:`\theta^0`.

        Returns:
            Two groups.
        """
        base = list(self.base.parameters())
        own = [p for p in self.parameters() if all(p is not other for other in base)]
        return [{"params": own, "weight_decay": 0.0}, {"params": base, "weight_decay": weight_decay}]


def _kaiming(layer: nn.Linear) -> nn.Linear:
    nn.init.kaiming_normal_(layer.weight, a=0.01, mode="fan_out")
    nn.init.zeros_(layer.bias)
    return layer


def _head(inputs: int, outputs: int, zeros: bool, rank: int | None) -> nn.Module:
    """A last layer for one tensor, begun at zero, or as if it were the output of a layer of its own."""
    last = nn.Linear(inputs if rank is None else rank, outputs, bias=False)
    if zeros:
        nn.init.zeros_(last.weight)
    else:
        nn.init.normal_(last.weight, std=_GAIN / outputs**0.5)
    if rank is None:
        return last
    first = nn.Linear(inputs, rank, bias=False)
    nn.init.normal_(first.weight, std=rank**-0.5)  # so that the product's entries are as large as without a rank
    return nn.Sequential(first, last)


def _key(name: str) -> str:
    return name.replace(".", "/")  # dots mean parts of parts
