"""Data hyper-cleaning as a module, and its guards."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_hpo import DataHyperCleaning, IndexedDataset
from lightning_hpo.functional.bilevel.weight_auc import weight_auc
from lightning_hpo.testing import tiny_trainer


def points(samples, seed):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(samples) % 2
    return torch.randn(samples, 2, generator=generator) + 3 * labels[:, None], labels


def test_wrong_labels_get_small_weights():
    inputs, labels = points(80, 0)
    wrong = torch.arange(80) % 5 < 2
    noisy = torch.where(wrong, 1 - labels, labels)
    torch.manual_seed(0)
    train = DataLoader(IndexedDataset(TensorDataset(inputs, noisy)), batch_size=40, shuffle=True)
    val = DataLoader(TensorDataset(*points(40, 1)), batch_size=40)
    arguments = {"lr": 0.3, "z_lr": 0.3, "refine_steps": 50}
    module = DataHyperCleaning(nn.Linear(2, 2), 80, weight_decay=0.01, single_loop_args=arguments)
    tiny_trainer(max_steps=400).fit(module, train, val)
    weights = module.sample_weights()
    higher = (weights[~wrong][:, None] > weights[wrong]).float().mean()
    assert higher > 0.95  # the area under the ROC curve
    assert weights.shape == (80,)


@pytest.mark.parametrize(
    "batch", [(torch.zeros(2, 2), torch.zeros(2)), [torch.zeros(2), torch.zeros(2), torch.zeros(2)]]
)
def test_batches_without_indices_show_the_wrapper(batch):
    with pytest.raises(ValueError, match=r"wrap the training set: `DataLoader\(IndexedDataset\(train_set\)"):
        DataHyperCleaning(nn.Linear(2, 2), 4).inner_loss(batch)


def test_wrong_values_are_listed_at_once():
    with pytest.raises(ValueError, match="samples must be at least 1, got 0; lr must be .*; weight must lie between"):
        DataHyperCleaning(nn.Linear(1, 1), 0, lr=0, weight=1.0)


def test_indexed_samples():
    data = IndexedDataset([(1.0, "a"), (2.0, "b")])
    assert len(data) == 2
    assert data[1][1:] == (2.0, "b")
    assert data[-1][0] == 1
    assert IndexedDataset([5.0])[0] == (torch.tensor(0), 5.0)
    with pytest.raises(TypeError, match="a data set with a length is needed, got `generator`"):
        IndexedDataset(x for x in [1])


def test_the_area_under_the_curve_is_logged_where_wrong_labels_are_known():
    inputs, labels = points(16, 0)
    corrupted = torch.arange(16) % 4 == 0
    module = DataHyperCleaning(nn.Linear(2, 2), 16, corrupted=corrupted, single_loop_args={"refine_steps": 0})
    weights = module.hypers.raw["weight"]
    with torch.no_grad():
        weights.copy_(torch.linspace(-1, 1, 16))
    train = DataLoader(IndexedDataset(TensorDataset(inputs, labels)), batch_size=8)
    trainer = tiny_trainer(max_steps=2)
    trainer.fit(module, train, DataLoader(TensorDataset(inputs, labels), batch_size=8))
    found = module.sample_weights()
    higher = (found[~corrupted][:, None] > found[corrupted]).double().mean().item()
    assert trainer.callback_metrics["weight_auc"].item() == pytest.approx(higher, rel=1e-6)
    assert 0.5 < higher < 0.7
    assert "corrupted" not in module.state_dict()


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (torch.zeros(3, dtype=torch.bool), r"boolean tensor of shape \(4,\), got torch.bool \(3,\)"),
        (torch.zeros(4), r"boolean tensor of shape \(4,\), got torch.float32 \(4,\)"),
        (torch.zeros(4, dtype=torch.bool), "must name some examples, but not all"),
        (torch.ones(4, dtype=torch.bool), "must name some examples, but not all"),
    ],
)
def test_masks_that_do_not_fit(mask, words):
    with pytest.raises(ValueError, match=words):
        DataHyperCleaning(nn.Linear(2, 2), 4, corrupted=mask)


def test_the_area_by_hand_and_as_known_elsewhere():
    from sklearn.metrics import roc_auc_score

    generator = torch.Generator().manual_seed(0)
    weights = torch.randint(5, (200,), generator=generator) / 4  # many ties
    corrupted = torch.rand(200, generator=generator) < 0.3
    known = roc_auc_score(~corrupted.numpy(), weights.numpy())
    assert weight_auc(weights, corrupted).item() == pytest.approx(known, rel=1e-6)
    assert weight_auc(1 - weights, corrupted).item() == pytest.approx(1 - known, rel=1e-6)
    assert weight_auc(torch.ones(3), torch.tensor([True, False, False])).item() == 0.5
    with pytest.raises(ValueError, match=r"one shape \(n,\) are needed, got \(3,\) and \(2,\)"):
        weight_auc(torch.ones(3), torch.tensor([True, False]))
    with pytest.raises(ValueError, match="all examples are of one kind"):
        weight_auc(torch.ones(2), torch.tensor([True, True]))
