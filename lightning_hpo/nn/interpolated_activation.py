"""Activations between two: one number says how much of each."""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_hpo.nn.setting import Setting, current, setting_problems

__all__ = ["ACTIVATIONS", "Activation", "InterpolatedActivation", "replace_activations"]

Activation = Callable[[Tensor], Tensor]


def _identity(x: Tensor) -> Tensor:
    return x


ACTIVATIONS: dict[str, Activation] = {
    "abs": torch.abs,
    "elu": F.elu,
    "gelu": F.gelu,
    "hardsigmoid": F.hardsigmoid,
    "hardswish": F.hardswish,
    "hardtanh": F.hardtanh,
    "identity": _identity,
    "leaky_relu": F.leaky_relu,
    "relu": torch.relu,
    "relu6": F.relu6,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "softplus": F.softplus,
    "square": torch.square,
    "tanh": torch.tanh,
}
REPLACED = (nn.ReLU, nn.GELU, nn.SiLU, nn.ELU, nn.LeakyReLU, nn.Hardtanh, nn.Tanh)


class InterpolatedActivation(nn.Module):
    r"""A mixture of two activations, elementwise.

    .. math:: \sigma_\alpha(z) = \alpha\, o_1(z) + (1 - \alpha)\, o_2(z)

    The slope in :math:`\alpha` is :math:`o_1 - o_2`; at 0 and 1 the result is that of one activation to the bit.

    Args:
        first: :math:`o_1`, one of ``ACTIVATIONS`` or any elementwise function.
        second: :math:`o_2`, likewise.
        alpha: :math:`\alpha`, from 0 to 1: a number, a tensor that broadcasts with the input, or a function that
            returns one, such as ``lambda: hypers["alpha"]``, which is asked in every forward pass. A ``Parameter`` is
            registered here and learned like a weight. Tensors must be kept within the range by whoever changes them.

    Raises:
        ValueError: If a name is unknown, ``alpha`` is out of range or it is a tensor in the middle of a graph; all are
            listed.

    References:
        Balcan, Nguyen and Sharma, "Sample complexity of data-driven tuning of model hyperparameters in neural networks
        with structured parameter-dependent dual function", NeurIPS 2025.

    Example:
        >>> InterpolatedActivation("relu", "abs", alpha=0.25)(torch.tensor([-2.0, 3.0]))
        tensor([1.5000, 3.0000])
    """

    def __init__(
        self, first: str | Activation = "relu", second: str | Activation = "abs", alpha: Setting = 0.5
    ) -> None:
        super().__init__()
        names = [name for name in (first, second) if isinstance(name, str) and name not in ACTIVATIONS]
        problems = [f"unknown activation {name!r}; known: {', '.join(ACTIVATIONS)}" for name in names]
        problems += setting_problems("alpha", alpha, lambda a: (a >= 0) & (a <= 1), "lie from 0 to 1")
        if problems:
            raise ValueError("; ".join(problems))
        self.first = ACTIVATIONS[first] if isinstance(first, str) else first
        self.second = ACTIVATIONS[second] if isinstance(second, str) else second
        self.alpha = alpha

    def forward(self, x: Tensor) -> Tensor:
        """The mixture, of the shape of ``x``."""
        one, two = self.first(x), self.second(x)
        alpha = self.value()
        if not isinstance(alpha, Tensor):
            return torch.lerp(two, one, alpha)
        return torch.lerp(two, one, alpha.to(one))  # lerp returns its ends to the bit

    def value(self) -> float | Tensor:
        r"""What :math:`\alpha` is now."""
        return current(self.alpha)

    def gain(self) -> float:
        r"""Standard deviation of weights, times the root of the fan-in, that keeps the scale of signals.

        :math:`(\mathbb E\,\sigma_\alpha(z)^2)^{-1/2}` with standard normal z: :math:`\sqrt 2` for ReLU. Mixtures with
        squares explode in deep networks without it.

        Returns:
            The gain at the present value; that of the mean where there are many.

        Raises:
            ValueError: If the mixture is zero almost everywhere.

        Example:
            >>> activation = InterpolatedActivation("relu", "abs", alpha=1.0)
            >>> round(activation.gain(), 6)
            1.414214
            >>> _ = nn.init.normal_(torch.empty(8, 4), std=activation.gain() / 4**0.5)
        """
        # The trapezoid rule, exact to rounding for smooth functions and to 1e-7 with kinks on its points.
        z = torch.linspace(-12, 12, 24_001, dtype=torch.float64)
        density = torch.exp(-(z**2) / 2)
        alpha = self.value()
        alpha = alpha.detach().double().mean().item() if isinstance(alpha, Tensor) else alpha
        with torch.no_grad():
            mixture = torch.lerp(self.second(z), self.first(z), alpha)
        power = (mixture.square() * density).sum() / density.sum()
        if not power > 0:
            raise ValueError("no gain keeps the scale: the activation is 0 for standard normal inputs")
        return float(power**-0.5)

    def extra_repr(self) -> str:
        """Names and the mixture."""
        names = [getattr(o, "__name__", type(o).__name__).strip("_") for o in (self.first, self.second)]
        shown = self.alpha if isinstance(self.alpha, float | int) else type(self.alpha).__name__
        return f"{names[0]}, {names[1]}, alpha={shown}"


def replace_activations(
    module: nn.Module,
    second: str | Activation = "abs",
    alpha: Setting | Mapping[str, Setting] = 0.5,
    *,
    first: str | Activation | None = None,
    targets: Sequence[type[nn.Module]] = REPLACED,
) -> list[str]:
    r"""Puts mixtures where a network has activation modules; functions such as ``F.relu`` in a forward cannot be seen.

    Args:
        module: The network, changed in place.
        second: :math:`o_2`.
        alpha: :math:`\alpha` of all, or a mapping with one for each replaced name.
        first: :math:`o_1`; what stood there before where None.
        targets: Which modules to replace.

    Returns:
        Names of what was replaced.

    Raises:
        ValueError: If there is nothing to replace, or a mapping does not name exactly what is replaced.

    Example:
        >>> network = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> replace_activations(network, "abs", alpha=0.0), network[1](torch.tensor([-1.0]))
        (['1'], tensor([1.]))
    """
    kinds = tuple(targets)
    found: dict[str, nn.Module] = {}
    for name, child in module.named_modules(remove_duplicate=False):
        parent = module.get_submodule(name.rpartition(".")[0])
        if name and isinstance(child, kinds) and not isinstance(parent, InterpolatedActivation):
            found[name] = child
    if not found:
        names = ", ".join(kind.__name__ for kind in kinds)
        raise ValueError(f"nothing to replace: no submodule is one of {names} (functions in a forward cannot be seen)")
    if isinstance(alpha, Mapping) and set(alpha) != set(found):
        missing, unknown = sorted(set(found) - set(alpha)), sorted(set(alpha) - set(found))
        raise ValueError(f"alpha must name what is replaced; missing: {missing}, unknown: {unknown}")
    made: dict[Any, InterpolatedActivation] = {}
    for name, child in found.items():
        chosen = alpha[name] if isinstance(alpha, Mapping) else alpha
        # One module under two names stays one, unless its names have different mixtures.
        key = (id(child), id(chosen))
        if key not in made:
            made[key] = InterpolatedActivation(_pure(child) if first is None else first, second, chosen)
            made[key].train(child.training)
        path, _, last = name.rpartition(".")
        setattr(module.get_submodule(path), last, made[key])
    return list(found)


def _pure(activation: nn.Module) -> nn.Module:
    """The same without writing into its input, which the other activation reads as well."""
    if getattr(activation, "inplace", False):
        activation = copy.copy(activation)
        activation.__dict__["inplace"] = False
    return activation
