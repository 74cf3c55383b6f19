"""Every way to use SingleLoopHypergradient wrongly says what to change."""

import re

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_hpo import HyperparameterSet, Positive, SingleLoopHypergradient, SingleLoopMixin
from lightning_hpo.testing import tiny_trainer


class Line(SingleLoopMixin, LightningModule):
    """Two weights: the first one outer."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.first, self.last = nn.Linear(1, 2), nn.Linear(2, 1)

    def configure_callbacks(self):
        return []

    def outer_loss(self, batch):
        return (self.last(self.first(batch[0])) - batch[1]).square().mean()

    def inner_loss(self, batch):
        return self.outer_loss(batch) + 0.1 * self.last.weight.square().sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def data(samples=16, batch_size=4):
    x = torch.linspace(-1, 1, samples)[:, None]
    return DataLoader(TensorDataset(x, 2 * x), batch_size=batch_size)


SOON = {"outer": ("first",), "every_n_steps": 1, "refine_steps": 0, "z_lr": 0.1}


def fit(callback, module=None, val="one", **arguments):
    val = data() if val == "one" else val
    trainer = tiny_trainer(callback, **{"max_steps": 3, "num_sanity_val_steps": 0, **arguments})
    trainer.fit(module or Line(), data(), val)
    return trainer


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"lr": 0.0}, "lr must be positive, got 0.0"),
        ({"momentum": 1.0}, "momentum must be in [0, 1), got 1.0"),
        ({"z_lr": -1.0}, "z_lr must be positive, got -1.0"),
        ({"z_lr": float("nan")}, "z_lr must be positive, got nan"),
        ({"every_n_steps": 0}, "every_n_steps must be a positive integer, got 0"),
        ({"every_n_steps": True}, "every_n_steps must be a positive integer, got True"),
        ({"refine_steps": -1}, "refine_steps must be an integer of at least 0, got -1"),
        ({"normalize": "all"}, "normalize must be 'global', 'per_group' or False, got 'all'"),
        ({"min_norm": 0.0}, "min_norm must be positive, got 0.0"),
        ({"product": "gauss_newton"}, "product must be 'auto', 'exact' or 'fd', got 'gauss_newton'"),
    ],
)
def test_wrong_values(arguments, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        SingleLoopHypergradient(**arguments)


def test_wrong_values_are_listed_at_once():
    with pytest.raises(ValueError, match=r"lr must be positive, got 0; z_lr must be positive, got 0; every_n"):
        SingleLoopHypergradient(lr=0, z_lr=0, every_n_steps=0)


# What is outer


def test_nothing_is_outer():
    with pytest.raises(MisconfigurationException, match=r"nothing is outer: name parts of the network \(`outer="):
        fit(SingleLoopHypergradient())


def test_a_part_that_is_not_there():
    with pytest.raises(MisconfigurationException, match="`outer` names 'fir', but the module has no such"):
        fit(SingleLoopHypergradient(outer=("fir", "first")))


def test_everything_is_outer():
    with pytest.raises(MisconfigurationException, match="every parameter is outer, and nothing is left to be inner"):
        fit(SingleLoopHypergradient(outer=("first", "last")))


def test_frozen_parts():
    module = Line()
    module.first.requires_grad_(False)
    with pytest.raises(MisconfigurationException, match=r"all outer parameters are frozen: \['first.weight', 'first.b"):
        fit(SingleLoopHypergradient(**SOON), module)
    module.first.bias.requires_grad_(True)
    before = module.first.weight.clone()
    fit(SingleLoopHypergradient(**SOON), module)
    assert torch.equal(module.first.weight, before)
    assert [p.requires_grad for p in module.first.parameters()] == [False, True]


def test_parameters_of_somebody_else():
    class Other(Line):
        def outer_parameters(self):
            return nn.Linear(1, 1).parameters()

    with pytest.raises(MisconfigurationException, match=r"`outer_parameters\(\)` of `Other` returns tensors that are"):
        fit(SingleLoopHypergradient(), Other())


def test_a_hyperparameter_that_no_loss_reads_is_named():
    class Forgetful(Line):
        def __init__(self):
            super().__init__()
            self.hypers = HyperparameterSet(forgotten=Positive(0.1))

    with pytest.raises(MisconfigurationException, match="zero hypergradient: 'forgotten' is not reached.* read it"):
        fit(SingleLoopHypergradient(**SOON), Forgetful())
    with pytest.raises(MisconfigurationException, match=r"cross derivative is zero: .*\['forgotten'\].* read it"):
        fit(SingleLoopHypergradient(every_n_steps=1, refine_steps=0), Forgetful())


def test_an_outer_loss_that_does_not_look_at_the_inner_parameters():
    callback = SingleLoopHypergradient(**SOON, val_loss=lambda module, batch: module.first.weight.square().sum())
    with pytest.warns(UserWarning, match="the outer loss does not depend on the inner parameters"):
        fit(callback)


# The loop


def test_manual_optimization():
    module = Line()
    module.automatic_optimization = False
    with pytest.raises(MisconfigurationException, match="optimizes by hand; set `automatic_optimization = True`"):
        fit(SingleLoopHypergradient(**SOON), module)


def test_strategies_that_shard_parameters():
    trainer = tiny_trainer(max_steps=1)
    trainer.strategy.__class__ = FSDPStrategy
    with pytest.raises(MisconfigurationException, match="`FSDPStrategy` shards parameters; use"):
        SingleLoopHypergradient(**SOON).setup(trainer, Line(), "fit")


def test_an_optimizer_of_outer_parameters_alone():
    class Wrong(Line):
        def configure_optimizers(self):
            return torch.optim.SGD(self.first.parameters(), lr=0.1)

    with pytest.raises(MisconfigurationException, match="no optimizer steps an inner parameter"):
        fit(SingleLoopHypergradient(**SOON), Wrong())


def test_no_validation_data():
    silent = "have no `val_dataloader`. Skipping val loop"
    with (
        pytest.warns(UserWarning, match=silent),
        pytest.raises(MisconfigurationException, match="no validation data; give the fit a validation loader, or"),
    ):
        tiny_trainer(SingleLoopHypergradient(**SOON), max_steps=1).fit(Line(), data())
    fit(SingleLoopHypergradient(**SOON, val_dataloader=data()), limit_val_batches=0)


@pytest.mark.parametrize("empty", [[], data(samples=0, batch_size=1)], ids=["list", "set"])
def test_an_empty_validation_loader(empty):
    with pytest.raises(MisconfigurationException, match="the validation loader is empty"):
        fit(SingleLoopHypergradient(**SOON, val_dataloader=empty))


class Stream(IterableDataset):
    """The rows of a loader, without a length."""

    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


class Nameless(Stream):
    """One that has a length only in name."""

    def __len__(self):
        raise NotImplementedError


@pytest.mark.parametrize("kind", [Stream, Nameless])
def test_a_stream_of_validation_data(kind):
    read, callback, module = DataLoader(kind(data().dataset), batch_size=4), SingleLoopHypergradient(**SOON), Line()
    before = module.first.weight.detach().clone()
    assert fit(callback, module, val=read, max_steps=6).global_step == 6
    assert (callback.steps, callback.held_out.epoch, callback.held_out.position) == (6, 1, 2)  # of four batches
    assert not torch.equal(module.first.weight, before)
    with pytest.raises(ValueError, match="held-out loader has no batch for each rank"):
        fit(SingleLoopHypergradient(**SOON, val_dataloader=DataLoader(kind([]), batch_size=4)))


def test_nothing_to_score_with():
    class Plain(LightningModule):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(1, 2), nn.Linear(2, 1)

        def training_step(self, batch, batch_idx):
            return self.last(self.first(batch[0])).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.last.parameters(), lr=0.1)

    with pytest.raises(MisconfigurationException, match="nothing scores a validation batch: define `validation_step`"):
        tiny_trainer(SingleLoopHypergradient(**SOON), max_steps=1).fit(Plain(), data())


def test_a_run_that_ends_before_the_first_outer_step_says_so():
    with pytest.warns(UserWarning, match=r"ended after 3 steps, before the first outer step \(`refine_steps=200`"):
        fit(SingleLoopHypergradient(outer=("first",)))


# While it runs


class Overflowing(Line):
    """Its validation loss overflows in the steps that are named."""

    def __init__(self, bad):
        super().__init__()
        self.bad, self.asked = bad, []

    def outer_loss(self, batch):
        return super().outer_loss(batch)

    def validation_step(self, batch, batch_idx):
        self.asked.append(1)
        return self.outer_loss(batch) * (float("inf") if len(self.asked) in self.bad else 1.0)


def overflowing(bad):
    module = Overflowing(bad)
    return module, lambda m, batch: m.validation_step(batch, 0)


def test_a_hypergradient_that_is_not_finite_is_left_out():
    module, loss = overflowing({2})
    callback = SingleLoopHypergradient(**SOON, val_loss=loss)
    with pytest.warns(UserWarning, match="was not finite; the outer parameters stay what they are"):
        fit(callback, module, max_steps=4)
    assert all(torch.isfinite(p).all() for p in module.parameters())
    assert callback.watch[:2] == (4, 0)


def test_ten_in_a_row_are_an_error():
    module, loss = overflowing(range(3, 1000))
    callback = SingleLoopHypergradient(**SOON, val_loss=loss)
    with (
        pytest.warns(UserWarning, match="was not finite"),
        pytest.raises(MisconfigurationException, match="10 hypergradients in a row were not finite.*z_lr"),
    ):
        fit(callback, module, max_steps=40)
    assert all(p.requires_grad for p in module.parameters())


def test_a_step_of_z_that_is_too_large():
    callback = SingleLoopHypergradient(**{**SOON, "z_lr": 4.0, "lr": 1e-3})
    with pytest.warns(UserWarning, match=r"z_lr \(nu\) is 4, but must stay below 2 / lambda_max"):
        fit(callback, max_steps=30)
