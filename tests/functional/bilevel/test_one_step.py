"""Hypergradients of one inner step by finite differences: darts_fd and sama against exact products."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_hpo.functional.bilevel.darts_fd import darts_fd
from lightning_hpo.functional.bilevel.optimizer_steps import adam, functional_optimizer, sgd
from lightning_hpo.functional.bilevel.problem import Point, Problem, Tensors
from lightning_hpo.functional.bilevel.products import products
from lightning_hpo.functional.bilevel.sama import adam_slope, sama, step_slope
from lightning_hpo.functional.bilevel.t1t2 import t1t2
from lightning_hpo.functional.bilevel.unrolled import unrolled


def distance(left: Tensors, right: Tensors) -> float:
    return math.sqrt(sum(float((left[name] - right[name]).square().sum()) for name in left))


def test_darts_approaches_the_exact_product_with_the_square_of_the_distance(network: Any) -> None:
    inputs = network.problem, network.params, network.hparams
    exact = t1t2(*inputs).gradients
    errors = [distance(darts_fd(*inputs, epsilon=epsilon).gradients, exact) for epsilon in (1e-1, 1e-2, 1e-3)]
    assert errors[0] / errors[1] == pytest.approx(100, rel=0.05)
    assert errors[1] / errors[2] == pytest.approx(100, rel=0.05)
    torch.testing.assert_close(darts_fd(*inputs).gradients, exact, rtol=1e-4, atol=1e-4)


def test_sama_is_darts_in_the_metric_of_the_optimizer(network: Any) -> None:
    slope = {name: torch.rand_like(value) + 0.5 for name, value in network.params.items()}
    point = Point(network.params, network.hparams)
    v, direct = point.gradient(network.problem.val_loss, "val_loss")
    mixed = products(network.problem, point).pull_back(point.vector(slope) * v, params=False)[1]
    expected = {name: direct[name] - mixed[name] for name in direct if direct[name] is not None}
    expected |= {name: -mixed[name] for name in direct if direct[name] is None}
    inputs = network.problem, network.params, network.hparams
    errors = [distance(sama(*inputs, slope=slope, alpha=alpha).gradients, expected) for alpha in (1e-1, 1e-2, 1e-3)]
    assert errors[0] / errors[1] == pytest.approx(100, rel=0.05)
    assert errors[1] / errors[2] == pytest.approx(100, rel=0.05)
    ones = {name: torch.ones_like(value) for name, value in network.params.items()}
    torch.testing.assert_close(sama(*inputs, slope=ones, alpha=0.01).gradients, darts_fd(*inputs).gradients)


@pytest.mark.parametrize("of", ["sgd", "adam"])
def test_sama_is_one_unrolled_step_with_the_validation_gradient_of_the_start(network: Any, of: str) -> None:
    """With a linear validation loss that gradient is the same before and after the step."""
    step, settings = {"sgd": (sgd, {"lr": 0.1, "momentum": 0.9}), "adam": (adam, {"lr": 0.1, "eps": 1e-3})}[of]
    problem = Problem(network.problem.train_loss, lambda w, h: w["first"].sum() - 2 * w["last"].sum())
    point = Point(network.params, network.hparams)
    grads = point.unravel(products(problem, point).residual)
    states: dict[str, dict[str, Tensor]] = {
        name: step(value, torch.randn_like(value), {}, **settings)[1] for name, value in network.params.items()
    }
    slope = {
        name: step_slope(step, value, grads[name], states[name], settings) for name, value in network.params.items()
    }
    found = sama(problem, network.params, network.hparams, slope=slope, alpha=1e-4).gradients
    optimizer = functional_optimizer(step, **settings)
    exact = unrolled(problem, network.params, network.hparams, steps=1, optimizer=optimizer, states=states).gradients
    torch.testing.assert_close(found, exact, rtol=1e-6, atol=1e-8)


def test_the_closed_form_for_adam_is_the_slope_of_its_step() -> None:
    torch.manual_seed(0)
    grad, mean = torch.randn(2, 50).double()
    square = torch.rand(50).double() + 0.1
    numbers = {"lr": 0.1, "beta1": 0.9, "beta2": 0.99}

    def update(g: Tensor, eps: float) -> Tensor:  # without bias correction
        root = (0.99 * square + 0.01 * g * g).sqrt()
        return 0.1 * (0.9 * mean + 0.1 * g) / (root + eps)

    leaf = grad.clone().requires_grad_()
    after = {"exp_avg": 0.9 * mean + 0.1 * grad, "exp_avg_sq": 0.99 * square + 0.01 * grad**2}
    for eps, tol in ((0.0, 1e-12), (1e-8, 1e-6)):
        (exact,) = torch.autograd.grad(update(leaf, eps).sum(), leaf)
        torch.testing.assert_close(adam_slope(grad, after, **numbers, eps=eps), exact, rtol=tol, atol=tol)
    # After many steps the bias correction is 1 and the slope of the whole step is the same.
    before = {"exp_avg": mean, "exp_avg_sq": square, "step": torch.tensor(1e5)}
    whole = step_slope(adam, torch.zeros(50).double(), grad, before, numbers | {"eps": 0.0})
    torch.testing.assert_close(adam_slope(grad, after, **numbers, eps=0.0), whole, rtol=1e-12, atol=1e-12)


def test_a_slope_where_nothing_has_moved_is_finite() -> None:
    nothing = torch.zeros(2)
    state = {"exp_avg": nothing, "exp_avg_sq": nothing}
    assert torch.equal(adam_slope(nothing, state, lr=0.1, beta1=0.9, beta2=0.99, eps=0.0), nothing)


@pytest.mark.parametrize("size", [1.0, 1e-30])
def test_lengths_of_the_validation_gradient_do_not_matter(size: float) -> None:
    seen: list[Tensor] = []

    def train_loss(params: Tensors, hparams: Tensors) -> Tensor:
        seen.append(params["w"].detach().clone())
        return ((params["w"] - hparams["goal"]) ** 2).sum()

    problem = Problem(train_loss, lambda w, h: size * (w["w"] * torch.tensor([3.0, 4.0])).sum())
    inputs: Any = problem, {"w": torch.zeros(2)}, {"goal": torch.tensor(1.0)}
    found = darts_fd(*inputs).gradients["goal"]
    torch.testing.assert_close(found / size, torch.tensor(14.0), rtol=1e-4, atol=0.0)
    torch.testing.assert_close(seen, [torch.tensor([0.006, 0.008]), torch.tensor([-0.006, -0.008])])
    seen.clear()
    found = sama(*inputs, slope={"w": torch.tensor([0.5, 0.5])}).gradients["goal"]
    torch.testing.assert_close(found / size, torch.tensor(7.0), rtol=1e-4, atol=0.0)
    torch.testing.assert_close(seen, [torch.tensor([0.6, 0.8]), torch.tensor([-0.6, -0.8])])


def test_wrong_settings_are_refused(network: Any) -> None:
    inputs: Any = network.problem, network.params, network.hparams
    ones = {name: torch.ones_like(value) for name, value in network.params.items()}
    with pytest.raises(ValueError, match="epsilon must be positive, got 0"):
        darts_fd(*inputs, epsilon=0)
    with pytest.raises(ValueError, match="must be positive, got -1"):
        sama(*inputs, slope=ones, alpha=-1)
    with pytest.raises(ValueError, match="slope must have the shapes"):
        sama(*inputs, slope=ones | {"last": torch.ones(1)})
    with pytest.raises(ValueError, match="slope has another structure"):
        sama(*inputs, slope={"first": ones["first"]})
    residual = Problem(network.problem.train_loss, network.problem.val_loss, residual=lambda w, h: w)
    with pytest.raises(ValueError, match="they ignore `residual`"):
        darts_fd(residual, *inputs[1:])
