"""SelfTuning among what Lightning users do besides: checkpoints after the fit, precisions, skipped batches."""

from dataclasses import dataclass

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import OnExceptionCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_hpo import SelfTuning
from lightning_hpo.nn.self_tuning_networks import convert
from lightning_hpo.testing import tiny_trainer

MODES = pytest.mark.parametrize("mode", ["delta", "stn"])


class Net(LightningModule):
    def __init__(self, fails_at=None):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 2))
        self.fails_at = fails_at

    def loss(self, batch):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def training_step(self, batch, batch_idx):
        if self.global_step == self.fails_at:
            raise RuntimeError("on purpose")
        return self.loss(batch)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class Seeds(Callback):
    """Random numbers of a step follow from the step."""

    def on_train_batch_start(self, trainer, *_):
        torch.manual_seed(trainer.global_step)


def data(seed):
    x = torch.randn(16, 3, generator=torch.Generator().manual_seed(seed))
    return DataLoader(TensorDataset(x, (x[:, 0] > 0).long()), batch_size=4)


def fit(module, mode, *others, ckpt_path=None, max_epochs=2, **trainer):
    tuning = SelfTuning(dropout="net.3", mode=mode, warmup_steps=1, train_steps=2)
    made = tiny_trainer(Seeds(), tuning, *others, max_epochs=max_epochs, num_sanity_val_steps=0, **trainer)
    made.fit(module, data(0), data(1), ckpt_path=ckpt_path)
    return made, tuning


@MODES
def test_a_checkpoint_that_is_saved_after_the_fit_goes_on_where_it_ended(mode, tmp_path):
    whole, wanted = fit(Net(), mode, max_epochs=4)
    trainer, _ = fit(Net(), mode)
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    resumed, found = fit(Net(), mode, ckpt_path=tmp_path / "after.ckpt", max_epochs=4)
    assert found.hyperparameters() == wanted.hyperparameters()
    for name, value in whole.lightning_module.state_dict().items():
        assert torch.equal(resumed.lightning_module.state_dict()[name], value)


@MODES
@pytest.mark.filterwarnings("ignore:.fit.ckpt_path=", "ignore:`.fit.ckpt_path=")  # Lightning's own, of that callback
def test_a_checkpoint_of_an_exception_holds_the_response(mode, tmp_path):
    with pytest.raises(RuntimeError, match="on purpose"):
        fit(Net(fails_at=6), mode, OnExceptionCheckpoint(tmp_path))
    (path,) = tmp_path.iterdir()
    (state,) = (s for key, s in torch.load(path, weights_only=True)["callbacks"].items() if "SelfTuning" in key)
    assert state["response"]["layers.net/0.gate"].abs().max() > 0


@MODES
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_response_of_the_other_mode_is_refused(mode, tmp_path):
    trainer, _ = fit(Net(), mode)
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    other = "stn" if mode == "delta" else "delta"
    with pytest.raises(MisconfigurationException, match=f"written with `mode='{mode}'` \\(here '{other}'\\)"):
        fit(Net(), other, ckpt_path=tmp_path / "after.ckpt", max_epochs=4)


@MODES
@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_true_precisions(mode, precision):
    module = Net()
    _, tuning = fit(module, mode, precision=precision)
    assert module.net[0].weight.dtype == {"bf16-true": torch.bfloat16, "64-true": torch.float64}[precision]
    assert abs(tuning.hyperparameters()["net/3"] - 0.2) > 1e-3


@MODES
@pytest.mark.filterwarnings("ignore:.*returned `None`")
def test_a_batch_for_which_the_training_step_returns_none_is_left_out(mode):
    class Sometimes(Net):
        def training_step(self, batch, batch_idx):
            return None if batch_idx == 1 else self.loss(batch)

    _, tuning = fit(Sometimes(), mode)
    assert tuning.updates


@MODES
@pytest.mark.parametrize("wrap", [nn.utils.spectral_norm, lambda layer: nn.utils.prune.identity(layer, "bias")])
def test_layers_whose_weights_are_computed_stay_what_they_are(mode, wrap):
    module = Net()
    wrap(module.net[0])
    names = list(module.state_dict())
    fit(module, mode)
    assert list(module.state_dict()) == names


def test_recurrent_layers_whose_weights_are_computed_are_skipped():
    net = nn.Sequential(nn.LSTM(2, 3), nn.LSTMCell(2, 3), nn.Linear(2, 3))
    for layer in net[:2]:
        nn.utils.spectral_norm(layer, "weight_hh_l0" if isinstance(layer, nn.LSTM) else "weight_hh")
    response = convert(net, 1)
    assert response.names == ["2"]
    assert all("computed from other parameters" in reason for reason in response.skipped.values())


@MODES
def test_a_module_that_is_compiled_as_a_whole_is_refused(mode):
    with pytest.raises(MisconfigurationException, match=r"layers of compiled modules cannot change \(\['the module'"):
        fit(torch.compile(Net(), backend="eager"), mode)


def test_what_is_logged_is_not_asked_for_by_the_host():
    logged = {}

    class Noted(Net):
        def log_dict(self, values, *args, **kwargs):
            logged.update(values)

    _, tuning = fit(Noted(), "delta")
    assert all(isinstance(value, torch.Tensor) for value in logged.values())
    assert logged["self_tuning_networks/net/3"].item() == pytest.approx(tuning.hyperparameters()["net/3"])


def test_a_linearised_loss_that_is_not_finite_teaches_nothing():
    """As a logarithm of a probability is, once the linearised one is below 0; here the second pass says so itself."""

    class Logarithm(Net):
        def training_step(self, batch, batch_idx):
            loss = self.loss(batch)
            second = not self.net[0].weight.requires_grad  # in which general weights are held
            return loss * float("nan") if second and batch[0][0, 0] > 0 else loss

    module = Logarithm()
    with pytest.warns(UserWarning, match="the linearised training loss was not finite"):
        _, tuning = fit(module, "delta")
    assert tuning.useless == 0
    response = tuning.state_dict()["response"]
    assert all(value.isfinite().all() for value in response.values() if isinstance(value, torch.Tensor))
    assert response["layers.net/0.gate"].abs().max() > 0


@dataclass
class Outputs:
    logits: torch.Tensor
    hidden: dict


class Wrapped(nn.Sequential):
    def forward(self, x):
        hidden = self[0](x)
        return Outputs(self[1](hidden), {0: hidden})


def test_predictions_in_dataclasses_and_in_mappings_of_any_keys_are_linearised():
    torch.manual_seed(0)
    net = Wrapped(nn.Linear(3, 4), nn.Linear(4, 2)).double()
    response = convert(net, 2, gate_std=0.1)
    x, step = torch.randn(5, 3).double(), torch.randn(5, 2).double()
    with response.along(step):
        found = net(x)
    with response.at(step * 1e-6):
        ahead = net(x)
    plain = net(x)
    for new, old, along in zip(*((o.logits, o.hidden[0]) for o in (ahead, plain, found)), strict=True):
        assert not torch.allclose(along, old)
        assert torch.allclose(along - old, (new - old) / 1e-6, atol=1e-6)
