"""The sums of partitions with a column left out, and the decision."""

import networkx
import pytest
import torch
from networkx.algorithms.community import modularity

from lightning_hpo.functional.graphs.dag import balance, group_sparsity, node_degree, soft_modularity
from lightning_hpo.functional.graphs.pruning import PartitionSums, keep_communities, partition_sums

WEIGHTS = (1.0, 0.1, 0.1)


@pytest.fixture
def graph():
    generator = torch.Generator().manual_seed(0)
    found = networkx.gnp_random_graph(40, 0.2, seed=0)
    pairs = torch.tensor(list(found.edges)).T
    return found, torch.cat([pairs, pairs.flip(0)], dim=1), torch.randn(40, 5, generator=generator)


def losses(scores, live, edges, weights):
    """The slow way: the loss of the partition without each column, and of the partition."""
    a, b, c = weights
    found = []
    for column in [*range(scores.shape[1]), None]:
        alive = live.clone()
        if column is not None:
            alive[column] = False
        labels = scores.masked_fill(~alive, -torch.inf).argmax(1)
        P = torch.nn.functional.one_hot(labels, scores.shape[1]).double()
        G = group_sparsity(P) / len(P) ** 0.5
        found.append(-a * soft_modularity(P, edges) + b * G + c * balance(P, int(alive.sum())))
    return torch.stack(found)


def test_sums_are_those_of_the_partitions(graph):
    found, edges, scores = graph
    sums = partition_sums(scores, torch.ones(5, dtype=torch.bool), edges, node_degree(edges, 40))
    for column in range(6):
        alive = [k for k in range(5) if k != column]
        labels = torch.tensor(alive)[scores[:, alive].argmax(1)]
        assert sums.sizes[column].tolist() == labels.bincount(minlength=5).tolist()
        parts = [{int(i) for i in (labels == k).nonzero()} for k in range(5)]
        share = sums.degree_mass[column] / sums.degree_mass[column].sum()
        Q = (sums.inside[column] / sums.ends - share.square().sum()).item()
        assert abs(Q - modularity(found, parts)) < 1e-12


def test_the_column_dies_without_which_the_loss_falls_most(graph):
    _, edges, scores = graph
    live = torch.ones(5, dtype=torch.bool)
    for _ in range(4):  # the graph is random: any community is one too many
        sums = partition_sums(scores, live, edges, node_degree(edges, 40))
        keep = keep_communities(sums, live, 1, *WEIGHTS)
        expected = losses(scores, live, edges, WEIGHTS)
        gain = (expected[-1] - expected[:-1]).masked_fill(~live, -torch.inf)
        assert (live & ~keep).nonzero().flatten().tolist() == [int(gain.argmax())]
        live = keep
    assert live.sum() == 1
    assert torch.equal(keep_communities(partition_sums(scores, live, edges, torch.ones(40)), live, 1, *WEIGHTS), live)


def test_small_columns_die_first_and_together(graph):
    _, edges, scores = graph
    scores = scores.clone()
    scores[:, 1:3] -= 100  # nobody likes them
    live = torch.ones(5, dtype=torch.bool)
    keep = keep_communities(partition_sums(scores, live, edges, torch.ones(40)), live, 2, *WEIGHTS)
    assert keep.tolist() == [True, False, False, True, True]


def test_at_most_half_of_the_columns_die_at_once_and_the_largest_lives_on(graph):
    _, edges, scores = graph
    live, left = torch.ones(5, dtype=torch.bool), []
    for _ in range(4):
        sums = partition_sums(scores, live, edges, torch.ones(40))
        keep = keep_communities(sums, live, 1000, *WEIGHTS)
        gone, stayed = sums.sizes[-1][live & ~keep], sums.sizes[-1][keep]
        assert keep[sums.sizes[-1].argmax()]
        assert not len(gone) or gone.max() <= stayed.min()
        live = keep
        left.append(int(live.sum()))
    assert left == [3, 2, 1, 1]


def test_communities_that_the_graph_has_stay():
    blocks = torch.block_diag(*[torch.ones(6, 6) - torch.eye(6)] * 3)
    edges, live = blocks.nonzero().T, torch.ones(3, dtype=torch.bool)
    scores = torch.nn.functional.one_hot(torch.arange(3).repeat_interleave(6)).float()
    sums = partition_sums(scores, live, edges, node_degree(edges, 18))
    assert keep_communities(sums, live, 1, *WEIGHTS).all()
    without = keep_communities(sums, live, 1, 0.0, 1.0, 0.0)  # sparsity alone takes one after the other
    assert without.sum() == 2


def test_dead_columns_stay_dead(graph):
    _, edges, scores = graph
    live = torch.tensor([True, False, True, True, False])
    keep = keep_communities(partition_sums(scores, live, edges, torch.ones(40)), live, 1, *WEIGHTS)
    assert not (keep & ~live).any()


def test_sums_of_parts_add_up(graph):
    _, _, scores = graph
    live, degree = torch.ones(5, dtype=torch.bool), torch.ones(20)
    ring = torch.stack([torch.arange(20), torch.arange(20).roll(1)])
    edges = torch.cat([ring, ring.flip(0)], dim=1)
    parts = [partition_sums(scores[s], live, edges, degree) for s in (slice(20), slice(20, 40))]
    whole = partition_sums(scores, live, torch.cat([edges, edges + 20], dim=1), torch.ones(40))
    torch.testing.assert_close(PartitionSums(*(a + b for a, b in zip(*parts, strict=True))), whole)


def test_without_an_edge_numbers_decide():
    live, none = torch.ones(3, dtype=torch.bool), torch.empty(2, 0, dtype=torch.long)
    scores = torch.tensor([[2.0, 1.0, 0.0]] * 5 + [[0.0, 2.0, 1.0]] * 5 + [[0.0, 1.0, 2.0]] * 2)
    sums = partition_sums(scores, live, none, torch.zeros(12))
    assert keep_communities(sums, live, 1, 1.0, 1.0, 0.0).tolist() == [
        False,
        True,
        True,
    ]  # roots of 10 and 2 are less than of 5 and 7
