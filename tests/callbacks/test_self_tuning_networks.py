"""SelfTuning inside a Trainer; what holds for every method is in `test_matrix.py`."""

import copy

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from torch import nn
from torch.nn import functional as F
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler, TensorDataset

from lightning_hpo import HyperparameterSet, Integer, Interval, SelfTuning, SelfTuningMixin, UnitInterval
from lightning_hpo.hyper import Domain
from lightning_hpo.module_losses import ModuleLosses
from lightning_hpo.nn.self_tuning_networks import convert
from lightning_hpo.nn.self_tuning_regularisers import TunedDropout
from lightning_hpo.perturbation import Perturbation
from lightning_hpo.response_training import ResponseTraining
from lightning_hpo.testing import TinyClassifier, TinyImages, tiny_trainer


def whole(data):
    """All of a data set in one batch, read at once."""
    return DataLoader(data, batch_size=None, sampler=BatchSampler(SequentialSampler(data), len(data), drop_last=False))


def fit(module, callback, train, val, *others, **trainer):
    tiny_trainer(callback, *others, **trainer).fit(module, whole(train), whole(val))
    return module


# The linear regression whose best response is known: |X w - y|^2 / 2n + exp(l) |w|^2 / 2


class Exponential(Domain):
    """The l2 weight as the closed form has it."""

    def problems(self):
        return []

    def value(self, raw):
        return raw.exp()

    def raw(self, value):
        return value.log()


L2, SIGMA = 0.4, 0.3


def ridge():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(12, 4, generator=generator, dtype=torch.float64)
    y = x @ torch.tensor([1.0, -2.0, 0.5, 0.0], dtype=torch.float64) + torch.randn(12, generator=generator).double()
    hessian = x.T @ x / len(x)
    return x, y, hessian, torch.linalg.solve(hessian + L2 * torch.eye(4).double(), x.T @ y / len(x))


class Ridge(LightningModule):
    """Each row sees its example and its own weights: those of the response to its own l2 weight."""

    def __init__(self, general):
        super().__init__()
        self.hypers = HyperparameterSet(l2=Exponential(torch.tensor(L2, dtype=torch.float64)))
        self.linear = nn.Linear(4, 1, bias=False, dtype=torch.float64)
        self.linear.weight.data = general[None].clone()

    def training_step(self, batch, batch_idx):
        x, y = batch
        units = torch.eye(4, dtype=x.dtype).expand(len(x), 4, 4)
        out = self.linear(torch.cat([x[:, None], units], 1))[..., 0]
        penalty = self.hypers["l2"] * out[:, 1:].square().sum(1)
        return ((out[:, 0] - y).square() + penalty).mean() / 2

    def validation_step(self, batch, batch_idx):
        return (self.linear(batch[0])[:, 0] - batch[1]).square().mean() / 2

    def configure_optimizers(self):
        return torch.optim.SGD(self.linear.parameters(), lr=0.0)  # it stands at the solution


class Average(Callback):
    """The mean of the response's derivative over the last steps."""

    def __init__(self, callback, last):
        self.callback, self.last, self.seen = callback, last, []

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step > trainer.max_steps - self.last:
            response = self.callback.response
            (layer,) = response.layers.values()
            self.seen.append((layer.gate[0] * layer.weight[0]).detach().clone())

    def on_train_end(self, *_):
        self.found = torch.stack(self.seen).mean(0)


def test_ridge_regression_learns_its_best_response_and_hypergradient():
    """One fit: the response within a hundredth of the closed form, and so the hypergradient."""
    x, y, hessian, general = ridge()
    callback = SelfTuning(
        scale=SIGMA,
        tune_scales=False,
        encoding="identity",
        warmup_steps=0,
        lr=1e-12,
        response_optimizer=lambda p: torch.optim.SGD(p, lr=2.0, momentum=0.5),
    )
    average = Average(callback, last=400)
    data = TensorDataset(x.repeat(800, 1), y.repeat(800))
    fit(Ridge(general), callback, data, TensorDataset(x, y), average, max_steps=480)
    l2 = L2 * torch.tensor(SIGMA**2 / 2).exp()
    expected = torch.linalg.solve(hessian + l2 * (1 + SIGMA**2) * torch.eye(4).double(), -l2 * general)
    assert (average.found - expected).norm() / expected.norm() < 0.01
    slope = x.T @ (x @ general - y) / len(x)  # of the validation loss
    implicit = torch.linalg.solve(hessian + L2 * torch.eye(4).double(), -L2 * general)
    assert (slope @ average.found / (slope @ expected)).item() == pytest.approx(1, abs=0.01)
    assert (slope @ average.found / (slope @ implicit)).item() == pytest.approx(1, abs=0.03)  # of order sigma^2


# One step, without a Trainer


class Small(nn.Module):
    """A network with tuned dropout in double precision."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.hypers = HyperparameterSet(drop=Interval(torch.tensor(0.3).double(), 0, 0.95))
        self.drop = TunedDropout(lambda: self.hypers["drop"])
        self.net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), self.drop, nn.Linear(5, 2)).double()

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    validation_step = training_step


@pytest.mark.parametrize("encoding", ["identity", "cos_sin"])
@pytest.mark.parametrize("mode", ["delta", "stn"])
def test_the_hypergradient_is_the_slope_through_the_response(mode, encoding):
    net = Small()
    sets = {"": net.hypers}
    perturbation = Perturbation(sets, 0.7, encoding=encoding).double()
    response = convert(net.net, perturbation.inputs, gate_std=0.8)
    training = ResponseTraining(response, perturbation, ModuleLosses(net, sets), mode)
    batch = (torch.randn(6, 3).double(), torch.tensor([0, 1] * 3))
    training.held_out_noise.begin(3)
    loss, slope, width = training.hypergradient([batch], entropy_weight=0.1)
    noise = training.held_out_noise
    noise.begin(3)
    drawn, raw0, scale0 = noise.rows(6).double(), perturbation.raw().detach(), perturbation.scale.detach().clone()

    def score(raw, scale):
        rows = raw + F.softplus(scale) * drawn
        here = perturbation.encoded(raw0) if mode == "delta" else 0.0
        net.eval()
        with response.at(perturbation.encoded(rows) - here):
            found = net.training_step(batch, 0)
        net.train()
        return found - 0.1 * torch.log(F.softplus(scale)).sum()

    step = torch.tensor([1e-6]).double()
    torch.testing.assert_close(
        slope[0], (score(raw0 + step, scale0) - score(raw0 - step, scale0)) / 2e-6, rtol=1e-5, atol=1e-7
    )
    torch.testing.assert_close(
        width[0], (score(raw0, scale0 + step) - score(raw0, scale0 - step)) / 2e-6, rtol=1e-5, atol=1e-7
    )
    assert slope.abs() > 1e-5
    # without perturbation: the same slope in one set of weights
    _, slope, nothing = training.hypergradient([batch], None)
    drawn = torch.zeros(1, 1).double()
    net.eval()
    numeric = (score(raw0 + step, scale0) - score(raw0 - step, scale0)) / 2e-6
    torch.testing.assert_close(slope[0], numeric, rtol=1e-5, atol=1e-7)
    assert nothing is None
    assert loss.item() > 0


def test_the_response_step_is_the_gradient_of_the_linearised_loss():
    net = Small()
    sets = {"": net.hypers}
    perturbation = Perturbation(sets, 0.7).double()
    response = convert(net.net, perturbation.inputs, gate_std=0.8)
    training = ResponseTraining(response, perturbation, ModuleLosses(net, sets))
    batch = (torch.randn(6, 3).double(), torch.tensor([0, 1] * 3))
    net.drop.eval()  # no chance: the perturbed rates are not felt, the response is
    net.hypers.read.clear()
    training.noise.begin(0)
    training.respond(batch, place=0, of=2)
    training.noise.begin(0)
    rows = perturbation.rows(training.noise.rows(6)).detach()
    inputs = torch.zeros(6, perturbation.inputs).double()
    step = 1e-6

    def loss():
        with torch.no_grad():
            with response.at(inputs + step * perturbation.direction(rows)):
                ahead = net.net(batch[0])
            with response.at(inputs - step * perturbation.direction(rows)):
                behind = net.net(batch[0])
            return 0.5 * F.cross_entropy(net.net(batch[0]) + (ahead - behind) / (2 * step), batch[1])

    for parameter in response.parameters():
        entry = parameter.data.view(-1)[:1]
        found, old = parameter.grad.view(-1)[0].item(), entry.clone()
        entry.copy_(old + 1e-4)
        up = loss()
        entry.copy_(old - 1e-4)
        down = loss()
        entry.copy_(old)
        assert found == pytest.approx(((up - down) / 2e-4).item(), rel=1e-4, abs=1e-7)
    assert all(p.grad is None for p in net.parameters())  # general weights and hyperparameters learn elsewhere


def test_the_parts_of_a_batch_have_together_the_gradient_of_the_whole():
    net = Small()
    sets = {"": net.hypers}
    perturbation = Perturbation(sets, 0.7).double()
    response = convert(net.net, perturbation.inputs, gate_std=0.8)
    batch = (torch.randn(6, 3).double(), torch.tensor([0, 1] * 3))
    net.drop.eval()

    def gradients(parts):
        training = ResponseTraining(response, perturbation, ModuleLosses(net, sets), parts=parts)
        found = []
        for turn in range(4, 4 + parts):
            response.zero_grad()
            training.begin(turn)
            training.noise.begin(0)  # the same perturbations for all
            training.respond(batch)
            found.append([p.grad.clone() for p in response.parameters()])
        return found

    (whole,), thirds = gradients(1), gradients(3)
    for expected, *own in zip(whole, *thirds, strict=True):
        torch.testing.assert_close(sum(own) / 3, expected, rtol=1e-12, atol=1e-14)
        assert not torch.allclose(own[0], own[1])


def test_micro_batches_give_the_response_the_gradient_of_their_batch():
    net = Small()
    sets = {"": net.hypers}
    perturbation = Perturbation(sets, 0.7).double()
    response = convert(net.net, perturbation.inputs, gate_std=0.8)
    batch = (torch.randn(12, 3).double(), torch.tensor([0, 1] * 6))
    net.drop.eval()

    def gradient(turn, micro_batches):
        training = ResponseTraining(response, perturbation, ModuleLosses(net, sets), parts=2)
        response.zero_grad()
        training.begin(turn)
        for place, rows in enumerate(torch.arange(12).chunk(micro_batches)):
            training.respond((batch[0][rows], batch[1][rows]), place, micro_batches)
        return [p.grad.clone() for p in response.parameters()]

    for turn in range(2):
        for micro_batches in (2, 3, 4):
            for found, expected in zip(gradient(turn, micro_batches), gradient(turn, 1), strict=True):
                torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


# In the Trainer


def every_step(schedule):
    return [schedule.optimizer], [{"scheduler": schedule, "interval": "step"}]


class Net(LightningModule):
    """Dropout, batch norm and hyperparameters of three kinds; notes what a training step sees."""

    def __init__(self, per_example=True):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            parts = nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.25), nn.Linear(16, 4)
            self.net = nn.Sequential(nn.Flatten(), *parts)
        self.hypers = HyperparameterSet(smooth=UnitInterval(0.3), count=Integer(2, 0, 5), shared=UnitInterval(0.5))
        self.seen, self.outputs = [], []

    def training_step(self, batch, batch_idx):
        values = {name: self.hypers[name] for name in self.hypers}
        self.seen.append({name: value.detach().clone() for name, value in values.items()})
        logits = self.net(batch[0])
        right = F.cross_entropy(logits, batch[1], reduction="none")
        return ((1 - values["smooth"]) * right - values["smooth"] * logits.log_softmax(1).mean(1)).mean()

    def validation_step(self, batch, batch_idx):
        logits = self.net(batch[0])
        self.outputs.append(logits.detach().clone())
        self.log("val_loss", F.cross_entropy(logits, batch[1]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.net.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)


def run(callback, module=None, **trainer):
    module = module or Net()
    torch.manual_seed(1)
    trainer = {"max_epochs": 2, "num_sanity_val_steps": 0, **trainer}
    tiny_trainer(*([callback] if callback else []), **trainer).fit(module, TinyImages(8))
    return module


SOON = {"warmup_steps": 2, "train_steps": 2, "lr": 0.05}


def test_examples_have_values_of_their_own_and_a_batch_shares_what_it_must():
    module = run(SelfTuning(mode="stn", per_batch=["shared"], scale={"count": 3.0}, **SOON))
    for seen in module.seen:
        assert {name: tuple(value.shape) for name, value in seen.items()} == {
            "smooth": (8,),
            "count": (8,),
            "shared": (),
        }
        assert len(seen["smooth"].unique()) == 8
        assert seen["count"].frac().abs().max() < 1e-6
    assert len(torch.stack([seen["shared"] for seen in module.seen]).unique()) == 12
    assert module.hypers["smooth"].ndim == 0  # afterwards it is one value again


def test_delta_leaves_the_training_of_the_network_as_it_was_bit_for_bit():
    """Random numbers, running statistics, logged values and weights: the second pass is not felt."""
    with pytest.warns(UserWarning, match="nothing was tuned"):
        ours = run(SelfTuning(dropout=(), warmup_steps=500))
    plain = run(None)
    for name, value in plain.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name
    passes = [tuple(seen["smooth"].shape) for seen in ours.seen]
    assert passes == [(4,), ()] * 12  # the second pass sees half of a batch of 8


def test_the_second_pass_may_be_left_out_now_and_then():
    module = run(SelfTuning(response_every=3, **SOON))
    passes = ["second" if seen["smooth"].ndim else "first" for seen in module.seen]
    assert passes == (["second"] + ["first"] * 3) * 4
    assert module.hypers["smooth"].item() != pytest.approx(0.3, abs=1e-6)


@pytest.mark.parametrize("mode", ["delta", "stn"])
def test_the_network_that_is_left_is_the_one_that_was_validated(mode):
    callback = SelfTuning(mode=mode, warmup_steps=0, train_steps=1, lr=0.1)
    states = []

    class Keep(Callback):
        def on_validation_end(self, trainer, pl_module):
            states.append(copy.deepcopy(pl_module.state_dict()))

    module = Net()
    tiny_trainer(callback, Keep(), max_epochs=2, num_sanity_val_steps=0).fit(module, TinyImages(8))
    assert [type(part) for part in module.net] == [type(part) for part in Net().net]
    images = TinyImages(8).val_set.tensors[0]
    with torch.no_grad():
        found = module.eval().net(images)
        torch.testing.assert_close(found, torch.cat(module.outputs[-2:]), rtol=1e-5, atol=1e-5)
        plain = Net()  # what was saved is a plain network with the same predictions
        plain.load_state_dict(states[-1])
        torch.testing.assert_close(plain.eval().net(images), found, rtol=1e-5, atol=1e-5)


def test_hyperparameters_learn_from_validation_alone():
    callback = SelfTuning(**SOON)
    grads = []

    class Look(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            grads.extend((raw.grad, raw.requires_grad) for raw in pl_module.hypers.parameters())

    tiny_trainer(callback, Look(), max_steps=6).fit(Net(), TinyImages(8))
    assert grads
    assert all(grad is None and not wanted for grad, wanted in grads)


def test_dropout_of_an_ordinary_network_is_tuned_by_name():
    module = TinyClassifier()
    callback = SelfTuning(dropout=("*.mlp.*", "network.blocks.0.attn.proj_drop"), **SOON)
    tiny_trainer(callback, max_steps=8).fit(module, TinyImages())
    found = callback.hyperparameters()
    assert list(found) == ["*/mlp/*", "network/blocks/0/attn/proj_drop"] + [
        f"scale.{name}" for name in ("*/mlp/*", "network/blocks/0/attn/proj_drop")
    ]
    assert 0.005 < found["*/mlp/*"] < 0.3
    assert found["*/mlp/*"] != pytest.approx(0.05, abs=1e-6)
    assert {type(m) for m in module.modules() if "drop" in type(m).__name__.lower()} == {nn.Dropout}


def test_the_response_follows_the_users_optimizer():
    rates = []

    class Falling(Net):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            return every_step(torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5))

    callback = SelfTuning(warmup_steps=0, train_steps=2)

    class Look(Callback):
        def on_train_batch_end(self, *_):
            rates.append([(group["lr"], group["momentum"], group["weight_decay"]) for group in groups()])

    def groups():
        return callback.response_optimizer.param_groups

    tiny_trainer(callback, Look(), max_steps=3).fit(Falling(), TinyImages())
    assert rates == [[(lr, 0.9, 1e-3), (lr, 0.9, 0.0)] for lr in (0.1, 0.05, 0.025)]


def test_a_loss_that_is_not_finite_moves_nothing():
    class Broken(Net):
        def validation_step(self, batch, batch_idx):
            return self.net(batch[0]).sum() * float("nan")

    callback = SelfTuning(warmup_steps=0, train_steps=2)
    module = Broken()
    with pytest.warns(UserWarning, match="not finite; the hyperparameters stay what they are"):
        tiny_trainer(callback, max_steps=4, limit_val_batches=2, num_sanity_val_steps=0).fit(module, TinyImages())
    assert module.hypers["smooth"].item() == pytest.approx(0.3)
    assert callback.useless == 2


@pytest.mark.parametrize("mode", ["delta", "stn"])
def test_batch_norm_under_autocast(mode):
    module = run(SelfTuning(mode=mode, **SOON), precision="bf16-mixed")
    assert module.hypers["smooth"].item() != pytest.approx(0.3, abs=1e-6)


def test_the_mixin_is_a_door():
    class Own(SelfTuningMixin, Net):
        pass

    module = run(None, Own(self_tuning_args=SOON))
    assert module.hypers["smooth"].item() != pytest.approx(0.3, abs=1e-6)


def test_input_dropout_of_a_linear_regression_ends_at_the_best_rate():
    """Dropout is an l2 penalty here, p / (1 - p) sum_j w_j^2 mean(x_j^2), so the best rate is known."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(15, generator=generator)

    def draw(samples):
        x = torch.randn(samples, 15, generator=generator)
        return TensorDataset(x, x @ weights + 2.5 * torch.randn(samples, generator=generator))

    (x, y), val = draw(30).tensors, draw(2000)
    x_val, y_val = val.tensors

    def loss_at(p):
        penalty = p / (1 - p) * torch.diag(x.square().mean(0))
        solution = torch.linalg.solve(x.T @ x / len(x) + penalty, x.T @ y / len(x))
        return (x_val @ solution - y_val).square().mean().item()

    rates = [i / 100 for i in range(1, 95)]
    best = min(rates, key=loss_at)
    assert 0.15 < best < 0.6

    class Line(LightningModule):
        def __init__(self):
            super().__init__()
            self.hypers = HyperparameterSet(p=Interval(0.1, 0, 0.95))
            self.net = nn.Sequential(TunedDropout(lambda: self.hypers["p"]), nn.Linear(15, 1, bias=False))

        def training_step(self, batch, batch_idx):
            return (self.net(batch[0])[:, 0] - batch[1]).square().mean()

        validation_step = training_step

        def configure_optimizers(self):
            return torch.optim.SGD(self.net.parameters(), lr=0.05)

    class Watch(Callback):
        seen = []

        def on_train_batch_end(self, trainer, pl_module, *_):
            self.seen.append(pl_module.hypers["p"].item())

    torch.manual_seed(0)
    fast = {"response_optimizer": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), "lr": 0.01}
    callback = SelfTuning(warmup_steps=50, train_steps=2, tune_scales=False, **fast)
    data = TensorDataset(x.repeat(20, 1), y.repeat(20))
    fit(
        Line(),
        callback,
        data,
        val,
        watch := Watch(),
        max_steps=600,
        limit_val_batches=1,
        check_val_every_n_epoch=10_000,
    )
    assert abs(sum(watch.seen[-150:]) / 150 - best) < 0.05
