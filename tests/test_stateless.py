"""A module's loss as a function, and what mixes samples."""

import copy

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from timm.layers import BatchNormAct2d, FrozenBatchNormAct2d
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import Accuracy, MetricCollection

from lightning_hpo.stateless import PerSampleGradients, batch_mixing_layers, loss_of, muted, per_sample_statistics


class Net(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.words = nn.Linear(3, 2), []
        self.accuracy = Accuracy("multiclass", num_classes=2)
        self.metrics = MetricCollection([Accuracy("multiclass", num_classes=2)])
        self.trait = None

    def training_step(self, batch, batch_idx):
        x, y = batch
        logits = self.layer(x)
        self.log("accuracy", self.accuracy(logits, y))
        self.log_dict(self.metrics(logits, y))
        self.print("step", batch_idx)
        self.trait = logits
        return {"loss": F.cross_entropy(logits, y) * (1 + batch_idx) * (1 + self.current_epoch)}

    def other_loss(self, batch):
        return self.layer(batch[0]).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(5, 3), torch.randint(0, 2, (5,))


def test_the_loss_is_a_function_of_the_parameters():
    net, (x, y) = Net(), batch()
    loss, params = loss_of(net), dict(net.named_parameters())
    torch.testing.assert_close(loss(params, (x, y)), F.cross_entropy(net.layer(x), y))
    torch.testing.assert_close(loss(params, (x, y), 2), 3 * F.cross_entropy(net.layer(x), y))
    moved = {"layer.weight": params["layer.weight"] + 1}  # the bias keeps its value
    torch.testing.assert_close(
        loss(moved, (x, y)), F.cross_entropy(F.linear(x, moved["layer.weight"], net.layer.bias), y)
    )
    torch.testing.assert_close(loss_of(net, "other_loss")(params, (x, y)), net.layer(x).sum())


def test_it_can_be_differentiated_twice():
    net, data = Net(), batch()
    params = {name: p.detach() for name, p in net.named_parameters()}
    hessian = torch.func.jacrev(torch.func.grad(loss_of(net)))(params, data)["layer.bias"]["layer.bias"]
    torch.testing.assert_close(hessian, hessian.T)
    assert (torch.linalg.eigvalsh(hessian) > -1e-6).all()


def test_the_users_module_stays_as_it_is(capsys):
    net, data = Net(), batch()
    before = {name: id(value) for name, value in vars(net).items()}
    weights = copy.deepcopy(net.state_dict())
    per_sample_statistics(loss_of(net), dict(net.named_parameters()), data, chunk_size=2)
    assert {name: id(value) for name, value in vars(net).items()} == before
    assert net.trait is None  # written on the copy
    assert net.accuracy.update_count == 0
    assert net.metrics["MulticlassAccuracy"].update_count == 0
    assert capsys.readouterr().out == ""
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in weights.items())
    net.accuracy(net.layer(data[0]), data[1])  # no dead tensors in there


def test_the_copy_knows_its_trainer_and_vmap_equals_hooks():
    checked: list[bool] = []

    class Watched(Net):
        def on_fit_start(self):
            self.samples = PerSampleGradients(self.layer).attach()

        def on_after_backward(self):
            norms = self.samples.take()
            self.samples.enabled = False
            params = {name: p for name, p in self.named_parameters() if p.requires_grad}
            found = per_sample_statistics(loss_of(self), params, self.batch, chunk_size=2)
            self.samples.enabled = True
            factor = len(norms) / (1 + self.index)  # the mean's share, and what this loss does with batch_idx
            torch.testing.assert_close(norms * factor**2, found.squared_norms)
            checked.append(True)

        def on_train_batch_start(self, batch, batch_idx):
            self.batch, self.index = batch, batch_idx

    data = TensorDataset(torch.randn(10, 3), torch.randint(0, 2, (10,)))
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    Trainer(max_epochs=2, accelerator="cpu", **quiet).fit(Watched(), DataLoader(data, batch_size=5))
    assert len(checked) == 4


def test_hooks_on_the_module_do_not_see_the_function():
    net, data = Net(), batch()
    with PerSampleGradients(net) as samples:
        per_sample_statistics(loss_of(net), dict(net.named_parameters()), data)
        with pytest.raises(RuntimeError, match="no gradient has arrived"):
            samples.take()


@pytest.mark.parametrize("found", [None, torch.zeros(3), {"loss": "no"}])
def test_what_is_no_scalar_loss_is_refused(found):
    class Wrong(nn.Module):
        def training_step(self, batch):
            return found

    with pytest.raises(ValueError, match="the loss of `training_step` must be a scalar tensor, got"):
        loss_of(Wrong())({}, torch.zeros(1))


def test_a_method_that_is_not_there_is_named():
    with pytest.raises(ValueError, match="`Linear` has no method `training_step`"):
        loss_of(nn.Linear(1, 1))


def test_batch_norms_that_use_the_batch_are_named():
    net = nn.ModuleDict(
        {
            "plain": nn.BatchNorm1d(2),
            "frozen": nn.BatchNorm2d(2).eval(),
            "never": nn.BatchNorm2d(2, track_running_stats=False).eval(),
            "lazy": nn.LazyBatchNorm2d(),
            "ranks": nn.SyncBatchNorm(2, affine=False),
            "timm": BatchNormAct2d(2),
            "constant": FrozenBatchNormAct2d(2),
            "group": nn.GroupNorm(1, 2),
            "instance": nn.InstanceNorm2d(2),
            "inside": nn.Sequential(nn.Linear(1, 1), nn.BatchNorm3d(1)),
        }
    )
    assert batch_mixing_layers(net) == ["plain", "never", "lazy", "ranks", "timm", "inside.1"]
    assert batch_mixing_layers(net.eval()) == ["never"]
    assert batch_mixing_layers(nn.BatchNorm1d(1)) == [""]


def test_metrics_anywhere_in_a_module_count_nothing():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 2)
            self.metrics = nn.ModuleDict({"fit": nn.ModuleList([Accuracy("multiclass", num_classes=2)])})

        def forward(self, x):
            self.metrics["fit"][0](self.layer(x), torch.zeros(len(x), dtype=torch.long))
            return self.layer(x)

    net = Net()
    silent = muted(net)
    torch.testing.assert_close(silent(torch.ones(3, 2)), net.layer(torch.ones(3, 2)))
    assert silent.layer is net.layer
    assert net.metrics["fit"][0].update_count == 0
    net(torch.ones(3, 2))
    assert net.metrics["fit"][0].update_count == 1
