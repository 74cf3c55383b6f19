"""Differentiable kept counts against loops written from the formulas."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from lightning_hpo.functional.compression.diffrate import (
    bound_dead_pull,
    candidate_counts,
    kept_plan,
    kept_tokens,
    straight_through_mask,
    survival_probability,
    token_ranks,
)

SIZES = [(196, 1), (196, 2), (196, 4), (49, 3), (16, 4), (16, 16), (7, 5), (1, 1)]


def survival_by_loops(probabilities, patches, granularity):
    candidates = list(range(patches, 0, -granularity))
    return torch.stack(
        [
            sum((p for p, c in zip(probabilities, candidates, strict=True) if c + 1 > t), torch.zeros(()).double())
            for t in range(patches + 1)
        ]
    )


@pytest.mark.parametrize(("patches", "granularity"), SIZES)
def test_survival_equals_the_double_loop(patches, granularity):
    probabilities = torch.randn(len(range(patches, 0, -granularity))).mul(2).double().softmax(0)
    survival = survival_probability(probabilities, patches, granularity)
    torch.testing.assert_close(survival, survival_by_loops(probabilities, patches, granularity), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("patches", "granularity"), SIZES)
def test_survival_starts_at_one_never_rises_and_sums_to_the_expected_count(patches, granularity):
    candidates = candidate_counts(patches, granularity)
    probabilities = torch.randn(2, 3, len(candidates)).mul(2).double().softmax(-1)
    survival = survival_probability(probabilities, patches, granularity)
    assert survival.shape == (2, 3, patches + 1)
    torch.testing.assert_close(survival[..., 0], torch.ones(2, 3).double())
    assert (survival.diff(dim=-1) <= 1e-15).all()
    assert (survival[..., : int(candidates.min()) + 1] > 1 - 1e-12).all()
    torch.testing.assert_close(survival.sum(-1), 1 + (candidates * probabilities).sum(-1))


def test_survival_gradient_equals_that_of_the_double_loop():
    first = torch.randn(10).double().requires_grad_()
    second = first.detach().clone().requires_grad_()
    weights = torch.randn(31).double()
    (survival_probability(first.softmax(0), 30, 3) @ weights).backward()
    (survival_by_loops(second.softmax(0), 30, 3) @ weights).backward()
    torch.testing.assert_close(first.grad, second.grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("patches", "granularity", "tokens"),
    [
        (196, 1, 100), (196, 2, 100), (196, 4, 101),
        (256, 1, 130), (256, 2, 130), (256, 4, 131),
        (49, 1, 26), (49, 2, 26), (49, 4, 26),
        (16, 1, 10), (16, 2, 10), (16, 4, 11),
    ],
)  # fmt: skip
def test_kept_tokens_at_zero_logits(patches, granularity, tokens):
    candidates = candidate_counts(patches, granularity)
    probabilities = torch.zeros(len(candidates)).softmax(0)
    assert kept_tokens(probabilities, candidates).item() == tokens
    assert kept_tokens(probabilities, candidates, prefix=5).item() == tokens + 4
    assert kept_plan(probabilities, patches, granularity).kept.item() == tokens - 1


def test_kept_tokens_is_the_ceiling_with_identity_gradient():
    candidates = candidate_counts(40, 3)
    logits = torch.randn(6, len(candidates)).double().requires_grad_()
    probabilities = logits.softmax(-1)
    expected = (probabilities * candidates).sum(-1)
    kept = kept_tokens(probabilities, candidates, prefix=2)
    torch.testing.assert_close(kept, expected.detach().ceil() + 2, rtol=0, atol=1e-9)
    (got,) = torch.autograd.grad(kept.sum(), logits, retain_graph=True)
    torch.testing.assert_close(got, torch.autograd.grad(expected.sum(), logits)[0])
    closed_form = probabilities * (candidates - expected.unsqueeze(-1))
    torch.testing.assert_close(got, closed_form.detach())


def test_rounding_noise_does_not_add_a_token():
    candidates = candidate_counts(196)
    for kept in (1, 57, 196):
        certain = torch.zeros(196)
        certain[196 - kept] = 1
        for noise in (-1e-4, 0, 1e-4):  # what float32 sums differ by between devices
            assert kept_tokens(certain * (1 + noise / kept), candidates, prefix=0) == pytest.approx(kept, abs=1e-4)
    assert kept_tokens(torch.tensor([0.5, 0.5]), torch.tensor([4, 1]), prefix=0).item() == 3  # a true half goes up


@pytest.mark.parametrize(("patches", "granularity"), [(16, 0), (16, -1), (16, 17), (0, 1)])
def test_granularity_below_one_or_above_the_patches(patches, granularity):
    with pytest.raises(ValueError, match="granularity must lie between 1 and the number of patches"):
        candidate_counts(patches, granularity)


def operations(patches):
    def mask(probabilities, scores, alive):
        plan = kept_plan(probabilities, patches)
        rank = token_ranks(scores, alive)
        return straight_through_mask(rank, plan.kept, plan.survival, alive, alive[0].sum())

    inputs = torch.ones(patches) / patches, torch.rand(2, patches), torch.ones(2, patches).bool()
    return [str(node.target) for node in make_fx(mask)(*inputs).graph.nodes]


def test_the_mask_is_vectorised_and_reads_nothing_back():
    few, many = operations(8), operations(196)
    assert few == many
    assert len(few) < 60
    assert not [name for name in few if "_local_scalar_dense" in name or "nonzero" in name]


def mask_by_loop(rank, kept, survival, alive, living):
    factor = torch.ones(rank.shape)
    slope = torch.zeros(*rank.shape, survival.shape[0])
    for b, j in torch.cartesian_prod(torch.arange(rank.shape[0]), torch.arange(rank.shape[1])).tolist():
        if alive[b, j]:
            factor[b, j] = float(rank[b, j] < kept)
            slope[b, j, rank[b, j] + 1] = float(kept < living)
    return factor, slope


@pytest.mark.parametrize("kept", [2.0, 4.0, 5.0, 6.0])
def test_straight_through_mask_has_the_value_of_the_count_and_the_slope_of_the_survival(kept):
    alive = torch.tensor([[1, 1, 0, 1, 1, 0, 1, 0], [0, 1, 1, 1, 0, 1, 0, 1]]).bool()
    living = torch.tensor(5.0)
    rank = token_ranks(torch.rand(2, 8), alive)
    survival = survival_probability(torch.rand(8).softmax(0), 8).requires_grad_()
    factor = straight_through_mask(rank, torch.tensor(kept), survival, alive, living)
    value, slope = mask_by_loop(rank, kept, survival, alive, living)
    torch.testing.assert_close(factor.detach(), value, rtol=0, atol=1e-6)
    for b in range(2):
        for j in range(8):
            if factor.requires_grad:
                (got,) = torch.autograd.grad(factor[b, j], survival, retain_graph=True, allow_unused=True)
                torch.testing.assert_close(torch.zeros(9) if got is None else got, slope[b, j])


def test_gradient_reaches_earlier_blocks_through_tokens_that_are_dead_already():
    alive, earlier = torch.tensor([[True, False, True]]), torch.tensor([[1.0, 0.0, 1.0]], requires_grad=True)
    rank = token_ranks(torch.tensor([[0.5, 0.9, 0.1]]), alive)
    survival = torch.tensor([1.0, 1.0, 0.5, 0.2], requires_grad=True)
    factor = straight_through_mask(rank, torch.tensor(1.0), survival, alive, torch.tensor(2.0))
    (slope,) = torch.autograd.grad((earlier * factor)[0, 1], earlier)
    assert slope.tolist() == [[0.0, 1.0, 0.0]]


def ranks_by_sorting(scores, alive):
    rows = []
    for score, lives in zip(scores.tolist(), alive.tolist(), strict=True):
        order = sorted(range(len(score)), key=lambda j: (not lives[j], -score[j] if lives[j] else 0, j))
        rows.append([order.index(j) for j in range(len(score))])
    return torch.tensor(rows)


def test_ranks_equal_a_plain_sort_also_with_ties():
    for _ in range(20):
        scores, alive = torch.randint(0, 4, (3, 12)) / 4, torch.rand(3, 12) > 0.4
        assert torch.equal(token_ranks(scores, alive), ranks_by_sorting(scores, alive))


def test_ties_dead_before_living():
    """A living token whose attention underflows to the score of the dead still ranks before them."""
    alive = torch.tensor([[False, True, False, True, False]])
    for dead in (0.0, 1e-7, 0.3):
        scores = torch.where(alive, torch.zeros(1, 5), torch.full((1, 5), dead))
        rank = token_ranks(scores, alive)
        assert rank[alive].tolist() == [0, 1]
        assert rank[~alive].tolist() == [2, 3, 4]
    half = token_ranks(torch.zeros(1, 5, dtype=torch.float16), alive)
    assert half[alive].tolist() == [0, 1]


def test_dead_tokens_pull_at_most_ten_times_as_hard_as_the_living_of_their_image():
    mask = torch.tensor([[1.0, 1.0, 0.0, 0.0], [1.0, 0.0, 1.0, 0.0]], requires_grad=True)
    pull = torch.tensor([[0.1, -0.3, 1000.0, -2.0], [5.0, -1000.0, 1.0, 49.0]])
    out = bound_dead_pull(mask)
    assert torch.equal(out, mask)
    (out * pull).sum().backward()
    torch.testing.assert_close(mask.grad, torch.tensor([[0.1, -0.3, 3.0, -2.0], [5.0, -50.0, 1.0, 49.0]]))
