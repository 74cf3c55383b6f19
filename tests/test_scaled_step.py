"""Settings that hold for one step."""

import pytest
import torch

from lightning_hpo.scaled_step import ScaledStep


def optimizer_of(weight, **arguments):
    return torch.optim.Adam([weight], lr=0.1, **arguments)


def test_a_scheduler_never_compounds_the_factor():
    weight = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=1.0)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    scaled = ScaledStep(optimizer, lambda group: {"lr": 3 * group["lr"]})
    places = []
    for _ in range(4):
        weight.grad = torch.ones(1)
        optimizer.step()
        scheduler.step()
        places.append(weight.item())
    assert places == pytest.approx([-3.0, -4.5, -5.25, -5.625])
    assert optimizer.param_groups[0]["lr"] == 1 / 16
    scaled.remove()
    optimizer.step()
    assert weight.item() == pytest.approx(-5.625 - 1 / 16)


def test_settings_are_seen_by_the_step_and_not_by_the_state():
    weight, seen = torch.zeros(1, requires_grad=True), []
    optimizer = optimizer_of(weight)
    ScaledStep(optimizer, lambda group: {"lr": 0.4, "betas": (0.6, 0.996), "eps": 5e-9})

    def closure():
        group = optimizer.param_groups[0]
        seen.append((group["lr"], group["betas"], group["eps"]))
        weight.grad = torch.ones(1)
        return 0.0

    optimizer.step(closure)
    assert seen == [(0.4, (0.6, 0.996), 5e-9)]
    group = optimizer.state_dict()["param_groups"][0]
    assert (group["lr"], group["betas"], group["eps"]) == (0.1, (0.9, 0.999), 1e-8)


def test_an_interrupted_step_is_put_right():
    weight = torch.zeros(1, requires_grad=True)
    optimizer = optimizer_of(weight)
    scaled = ScaledStep(optimizer, lambda group: {"lr": 10.0})

    def closure():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(closure)
    assert optimizer.param_groups[0]["lr"] == 10.0
    scaled.restore()
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_a_learning_rate_that_is_a_tensor_stays_the_same_tensor():
    weight, lr = torch.zeros(1, requires_grad=True), torch.tensor(0.5)
    optimizer = torch.optim.SGD([weight], lr=lr)
    ScaledStep(optimizer, lambda group: {"lr": group["lr"] * 4})
    weight.grad = torch.ones(1)
    optimizer.step()
    assert weight.item() == -2.0
    assert optimizer.param_groups[0]["lr"] is lr
    assert lr == 0.5
