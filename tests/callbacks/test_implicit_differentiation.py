"""Hypergradient inside a Trainer; what holds for every method is in `test_matrix.py`."""

import copy
import math

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers.logger import DummyLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_hpo import BilevelMixin, Hypergradient, HyperparameterSet, Positive
from lightning_hpo.testing import TinyClassifier, TinyImages, tiny_trainer


def regression(samples, seed, noise=0.5):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, 5, generator=generator, dtype=torch.float64)
    weights = torch.tensor([1.0, -2.0, 0.0, 0.5, 0.0], dtype=torch.float64)
    return TensorDataset(x, x @ weights + noise * torch.randn(samples, generator=generator, dtype=torch.float64))


TRAIN, VAL = regression(20, 0), regression(40, 1)


class Ridge(BilevelMixin, LightningModule):
    """Full-batch ridge regression whose penalty is a hyperparameter."""

    def __init__(self, penalty=0.1, lr=0.2, **arguments):
        super().__init__(**arguments)
        self.lr = lr
        self.linear = nn.Linear(5, 1, bias=False).double()
        nn.init.zeros_(self.linear.weight)
        self.hypers = HyperparameterSet(penalty=Positive(penalty)).double()

    def outer_loss(self, batch):
        return (self.linear(batch[0]).squeeze(1) - batch[1]).square().mean()

    def inner_loss(self, batch):
        return self.outer_loss(batch) + self.hypers["penalty"] * self.linear.weight.square().sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def fit(module, *callbacks, steps=60, train=TRAIN, val=VAL, **trainer):
    loaders = DataLoader(train, batch_size=len(train)), DataLoader(val, batch_size=len(val))
    tiny_trainer(*callbacks, max_steps=steps, **trainer).fit(module, *loaders)
    return module


def closed_form(penalty):
    """Validation loss of the ridge solution, and its slope in the penalty."""
    (x, y), (xv, yv) = TRAIN.tensors, VAL.tensors
    hessian = 2 * (x.T @ x / len(x) + penalty * torch.eye(5, dtype=x.dtype))
    w = torch.linalg.solve(hessian, 2 * x.T @ y / len(x))
    gradient = 2 * xv.T @ (xv @ w - yv) / len(xv)
    slope = -(2 * w) @ torch.linalg.solve(hessian, gradient)
    return (xv @ w - yv).square().mean().item(), slope.item()


class Gradients(Callback):
    """Writes down every hypergradient of a set's raw parameter, and the penalty it was taken at."""

    def __init__(self, callback):
        self.found = []
        step = callback._step

        def watched(gradients, norm):
            self.found.append({name: value.clone() for name, value in gradients.items()})
            step(gradients, norm)

        callback._step = watched


@pytest.mark.parametrize("estimator", ["ift_cg", "ift_normal_cg", "ift_gmres", "ift_bicgstab", "ift_exact"])
def test_the_hypergradient_is_that_of_the_closed_form_once_training_has_converged(estimator):
    module = Ridge(penalty=0.3)
    module.configure_callbacks = list
    callback = Hypergradient(estimator=estimator, every_n_steps=200, lr=1e-9)
    watch = Gradients(callback)
    fit(module, callback, steps=200)
    slope = closed_form(0.3)[1]
    inside = module.hypers.domains["penalty"]
    raw = inside.raw(torch.tensor(0.3, dtype=torch.float64)).requires_grad_()
    (pulled,) = torch.autograd.grad(inside.value(raw), raw)
    assert watch.found[0]["penalty"].item() == pytest.approx(slope * pulled.item(), rel=1e-4)


def test_the_penalty_goes_to_the_minimum_of_the_validation_loss():
    module = fit(Ridge(penalty=2.0, hypergradient_args={"every_n_steps": 10, "lr": 0.1}), steps=3000)
    grid = {penalty: closed_form(penalty)[0] for penalty in torch.logspace(-4, 1, 201).tolist()}
    best = min(grid, key=grid.get)
    learned = module.hypers["penalty"].item()
    assert closed_form(learned)[0] <= grid[best] * 1.002
    assert abs(math.log(learned / best)) < 0.3


class Plain(LightningModule):
    """The same regression without any penalty: the optimizer has it."""

    def __init__(self, optimizer):
        super().__init__()
        self.linear = nn.Linear(5, 1, bias=False).double()
        nn.init.zeros_(self.linear.weight)
        self.make = optimizer

    def training_step(self, batch, batch_idx):
        return (self.linear(batch[0]).squeeze(1) - batch[1]).square().mean()

    def validation_step(self, batch, batch_idx):
        return self.training_step(batch, batch_idx)

    def configure_optimizers(self):
        return self.make(self.parameters())


OPTIMIZERS = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.5, weight_decay=0.6),
    "Adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01, weight_decay=0.6),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weight_decay_of_an_untouched_module_has_the_slope_of_the_penalty(name):
    """A decay of 2 p is the penalty p of the ridge problem."""
    callback = Hypergradient(tune=("weight_decay",), estimator="ift_cg", every_n_steps=2000, lr=1e-9)
    watch = Gradients(callback)
    fit(Plain(OPTIMIZERS[name]), callback, steps=2000)
    domain = callback.tuned.domains["weight_decay"]
    raw = domain.raw(torch.tensor(0.6, dtype=torch.float64)).requires_grad_()
    (pulled,) = torch.autograd.grad(domain.value(raw), raw)
    assert watch.found[0]["weight_decay"].item() == pytest.approx(closed_form(0.3)[1] / 2 * pulled.item(), rel=1e-3)


def test_one_step_ahead_is_the_derivative_of_the_validation_loss_after_the_step():
    """Learning rate, momentum and decay, by differences over whole runs of one changed step."""
    names = ("lr", "momentum", "weight_decay")
    callback = Hypergradient(tune=names, every_n_steps=5, lr=1e-9)
    watch = Gradients(callback)
    make = OPTIMIZERS["SGD"]
    fit(Plain(make), callback, steps=5)
    assert set(watch.found[0]) == {"lr_factor", "momentum", "weight_decay"}

    def after(changed):
        module = Plain(make)
        optimizer = make(module.parameters())
        (x, y), (xv, yv) = TRAIN.tensors, VAL.tensors
        for step in range(5):
            if step == 4:
                optimizer.param_groups[0].update(changed)
            optimizer.zero_grad()
            module.training_step((x, y), 0).backward()
            optimizer.step()
        return module.training_step((xv, yv), 0).item()

    domains, h = callback.tuned.domains, 1e-4
    for name, setting, value in (
        ("lr_factor", "lr", 1.0),
        ("momentum", "momentum", 0.5),
        ("weight_decay",) * 2 + (0.6,),
    ):
        raw = domains[name].raw(torch.tensor(value, dtype=torch.float64))
        high, low = (domains[name].value(raw + sign * h).item() for sign in (1, -1))
        scale = 0.1 if setting == "lr" else 1.0
        numeric = (after({setting: high * scale}) - after({setting: low * scale})) / (2 * h)
        assert watch.found[0][name].item() == pytest.approx(numeric, rel=1e-3), name


def test_the_optimizer_uses_the_values_and_gets_its_own_back():
    used = []

    class Watch(Callback):
        def on_train_start(self, trainer, pl_module):
            optimizer = trainer.optimizers[0]
            optimizer.register_step_pre_hook(lambda *_: used.append(optimizer.param_groups[0]["weight_decay"]))

    callback = Hypergradient(tune=("weight_decay",), every_n_steps=2, lr=0.5)
    trainer = tiny_trainer(callback, Watch(), max_steps=6)
    module = Plain(OPTIMIZERS["SGD"])
    trainer.fit(module, DataLoader(TRAIN, batch_size=20), DataLoader(VAL, batch_size=40))
    assert used[:2] == pytest.approx([0.6, 0.6])
    assert len(set(used)) == 3
    assert used[-1] != pytest.approx(0.6, abs=1e-3)
    assert trainer.optimizers[0].param_groups[0]["weight_decay"] == 0.6


def test_training_itself_is_left_alone():
    """Gradients, random numbers, buffers, logged values: with a step size of nothing, the run is the same."""

    class Noisy(TinyClassifier):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(1)
            self.drop = nn.Dropout(0.3)

        def forward(self, images):
            return super().forward(self.drop(self.norm(images)))

    states = []
    for callbacks in (
        [],
        [Hypergradient(tune=("weight_decay",), every_n_steps=2, lr=1e-12, bounds={"weight_decay": (0.0, 1e-12)})],
    ):
        torch.manual_seed(0)
        module = Noisy()
        tiny_trainer(*callbacks, max_steps=8).fit(module, TinyImages(8))
        states.append(module.state_dict())
    for name, value in states[0].items():
        torch.testing.assert_close(value, states[1][name], rtol=1e-6, atol=1e-7)
    assert states[0]["norm.num_batches_tracked"] == states[1]["norm.num_batches_tracked"] == 8


class Points(DummyLogger):
    """Keeps what is logged, by step."""

    def __init__(self):
        super().__init__()
        self.points = {}

    def log_metrics(self, metrics, step):
        self.points.setdefault(step + 1, {}).update(metrics)


def test_loggers_get_the_values_whenever_they_are_written_to():
    logger, module = Points(), Ridge(hypergradient_args={"every_n_steps": 4, "warmup_steps": 4})
    train = DataLoader(TRAIN, batch_size=5)  # four steps an epoch
    trainer = tiny_trainer(max_steps=24, logger=logger, log_every_n_steps=6)
    trainer.fit(module, train, DataLoader(VAL, batch_size=40))
    points = [logger.points[step] for step in (12, 18, 24)]  # updates follow steps 8, 12, 16, 20 and 24
    names = {f"implicit_differentiation/{name}" for name in ("penalty", "residual", "hypergradient_norm")}
    assert all(names <= set(point) for point in points)
    values = [point["implicit_differentiation/penalty"] for point in points]
    assert len(set(values)) == 3
    assert values[-1] == pytest.approx(module.hypers["penalty"].item(), rel=1e-6)


def test_values_can_be_monitored_after_the_first_update(tmp_path):
    best = ModelCheckpoint(tmp_path, monitor="implicit_differentiation/penalty", mode="min", save_top_k=1)
    module = Ridge(penalty=3.0, hypergradient_args={"every_n_steps": 2})
    train = DataLoader(TRAIN, batch_size=4)  # five steps an epoch, validation after the third
    trainer = tiny_trainer(best, max_steps=5, val_check_interval=3, log_every_n_steps=50)
    trainer.fit(module, train, DataLoader(VAL, batch_size=40))
    assert best.best_model_score is not None


@pytest.mark.parametrize("precision", ["64-true", "bf16-true"])
def test_validation_batches_come_in_the_precision_of_the_trainer(precision):
    callback = Hypergradient(tune=("weight_decay",), every_n_steps=2, lr=0.5)
    tiny_trainer(callback, max_steps=6, precision=precision).fit(TinyClassifier(), TinyImages())
    assert math.isfinite(callback.hyperparameters()["weight_decay"])
    assert callback.hyperparameters()["weight_decay"] != pytest.approx(1e-6, rel=1e-3)  # where it began


def test_batches_are_kept_only_for_a_step_that_an_update_follows():
    """With accumulation: both micro-batches of every third step, and none of another."""
    kept = []

    class Watch(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            kept.append(len(callback._window))

    callback = Hypergradient(tune=("weight_decay",), every_n_steps=3)
    trainer = tiny_trainer(callback, Watch(), max_steps=6, accumulate_grad_batches=2)
    trainer.fit(Plain(OPTIMIZERS["SGD"]), DataLoader(TRAIN, batch_size=5), DataLoader(VAL, batch_size=40))
    assert kept == [0, 0, 2, 0, 0, 2]
    assert callback._window == []


def test_the_default_step_size_leaves_a_start_that_is_far_too_small():
    """From 1e-6 in 90 updates, though a value moves by a factor in each."""
    callback = Hypergradient(tune=("weight_decay",), every_n_steps=5)
    fit(Plain(lambda parameters: torch.optim.SGD(parameters, lr=0.1)), callback, steps=450, train=regression(8, 0, 2.0))
    assert callback.hyperparameters()["weight_decay"] > 1e-3


def test_hyperparameters_may_be_among_the_parameters_that_the_optimizer_gets():
    module = Ridge()
    fit(module, steps=5)
    assert module.hypers.raw["penalty"].requires_grad
    assert module.hypers["penalty"].item() == pytest.approx(0.1)  # no update was due, and nobody else moved it


def test_a_set_that_is_no_part_of_the_module():
    weights = HyperparameterSet(penalty=Positive(0.3)).double()

    class Outside(Plain):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) + weights["penalty"] * self.linear.weight.square().sum()

        def outer_loss(self, batch):
            return Plain.training_step(self, batch, 0)

    callback = Hypergradient(hypers=weights, every_n_steps=2, lr=0.1)
    module = fit(Outside(lambda parameters: torch.optim.SGD(parameters, lr=0.1)), callback, steps=10)
    assert weights["penalty"].item() != pytest.approx(0.3)
    assert callback.hyperparameters() == {"penalty": weights["penalty"].item()}
    assert "penalty" not in "".join(module.state_dict())
    fresh = HyperparameterSet(penalty=Positive(0.3)).double()
    other = Hypergradient(hypers=fresh, every_n_steps=2, lr=0.1)
    other.load_state_dict(copy.deepcopy(callback.state_dict()))
    assert fresh["penalty"].item() == weights["penalty"].item()


@pytest.mark.parametrize(
    "estimator", ["t1t2", "darts_fd", "sama", "unrolled", "forward", "truncated", "es", "pes", "ift_neumann"]
)
def test_every_estimator_lowers_a_penalty_that_is_far_too_large(estimator):
    extra = {
        "unrolled": {"steps": 3},
        "truncated": {"steps": 4, "keep": 2},
        "es": {"steps": 3, "sigma": 0.1},
        "pes": {"horizon": 4, "truncation": 2, "sigma": 0.1},
        "ift_neumann": {"steps": 5, "alpha": 0.05},
    }.get(estimator, {})
    arguments = {"estimator": estimator, "estimator_args": extra, "every_n_steps": 5, "lr": 0.1}
    module = fit(Ridge(penalty=3.0, lr=0.05, hypergradient_args=arguments), steps=60)
    assert module.hypers["penalty"].item() < 2.5


def test_attention_is_differentiated_twice_and_what_cannot_be_falls_back():
    callback = Hypergradient(tune=("weight_decay",), every_n_steps=2)
    tiny_trainer(callback, max_steps=2).fit(TinyClassifier(), TinyImages(8))
    assert callback.product == "auto"  # no fallback was needed

    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, grad):
            return grad

    class Stubborn(Ridge):
        def outer_loss(self, batch):
            return (Once.apply(self.linear(batch[0])).squeeze(1) - batch[1]).square().mean()

    exact = fit(Ridge(penalty=0.5, hypergradient_args={"every_n_steps": 5, "lr": 0.1}), steps=20)
    module = Stubborn(penalty=0.5, hypergradient_args={"every_n_steps": 5, "lr": 0.1})
    with pytest.warns(UserWarning, match="differences of gradients"):
        fit(module, steps=20)
    assert module.hypers["penalty"].item() == pytest.approx(exact.hypers["penalty"].item(), rel=1e-3)
