"""Tokens through one block against the method written token by token, in both layouts."""

import pytest
import torch

from lightning_hpo.functional.compression.diffrate import KeptPlan, survival_probability
from lightning_hpo.nn.token_state import CompressionRules, RankedTokens, TokenState

PATCHES, WIDTH = 9, 4


def state_of(prefix=1, trace=True, **rules):
    state = TokenState(prefix, CompressionRules(**rules), trace)
    state.begin(torch.zeros(2, PATCHES + prefix, WIDTH), PATCHES + prefix, learns=False)
    return state


def tokens(prefix, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, PATCHES + prefix, WIDTH, generator=generator)
    scores = torch.rand(2, PATCHES, generator=generator)
    return x, RankedTokens(scores, torch.randn(2, PATCHES, 3, generator=generator))


def cosine(a, b):
    return torch.nn.functional.cosine_similarity(a, b, dim=0).item()


def block_by_loops(x, keys, scores, size, prune, merge, rules):
    """One image: {patch: (feature, size, members)} of the patches that are left, most important first."""
    order = sorted(scores, key=lambda j: -scores[j])[:prune]
    left = {j: (x[j], max(size[j], 1.0) if rules.clamp_sizes else size[j], [j]) for j in order[:merge]}
    metric = x if rules.matching == "features" else keys
    absorbed = {j: [x[j]] for j in left}
    for i in order[merge:]:
        best = max(left, key=lambda j: cosine(metric[i], metric[j]))
        grown = size[i] * cosine(metric[i], metric[best])
        absorbed[best].append(x[i])
        feature, total, members = left[best]
        left[best] = (feature, total + (max(grown, 1.0) if rules.clamp_sizes else grown), [*members, i])
    return {j: (torch.stack(absorbed[j]).mean(0), total, members) for j, (_, total, members) in left.items()}


RULES = [
    {},
    {"matching": "keys"},
    {"clamp_sizes": False},
    {"matching": "keys", "clamp_sizes": False},
]


@pytest.mark.parametrize("rules", RULES, ids=str)
@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
@pytest.mark.parametrize(("prune", "merge"), [(9, 9), (6, 6), (6, 4), (9, 1), (5, 1), (4, 7)])
def test_sliced_block_equals_the_loops(prune, merge, prefix, rules):
    state = state_of(prefix, **rules)
    for seed in range(4):
        x, ranked = tokens(prefix, seed)
        size = 1 + 3 * torch.rand(2, PATCHES)
        state.size, state.positions = size.clone(), None
        state.group = torch.arange(PATCHES).expand(2, -1)
        out = state.slice_tokens(x, ranked, prune + prefix, merge + prefix)
        assert out.shape == (2, min(prune, merge) + prefix, WIDTH)
        assert torch.equal(out[:, :prefix], x[:, :prefix])  # prefix tokens are neither sources nor destinations
        for b in range(2):
            scores = dict(enumerate(ranked.scores[b].tolist()))
            expected = block_by_loops(
                x[b, prefix:], ranked.keys[b], scores, size[b].tolist(), prune, merge, state.rules
            )
            assert state.positions[b].tolist() == list(expected)
            for row, (feature, total, members) in enumerate(expected.values()):
                torch.testing.assert_close(out[b, prefix + row], feature)
                if merge < prune:
                    assert state.size[b, row].item() == pytest.approx(total, abs=1e-5)
                assert sorted(members) == (state.group[b] == row).nonzero().flatten().tolist()
            pruned = PATCHES - sum(len(members) for *_, members in expected.values())
            assert (state.group[b] == -1).sum() == pruned


def plan_of(prune, merge):
    survival = survival_probability(torch.rand(2, PATCHES).softmax(-1), PATCHES)
    return KeptPlan(torch.tensor([float(prune), float(merge)]), survival)


@pytest.mark.parametrize("rules", RULES, ids=str)
@pytest.mark.parametrize("prefix", [0, 2])
def test_masked_blocks_equal_sliced_blocks_one_after_another(prefix, rules):
    """Also where a count exceeds the tokens alive, and with scores that tie."""
    masked, sliced = state_of(prefix, trace=False, **rules), state_of(prefix, **rules)
    x, ranked = tokens(prefix)
    whole = short = x
    for block, (prune, merge) in enumerate([(8, 8), (9, 7), (7, 5), (3, 4), (3, 2), (6, 6), (1, 1)]):
        scores = (tokens(prefix, block)[1].scores * 4).round()
        ranked = RankedTokens(scores, tokens(prefix, block)[1].keys)
        whole = masked.mask_tokens(whole, ranked, plan_of(prune, merge))
        positions = torch.arange(PATCHES).expand(2, -1) if sliced.positions is None else sliced.positions
        seen = RankedTokens(
            scores.gather(1, positions), ranked.keys.gather(1, positions.unsqueeze(-1).expand(-1, -1, 3))
        )
        # Ties go to the lowest place, so the sliced layout is brought into the order of places.
        place = positions.argsort(1)
        short = torch.cat([short[:, :prefix], take(short[:, prefix:], place)], 1)
        sliced.positions, seen = positions.gather(1, place), RankedTokens(*(take(t, place) for t in seen))
        sliced.size = None if sliced.size is None else sliced.size.gather(1, place)
        sliced.group = None
        short = sliced.slice_tokens(short, seen, prune + prefix, merge + prefix)
        assert masked.living.item() == short.shape[1] - prefix
        assert masked.mask.sum(1).tolist() == [short.shape[1] - prefix] * 2
        torch.testing.assert_close(take(whole[:, prefix:], sliced.positions), short[:, prefix:])
        if sliced.size is not None:
            torch.testing.assert_close(masked.size.gather(1, sliced.positions), sliced.size)
        assert masked.mask.detach().gather(1, sliced.positions).eq(1).all()


def take(x, index):
    return x.gather(1, index.reshape(*index.shape, *[1] * (x.ndim - 2)).expand(-1, -1, *x.shape[2:]))


def test_every_patch_is_in_one_group_or_pruned():
    state = state_of(prefix=1)
    x = tokens(1)[0]
    for prune, merge in [(9, 7), (6, 5), (4, 2)]:
        living = x.shape[1] - 1
        ranked = RankedTokens(torch.rand(2, living), torch.randn(2, living, 3))
        x = state.slice_tokens(x, ranked, prune + 1, merge + 1)
        assert state.group.shape == (2, PATCHES)
        assert state.group.min() >= -1
        for b in range(2):  # every token that is left stands for at least the patch at its own place
            assert set(state.group[b].tolist()) - {-1} == set(range(merge))
            assert state.group[b, state.positions[b]].tolist() == list(range(merge))


def test_log_of_non_positive_size_stays_finite_under_the_official_rule():
    state = state_of(clamp_sizes=False)
    opposite = torch.tensor([[1.0, 0, 0, 0]] * 5 + [[-1.0, 0, 0, 0]] * 5).expand(2, -1, -1)
    ranked = RankedTokens(torch.arange(PATCHES, 0, -1.0).expand(2, -1), torch.ones(2, PATCHES, 3))
    out = state.slice_tokens(opposite.contiguous(), ranked, 10, 5)
    assert state.size.min() <= 0
    assert torch.isfinite(state.log_size()).all()
    assert torch.isfinite(state.pool_weights(out, 0.0)).all()


def test_official_sizes_clamped_in_training_only():
    """The official code clamps while training and not at inference; here either rule holds in both layouts."""
    for clamp in (True, False):
        sizes = []
        for masked in (True, False):
            state = state_of(clamp_sizes=clamp)
            x, ranked = tokens(1, seed=3)
            if masked:
                state.mask_tokens(x, ranked, plan_of(9, 4))
                order = ranked.scores.argsort(1, descending=True)[:, :4]
                sizes.append(state.size.gather(1, order))
            else:
                state.slice_tokens(x, ranked, 10, 5)
                sizes.append(state.size)
        torch.testing.assert_close(*sizes)
        assert (sizes[0].min() < 1) == (not clamp)


def test_pool_weights_are_sizes_of_the_living():
    state = state_of()
    x, ranked = tokens(1)
    assert state.pool_weights(x, 0.0) is None
    state.mask_tokens(x, ranked, plan_of(7, 4))
    weights = state.pool_weights(x, prefix_weight=0.0)
    assert weights.shape == (2, PATCHES + 1)
    assert (weights > 0).sum(1).tolist() == [4, 4]
    torch.testing.assert_close(weights[:, 1:], state.size * state.mask)


def test_another_number_of_tokens_than_expected():
    with pytest.raises(ValueError, match="set up for 9 patches, 8 arrived"):
        state_of().begin(torch.zeros(2, 9, WIDTH), 10, learns=False)


def test_bipartite_keeps_sizes_and_groups():
    state = state_of(matching="bipartite")
    x, ranked = tokens(1)
    x = state.slice_tokens(x, ranked, 10, 7)
    assert x.shape[1] == 7
    x = state.slice_tokens(x, RankedTokens(torch.rand(2, 6), torch.randn(2, 6, 3)), 7, 5)
    assert x.shape[1] == 5
    counts = torch.stack([(state.group == row).sum(1) for row in range(4)], 1)
    assert torch.equal(counts.float(), state.size)
    assert state.size.sum(1).tolist() == [PATCHES, PATCHES]


@pytest.mark.parametrize("counts", [(8, 8, 6, 1, 2, 1), (3, 1, 1, 1)], ids=str)
@pytest.mark.parametrize("prefix", [0, 2])
def test_masked_pairs_equal_sliced_pairs_one_block_after_another(prefix, counts):
    """Also where more than half of an even or an odd number would have to go, and where none has to."""
    masked, sliced = (state_of(prefix, matching="bipartite") for _ in range(2))
    whole = short = tokens(prefix)[0]
    for block, kept in enumerate(counts):
        keys = tokens(prefix, block)[1].keys
        survival = survival_probability(torch.rand(1, PATCHES).softmax(-1), PATCHES)
        plan = KeptPlan(torch.tensor([float(kept)]), survival)
        before = masked.mask.clone() if masked.mask is not None else torch.ones(2, PATCHES)
        whole = masked.mask_tokens(whole, RankedTokens(torch.ones(2, PATCHES), keys), plan)
        positions = torch.arange(PATCHES).expand(2, -1) if sliced.positions is None else sliced.positions
        ranked = RankedTokens(torch.ones_like(positions), take(keys, positions))
        short = sliced.slice_tokens(short, ranked, PATCHES + prefix, kept + prefix)
        assert masked.living.item() == short.shape[1] - prefix == max(kept, -(-int(before[0].sum()) // 2))
        torch.testing.assert_close(take(whole[:, prefix:], sliced.positions), short[:, prefix:])
        torch.testing.assert_close(masked.size.gather(1, sliced.positions), sliced.size)
        assert torch.equal(masked.group, sliced.positions.gather(1, sliced.group))
        assert masked.mask.gather(1, sliced.positions).eq(1).all()
        assert masked.mask.sum(1).eq(masked.living).all()


def test_merging_is_off_where_it_would_keep_more_than_pruning():
    """As at the start, where both counts are equal: nothing merges, and the merge rates feel the budget alone."""
    for prune, merge in [(5, 5), (5, 8)]:
        state = state_of()
        x, ranked = tokens(1)
        survival = survival_probability(torch.rand(2, PATCHES).softmax(-1), PATCHES).requires_grad_()
        out = state.mask_tokens(x, ranked, KeptPlan(torch.tensor([float(prune), float(merge)]), survival))
        assert torch.equal(out, x)
        assert state.size.eq(1).all()
        (slope,) = torch.autograd.grad((state.mask * torch.randn(2, PATCHES)).sum(), survival)
        assert slope[0].abs().max() > 0
        assert slope[1].abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("masked", [True, False])
def test_sizes_and_masks_are_kept_in_single_precision(dtype, masked):
    state = state_of()
    x, ranked = tokens(1)
    if masked:
        out = state.mask_tokens(x.to(dtype), ranked, plan_of(8, 4))
        assert state.mask.dtype == torch.float32
    else:
        out = state.slice_tokens(x.to(dtype), ranked, 9, 5)
    assert out.dtype == dtype
    assert state.size.dtype == state.log_size().dtype == torch.float32
    assert state.size.max() > 1
