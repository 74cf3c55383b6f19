"""Named tensors from a condition, with magnitudes that do not depend on it (MIP)."""

import re
import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_hpo.functional.arguments import is_whole
from lightning_hpo.functional.bilevel.conditioning import ConditionEncoding, encode_condition

__all__ = ["HyperNetwork"]

_TAKEN = frozenset(dir(nn.ModuleDict()))  # names that a dict of modules refuses, such as `keys`
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
            times the last hidden size, or n times the rank. You are warned if they take more than half of the memory
            that is free, where that can be found out.

    Raises:
        ValueError: If an argument is wrong; all problems are listed.
        TypeError: If a target is no floating-point tensor, or ``hidden`` no sequence.

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
        if isinstance(hidden, str) or not isinstance(hidden, Sequence):
            raise TypeError(f"hidden must be a sequence of sizes, got {hidden!r}")
        checks = {
            "there is nothing to predict": bool(targets),
            f"conditions must be a positive integer, got {conditions!r}": is_whole(conditions, 1),
            f"hidden sizes must be positive integers, got {tuple(hidden)}": all(is_whole(size, 1) for size in hidden),
            f"encoding must be 'cos_sin', 'complement' or 'none', got {encoding!r}": encoding
            in ("cos_sin", "complement", "none"),
            f"delta_init must be 'fan_out' or 'zeros', got {delta_init!r}": delta_init in ("fan_out", "zeros"),
            f"rank must be a positive integer, got {rank!r}": rank is None or is_whole(rank, 1),
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
        _warn_of_size(sizes[-1] if rank is None else rank, list(targets.values()))
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
        self.to(next(iter(targets.values())).device)

    def forward(self, gamma: Tensor) -> dict[str, Tensor]:
        """The predicted tensors.

        Args:
            gamma: A condition in [0, 1], ``(k)``; with ``(batch, k)`` each tensor gets a first dimension. It is moved
                to the network's device if it is elsewhere.

        Returns:
            Tensors by name.

        Raises:
            ValueError: If there are not k conditions.
        """
        if gamma.shape[-1:] != (self.conditions,):
            raise ValueError(f"a condition has {self.conditions} numbers, got shape {tuple(gamma.shape)}")
        gamma = gamma.to(next(self.heads.parameters()))
        with _full_precision(gamma.device.type):  # a network this small is not worth a coarse weight
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


def _full_precision(kind: str) -> AbstractContextManager[Any]:
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()


def _warn_of_size(columns: int, targets: Sequence[Tensor]) -> None:
    """Before they are made: last layers that take more than half of the free memory."""
    needed = columns * sum(target.numel() for target in targets) * torch.get_default_dtype().itemsize
    free = _free_memory()
    if free is not None and needed > free / 2:
        warnings.warn(
            f"the last layers take {needed / 2**30:.2g} GiB, and {free / 2**30:.2g} are free; give `rank`, a smaller "
            "last hidden size, or fewer parameters to predict",
            stacklevel=3,
        )


def _free_memory() -> int | None:
    """Bytes that the host has left; None where the system does not say so."""
    try:
        found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(encoding="ascii"))
    except OSError:  # not a Linux
        return None
    return None if found is None else int(found[1]) * 1024


def _key(name: str) -> str:
    key = name.replace(".", "/")  # dots mean parts of parts
    return f"{key}/" if key in _TAKEN else key
