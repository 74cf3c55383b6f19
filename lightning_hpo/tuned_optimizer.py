"""Settings of a user's optimizer as hyperparameters: how they act in a step, and on where training ends."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Adam, AdamW, Optimizer

from lightning_hpo.functional.bilevel.optimizer_steps import State, step_all, step_of, step_settings
from lightning_hpo.functional.bilevel.problem import Loss, Tensors
from lightning_hpo.functional.bilevel.sama import step_slope
from lightning_hpo.hyper import Domain, HyperparameterSet, Interval, Positive, UnitInterval

__all__ = ["TunedOptimizer", "tuning_problems"]

_TUNABLE = ("lr", "weight_decay", "momentum", "beta2")
_SMALLEST_DECAY = 1e-6  # where the user has none, so that there is something to grow
_EDGE = 1e-3  # of a momentum from 0 and from 1


def tuning_problems(names: Sequence[str], bounds: Mapping[str, tuple[float, float]]) -> list[str]:
    """What is wrong with settings to tune and their bounds, as far as it can be known without the optimizer.

    Args:
        names: Which settings.
        bounds: Lowest and highest value by the name of a setting.

    Returns:
        One phrase a problem.

    Example:
        >>> tuning_problems(["lr"], {"lr": (2.0, 1.0)})
        ["bounds must be pairs low < high, got {'lr': (2.0, 1.0)}"]
    """
    checks = {
        f"tune may name {_TUNABLE}, got {tuple(names)!r}": all(name in _TUNABLE for name in names),
        f"bounds must be pairs low < high, got {bounds!r}": all(map(_ordered, bounds.values())),
        f"bounds may name what is tuned, {tuple(names)!r}, got {sorted(bounds)}": set(bounds) <= set(names),
    }
    return [problem for problem, holds in checks.items() if not holds]


class TunedOptimizer:
    """An SGD, Adam or AdamW some of whose settings are hyperparameters, one value for each of its groups.

    Weight decay and momentum (``beta1`` of Adam) begin with the user's values, a decay of 0 with 1e-6. The learning
    rate is a factor on the user's, which a schedule may go on to change.

    Args:
        optimizer: The user's optimizer.
        names: Which settings: ``"lr"``, ``"weight_decay"``, ``"momentum"``, ``"beta2"``; none where only its step is
            wanted.
        parameters: The module's parameters by name.
        bounds: Lowest and highest value by the name of a setting.

    Raises:
        ValueError: If the optimizer is of another class, has no such setting, or begins outside of the bounds; all
            problems are listed.

    Example:
        >>> weight = torch.ones(1, requires_grad=True)
        >>> sgd = torch.optim.SGD([weight], lr=0.1, weight_decay=0.01)
        >>> tuned = TunedOptimizer(sgd, ["lr", "weight_decay"], {"weight": weight})
        >>> {name: round(value, 4) for name, value in tuned.hypers.numbers().items()}
        {'lr_factor': 1.0, 'weight_decay': 0.01}
    """

    def __init__(
        self,
        optimizer: Optimizer,
        names: Sequence[str],
        parameters: Mapping[str, Tensor],
        bounds: Mapping[str, tuple[float, float]] | None = None,
    ) -> None:
        self.optimizer, self.step = optimizer, step_of(optimizer)
        names_of = {id(parameter): name for name, parameter in parameters.items()}
        self.groups = [
            {names_of[id(p)]: p for p in group["params"] if id(p) in names_of} for group in optimizer.param_groups
        ]
        self._keys = {_public(name): self._key(name) for name in names}
        problems = [
            f"`{type(optimizer).__name__}` has no {name!r}" for name in names if self._key(name) not in self._known()
        ]
        problems += [f"bounds name {name!r}, which is not tuned" for name in bounds or {} if name not in names]
        if not problems:
            problems = [text for name, pair in (bounds or {}).items() for text in self._outside(name, *pair)]
        if problems:
            raise ValueError("; ".join(problems))
        self.hypers = (
            HyperparameterSet(**{_public(n): self._domain(n, (bounds or {}).get(n)) for n in names}) if names else None
        )
        self._numbers: dict[str, list[float]] = {}
        self.refresh()

    def _key(self, name: str) -> str:
        return "beta1" if name == "momentum" and isinstance(self.optimizer, (Adam, AdamW)) else name

    def _known(self) -> set[str]:
        adaptive = isinstance(self.optimizer, (Adam, AdamW))
        return {"lr", "weight_decay", *(("beta1", "beta2") if adaptive else ("momentum",))}

    def _found(self, name: str) -> list[float]:
        """Where the groups begin."""
        if name == "lr":
            return [1.0 for _ in self.optimizer.param_groups]  # a factor
        return [float(step_settings(group)[self._key(name)]) for group in self.optimizer.param_groups]

    def _outside(self, name: str, low: float, high: float) -> list[str]:
        """A decay of 0 is none yet, and may begin anywhere."""
        wrong = [v for v in self._found(name) if not low <= v <= high and not (name == "weight_decay" and v == 0)]
        return [f"{_public(name)!r} begins at {value:g}, outside of its bounds {low:g} to {high:g}" for value in wrong]

    def _domain(self, name: str, bounds: tuple[float, float] | None) -> Domain:
        values = torch.tensor(self._found(name))
        values = values[0] if len(values) == 1 else values
        if bounds is not None:
            low, high = bounds
            edge = 1e-3 * (high - low)
            return Interval(values.clamp(low + edge, high - edge), low, high)
        if name in ("lr", "weight_decay"):
            return Positive(values.clamp(min=_SMALLEST_DECAY))
        return UnitInterval(values.clamp(_EDGE, 1 - _EDGE))

    def refresh(self) -> None:
        """Reads the values back to the host, for the steps to come."""
        numbers = self.hypers.numbers() if self.hypers is not None else {}
        self._numbers = {name: value if isinstance(value, list) else [value] for name, value in numbers.items()}

    def group_settings(self, group: dict[str, Any]) -> dict[str, Any]:
        """What the optimizer's group is to use in a step, under torch's names.

        Args:
            group: A group as user and schedule have set it.

        Returns:
            The tuned settings.
        """
        index = next(i for i, other in enumerate(self.optimizer.param_groups) if other is group)
        found: dict[str, Any] = {}
        for name, key in self._keys.items():
            value = self._numbers[name][index]
            if key == "lr":
                found["lr"] = group["lr"] * value
            elif key in ("beta1", "beta2"):
                betas = list(found.get("betas", group["betas"]))
                betas[key == "beta2"] = value
                found["betas"] = tuple(betas)
            else:
                found[key] = value
        return found

    # How they act

    def values(self, hparams: Tensors, index: int) -> dict[str, Tensor]:
        """The tuned settings of one group as functions of the raw hyperparameters.

        Args:
            hparams: Raw hyperparameters by name; others may be among them.
            index: The group.

        Returns:
            By the names that a step's function uses.
        """
        if self.hypers is None:
            return {}
        lr = self.optimizer.param_groups[index]["lr"]
        found = {}
        for name, key in self._keys.items():
            value = self.hypers.domains[name].value(hparams[name])
            value = value if value.ndim == 0 else value[index]
            found[key] = lr * value if key == "lr" else value
        return found

    def functional(self) -> Callable[..., tuple[Tensors, dict[str, State]]]:
        """The optimizer's step as a pure function of parameters, gradients, states and hyperparameters."""
        settings = [step_settings(group) for group in self.optimizer.param_groups]

        def apply(
            params: Tensors, grads: Tensors, states: dict[str, State], hparams: Tensors
        ) -> tuple[Tensors, dict[str, State]]:
            new, kept = dict(params), dict(states)
            for index, names in enumerate(self.groups):
                part = {name: params[name] for name in names if name in params}
                now = settings[index] | self.values(hparams, index)
                moved, left = step_all(self.step, part, grads, states, **now)
                new, kept = new | moved, kept | left
            return new, kept

        return apply

    def decayed(self, loss: Loss) -> Loss:
        r"""The training loss whose stationary points are where the optimizer stops: weight decay belongs to it.

        Adds :math:`\lambda \langle s, w^2 \rangle / 2` with the decay of each group, whether tuned or fixed; s is 1,
        and :math:`\sqrt{\hat v} + \epsilon` for AdamW.

        Args:
            loss: The training loss.

        Returns:
            The loss with the decay.
        """
        fixed = [float(group["weight_decay"]) for group in self.optimizer.param_groups]
        if "weight_decay" not in self._keys and not any(fixed):
            return loss
        scale = {name: self._decay_scale(name, index) for index, names in enumerate(self.groups) for name in names}

        def total(params: Tensors, hparams: Tensors) -> Tensor:
            value = loss(params, hparams)
            for index, names in enumerate(self.groups):
                decay = self.values(hparams, index).get("weight_decay", fixed[index])
                squares = [_squares(params[name], scale[name]) for name in names if name in params]
                if squares:
                    value = value + 0.5 * decay * torch.stack(squares).sum()
            return value

        return total

    def _decay_scale(self, name: str, index: int) -> Tensor | float:
        group, state = self.optimizer.param_groups[index], self.states().get(name)
        if not (isinstance(self.optimizer, AdamW) or group.get("decoupled_weight_decay")) or not state:
            return 1.0
        correction = 1 - group["betas"][1] ** state["step"]
        return (state["exp_avg_sq"] / correction).sqrt() + group["eps"]

    # Where it stands

    def states(self, copies: bool = False) -> dict[str, State]:
        """The optimizer's states by the names of parameters.

        Args:
            copies: Whether they are to stay as they are when the optimizer goes on.

        Returns:
            The states; parameters without one are left out.
        """
        known = {name: self.optimizer.state.get(p) for group in self.groups for name, p in group.items()}
        return {name: _tensors(state, copies) for name, state in known.items() if state}

    def slopes(self, params: Mapping[str, Tensor]) -> Tensors:
        """The slope of the coming step in the gradient, coordinate by coordinate, from gradients that are there.

        Args:
            params: Parameters by name.

        Returns:
            Tensors in their shapes; zero where there is no gradient.
        """
        states, found = self.states(), {name: torch.zeros_like(param) for name, param in params.items()}
        for index, names in enumerate(self.groups):
            settings = step_settings(self.optimizer.param_groups[index])
            for name in names:
                grad = params[name].grad if name in params else None
                if grad is not None:
                    found[name] = step_slope(self.step, params[name], grad, states.get(name, {}), settings)
        return found


def _squares(weight: Tensor, scale: Tensor | float) -> Tensor:
    """The sum of scaled squares, without a copy of them where there is no scale."""
    flat = weight.flatten()
    return (scale.flatten() * flat if isinstance(scale, Tensor) else flat) @ flat


def _tensors(state: Mapping[str, Any], copies: bool) -> State:
    """Without a momentum that is still to come."""
    return {key: value.clone() if copies else value for key, value in state.items() if isinstance(value, Tensor)}


def _public(name: str) -> str:
    return "lr_factor" if name == "lr" else name


def _ordered(pair: Any) -> bool:
    return isinstance(pair, (list, tuple)) and len(pair) == 2 and -math.inf < pair[0] < pair[1] < math.inf
