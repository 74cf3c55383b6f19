"""MetricObjective in a Trainer: what is trained on, logged, kept and given back."""

import math
import warnings

import pytest
import torch
import torchmetrics.functional.classification as tm
from lightning.pytorch import Callback, LightningModule
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_hpo import AnyLoss, MetricObjective, StratifiedSampler
from lightning_hpo.demos import ImbalancedDataModule, TabularClassifier
from lightning_hpo.functional.objectives.anyloss_schedule import blend_at
from lightning_hpo.testing import tiny_trainer
from lightning_hpo.testing.run import fit, fit_two_ranks

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*lacked a class.*", "ignore:You defined a `validation_step` but have no.*"
)


def table(n=96, seed=0, share=0.3):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 5, generator=generator)
    return x, (x[:, 0] + 0.5 * torch.randn(n, generator=generator) > torch.tensor(1 - share)).float()


def loader(n=96, seed=0, batch_size=16, **more):
    return DataLoader(TensorDataset(*table(n, seed)), batch_size=batch_size, **more)


class Net(LightningModule):
    """A classifier that keeps what its criterion gave."""

    def __init__(self, criterion=None, name="criterion"):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Linear(5, 1)
        setattr(self, name, criterion or nn.BCEWithLogitsLoss())
        self.name, self.losses, self.logits, self.targets = name, [], [], []

    def loss(self, batch):
        x, y = batch
        self.logits.append(self.net(x).squeeze(1))
        self.targets.append(y)
        loss = getattr(self, self.name)(self.logits[-1], y)
        self.losses.append(loss.item())
        return loss

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.5)


class Schedule(Callback):
    """What was in force in each batch."""

    def __init__(self, method):
        self.method, self.seen = method, []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen.append((self.method.hyperparameters()["mix"], self.method.hyperparameters()["amplification"]))


def test_each_step_is_trained_on_the_blend_of_the_schedule():
    method = MetricObjective("gmean", warmup=0.25, anneal=0.75, mix=0.6, amplification=20.0, amplification_start=4.0)
    net, schedule = Net(), Schedule(method)
    tiny_trainer(method, schedule, max_steps=12, num_sanity_val_steps=0).fit(net, loader())
    assert len(net.losses) == 12
    for step, (loss, logits, y) in enumerate(zip(net.losses, net.logits, net.targets, strict=True)):
        mix, amplification = blend_at(step / 12, 0.25, 0.75, 0.6, 4.0, 20.0)
        assert schedule.seen[step] == (mix, amplification)
        own = AnyLoss("gmean", amplification=amplification)(logits, y).item()
        plain = F.binary_cross_entropy_with_logits(logits, y).item()
        assert loss == pytest.approx((1 - mix) * plain + mix * own, rel=1e-5)
    assert [mix for mix, _ in schedule.seen] == [0.0] * 3 + [0.6] * 9
    assert schedule.seen[0][1] == 4
    assert schedule.seen[9][1] == 20
    assert schedule.seen[6][1] == pytest.approx(math.sqrt(80))  # half way, geometrically


def test_it_learns_what_the_cross_entropy_does_not_find():
    """Few positives among many: the cross-entropy predicts too few of them."""
    scores = {}
    for name, callbacks in {"plain": [], "ours": [MetricObjective("f1")]}.items():
        torch.manual_seed(0)
        net, data = TabularClassifier(16, lr=3e-3), ImbalancedDataModule("digits", positive=8, coarse=True)
        tiny_trainer(*callbacks, max_epochs=20, num_sanity_val_steps=0).fit(net, data)
        x, y = data.test_set.tensors
        with torch.no_grad():
            scores[name] = tm.binary_f1_score(net(x).sigmoid(), y.long()).item()
    assert scores["ours"] > scores["plain"] + 0.03


def test_validation_counts_everything_and_leaves_the_criterion_alone():
    method = MetricObjective("f1", warmup=0.0, mix=1.0)
    net, val = Net(), loader(70, seed=1, batch_size=16)  # the last batch is smaller
    trainer = tiny_trainer(method, max_epochs=2, num_sanity_val_steps=0)
    trainer.fit(net, loader(), val)
    logits, y = torch.cat(net.logits[-5:]), torch.cat(net.targets[-5:])
    logged = {name: value.item() for name, value in trainer.callback_metrics.items()}
    hard = tm.binary_f1_score(logits.sigmoid(), y.long()).item()
    assert logged["anyloss/val_f1"] == pytest.approx(hard, abs=1e-6)
    own = AnyLoss("f1", amplification=method.objective.amplification)
    soft = 1 - own(logits, y).item()
    assert logged["anyloss/val_soft"] == pytest.approx(soft, abs=1e-6)
    assert logged["anyloss/val_gap"] == pytest.approx(soft - hard, abs=1e-6)
    plain = F.binary_cross_entropy_with_logits(logits, y).item()
    assert logged["anyloss/val_criterion"] == pytest.approx(plain, abs=1e-6)
    with torch.no_grad():
        slopes = own.surrogate.slope(logits)
    assert logged["anyloss/val_dead_share"] == pytest.approx((slopes < 1e-4).float().mean().item(), abs=1e-6)
    assert logged["val_loss"] == pytest.approx(plain, abs=1e-6)
    train = {"anyloss/soft_metric", "anyloss/dead_share", "anyloss/amplification", "anyloss/mix"}
    assert train | {"anyloss/incomplete_batches"} <= logged.keys()


@pytest.mark.parametrize("kind", ["module", "function", "method", "nested", "weighted"])
def test_the_criterion_is_given_back(kind):
    if kind == "function":
        net, name = Net(F.binary_cross_entropy_with_logits, "loss_fn"), "loss_fn"
    elif kind == "method":

        class WithMethod(Net):
            def judge(self, logits, y):
                return F.binary_cross_entropy_with_logits(logits, y)

        net, name = WithMethod(), "judge"
        net.name = "judge"
    elif kind == "nested":
        net, name = Net(), "parts.criterion"
        net.parts = nn.Module()
        net.parts.criterion = net.criterion
    else:
        net, name = Net(nn.BCEWithLogitsLoss(pos_weight=torch.tensor(2.0)) if kind == "weighted" else None), "criterion"
    before, keys = dict(vars(net)), list(net.state_dict())
    method = MetricObjective("f1", criterion=name, warmup=0.0, mix=1.0)
    trainer = tiny_trainer(method, max_steps=2)
    trainer.fit(net, loader(), loader(seed=1))
    assert list(net.state_dict()) == keys
    owner = net.get_submodule(name.rpartition(".")[0])
    loss = getattr(owner, name.rpartition(".")[2])
    if isinstance(loss, nn.Module):
        assert "forward" not in vars(loss)
    z, y = torch.zeros(3), torch.tensor([0.0, 1.0, 1.0])
    weight = 2.0 if kind == "weighted" else 1.0
    assert loss(z, y).item() == pytest.approx(math.log(2) * (1 + 2 * weight) / 3)
    assert {key for key in vars(net).keys() - before.keys() if not key.startswith("_")} == set()


def test_a_step_that_trains_on_the_metric_alone_never_calls_the_criterion():
    calls = []

    def criterion(logits, y):
        calls.append(1)
        return F.binary_cross_entropy_with_logits(logits, y)

    tiny_trainer(MetricObjective("f1", warmup=0.5, mix=1.0), max_steps=6).fit(Net(criterion), loader())
    assert len(calls) == 3


def test_the_temperature_calibrates_and_changes_nothing():
    method = MetricObjective("f1", warmup=0.0, mix=1.0, calibrate=True)
    net = Net()
    tiny_trainer(method, max_epochs=30, num_sanity_val_steps=0).fit(net, loader(), loader(300, seed=1))
    calibration = method.calibration
    assert method.hyperparameters()["temperature"] == method.temperature != 1
    assert calibration["calibrated_cross_entropy"] < calibration["cross_entropy"]
    x, y = table(300, 1)
    with torch.no_grad():
        logits = net.net(x).squeeze(1)
    found = F.binary_cross_entropy_with_logits(logits / method.temperature, y).item()
    assert found == pytest.approx(calibration["calibrated_cross_entropy"], abs=1e-6)
    assert list(net.state_dict()) == ["net.weight", "net.bias"]
    other = MetricObjective("f1", calibrate=True)
    other.load_state_dict(method.state_dict())
    assert other.temperature == method.temperature


def test_ignored_targets_follow_the_criterion():
    method = MetricObjective("f1", "multiclass", warmup=0.0, mix=1.0)
    x, y = table(32)
    y = y.long()
    y[::3] = 7

    class Classes(Net):
        def __init__(self):
            super().__init__(nn.CrossEntropyLoss(ignore_index=7))
            self.net = nn.Linear(5, 2)

        def training_step(self, batch, batch_idx):
            logits = self.net(batch[0])
            loss = self.criterion(input=logits, target=batch[1])
            kept = batch[1] != 7
            expected = AnyLoss("f1", "multiclass", amplification=method.objective.amplification)
            torch.testing.assert_close(loss, expected(logits[kept], batch[1][kept]))
            return loss

    tiny_trainer(method, max_steps=2).fit(Classes(), DataLoader(TensorDataset(x, y), 16))


def test_batches_without_a_class_are_reported():
    x, y = table(64)
    y = torch.cat([torch.zeros(48), torch.ones(16)])  # three of four batches have no positives
    data = DataLoader(TensorDataset(x, y), 16)
    trainer = tiny_trainer(MetricObjective("f1"), max_epochs=1)
    with pytest.warns(UserWarning, match="100% of the epoch's batches lacked a class.*StratifiedSampler"):
        trainer.fit(Net(), data)
    assert trainer.callback_metrics["anyloss/incomplete_batches"].item() == 1
    stratified = DataLoader(data.dataset, 16, sampler=StratifiedSampler(y.long(), 16))
    trainer = tiny_trainer(MetricObjective("f1"), max_epochs=1)
    trainer.fit(Net(), stratified)
    assert trainer.callback_metrics["anyloss/incomplete_batches"].item() == 0


def test_running_sums_do_not_complain_of_incomplete_batches():
    x, _ = table(64)
    data = DataLoader(TensorDataset(x, torch.cat([torch.zeros(48), torch.ones(16)])), 16)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*lacked a class.*")
        tiny_trainer(MetricObjective("f1", running=0.9), max_epochs=1).fit(Net(), data)


@pytest.mark.parametrize("surrogate", ["anyloss", "sol-uniform", "sol-cosine", "sigmoid"])
@pytest.mark.parametrize("metric", ["accuracy", "mcc", lambda tp, fp, fn, tn: tp / (tp + fp + 2 * fn)])
def test_every_surrogate_and_metric_trains(surrogate, metric):
    method = MetricObjective(metric, surrogate=surrogate, warmup=0.0, mix=1.0)
    net = Net()
    before = net.net.weight.detach().clone()
    trainer = tiny_trainer(method, max_epochs=1)
    trainer.fit(net, loader(), loader(seed=1))
    assert not torch.equal(before, net.net.weight)
    assert ("anyloss/val_metric" if callable(metric) else f"anyloss/val_{metric}") in trainer.callback_metrics


def test_an_optimizer_that_calls_back_several_times():
    class Quasi(Net):
        def configure_optimizers(self):
            return torch.optim.LBFGS(self.parameters(), max_iter=3)

    tiny_trainer(MetricObjective("f1"), max_steps=3).fit(Quasi(), loader())


@pytest.mark.filterwarnings("ignore:.training_step. returned .None.")
def test_a_skipped_batch_is_no_error():
    class Skips(Net):
        def training_step(self, batch, batch_idx):
            return None if batch_idx == 1 else self.loss(batch)

    tiny_trainer(MetricObjective("f1"), max_epochs=2).fit(Skips(), loader())


class Rows(ImbalancedDataModule):
    """Breast cancer in the order that two ranks and one process share."""

    def __init__(self, batch_size):
        super().__init__("breast_cancer", batch_size=batch_size, stratified=True)


def test_stratified_batches_of_two_ranks_are_those_of_one_process():
    def make():
        return MetricObjective("mcc", warmup=0.0, mix=0.9)

    first, second = fit_two_ranks(make, small, Rows, 32, max_steps=6, num_sanity_val_steps=0)
    single = fit(make(), small(), Rows(64), max_steps=6, num_sanity_val_steps=0)
    for name, value in single.module.items():
        torch.testing.assert_close(first.module[name], value, rtol=1e-4, atol=1e-5)
        assert torch.equal(first.module[name], second.module[name])


def small():
    torch.manual_seed(0)
    return TabularClassifier(30, hidden=4)


def test_the_steepness_follows_surrogate_and_metric():
    given = [("f1", "anyloss"), ("accuracy", "anyloss"), ("accuracy", "sigmoid"), ("accuracy", "sol-uniform")]
    assert [MetricObjective(metric, surrogate=kind).amplification for metric, kind in given] == [10.0, 20.0, 1.0, None]
    assert MetricObjective("accuracy", amplification=7.0).amplification == 7.0
