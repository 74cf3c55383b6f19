"""Hyperparameters as tensors that learn: unconstrained raw parameters seen through stateless domains."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Choice", "Domain", "HyperparameterSet", "Integer", "Interval", "Positive", "Simplex", "UnitInterval"]


class Domain:
    """Where a hyperparameter may lie: a smooth map from all reals onto it, and the way back.

    Args:
        init: First value, a number or a tensor of any shape.

    Raises:
        ValueError: If ``init`` or a bound lies outside the domain; every problem is listed.
    """

    init: Tensor

    def __init__(self, init: float | Sequence[float] | Tensor) -> None:
        init = init.detach().clone() if isinstance(init, Tensor) else torch.tensor(init)
        self.init = init if init.is_floating_point() else init.to(torch.get_default_dtype())
        problems = self.problems()
        if not torch.isfinite(self.init).all():
            problems.append(f"init must be finite, got {_show(self.init)}")
        if problems:
            raise ValueError(f"{type(self).__name__}: {'; '.join(problems)}")

    def problems(self) -> list[str]:
        """What is wrong with ``init`` and the bounds, in words."""
        raise NotImplementedError

    def value(self, raw: Tensor) -> Tensor:
        """The constrained value of a raw one, differentiable, of the same shape."""
        raise NotImplementedError

    def raw(self, value: Tensor) -> Tensor:
        """A raw value that :meth:`value` takes to ``value``."""
        raise NotImplementedError


class Positive(Domain):
    r"""Above zero: :math:`\operatorname{softplus}(x) = \log(1 + e^x)`.

    Args:
        init: First value, above zero.

    Raises:
        ValueError: If ``init`` is not above zero.

    Example:
        >>> HyperparameterSet(decay=Positive(0.5))["decay"].item()
        0.5
    """

    def problems(self) -> list[str]:
        """What is wrong with ``init``, in words."""
        return [] if bool((self.init > 0).all()) else [f"init must be above 0, got {_show(self.init)}"]

    def value(self, raw: Tensor) -> Tensor:
        """Softplus of ``raw``."""
        return F.softplus(raw)

    def raw(self, value: Tensor) -> Tensor:
        """The inverse softplus, in a form that neither overflows nor cancels."""
        return value + torch.log(-torch.expm1(-value))


class Interval(Domain):
    r"""Between two bounds, which are never reached: :math:`l + (h - l)\,\sigma(x)`.

    Args:
        init: First value, strictly between the bounds.
        low: Lower bound :math:`l`.
        high: Upper bound :math:`h`.

    Raises:
        ValueError: If the bounds are not finite or not in order, or ``init`` is not between them.

    Example:
        >>> hypers = HyperparameterSet(momentum=Interval(0.5, low=0.0, high=2.0))
        >>> hypers.set_grad(momentum=1.0)  # h - l = 2 times the slope of the sigmoid, 1/4 * 3/4
        >>> hypers.raw["momentum"].grad
        tensor(0.3750)
    """

    def __init__(self, init: float | Sequence[float] | Tensor, low: float, high: float) -> None:
        self.low, self.high = float(low), float(high)
        super().__init__(init)

    def problems(self) -> list[str]:
        """What is wrong with ``init`` and the bounds, in words."""
        found = _bound_problems(self.low, self.high)
        if not bool(((self.init > self.low) & (self.init < self.high)).all()):
            found.append(f"init must be strictly between {self.low:g} and {self.high:g}, got {_show(self.init)}")
        return found

    def value(self, raw: Tensor) -> Tensor:
        """The sigmoid of ``raw``, stretched over the interval."""
        return self.low + (self.high - self.low) * torch.sigmoid(raw)

    def raw(self, value: Tensor) -> Tensor:
        """The logit of the position inside the interval."""
        return torch.log(value - self.low) - torch.log(self.high - value)


class UnitInterval(Interval):
    r"""Between 0 and 1, which are never reached: :math:`\sigma(x)`.

    Args:
        init: First value, strictly between 0 and 1.

    Raises:
        ValueError: If ``init`` is not strictly between 0 and 1.

    Example:
        >>> HyperparameterSet(dropout=UnitInterval(0.25))["dropout"].item()
        0.25
    """

    def __init__(self, init: float | Sequence[float] | Tensor) -> None:
        super().__init__(init, 0.0, 1.0)


class Simplex(Domain):
    r"""Positive numbers that sum to one along the last dimension: :math:`\operatorname{softmax}(x)`.

    Args:
        init: First values ``(..., n)``, above zero, each row summing to one.

    Raises:
        ValueError: If ``init`` has no dimension, an entry that is not above zero, or a row that does not sum to one.

    Example:
        >>> hypers = HyperparameterSet(mix=Simplex([0.25, 0.25, 0.5]))
        >>> hypers["mix"]
        tensor([0.2500, 0.2500, 0.5000], grad_fn=<SoftmaxBackward0>)
    """

    def problems(self) -> list[str]:
        """What is wrong with ``init``, in words."""
        if self.init.ndim == 0 or self.init.shape[-1] == 0:
            return [f"init must have entries along a last dimension, got shape {tuple(self.init.shape)}"]
        found = [] if bool((self.init > 0).all()) else [f"entries must be above 0, got {_show(self.init)}"]
        total = self.init.double().sum(-1)
        if not bool(((total - 1).abs() < 1e-5).all()):
            found.append(f"entries must sum to 1, got {_show(total)}")
        return found

    def value(self, raw: Tensor) -> Tensor:
        """The softmax of ``raw`` over the last dimension."""
        return torch.softmax(raw, -1)

    def raw(self, value: Tensor) -> Tensor:
        """The centred logarithm, so that a uniform value has raw zeros."""
        log = torch.log(value)
        return log - log.mean(-1, keepdim=True)


class Integer(Domain):
    r"""Whole numbers between two bounds, both included, by relaxation.

    A real value :math:`v = l - ½ + (h - l + 1)\,\sigma(x)` is rounded forwards; backwards the rounding passes the
    gradient unchanged (straight-through).

    Args:
        init: First value, a whole number within the bounds.
        low: Smallest value :math:`l`.
        high: Largest value :math:`h`.

    Raises:
        ValueError: If a bound or ``init`` is not whole, or the bounds are out of order, or ``init`` is not within them.

    Example:
        >>> HyperparameterSet(depth=Integer(3, low=1, high=8))["depth"].item()
        3.0
    """

    def __init__(self, init: float | Sequence[float] | Tensor, low: int, high: int) -> None:
        self.low, self.high = low, high
        super().__init__(init)

    def problems(self) -> list[str]:
        """What is wrong with ``init`` and the bounds, in words."""
        found = _bound_problems(self.low, self.high)
        found += [f"{name} must be whole, got {b:g}" for name, b in (("low", self.low), ("high", self.high)) if b % 1]
        if not bool((self.init == self.init.round()).all()):
            found.append(f"init must be whole, got {_show(self.init)}")
        if not bool(((self.init >= self.low) & (self.init <= self.high)).all()):
            found.append(f"init must be from {self.low:g} to {self.high:g}, got {_show(self.init)}")
        return found

    def relaxed(self, raw: Tensor) -> Tensor:
        """The real value before rounding, half a step wider than the bounds, so that both can be reached."""
        return self.low - 0.5 + (self.high - self.low + 1) * torch.sigmoid(raw)

    def value(self, raw: Tensor) -> Tensor:
        """The rounded value, with the gradient of the real one."""
        real = self.relaxed(raw)
        # Rounding goes to even: without the clamp a saturated sigmoid would give `low - 1` or `high + 1`.
        rounded = real.detach().round().clamp(self.low, self.high)
        return rounded + (real - real.detach())

    def raw(self, value: Tensor) -> Tensor:
        """The logit of the position inside the widened bounds."""
        return torch.log(value - self.low + 0.5) - torch.log(self.high + 0.5 - value)


class Choice(Simplex):
    r"""One of several options: a probability for each, :math:`\operatorname{softmax}(x)`.

    Args:
        options: What to choose from, at least two different things.
        init: First probabilities, one an option, above zero and summing to one; equal if left out.

    Raises:
        ValueError: If there are fewer than two options, one occurs twice, or ``init`` does not fit them.

    Example:
        >>> hypers = HyperparameterSet(activation=Choice(["relu", "gelu"], init=[0.25, 0.75]))
        >>> hypers.option("activation")
        'gelu'
    """

    def __init__(self, options: Sequence[Any], init: Sequence[float] | Tensor | None = None) -> None:
        self.options = tuple(options)
        super().__init__(torch.full((len(self.options),), 1 / max(len(self.options), 1)) if init is None else init)

    def problems(self) -> list[str]:
        """What is wrong with the options and ``init``, in words."""
        found = [] if len(self.options) > 1 else [f"there must be at least two options, got {list(self.options)}"]
        if any(option in self.options[:i] for i, option in enumerate(self.options)):
            found.append(f"options must differ, got {list(self.options)}")
        if self.init.shape != (len(self.options),):
            found.append(f"init must have {len(self.options)} entries, got shape {tuple(self.init.shape)}")
        return found + (super().problems() if self.options else [])

    def option(self, probabilities: Tensor) -> Any:
        """The likeliest option; the first of equals."""
        return self.options[int(probabilities.argmax())]


class HyperparameterSet(nn.Module):
    r"""Named hyperparameters, each an unconstrained parameter seen through its domain.

    ``hypers["decay"]`` is the value :math:`v = d(x)` of the raw parameter :math:`x`; ``hypers.parameters()`` are what
    an optimizer steps. Only raw parameters are in ``state_dict``.

    Args:
        domains: A domain by name.

    Attributes:
        read: Names that somebody has asked for.

    Raises:
        ValueError: If there is none.

    Example:
        >>> hypers = HyperparameterSet(decay=Positive(0.1), momentum=UnitInterval(0.9))
        >>> optimizer = torch.optim.SGD(hypers.parameters(), lr=1.0)
        >>> hypers.set_grad(decay=-1.0)  # more decay is better
        >>> optimizer.step()
        >>> bool(hypers["decay"] > 0.1), hypers["momentum"]
        (True, tensor(0.9000, grad_fn=<AddBackward0>))
    """

    def __init__(self, **domains: Domain) -> None:
        super().__init__()
        if not domains:
            raise ValueError("HyperparameterSet needs at least one domain, for example `decay=Positive(0.1)`")
        self.domains = domains
        self.raw = nn.ParameterDict({name: nn.Parameter(domain.raw(domain.init)) for name, domain in domains.items()})
        self._instead: dict[str, Tensor] = {}
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> Tensor:
        self.read.add(name)
        return self._instead[name] if name in self._instead else self._value(name)

    def _value(self, name: str) -> Tensor:
        return self.domains[name].value(self.raw[name])

    def replace(self, **values: Tensor) -> None:
        """Makes ``hypers[name]`` something else for a while, such as one value for each example of a batch.

        :meth:`values` and :meth:`numbers` go on telling what the hyperparameters are.

        Args:
            values: Values by name; without any, everything is as it was.

        Raises:
            ValueError: If a name is unknown.

        Example:
            >>> hypers = HyperparameterSet(dropout=UnitInterval(0.5))
            >>> hypers.replace(dropout=torch.tensor([0.25, 0.75]))
            >>> hypers["dropout"], hypers.numbers()
            (tensor([0.2500, 0.7500]), {'dropout': 0.5})
            >>> hypers.replace()
        """
        if unknown := [name for name in values if name not in self]:
            raise ValueError(f"there are no hyperparameters {unknown}")
        self._instead = values

    def __iter__(self) -> Iterator[str]:
        return iter(self.domains)

    def __len__(self) -> int:
        return len(self.domains)

    def __contains__(self, name: object) -> bool:
        return name in self.domains

    def set_grad(self, **grads: Tensor | float) -> None:
        r"""Pulls gradients of the values back to the raw parameters: :math:`x.grad \mathrel{+}= d'(x)\,g`.

        Args:
            grads: By name, the gradient with respect to the value, of its shape.

        Raises:
            ValueError: If a name is unknown or a shape does not fit; nothing is written then.
        """
        problems = [f"there is no hyperparameter `{name}`" for name in grads if name not in self]
        for name in grads.keys() & self.domains.keys():
            given, wanted = torch.as_tensor(grads[name]).shape, self.raw[name].shape
            if given != wanted:
                problems.append(f"`{name}` has shape {tuple(wanted)}, its gradient {tuple(given)}")
        if problems:
            raise ValueError("; ".join(problems))
        for name, grad in grads.items():
            self._accumulate(name, grad)

    def values(self) -> dict[str, Tensor]:
        """The values by name, detached."""
        return {name: self._value(name).detach() for name in self}

    def numbers(self) -> dict[str, float | list[float]]:
        """The values by name on the host, flattened to lists where they are not scalars."""
        return {
            name: value.item() if value.ndim == 0 else value.flatten().tolist() for name, value in self.values().items()
        }

    def option(self, name: str) -> Any:
        """The likeliest option of a :class:`Choice`."""
        domain = self.domains[name]
        if not isinstance(domain, Choice):
            raise ValueError(f"`{name}` is a {type(domain).__name__}, not a Choice")
        return domain.option(self._value(name))

    def _accumulate(self, name: str, grad: Tensor | float) -> None:
        raw = self.raw[name]
        # Lightning's validation hooks run without gradients; here they are needed.
        with torch.inference_mode(False), torch.enable_grad():
            value = self._value(name)
            grad = torch.as_tensor(grad).detach().clone().to(value)
            (pulled,) = torch.autograd.grad(value, raw, grad)
        raw.grad = pulled if raw.grad is None else raw.grad + pulled


def _bound_problems(low: float, high: float) -> list[str]:
    ordered = low < high and high - low < float("inf")  # also false for nan
    return [] if ordered else [f"bounds must be finite and low < high, got {low:g} and {high:g}"]


def _show(values: Tensor) -> str:
    return f"{values.item():g}" if values.ndim == 0 else str(values.tolist())
