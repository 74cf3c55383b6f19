"""What is particular to AdaptiveBatchSize; what holds for every method is in `test_matrix.py`."""

import contextlib
import itertools
import random
import warnings
from datetime import timedelta

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint, TQDMProgressBar
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_hpo import (
    CABS,
    AdamSDE,
    AdaptiveBatchSize,
    AdaScale,
    AugmentedTest,
    CoordinateTest,
    DiveBatch,
    InnerProductTest,
    LinearRamp,
    LinearScaling,
    NoiseScale,
    NormTest,
    NoScaling,
    SampleCosine,
    SimiGrad,
    SqrtScaling,
    StageWise,
)
from lightning_hpo.functional.batching.policy import Policy
from lightning_hpo.testing import tiny_trainer

SAMPLES = 120


class Regression(LightningModule):
    """Linear regression in float64 that writes down which samples it sees."""

    def __init__(self, lr=0.05, optimizer="sgd", schedule=None):
        super().__init__()
        self.linear = nn.Linear(6, 3).double()
        with torch.no_grad():
            self.linear.weight.copy_(torch.linspace(-1, 1, 18).view(3, 6))
            self.linear.bias.zero_()
        self.lr, self.optimizer, self.schedule = lr, optimizer, schedule
        self.seen, self.validated_after, self.epochs_scheduled = [], [], 0

    def loss(self, x, y):
        return (self.linear(x) - y).square().sum(1).mean()

    def training_step(self, batch, batch_idx):
        x, y, index = batch
        self.seen.append(index.tolist())
        loss = self.loss(x, y)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        pass

    def on_validation_end(self):
        self.validated_after.append(sum(map(len, self.seen)))

    def configure_optimizers(self):
        kinds = {
            "sgd": lambda p: torch.optim.SGD(p, self.lr, momentum=0.9),
            "plain": lambda p: torch.optim.SGD(p, self.lr),
            "adamw": lambda p: torch.optim.AdamW(p, self.lr),
        }
        optimizer = kinds[self.optimizer](self.parameters())
        return optimizer if self.schedule is None else ([optimizer], [self.schedule(optimizer)])


class Silent(Regression):
    """Writes down nothing, so that it can be differentiated sample by sample."""

    def training_step(self, batch, batch_idx):
        return self.loss(*batch[:2])


def rows(samples=SAMPLES, noise=1.0):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(samples, 6, generator=generator, dtype=torch.double)
    y = x[:, :3] + noise * torch.randn(samples, 3, generator=generator, dtype=torch.double)
    return TensorDataset(x, y, torch.arange(samples))


def loader(batch_size=4, samples=SAMPLES, workers=0, data=None, **arguments):
    return DataLoader(data or rows(samples), batch_size, shuffle=True, num_workers=workers, **arguments)


def validation(module):
    return DataLoader(rows(20), 10) if hasattr(module, "validated_after") else None


def run(callback, module=None, train=None, *others, epochs=2, ckpt_path=None, **arguments):
    module, train = module or Regression(), loader() if train is None else train
    callbacks = [*([] if callback is None else [callback]), *others]
    trainer = tiny_trainer(*callbacks, max_epochs=epochs, num_sanity_val_steps=0, **arguments)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(does not have many workers|smaller than the logging interval).*")
        warnings.filterwarnings(
            "ignore", message=".*(exists and is not empty|callbacks used to create the checkpoint).*"
        )
        trainer.fit(module, train, validation(module), ckpt_path=ckpt_path)
    return module, trainer


class Random(Policy):
    """Asks for anything at any time."""

    needs = frozenset()
    shrinks = True

    def __init__(self, seed, highest=64):
        self.source, self.highest = random.Random(seed), highest

    def __call__(self, statistics):
        return self.source.uniform(1, self.highest)


def erratic(seed=0, highest=64, **arguments):
    plain = {"lr_scaling": NoScaling(), "growth": 100.0, "max_micro_batch_size": 8}
    return AdaptiveBatchSize(policy=Random(seed, highest), **{**plain, **arguments})


# Batches: nothing lost, nothing twice, everything on time


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("interval", [1.0, 0.25, 7])
@pytest.mark.parametrize("seed", [0, 1])
def test_every_sample_once_an_epoch_and_validation_on_time(workers, interval, seed):
    schedule = lambda o: {"scheduler": torch.optim.lr_scheduler.StepLR(o, 1, gamma=0.5), "interval": "epoch"}  # noqa: E731
    module = Regression(lr=0.01, schedule=schedule)
    arguments = {"persistent_workers": True} if workers else {}
    module, trainer = run(
        erratic(seed), module, loader(workers=workers, **arguments), epochs=3, val_check_interval=interval
    )
    indices = list(itertools.chain(*module.seen))
    for epoch in range(3):
        assert sorted(indices[epoch * SAMPLES : (epoch + 1) * SAMPLES]) == list(range(SAMPLES))
    assert len(set(map(len, module.seen))) > 3  # sizes have changed in both directions
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.01 / 8)
    if interval == 1.0:
        assert module.validated_after == [SAMPLES, 2 * SAMPLES, 3 * SAMPLES]
    elif interval == 0.25:
        assert len(module.validated_after) == 12
        due = torch.arange(1, 13) * SAMPLES / 4
        late = torch.tensor(module.validated_after) - due
        assert (late >= 0).all()
        assert (late < 8).all()  # at most a micro-batch


@pytest.mark.parametrize(("limit", "batches"), [(5, 5), (0.5, None)])
def test_limits_on_training_batches_hold(limit, batches):
    module, _ = run(erratic(2), train=loader(4), epochs=2, limit_train_batches=limit)
    if batches:
        assert len(module.seen) == 2 * batches
    else:
        seen = sum(map(len, module.seen))
        assert seen == SAMPLES  # half of the samples of each epoch
    assert len(module.validated_after) == 2


def test_a_loader_that_is_reloaded_is_taken_over_again():
    class Reloading(Regression):
        def train_dataloader(self):
            self.loaders = [*getattr(self, "loaders", []), loader(4)]
            return self.loaders[-1]

    module = Reloading()
    callback = AdaptiveBatchSize(policy=LinearRamp(increment=4, every=1, start=4), max_batch_size=24, growth=4.0)
    trainer = tiny_trainer(callback, max_epochs=3, reload_dataloaders_every_n_epochs=1, log_every_n_steps=1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        trainer.fit(module, val_dataloaders=validation(module))
    indices = list(itertools.chain(*module.seen))
    assert len(module.loaders) == 3
    assert all(sorted(indices[e * SAMPLES : (e + 1) * SAMPLES]) == list(range(SAMPLES)) for e in range(3))
    assert callback.batch_size == 24


def test_the_progress_bar_knows_the_new_total(capsys):
    totals = []

    class Look(Callback):
        def on_train_batch_end(self, trainer, *_):
            totals.append(trainer.progress_bar_callback.train_progress_bar.total)

    callback = AdaptiveBatchSize(policy=LinearRamp(increment=4, every=1, start=4), max_micro_batch_size=99)
    module, _ = run(callback, Regression(), None, Look(), TQDMProgressBar(), epochs=1, enable_progress_bar=True)
    assert totals[0] == SAMPLES // 4
    assert totals[-1] == len(module.seen) < SAMPLES // 4


# Steps: each is the mean over exactly its window


class Windows(Callback):
    """Compares the gradient of every optimizer step with that of the mean loss over the samples since the last."""

    def __init__(self, data):
        self.data, self.start, self.windows = data, 0, []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        indices = list(itertools.chain(*pl_module.seen[self.start :]))
        self.windows.append([len(batch) for batch in pl_module.seen[self.start :]])
        self.start = len(pl_module.seen)
        x, y, _ = self.data[indices]
        expected = torch.autograd.grad(pl_module.loss(x, y), list(pl_module.parameters()))
        for parameter, gradient in zip(pl_module.parameters(), expected, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("mode", ["loader", "accumulate"])
@pytest.mark.parametrize("first", [1, 3])
@pytest.mark.parametrize("seed", range(6))
def test_the_gradient_of_every_step_is_the_mean_over_its_window(mode, first, seed):
    data = rows(107)  # no whole number of batches
    watch = Windows(data)
    callback = erratic(seed, mode=mode, max_batch_size=96)
    run(callback, Regression(lr=0.01), loader(4, data=data), watch, epochs=3, accumulate_grad_batches=first)
    assert len({len(window) for window in watch.windows}) > 1  # the accumulation has changed
    assert sum(map(sum, watch.windows)) == 3 * 107


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_micro_batches_equal_one_batch_while_it_grows(optimizer):
    ramp = LinearRamp(increment=12, every=1, start=12)

    def train(micro, accumulation):
        callback = AdaptiveBatchSize(
            policy=ramp, lr_scaling=LinearScaling(), max_micro_batch_size=micro, max_batch_size=48, growth=9.0
        )
        torch.manual_seed(0)
        module = Regression(lr=0.01, optimizer=optimizer)
        return run(callback, module, loader(12 // accumulation), accumulate_grad_batches=accumulation)

    one, first = train(48, 1)
    many, second = train(12, 4)
    assert first.global_step == second.global_step
    assert max(map(len, many.seen)) == 12
    assert max(map(len, one.seen)) == 48
    for a, b in zip(one.parameters(), many.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_lightning_alone_misses_the_last_window():
    """What `AccumulationWindow` mends: if this fails, Lightning has mended it."""
    data, gradients = rows(10), []

    class Slope(Regression):
        def training_step(self, batch, batch_idx):
            return self.linear.bias.sum()

    class Look(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            gradients.append(pl_module.linear.bias.grad[0].item())

    run(None, Slope(), loader(1, data=data), Look(), epochs=1, accumulate_grad_batches=4)
    assert gradients == [1.0, 1.0, 0.5]
    gradients.clear()
    keep = AdaptiveBatchSize(policy=LinearRamp(increment=1, every=10**9, start=1), lr_scaling=NoScaling())
    run(keep, Slope(), loader(1, data=data), Look(), epochs=1, accumulate_grad_batches=4)
    assert gradients == [1.0, 1.0, 1.0]


# Resuming


class Stop(Callback):
    def __init__(self, after):
        self.after = after

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if len(pl_module.seen) == self.after:
            raise KeyboardInterrupt


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("estimator", ["auto", "difference"])
def test_resumes_bit_for_bit_from_every_step(tmp_path, workers, estimator):
    def fit(ckpt_path=None, *others):
        callback = AdaptiveBatchSize(max_micro_batch_size=8, max_batch_size=32, estimator=estimator)
        torch.manual_seed(0)
        module = Regression(lr=0.01)
        torch.manual_seed(0 if ckpt_path is None else 99)
        run(callback, module, loader(4, 90, workers), *others, ckpt_path=ckpt_path)
        return module, callback

    saver = ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    whole, callback = fit(None, saver)
    files = sorted(tmp_path.iterdir(), key=lambda path: int(path.stem.split("=")[1]))
    assert len(files) > 8
    assert callback.batch_size > 4
    for path in files[:: 3 if workers else 1]:
        again, resumed = fit(path)
        rest = len(again.seen)
        assert rest == 0 or whole.seen[-rest:] == again.seen, path
        assert torch.equal(whole.linear.weight, again.linear.weight), path
        assert callback.hyperparameters() == resumed.hyperparameters(), path
    assert rest == 0 or workers


def test_resumes_on_another_number_of_ranks():
    from lightning_hpo.batch_source import _for_ranks

    state = {"taken": [30, 7], "ahead": [[4, 1]], "plan": [4, 1]}
    assert _for_ranks(state, 2, 2) is state
    assert _for_ranks(state, 4, 3) == {"taken": [40, 7], "ahead": [], "plan": [4, 1]}


# What is measured


def grown(callback, module=None, train=None, **arguments):
    """The callback after training at a learning rate of nearly nothing."""
    run(callback, module or Regression(lr=1e-12), train, epochs=4, **arguments)
    return callback


def truth(data):
    """Trace of the covariance and squared norm of the gradient at the start, over all samples."""
    module = Regression()
    x, y, _ = data.tensors
    gradients = []
    for i in range(len(x)):
        grads = torch.autograd.grad(module.loss(x[i : i + 1], y[i : i + 1]), list(module.parameters()))
        gradients.append(torch.cat([g.flatten() for g in grads]))
    stacked = torch.stack(gradients)
    return stacked.var(0).sum().item(), stacked.mean(0).square().sum().item()


class Differentiates(Regression):
    """Takes a gradient of its own in the training step."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        own = torch.autograd.grad(100 * loss, list(self.parameters()), retain_graph=True)
        self.log("norm", torch.stack([gradient.norm() for gradient in own]).norm())
        return loss


def test_gradients_that_the_training_step_takes_do_not_count():
    def readings(module):
        torch.manual_seed(0)
        callback = AdaptiveBatchSize(estimator="micro_batch", max_batch_size=32)
        run(callback, module, accumulate_grad_batches=4)
        return callback.reading, callback.batch_size

    assert readings(Differentiates()) == readings(Regression())


@pytest.mark.parametrize(
    ("estimator", "accumulation", "rtol"),
    [
        ("ghost", 1, 0.05),
        ("ghost", 2, 0.05),
        ("vmap", 1, 0.05),
        ("vmap", 2, 0.05),
        ("micro_batch", 8, 0.1),
        ("auto", 8, 0.1),
    ],
)
def test_statistics_are_those_of_the_data(estimator, accumulation, rtol):
    data = rows(480)
    keep = LinearRamp(increment=1, every=10**9, start=16)
    callback = AdaptiveBatchSize(policy=keep, estimator=estimator, smoothing=0.999, max_samples=None)
    size = 16 // accumulation
    grown(callback, Silent(lr=1e-12), loader(size, data=data), accumulate_grad_batches=accumulation)
    trace, square = truth(data)
    assert callback.controller.statistics["trace"] == pytest.approx(trace, rel=rtol)
    assert callback.controller.statistics["square"] == pytest.approx(square, rel=0.1)


def test_a_layer_without_a_rule_counts():
    class Scaled(Silent):
        def __init__(self):
            super().__init__(lr=1e-12)
            self.scale = nn.Parameter(torch.full((3,), 2.0, dtype=torch.double))

        def loss(self, x, y):
            return (self.scale * self.linear(x) - y).square().sum(1).mean()

    data = rows(480)
    module = Scaled()
    gradients = []
    for x, y, _ in data:
        found = torch.autograd.grad(module.loss(x[None], y[None]), list(module.parameters()))
        gradients.append(torch.cat([g.flatten() for g in found]))
    keep = LinearRamp(increment=1, every=10**9, start=16)
    callback = AdaptiveBatchSize(policy=keep, estimator="vmap", smoothing=0.999, max_samples=None)
    grown(callback, module, loader(8, data=data), accumulate_grad_batches=2)
    trace = torch.stack(gradients).var(0).sum().item()
    assert callback.controller.statistics["trace"] == pytest.approx(trace, rel=0.05)


def test_a_quadratic_gets_its_closed_form():
    """Samples N(mu, s^2) around which 0.5 |x - z|^2 is centred: b = p s^2 / (eta^2 |x - mu|^2)."""
    torch.manual_seed(0)
    points = 3.0 + 2.0 * torch.randn(4000, 10, dtype=torch.double)

    class Quadratic(Regression):
        def __init__(self):
            super().__init__(lr=1e-12, optimizer="plain")
            self.linear = nn.Linear(1, 10, bias=False).double()
            nn.init.zeros_(self.linear.weight)

        def training_step(self, batch, batch_idx):
            (z,) = batch
            return 0.5 * (self.linear.weight.T - z).square().sum(1).mean()

    callback = AdaptiveBatchSize(
        policy=NormTest(eta=0.5), smoothing=0.999, estimator="micro_batch", max_micro_batch_size=1000
    )
    run(callback, Quadratic(), DataLoader(TensorDataset(points), 2, shuffle=True), accumulate_grad_batches=4)
    expected = 10 * 2.0**2 / (0.5**2 * 10 * 3.0**2)
    noise = 10 * 2.0**2 / (10 * 3.0**2)
    assert callback.noise_scale == pytest.approx(noise, rel=0.1)
    assert expected < callback.batch_size <= 8 + 2  # it never shrinks: 8 is more than the 1.8 that are asked for


def test_identical_samples_never_grow_the_batch():
    x, y, index = rows(1).tensors
    same = TensorDataset(x.expand(64, 6), y.expand(64, 3), index.expand(64))
    for estimator, accumulation in (("ghost", 1), ("micro_batch", 4), ("vmap", 1)):
        callback = AdaptiveBatchSize(estimator=estimator)
        run(callback, Silent(lr=1e-3, optimizer="plain"), loader(4, data=same), accumulate_grad_batches=accumulation)
        assert callback.batch_size == 4 * accumulation
        assert callback.controller.statistics["trace"] == pytest.approx(0, abs=1e-10)


@pytest.mark.parametrize(
    "policy",
    [
        NormTest(eta=0.5, debias=False),
        InnerProductTest(theta=0.05),
        AugmentedTest(theta=0.9, nu=0.1),
        CoordinateTest(),
        NoiseScale(),
        CABS(),
        DiveBatch(delta=8.0),
        SimiGrad(),
        StageWise(sizes=(4, 8, 16), samples=SAMPLES),
        LinearRamp(increment=4, every=2, start=4),
    ],
    ids=lambda policy: type(policy).__name__,
)
def test_every_policy_drives_a_run(policy):
    torch.manual_seed(0)
    callback = AdaptiveBatchSize(policy=policy, max_micro_batch_size=16)
    module, _ = run(callback, Regression(lr=0.01), epochs=3)
    assert callback.batch_size != 4
    assert sum(map(len, module.seen)) == 3 * SAMPLES
    assert all(torch.isfinite(p).all() for p in module.parameters())


# The learning rate


def test_the_factor_holds_for_the_step_and_leaves_the_schedule_alone():
    used, between = [], []

    class Look(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            used.append(optimizer.param_groups[0]["lr"])

        def on_train_batch_end(self, trainer, *_):
            between.append(trainer.optimizers[0].param_groups[0]["lr"])

    schedule = lambda o: {"scheduler": SampleCosine(o, 2 * SAMPLES, min_factor=0.5), "interval": "step"}  # noqa: E731
    callback = AdaptiveBatchSize(
        policy=LinearRamp(increment=4, every=1, start=4), lr_scaling=LinearScaling(cap=5.0), max_micro_batch_size=99
    )
    module, _ = run(callback, Regression(lr=0.02, optimizer="plain", schedule=schedule), None, Look())
    seen = 0
    for size, during, after in zip(map(len, module.seen), used, between, strict=True):
        cosine = lambda n: 0.02 * (0.5 + 0.25 * (1 + torch.tensor(torch.pi * n / 240).cos().item()))  # noqa: E731
        assert during == pytest.approx(cosine(seen) * min(size / 4, 5))
        seen += size
        assert after == pytest.approx(cosine(seen))


def test_adam_gets_the_moments_of_its_rule():
    used = []

    class Look(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            group = optimizer.param_groups[0]
            used.append((sum(map(len, pl_module.seen)), group["lr"], *group["betas"], group["eps"]))

    ramp = StageWise(sizes=(4, 16), samples=2 * 40)
    callback = AdaptiveBatchSize(
        policy=ramp, lr_scaling=AdamSDE(), max_batch_size=16, max_micro_batch_size=16, growth=10.0
    )
    _, trainer = run(callback, Regression(lr=1e-3, optimizer="adamw"), None, Look(), epochs=1)
    assert used[0][1:] == pytest.approx((1e-3, 0.9, 0.999, 1e-8))
    assert used[-2][1:] == pytest.approx((2e-3, 0.6, 0.996, 5e-9))
    group = trainer.optimizers[0].param_groups[0]
    assert (group["lr"], group["betas"], group["eps"]) == (1e-3, (0.9, 0.999), 1e-8)


def test_the_rule_fits_the_optimizer_unless_it_is_chosen():
    class WithAdagrad(Regression):
        def configure_optimizers(self):
            return torch.optim.Adagrad(self.parameters(), 1e-3)

    for module, chosen, expected in (
        (Regression(), None, AdaScale()),
        (WithAdagrad(), None, SqrtScaling()),
        (WithAdagrad(), LinearScaling(), LinearScaling()),
    ):
        callback = AdaptiveBatchSize(lr_scaling=chosen)
        run(callback, module, epochs=1)
        assert callback.controller.lr_scaling == expected


def test_a_scheduler_that_counts_steps_is_noticed():
    schedule = lambda o: {"scheduler": torch.optim.lr_scheduler.StepLR(o, 10), "interval": "step"}  # noqa: E731
    with pytest.warns(UserWarning, match="`StepLR` counts optimizer steps"):
        run(erratic(), Regression(schedule=schedule), epochs=1)


def test_the_gain_is_that_of_the_measured_noise():
    callback = AdaptiveBatchSize(max_batch_size=32, max_micro_batch_size=32, lr_scaling=AdaScale(cap=99.0))
    run(callback, Regression(lr=1e-12))
    trace, square = callback.controller.statistics["trace"] / 4, max(callback.controller.statistics["square"], 0.0)
    reported = callback.hyperparameters()["lr_factor"]
    assert reported == callback.controller.lr_scaling.factor(callback.batch_size, 4, 4 * trace, square)
    assert callback.controller.lr_scaling.factor(32, 4, 4 * trace, square) == pytest.approx(
        (trace + square) / (trace / 8 + square)
    )


# Two ranks with Lightning's own sampler


def test_two_ranks_see_every_sample_once_and_decide_alike(tmp_path):
    from lightning.pytorch.strategies import DDPStrategy

    class Save(Callback):
        def on_train_end(self, trainer, pl_module):
            state = callback.hyperparameters(), callback.controller.statistics
            torch.save((pl_module.seen, state, pl_module.linear.weight), tmp_path / f"{trainer.global_rank}.pt")

    torch.set_num_threads(1)
    callback = AdaptiveBatchSize(max_micro_batch_size=8, max_batch_size=64)
    strategy = DDPStrategy(start_method="fork", process_group_backend="gloo")
    run(callback, Regression(lr=0.01), None, Save(), devices=2, strategy=strategy)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in (0, 1))
    assert [list(map(len, first[0]))] == [list(map(len, second[0]))]
    assert len(set(map(len, first[0]))) > 1
    assert first[1] == second[1]
    assert torch.equal(first[2], second[2])
    half = SAMPLES // 2
    for epoch in range(2):
        both = [list(itertools.chain(*seen))[epoch * half : (epoch + 1) * half] for seen, *_ in (first, second)]
        assert sorted(both[0] + both[1]) == list(range(SAMPLES))


# Other set-ups


class Classifier(LightningModule):
    def __init__(self, norm=False):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8) if norm else nn.LayerNorm(8), nn.Linear(8, 3))

    def training_step(self, batch, batch_idx):
        x, y, _ = batch
        return F.mse_loss(self.net(x.float()), y.float())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)


def test_bf16_measures_what_float32_does():
    found = {}
    for precision in ("32-true", "bf16-mixed"):
        torch.manual_seed(0)
        callback = AdaptiveBatchSize(max_batch_size=16, max_micro_batch_size=16)
        run(callback, Classifier(), precision=precision)
        found[precision] = callback.controller.statistics
    assert found["bf16-mixed"] == pytest.approx(found["32-true"], rel=0.1)


def test_batch_norm_is_measured_between_steps_and_micro_batches():
    callback = AdaptiveBatchSize(max_batch_size=32)
    run(callback, Classifier(norm=True))
    assert callback.batch_size > 4


def test_twenty_steps_without_a_finite_gradient_freeze_the_batch():
    class Broken(Regression):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * float("inf")

    callback = AdaptiveBatchSize(smoothing=0.0)
    with pytest.warns(UserWarning, match=r"not finite in 20 steps in a row, so the batch size stays 4\."):
        run(callback, Broken(), loader(4), epochs=1)
    assert callback.batch_size == 4


def test_everything_is_given_back():
    module, train = Regression(), loader(4)
    trainer_accumulation = 3
    before = dict(vars(train.batch_sampler))
    _, trainer = run(erratic(), module, train, epochs=1, accumulate_grad_batches=trainer_accumulation)
    assert trainer.accumulate_grad_batches == trainer_accumulation
    assert type(train.batch_sampler) is torch.utils.data.BatchSampler
    assert vars(train.batch_sampler) == before
    assert not trainer.optimizers[0]._optimizer_step_pre_hooks
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        run(erratic(), module, train, Stop(len(module.seen) + 3), epochs=1)
    assert type(train.batch_sampler) is torch.utils.data.BatchSampler
    assert vars(train.batch_sampler) == before


class Folded(Classifier):
    """Its first layer sees two rows a sample."""

    def training_step(self, batch, batch_idx):
        x, y, _ = batch
        return F.mse_loss(self.net(torch.cat([x, -x]).float()), torch.cat([y, y]).float())


class Mixed(Classifier):
    """Two rows a sample in some layers."""

    def training_step(self, batch, batch_idx):
        x, y, _ = batch
        return F.mse_loss(
            self.net[2](self.net[:2](torch.cat([x, -x]).float()).unflatten(0, (2, -1)).mean(0)), y.float()
        )


@pytest.mark.parametrize("module", [Folded, Mixed])
def test_samples_that_cannot_be_told_apart_are_not_guessed_at(module):
    callback = AdaptiveBatchSize(max_batch_size=4)  # so that there are as many steps as ever
    with pytest.warns(UserWarning, match="Ghost norms are given up"):
        run(callback, module())
    assert callback.controller.readings > 20
    with pytest.raises(RuntimeError, match="rows"):
        run(AdaptiveBatchSize(estimator="ghost"), module())


# Trainers in all their ways


def epoch_schedule(optimizer):
    return {"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5), "interval": "epoch"}


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("seed", range(12))
def test_drop_last_loses_neither_validation_nor_schedule(seed, accumulation):
    module = Regression(lr=1e-3, schedule=epoch_schedule)
    train = loader(4, 107, drop_last=True)
    _, trainer = run(erratic(seed, 32), module, train, epochs=3, accumulate_grad_batches=accumulation)
    assert len(module.validated_after) == 3
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-3 / 8)


def test_a_second_fit_of_the_same_trainer_begins_an_epoch():
    module, train = Regression(schedule=epoch_schedule), loader(4)
    trainer = tiny_trainer(erratic(3, 16), max_steps=7, num_sanity_val_steps=0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        trainer.fit(module, train, validation(module))
        module.seen.clear()
        trainer.fit_loop.max_epochs, trainer.fit_loop.epoch_loop.max_steps = trainer.current_epoch + 2, -1
        trainer.fit(module, train, validation(module))
    epochs, rest = divmod(sum(map(len, module.seen)), SAMPLES)
    assert (epochs > 0, rest) == (True, 0)
    assert sorted(itertools.chain(*module.seen)) == sorted(list(range(SAMPLES)) * epochs)


@pytest.mark.parametrize("every", ["validation", "steps"])
def test_resumes_from_what_validation_wrote(tmp_path, every):
    how = {"save_on_train_epoch_end": False} if every == "validation" else {"every_n_train_steps": 1}

    def fit(ckpt_path, *others):
        torch.manual_seed(0)
        module = Regression(lr=0.01, schedule=epoch_schedule)
        callback = AdaptiveBatchSize(NoiseScale(), max_batch_size=48, max_micro_batch_size=16, smoothing=0.5)
        _, trainer = run(callback, module, loader(4), *others, ckpt_path=ckpt_path, epochs=3)
        return module, trainer

    saver = ModelCheckpoint(dirpath=tmp_path, save_top_k=-1, filename="{step}", **how)
    whole, trainer = fit(None, saver)
    for path in sorted(tmp_path.iterdir()):
        again, resumed = fit(path)
        rest = len(again.seen)
        assert rest == 0 or whole.seen[-rest:] == again.seen, path
        assert torch.equal(whole.linear.weight, again.linear.weight), path
        assert [o.param_groups[0]["lr"] for o in trainer.optimizers] == [
            o.param_groups[0]["lr"] for o in resumed.optimizers
        ], path


def test_a_share_of_the_samples_survives_a_break(tmp_path):
    saver = ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=3, save_top_k=1, filename="three")
    module, _ = run(erratic(), Regression(lr=0.01), loader(4), saver, epochs=1, limit_train_batches=0.5)
    assert sum(map(len, module.seen)) == SAMPLES // 2
    again, _ = run(erratic(), Regression(lr=0.01), ckpt_path=tmp_path / "three.ckpt", epochs=3, limit_train_batches=0.5)
    seen = sum(map(len, again.seen))
    assert SAMPLES <= seen < 3 * SAMPLES // 2


def test_a_cached_loader_that_is_asked_for_again():
    class Cached(Regression):
        def train_dataloader(self):
            self.cached = getattr(self, "cached", None) or loader(16)
            return self.cached

    module = Cached(lr=0.01)
    callback = erratic(4, 24)
    trainer = tiny_trainer(callback, max_epochs=4, reload_dataloaders_every_n_epochs=1, num_sanity_val_steps=0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        trainer.fit(module, val_dataloaders=validation(module))
    indices = list(itertools.chain(*module.seen))
    assert all(sorted(indices[e * SAMPLES : (e + 1) * SAMPLES]) == list(range(SAMPLES)) for e in range(4))
    assert len(module.validated_after) == 4
    assert type(module.cached.batch_sampler) is torch.utils.data.BatchSampler
    assert module.cached.batch_sampler.batch_size == 16


def test_validation_from_the_training_loader_is_noticed():
    train = loader(4)
    trainer = tiny_trainer(erratic(), max_epochs=1, val_check_interval=0.5, num_sanity_val_steps=0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(does not have many workers|shuffling enabled).*")
        with pytest.raises(RuntimeError, match="something else iterates over the training loader"):
            trainer.fit(Regression(), train, train)


def test_an_interrupted_callback_goes_on_like_a_fresh_one(tmp_path):
    def fit(callback, ckpt_path, *others):
        torch.manual_seed(0)
        module = Regression(lr=0.01)
        with contextlib.suppress(KeyboardInterrupt, SystemExit):
            run(callback, module, loader(4), *others, ckpt_path=ckpt_path, accumulate_grad_batches=4)
        return module

    saver = ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=2, save_top_k=1, filename="two")
    used = erratic(1)
    fit(used, None, saver, Stop(10))
    used.policy.source, fresh = random.Random(5), erratic(5)
    first, second = fit(used, tmp_path / "two.ckpt"), fit(fresh, tmp_path / "two.ckpt")
    assert first.seen == second.seen
    assert torch.equal(first.linear.weight, second.linear.weight)


def test_an_interval_longer_than_the_epoch_has_become_validates_at_its_end():
    module, _ = run(
        AdaptiveBatchSize(LinearRamp(increment=8, every=1, start=4), max_micro_batch_size=64, max_batch_size=60),
        epochs=3,
        val_check_interval=25,
    )
    assert len(module.validated_after) >= 3


@pytest.mark.parametrize(("interval", "count"), [(0.3, 3), (0.75, 1), (0.5, 2)])
def test_fractions_that_do_not_divide_an_epoch(interval, count):
    module, _ = run(erratic(1, 16), epochs=2, val_check_interval=interval)
    assert len(module.validated_after) == 2 * count


@pytest.mark.parametrize("workers", [0, 2])
def test_a_policy_of_epochs_decides_once_whenever_it_is_resumed(tmp_path, workers):
    def fit(ckpt_path, *others):
        torch.manual_seed(0)
        callback = AdaptiveBatchSize(DiveBatch(delta=8.0), max_batch_size=40, max_micro_batch_size=40)
        return run(callback, Regression(lr=0.01), loader(4, 60, workers), *others, ckpt_path=ckpt_path, epochs=3)[0]

    whole = fit(None, ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}"))
    files = sorted(tmp_path.iterdir(), key=lambda path: int(path.stem.split("=")[1]))
    assert len(set(map(len, whole.seen))) > 2
    for path in files[:: 4 if workers else 1] + files[14:16]:
        again = fit(path)
        assert not again.seen or whole.seen[-len(again.seen) :] == again.seen, path


def test_compiled_parts_are_measured_otherwise():
    class Compiled(Classifier):
        def __init__(self):
            super().__init__()
            self.net = torch.compile(self.net, backend="eager")

    callback = AdaptiveBatchSize(max_batch_size=4)
    run(callback, Compiled())
    assert callback.controller.readings > 10


def test_streams_of_unequal_length_keep_ranks_together(tmp_path):
    from lightning.pytorch.strategies import DDPStrategy

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
            yield from (rows(47 + rank)[i] for i in range(47 + rank))

    class Save(Callback):
        def on_train_end(self, trainer, pl_module):
            torch.save((callback.hyperparameters(), pl_module.linear.weight), tmp_path / f"{trainer.global_rank}.pt")

    torch.set_num_threads(1)
    callback = AdaptiveBatchSize(mode="accumulate", max_batch_size=64, smoothing=0.5)
    strategy = DDPStrategy(start_method="fork", process_group_backend="gloo", timeout=timedelta(seconds=60))
    run(callback, Silent(lr=0.01), DataLoader(Stream(), 4), Save(), devices=2, strategy=strategy, epochs=3)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in (0, 1))
    assert first[0] == second[0]
    assert torch.equal(first[1], second[1])
