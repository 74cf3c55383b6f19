"""Merging against loops: who goes where, what the mean is, what the sizes become."""

import pytest
import torch

from lightning_hpo.functional.compression.tome import (
    bipartite_merge,
    bipartite_order,
    grow_sizes,
    match_tokens,
    merge_tokens,
)


def cosine(a, b):
    return (a @ b / (a.norm().clamp(min=1e-6) * b.norm().clamp(min=1e-6))).item()


def match_by_loops(metric, destinations, sources):
    """Nearest destination of each source, the lowest index among equals; everybody else stays."""
    index, value = list(range(len(metric))), [1.0] * len(metric)
    for i in sources:
        best = max(destinations, key=lambda j: (round(cosine(metric[i], metric[j]), 9), -j))
        index[i], value[i] = best, cosine(metric[i], metric[best])
    return index, value


def merge_by_loops(x, destinations, sources, index):
    out = x.clone()
    for j in destinations:
        out[j] = torch.stack([x[j], *(x[i] for i in sources if index[i] == j)]).mean(0)
    return out


def test_sliced_merge_equals_the_loops():
    for kept in (1, 4, 8):
        x = torch.randn(3, 9, 4)
        index, value = match_tokens(x, kept)
        merged = merge_tokens(x[:, :kept], x[:, kept:], index)
        for b in range(3):
            expected, similarity = match_by_loops(x[b].double(), range(kept), range(kept, 9))
            assert index[b].tolist() == expected[kept:]
            torch.testing.assert_close(value[b], torch.tensor(similarity[kept:]))
            by_loops = merge_by_loops(x[b], range(kept), range(kept, 9), expected)
            torch.testing.assert_close(merged[b], by_loops[:kept])


def test_masked_merge_equals_the_loops():
    for _ in range(10):
        x, role = torch.randn(2, 10, 4), torch.randint(0, 3, (2, 10))  # 0 receives, 1 moves, 2 is dead
        role[:, 0] = 0
        index, value = match_tokens(x, role == 0, role == 1)
        merged = merge_tokens(x, x, index, role == 1)
        for b in range(2):
            receives, moves = ((role[b] == kind).nonzero().flatten().tolist() for kind in (0, 1))
            expected, similarity = match_by_loops(x[b].double(), receives, moves)
            assert index[b].tolist() == expected
            torch.testing.assert_close(value[b], torch.tensor(similarity))
            torch.testing.assert_close(merged[b], merge_by_loops(x[b], receives, moves, expected))


def test_ties_go_to_the_lowest_index():
    same = torch.ones(1, 6, 3)
    assert match_tokens(same, 3)[0].tolist() == [[0, 0, 0]]
    receives = torch.tensor([[False, True, False, True, False, True]])
    assert match_tokens(same, receives)[0].tolist() == [[1, 1, 1, 3, 1, 5]]


def test_gradient_of_the_mean_goes_to_destination_and_sources_alike():
    x = torch.randn(1, 4, 2).double().requires_grad_()
    index = torch.tensor([[0, 0]])
    merge_tokens(x[:, :2], x[:, 2:], index)[0, 0].sum().backward()
    torch.testing.assert_close(x.grad[0, :, 0], torch.tensor([1 / 3, 0, 1 / 3, 1 / 3]).double())
    moves = torch.tensor([[1.0, 0.0]])
    unmoved = merge_tokens(x[:, :2], x[:, 2:], index, moves)
    torch.testing.assert_close(unmoved[0, 0], (x[0, 0] + x[0, 2]) / 2)


def test_matching_is_not_differentiated():
    x = torch.randn(1, 5, 3, requires_grad=True)
    index, value = match_tokens(x, 2)
    assert not value.requires_grad
    assert index.dtype == torch.long


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision_cosine_of_a_zero_token(dtype):
    """The norm of a zero token is 0/0 without an epsilon; its similarity is 0 and never NaN."""
    x = torch.randn(2, 6, 8).to(dtype)
    x[:, 1] = x[:, 4] = 0
    index, value = match_tokens(x, 3)
    assert torch.isfinite(value).all()
    assert value[:, 1].tolist() == [0, 0]
    assert index[:, 1].tolist() == [0, 0]
    _, masked = match_tokens(x, torch.tensor([[True, True, True, False, False, False]] * 2))
    assert torch.isfinite(masked).all()
    merged, size, *_ = bipartite_merge(x, torch.ones(2, 6), x, kept=4)
    assert torch.isfinite(merged).all()
    assert torch.isfinite(size).all()


def test_similarity_of_long_half_precision_tokens_does_not_overflow():
    x = torch.full((1, 3, 768), 3e2, dtype=torch.float16)
    assert match_tokens(x, 1)[1].flatten().tolist() == pytest.approx([1.0, 1.0], abs=1e-3)


def test_log_of_non_positive_size():
    """A source unlike its destination shrinks it under the official rule; the clamp keeps the logarithm finite."""
    size, similarity = torch.tensor([1.0, 3.0, 2.0]), torch.tensor([-0.9, 0.5, -1.0])
    assert grow_sizes(size, similarity, clamp=True).tolist() == [1.0, 1.5, 1.0]
    assert grow_sizes(size, similarity, clamp=False).tolist() == pytest.approx([-0.9, 1.5, -2.0])
    assert torch.isfinite((1 + grow_sizes(size, similarity, clamp=True)).log()).all()
    assert not torch.isfinite((1 + grow_sizes(size, similarity, clamp=False)).log()).all()


def bipartite_by_loops(x, size, metric, kept):
    """Token merging as the paper tells it, one token at a time."""
    tokens = len(x)
    first, second = range(0, tokens, 2), range(1, tokens, 2)
    nearest = {i: max(second, key=lambda j: cosine(metric[i], metric[j])) for i in first}
    chosen = sorted(first, key=lambda i: -cosine(metric[i], metric[nearest[i]]))[: min(tokens - kept, len(second))]
    groups = {j: [j] for j in range(tokens) if j not in chosen}
    for i in chosen:
        groups[nearest[i]].append(i)
    total = [sum(size[i] for i in members) for members in groups.values()]
    mean = [sum(size[i] * x[i] for i in members) / sum(size[i] for i in members) for members in groups.values()]
    return torch.stack(mean), torch.stack(total), list(groups), groups


@pytest.mark.parametrize(("tokens", "kept"), [(9, 8), (9, 6), (9, 5), (9, 2), (8, 4), (2, 1)])
def test_bipartite_merge_equals_the_loops(tokens, kept):
    x, size, metric = torch.randn(3, tokens, 4), torch.rand(3, tokens) * 3 + 1, torch.randn(3, tokens, 5)
    metric[0, 0] = 0  # like nothing, so the last to go
    merged, total, survivors, where = bipartite_merge(x, size, metric, kept)
    for b in range(3):
        mean, sizes, names, groups = bipartite_by_loops(x[b], size[b], metric[b], kept)
        assert survivors[b].tolist() == names
        torch.testing.assert_close(merged[b], mean)
        torch.testing.assert_close(total[b], sizes)
        assert {n: sorted(g) for n, g in groups.items()} == {
            n: [i for i in range(tokens) if where[b, i] == row] for row, n in enumerate(names)
        }
    torch.testing.assert_close(total.sum(1), size.sum(1))


@pytest.mark.parametrize("alive", [[1] * 9, [0, 1, 1, 0, 1, 1, 1, 0, 1], [0, 0, 1, 0, 1, 0, 0, 0, 0], [1] + [0] * 8])
def test_bipartite_order_is_that_of_merging_the_living_one_by_one(alive):
    """Also with tokens alike, of which the first one leaves first."""
    alive = torch.tensor([alive, alive], dtype=torch.bool)
    metric = torch.randn(2, 9, 5)
    metric[1] = metric[1, :1].sign()
    rank, nearest = bipartite_order(metric, alive)
    for b in range(2):
        living = alive[b].nonzero().flatten()
        assert sorted(rank[b, living].tolist()) == list(range(len(living)))
        assert sorted(rank[b].tolist()) == list(range(9))
        for kept in range(len(living), (len(living) - 1) // 2, -1):
            x = torch.randn(1, len(living), 2)
            _, _, survivors, where = bipartite_merge(x, torch.ones(1, len(living)), metric[b : b + 1, living], kept)
            stays = rank[b, living] < kept
            assert stays.nonzero().flatten().tolist() == survivors[0].tolist()
            place = torch.where(stays, living, nearest[b, living])
            assert place.tolist() == living[survivors[0, where[0]]].tolist()


def test_bipartite_merge_at_most_halves():
    x = torch.randn(1, 9, 4)
    assert bipartite_merge(x, torch.ones(1, 9), x, kept=1)[0].shape == (1, 5, 4)
