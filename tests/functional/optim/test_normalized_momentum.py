"""Against the recursion, torch's SGD, and the length of a step."""

import copy

import pytest
import torch
from torch import Tensor

from lightning_hpo.functional.optim.normalized_momentum import NormalizedMomentum


def parameters(dtype: torch.dtype = torch.float64) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(*s, generator=generator).to(dtype)) for s in ((3, 2), (4,))]


def set_gradients(params: list[torch.nn.Parameter], step: int, scale: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    for p in params:
        p.grad = (scale * torch.randn(p.shape, generator=generator)).to(p.dtype)
    return [p.grad for p in params if p.grad is not None]


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.detach().flatten() for t in tensors])


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("normalize", ["global", "per_group", False])
def test_recursion(normalize: str | bool, maximize: bool) -> None:
    params = parameters()
    optimizer = NormalizedMomentum(
        [{"params": [params[0]]}, {"params": [params[1]], "lr": 0.5, "momentum": 0.2}],
        lr=0.1,
        normalize=normalize,
        maximize=maximize,
    )
    x, m = [p.detach().clone() for p in params], [torch.zeros_like(p) for p in params]
    sign = -1 if maximize else 1
    for step in range(6):
        gradients = set_gradients(params, step)
        m = [b * mk + (1 - b) * sign * g for b, mk, g in zip((0.9, 0.2), m, gradients, strict=True)]
        whole = flat(m).norm()
        norms = {"global": [whole, whole], "per_group": [mk.norm() for mk in m], False: [1.0, 1.0]}[normalize]
        x = [xk - lr * mk / n for lr, xk, mk, n in zip((0.1, 0.5), x, m, norms, strict=True)]
        optimizer.step()
        torch.testing.assert_close(flat(params), flat(x), rtol=1e-13, atol=1e-14)


def test_without_normalisation_it_is_sgd_with_dampening() -> None:
    ours, theirs = parameters(), parameters()
    mine = NormalizedMomentum(ours, lr=0.1, momentum=0.7, normalize=False)
    reference = torch.optim.SGD(theirs, lr=0.1, momentum=0.7, dampening=0.7)
    for p in theirs:  # torch begins with the first gradient undamped
        reference.state[p]["momentum_buffer"] = torch.zeros_like(p)
    for step in range(8):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        mine.step()
        reference.step()
    torch.testing.assert_close(flat(ours), flat(theirs), rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_steps_have_the_length_of_the_learning_rate(scale: float) -> None:
    params = parameters()
    optimizer = NormalizedMomentum(params, lr=0.3)
    for step in range(4):
        before = flat(params)
        set_gradients(params, step, scale)
        optimizer.step()
        assert (flat(params) - before).norm().item() == pytest.approx(0.3, abs=1e-12)


def test_a_schedule_shortens_steps_and_a_short_momentum_does_too() -> None:
    params = parameters()
    optimizer = NormalizedMomentum(params, lr=0.3, min_norm=1e3)
    before = flat(params)
    gradients = set_gradients(params, 0)
    optimizer.step()
    expected = 0.3 * 0.1 * flat(gradients).norm().item() / 1e3
    assert (flat(params) - before).norm().item() == pytest.approx(expected, rel=1e-12)
    params = parameters()
    optimizer = NormalizedMomentum(params, lr=0.3)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    for step in range(3):
        before = flat(params)
        set_gradients(params, step)
        optimizer.step()
        schedule.step()
        assert (flat(params) - before).norm().item() == pytest.approx(0.3 * 0.5**step, rel=1e-12)


def test_a_gradient_of_zero_moves_nothing() -> None:
    params = parameters()
    optimizer = NormalizedMomentum(params, lr=0.3)
    before = flat(params)
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert torch.equal(flat(params), before)
    optimizer.zero_grad()
    assert optimizer.step() is None
    assert torch.equal(flat(params), before)


def test_resumes_bit_for_bit() -> None:
    params = parameters()
    optimizer = NormalizedMomentum(params, lr=0.3)
    for step in range(3):
        set_gradients(params, step)
        optimizer.step()
    copies = [torch.nn.Parameter(p.detach().clone()) for p in params]
    other = NormalizedMomentum(copies, lr=1.0)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for step in range(3, 5):
        set_gradients(params, step)
        set_gradients(copies, step)
        optimizer.step()
        other.step()
    assert torch.equal(flat(params), flat(copies))


def test_momenta_of_narrow_parameters_are_wide() -> None:
    params = parameters(torch.bfloat16)
    optimizer = NormalizedMomentum(params, lr=0.3)
    set_gradients(params, 0)
    optimizer.step()
    assert {state["momentum_buffer"].dtype for state in optimizer.state.values()} == {torch.float32}
    assert {p.dtype for p in params} == {torch.bfloat16}


def test_a_closure_is_evaluated_with_gradients() -> None:
    weight = torch.nn.Parameter(torch.tensor([2.0]))
    optimizer = NormalizedMomentum([weight], lr=0.5)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = weight.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 4.0
    assert weight.item() == pytest.approx(1.5)


def test_wrong_settings_are_listed_at_once() -> None:
    with pytest.raises(ValueError, match=r"lr must be positive, got 0; momentum must be in \[0, 1\), got 1.0; normal"):
        NormalizedMomentum(parameters(), lr=0, momentum=1.0, normalize="all", min_norm=0.0)


def test_sparse_gradients_are_refused() -> None:
    weight = torch.nn.Parameter(torch.zeros(2))
    weight.grad = torch.zeros(2).to_sparse()
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        NormalizedMomentum([weight]).step()
