"""SingleLoopHypergradient inside a Trainer; what holds for every method is in `test_matrix.py`."""

import copy
from itertools import pairwise, repeat

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_hpo import HyperparameterSet, Positive, SingleLoopHypergradient, SingleLoopMixin
from lightning_hpo.functional.bilevel.bo_rep import SingleLoopBilevel
from lightning_hpo.testing import TinyClassifier, TinyImages, tiny_trainer
from lightning_hpo.testing.run import fit_two_ranks


def regression(samples, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, 5, generator=generator, dtype=torch.float64)
    weights = torch.tensor([1.0, -2.0, 0.0, 0.5, 0.0], dtype=torch.float64)
    return TensorDataset(x, x @ weights + 0.5 * torch.randn(samples, generator=generator, dtype=torch.float64))


TRAIN, VAL = regression(20, 0), regression(40, 1)


class Representation(SingleLoopMixin, LightningModule):
    """A linear head on a tanh encoder, in double precision and without noise."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.encoder, self.head = nn.Linear(5, 3).double(), nn.Linear(3, 1).double()

    def outer_parameters(self):
        return self.encoder.parameters()

    def outer_loss(self, batch):
        return (self.head(self.encoder(batch[0]).tanh()).squeeze(1) - batch[1]).square().mean()

    def inner_loss(self, batch):
        return self.outer_loss(batch) + 0.1 * self.head.weight.square().sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)  # the outer ones are among them


def fit(module, *callbacks, steps=20, train=TRAIN, val=VAL, **trainer):
    loaders = DataLoader(train, batch_size=len(train)), DataLoader(val, batch_size=len(val))
    tiny_trainer(*callbacks, max_steps=steps, **trainer).fit(module, *loaders)
    return module


ARGS = {"lr": 0.05, "z_lr": 0.2, "refine_steps": 4, "every_n_steps": 2}


def test_an_ordinary_loop_takes_the_steps_of_the_method():
    """Full batches: 4 steps of refinement, then N inner steps before each outer one."""
    module = fit(Representation(single_loop_args=ARGS), steps=16)
    twin, train, val = Representation(), TRAIN.tensors, VAL.tensors

    def call(loss, y, x, batch):
        class Losses(nn.Module):
            def __init__(self):
                super().__init__()
                self.net = twin

            def forward(self):
                return getattr(self.net, loss)(batch)

        return torch.func.functional_call(Losses(), {f"net.{n}": v for n, v in {**y, **x}.items()}, ())

    method = SingleLoopBilevel(
        lambda y, x, _: call("inner_loss", y, x, train),
        lambda y, x, _: call("outer_loss", y, x, val),
        lr=0.05,
        inner_lr=0.1,
        z_lr=0.2,
        interval=1,
        inner_steps=2,
    )
    parts = dict(twin.named_parameters())
    inner, outer = ({n: p for n, p in parts.items() if n.startswith(kind)} for kind in ("head", "encoder"))
    state = method.start(inner, outer)
    state = method.refine(state, repeat(None), steps=6)  # 4, and those before the first outer step
    for _ in range(6):
        state, _ = method.step(state, repeat(None), repeat(None))
    found = dict(module.named_parameters())
    for name, value in {**state.inner, **state.outer}.items():
        torch.testing.assert_close(found[name].data, value, rtol=1e-11, atol=1e-12)


class Lengths(Callback):
    """How far the encoder moved in every step."""

    def __init__(self):
        self.places = []

    def note(self, trainer, pl_module, *rest):
        self.places.append(torch.cat([p.detach().flatten().clone() for p in pl_module.encoder.parameters()]))

    on_train_batch_start = on_train_end = note  # other callbacks act at the end of a batch

    @property
    def moved(self):
        return [(after - before).norm().item() for before, after in pairwise(self.places)]


def test_outer_steps_have_their_length_and_nobody_else_moves_the_encoder():
    lengths = Lengths()
    module = Representation(single_loop_args=ARGS)
    fit(module, lengths, steps=12)
    assert lengths.moved == pytest.approx([0, 0, 0, 0, 0, 0.05, 0, 0.05, 0, 0.05, 0, 0.05], abs=1e-12)
    assert all(p.requires_grad for p in module.parameters())


def test_the_scale_of_the_outer_loss_does_not_matter():
    callback = lambda **extra: SingleLoopHypergradient(**ARGS, **extra)  # noqa: E731
    states = []
    for scale in (1.0, 1000.0):
        module = Representation()
        module.configure_callbacks = list
        fit(module, callback(val_loss=lambda m, batch, scale=scale: scale * m.outer_loss(batch)), steps=20)
        states.append(module.state_dict())
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=1e-9, atol=1e-11)


def test_a_schedule_shortens_the_steps():
    from torch.optim.lr_scheduler import ExponentialLR

    lengths = Lengths()
    schedule = lambda optimizer: ExponentialLR(optimizer, 0.5)  # noqa: E731
    fit(Representation(single_loop_args={**ARGS, "scheduler": schedule}), lengths, steps=10)
    assert lengths.moved[5::2] == pytest.approx([0.05, 0.025, 0.0125], rel=1e-9)


def test_hyperparameters_and_parts_of_the_network_together():
    class Both(Representation):
        def __init__(self, **arguments):
            super().__init__(**arguments)
            self.hypers = HyperparameterSet(penalty=Positive(1.0)).double()

        def inner_loss(self, batch):
            return self.outer_loss(batch) + self.hypers["penalty"] * self.head.weight.square().sum()

    module = Both(single_loop_args={**ARGS, "normalize": "per_group"})
    fit(module, steps=40)
    raw = module.hypers.raw["penalty"].item()
    start = Positive(1.0).raw(torch.tensor(1.0)).item()
    steps = (raw - start) / 0.05  # a group of its own: a scalar takes whole steps
    assert raw < start
    assert steps == pytest.approx(round(steps), abs=1e-5)


def test_one_validation_batch_and_no_more_inner_losses_than_needed():
    class Counting(Representation):
        def validation_step(self, batch, batch_idx):
            pass

        def training_step(self, batch, batch_idx):
            return Representation.inner_loss(self, batch)

    counts = {"train": 0, "val": 0}

    def train(module, batch):
        counts["train"] += 1
        return Representation.inner_loss(module, batch)

    def val(module, batch):
        counts["val"] += 1
        return Representation.outer_loss(module, batch)

    module = Counting()
    module.configure_callbacks = list
    fit(module, SingleLoopHypergradient(**ARGS, train_loss=train, val_loss=val), steps=14)
    assert counts == {"train": 5, "val": 5}


class Sequences(SingleLoopMixin, LightningModule):
    """A recurrent or attentive encoder, and a head."""

    def __init__(self, kind, **arguments):
        super().__init__(**arguments)
        torch.manual_seed(0)
        self.kind = kind
        if kind == "lstm":
            self.encoder = nn.LSTM(8, 12, batch_first=True)
        else:
            self.encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
        self.head = nn.Linear(12 if kind == "lstm" else 8, 4)

    def outer_parameters(self):
        return self.encoder.parameters()

    def outer_loss(self, batch):
        hidden = self.encoder(batch[0].squeeze(1))
        hidden = hidden[0] if self.kind == "lstm" else hidden
        return F.cross_entropy(self.head(hidden.amax(1)), batch[1])

    def inner_loss(self, batch):
        return self.outer_loss(batch) + 1e-2 * self.head.weight.square().sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.head.parameters(), lr=0.5)


@pytest.mark.parametrize("product", ["auto", "fd"])
@pytest.mark.parametrize("kind", ["lstm", "transformer"])
def test_recurrent_and_attentive_encoders_learn(kind, product):
    data = TinyImages(16)
    batch = [part[:] for part in data.val_set.tensors]
    module = Sequences(kind, single_loop_args={"refine_steps": 0, "lr": 0.2, "z_lr": 0.1, "product": product})
    (callback,) = module.configure_callbacks()
    module.configure_callbacks = lambda: [callback]
    before = module.eval().outer_loss(batch).item()
    module.train()
    tiny_trainer(max_steps=60).fit(module, data)
    assert module.eval().outer_loss(batch).item() < 0.6 * before
    assert callback.product == product  # no fallback was needed
    assert callback.watch[0] == 30


def test_cudnn_is_off_for_recurrent_layers_while_an_outer_step_lasts():
    """Its recurrent layers have neither a second derivative nor, in eval mode, a first."""
    seen = {"lstm": set(), "transformer": set()}

    class Watching(Sequences):
        def outer_loss(self, batch):
            seen[self.kind].add((self.training, torch.backends.cudnn.enabled))
            return super().outer_loss(batch)

        def training_step(self, batch, batch_idx):
            return self.inner_loss(batch)

        def validation_step(self, batch, batch_idx):
            pass

    for kind in seen:
        module = Watching(kind, single_loop_args={"refine_steps": 0})
        tiny_trainer(max_steps=2).fit(module, TinyImages(16))
    assert torch.backends.cudnn.enabled
    assert seen["lstm"] == {(True, True), (True, False), (False, False)}  # training, inner loss, outer loss
    assert seen["transformer"] == {(True, True), (False, True)}


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["lstm", "transformer"])
def test_cudnn_and_fused_attention_stay_out_of_outer_steps(kind):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    module = Sequences(kind, single_loop_args={"refine_steps": 0, "lr": 0.2, "z_lr": 0.1, "product": "exact"})
    tiny_trainer(max_steps=4, accelerator="gpu").fit(module, TinyImages(16))
    assert torch.backends.cudnn.enabled
    assert all(torch.isfinite(p).all() for p in module.parameters())


def test_what_cannot_be_differentiated_twice_falls_back():
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, grad):
            return grad

    class Stubborn(Representation):
        def inner_loss(self, batch):
            outputs = Once.apply(self.head(self.encoder(batch[0]).tanh()))
            error = (outputs.squeeze(1) - batch[1]).square().mean()
            return error + 0.1 * self.head.weight.square().sum()

    exact = fit(Representation(single_loop_args=ARGS), steps=10)
    stubborn = Stubborn(single_loop_args=ARGS)
    with pytest.warns(UserWarning, match="goes on with differences of gradients"):
        fit(stubborn, steps=10)
    for name, value in exact.state_dict().items():
        torch.testing.assert_close(stubborn.state_dict()[name], value, rtol=1e-6, atol=1e-7)


class Doubled(TinyImages):
    """In double precision, so that two ranks and one process differ by nothing but the order of sums."""

    def __init__(self, batch_size=8):
        super().__init__(batch_size)
        self.train_set, self.val_set = (
            TensorDataset(part.tensors[0].double(), part.tensors[1]) for part in (self.train_set, self.val_set)
        )


def test_two_ranks_are_one_process_in_double_precision():
    callback = lambda: SingleLoopHypergradient(("network.blocks.0",), lr=0.05, z_lr=0.1, refine_steps=1)  # noqa: E731
    module = lambda: TinyClassifier(depth=2).double()  # noqa: E731
    first, second = fit_two_ranks(callback, module, Doubled, 4, max_steps=7)
    single = callback()
    alone = module()
    tiny_trainer(single, max_steps=7).fit(alone, Doubled(8))
    for name, value in alone.state_dict().items():
        assert torch.equal(first.module[name], second.module[name])
        torch.testing.assert_close(first.module[name], value, rtol=1e-10, atol=1e-12)
    for name, value in single.z.items():
        torch.testing.assert_close(first.method["z"][name], value, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("precision", ["64-true", "bf16-true"])
def test_validation_batches_come_in_the_precision_of_the_trainer(precision):
    callback, module = SingleLoopHypergradient(("network.blocks.0",), **ARGS), TinyClassifier(depth=2)
    before = [p.detach().clone().float() for p in module.network.blocks[0].parameters()]
    tiny_trainer(callback, max_steps=6, precision=precision).fit(module, TinyImages())
    moved = [(p.float() - b).norm() for p, b in zip(module.network.blocks[0].parameters(), before, strict=True)]
    assert 0 < sum(moved) < 1


def test_another_module_begins_from_the_beginning():
    callback = SingleLoopHypergradient(**ARGS)
    modules = [Representation(), Representation()]
    for module in modules:
        module.configure_callbacks = list
        fit(module, callback, steps=12)
    assert callback.steps == 12
    for name, value in modules[0].state_dict().items():
        if name.startswith("head"):
            continue  # validation batches go on where they stood, but there is one only
        torch.testing.assert_close(modules[1].state_dict()[name], value)


def test_a_used_callback_resumes_another_module_from_a_checkpoint(tmp_path):
    """What the checkpoint says holds, not what the callback did before."""
    path, loaders = tmp_path / "at_nine.ckpt", (DataLoader(TRAIN, batch_size=20), DataLoader(VAL, batch_size=40))
    used = SingleLoopHypergradient(**ARGS)
    first = tiny_trainer(used, max_steps=9)
    first.fit(fresh(), *loaders)
    first.save_checkpoint(path)
    states = []
    for callback in (SingleLoopHypergradient(**ARGS), used):
        module = fresh()
        tiny_trainer(callback, max_steps=14).fit(module, *loaders, ckpt_path=path)
        states.append({**module.state_dict(), **{f"z of {name}": value for name, value in callback.z.items()}})
        assert callback.steps == 14
    assert all(torch.equal(states[1][name], value) for name, value in states[0].items())


def fresh():
    module = Representation()
    module.configure_callbacks = list
    return module


def test_a_set_that_is_no_part_of_the_module_is_saved():
    weights = HyperparameterSet(penalty=Positive(1.0)).double()

    class Outside(Representation):
        def outer_parameters(self):
            return ()

        def inner_loss(self, batch):
            return self.outer_loss(batch) + weights["penalty"] * self.head.weight.square().sum()

    module = Outside()
    module.configure_callbacks = list
    callback = SingleLoopHypergradient(hypers=weights, **ARGS)
    fit(module, callback, steps=13)
    assert weights["penalty"].item() != pytest.approx(1.0, abs=1e-3)
    fresh = HyperparameterSet(penalty=Positive(1.0)).double()
    other = SingleLoopHypergradient(hypers=fresh, **ARGS)
    other.load_state_dict(copy.deepcopy(callback.state_dict()))
    assert fresh["penalty"].item() == weights["penalty"].item()
    assert other.hyperparameters() == callback.hyperparameters()


class Logged(Callback):
    """What the callback has logged last."""

    def __init__(self):
        self.values = {}

    def on_train_end(self, trainer, pl_module):
        self.values = {name: float(value) for name, value in trainer.logged_metrics.items()}


def test_what_is_logged(monkeypatch):
    """Outer loss, lengths of hypergradient, momentum and z, the residual, and what is outer."""
    callback, logged, results = SingleLoopHypergradient(**ARGS), Logged(), []
    estimate = callback._estimate
    monkeypatch.setattr(callback, "_estimate", lambda *args: results.append(estimate(*args)) or results[-1])
    module = fit(fresh(), callback, logged, steps=10, log_every_n_steps=1)
    last = results[-1]
    found = {name.partition("/")[2]: value for name, value in logged.values.items() if name.startswith("bo_rep/")}
    momentum = torch.zeros(())
    for result in results:
        gradient = torch.cat([part.flatten() for part in result.gradients.values()])
        momentum = 0.9 * momentum + 0.1 * gradient
    encoder = dict(module.encoder.named_parameters())
    expected = {
        "outer_loss": last.loss.item(),
        "gradient_norm": gradient.norm().item(),
        "momentum_norm": momentum.norm().item(),
        "z_norm": torch.cat([part.flatten() for part in callback.z.values()]).norm().item(),
        "residual": (last.norms[3] / last.norms[2]).item(),
        "encoder.weight": encoder["weight"].norm().item(),
        "encoder.bias": encoder["bias"].norm().item(),
    }
    assert found == pytest.approx(expected, rel=1e-6)
    assert len(results) == 3
    # The loss is that of the validation data with the encoder that the hypergradient has seen.
    with torch.no_grad():
        for parameter in encoder.values():
            state = callback.optimizer.state[parameter]["momentum_buffer"]
            parameter.add_(0.05 * state / momentum.norm())
    assert module.outer_loss(VAL.tensors).item() == pytest.approx(expected["outer_loss"], rel=1e-9)


def test_an_outer_step_reads_from_the_device_once(monkeypatch):
    reads, inside = [], []
    for name in ("item", "tolist", "numpy", "cpu", "__float__", "__bool__"):
        plain = getattr(torch.Tensor, name)

        def counting(self, *args, plain=plain, name=name, **kwargs):
            if inside:
                reads.append(name)
            return plain(self, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, counting)
    callback = SingleLoopHypergradient(**ARGS)
    estimate, update = callback._estimate, callback._update

    def begin(*args):  # batches have been drawn; what the loader reads is on the host
        inside.append(1)
        return estimate(*args)

    def end(*args):
        update(*args)
        inside.clear()

    monkeypatch.setattr(callback, "_estimate", begin)
    monkeypatch.setattr(callback, "_update", end)
    fit(fresh(), callback, steps=10)
    assert reads == ["tolist"] * 3
