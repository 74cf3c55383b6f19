"""Windows whose gradient is the mean over samples."""

import random

import pytest
import torch

from lightning_hpo.accumulation import AccumulationWindow


@pytest.mark.parametrize("seed", range(10))
def test_any_window_gives_the_gradient_of_the_joined_batch(seed):
    source = random.Random(seed)
    sizes = [source.randint(1, 5) for _ in range(source.randint(1, 6))]
    planned = len(sizes) + source.randint(0, 3)
    samples = torch.randn(sum(sizes), 3, dtype=torch.double)
    weight = torch.randn(3, dtype=torch.double, requires_grad=True)
    unused = torch.zeros(2, requires_grad=True)

    def loss(rows):
        return (rows @ weight).square().mean()

    window = AccumulationWindow()
    for rows in samples.split(sizes):
        window.add(len(rows), [weight, unused])
        (loss(rows) / planned).backward()
    window.finish([weight, unused], planned)
    (expected,) = torch.autograd.grad(loss(samples), weight)
    torch.testing.assert_close(weight.grad, expected, rtol=1e-12, atol=1e-12)
    assert window.samples == sum(sizes)
    assert unused.grad is None


def test_full_even_windows_are_not_touched():
    weight = torch.ones(1, requires_grad=True)
    window = AccumulationWindow()
    for _ in range(3):
        window.add(4, [weight])
        (weight / 3).sum().backward()
    version = weight.grad._version
    window.finish([weight], 3)
    assert weight.grad._version == version
    window.reset()
    assert window.samples == 0


def test_ten_micro_batches_of_four_give_one_one_one():
    """A loss with slope 1: Lightning alone gives 1, 1, 0.5."""
    weight, found = torch.zeros(1, requires_grad=True), []
    window = AccumulationWindow()
    for batch in range(10):
        if batch % 4 == 0:
            weight.grad = None
            window.reset()
        window.add(2, [weight])
        (weight.sum() / 4).backward()
        if batch % 4 == 3 or batch == 9:
            window.finish([weight], 4)
            found.append(weight.grad.item())
    assert found == [1.0, 1.0, 1.0]
