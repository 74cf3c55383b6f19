"""MetricObjective with modules, checkpoints and Trainers as strangers have them."""

import warnings
from functools import partial

import pytest
import torch
import torchmetrics.functional.classification as tm
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_hpo import AnyLoss, MetricObjective
from lightning_hpo.testing import tiny_trainer

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*lacked a class.*",
    "ignore:You defined a `validation_step` but have no.*",
    "ignore:Attribute 'criterion'.*",  # it is a hyperparameter here
)


def loader(n=96, seed=0, classes=0, ignored=None):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 5, generator=generator)
    noisy = x + 0.5 * torch.randn(n, 5, generator=generator)
    y = noisy[:, :classes].argmax(1) if classes else (noisy[:, 0] > 0.7).float()
    if ignored is not None:
        y[::3] = ignored
    return DataLoader(TensorDataset(x, y), batch_size=16)


class Net(LightningModule):
    def __init__(self, criterion, classes=1):
        super().__init__()
        self.save_hyperparameters()
        torch.manual_seed(0)
        self.net = nn.Linear(5, classes)
        self.criterion = criterion

    def forward(self, x):
        return self.net(x).squeeze(1)

    def training_step(self, batch, batch_idx):
        return self.criterion(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.criterion(self(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.5)


def test_checkpoints_hold_a_criterion_that_is_a_hyperparameter(tmp_path):
    saver = ModelCheckpoint(tmp_path, monitor="anyloss/val_f1", mode="max")
    tiny_trainer(MetricObjective("f1"), saver, max_epochs=2).fit(
        Net(nn.BCEWithLogitsLoss(pos_weight=torch.tensor(2.0))), loader(), loader(seed=1)
    )
    restored = Net.load_from_checkpoint(saver.best_model_path, weights_only=False)
    z, y = torch.tensor([0.3, -1.0]), torch.tensor([1.0, 0.0])
    expected = F.binary_cross_entropy_with_logits(z, y, pos_weight=torch.tensor(2.0))
    torch.testing.assert_close(restored.criterion(z, y), expected)


def test_a_validation_by_itself_counts_too():
    net, val = Net(nn.BCEWithLogitsLoss()), loader(70, seed=1)
    method = MetricObjective("f1", calibrate=True)
    trainer = tiny_trainer(method, max_epochs=2)
    trainer.fit(net, loader(), val)
    before, learned = trainer.callback_metrics, method.hyperparameters()
    (logged,) = trainer.validate(net, val, verbose=False)
    assert {name for name in before if "/val_" in name} < logged.keys()
    x, y = val.dataset.tensors
    hard = tm.binary_f1_score(net(x).sigmoid(), y.long()).item()
    assert logged["anyloss/val_f1"] == pytest.approx(hard, abs=1e-6)
    assert method.hyperparameters() == learned
    assert "forward" not in vars(net.criterion)
    (fresh,) = tiny_trainer(MetricObjective("f1")).validate(net, val, verbose=False)
    assert fresh == pytest.approx(logged)


def test_validation_in_16_bits_counts_whole_samples():
    net = Net(nn.CrossEntropyLoss(), 3)
    data = loader(1500, seed=1, classes=3)
    data = DataLoader(data.dataset, 1500)
    trainer = tiny_trainer(MetricObjective("f1", "multiclass"), max_epochs=1, precision="bf16-mixed")
    trainer.fit(net, loader(classes=3), data)
    x, y = data.dataset.tensors
    with torch.autocast("cpu", torch.bfloat16):
        logits = net(x)
    expected = tm.multiclass_f1_score(logits.float(), y, 3).item()
    assert trainer.callback_metrics["anyloss/val_f1"].item() == pytest.approx(expected, abs=1e-6)


def test_no_temperature_is_fitted_to_the_sanity_check():
    method = MetricObjective("f1", calibrate=True)
    trainer = tiny_trainer(method, max_epochs=-1, max_steps=3, num_sanity_val_steps=2)  # ends within an epoch
    with pytest.warns(UserWarning, match="no temperature has been fitted"):
        trainer.fit(Net(nn.BCEWithLogitsLoss()), loader(), loader(seed=1))
    assert method.hyperparameters() == {"amplification": 10.0, "mix": 0.5}


@pytest.mark.parametrize("length", [{"max_epochs": 3}, {"max_epochs": -1, "max_steps": 18}])
def test_the_end_of_training_is_logged_however_short_it_is(length):
    trainer = tiny_trainer(MetricObjective("f1", warmup=0.0), log_every_n_steps=50, **length)
    trainer.fit(Net(nn.BCEWithLogitsLoss()), loader())
    assert trainer.callback_metrics["anyloss/amplification"].item() == pytest.approx(5 * 2 ** (17 / 18))


def test_batches_of_the_warm_up_need_no_positives():
    data = DataLoader(TensorDataset(torch.randn(32, 5), torch.arange(32.0) // 16), 16)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*lacked a class.*")
        trainer = tiny_trainer(MetricObjective("f1", warmup=0.9), max_epochs=-1, max_steps=2)
        trainer.fit(Net(nn.BCEWithLogitsLoss()), data)


def test_a_class_that_is_ignored_is_not_missed():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*lacked a class.*")
        trainer = tiny_trainer(MetricObjective("f1", "multiclass", warmup=0.0), max_epochs=1)
        trainer.fit(Net(nn.CrossEntropyLoss(ignore_index=2), 3), loader(classes=3))
    assert trainer.callback_metrics["anyloss/incomplete_batches"].item() == 0


def test_few_batches_that_lack_a_class_are_not_none():
    y = torch.cat([torch.arange(16.0) % 2] * 299 + [torch.zeros(16)])
    data = DataLoader(TensorDataset(torch.zeros(len(y), 5), y), 16)
    with pytest.warns(UserWarning, match=r"0\.333% of the epoch's batches"):
        tiny_trainer(MetricObjective("f1", warmup=0.0), max_epochs=1).fit(Net(nn.BCEWithLogitsLoss()), data)


def test_a_compiled_module_trains_as_the_plain_one():
    weights = []
    for compiled in (False, True):
        torch._dynamo.reset()
        net = Net(nn.BCEWithLogitsLoss())
        module = torch.compile(net, backend="aot_eager") if compiled else net
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own, while tracing
            tiny_trainer(MetricObjective("f1"), max_epochs=3).fit(module, loader(), loader(seed=1))
        weights.append(net.net.weight.detach())
    torch.testing.assert_close(*weights)


@pytest.mark.parametrize(
    ("criterion", "ignored", "given"),
    [
        (F.cross_entropy, -100, None),
        (partial(F.cross_entropy, ignore_index=3), 3, None),
        (lambda z, y: F.cross_entropy(z[y < 3], y[y < 3]), 7, 7),
    ],
)
def test_targets_that_a_function_leaves_out(criterion, ignored, given):
    losses, method = [], MetricObjective("f1", "multiclass", warmup=0.0, mix=1.0, ignore_index=given)

    class Keeps(Net):
        def training_step(self, batch, batch_idx):
            logits, y = self(batch[0]), batch[1]
            losses.append(self.criterion(logits, y))
            own = AnyLoss("f1", "multiclass", amplification=method.objective.amplification)
            torch.testing.assert_close(losses[-1], own(logits[y != ignored], y[y != ignored]))
            return losses[-1]

    tiny_trainer(method, max_epochs=1).fit(Keeps(criterion, 3), loader(classes=3, ignored=ignored))
    assert len(losses) == 6


def test_a_criterion_is_called_by_the_names_it_has():
    class Named(Net):
        def training_step(self, batch, batch_idx):
            return self.criterion(scores=self(batch[0]), labels=batch[1])

        validation_step = training_step

    def criterion(scores, labels):
        return F.binary_cross_entropy_with_logits(scores, labels)

    trainer = tiny_trainer(MetricObjective("f1"), max_epochs=1)
    trainer.fit(Named(criterion), loader(), loader(seed=1))
    assert "anyloss/val_f1" in trainer.callback_metrics
