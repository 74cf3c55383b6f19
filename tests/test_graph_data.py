"""Graphs: parts that know the whole, and edges that are mended."""

import pytest
import torch
from torch_geometric.data import Data
from torch_geometric.loader import DataLoader, RandomNodeLoader
from torch_geometric.transforms import RemoveSelfLoops, ToUndirected

from lightning_hpo import GraphDegree
from lightning_hpo.graph_data import Graph, graph_of, graph_problems, is_clean, undirected


def test_parts_carry_degrees_and_size_of_the_whole():
    ring = torch.stack([torch.arange(12), torch.arange(12).roll(1)])
    data = GraphDegree()(Data(x=torch.rand(12, 2), edge_index=torch.cat([ring, ring.flip(0)], dim=1)))
    parts = [graph_of(part) for part in RandomNodeLoader(data, num_parts=3, shuffle=True)]
    assert all(part.is_part and part.nodes == 12 for part in parts)
    assert torch.cat([part.degree for part in parts]).tolist() == [2.0] * 12
    assert sum(part.edge_index.shape[1] for part in parts) < 24  # edges between parts are in none
    assert not graph_of(Data(x=torch.eye(2), edge_index=ring[:, :1])).is_part


def test_parts_may_be_put_together():
    ring = torch.stack([torch.arange(12), torch.arange(12).roll(1)])
    data = GraphDegree()(Data(x=torch.rand(12, 2), edge_index=torch.cat([ring, ring.flip(0)], dim=1)))
    parts = [graph_of(part) for part in DataLoader(list(RandomNodeLoader(data, num_parts=4)), batch_size=2)]
    assert [(len(part.x), part.nodes) for part in parts] == [(6, 12)] * 2


def test_a_part_may_be_empty_where_the_whole_may_not():
    nothing = Graph(torch.zeros(3, 2), torch.zeros(2, 0, dtype=torch.long), None, None)
    first, second = graph_problems(nothing, 2, 0)
    assert "the graph has no edges" in first
    assert "attributes are all zero in all 3 nodes" in second
    assert graph_problems(nothing._replace(degree=torch.zeros(3), nodes=9), 2, 0) == []


def test_the_whole_needs_edges():
    with pytest.raises(ValueError, match="`GraphDegree`: there is no `edge_index`"):
        GraphDegree()(Data(x=torch.eye(2)))
    with pytest.raises(ValueError, match="`GraphDegree`: the graph has no edges"):
        GraphDegree()(Data(x=torch.eye(2), edge_index=torch.zeros(2, 0, dtype=torch.long)))


@pytest.mark.parametrize(
    ("edges", "both_ways", "once"),
    [
        ([[0, 1, 1, 2], [1, 0, 2, 1]], True, True),
        ([[0, 1], [1, 2]], False, True),
        ([[0, 1, 0, 1], [1, 0, 1, 0]], True, False),
        ([[0, 1, 2], [1, 0, 2]], True, False),
    ],
)
def test_what_is_clean(edges, both_ways, once):
    assert is_clean(torch.tensor(edges), 3) == (both_ways, once)


def test_mended_edges_are_clean():
    edges = torch.randint(9, (2, 60))
    mended = undirected(edges, 9)
    assert is_clean(mended, 9) == (True, True)
    before = {frozenset(pair) for pair in edges.T.tolist() if pair[0] != pair[1]}
    assert {frozenset(pair) for pair in mended.T.tolist()} == before


@pytest.mark.parametrize(
    ("edges", "problem"),
    [
        ([[0, 1], [1, 2]], r"directed, repeated or loops; apply `RemoveSelfLoops\(\)` and `ToUndirected\(\)`"),
        ([[0, 1, 0, 1], [1, 0, 1, 0]], "directed, repeated or loops"),
        ([[0, 1, 2], [1, 0, 2]], "directed, repeated or loops"),
        ([[0, 3], [3, 0]], "edge_index goes up to 3, but there are 3 nodes"),
    ],
)
def test_parts_cannot_be_mended_so_the_whole_must_be(edges, problem):
    data = Data(x=torch.eye(3), edge_index=torch.tensor(edges))
    with pytest.raises(ValueError, match=problem):
        GraphDegree()(data)


def test_the_advice_mends_the_whole():
    data = Data(x=torch.eye(3), edge_index=torch.tensor([[0, 0, 1, 2], [1, 1, 2, 2]]))
    assert GraphDegree()(ToUndirected()(RemoveSelfLoops()(data))).graph_degree.tolist() == [1, 2, 1]
