"""Norms of micro-batches' own gradients."""

import torch
from torch import nn

from lightning_hpo.gradients import GroupNorms, squared_norm


def test_norms_are_those_of_each_backward_pass_alone():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    norms = GroupNorms(net.parameters())
    for _ in range(3):  # gradients accumulate; what is noted does not
        batch = torch.randn(6, 4, dtype=torch.double)
        gradients = torch.autograd.grad(net(batch).square().mean(), list(net.parameters()))
        expected = sum(gradient.square().sum() for gradient in gradients)
        norms.clear()  # `autograd.grad` runs the hooks, too
        net(batch).square().mean().backward()
        norms.close(1)
        torch.testing.assert_close(norms.weighted_squares(), expected, rtol=1e-12, atol=0)
    norms.clear()
    norms.enabled = False
    net(torch.randn(2, 4, dtype=torch.double)).sum().backward()
    norms.close(1)
    assert norms.weighted_squares() == 0
    norms.remove()
    assert all(not p._backward_hooks for p in net.parameters())


def test_large_and_small_parameters_count_alike():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(300, 200), nn.Tanh(), nn.Linear(200, 2)).double()  # one is summed up at once
    norms, expected = GroupNorms(net.parameters()), torch.zeros((), dtype=torch.double)
    for samples in (6, 4, 6):  # micro-batches of two sizes
        batch = torch.randn(samples, 300, dtype=torch.double)
        gradients = torch.autograd.grad(net(batch).square().mean(), list(net.parameters()))
        expected = expected + samples * squared_norm(gradients)
        norms.drop()
        net(batch).square().mean().backward()
        norms.close(samples)
    torch.testing.assert_close(norms.weighted_squares(), expected, rtol=1e-12, atol=0)
    norms.clear()
    assert norms.weighted_squares() == 0


def test_no_more_than_a_few_small_gradients_are_held():
    weight = torch.zeros(3, requires_grad=True)
    norms = GroupNorms([weight])
    for _ in range(1000):
        weight.sum().backward()
        norms.close(2)
        assert sum(len(small) for _, small in norms._closed.values()) <= 64
    torch.testing.assert_close(norms.weighted_squares(), torch.tensor(6000.0, dtype=torch.double))


def test_half_precision_does_not_overflow():
    weight = torch.zeros(1000, dtype=torch.float16, requires_grad=True)
    norms = GroupNorms([weight])
    (weight * 6e4).sum().backward()
    norms.close(1)
    torch.testing.assert_close(
        norms.weighted_squares(), torch.tensor(1000 * 59999.0**2, dtype=torch.double), rtol=1e-3, atol=0
    )


def test_frozen_parameters_are_left_out():
    frozen, free = torch.ones(2), torch.ones(2, requires_grad=True)
    norms = GroupNorms([frozen, free])
    (frozen * free).sum().backward()
    norms.close(1)
    torch.testing.assert_close(norms.weighted_squares(), torch.tensor(2.0, dtype=torch.double))


def test_squared_norm_is_a_sum_over_tensors():
    torch.testing.assert_close(
        squared_norm([torch.full((3, 2), 2.0), torch.full((4,), 1.0, dtype=torch.bfloat16)]),
        torch.tensor(28.0, dtype=torch.double),
    )
