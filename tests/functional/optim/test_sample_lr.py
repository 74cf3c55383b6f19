"""Schedules in samples: closed forms, resume, and what happens if nobody counts."""

import copy
import math
import pickle
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule
from torch.utils.data import DataLoader, TensorDataset

from lightning_hpo.functional.optim.sample_lr import SampleCosine, SampleLinear, SampleLR
from lightning_hpo.testing import tiny_trainer


def optimizer_with(*rates: float) -> torch.optim.Optimizer:
    return torch.optim.SGD([{"params": [torch.zeros(1, requires_grad=True)], "lr": lr} for lr in rates])


def drive(scheduler: SampleLR, *batches: int) -> list[list[float]]:
    rates = []
    for samples in batches:
        scheduler.optimizer.step()
        scheduler.advance(samples)
        scheduler.step()
        rates.append(scheduler.get_last_lr())
    return rates


def halve(samples: int) -> float:
    return 0.5 ** (samples / 100)


# Closed forms


def test_the_learning_rate_depends_on_samples_not_on_steps() -> None:
    one, many = SampleLR(optimizer_with(0.8), halve), SampleLR(optimizer_with(0.8), halve)
    assert one.get_last_lr() == [0.8]
    assert drive(one, 300)[-1] == pytest.approx([0.1])
    assert drive(many, 10, 90, 150, 50)[-1] == pytest.approx([0.1])
    assert [group["lr"] for group in many.optimizer.param_groups] == pytest.approx([0.1])


def test_a_changed_learning_rate_is_not_compounded() -> None:
    scheduler = SampleLR(optimizer_with(0.8), halve)
    for _ in range(3):
        drive(scheduler, 0)
        scheduler.optimizer.param_groups[0]["lr"] *= 4  # what a rule for larger batches does
    assert drive(scheduler, 100)[-1] == pytest.approx([0.4])


def test_groups_may_have_their_own_functions() -> None:
    scheduler = SampleLR(optimizer_with(1.0, 2.0), [halve, lambda samples: 1.0])
    assert drive(scheduler, 100)[-1] == pytest.approx([0.5, 2.0])
    shared = SampleLR(optimizer_with(1.0, 2.0), halve)
    assert drive(shared, 100)[-1] == pytest.approx([0.5, 1.0])
    with pytest.raises(ValueError, match="1 functions were given for 2 parameter groups"):
        SampleLR(optimizer_with(1.0, 2.0), [halve])


def test_the_cosine_is_that_of_torch_in_steps_of_one_size() -> None:
    ours = SampleCosine(optimizer_with(0.5), total=400, min_factor=0.1)
    other = optimizer_with(0.5)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(other, T_max=20, eta_min=0.05)
    for _ in range(20):
        other.step()
        theirs.step()
        assert drive(ours, 20)[-1] == pytest.approx(theirs.get_last_lr(), rel=1e-9)
    assert drive(ours, 1000)[-1] == pytest.approx([0.05])  # and stays there


def test_the_official_linear_decay_rises_from_min_to_max() -> None:
    scheduler = SampleLinear(optimizer_with(0.5), total=100, min_factor=0.1)  # ours falls
    rates = [0.5, *(rate for (rate,) in drive(scheduler, *[10] * 12))]
    assert rates == sorted(rates, reverse=True)
    assert rates[1] == pytest.approx(0.5 * (1 - 0.9 * 0.1))
    assert rates[10] == pytest.approx(0.05)
    assert rates[12] == pytest.approx(0.05)


@pytest.mark.parametrize("schedule", [SampleCosine, SampleLinear])
def test_the_warmup_rises_to_the_full_learning_rate(schedule: type[SampleLR]) -> None:
    scheduler = schedule(optimizer_with(2.0), total=300, warmup=100, min_factor=0.2)
    assert scheduler.get_last_lr() == pytest.approx([0.4])
    rates = [rate for (rate,) in drive(scheduler, 25, 25, 50, 100, 100)]
    assert rates == pytest.approx([0.8, 1.2, 2.0, 1.2, 0.4])  # half-way down both are half-way
    plain = schedule(optimizer_with(2.0), total=300)
    assert plain.get_last_lr() == [2.0]


def test_the_quarter_points_tell_the_schedules_apart() -> None:
    cosine = SampleCosine(optimizer_with(1.0), total=100, min_factor=0.0)
    linear = SampleLinear(optimizer_with(1.0), total=100, min_factor=0.0)
    assert drive(cosine, 25)[-1] == pytest.approx([(1 + math.sqrt(0.5)) / 2])
    assert drive(linear, 25)[-1] == pytest.approx([0.75])


# Counting


def test_a_schedule_nobody_counts_for_says_so() -> None:
    scheduler = SampleCosine(optimizer_with(0.5), total=100)
    scheduler.optimizer.step()
    with pytest.raises(RuntimeError, match=r"`SampleCosine` .* `AdaptiveBatchSize` .* `scheduler.advance\(samples\)`"):
        scheduler.step()
    scheduler.advance(0)
    scheduler.step()


def test_samples_are_not_taken_back() -> None:
    with pytest.raises(ValueError, match="samples must not be negative, got -1"):
        SampleLR(optimizer_with(0.5), halve).advance(-1)


@pytest.mark.parametrize(
    ("arguments", "problems"),
    [
        ({"total": 0}, ["total must be larger, got warmup=0, total=0"]),
        ({"total": 10, "warmup": 10}, ["got warmup=10, total=10"]),
        ({"total": 10, "warmup": -1, "min_factor": 1.5}, ["got warmup=-1", "min_factor must lie between 0 and 1"]),
    ],
)
@pytest.mark.parametrize("schedule", [SampleCosine, SampleLinear])
def test_wrong_arguments_are_listed(schedule: type[SampleLR], arguments: dict, problems: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        schedule(optimizer_with(0.5), **arguments)
    assert all(problem in str(error.value) for problem in problems)


# State


@pytest.mark.parametrize("schedule", [SampleCosine, SampleLinear])
def test_a_schedule_goes_on_from_a_weights_only_file(schedule: type[SampleLR], tmp_path: Path) -> None:
    whole, first, second = (schedule(optimizer_with(0.5, 0.1), total=300, warmup=50) for _ in range(3))
    drive(first, 70, 20)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert second.samples == 90
    assert second.get_last_lr() == first.get_last_lr()
    assert drive(second, 60) == drive(whole, 70, 20, 60)[-1:]
    assert "lr_lambdas" not in first.state_dict()


def test_a_resumed_schedule_must_be_told_as_well() -> None:
    first, second = (SampleCosine(optimizer_with(0.5), total=300) for _ in range(2))
    drive(first, 70)
    second.load_state_dict(first.state_dict())
    second.optimizer.step()
    with pytest.raises(RuntimeError, match="nobody tells it"):
        second.step()


def test_schedules_can_be_copied_to_another_process() -> None:
    scheduler = SampleCosine(optimizer_with(0.5), total=300)
    factor = pickle.loads(pickle.dumps(scheduler.lr_lambdas[0]))
    assert factor(150) == scheduler.lr_lambdas[0](150)
    assert copy.deepcopy(scheduler).get_last_lr() == [0.5]


class Module(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.rates: list[float] = []

    def training_step(self, batch, batch_idx):
        self.rates.append(self.optimizers().param_groups[0]["lr"])
        return self.layer(batch[0]).square().mean()

    def on_before_optimizer_step(self, optimizer) -> None:
        self.lr_schedulers().advance(4)

    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.ones(16, 1)), batch_size=4)

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.4)
        schedule = SampleLinear(optimizer, total=16, min_factor=0.0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def test_in_a_trainer() -> None:
    module = Module()
    tiny_trainer(max_epochs=1).fit(module)
    assert module.rates == pytest.approx([0.4, 0.3, 0.2, 0.1])
