"""Weights of any module from a condition: one network for a whole family of settings, chosen after training."""

import copy
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_hpo.functional.bilevel.conditioning import ConditionEncoding, encode_condition

__all__ = ["HyperNetwork", "Hypernetized", "hypernetize"]


class HyperNetwork(nn.Module):
    r"""Predicts named tensors from a condition, with magnitudes that do not depend on it (MIP).

    .. math:: \theta(\gamma) = \theta^0 + h(E(\gamma); \omega)

    with an encoding :math:`E` of constant length and ordinary parameters :math:`\theta^0`. Each is a switch, because
    both are needed: without the encoding what is added is proportional to :math:`\gamma`, without :math:`\theta^0`
    nothing has the scale of an ordinary initialisation.

    Args:
        targets: Tensors by name: their shapes, and :math:`\theta^0`.
        conditions: Number k of conditions.
        hidden: Sizes of hidden layers, each followed by a leaky ReLU; none for a linear map.
        encoding: What is seen of a condition.
        residual: Whether there is :math:`\theta^0`; without it everything is predicted.
        delta_init: ``"fan_out"``: what is added to a matrix or kernel begins as large as an ordinary initialisation,
            and at zero for vectors (biases, scales of norms); ``"zeros"``: all of it begins at zero, so that
            :math:`\theta(\gamma) = \theta^0`.

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
        }
        if problems := [problem for problem, holds in checks.items() if not holds]:
            raise ValueError("; ".join(problems))
        self.conditions, self.encoding = conditions, encoding
        self.shapes = {name: target.shape for name, target in targets.items()}
        sizes = [conditions if encoding == "none" else 2 * conditions, *hidden]
        layers: list[nn.Module] = []
        for before, after in pairwise(sizes):
            layers += [_kaiming(nn.Linear(before, after)), nn.LeakyReLU(0.01)]
        self.body = nn.Sequential(*layers)
        self.heads = nn.ModuleDict(
            {_key(name): nn.Linear(sizes[-1], t.numel(), bias=False) for name, t in targets.items()}
        )
        for name, target in targets.items():
            weight: Any = self.heads[_key(name)].weight
            if delta_init == "zeros" or (residual and target.ndim < 2):
                nn.init.zeros_(weight)
            else:  # as if each tensor were the output of a layer of its own
                nn.init.normal_(weight, std=(2 / (1 + 0.01**2)) ** 0.5 / target.numel() ** 0.5)
        own = {_key(name): nn.Parameter(target.detach().clone()) for name, target in targets.items()}
        self.base = nn.ParameterDict(own if residual else {})

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
        features = self.body(encode_condition(gamma, self.encoding))
        found = {}
        for name, shape in self.shapes.items():
            value = self.heads[_key(name)](features).unflatten(-1, shape) if shape else self._scalar(name, features)
            found[name] = self.base[_key(name)] + value if len(self.base) else value
        return found

    def _scalar(self, name: str, features: Tensor) -> Tensor:
        return self.heads[_key(name)](features)[..., 0]

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


class Hypernetized(nn.Module):
    """A module some of whose parameters are predicted from a condition: what :func:`hypernetize` gives.

    Example:
        >>> net = hypernetize(nn.Linear(2, 3), conditions=1)
        >>> x = torch.ones(5, 2)
        >>> net(x, gamma=torch.tensor([0.5])).shape, net(x, gamma=torch.rand(5, 1)).shape
        (torch.Size([5, 3]), torch.Size([5, 3]))
    """

    def __init__(self, module: nn.Module, names: Sequence[str], **arguments: Any) -> None:
        super().__init__()
        named = dict(module.named_parameters())
        self.hyper_network = HyperNetwork({name: named[name] for name in names}, **arguments)
        self.module = module
        for name in names:  # its value is in the hyper-network
            named[name].requires_grad_(False)

    def forward(self, *args: Any, gamma: Tensor) -> Any:
        """The module's output with the parameters for a condition.

        Args:
            *args: The module's inputs, tensors with examples first where each has its own condition.
            gamma: ``(k)``, or ``(batch, k)`` for a condition an example; such modules must not mix examples.

        Returns:
            What the module returns.
        """
        predicted = self.hyper_network(gamma)
        if gamma.ndim == 1:
            return torch.func.functional_call(self.module, predicted, args)

        def one(weights: dict[str, Tensor], *inputs: Tensor) -> Any:
            found = torch.func.functional_call(self.module, weights, tuple(x[None] for x in inputs))
            return found[0]

        return torch.func.vmap(one, randomness="different")(predicted, *args)

    @torch.no_grad()
    def materialize(self, gamma: Tensor) -> nn.Module:
        """A plain copy of the module for one condition.

        Args:
            gamma: ``(k)``.

        Returns:
            The module with these weights, all trainable.
        """
        plain = copy.deepcopy(self.module)
        named = dict(plain.named_parameters())
        for name, value in self.hyper_network(gamma).items():
            named[name].copy_(value)
            named[name].requires_grad_(True)
        return plain


def hypernetize(
    module: nn.Module, conditions: int, include: Sequence[str] = ("*",), exclude: Sequence[str] = (), **arguments: Any
) -> Hypernetized:
    """Makes parameters of a module follow a condition.

    Args:
        module: Any module; a parameter under two names is predicted once.
        conditions: Number of conditions, each in [0, 1].
        include: Patterns of names of parameters.
        exclude: Patterns of names to leave alone.
        arguments: Those of :class:`HyperNetwork`.

    Returns:
        A module whose ``forward`` takes ``gamma`` as well.

    Raises:
        ValueError: If no parameter is named like this.

    Example:
        >>> plain = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> x = torch.rand(4, 2)
        >>> before = plain(x)
        >>> net = hypernetize(plain, conditions=1, include=("*.weight",), delta_init="zeros")
        >>> torch.equal(net(x, gamma=torch.tensor([0.3])), before)
        True
    """
    named = [name for name, _ in module.named_parameters()]
    chosen = [n for n in named if _like(n, include) and not _like(n, exclude)]
    if not chosen:
        raise ValueError(f"no parameter is named like {tuple(include)} without {tuple(exclude)}; there are {named}")
    return Hypernetized(module, chosen, conditions=conditions, **arguments)


def _like(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _kaiming(layer: nn.Linear) -> nn.Linear:
    nn.init.kaiming_normal_(layer.weight, a=0.01, mode="fan_out")
    nn.init.zeros_(layer.bias)
    return layer


def _key(name: str) -> str:
    return name.replace(".", "/")  # dots mean parts of parts
