"""Every way to use MetricObjective wrongly says what to change."""

import re

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_hpo import MetricObjective
from lightning_hpo.testing import tiny_trainer

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no.*")


class Net(LightningModule):
    def __init__(self, **losses):
        super().__init__()
        self.net = nn.Linear(3, 1)
        for name, loss in (losses or {"criterion": nn.BCEWithLogitsLoss()}).items():
            setattr(self, name, loss)

    def training_step(self, batch, batch_idx):
        return self.criterion(self.net(batch[0]).squeeze(1), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.binary_cross_entropy_with_logits(self.net(batch[0]).squeeze(1), batch[1]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def data():
    y = torch.arange(8.0) % 2
    return DataLoader(TensorDataset(torch.randn(8, 3, generator=torch.Generator().manual_seed(0)), y), 4)


def fit(callback=None, net=None, val=None, **arguments):
    trainer = tiny_trainer(callback or MetricObjective(), **{"max_steps": 2, **arguments})
    trainer.fit(net or Net(), data(), val)


def refused(message, *args, **kwargs):
    with pytest.raises(MisconfigurationException, match=re.escape(message)):
        fit(*args, **kwargs)


def test_every_wrong_argument_is_named_at_once():
    with pytest.raises(ValueError) as error:
        MetricObjective(
            "auc", task="ordinal", warmup=1.0, anneal=0.5, mix=0.0, amplification_start=-1.0, total_steps=0, beta=-1.0
        )
    for name in ("metric", "task", "warmup", "anneal", "mix", "amplification_start", "total_steps", "beta"):
        assert name in str(error.value)
    with pytest.raises(ValueError, match="amplification_start=2.0 has no effect on surrogate='sol-uniform'"):
        MetricObjective(surrogate="sol-uniform", amplification_start=2.0)
    for name, value in [
        ("warmup", "long"), ("amplification_start", "low"), ("total_steps", 2.5), ("total_steps", True),
        ("total_steps", "all"), ("criterion", 3), ("running", "x"), ("ignore_index", 0.5), ("metric", ["f1"]),
        ("surrogate", ["sigmoid"]),
    ]:  # fmt: skip
        with pytest.raises(
            ValueError, match=rf"^`MetricObjective`: {name} must be [^;]*, got {re.escape(repr(value))}\.$"
        ):
            MetricObjective(**{name: value})


def test_a_module_without_the_criterion_is_told_how_to_have_one():
    refused(
        "`Net` has no `criterion`: compute the loss as `self.criterion(logits, targets)`", net=Net(other=nn.Identity())
    )
    refused("name another: `criterion='loss_fn'`", net=Net(loss_fn=nn.BCEWithLogitsLoss()))
    refused("name another: `criterion='my_loss'`", net=Net(my_loss=F.binary_cross_entropy_with_logits))
    refused("`Net` has no `a.b.c`", MetricObjective(criterion="a.b.c"))
    refused("it must be called with logits and targets", net=Net(criterion=3.0))


def test_criteria_that_do_not_fit_the_task():
    refused("that is task='multiclass', not 'binary'", net=Net(criterion=nn.CrossEntropyLoss()))
    refused("that is task='binary' or 'multilabel', not 'multiclass'", MetricObjective(task="multiclass"))
    refused("takes probabilities; use `BCEWithLogitsLoss`", net=Net(criterion=nn.BCELoss()))
    refused(
        "`reduction='sum'`; a metric of a batch is one number", net=Net(criterion=nn.BCEWithLogitsLoss(reduction="sum"))
    )


def test_modules_that_optimize_by_hand():
    net = Net()
    net.automatic_optimization = False
    refused("optimizes by hand", net=net)


def test_steps_that_do_not_call_the_criterion_once():
    class Never(Net):
        def training_step(self, batch, batch_idx):
            return self.net(batch[0]).square().mean()

    class Twice(Net):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) + super().training_step(batch, batch_idx)

    refused("`training_step` did not call `self.criterion`", net=Never())
    refused("`training_step` called 2 times `self.criterion`", net=Twice())

    class More(Net):
        def training_step(self, batch, batch_idx):
            return self.criterion(self.net(batch[0]).squeeze(1), batch[1], weight=batch[1])

    with pytest.raises(ValueError, match="takes logits and targets only"):
        fit(net=More())


def test_a_criterion_that_gives_no_number_is_named_at_once():
    def several(logits, targets):
        return F.binary_cross_entropy_with_logits(logits, targets), {}

    with pytest.raises(ValueError, match="must give a tensor of one number, got a `tuple`"):
        fit(MetricObjective(warmup=0.9), net=Net(criterion=several))


@pytest.mark.parametrize("running", [None, 0.5])
def test_a_checkpoint_with_and_one_without_running_sums(running):
    written = MetricObjective(running=None if running else 0.5)
    with pytest.raises(MisconfigurationException, match="running sums, this is with.*change `running`"):
        MetricObjective(running=running).load_state_dict(written.state_dict())


def test_the_temperature_needs_a_validation_that_calls_the_criterion():
    refused("`calibrate` needs validation data", MetricObjective(calibrate=True))
    refused("needs a `validation_step` that calls `self.criterion`", MetricObjective(calibrate=True), val=data())


def test_training_without_an_end():
    class Stream(IterableDataset):
        def __iter__(self):
            yield from data().dataset

    with pytest.raises(MisconfigurationException, match="how long training is, is not known"):
        tiny_trainer(MetricObjective(), max_epochs=-1, limit_train_batches=2).fit(Net(), DataLoader(Stream(), 4))
    method = MetricObjective(total_steps=4)
    trainer = tiny_trainer(method, max_epochs=2)
    trainer.fit(Net(), DataLoader(Stream(), 4))
    assert method.hyperparameters()["amplification"] == 10


def test_wrong_targets_are_named():
    y = torch.arange(8.0) % 3
    with pytest.raises(ValueError, match="targets must be 0 or 1, got 2"):
        tiny_trainer(MetricObjective(), max_steps=2).fit(Net(), DataLoader(TensorDataset(torch.zeros(8, 3), y), 4))


def test_wrong_targets_of_validation_are_named():
    class Calls(Net):
        def validation_step(self, batch, batch_idx):
            self.log("val_loss", self.criterion(self.net(batch[0]).squeeze(1), batch[1]))

    val = DataLoader(TensorDataset(torch.zeros(8, 3), torch.arange(8.0) % 3), 4)
    with pytest.raises(ValueError, match="validation targets must be 0 or 1, got 2"):
        fit(net=Calls(), val=val)


def test_two_of_them_need_two_criteria():
    class Two(Net):
        def __init__(self):
            super().__init__(first=nn.BCEWithLogitsLoss(), second=nn.BCEWithLogitsLoss())

        def training_step(self, batch, batch_idx):
            logits = self.net(batch[0]).squeeze(1)
            return self.first(logits, batch[1]) + self.second(-logits, 1 - batch[1])

    trainer = tiny_trainer(MetricObjective(criterion="first"), MetricObjective("mcc", criterion="second"), max_steps=2)
    trainer.fit(Two(), data())
    assert "anyloss[first,binary]/soft_metric" in trainer.callback_metrics
