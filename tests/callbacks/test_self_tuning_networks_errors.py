"""Every way to use SelfTuning wrongly says what to change."""

import re

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_hpo import Choice, HyperparameterSet, SelfTuning, UnitInterval
from lightning_hpo.batch_parts import rows_of
from lightning_hpo.testing import tiny_trainer


class Net(LightningModule):
    """Two layers, and one hyperparameter that the training step reads."""

    def __init__(self, **hypers):
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)
        self.hypers = HyperparameterSet(**(hypers or {"smooth": UnitInterval(0.2)}))

    def forward(self, x):
        return self.last(self.first(x).relu())

    def loss(self, x, y):
        return F.cross_entropy(self(x), y)

    def training_step(self, batch, batch_idx):
        return self.loss(*batch) * (1 - self.hypers["smooth"]).mean()

    def validation_step(self, batch, batch_idx):
        return self.loss(*batch)

    def configure_optimizers(self):
        return torch.optim.SGD([*self.first.parameters(), *self.last.parameters()], lr=0.01)


def data(seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(16, 3, generator=generator)
    return DataLoader(TensorDataset(x, (x[:, 0] > 0).long()), batch_size=4)


SOON = {"warmup_steps": 0, "train_steps": 1}


def fit(callback=None, module=None, val="other", **arguments):
    train = data(0)
    val = {"other": data(1), "same": train, "none": None}[val]
    trainer = tiny_trainer(callback or SelfTuning(**SOON), **{"max_steps": 3, "num_sanity_val_steps": 0, **arguments})
    trainer.fit(module or Net(), train, val)
    return trainer


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"mode": "sgd"}, "mode must be 'delta' or 'stn', got 'sgd'"),
        ({"encoding": "one"}, "encoding must be 'cos_sin' or 'identity', got 'one'"),
        ({"train_steps": 0}, "train_steps must be a positive integer, got 0"),
        ({"valid_steps": True}, "valid_steps must be a positive integer, got True"),
        ({"warmup_steps": -1}, "warmup_steps must be an integer of at least 0, got -1"),
        ({"response_every": 0}, "response_every must be a positive integer, got 0"),
        ({"response_every": 2, "mode": "stn"}, "response_every=2 is for mode='delta'"),
        ({"lr": 0.0}, "lr must be positive, got 0.0"),
        ({"max_change": 0.0}, "max_change must be positive, got 0.0"),
        ({"entropy_weight": -1.0}, "entropy_weight must be at least 0, got -1.0"),
        ({"scale": {"a": 0.0}}, "scale must be positive, got {'a': 0.0}"),
        ({"lr": "0.1", "scale": None}, "lr must be positive, got '0.1'; scale must be positive, got None"),
        ({"entropy_weight": None}, "entropy_weight must be at least 0, got None"),
        ({"entropy_weight": float("nan")}, "entropy_weight must be at least 0, got nan"),
        ({"max_change": True}, "max_change must be positive, got True"),
        ({"seed": -1}, "seed must be an integer of at least 0, got -1"),
        ({"lr": -1.0, "train_steps": 0}, "train_steps must be a positive integer, got 0; lr must be positive"),
    ],
)
def test_arguments(arguments, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        SelfTuning(**arguments)


def refused(words, *arguments, **keywords):
    with pytest.raises(MisconfigurationException, match=words):
        fit(*arguments, **keywords)


def test_nothing_to_tune():
    class Plain(Net):
        def __init__(self):
            super().__init__()
            del self.hypers

        def training_step(self, batch, batch_idx):
            return self.loss(*batch)

    refused("there is nothing to tune: give the module a `HyperparameterSet`", module=Plain())
    refused(r"no dropout layer is named like \['\*'\]; there are none", SelfTuning(dropout="*"))


def test_hyperparameters_that_nobody_reads_or_that_cannot_be_perturbed():
    module = Net(smooth=UnitInterval(0.2), other=UnitInterval(0.5))
    refused(r"the training step does not read \['other'\]", module=module)
    refused("`act` is a Choice, whose numbers depend", module=Net(smooth=UnitInterval(0.2), act=Choice(["a", "b"])))
    refused("no hyperparameter `no`, but", SelfTuning(per_batch=["no"], **SOON))


def test_nothing_that_can_respond():
    refused("nothing to convert: needs one of Linear", SelfTuning(exclude=["*"], **SOON))
    refused("network='head' is not in `Net`, which has", SelfTuning(network="head", **SOON))

    class Other(Net):
        def configure_optimizers(self):
            return torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)

    refused("no optimizer steps the converted layers", module=Other())


def test_nothing_to_score_with():
    class Unscored(Net):
        validation_step = LightningModule.validation_step

    refused("nothing scores a validation batch", module=Unscored(), val="none")
    refused("there are no validation data", limit_val_batches=0)

    class Blind(Net):
        def validation_step(self, batch, batch_idx):
            return torch.zeros((), requires_grad=True) * 2

    refused("the validation loss does not depend on the converted layers", module=Blind())


class Stream(IterableDataset):
    """The rows of a data set, without a length."""

    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


def empty_set():
    return DataLoader(TensorDataset(torch.zeros(0, 3), torch.zeros(0, dtype=torch.long)), batch_size=4)


@pytest.mark.parametrize("empty", [list, empty_set])
def test_an_empty_validation_loader(empty):
    refused("the validation loader is empty", SelfTuning(**SOON, val_dataloader=empty()))


def test_a_stream_of_validation_data():
    callback, module = SelfTuning(**SOON, val_dataloader=DataLoader(Stream(data(1).dataset), batch_size=4)), Net()
    fit(callback, module, max_steps=12)
    assert callback.held_out.epoch > 0  # sixteen rows were read more than once
    assert module.hypers["smooth"].item() != pytest.approx(0.2)
    nothing = SelfTuning(**SOON, val_dataloader=DataLoader(Stream([]), batch_size=4))
    with pytest.raises(ValueError, match="held-out loader has no batch for each rank"):
        fit(nothing)


def test_loops_and_strategies():
    class Manual(Net):
        automatic_optimization = False

    refused("optimizes by hand", module=Manual())
    callback = SelfTuning()
    trainer = tiny_trainer(callback)
    trainer.strategy.__class__ = type("Sharded", (FSDPStrategy,), {})
    with pytest.raises(MisconfigurationException, match="shards parameters"):
        callback.setup(trainer, Net(), "fit")


def test_a_prediction_that_does_not_come_out_of_one_part():
    class Apart(Net):
        def loss(self, x, y):
            return F.cross_entropy(self.last(self.first(x).relu()), y)

    refused(
        "uses converted layers outside of a call of `Apart`.*name the part that predicts.*mode='stn'", module=Apart()
    )
    fit(SelfTuning(mode="stn", **SOON), Apart())  # which needs no prediction


def test_a_training_loss_without_the_network():
    class Elsewhere(Net):
        def training_step(self, batch, batch_idx):
            return (
                super().training_step(batch, batch_idx).detach()
                + self.first.bias.sum() * 0
                + self.hypers["smooth"].sum()
            )

    refused("training loss does not depend on the converted layers|uses converted layers outside", module=Elsewhere())


def test_compiled_modules():
    module = Net()
    module.first = torch.compile(module.first, backend="eager")
    refused(r"layers of compiled modules cannot change \(\['first'\]\)", module=module)


def test_validation_data_that_are_trained_on_and_fits_that_are_too_short():
    with pytest.warns(UserWarning, match="the validation data are the training data"):
        fit(val="same")
    with pytest.warns(UserWarning, match="ended after 3 steps, before the first update"):
        fit(SelfTuning())


def test_batches_without_tensors():
    with pytest.raises(
        ValueError, match="a batch must hold a tensor with examples along its first dimension, got dict"
    ):
        rows_of({"text": ["one", "two"]})


def test_a_network_is_given_back_after_an_error():
    class Breaks(Net):
        def training_step(self, batch, batch_idx):
            raise RuntimeError("on purpose")

    module = Breaks()
    with pytest.raises(RuntimeError, match="on purpose"):
        fit(SelfTuning(mode="stn", **SOON), module)
    assert type(module.first) is nn.Linear
    assert all(p.requires_grad for p in module.parameters())
    assert module.hypers["smooth"].ndim == 0
