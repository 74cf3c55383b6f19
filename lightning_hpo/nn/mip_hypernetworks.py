"""Modules whose weights follow a condition: one network for a whole family of settings, chosen after training."""

import copy
import warnings
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from lightning_hpo.functional.arguments import is_whole
from lightning_hpo.functional.bilevel.condition_spec import ConditionSpec
from lightning_hpo.nn.hyper_network import HyperNetwork

__all__ = ["Hypernetized", "hypernetize"]


class Hypernetized(nn.Module):
    """A module some of whose parameters are predicted from a condition: what :func:`hypernetize` gives.

    Attributes:
        module: The module.
        hyper_network: What predicts.
        spec: The conditions.
        gamma: The present condition in [0, 1], ``(k)`` or ``(batch, k)``; None while there is none.

    Example:
        >>> net = hypernetize(nn.Linear(2, 3), ConditionSpec().add("noise", 0.0, 0.7))
        >>> x = torch.ones(5, 2)
        >>> net(x, gamma=net.spec.encode({"noise": 0.35})).shape
        torch.Size([5, 3])
        >>> net.gamma = torch.rand(5, 1)  # one for each example
        >>> net(x).shape, net.condition["noise"].shape
        (torch.Size([5, 3]), torch.Size([5]))
    """

    def __init__(self, module: nn.Module, names: Sequence[str], spec: ConditionSpec, **arguments: Any) -> None:
        super().__init__()
        named = dict(module.named_parameters())
        self.hyper_network = HyperNetwork({name: named[name] for name in names}, len(spec), **arguments)
        self.module, self.spec = module, spec
        self.gamma: Tensor | None = None
        for name in names:  # its value is in the hyper-network
            named[name].requires_grad_(False)

    @property
    def condition(self) -> dict[str, Tensor]:
        """The present values by name, ``()`` or ``(batch)``; differentiable in ``gamma`` where they have a range."""
        return self.spec.decode(self._given(None))

    def forward(self, *args: Any, gamma: Tensor | None = None, **kwargs: Any) -> Any:
        """The module's output with the parameters for a condition.

        Args:
            *args: The module's inputs, tensors with examples first where each has its own condition.
            gamma: In [0, 1], ``(k)``, or ``(batch, k)`` for a condition an example; such modules must not mix examples.
                The present one by default. Where it lies on the CPU its values are checked.
            **kwargs: The same for all examples.

        Returns:
            What the module returns.

        Raises:
            ValueError: If there is no condition, it has not k numbers, or some are outside of [0, 1] or nan.
        """
        gamma = self._given(gamma)
        predicted = self.hyper_network(gamma)
        if gamma.ndim == 1:
            return torch.func.functional_call(self.module, predicted, args, kwargs)

        def one(weights: dict[str, Tensor], *inputs: Tensor) -> Any:
            found = torch.func.functional_call(self.module, weights, tuple(x[None] for x in inputs), kwargs)
            return pytree.tree_map(lambda value: value[0], found)

        with sdpa_kernel(SDPBackend.MATH):  # fused attention has no rule for batches of weights
            return torch.func.vmap(one, randomness="different")(predicted, *args)

    @torch.no_grad()
    def materialize(self, gamma: Tensor | None = None, /, **values: float) -> nn.Module:
        """A plain copy of the module for one condition.

        Args:
            gamma: ``(k)``, given by position: ``gamma=0.5`` is the value of a condition of that name. The present one
                by default.
            **values: Instead, a value for each name.

        Returns:
            The module with these weights, those that were predicted trainable again.

        Raises:
            ValueError: If both or neither are given, or a name or a value is wrong.

        Example:
            >>> net = hypernetize(nn.Linear(2, 3), ConditionSpec().add("noise", 0.0, 0.7))
            >>> type(net.materialize(noise=0.3)).__name__
            'Linear'
        """
        if values:
            if gamma is not None:
                raise ValueError(f"give either gamma or values, not both: {sorted(values)}")
            gamma = self.spec.encode(values).to(next(self.hyper_network.parameters()))
        gamma = self._given(gamma)
        if gamma.ndim != 1:
            raise ValueError(f"a plain copy has one condition, got shape {tuple(gamma.shape)}")
        plain = copy.deepcopy(self.module)
        named = dict(plain.named_parameters())
        for name, value in self.hyper_network(gamma).items():
            named[name].copy_(value)
            named[name].requires_grad_(True)
        return plain

    def parameter_groups(self, weight_decay: float = 0.0) -> list[dict[str, Any]]:
        r"""Groups for an optimizer: decay of :math:`\omega` would only shrink what depends on the condition.

        Args:
            weight_decay: That of :math:`\theta^0` and of what is not predicted.

        Returns:
            Two groups.
        """
        omega, base = self.hyper_network.parameter_groups(weight_decay)
        rest = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
        return [omega, {**base, "params": base["params"] + rest}]

    def _given(self, gamma: Tensor | None) -> Tensor:
        gamma = self.gamma if gamma is None else gamma
        if gamma is None:
            raise ValueError("there is no condition: give `gamma`, or train with `ConditionedTraining`, which sets it")
        self.spec.check(gamma)
        return gamma


def hypernetize(
    module: nn.Module,
    conditions: int | ConditionSpec,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    **arguments: Any,
) -> Hypernetized:
    """Makes parameters of a module follow a condition.

    Args:
        module: Any module; a parameter under two names is predicted once.
        conditions: What it is conditioned on, or a number of conditions in [0, 1], named ``gamma_0`` and so on.
        include: Patterns of names of parameters, each of which must fit one. Frozen ones stay as they are.
        exclude: Patterns of names to leave alone, likewise.
        **arguments: Those of :class:`~lightning_hpo.nn.hyper_network.HyperNetwork`.

    Returns:
        A module whose ``forward`` takes ``gamma`` as well.

    Raises:
        ValueError: If a pattern fits no trainable parameter, there is no condition, or a part is hypernetized already.
        TypeError: If a pattern is no text, or a parameter no floating-point tensor.

    References:
        Gonzalez Ortiz, Guttag and Dalca, "Magnitude Invariant Parametrizations Improve Hypernetwork Learning", ICLR
        2024.

    Example:
        >>> plain = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> x = torch.rand(4, 2)
        >>> before = plain(x)
        >>> net = hypernetize(plain, conditions=1, include=("*.weight",), delta_init="zeros")
        >>> torch.equal(net(x, gamma=torch.tensor([0.3])), before)
        True
    """
    nested = [name or "the module itself" for name, part in module.named_modules() if isinstance(part, Hypernetized)]
    if nested:
        raise ValueError(f"hypernetized already: {nested}; give all conditions in one `ConditionSpec`")
    spec = conditions if isinstance(conditions, ConditionSpec) else _numbered(conditions)
    chosen = _chosen(module, include, exclude)
    norms = [name for name, part in module.named_modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
    if running := [name for name in norms if module.get_submodule(name).track_running_stats]:
        warnings.warn(
            f"running statistics of batch norms ({running}) are those of all conditions mixed: use GroupNorm or "
            "LayerNorm, or `track_running_stats=False`",
            stacklevel=2,
        )
    return Hypernetized(module, chosen, spec, **arguments)


def _numbered(conditions: int) -> ConditionSpec:
    if not is_whole(conditions, 1):
        raise ValueError(f"conditions must be a positive integer or a `ConditionSpec`, got {conditions!r}")
    spec = ConditionSpec()
    for number in range(conditions):
        spec.add(f"gamma_{number}")
    return spec


def _chosen(module: nn.Module, include: Sequence[str], exclude: Sequence[str]) -> list[str]:
    """Names of the parameters to predict, each under the first of its names."""
    for argument, patterns in (("include", include), ("exclude", exclude)):
        if isinstance(patterns, str) or not all(isinstance(pattern, str) for pattern in patterns):
            raise TypeError(f'{argument} must be a list of patterns of names, such as ["head.*"], got {patterns!r}')
    names = list(_names(module).values())
    if idle := [p for p in (*include, *exclude) if not any(_any_like(own, [p]) for own in names)]:
        raise ValueError(
            f"no trainable parameter is named like {idle}; there are {[name for own in names for name in own]}"
        )
    found = [own[0] for own in names if _any_like(own, include) and not _any_like(own, exclude)]
    if not found:
        raise ValueError(f"no parameter is left of {list(include)} without {list(exclude)}")
    return found


def _names(module: nn.Module) -> Mapping[Tensor, list[str]]:
    """All names of each parameter, the one torch lists first; frozen ones are left out."""
    found: dict[Tensor, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if parameter.requires_grad or not parameter.is_floating_point():  # those are refused, not passed over
            found.setdefault(parameter, []).append(name)
    return found


def _any_like(names: Sequence[str], patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for name in names for pattern in patterns)
