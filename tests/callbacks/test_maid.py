"""ConvexHeadTuning inside a Trainer; what holds for every method is in `test_matrix.py`."""

import math

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_hpo import ConvexHeadTuning
from lightning_hpo.functional.bilevel.lower_solvers import lbfgs
from lightning_hpo.functional.bilevel.maid import LowerProblem
from lightning_hpo.testing import TinyClassifier, TinyImages, tiny_trainer


def blobs(samples, seed):
    """Three classes of five numbers that overlap."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (samples,), generator=generator)
    centers = torch.tensor([[1.0, 0, 0, 0, 0], [0, 1.0, 0, 0, 0], [0, 0, 1.0, 0, 0]])
    return TensorDataset(centers[labels] + torch.randn(samples, 5, generator=generator), labels)


TRAIN, VAL = blobs(60, 0), blobs(200, 1)


class Classifier(LightningModule):
    """A frozen backbone with batch norm and dropout, and a head."""

    def __init__(self, bias=True):
        super().__init__()
        self.backbone = nn.Sequential(nn.BatchNorm1d(5), nn.Dropout(0.5)).requires_grad_(False)
        self.head = nn.Linear(5, 3, bias=bias)

    def forward(self, x):
        return self.head(self.backbone(x))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]), batch_size=len(batch[0]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def fit(tuning, module, train=TRAIN, val=VAL, **trainer):
    loaders = [DataLoader(data, batch_size=16) if not isinstance(data, DataLoader) else data for data in (train, val)]
    runner = tiny_trainer(tuning, **({"max_epochs": 1} | trainer))
    runner.fit(module, *loaders)
    return runner


def solution(log_l2, bias=True):
    """Head and validation loss at one weight, solved by other means: a long descent of its own."""
    module = Classifier(bias).eval()
    module.backbone[0].load_state_dict(FITTED)
    features = [module.backbone(part.tensors[0]).double().detach() for part in (TRAIN, VAL)]
    features = [torch.cat([part, torch.ones(len(part), 1)], 1) if bias else part for part in features]
    problem = LowerProblem(
        lambda w, t: F.cross_entropy(features[0] @ w, TRAIN.tensors[1]) + 0.5 * (t.exp() * w * w).sum(), math.exp(-9)
    )
    theta = torch.tensor(log_l2, dtype=torch.float64)
    w = lbfgs(problem, theta, torch.zeros(features[0].shape[1], 3, dtype=torch.float64), 1e-8).x
    return w, F.cross_entropy(features[1] @ w, VAL.tensors[1]).item()


FITTED = {}


def fitted(module):
    """Running statistics after one epoch, which `solution` needs."""
    FITTED.update(module.backbone[0].state_dict())
    return module


@pytest.mark.parametrize("bias", [True, False])
def test_the_head_is_the_solution_and_its_weight_the_best(bias):
    torch.manual_seed(0)
    tuning = ConvexHeadTuning(steps=60)
    runner = fit(tuning, module := Classifier(bias))
    fitted(module)
    l2 = tuning.hyperparameters()["l2"]
    w, loss = solution(math.log(l2), bias)
    found = torch.cat([module.head.weight.T] + ([module.head.bias[None]] if bias else [])).double()
    assert (found - w).norm() < 2e-3 * w.norm()
    grid = {log: solution(log, bias)[1] for log in torch.linspace(-8, 2, 41).tolist()}
    assert loss < min(grid.values()) + 1e-4
    assert abs(math.log(l2) - min(grid, key=grid.get)) < 0.4
    torch.testing.assert_close(runner.callback_metrics["val_loss"].item(), loss, rtol=1e-3, atol=0)  # tuned before it
    assert runner.callback_metrics["maid/certificate"] >= 0


def test_a_weight_for_each_coefficient_fits_the_validation_data_better():
    torch.manual_seed(0)
    losses = {}
    for weights in ("shared", "coefficient"):
        tuning = ConvexHeadTuning(weights=weights, steps=60)
        losses[weights] = fit(tuning, Classifier()).callback_metrics["val_loss"].item()
    assert len(tuning.hyperparameters()["l2"]) == 18
    assert losses["coefficient"] < losses["shared"] - 0.002


@pytest.mark.filterwarnings("ignore:Found 1 module")
def test_training_is_left_as_it_is():
    """Random numbers, running statistics, modes and the loader: the backbone trains as without the callback."""

    def run(*callbacks):
        torch.manual_seed(0)
        module = TinyClassifier()
        seen = []
        module.training_step = lambda batch, i, step=module.training_step: seen.append(batch[1]) or step(batch, i)
        module.network.head.weight.register_hook(torch.zeros_like)
        tiny_trainer(*callbacks, max_epochs=1).fit(module, TinyImages())
        return module, torch.cat(seen), torch.rand(3)

    (plain, batches, numbers), (tuned, others, after) = run(), run(ConvexHeadTuning(steps=1))
    assert torch.equal(batches, others)
    assert torch.equal(numbers, after)
    for (name, left), right in zip(plain.named_parameters(), tuned.parameters(), strict=True):
        assert torch.equal(left, right) == ("network.head" not in name), name
    module = Classifier()
    module.backbone[0].eval()
    fit(ConvexHeadTuning(every_n_steps=1, steps=1), module, max_epochs=1, limit_train_batches=2)
    assert not module.backbone[0].training


@pytest.mark.parametrize("precision", ["64-true", "bf16-true"])
def test_batches_come_in_the_precision_of_the_trainer(precision):
    module = Classifier()
    runner = fit(ConvexHeadTuning(), module, precision=precision)
    assert runner.callback_metrics["val_loss"] < 1.0  # of ln 3 = 1.10 for a head that knows nothing
    assert next(module.head.parameters()).dtype == {"64-true": torch.float64, "bf16-true": torch.bfloat16}[precision]


def test_it_tunes_when_it_is_asked_to():
    def moments(**settings):
        tuning, found = ConvexHeadTuning(steps=1, **settings), []
        original = tuning._tune
        tuning._tune = lambda trainer, module: found.append(trainer.global_step) or original(trainer, module)
        fit(tuning, Classifier(), max_epochs=4)  # four steps an epoch
        return found

    assert moments() == [4, 8, 12, 16]
    assert moments(every_n_epochs=2) == [8, 16]
    assert moments(every_n_steps=5) == [5, 10, 15]


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint")
def test_a_saved_run_goes_on_at_the_epochs_end(tmp_path):
    def run(epochs, *extra, **arguments):
        torch.manual_seed(0)
        tuning, module = ConvexHeadTuning(steps=2), Classifier()
        loaders = [DataLoader(data, batch_size=16) for data in (TRAIN, VAL)]
        tiny_trainer(tuning, *extra, max_epochs=epochs).fit(module, *loaders, **arguments)
        return tuning.state, module.head.weight

    saver = ModelCheckpoint(dirpath=tmp_path, filename="one", every_n_epochs=1)
    run(1, saver)
    whole, resumed = run(2), run(2, ckpt_path=str(tmp_path / "one.ckpt"), weights_only=True)
    assert whole[0]["iteration"] == resumed[0]["iteration"]
    # dropout's random numbers differ, but the features of the frozen part do not
    torch.testing.assert_close(whole[0]["theta"], resumed[0]["theta"], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(whole[1], resumed[1], rtol=1e-5, atol=1e-6)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(TRAIN)


class NoHead(Classifier):
    def __init__(self):
        super().__init__()
        self.head = nn.Conv1d(5, 3, 1)


class Tokens(Classifier):
    def forward(self, x):
        return self.head(self.backbone(x)[:, None].expand(-1, 2, -1)).mean(1)


class Twice(Classifier):
    def forward(self, x):
        return self.head(self.backbone(x)) + self.head(x)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"weights": "layer", "steps": 0}, "weights must.*steps must"),
        ({"every_n_steps": 0, "every_n_epochs": 0}, "every_n_epochs must.*every_n_steps must"),
        ({"bounds": (1.0, 0.0)}, "bounds must"),
        ({"log_l2": 7.0}, "log_l2 must be within"),
        ({"solver": "adam"}, "solver must"),
        ({"maid_args": {"rho": 2.0}}, "maid_args: rho must"),
        ({"maid_args": {"tempo": 2.0}}, "maid_args: .*tempo"),
        ({"maid_args": {"solver": lbfgs}}, "must not hold solver"),
    ],
)
def test_wrong_arguments(settings, match):
    with pytest.raises(ValueError, match=match):
        ConvexHeadTuning(**settings)


@pytest.mark.parametrize(
    ("module", "settings", "data", "match"),
    [
        (Classifier(), {"head": "tail"}, {}, "no `nn.Linear` named 'tail'; there are `head`"),
        (NoHead(), {}, {}, "none at all"),
        (Tokens(), {}, {}, "one vector for each sample"),
        (Twice(), {}, {}, "used 2 times"),
        (
            Classifier(),
            {},
            {"train": DataLoader(Stream(), batch_size=4)},
            "training data: a DataLoader over a data set",
        ),
        (Classifier(), {"val_dataloader": [1, 2]}, {}, "validation data: a DataLoader"),
        (Classifier(), {}, {"limit_val_batches": 0}, "there are no validation data .`limit_val_batches` is 0."),
        (
            Classifier(),
            {"val_dataloader": DataLoader(TensorDataset(torch.zeros(4, 5), torch.tensor([0, 1, 2, 3])))},
            {},
            "labels must be from 0 to 2",
        ),
        (
            Classifier(),
            {"val_dataloader": DataLoader(TensorDataset(torch.zeros(4, 5), torch.ones(4)))},
            {},
            "one class",
        ),
        (Classifier(), {"val_dataloader": DataLoader(TensorDataset(torch.zeros(4, 5)))}, {}, "pairs of inputs"),
    ],
)
def test_what_is_refused(module, settings, data, match):
    with pytest.raises(MisconfigurationException, match=match):
        fit(ConvexHeadTuning(**settings), module, **data)
