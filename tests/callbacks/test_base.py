"""State by name, guards that say what to change, and own optimizers beside Lightning's."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.optim import Optimizer
from torch.utils.data import DataLoader, TensorDataset

from lightning_hpo.callbacks.base import MethodCallback
from lightning_hpo.hyper import HyperparameterSet, Positive

RESUMED = pytest.mark.filterwarnings(
    "ignore:Checkpoint directory .* exists", "ignore:Be aware that when using `ckpt_path`"
)


class Owner(MethodCallback):
    _STATE = ("hypers", "optimizer", "average", "history", "later")
    _KEY = ("name",)

    def __init__(self, name: str | None = None, lr: float = 0.1) -> None:
        super().__init__()
        self.name = name
        self.hypers = HyperparameterSet(decay=Positive(1.0))
        self.optimizer = torch.optim.SGD(self.hypers.parameters(), lr=lr, momentum=0.9)
        self.average = torch.zeros(2)
        self.history: list[Any] = []
        self.later: torch.nn.Linear | None = None

    def learn(self) -> None:
        self.hypers.set_grad(decay=1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.average += 1
        self.history.append(("step", 0.5, None))


class Small(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        return self.layer(batch[0]).mean()

    def configure_optimizers(self) -> Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(torch.ones(4, 1)))


def trainer_with(*callbacks: Callback, **settings: Any) -> Trainer:
    return Trainer(
        **{"max_epochs": 1, "accelerator": "cpu", **settings},
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
    )


# State


def test_state_survives_a_weights_only_file(tmp_path: Path) -> None:
    source, target = Owner(), Owner()
    source.learn()
    source.learn()
    torch.save(source.state_dict(), tmp_path / "state.pt")
    held = target.average
    target.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    source.learn()
    target.learn()  # the momentum came along, or this step would be shorter
    assert torch.equal(target.hypers["decay"], source.hypers["decay"])
    assert target.average is held
    assert target.average.tolist() == [3.0, 3.0]
    assert target.history == [("step", 0.5, None)] * 3


def test_saved_state_is_a_copy() -> None:
    owner = Owner()
    state = owner.state_dict()
    owner.learn()
    assert state["average"].tolist() == [0.0, 0.0]
    assert state["history"] == []
    assert state["hypers"]["raw.decay"].item() == pytest.approx(Owner().hypers.raw["decay"].item())


def test_what_is_built_later_waits_for_its_state() -> None:
    source, target = Owner(), Owner()
    source.later = torch.nn.Linear(2, 1)
    target.load_state_dict(source.state_dict())
    assert target.later is None
    torch.testing.assert_close(
        target.state_dict(), source.state_dict()
    )  # saved again before it was built: nothing lost
    target.later = torch.nn.Linear(2, 1)
    assert not torch.equal(target.later.weight, source.later.weight)
    target.restore_pending()
    assert torch.equal(target.later.weight, source.later.weight)
    with torch.no_grad():
        target.later.weight.zero_()
    target.restore_pending()  # once only
    assert not target.later.weight.any()


def test_state_from_before_an_object_was_built_leaves_it_alone() -> None:
    source, target = Owner(), Owner()
    target.later = torch.nn.Linear(2, 1)
    weight = target.later.weight.clone()
    target.load_state_dict(source.state_dict())
    assert torch.equal(target.later.weight, weight)


def test_a_tensor_of_another_shape_is_replaced() -> None:
    source, target = Owner(), Owner()
    source.average = torch.arange(3.0)
    target.load_state_dict(source.state_dict())
    assert target.average.tolist() == [0.0, 1.0, 2.0]
    assert target.average is not source.average


def test_unknown_and_missing_names_are_refused_together() -> None:
    state = Owner().state_dict()
    state["old"] = state.pop("history")
    with pytest.raises(MisconfigurationException, match=r"(?s)`Owner`.*`history` is missing.*`old` is unknown"):
        Owner().load_state_dict(state)


def test_state_that_weights_only_loading_would_refuse_is_named() -> None:
    owner = Owner()
    owner.history.append({"path": Path("x")})
    with pytest.raises(TypeError, match=r"`Owner.history\[0\]\['path'\]` is a `PosixPath`"):
        owner.state_dict()


def test_callbacks_without_state_save_nothing() -> None:
    class Stateless(MethodCallback):
        pass

    assert Stateless().state_dict() == {}
    assert Stateless().hyperparameters() == {}


def test_state_key_names_the_arguments_and_stays() -> None:
    owner = Owner("a")
    assert owner.state_key == "Owner{'name': 'a'}"
    owner.name = "found.later"
    assert owner.state_key == "Owner{'name': 'a'}"
    assert Owner("a", lr=0.5).state_key == owner.state_key != Owner().state_key


def saved_by(tmp_path: Path, *owners: Owner) -> str:
    for owner in owners:
        owner.learn()
    trainer_with(*owners, ModelCheckpoint(tmp_path, filename="saved")).fit(Small())
    return str(tmp_path / "saved.ckpt")


@RESUMED
def test_another_learning_rate_finds_its_state(tmp_path: Path) -> None:
    resumed = Owner("a", lr=0.9)
    trainer_with(resumed, ModelCheckpoint(tmp_path), max_epochs=2).fit(
        Small(), ckpt_path=saved_by(tmp_path, Owner("a"))
    )
    assert resumed.average.tolist() == [1.0, 1.0]


@RESUMED
def test_a_checkpoint_of_other_arguments_is_refused_by_name(tmp_path: Path) -> None:
    path = saved_by(tmp_path, Owner("a"))
    with pytest.raises(MisconfigurationException, match=r"`Owner`: .*written with `name='a'` \(here None\)"):
        trainer_with(Owner(), ModelCheckpoint(tmp_path), max_epochs=2).fit(Small(), ckpt_path=path)


@RESUMED
def test_arguments_that_cannot_be_compared_are_shown(tmp_path: Path) -> None:
    path = saved_by(tmp_path, Owner(print))  # type: ignore[arg-type]
    with pytest.raises(
        MisconfigurationException, match=r"written by `Owner\{.*print>\}`, this is `Owner\{'name': 'a'\}`"
    ):
        trainer_with(Owner("a"), ModelCheckpoint(tmp_path), max_epochs=2).fit(Small(), ckpt_path=path)


@RESUMED
def test_a_second_instance_may_be_added_on_resuming(tmp_path: Path) -> None:
    path = saved_by(tmp_path, Owner("a"))
    old, new = Owner("a"), Owner("b")
    trainer_with(old, new, ModelCheckpoint(tmp_path), max_epochs=2).fit(Small(), ckpt_path=path)
    assert (old.average.tolist(), new.average.tolist()) == ([1.0, 1.0], [0.0, 0.0])


# Logging


class Logs(MethodCallback):
    _STATE = ("count",)
    _KEY = ("name",)

    def __init__(self, name: str) -> None:
        self.name, self.count = name, 1

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self.log_values(pl_module, {"rate": torch.tensor(0.25)})


def test_values_are_logged_under_the_stem() -> None:
    trainer = trainer_with(Logs("a"))
    trainer.fit(Small())
    assert {k: v.item() for k, v in trainer.callback_metrics.items()} == {"test_base/rate": 0.25}


def test_two_of_a_class_log_apart() -> None:
    trainer = trainer_with(Logs("a"), Logs("b"))
    trainer.fit(Small())
    assert set(trainer.callback_metrics) == {"test_base[a]/rate", "test_base[b]/rate"}


# Guards


def test_one_problem_and_several() -> None:
    owner = Owner()
    owner.raise_all([])
    with pytest.raises(MisconfigurationException, match="^`Owner`: one$"):
        owner.raise_all(["one"])
    with pytest.raises(MisconfigurationException, match="^`Owner`: \n- one\n- two$"):
        owner.raise_all(iter(["one", "two"]))


def test_manual_optimization_is_refused() -> None:
    module = Small()
    Owner().require_automatic_optimization(module)
    module.automatic_optimization = False
    with pytest.raises(
        MisconfigurationException, match="`Small` optimizes by hand; set `automatic_optimization = True`"
    ):
        Owner().require_automatic_optimization(module)


def test_hooks_must_be_defined_by_the_user() -> None:
    owner, module = Owner(), Small()
    assert owner.require_hook(module, "train_dataloader", "to train") == module.train_dataloader
    for missing, on in (
        ("held_out_loss", module),
        ("val_dataloader", module),
        ("test_dataloader", LightningDataModule()),
    ):
        with pytest.raises(MisconfigurationException, match=rf"define `{missing}` on `\w+`: it is needed to score"):
            owner.require_hook(on, missing, "to score a batch")


def test_sharded_strategies_are_refused() -> None:
    trainer = trainer_with()
    Owner().refuse_sharded_strategy(trainer)
    sharded: Any = SimpleNamespace(strategy=FSDPStrategy())
    with pytest.raises(MisconfigurationException, match="`FSDPStrategy` shards parameters; use `strategy='ddp'`"):
        Owner().refuse_sharded_strategy(sharded)


# Own optimizers


class Stepping(MethodCallback):
    def __init__(self, parameter: torch.Tensor) -> None:
        self.unused = torch.zeros(1, requires_grad=True)
        self.optimizer = torch.optim.SGD([parameter], lr=0.5)
        self.idle = torch.optim.SGD([self.unused], lr=0.5)
        self.parameter = parameter
        self.course: list[float] = []

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        self.unscale_own(trainer, self.optimizer)
        assert self.parameter.grad is not None
        self.parameter.grad += 1.0  # a term of our own, in true units
        self.step_own(trainer, self.optimizer)
        self.step_own_optimizer(trainer, self.idle)  # no gradient: nothing to unscale, nothing to step
        self.course.append(self.parameter.item())
        assert self.parameter.grad is None


class UsesOwn(Small):
    """Slope 3 in the callback's parameter, except infinite in the third step."""

    def __init__(self, overflow: bool) -> None:
        super().__init__()
        self.own = [torch.tensor(10.0, requires_grad=True)]  # in a list: not the module's
        self.overflow = overflow

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        slope = float("inf") if self.overflow and batch_idx == 2 else 3.0
        return self.layer(batch[0]).mean() + self.own[0] * slope


def test_own_optimizer_steps_once_and_clears() -> None:
    module = UsesOwn(overflow=False)
    stepping = Stepping(module.own[0])
    trainer = trainer_with(stepping)
    trainer.fit(module)
    assert stepping.course == [8.0, 6.0, 4.0, 2.0]
    assert trainer.global_step == 4


def test_own_optimizer_shares_the_loss_scale_of_fp16() -> None:
    module = UsesOwn(overflow=True)
    stepping = Stepping(module.own[0])
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    trainer_with(stepping, plugins=[MixedPrecision("16-mixed", "cpu", scaler)]).fit(module)
    assert stepping.course == [8.0, 6.0, 6.0, 4.0]  # the step with overflow is left out
    assert scaler.get_scale() == 512.0  # and the scale is halved once, by Lightning
