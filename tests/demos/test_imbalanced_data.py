"""Tables with rare classes, and the classifier for them."""

import pytest
import torch

from lightning_hpo.demos import ImbalancedDataModule, TabularClassifier
from lightning_hpo.demos.imbalanced_data import rare
from lightning_hpo.testing import tiny_trainer


@pytest.mark.parametrize("share", [0.05, 0.1, 0.6])
def test_a_class_gets_its_share(share):
    labels = torch.arange(1000) % 4
    kept = rare(labels, [1, 3], share, torch.Generator().manual_seed(0))
    assert kept.unique().numel() == len(kept)
    found = torch.isin(labels[kept], torch.tensor([1, 3])).float().mean().item()
    assert found == pytest.approx(share, abs=2e-3)


@pytest.mark.parametrize(
    ("name", "more", "columns", "positives"),
    [
        ("breast_cancer", {}, 30, 212 / 569),
        ("digits", {"positive": 8}, 64, 174 / 1797),
        ("digits", {"positive": 8, "coarse": True}, 16, 174 / 1797),
        ("diabetes", {"share": 0.1}, 10, 0.1),
        ("wine", {}, 13, 71 / 178),
        ("iris", {"share": 0.2}, 4, 0.2),
    ],
)
def test_parts_are_stratified_and_apart(name, more, columns, positives):
    data = ImbalancedDataModule(name, **more)
    parts = [data.train_set, data.val_set, data.test_set]
    sizes = torch.tensor([len(part) for part in parts]) / sum(len(part) for part in parts)
    torch.testing.assert_close(sizes, torch.tensor([0.5, 0.25, 0.25]), rtol=0, atol=0.03)
    for part in parts:
        features, targets = part.tensors
        assert features.shape[1] == columns
        assert targets.mean().item() == pytest.approx(positives, abs=0.03)
    torch.testing.assert_close(parts[0].tensors[0].mean(0), torch.zeros(columns), rtol=0, atol=1e-4)
    again = ImbalancedDataModule(name, **more)
    assert torch.equal(again.test_set.tensors[0], data.test_set.tensors[0])
    other = ImbalancedDataModule(name, **more, seed=1)
    assert other.test_set.tensors[0].shape != data.test_set.tensors[0].shape or not torch.equal(
        other.test_set.tensors[0], data.test_set.tensors[0]
    )


def test_all_classes_train():
    data = ImbalancedDataModule("wine", positive=None, stratified=True, batch_size=16)
    assert data.train_set.tensors[1].dtype == torch.long
    assert all(set(y.tolist()) == {0, 1, 2} for _, y in data.train_dataloader())
    torch.manual_seed(0)
    module = TabularClassifier(13, outputs=3, lr=1e-2)
    trainer = tiny_trainer(max_epochs=20, num_sanity_val_steps=0)
    trainer.fit(module, data)
    assert trainer.callback_metrics["val_loss"] < 0.2
    assert trainer.test(module, data, verbose=False)[0]["test_loss"] < 0.5


def test_wrong_arguments_are_named_at_once():
    with pytest.raises(ValueError, match=r"name must be one of .*; share must be .*; coarse is for digits"):
        ImbalancedDataModule("mnist", share=2.0, coarse=True)
    with pytest.raises(ValueError, match="there is no class 7 in wine"):
        ImbalancedDataModule("wine", positive=7)
