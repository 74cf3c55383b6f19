"""The graphs of a fit are checked in its first epoch, and mended after that."""

import pytest
import torch
from torch_geometric.data import Data

from lightning_hpo.checked_graphs import CheckedGraphs


def test_all_graphs_of_the_first_epoch_are_checked_and_one_that_needs_it_mends_all():
    graphs = CheckedGraphs(2, 2, symmetrize=True)
    clean = Data(x=torch.eye(2), edge_index=torch.tensor([[0, 1], [1, 0]]))
    half = Data(x=torch.eye(2), edge_index=torch.tensor([[0], [1]]))
    assert graphs.take(clean, torch.float32).edge_index is clean.edge_index
    with pytest.warns(UserWarning, match="edges are directed"):
        assert torch.equal(graphs.take(half, torch.float32).edge_index, clean.edge_index)
    graphs.take(clean, torch.float32)
    graphs.end_epoch()
    assert torch.equal(graphs.take(half, torch.float32).edge_index, clean.edge_index)  # and nothing is said again
    graphs.take(Data(x=torch.eye(3), edge_index=half.edge_index), torch.float32)  # nor looked at
    graphs.begin()
    with pytest.raises(ValueError, match="in_channels is 2, but nodes have 3 attributes"):
        graphs.take(Data(x=torch.eye(3), edge_index=half.edge_index), torch.float32)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"edge_weight": torch.ones(2)}, "weights of edges, `edge_weight`, are not used"),
        ({"n_id": torch.arange(2)}, r"parts of a graph are taken for whole ones; apply `GraphDegree\(\)`"),
    ],
)
def test_what_is_not_used_is_spoken_of_once(more, said):
    graphs = CheckedGraphs(2, 2, symmetrize=True)
    data = Data(x=torch.eye(2), edge_index=torch.tensor([[0, 1], [1, 0]]), **more)
    with pytest.warns(UserWarning, match=said):
        graphs.take(data, torch.float32)
    graphs.take(data, torch.float32)
