"""Data hyper-cleaning as a module, and its guards."""

from itertools import repeat

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_hpo import DataHyperCleaning, IndexedDataset, SingleLoopMixin
from lightning_hpo.functional.bilevel.bo_rep import SingleLoopBilevel
from lightning_hpo.functional.bilevel.bo_rep_tasks import SingleLoopTasks
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


def test_more_examples_than_weights():
    train = DataLoader(IndexedDataset(TensorDataset(*points(16, 0))), batch_size=8)
    with pytest.raises(
        MisconfigurationException, match="has 16 examples, but there are weights for 12; give `samples="
    ):
        tiny_trainer(max_steps=1).fit(DataHyperCleaning(nn.Linear(2, 2), 12), train, train)


class Tasks(SingleLoopMixin, LightningModule):
    """A shared encoder, and a head for each task; a batch has the examples of every task."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.encoder = nn.Linear(3, 4).double()
            self.heads = nn.ModuleDict({name: nn.Linear(4, 1).double() for name in "ab"})

    def outer_parameters(self):
        return self.encoder.parameters()

    def losses(self, batch):
        inputs, targets = batch  # (batch, 3) and (batch, tasks)
        hidden = self.encoder(inputs).tanh()
        found = torch.cat([self.heads[name](hidden) for name in "ab"], dim=1)
        return (found - targets).square().mean(0)

    def outer_loss(self, batch):
        return self.losses(batch).mean()

    def inner_loss(self, batch):
        return self.losses(batch).sum() + 0.1 * sum(head.weight.square().sum() for head in self.heads.values())

    def configure_optimizers(self):
        return torch.optim.SGD(self.heads.parameters(), lr=0.1)


def test_tasks_that_share_an_encoder_take_the_steps_of_the_function_for_several_tasks():
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(8, n, generator=generator, dtype=torch.float64) for n in (3, 2, 3, 2)]
    train, val = TensorDataset(*parts[:2]), TensorDataset(*parts[2:])
    module = Tasks(single_loop_args={"lr": 0.05, "z_lr": 0.2, "refine_steps": 0, "every_n_steps": 2})
    tiny_trainer(max_steps=12).fit(module, *(DataLoader(part, batch_size=8) for part in (train, val)))
    begin = dict(Tasks().named_parameters())

    def loss(y, x, batch):
        hidden = (batch[0] @ x["encoder.weight"].T + x["encoder.bias"]).tanh()
        return ((hidden @ y["weight"].T + y["bias"]).squeeze(1) - batch[1]).square().mean()

    def inner(y, x, batch):
        return loss(y, x, batch) + 0.1 * y["weight"].square().sum()

    method = SingleLoopBilevel(inner, loss, lr=0.05, inner_lr=0.1, z_lr=0.2, interval=1, inner_steps=2)
    tasks = SingleLoopTasks(method)
    heads = {name: {part: begin[f"heads.{name}.{part}"] for part in ("weight", "bias")} for name in "ab"}
    state = tasks.start(heads, {name: value for name, value in begin.items() if name.startswith("encoder")})
    batches = [{n: repeat((p[0], p[1][:, i])) for i, n in enumerate("ab")} for p in (parts[:2], parts[2:])]
    state = tasks.refine(state, batches[0], steps=2)  # those before the first outer step
    for _ in range(6):
        state, _ = tasks.step(state, *batches)
    found = dict(module.named_parameters())
    for name, value in state.outer.items():
        torch.testing.assert_close(found[name].data, value, rtol=1e-11, atol=1e-12)
    for name, head in state.inner.items():
        torch.testing.assert_close(found[f"heads.{name}.weight"].data, head["weight"], rtol=1e-11, atol=1e-12)


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
