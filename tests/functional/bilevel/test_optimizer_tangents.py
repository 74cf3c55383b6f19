"""Slopes of parameters in the settings of the optimizer that trains them."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_hpo.functional.bilevel.forward_mode import forward
from lightning_hpo.functional.bilevel.optimizer_steps import (
    adam,
    adamw,
    functional_optimizer,
    sgd,
    step_all,
    step_of,
    step_settings,
)
from lightning_hpo.functional.bilevel.optimizer_tangents import carry, step_gradients
from lightning_hpo.functional.bilevel.problem import Problem

STEPS: list[tuple[Any, dict[str, Any]]] = [
    (sgd, {"lr": 0.1, "momentum": 0.8, "dampening": 0.1, "weight_decay": 0.3}),
    (sgd, {"lr": 0.1, "momentum": 0.8, "weight_decay": 0.3, "nesterov": True}),
    (adam, {"lr": 0.1, "beta1": 0.8, "beta2": 0.9, "eps": 1e-3, "weight_decay": 0.3}),
    (adamw, {"lr": 0.1, "beta1": 0.8, "beta2": 0.9, "eps": 1e-3, "weight_decay": 0.3}),
]


@pytest.mark.parametrize(("step", "settings"), STEPS)
def test_one_step_against_finite_differences(step: Any, settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    param, grad, other, cotangent = torch.randn(4, 5).double()
    _, state = step(param, other, {}, **settings)
    names = tuple(name for name, value in settings.items() if value is not True and name != "eps")
    found = step_gradients(step, param, grad, state, settings, names, cotangent)
    for name in names:
        above, below = ({**settings, name: settings[name] + move} for move in (1e-6, -1e-6))
        slope = (step(param, grad, state, **above)[0] - step(param, grad, state, **below)[0]) / 2e-6
        torch.testing.assert_close(found[name], cotangent @ slope, rtol=1e-7, atol=1e-8)
        alone = carry(step, param, grad, state, settings, name)
        torch.testing.assert_close(cotangent @ alone["param"], found[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("step", "settings"), STEPS)
def test_carried_with_the_hessian_it_is_forward_mode(step: Any, settings: dict[str, Any], network: Any) -> None:
    names = [name for name in ("lr", "weight_decay", "momentum", "beta1") if name in settings]
    problem = Problem(lambda w, h: network.problem.train_loss(w, network.hparams), lambda w, h: w["last"].sum())
    optimizer = functional_optimizer(step, **{**settings, **{name: name for name in names}})
    hparams = {name: torch.tensor(settings[name], dtype=torch.float64) for name in names}
    expected = forward(problem, network.params, hparams, steps=5, optimizer=optimizer).gradients
    for name in names:
        params, states, tangents = network.params, {}, {}
        for _ in range(5):
            leaves = {key: value.detach().requires_grad_() for key, value in params.items()}
            grads = torch.autograd.grad(problem.train_loss(leaves, {}), list(leaves.values()), create_graph=True)
            along = sum((g * tangents[key]["param"]).sum() for g, key in zip(grads, leaves, strict=True) if tangents)
            curved = torch.autograd.grad(along, list(leaves.values())) if tangents else grads
            curvature = {key: value if tangents else None for key, value in zip(leaves, curved, strict=True)}
            by_name = {key: value.detach() for key, value in zip(leaves, grads, strict=True)}
            tangents = {
                key: carry(
                    step, params[key], by_name[key], states.get(key, {}), settings, name, tangents.get(key),
                    curvature=curvature[key],
                )
                for key in params
            }  # fmt: skip
            params, states = step_all(step, params, by_name, states, **settings)
        torch.testing.assert_close(tangents["last"]["param"].sum(), expected[name], rtol=1e-10, atol=1e-12)


def test_memory_stands_in_for_curvature() -> None:
    """For a quadratic of curvature h, forgetting the fraction lr * h a step is exact."""
    lr, decay, curvature, weight = 0.1, 0.2, 0.5, torch.tensor([2.0]).double()
    settings: dict[str, Any] = {"lr": lr, "weight_decay": decay}
    goal = weight * (curvature + decay) / curvature  # where the weight rests: h (w - goal) + decay w = 0
    exact, damped = None, None
    memory = 1 - lr * curvature / (1 - lr * decay)
    for _ in range(300):
        grad = curvature * (weight - goal)
        along = torch.zeros(1).double() if exact is None else curvature * exact["param"]
        exact = carry(sgd, weight, grad, {}, settings, "weight_decay", exact, curvature=along)
        damped = carry(sgd, weight, grad, {}, settings, "weight_decay", damped, memory=memory)
        torch.testing.assert_close(damped["param"], exact["param"], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(exact["param"], -weight / (curvature + decay), rtol=1e-8, atol=1e-8)  # type: ignore[index]


def test_momentum_multiplies_what_one_step_shows() -> None:
    """The buffer goes on to push: over many steps weight decay acts 1 / (1 - momentum) times as much."""
    settings: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.0}
    weight, still = torch.ones(1), torch.zeros(1)
    state = {"momentum_buffer": still}
    alone = carry(sgd, weight, still, state, settings, "weight_decay")["param"]
    torch.testing.assert_close(alone, torch.tensor([-0.1]))
    tangent = None
    for _ in range(200):
        tangent = carry(sgd, weight, still, state, settings, "weight_decay", tangent, memory=0.0)
    torch.testing.assert_close(tangent["param"], torch.tensor([-1.0]))  # type: ignore[index]


@pytest.mark.parametrize(
    ("step", "settings"),
    [
        (sgd, {"lr": 0.002, "momentum": 0.9, "weight_decay": 0.01}),
        (adamw, {"lr": 0.02, "beta1": 0.9, "beta2": 0.99, "weight_decay": 0.01}),
    ],
)
def test_weight_decay_needs_a_long_memory(ridge: Any, step: Any, settings: dict[str, Any]) -> None:
    """While training is on its way, one step knows the direction and a small part of the length; carried, both."""
    hparams = {"weight_decay": torch.tensor(0.01, dtype=torch.float64)}
    problem = Problem(
        lambda w, h: ridge.problem.train_loss(w, ridge.hparams), lambda w, h: ridge.problem.val_loss(w, ridge.hparams)
    )
    optimizer = functional_optimizer(step, **{**settings, "weight_decay": "weight_decay"})
    start = {name: torch.zeros_like(value) for name, value in ridge.params.items()}
    truth = forward(problem, start, hparams, steps=50, optimizer=optimizer).gradients["weight_decay"]
    params, states, tangents, alone = start, {}, {}, {}
    for _ in range(50):
        leaves = {name: value.detach().requires_grad_() for name, value in params.items()}
        found = torch.autograd.grad(problem.train_loss(leaves, {}), list(leaves.values()))
        grads = dict(zip(leaves, found, strict=True))
        inputs = {name: (step, params[name], grads[name], states.get(name, {}), settings) for name in params}
        alone = {name: carry(*given, "weight_decay") for name, given in inputs.items()}
        tangents = {
            name: carry(*given, "weight_decay", tangents.get(name), memory=0.99) for name, given in inputs.items()
        }
        params, states = step_all(step, params, grads, states, **settings)
    leaves = {name: value.detach().requires_grad_() for name, value in params.items()}
    v = dict(zip(leaves, torch.autograd.grad(problem.val_loss(leaves, {}), list(leaves.values())), strict=True))
    one_step, carried = (sum((v[key] * z[key]["param"]).sum() for key in v) / truth for z in (alone, tangents))
    assert 0 < one_step < 0.1
    assert 0.5 < carried < 2


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_an_optimizer_of_torch_with_its_own_state(kind: Any) -> None:
    """The slope of the loss after the next step, against two optimizers that differ a little."""
    settings = {"momentum": 0.9} if kind is torch.optim.SGD else {}

    def after(lr: float, decay: float) -> tuple[Any, Tensor]:
        param = torch.nn.Parameter(torch.tensor([1.0, -2.0]).double())
        optimizer = kind([param], lr=0.1, weight_decay=0.01, **settings)
        for index in range(3):
            if index == 2:
                group, state = optimizer.param_groups[0], optimizer.state[param]
                kept = param.detach().clone(), {key: value.clone() for key, value in state.items()}
                group["lr"], group["weight_decay"] = lr, decay
            optimizer.zero_grad()
            (param**4).sum().backward()
            optimizer.step()
        return (step_of(optimizer), kept, param.grad, step_settings(group)), (param.detach() - 3).square().sum()

    (step, (param, state), grad, now), _ = after(0.1, 0.01)
    new, _ = step(param, grad, state, **now)
    found = step_gradients(step, param, grad, state, now, ("lr", "weight_decay"), 2 * (new - 3))
    by_lr = (after(0.1 + 1e-6, 0.01)[1] - after(0.1 - 1e-6, 0.01)[1]) / 2e-6
    by_decay = (after(0.1, 0.01 + 1e-6)[1] - after(0.1, 0.01 - 1e-6)[1]) / 2e-6
    torch.testing.assert_close(found, {"lr": by_lr, "weight_decay": by_decay}, rtol=1e-6, atol=1e-7)


def test_wrong_names_and_memories_are_refused() -> None:
    weight, settings = torch.ones(1), {"lr": 0.1, "nesterov": False}
    message = r"\['beta1', 'nesterov'\] are not settings with a slope; there are \['lr'\]"
    with pytest.raises(ValueError, match=message):
        step_gradients(sgd, weight, weight, {}, settings, ("beta1", "lr", "nesterov"), weight)
    with pytest.raises(ValueError, match="memory must be from 0 to 1, got 1.5"):
        carry(sgd, weight, weight, {}, settings, "lr", memory=1.5)
