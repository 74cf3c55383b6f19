"""Every way to use Hypergradient wrongly says what to change, as early as it can be known."""

import re

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_hpo import Hypergradient, HyperparameterSet, Positive
from lightning_hpo.hypergradient_arguments import choose_estimator
from lightning_hpo.testing import TinyImages, tiny_trainer
from lightning_hpo.testing.run import fit_two_ranks


class Line(LightningModule):
    """One weight, and a validation step that returns its loss."""

    def __init__(self, optimizer="SGD", **settings):
        super().__init__()
        self.linear = nn.Linear(1, 1)
        self.make = lambda parameters: getattr(torch.optim, optimizer)(parameters, **{"lr": 0.01, **settings})

    def training_step(self, batch, batch_idx):
        return (self.linear(batch[0]) - batch[1]).square().mean()

    def validation_step(self, batch, batch_idx):
        return (self.linear(batch[0]) - batch[1]).square().mean()

    def configure_optimizers(self):
        return self.make(self.parameters())


def data(samples=16, batch_size=4):
    x = torch.linspace(-1, 1, samples)[:, None]
    return DataLoader(TensorDataset(x, 2 * x), batch_size=batch_size)


DECAY = {"tune": ("weight_decay",), "every_n_steps": 1}


def fit(callback, module=None, val="one", **arguments):
    val = data() if val == "one" else val
    trainer = tiny_trainer(callback, **{"max_steps": 3, "num_sanity_val_steps": 0, **arguments})
    trainer.fit(module or Line(), data(), val)
    return trainer


# Values


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"estimator": "ift"}, "estimator must be 'auto' or one of ['darts_fd', 'es', 'forward', 'ift_bicgstab'"),
        ({"tune": ("weight_decay", "decay")}, "tune may name ('lr', 'weight_decay', 'momentum', 'beta2'), got"),
        ({"tune": "lr"}, "got ('l', 'r')"),
        ({"product": "gauss_newton"}, "product must be 'auto', 'exact' or 'fd', got 'gauss_newton'"),
        ({"sync": "none"}, "sync must be 'exact' or 'local', got 'none'"),
        ({"every_n_steps": 0}, "every_n_steps must be a positive integer, got 0"),
        ({"every_n_steps": True}, "every_n_steps must be a positive integer, got True"),
        ({"warmup_steps": -1}, "warmup_steps must be an integer of at least 0, got -1"),
        ({"lr": 0.0}, "lr must be positive, got 0.0"),
        ({"lr": float("nan")}, "lr must be positive, got nan"),
        ({"max_norm": 0}, "max_norm must be positive, got 0"),
        ({"tune": ("lr",), "bounds": {"lr": (2.0, 1.0)}}, "bounds must be pairs low < high"),
        ({"tune": ("lr",), "bounds": {"lr": 3}}, "bounds must be pairs low < high"),
        ({"tune": ("lr",), "bounds": {"lr": (0.0, float("inf"))}}, "bounds must be pairs low < high"),
        ({"tune": ("lr",), "bounds": {"momentum": (0, 1)}}, "bounds may name what is tuned, ('lr',), got ['momentum']"),
    ],
)
def test_wrong_values(arguments, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        Hypergradient(**arguments)


def test_all_wrong_values_at_once():
    with pytest.raises(ValueError, match=r"tune.*estimator.*every_n_steps.*lr.*product.*sync"):
        Hypergradient(tune=("x",), estimator="x", every_n_steps=0, lr=-1, product="x", sync="x")


@pytest.mark.parametrize("estimator", ["ift_cg", "ift_neumann", "t1t2", "darts_fd", "sama"])
@pytest.mark.parametrize("name", ["lr", "momentum", "beta2"])
def test_what_does_not_change_where_training_ends_needs_an_estimator_that_follows_it(estimator, name):
    with pytest.raises(ValueError, match=rf"'{estimator}' looks at where training ends, which \['{name}'\] do not"):
        Hypergradient(tune=("weight_decay", name), estimator=estimator)
    assert choose_estimator("auto", ("weight_decay", name)) == "unrolled"


@pytest.mark.parametrize(("value", "words"), [(-0.1, "above 0, got -0.1"), (float("inf"), "finite")])
def test_a_first_value_outside_of_its_domain(value, words):
    with pytest.raises(ValueError, match=words):
        HyperparameterSet(penalty=Positive(value))


# The set-up


def test_nothing_to_tune():
    with pytest.raises(MisconfigurationException, match=r"nothing to tune: name settings of the optimizer"):
        fit(Hypergradient())


class Unscored(LightningModule):
    training_step, configure_optimizers = Line.training_step, Line.configure_optimizers

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(1, 1)
        self.make = lambda parameters: torch.optim.SGD(parameters, 0.01)


def test_everything_that_setup_can_know_at_once():
    with pytest.raises(MisconfigurationException, match=r"(?s)nothing to tune.*define `validation_step`, or give"):
        tiny_trainer(Hypergradient(), max_steps=1).fit(Unscored(), data())


@pytest.mark.parametrize("found", [lambda self, batch: None, lambda self, batch: self.log("val_acc", torch.ones(()))])
def test_a_validation_step_without_a_loss(found):
    class Silent(Line):
        def validation_step(self, batch, batch_idx):
            found(self, batch)

    with pytest.raises(MisconfigurationException, match=r"neither returns a loss nor logs `val_loss`"):
        fit(Hypergradient(**DECAY), Silent())


def test_a_validation_loss_under_a_name_that_is_not_logged():
    class Logging(Line):
        def validation_step(self, batch, batch_idx):
            self.log("val_mse", super().validation_step(batch, batch_idx))

    with pytest.raises(MisconfigurationException, match=r"logs no `val_mae`, but \['val_mse'\]"):
        fit(Hypergradient(**DECAY, val_loss="val_mae"), Logging())


def test_a_loss_that_is_no_scalar():
    with pytest.raises(MisconfigurationException, match=r"validation loss must be a scalar tensor, got \(4, 1\)"):
        fit(Hypergradient(**DECAY, val_loss=lambda module, batch: module.linear(batch[0])))


def test_no_validation_data():
    silent = "have no `val_dataloader`. Skipping val loop"
    with (
        pytest.warns(UserWarning, match=silent),
        pytest.raises(MisconfigurationException, match="no validation data; give the fit a validation loader, or"),
    ):
        tiny_trainer(Hypergradient(**DECAY), max_steps=1).fit(Line(), data())
    with pytest.raises(MisconfigurationException, match=r"no validation data \(`limit_val_batches` is 0\)"):
        fit(Hypergradient(**DECAY), limit_val_batches=0)
    fit(Hypergradient(**DECAY, val_dataloader=data()), limit_val_batches=0)


@pytest.mark.parametrize("val", [[data(), data()], {"clean": data(), "noisy": data()}], ids=["list", "dict"])
def test_several_validation_loaders(val):
    class Either(Line):
        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            return super().validation_step(batch, batch_idx)

    with pytest.raises(MisconfigurationException, match="there are 2 validation loaders; give one as `val_dataloader`"):
        fit(Hypergradient(**DECAY), Either(), val=val)
    fit(Hypergradient(**DECAY, val_dataloader=data()), Either(), val=val)


@pytest.mark.parametrize("empty", [[], DataLoader(TensorDataset(torch.zeros(0, 1)), batch_size=1)], ids=["list", "set"])
def test_an_empty_validation_loader(empty):
    with pytest.raises(MisconfigurationException, match="the validation loader is empty"):
        fit(Hypergradient(**DECAY, val_dataloader=empty))


def test_validation_data_may_be_a_stream():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(data().dataset)

    callback = Hypergradient(**DECAY, val_dataloader=DataLoader(Stream(), batch_size=4))
    fit(callback)
    assert callback.held_out.position == 3


def test_a_validation_loader_that_can_be_read_only_once():
    once = ((x, x) for x in torch.ones(2, 4, 1))
    with pytest.raises(ValueError, match="can be read only once"):
        fit(Hypergradient(**DECAY, val_dataloader=once))


def test_validation_that_comes_epochs_later_still_gives_its_data():
    callback = Hypergradient(**DECAY, lr=0.1)
    fit(callback, check_val_every_n_epoch=100)
    assert callback.hyperparameters()["weight_decay"] != pytest.approx(1e-6, rel=1e-3)


@pytest.mark.parametrize("estimator", ["ift_cg", "darts_fd", "unrolled", "es"])
def test_a_hyperparameter_that_no_loss_reads_is_named(estimator):
    class Forgetful(Line):
        def __init__(self):
            super().__init__()
            self.hypers = HyperparameterSet(used=Positive(0.1), forgotten=Positive(0.1))

        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) + self.hypers["used"] * self.linear.weight.square().sum()

    arguments = {"estimator_args": {"steps": 1}} if estimator in ("unrolled", "es") else {}
    with pytest.raises(MisconfigurationException, match=r"zero hypergradient: 'forgotten' is not reached.*not read it"):
        fit(Hypergradient(estimator=estimator, every_n_steps=1, **arguments), Forgetful())


# The optimizer


def test_an_optimizer_whose_step_is_not_known():
    with pytest.raises(MisconfigurationException, match="Adagrad"):
        fit(Hypergradient(tune=("weight_decay",)), Line("Adagrad"))
    with pytest.raises(MisconfigurationException, match="Adagrad"):
        fit(Hypergradient(hypers=HyperparameterSet(a=Positive(1.0)), estimator="sama"), Line("Adagrad"))


def test_a_setting_that_the_optimizer_does_not_have():
    with pytest.raises(MisconfigurationException, match="`SGD` has no 'beta2'"):
        fit(Hypergradient(tune=("lr", "beta2")))


def test_a_setting_that_begins_outside_of_its_bounds():
    bounds = {"weight_decay": (1e-4, 1e-2)}
    with pytest.raises(MisconfigurationException, match=r"'weight_decay' begins at 0.5, outside of its bounds 0.0001 "):
        fit(Hypergradient(**DECAY, bounds=bounds), Line(weight_decay=0.5))
    with pytest.raises(MisconfigurationException, match="'lr_factor' begins at 1, outside of its bounds 2 to 3"):
        fit(Hypergradient(tune=("lr",), bounds={"lr": (2.0, 3.0)}))
    callback = Hypergradient(**DECAY, bounds=bounds, lr=1.0)
    fit(callback)  # no decay is no first value
    assert 1e-4 < callback.hyperparameters()["weight_decay"] < 1e-2


def test_no_optimizer():
    class Frozen(Line):
        def configure_optimizers(self):
            return None

    with (
        pytest.warns(UserWarning, match="returned `None`"),
        pytest.raises(MisconfigurationException, match="no optimizer steps the module's parameters"),
    ):
        fit(Hypergradient(**DECAY), Frozen())


def test_manual_optimization():
    module = Line()
    module.automatic_optimization = False
    with pytest.raises(MisconfigurationException, match="optimizes by hand; set `automatic_optimization = True`"):
        fit(Hypergradient(**DECAY), module)


@pytest.mark.parametrize("strategy", [FSDPStrategy, DeepSpeedStrategy])
def test_strategies_that_shard_parameters(strategy):
    trainer = tiny_trainer(max_steps=1)
    trainer.strategy.__class__ = strategy
    with pytest.raises(MisconfigurationException, match=f"`{strategy.__name__}` shards parameters; use"):
        Hypergradient(**DECAY).setup(trainer, Line(), "fit")


# While it runs


class Overflowing(Line):
    """Its validation loss overflows in the steps that are named."""

    def __init__(self, bad):
        super().__init__(weight_decay=0.1)
        self.bad, self.asked = bad, []  # a list: the losses are those of a stand-in

    def outer_loss(self, batch):
        self.asked.append(1)
        return super().validation_step(batch, 0) * (float("inf") if len(self.asked) in self.bad else 1.0)


def test_a_hypergradient_that_is_not_finite_is_left_out():
    module, callback, values = Overflowing({2}), Hypergradient(**DECAY, lr=0.5), []
    step, skip = callback._step, callback._skip

    def watched(kind, old):
        def call(*arguments):
            old(*arguments)
            values.append((kind, callback.hyperparameters()["weight_decay"]))

        return call

    callback._step, callback._skip = watched("step", step), watched("skip", skip)
    with pytest.warns(UserWarning, match="was not finite; the hyperparameters stay what they are"):
        fit(callback, module, max_steps=4)
    assert [kind for kind, _ in values] == ["step", "skip", "step", "step"]
    assert values[1][1] == values[0][1] != values[2][1]
    assert all(torch.isfinite(raw).all() for raw in callback.tuned.parameters())
    assert callback.useless == 0


def test_ten_in_a_row_are_an_error():
    callback = Hypergradient(**DECAY)
    with (
        pytest.warns(UserWarning, match="was not finite"),
        pytest.raises(MisconfigurationException, match="10 hypergradients in a row were not finite"),
    ):
        fit(callback, Overflowing(range(3, 100)), max_steps=40)
    assert callback.steps == 12


class Once(torch.autograd.Function):
    """The identity, with a backward pass that cannot be differentiated."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return grad


class Stubborn(Line):
    def training_step(self, batch, batch_idx):
        return (Once.apply(self.linear(batch[0])) - batch[1]).square().mean()


@pytest.mark.parametrize("estimator", ["auto", "t1t2", "unrolled"])
def test_what_cannot_be_differentiated_twice(estimator):
    """Differences where that is left open, an error that names the remedy where exact products are asked for."""
    extra = {"estimator": estimator} | ({"estimator_args": {"steps": 2}} if estimator == "unrolled" else {})
    learned = {}
    for kind in (Line, Stubborn):
        torch.manual_seed(0)
        callback = Hypergradient(**DECAY, lr=0.5, product="fd", **extra)
        fit(callback, kind(weight_decay=0.1))
        learned[kind] = callback.hyperparameters()["weight_decay"]
    assert learned[Stubborn] == learned[Line] != pytest.approx(0.1, rel=1e-2)
    with pytest.warns(UserWarning, match=r"goes on with differences of gradients \(`product='fd'`\)"):
        fit(Hypergradient(**DECAY, **extra), Stubborn())
    with pytest.raises(RuntimeError, match="cannot be differentiated twice; use product='fd'"):
        fit(Hypergradient(**DECAY, product="exact", **extra), Stubborn())


class Indefinite(Line):
    """A training loss that curves down in every direction that the validation loss looks in."""

    def __init__(self):
        super().__init__(lr=1e-4)
        self.hypers = HyperparameterSet(strength=Positive(0.5))

    def training_step(self, batch, batch_idx):
        return -self.hypers["strength"] * sum(p.square().sum() for p in self.linear.parameters())


def test_negative_curvature_leaves_one_step_back():
    """As `t1t2`, and the next solve does not begin where this one stopped."""
    learned = []
    for estimator in ("auto", "ift_cg", "t1t2"):
        torch.manual_seed(0)
        module, callback = Indefinite(), Hypergradient(estimator=estimator, every_n_steps=1, lr=0.1)
        fit(callback, module)
        learned.append(module.hypers["strength"].item())
        assert callback.carried == {}
    assert learned[0] == learned[1] == learned[2] != pytest.approx(0.5, rel=0.05)


def test_a_solve_that_converged_is_gone_on_from():
    callback = Hypergradient(**DECAY, estimator="ift_cg")
    fit(callback, Line(weight_decay=0.1))
    assert set(callback.carried) == {"u"}


class Ranked(Line):
    """Every rank has a first value of its own."""

    def __init__(self):
        super().__init__()
        self.hypers = HyperparameterSet(penalty=Positive(0.1))

    def setup(self, stage):
        with torch.no_grad():
            self.hypers.raw["penalty"] += self.trainer.global_rank

    def training_step(self, batch, batch_idx):
        images, _ = batch
        goal = images.mean((1, 2, 3))[:, None]
        return (self.linear(goal) - 2).square().mean() + self.hypers["penalty"] * self.linear.weight.square().sum()

    def validation_step(self, batch, batch_idx):
        return (self.linear(batch[0].mean((1, 2, 3))[:, None]) - 1).square().mean()


def test_ranks_that_begin_with_different_values_go_on_with_those_of_the_first():
    callback = lambda: Hypergradient(every_n_steps=1, lr=0.01)  # noqa: E731
    first, second = fit_two_ranks(callback, Ranked, TinyImages, 4, max_steps=3)
    assert first.knobs == second.knobs
    assert first.knobs[0]["penalty"] == pytest.approx(0.1)
    assert first.knobs[-1]["penalty"] != pytest.approx(0.1, rel=1e-3)
