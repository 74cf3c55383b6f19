"""Pure steps against torch's own optimizers, and their slopes against finite differences."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_hpo.functional.bilevel.optimizer_steps import Step, adam, adamw, sgd, step_all, step_of, step_settings

SETTINGS: list[tuple[type[torch.optim.Optimizer], dict[str, Any]]] = [
    (torch.optim.SGD, {"lr": 0.1}),
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1}),
    (torch.optim.SGD, {"lr": 0.001, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1, "maximize": True}),
    (torch.optim.Adam, {"lr": 0.1}),
    (torch.optim.Adam, {"lr": 0.1, "betas": (0.5, 0.7), "eps": 1e-3, "weight_decay": 0.2, "amsgrad": True}),
    (torch.optim.Adam, {"lr": 0.1, "weight_decay": 0.2, "decoupled_weight_decay": True}),
    (torch.optim.AdamW, {"lr": 0.1, "weight_decay": 0.3, "betas": (0.8, 0.9)}),
    (torch.optim.AdamW, {"lr": 0.1, "amsgrad": True, "maximize": True}),
]


def loss(params: dict[str, Tensor]) -> Tensor:
    return (params["a"] ** 4).sum() + (params["a"].sum() * params["b"]).sin().sum()


def start() -> dict[str, Tensor]:
    return {"a": torch.linspace(-1, 1, 6, dtype=torch.float64).view(2, 3), "b": torch.ones(2, dtype=torch.float64)}


@pytest.mark.parametrize(("kind", "settings"), SETTINGS)
@pytest.mark.parametrize("as_tensors", [False, True])
def test_twenty_steps_equal_torch(
    kind: type[torch.optim.Optimizer], settings: dict[str, Any], as_tensors: bool
) -> None:
    theirs = {name: torch.nn.Parameter(value) for name, value in start().items()}
    optimizer = kind(theirs.values(), **settings)
    step, given = step_of(optimizer), step_settings(optimizer.param_groups[0])
    if as_tensors:
        numbers = {key: value for key, value in given.items() if type(value) is float and value}
        given |= {key: torch.tensor(value, dtype=torch.float64) for key, value in numbers.items()}
    ours, states = start(), {}
    for _ in range(20):
        leaves = {name: value.requires_grad_() for name, value in ours.items()}
        grads = dict(zip(leaves, torch.autograd.grad(loss(leaves), list(leaves.values())), strict=True))
        ours, states = step_all(step, {n: v.detach() for n, v in leaves.items()}, grads, states, **given)
        optimizer.zero_grad()
        loss(theirs).backward()
        optimizer.step()
    for name, param in theirs.items():
        torch.testing.assert_close(ours[name], param.data, rtol=1e-12, atol=1e-12)
        for key, value in optimizer.state[param].items():
            if value is not None:
                torch.testing.assert_close(states[name][key], value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_it_continues_from_torchs_state(kind: type[torch.optim.Optimizer]) -> None:
    param = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = kind([param], lr=0.1, **({"momentum": 0.9} if kind is torch.optim.SGD else {}))
    for _ in range(3):
        param.grad = torch.tensor([0.5, 2.0]) * param.detach()
        before, state = param.detach().clone(), {k: v.clone() for k, v in optimizer.state[param].items()}
        optimizer.step()
        new, _ = step_of(optimizer)(before, param.grad, state, **step_settings(optimizer.param_groups[0]))
        torch.testing.assert_close(new, param.data, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("step", "settings"),
    [
        (sgd, {"lr": 0.1, "momentum": 0.8, "dampening": 0.2, "weight_decay": 0.3}),
        (sgd, {"lr": 0.1, "momentum": 0.8, "weight_decay": 0.3, "nesterov": True}),
        (adam, {"lr": 0.1, "beta1": 0.8, "beta2": 0.9, "eps": 0.1, "weight_decay": 0.3}),
        (adamw, {"lr": 0.1, "beta1": 0.8, "beta2": 0.9, "eps": 0.1, "weight_decay": 0.3}),
    ],
)
def test_every_slope_passes_gradcheck(step: Step, settings: dict[str, Any]) -> None:
    numbers = {key: value for key, value in settings.items() if type(value) is float}
    rest = {key: value for key, value in settings.items() if key not in numbers}

    def three_steps(param: Tensor, grad: Tensor, *values: Tensor) -> Tensor:
        state: dict[str, Tensor] = {}
        for _ in range(3):
            param, state = step(param, grad * param, state, **dict(zip(numbers, values, strict=True)), **rest)
        return param

    point = [torch.tensor([1.0, -2.0]), torch.tensor([0.5, 0.7]), *map(torch.tensor, numbers.values())]
    torch.autograd.gradcheck(three_steps, [value.double().requires_grad_() for value in point])


def test_a_gradient_of_zero_has_a_finite_slope_in_adam() -> None:
    grad = torch.tensor([0.0, 1.0], requires_grad=True)
    new, _ = adam(torch.ones(2), grad, {}, lr=0.1)
    (slope,) = torch.autograd.grad(new.sum(), grad)
    assert slope.isfinite().all()


def test_nothing_is_changed_in_place() -> None:
    param, grad = torch.ones(2), torch.ones(2)
    state = {"step": torch.ones(()), "exp_avg": torch.ones(2), "exp_avg_sq": torch.ones(2)}
    adamw(param, grad, state, lr=0.1)
    assert all(bool((value == 1).all()) for value in (param, grad, *state.values()))


def test_unknown_optimizers_are_refused() -> None:
    class Mine(torch.optim.SGD):
        pass

    with pytest.raises(ValueError, match="the step of `Mine` is not known here; it must be one of SGD, Adam, AdamW"):
        step_of(Mine([torch.zeros(1)], lr=0.1))
