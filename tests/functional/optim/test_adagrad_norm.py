"""Against the scalar recursion and torch's Adagrad, and without the slips of the official optimizer."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lightning_hpo.functional.optim.adagrad_norm import AdaGradNorm


def network(dtype: torch.dtype = torch.float64) -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Tanh(), torch.nn.Linear(3, 1)).to(dtype)


def take_steps(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    dtype = next(model.parameters()).dtype
    for step in steps:
        inputs = torch.randn(8, 4, generator=torch.Generator().manual_seed(step)).to(dtype)
        optimizer.zero_grad()
        model(inputs).square().mean().backward()
        optimizer.step()


def weights(model: torch.nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def gradient(model: torch.nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize(("weight_decay", "maximize"), [(0.0, False), (0.3, False), (0.0, True), (0.3, True)])
def test_one_number_follows_the_recursion(weight_decay: float, maximize: bool) -> None:
    model = network()
    settings = {"lr": 0.3, "eps": 1e-3, "initial_accumulator": 0.04, "weight_decay": weight_decay}
    optimizer = AdaGradNorm(model.parameters(), maximize=maximize, **settings)
    total, x = 0.04, weights(model)
    for step in range(5):
        take_steps(model, optimizer, range(step, step + 1))
        g = (-1 if maximize else 1) * gradient(model) + weight_decay * x
        total += float(g @ g)
        x = x - 0.3 * g / (math.sqrt(total) + 1e-3)
        torch.testing.assert_close(weights(model), x, rtol=1e-12, atol=1e-14)
        assert optimizer.accumulator.item() == pytest.approx(total, rel=1e-12)


@pytest.mark.parametrize(("weight_decay", "maximize"), [(0.0, False), (0.2, False), (0.2, True)])
def test_with_one_parameter_it_is_adagrad(weight_decay: float, maximize: bool) -> None:
    ours, theirs = (torch.nn.Parameter(torch.tensor([2.0], dtype=torch.float64)) for _ in range(2))
    common = {"lr": 0.5, "weight_decay": weight_decay, "maximize": maximize, "eps": 1e-10}
    mine = AdaGradNorm([ours], initial_accumulator=0.01, **common)
    reference = torch.optim.Adagrad([theirs], initial_accumulator_value=0.01, **common)
    for step in range(20):
        for parameter, optimizer in ((ours, mine), (theirs, reference)):
            optimizer.zero_grad()
            ((parameter - 0.1 * step) ** 2).sum().backward()
            optimizer.step()
        torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=0)


# Slips of the official code


def test_one_accumulator_for_everything_not_one_per_output_row() -> None:
    model = network()
    optimizer = AdaGradNorm(model.parameters(), lr=0.1)
    before = weights(model)
    take_steps(model, optimizer, range(1))
    assert optimizer.accumulator.shape == ()
    assert list(optimizer.state) == ["sum"]
    ratios = (weights(model) - before) / gradient(model)
    torch.testing.assert_close(ratios, ratios[:1].expand_as(ratios), rtol=1e-8, atol=0)  # every coordinate alike


def test_weight_decay_adds_the_parameter_not_the_gradient() -> None:
    parameter = torch.nn.Parameter(torch.tensor([3.0, -4.0], dtype=torch.float64))
    optimizer = AdaGradNorm([parameter], lr=1.0, weight_decay=0.5, initial_accumulator=0.0)
    parameter.grad = torch.zeros_like(parameter)  # adding the gradient would change nothing
    optimizer.step()
    expected = torch.tensor([3.0 - 0.6, -4.0 + 0.8], dtype=torch.float64)
    torch.testing.assert_close(parameter.data, expected)


# Groups, types, what is missing


def test_groups_share_the_number_and_have_their_own_learning_rates() -> None:
    model = network()
    first, second = model[0].parameters(), model[2].parameters()
    optimizer = AdaGradNorm([{"params": first, "lr": 0.2}, {"params": second, "weight_decay": 0.1}], lr=0.4)
    before = [p.detach().clone() for p in model.parameters()]
    take_steps(model, optimizer, range(1))
    gradients = [p.grad for p in model.parameters()]
    directions = [*gradients[:2], *(g + 0.1 * p for g, p in zip(gradients[2:], before[2:], strict=True))]
    norm = math.sqrt(0.01 + sum(float(d.square().sum()) for d in directions)) + 1e-10
    rates = [0.2, 0.2, 0.4, 0.4]
    for old, new, direction, rate in zip(before, model.parameters(), directions, rates, strict=True):
        torch.testing.assert_close(new.detach(), old - rate * direction / norm, rtol=1e-12, atol=1e-14)


def test_parameters_without_gradient_are_left_out() -> None:
    used, unused = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    optimizer = AdaGradNorm([used, unused], weight_decay=0.1)
    optimizer.step()
    assert optimizer.accumulator.item() == pytest.approx(0.01)
    used.grad = torch.tensor([3.0, 4.0])
    optimizer.step()
    assert unused.tolist() == [1, 1]
    assert used[0] < 1


def test_a_closure_is_evaluated_with_gradients() -> None:
    parameter = torch.nn.Parameter(torch.tensor([2.0]))
    optimizer = AdaGradNorm([parameter])

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = parameter.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 4
    assert parameter.item() < 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_keeps_a_wide_sum(dtype: torch.dtype) -> None:
    parameter = torch.nn.Parameter(torch.ones(1000, dtype=dtype))
    optimizer = AdaGradNorm([parameter], lr=0.1, initial_accumulator=0.0)
    for _ in range(300):  # in bfloat16 the sum would stop growing at 256 times its increment
        parameter.grad = torch.full_like(parameter, 0.5)
        optimizer.step()
    assert optimizer.accumulator.dtype == torch.float32
    assert optimizer.accumulator.item() == pytest.approx(300 * 250, rel=1e-4)


def test_complex_parameters_count_with_their_modulus() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1, dtype=torch.complex64))
    optimizer = AdaGradNorm([parameter], initial_accumulator=0.0)
    parameter.grad = torch.tensor([3 + 4j])
    optimizer.step()
    assert optimizer.accumulator.item() == pytest.approx(25)
    torch.testing.assert_close(parameter.data, torch.tensor([-0.6 - 0.8j]))


def test_sparse_gradients_are_refused() -> None:
    table = torch.nn.Embedding(4, 2, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        AdaGradNorm(table.parameters()).step()


def test_a_tensor_may_be_the_learning_rate() -> None:
    model, other = network(), network()
    take_steps(model, AdaGradNorm(model.parameters(), lr=torch.tensor(0.3, dtype=torch.float64)), range(2))
    take_steps(other, AdaGradNorm(other.parameters(), lr=0.3), range(2))
    torch.testing.assert_close(weights(model), weights(other))


# State


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_training_goes_on_from_a_weights_only_file(dtype: torch.dtype, tmp_path: Path) -> None:
    whole, first, second = network(dtype), network(dtype), network(dtype)
    optimizer = AdaGradNorm(whole.parameters(), lr=0.2, weight_decay=0.1)
    take_steps(whole, optimizer, range(6))

    interrupted = AdaGradNorm(first.parameters(), lr=0.2, weight_decay=0.1)
    take_steps(first, interrupted, range(3))
    torch.save([first.state_dict(), interrupted.state_dict()], tmp_path / "state.pt")
    kept = interrupted.accumulator.clone()
    take_steps(first, interrupted, range(3, 4))  # what was saved must not move any more

    resumed = AdaGradNorm(second.parameters(), lr=1.0)
    parameters, state = torch.load(tmp_path / "state.pt", weights_only=True)
    second.load_state_dict(parameters)
    resumed.load_state_dict(state)
    assert resumed.accumulator.dtype == kept.dtype  # not cast to the type of a parameter
    assert torch.equal(resumed.accumulator, kept)
    take_steps(second, resumed, range(3, 6))
    assert torch.equal(weights(second), weights(whole))
    assert torch.equal(resumed.accumulator, optimizer.accumulator)


def test_a_state_dict_is_a_snapshot() -> None:
    model = network()
    optimizer = AdaGradNorm(model.parameters())
    take_steps(model, optimizer, range(1))
    state = optimizer.state_dict()
    before = state["state"]["sum"].clone()
    take_steps(model, optimizer, range(1, 3))
    assert torch.equal(state["state"]["sum"], before)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"lr": -1.0, "eps": math.nan}, "lr must not be negative, got -1.0; eps must not be negative, got nan"),
        ({"initial_accumulator": -1.0}, "initial_accumulator must not be negative"),
        ({"weight_decay": -1.0}, "weight_decay must not be negative"),
        ({"eps": 0.0, "initial_accumulator": 0.0}, "must not both be 0"),
    ],
)
def test_wrong_arguments_are_listed(arguments: dict[str, float], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        AdaGradNorm([torch.nn.Parameter(torch.zeros(1))], **arguments)


@pytest.mark.gpu
def test_nothing_is_read_to_the_host() -> None:
    model = network(torch.float32).cuda()
    optimizer = AdaGradNorm(model.parameters(), weight_decay=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()  # brings the number to the device
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
