"""Draws of conditions: the same wherever they are made, other ones for another seed, and spread out."""

import pytest
import torch

from lightning_hpo.functional.bilevel.condition_draws import sample_conditions


def test_a_draw_follows_from_its_number():
    whole = sample_conditions(range(200), 2, seed=3)
    torch.testing.assert_close(sample_conditions(range(57, 120), 2, seed=3), whole[57:120], rtol=0, atol=0)
    ranks = [sample_conditions(range(10 + rank, 90, 4), 2, seed=3) for rank in range(4)]
    assert torch.equal(torch.stack(ranks, 1).flatten(0, 1), whole[10:90])
    assert not torch.equal(sample_conditions(range(200), 2, seed=4), whole)


def test_strata_and_what_they_are_good_for():
    """Means of 32 stratified draws scatter far less than those of independent ones: 1/n instead of 1/sqrt(n)."""
    stratified, uniform = (
        sample_conditions(range(3200), 2, stratified=s).unflatten(0, (100, 32)) for s in (True, False)
    )
    assert torch.equal((stratified * 32).long().sort(1).values[0, :, 1], torch.arange(32))
    for draws in (stratified, uniform):
        assert draws.mean().item() == pytest.approx(0.5, abs=0.02)
        assert draws.var().item() == pytest.approx(1 / 12, abs=0.005)
    assert uniform.mean(1).std().item() == pytest.approx((1 / 12 / 32) ** 0.5, rel=0.2)
    assert stratified.mean(1).std().item() == pytest.approx((1 / 12 / 32) ** 0.5 / 32, rel=0.2)
    correlation = torch.corrcoef(stratified.flatten(0, 1).T)[0, 1]
    assert abs(correlation) < 0.06


@pytest.mark.parametrize("seed", [1, 2**31 - 1, 2**32, 2**32 + 1, 2**40, -1])
def test_all_of_a_seed_counts(seed):
    assert not torch.equal(sample_conditions(range(64), 2, seed=seed), sample_conditions(range(64), 2))


def test_another_seed_is_no_later_stretch_of_the_same_draws():
    """340573321 times the golden ratio is one, modulo 2**32: as an offset it once moved the draws by a block."""
    mine, other = (sample_conditions(range(32 * 64), 1, seed=seed)[:, 0] for seed in (0, 340573321))
    assert torch.isin(other, mine).float().mean() < 0.01


def test_no_draws_and_none_before_the_first():
    assert sample_conditions(range(5, 5), 3).shape == (0, 3)
    with pytest.raises(ValueError, match=r"numbered from 0 on, got range\(-1, 3\)"):
        sample_conditions(range(-1, 3), 1)
