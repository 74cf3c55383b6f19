"""From kept counts to schedules and from a budget to a gradient on the raw rates."""

import pytest
import torch

from lightning_hpo.functional.compression.diffrate import candidate_counts, kept_tokens
from lightning_hpo.functional.compression.macs import BlockMacs, TransformerMacs
from lightning_hpo.functional.compression.rates import RateLayout

WIDTH, DEPTH, PATCHES = 24, 5, 36


def vit_layout(exempt=(True, False, False, False, False)):
    return RateLayout(TransformerMacs.vit(WIDTH, DEPTH, PATCHES, classes=10), exempt)


def hierarchical_layout():
    cost = TransformerMacs(1000, (36, 36, 36, 9, 9), (BlockMacs.vit(8),) * 3 + (BlockMacs.vit(16),) * 2)
    return RateLayout(cost, (True, False, True, True, True), prefix=0, prunes=False)


class PassingMinimum(torch.autograd.Function):
    """The official minimum: its gradient goes unchanged to both kept counts and never to the previous count."""

    @staticmethod
    def forward(ctx, before, prune, merge):
        return torch.minimum(torch.minimum(before, prune), merge)

    @staticmethod
    def backward(ctx, grad):
        return None, grad, grad


def step_seven(prune, merge):
    """Multiply-accumulates as in step 7 of the method, one block after the other."""
    tokens = torch.tensor(PATCHES + 1.0, dtype=prune.dtype)
    total = tokens * WIDTH * 16 * 16 * 3 + WIDTH * 10
    for p, m in zip(prune, merge, strict=True):
        total = total + 4 * tokens * WIDTH**2 + 2 * tokens**2 * WIDTH
        tokens = PassingMinimum.apply(tokens, p, m)
        total = total + 8 * tokens * WIDTH**2
    return total


def raw_rates(rows, seed):
    raw = torch.randn(2, rows, PATCHES, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return raw.mul(2).requires_grad_()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("budget", "weight", "unit"), [(3e6, 5.0, 1e6), (1.2e7, 100.0, 1.5e7)])
def test_budget_gradient_on_the_raw_rates_equals_autograd_of_step_seven(seed, budget, weight, unit):
    layout, candidates = vit_layout(), candidate_counts(PATCHES)
    raw, twin = raw_rates(4, seed), raw_rates(4, seed)
    macs, loss, slope = layout.budget_slope(kept := kept_tokens(raw.softmax(-1), candidates, 0), budget, weight, unit)
    kept.backward(slope)

    prune, merge = torch.cat([torch.full((2, 1), PATCHES + 1.0), kept_tokens(twin.softmax(-1), candidates)], 1)
    expected = step_seven(prune, merge)
    by_autograd = weight * ((expected - budget) / unit) ** 2
    by_autograd.backward()
    torch.testing.assert_close(macs, expected.detach())
    torch.testing.assert_close(loss, by_autograd.detach())
    torch.testing.assert_close(raw.grad, twin.grad)
    assert raw.grad.abs().amax((0, 2)).min() > 0


def test_budget_gradient_on_the_raw_rates_is_the_closed_form():
    """2 w (F - T) / u² · dF/dK_l · p_i (c_i - E[c]) with dF/dK_l = 8C² + [l < L-1] (4C² + 4 N_l C)."""
    layout, candidates = vit_layout(), candidate_counts(PATCHES).double()
    raw = raw_rates(4, seed=7)
    probabilities = raw.softmax(-1)
    kept = kept_tokens(probabilities, candidates, prefix=0)
    macs, _, slope = layout.budget_slope(kept, budget=4e6, weight=3.0, unit=1e6)
    kept.backward(slope)

    alive, expected = float(PATCHES), torch.zeros_like(raw)
    for row in range(4):
        alive = min(alive, *kept[:, row].tolist())
        inner = 4 * WIDTH**2 + 4 * (alive + 1) * WIDTH if row < 3 else 0
        p = probabilities[:, row].detach()
        centred = p * (candidates - (p * candidates).sum(-1, keepdim=True))
        expected[:, row] = 2 * 3.0 * (macs - 4e6) / 1e12 * (8 * WIDTH**2 + inner) * centred
    torch.testing.assert_close(raw.grad, expected)


def test_min_sends_macs_gradient_to_both_proxies():
    """Also to the one that does not bind, and when an earlier block has left fewer tokens than either."""
    layout = vit_layout()
    kept = torch.tensor([[5.0, 30.0, 20.0, 4.0], [9.0, 36.0, 3.0, 4.0]])
    slope = layout.budget_slope(kept, budget=1.0, weight=1.0, unit=1e6)[2]
    assert slope.shape == kept.shape
    torch.testing.assert_close(slope[0], slope[1])
    assert (slope > 0).all()


def test_relative_and_absolute_macs_loss():
    layout, kept = vit_layout(), torch.full((2, 4), 12.0)
    full = float(layout.cost.full)
    macs, absolute, steep = layout.budget_slope(kept, 0.4 * full, 5.0, 1e9)
    _, relative, gentle = layout.budget_slope(kept, 0.4 * full, 100.0, full)
    assert absolute.item() == pytest.approx(5 * ((macs.item() - 0.4 * full) / 1e9) ** 2, rel=1e-4)
    assert relative.item() == pytest.approx(100 * (macs.item() / full - 0.4) ** 2, rel=1e-4)
    torch.testing.assert_close(steep * 1e18 / 5, gentle * full**2 / 100)
    block = layout.cost.blocks[0]
    blocks = (BlockMacs(100 * block.attention, 100 * block.pair, 100 * block.mlp),) * DEPTH
    large = RateLayout(TransformerMacs(100 * layout.cost.fixed, layout.cost.entry, blocks), layout.exempt)
    _, absolute_large, _ = large.budget_slope(kept, 40 * full, 5.0, 1e9)
    _, relative_large, _ = large.budget_slope(kept, 40 * full, 100.0, 100 * full)
    assert relative_large.item() == pytest.approx(relative.item(), rel=1e-4)  # the weight means the same everywhere
    assert absolute_large.item() == pytest.approx(1e4 * absolute.item(), rel=1e-4)


@pytest.mark.parametrize("budget", [1.0, 1e12])
def test_slope_points_to_the_budget(budget):
    _, _, slope = vit_layout().budget_slope(torch.full((2, 4), 12.0), budget, 1.0, 1e6)
    assert (slope > 0).all() if budget == 1.0 else (slope < 0).all()


def test_counts_of_exempt_blocks_are_what_enters():
    layout = vit_layout((True, False, True, False, True))
    prune, merge = layout.counts(torch.tensor([[20.0, 7.0], [15.0, 9.0]]))
    assert prune.tolist() == [37, 21, 37, 8, 37]
    assert merge.tolist() == [37, 16, 37, 10, 37]
    prune, merge = hierarchical_layout().counts(torch.tensor([[20.0]]))
    assert prune.tolist() == [36, 36, 36, 9, 9]
    assert merge.tolist() == [36, 20, 36, 9, 9]


def test_schedule_is_the_running_minimum_with_its_cost():
    layout = vit_layout()
    kept = torch.tensor([[30.0, 33.0, 12.0, 9.0], [25.0, 20.0, 36.0, 4.0]])
    schedule = layout.schedule(kept)
    assert schedule.prune == (37, 31, 26, 13, 10)
    assert schedule.merge == (37, 26, 21, 13, 5)
    assert schedule.nonmonotone() == ()
    prune, merge = (counts.double() for counts in layout.counts(kept))
    assert schedule.macs == step_seven(prune, merge).item()
    assert schedule.full_macs == layout.cost.full


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_rates_that_are_not_finite(value):
    kept = torch.full((2, 4), 9.0)
    kept[1, 2] = value
    with pytest.raises(ValueError, match="rates are not finite because the training loss was not"):
        vit_layout().schedule(kept)


@pytest.mark.parametrize(("granularity", "fewest"), [(1, 1), (4, 4), (5, 1), (7, 1), (36, 36), (10, 6)])
def test_reachable_bounds_are_those_of_the_fewest_candidates(granularity, fewest):
    layout = vit_layout()
    assert candidate_counts(PATCHES, granularity).min() == fewest
    least, full = layout.reachable(granularity)
    counts = torch.tensor([PATCHES + 1.0, *[fewest + 1.0] * 4]).double()
    assert least == step_seven(counts, counts).item()
    assert full == layout.cost.full


def test_target_out_of_reach_is_known_for_a_hierarchical_network():
    layout = hierarchical_layout()
    least, full = layout.reachable()
    assert least == layout.cost.count((36, 36, 36, 9, 9), (36, 1, 1, 9, 9)) < full == layout.cost.full


# Tokens that merge in pairs


def paired_layout(exempt=(False,) * DEPTH):
    return RateLayout(TransformerMacs.vit(WIDTH, DEPTH, PATCHES, classes=10), exempt, prunes=False, halves=True)


@pytest.mark.parametrize("exempt", [(False,) * DEPTH, (False, False, True, False, True)])
def test_a_block_gives_up_at_most_half_and_the_cost_says_so(exempt):
    layout = paired_layout(exempt)
    kept = torch.tensor([[30.0, 3.0, 1.0, 1.0, 20.0]])[:, : len(layout.blocks)]
    schedule = layout.schedule(kept)
    expected, alive, learned = [], PATCHES, iter(kept[0].tolist())
    for spared in exempt:
        alive = alive if spared else min(alive, max(int(next(learned)), -(-alive // 2)))
        expected.append(alive + 1)
    assert schedule.merge == tuple(expected)
    assert schedule.macs == layout.cost.count(schedule.prune, schedule.merge)
    assert layout.budget_slope(kept, 1.0, 1.0, 1.0)[0].item() == pytest.approx(schedule.macs)
    least, full = layout.reachable()
    assert layout.schedule(torch.ones_like(kept)).macs == least < schedule.macs < full


@pytest.mark.parametrize("share", [0.55, 0.7, 0.9])
@pytest.mark.parametrize("granularity", [1, 4])
def test_learning_begins_with_equal_drops_at_the_budget(share, granularity):
    layout = paired_layout()
    budget = share * layout.cost.full
    start = layout.start(budget, granularity)
    assert start.shape == (1, DEPTH, len(candidate_counts(PATCHES, granularity)))
    torch.testing.assert_close(start.sum(-1), torch.ones(1, DEPTH))
    assert start.min() > 0
    kept = kept_tokens(start, candidate_counts(PATCHES, granularity), prefix=0)
    drops = -torch.diff(kept, prepend=torch.full((1, 1), float(PATCHES)))
    if share > 0.6:  # below, the last blocks cannot give up as many any more
        assert drops.max() - drops.min() <= 1
    assert layout.schedule(kept).macs == pytest.approx(budget, rel=0.03)
