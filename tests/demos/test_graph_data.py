"""The graphs of the demos."""

import shutil

import pytest
import torch

from lightning_hpo.demos import CitationDataModule, PlantedPartitionDataModule
from lightning_hpo.demos.graph_data import planted_partition


def test_a_planted_partition_is_what_was_asked_for():
    data = planted_partition(3, size=100, p_in=0.3, p_out=0.05, attributes=4, seed=1)
    assert data.is_undirected()
    assert data.y.bincount().tolist() == [100] * 3
    same = data.y[data.edge_index[0]] == data.y[data.edge_index[1]]
    assert same.sum().item() / (3 * 100 * 99) == pytest.approx(0.3, abs=0.02)
    assert (~same).sum().item() / (6 * 100 * 100) == pytest.approx(0.05, abs=0.01)
    assert torch.equal(data.x, planted_partition(3, 100, 0.3, 0.05, 4, seed=1).x)
    assert not torch.equal(data.x, planted_partition(3, 100, 0.3, 0.05, 4, seed=2).x)


def test_the_same_graph_for_everything():
    module = PlantedPartitionDataModule(2, size=5)
    for loader in (module.train_dataloader(), module.test_dataloader(), module.predict_dataloader()):
        (batch,) = loader
        assert torch.equal(batch.x, module.data.x)


def test_components_are_counted():
    with pytest.raises(ValueError, match="components must be at least 0, got -1"):
        CitationDataModule("somewhere", components=-1)


@pytest.mark.data
@pytest.mark.filterwarnings("ignore")  # torch-geometric's own, while it reads old files
def test_citations(data_root, tmp_path):
    shutil.copytree(data_root / "Cora" / "raw", tmp_path / "Cora" / "raw")
    module = CitationDataModule(tmp_path, "Cora", components=32)
    module.prepare_data()
    module.setup()
    assert module.data.x.shape == (2708, 32)
    assert module.data.num_edges == 2 * 5278
    assert module.data.is_undirected()
