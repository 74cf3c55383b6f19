"""Modularity, group sparsity and balance: identities, bounds, slopes, and networkx."""

import math
import pickle

import networkx
import pytest
import torch
from networkx.algorithms.community import modularity
from torch.autograd import gradcheck

from lightning_hpo.functional.graphs.dag import (
    balance,
    community_sums,
    effective_communities,
    group_sparsity,
    node_degree,
    row_entropy,
    soft_modularity,
)


def edges_of(graph):
    pairs = torch.tensor([edge for edge in graph.edges if edge[0] != edge[1]]).T
    loops = torch.tensor([edge for edge in graph.edges if edge[0] == edge[1]], dtype=torch.long).reshape(-1, 2).T
    return torch.cat([pairs, pairs.flip(0), loops, loops], dim=1)  # a loop is both ends of an edge


def memberships(nodes, columns, dtype=torch.float64):
    return (2 * torch.randn(nodes, columns, dtype=dtype)).softmax(1)


def hard(sizes, dtype=torch.float64):
    labels = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    return torch.nn.functional.one_hot(labels).to(dtype)


def test_modularity_is_networkxs_on_the_karate_club():
    graph = networkx.karate_club_graph()
    for columns in (2, 4, 7):
        labels = torch.randint(columns, (34,))
        parts = [{int(i) for i in (labels == k).nonzero()} for k in range(columns)]
        found = soft_modularity(torch.nn.functional.one_hot(labels, columns).double(), edges_of(graph))
        assert found.item() == pytest.approx(modularity(graph, parts, weight=None), abs=1e-12)


@pytest.mark.data
@pytest.mark.parametrize("name", ["Cora", "CiteSeer"])
def test_modularity_is_networkxs_on_citations(name, data_root):
    # Read with pickle: torch-geometric would write beside the files.
    with (data_root / name / "raw" / f"ind.{name.lower()}.graph").open("rb") as file:
        links = pickle.load(file, encoding="latin1")
    graph = networkx.Graph(networkx.from_dict_of_lists(links))
    graph = networkx.relabel_nodes(graph, {node: i for i, node in enumerate(sorted(graph))})
    labels = torch.arange(len(graph)) // 300
    parts = [{int(i) for i in (labels == k).nonzero()} for k in labels.unique()]
    found = soft_modularity(torch.nn.functional.one_hot(labels).double(), edges_of(graph))
    assert found.item() == pytest.approx(modularity(graph, parts), abs=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_edge_form_is_the_dense_one(seed):
    graph = networkx.gnp_random_graph(50, 0.1, seed=seed)
    edges, P = edges_of(graph), memberships(50, 6)
    A = torch.from_numpy(networkx.to_numpy_array(graph))
    d, ends = A.sum(0), A.sum()
    dense = torch.trace(P.T @ (A - torch.outer(d, d) / ends) @ P) / ends
    torch.testing.assert_close(soft_modularity(P, edges), dense, rtol=0, atol=1e-12)
    torch.testing.assert_close(soft_modularity(P.float(), edges), dense.float(), rtol=0, atol=1e-6)


def test_loops_and_repeated_edges_count_as_often_as_they_are_listed():
    graph = networkx.Graph([(0, 1), (1, 2), (2, 3), (3, 3)])
    found = soft_modularity(hard([2, 2]), edges_of(graph))
    assert found.item() == pytest.approx(modularity(graph, [{0, 1}, {2, 3}]), abs=1e-12)
    weighted = networkx.Graph()
    weighted.add_weighted_edges_from([(0, 1, 2), (1, 2, 1), (2, 3, 1)])
    pairs = torch.tensor([[0, 0, 1, 2], [1, 1, 2, 3]])
    found = soft_modularity(hard([2, 2]), torch.cat([pairs, pairs.flip(0)], dim=1))
    assert found.item() == pytest.approx(modularity(weighted, [{0, 1}, {2, 3}]), abs=1e-12)


def test_modularity_of_one_community_and_of_equal_rows_is_zero():
    edges = edges_of(networkx.cycle_graph(9))
    assert soft_modularity(torch.ones(9, 1), edges).item() == pytest.approx(0, abs=1e-6)
    assert soft_modularity(torch.full((9, 4), 0.25), edges).item() == pytest.approx(0, abs=1e-6)


def test_columns_norms_lie_between_their_bounds():
    for nodes, columns in ((12, 4), (30, 3)):
        for sharpness in (0.0, 1.0, 50.0):
            P = (sharpness * torch.randn(nodes, columns, dtype=torch.float64)).softmax(1)
            found = group_sparsity(P).item()
            assert math.sqrt(nodes) - 1e-9 <= found <= math.sqrt(nodes * columns) + 1e-9
            assert 1 - 1e-9 <= effective_communities(P).item() <= columns + 1e-9
    same = memberships(1, 5).expand(20, 5)  # all rows alike, whatever they are: the lower bound
    assert group_sparsity(same).item() == pytest.approx(math.sqrt(20), abs=1e-6)
    assert group_sparsity(hard([4, 4, 4])).item() == pytest.approx(math.sqrt(36), abs=1e-6)


@pytest.mark.parametrize("sizes", [[5, 5, 5], [1, 2, 9], [7, 1]])
def test_effective_communities_of_a_partition(sizes):
    expected = sum(map(math.sqrt, sizes)) ** 2 / sum(sizes)
    assert effective_communities(hard(sizes)).item() == pytest.approx(expected, abs=1e-6)
    assert row_entropy(hard(sizes)).item() == 0


def test_balance_is_zero_where_columns_are_equally_full_and_largest_where_one_has_all():
    assert balance(hard([6, 6, 6])).item() == pytest.approx(0, abs=1e-9)
    assert balance(torch.full((9, 4), 0.25)).item() == pytest.approx(0, abs=1e-6)
    alone = torch.eye(4, dtype=torch.float64)[[2] * 9]
    assert balance(alone).item() == pytest.approx(1, abs=1e-9)
    assert balance(alone, communities=1).item() == pytest.approx(0, abs=1e-9)  # the others are dead
    assert 0 < balance(hard([2, 7])).item() < math.sqrt(2) - 1


def test_entropy_of_memberships_that_say_nothing():
    assert row_entropy(torch.full((3, 8), 1 / 8)).item() == pytest.approx(math.log(8))


def test_slopes_are_those_of_finite_differences():
    edges = edges_of(networkx.gnp_random_graph(8, 0.5, seed=0))
    P = memberships(8, 3).requires_grad_()
    for function in (lambda P: soft_modularity(P, edges), group_sparsity, balance, effective_communities, row_entropy):
        assert gradcheck(function, P)


def test_an_empty_column_has_no_slope():
    P = torch.tensor([[1.0, 0.0], [1.0, 0.0]], requires_grad=True)
    group_sparsity(P).backward()
    assert P.grad[:, 1].tolist() == [0, 0]
    torch.testing.assert_close(P.grad[:, 0], P.detach()[:, 0] / math.sqrt(2))  # P_ik over the column's norm


def test_sums_of_parts_are_those_of_the_whole():
    first, second = (edges_of(networkx.gnp_random_graph(20, 0.3, seed=s)) for s in (0, 1))
    P = memberships(40, 5)
    whole = community_sums(P, torch.cat([first, second + 20], dim=1))
    parts = [community_sums(P[:20], first), community_sums(P[20:], second)]
    joined = type(whole)(*(a + b for a, b in zip(*parts, strict=True)))
    torch.testing.assert_close(whole, joined)
    torch.testing.assert_close(joined.sparsity(), group_sparsity(P))
    torch.testing.assert_close(joined.balance(5), balance(P))
    assert joined.modularity() != (parts[0].modularity() + parts[1].modularity()) / 2


def test_nodes_may_be_renumbered():
    edges, P = edges_of(networkx.gnp_random_graph(30, 0.2, seed=3)), memberships(30, 4)
    order = torch.randperm(30)
    renumbered = order.argsort()[edges]
    torch.testing.assert_close(soft_modularity(P[order], renumbered), soft_modularity(P, edges))
    torch.testing.assert_close(group_sparsity(P[order]), group_sparsity(P))
    torch.testing.assert_close(balance(P[order]), balance(P))


def test_half_precision_is_added_up_in_float32():
    edges = torch.randint(0, 100, (2, 200_000))
    P = hard([50, 50], torch.float32)
    sums = community_sums(P.bfloat16(), edges)
    torch.testing.assert_close(sums.inside, community_sums(P, edges).inside)
    assert sums.modularity().dtype == torch.float32


def test_isolated_nodes_have_degree_zero():
    assert node_degree(torch.tensor([[0, 2], [2, 0]]), 4).tolist() == [1, 0, 1, 0]


@pytest.mark.parametrize(
    ("membership", "edges", "problem"),
    [
        (torch.ones(3), torch.zeros(2, 1, dtype=torch.long), r"membership must be floating point \(N, K\), got \(3,\)"),
        (torch.ones(3, 2), torch.zeros(3, 1), r"edge_index must be integers \(2, E\), got \(3, 1\)"),
        (torch.ones(3, 2), torch.zeros(2, 0, dtype=torch.long), "no edges: modularity is undefined"),
        (torch.ones(3, 2), torch.tensor([[0], [7]]), "edge_index goes up to 7, but there are 3 nodes"),
        (torch.ones(3, 2), torch.tensor([[0], [-1]]), "edge_index goes down to -1"),
    ],
)
def test_wrong_arguments_are_named(membership, edges, problem):
    with pytest.raises(ValueError, match=problem):
        soft_modularity(membership, edges)


def test_a_part_without_edges_has_a_modularity_and_a_slope():
    scores = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    none = torch.empty(2, 0, dtype=torch.long)
    for degree, share in ((torch.tensor([1, 0, 2, 0]), True), (torch.zeros(4, dtype=torch.long), False)):
        P = scores.softmax(1)
        found = community_sums(P, none, degree).modularity()
        expected = -(degree.double() @ P / 3).square().sum() if share else torch.zeros((), dtype=torch.float64)
        torch.testing.assert_close(found, expected)
        (slope,) = torch.autograd.grad(found, scores)
        assert slope.isfinite().all()
        assert bool(slope.any()) == share
