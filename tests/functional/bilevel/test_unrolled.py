"""Unrolled, truncated and forward-mode hypergradients against autograd through the whole training, and each other."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_hpo.functional.bilevel.forward_mode import forward
from lightning_hpo.functional.bilevel.inner_steps import unroll
from lightning_hpo.functional.bilevel.optimizer_steps import (
    FunctionalOptimizer,
    adam,
    adamw,
    functional_optimizer,
    sgd,
    step_all,
)
from lightning_hpo.functional.bilevel.problem import Loss, Problem, Tensors
from lightning_hpo.functional.bilevel.unrolled import truncated, unrolled

OPTIMIZERS = {
    "sgd": functional_optimizer(sgd, lr="lr", momentum="momentum", weight_decay=0.01),
    "nesterov": functional_optimizer(sgd, lr="lr", momentum="momentum", nesterov=True),
    "adam": functional_optimizer(adam, lr="lr", beta1="momentum", beta2=0.9, amsgrad=True, weight_decay=0.01),
    "adamw": functional_optimizer(adamw, lr="lr", beta1="momentum", weight_decay=0.1),
}
every_optimizer = pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())


def tuned(network: Any) -> Tensors:
    return network.hparams | {"lr": torch.tensor(0.1).double(), "momentum": torch.tensor(0.8).double()}


def batches(network: Any) -> list[Loss]:
    """A different loss in each step."""
    train = network.problem.train_loss
    return [lambda w, h, k=k: train(w, h) * (1 + 0.1 * k) + 0.05 * k * h["slope"] * w["last"].sum() for k in range(6)]


def recorded(network: Any, hparams: Tensors, optimizer: FunctionalOptimizer, first: int = 0) -> Tensors:
    """One graph through all steps from the first that counts."""
    leaves = {name: value.clone().requires_grad_() for name, value in hparams.items()}
    params = {name: value.clone().requires_grad_() for name, value in network.params.items()}
    states: Any = {}
    for index, loss in enumerate(batches(network)):
        if index == first:
            params = {name: value.detach().requires_grad_() for name, value in params.items()}
            states = {name: {k: v.detach() for k, v in slots.items()} for name, slots in states.items()}
        grads = torch.autograd.grad(loss(params, leaves), list(params.values()), create_graph=True)
        params, states = optimizer(params, dict(zip(params, grads, strict=True)), states, leaves)
    found = torch.autograd.grad(network.problem.val_loss(params, leaves), list(leaves.values()))
    return dict(zip(leaves, found, strict=True))


@every_optimizer
def test_reverse_mode_is_autograd_through_the_training(network: Any, optimizer: FunctionalOptimizer) -> None:
    hparams = tuned(network)
    settings: dict[str, Any] = {"steps": 6, "optimizer": optimizer, "train_losses": batches(network)}
    found = unrolled(network.problem, network.params, hparams, **settings).gradients
    torch.testing.assert_close(found, recorded(network, hparams, optimizer), rtol=1e-10, atol=1e-10)
    by_differences = unrolled(network.problem, network.params, hparams, product="fd", **settings).gradients
    torch.testing.assert_close(by_differences, found, rtol=1e-5, atol=1e-5)


@every_optimizer
def test_truncation_forgets_what_was_before(network: Any, optimizer: FunctionalOptimizer) -> None:
    hparams = tuned(network)
    settings: dict[str, Any] = {"steps": 6, "optimizer": optimizer, "train_losses": batches(network)}
    found = truncated(network.problem, network.params, hparams, keep=2, **settings).gradients
    torch.testing.assert_close(found, recorded(network, hparams, optimizer, first=4), rtol=1e-10, atol=1e-10)


@every_optimizer
def test_forward_mode_is_reverse_mode_and_may_be_cut_in_pieces(network: Any, optimizer: FunctionalOptimizer) -> None:
    hparams, losses = tuned(network), batches(network)
    whole = unrolled(network.problem, network.params, hparams, steps=6, optimizer=optimizer, train_losses=losses)
    at_once = forward(network.problem, network.params, hparams, steps=6, optimizer=optimizer, train_losses=losses)
    torch.testing.assert_close(at_once.gradients, whole.gradients, rtol=1e-10, atol=1e-10)
    params, states, state = network.params, None, None
    for piece in (losses[:4], losses[4:]):
        settings: dict[str, Any] = {
            "optimizer": optimizer,
            "steps": len(piece),
            "train_losses": piece,
            "states": states,
        }
        result = forward(network.problem, params, hparams, state, **settings)
        params, states = unroll(network.problem, params, hparams, **settings)
        state = result.state
    torch.testing.assert_close(result.gradients, whole.gradients, rtol=1e-10, atol=1e-10)


def test_losses_may_be_a_function_of_the_step(network: Any) -> None:
    losses, optimizer = batches(network), OPTIMIZERS["sgd"]
    inputs = network.problem, network.params, tuned(network)
    as_list = unrolled(*inputs, steps=6, optimizer=optimizer, train_losses=losses)
    as_function = unrolled(*inputs, steps=6, optimizer=optimizer, train_losses=lambda index: losses[index])
    torch.testing.assert_close(as_list.gradients, as_function.gradients, rtol=0.0, atol=0.0)


def test_finite_differences_of_the_whole_training(network: Any) -> None:
    hparams, optimizer = tuned(network), OPTIMIZERS["adamw"]
    found = unrolled(network.problem, network.params, hparams, steps=6, optimizer=optimizer).gradients

    def loss(values: Tensors) -> Tensor:
        return network.problem.val_loss(
            unroll(network.problem, network.params, values, steps=6, optimizer=optimizer).params, values
        )

    for name, value in hparams.items():
        for index in range(value.numel()):
            move = 1e-6 * torch.eye(value.numel()).double()[index].view_as(value)
            slope = (loss(hparams | {name: value + move}) - loss(hparams | {name: value - move})) / 2e-6
            torch.testing.assert_close(found[name].flatten()[index], slope, rtol=1e-6, atol=1e-7)


def test_unrolling_approaches_the_implicit_answer_at_a_linear_rate(ridge: Any) -> None:
    x = ridge.x[::2]
    hessian = x.T @ x / len(x) + torch.diag(ridge.hparams["log_decay"].exp())
    contraction = float(1 - 0.1 * torch.linalg.eigvalsh(hessian)[0])
    optimizer = functional_optimizer(sgd, lr=0.1)
    errors = []
    for steps in (160, 180, 200, 400):
        found = unrolled(ridge.problem, ridge.params, ridge.hparams, steps=steps, optimizer=optimizer)
        errors.append(float((found.gradients["log_decay"] - ridge.exact).norm()))
    assert errors[1] / errors[0] == pytest.approx(contraction**20, rel=0.05)
    assert errors[2] / errors[1] == pytest.approx(contraction**20, rel=0.05)
    assert errors[3] < 1e-12


def test_the_start_counts_as_given(ridge: Any) -> None:
    """Hyperparameters do not reach the loss through where training begins."""
    hparams = {"log_decay": ridge.hparams["log_decay"].clone().requires_grad_()}
    params = {name: value * hparams["log_decay"].sum() for name, value in ridge.params.items()}
    settings: dict[str, Any] = {"steps": 3, "optimizer": functional_optimizer(sgd, lr=0.1)}
    found = unrolled(ridge.problem, params, hparams, **settings).gradients
    cut = unrolled(ridge.problem, {k: v.detach() for k, v in params.items()}, ridge.hparams, **settings).gradients
    assert torch.equal(found["log_decay"], cut["log_decay"])
    assert not found["log_decay"].requires_grad


def test_a_gradient_of_zero_leaves_adam_differentiable() -> None:
    problem = Problem(lambda w, h: ((w["w"].relu() - h["goal"]) ** 2).sum(), lambda w, h: (w["w"] ** 2).sum())
    inputs = {"w": torch.tensor([-1.0, 2.0])}, {"goal": torch.tensor(1.0)}
    optimizer = functional_optimizer(adam, lr=0.1)
    for estimate in (unrolled, forward):
        found = estimate(problem, *inputs, steps=3, optimizer=optimizer).gradients["goal"]  # type: ignore[operator]
        assert found.isfinite()
        assert found != 0


def test_settings_of_one_group_may_differ_by_parameter(network: Any) -> None:
    """Any function of the right form is an optimizer: here each layer has its own learning rate."""

    def optimizer(params: Any, grads: Any, states: Any, hparams: Any) -> Any:
        moved = {}
        for index, name in enumerate(params):
            moved |= step_all(sgd, {name: params[name]}, grads, states, lr=hparams["lrs"][index])[0]
        return moved, {}

    hparams = network.hparams | {"lrs": torch.tensor([0.1, 0.2]).double()}
    reverse = unrolled(network.problem, network.params, hparams, steps=4, optimizer=optimizer).gradients
    ahead = forward(network.problem, network.params, hparams, steps=4, optimizer=optimizer).gradients
    torch.testing.assert_close(reverse, ahead, rtol=1e-10, atol=1e-10)
    assert (reverse["lrs"] != 0).all()


@pytest.mark.parametrize("estimate", [unrolled, forward])
def test_wrong_numbers_of_steps_are_refused(network: Any, estimate: Any) -> None:
    inputs: Any = network.problem, network.params, tuned(network)
    with pytest.raises(ValueError, match="steps must be at least 1, got 0; there are 6 train_losses for 0 steps"):
        estimate(*inputs, steps=0, optimizer=OPTIMIZERS["sgd"], train_losses=batches(network))
    with pytest.raises(ValueError, match="keep must be from 1 to steps=3, got 4"):
        truncated(*inputs, steps=3, keep=4, optimizer=OPTIMIZERS["sgd"])
    residual = Problem(network.problem.train_loss, network.problem.val_loss, residual=lambda w, h: w)
    with pytest.raises(ValueError, match="unrolling follows the optimizer, not `residual`"):
        estimate(residual, *inputs[1:], steps=3, optimizer=OPTIMIZERS["sgd"])
