"""Communities of papers, their number not given: what the method must reach with the settings it comes with."""

import shutil
from statistics import mean

import pytest
import torch
from torch_geometric.loader import DataLoader

from lightning_hpo import DAGCommunityDetector
from lightning_hpo.demos import CitationDataModule
from lightning_hpo.testing import tiny_trainer

FLOORS = {
    "Cora": {"test_accuracy": 0.66, "test_nmi": 0.50, "test_ari": 0.42},
    "CiteSeer": {"test_accuracy": 0.50, "test_nmi": 0.30},
}


@pytest.mark.slow
@pytest.mark.data
@pytest.mark.filterwarnings("ignore")  # torch-geometric's own, while it reads old files
@pytest.mark.parametrize("name", FLOORS)
def test_communities_are_the_fields_of_papers(name, data_root, tmp_path):
    shutil.copytree(data_root / name / "raw", tmp_path / name / "raw")
    module = CitationDataModule(tmp_path, name)
    module.setup()
    found = []
    for seed in range(3):
        torch.manual_seed(seed)
        model = DAGCommunityDetector(module.data.num_features, seed=seed)
        trainer = tiny_trainer(max_epochs=350)
        trainer.fit(model, DataLoader([module.data]))
        found += trainer.test(model, DataLoader([module.data]), verbose=False)
    assert all(5 <= scores["test_communities"] <= 12 for scores in found)
    means = {key: mean(scores[key] for scores in found) for key in FLOORS[name]}
    assert all(means[key] >= floor for key, floor in FLOORS[name].items()), means
