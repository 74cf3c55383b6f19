"""Seeds that follow from several numbers."""

import torch

from lightning_hpo.functional.seeding import mix_seed


def test_no_number_is_lost_and_none_is_like_another():
    grid = [(a, b, c) for a in range(12) for b in range(12) for c in range(12)]
    seeds = {mix_seed(*numbers) for numbers in grid} | {mix_seed(*numbers[:2]) for numbers in grid[::12]}
    assert len(seeds) == 12**3 + 12**2  # a packing into more than 32 bits has 12
    assert all(0 <= seed < 2**32 for seed in seeds)
    draws = {torch.rand(1, generator=torch.Generator().manual_seed(mix_seed(*numbers))).item() for numbers in grid}
    assert len(draws) > 12**3 - 3  # there are 2**24 numbers to draw


def test_bits_are_spread():
    ones = torch.tensor([[mix_seed(7, step) >> bit & 1 for bit in range(32)] for step in range(4096)]).double().mean(0)
    assert (ones - 0.5).abs().max() < 5 * 0.5 / 64  # five standard deviations
    assert mix_seed(-1, 3) != mix_seed(1, 3)
    assert mix_seed(2**70) == mix_seed(2**70 + 2**64)  # 64 bits count
