"""A hypergradient in a loop of one's own, against closed forms."""

import math

import pytest
import torch
from torch import nn

from lightning_hpo import HyperparameterSet, Positive
from lightning_hpo.module_hypergradient import ModuleHypergradient
from lightning_hpo.module_losses import ModuleLosses
from lightning_hpo.raw_hyperparameters import HiddenParameters, named_sets, numbers, step_raw
from lightning_hpo.tuned_optimizer import TunedOptimizer


class Scalar(nn.Module):
    """Training pulls the weight to the batch, validation to 1."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def training_step(self, batch, batch_idx):
        return 0.5 * (self.weight - batch).square()

    def validation_step(self, batch, batch_idx):
        return 0.5 * (self.weight - 1).square()


GOAL, DECAY = torch.tensor(3.0, dtype=torch.float64), 0.4
PULLED = 1 - math.exp(-DECAY)  # the slope of softplus where it is DECAY


def trained(lr=0.5, steps=200):
    module = Scalar()
    optimizer = torch.optim.SGD(module.parameters(), lr=lr, weight_decay=DECAY)
    tuned = TunedOptimizer(optimizer, ["weight_decay"], dict(module.named_parameters()))
    for _ in range(steps):
        optimizer.zero_grad()
        module.training_step(GOAL, 0).backward()
        optimizer.step()
    return module, optimizer, tuned, ModuleLosses(module, {"": tuned.hypers})


@pytest.mark.parametrize("estimator", ["auto", "ift_exact"])
def test_where_training_ends(estimator):
    """w = 3 / (1 + decay), so the slope is -3 (w - 1) / (1 + decay)^2."""
    _, _, tuned, losses = trained()
    estimate = ModuleHypergradient(losses, tuned, estimator, tune=["weight_decay"])
    found = estimate.estimate([GOAL], [GOAL]).gradients["weight_decay"].item()
    end = 3 / (1 + DECAY)
    assert found == pytest.approx(-3 * (end - 1) / (1 + DECAY) ** 2 * PULLED, rel=1e-6)
    assert estimate.product == "auto"


def test_one_step_ahead_begins_where_the_step_began():
    """The step from w takes it to w' = w - lr (w - 3 + decay w), whose slope in the decay is -lr w."""
    module, optimizer, tuned, losses = trained(lr=0.1, steps=3)
    estimate = ModuleHypergradient(losses, tuned, "unrolled", {"steps": 1}, tune=["weight_decay"])
    before = module.weight.item()
    estimate.before_step()
    optimizer.zero_grad()
    module.training_step(GOAL, 0).backward()
    optimizer.step()
    found = estimate.estimate([GOAL], [GOAL]).gradients["weight_decay"].item()
    assert found == pytest.approx((module.weight.item() - 1) * -0.1 * before * PULLED, rel=1e-6)


def test_a_step_is_shortened_to_the_largest_norm():
    raws = {"a": torch.zeros(()), "b": torch.zeros(())}
    gradients = {"a": torch.tensor(3.0), "b": torch.tensor(-4.0)}
    optimizer = torch.optim.SGD(list(raws.values()), lr=1.0)
    step_raw(optimizer, raws, gradients, 5.0, max_norm=10.0)
    assert [raw.item() for raw in raws.values()] == [-3.0, 4.0]
    step_raw(optimizer, raws, gradients, 5.0, max_norm=1.0)
    assert [raw.item() for raw in raws.values()] == pytest.approx([-3.6, 4.8])
    assert raws["a"].grad is None


def test_sets_have_short_names_unless_two_end_alike():
    def part():
        inner = nn.Module()
        inner.hypers = HyperparameterSet(decay=Positive(0.5))
        return inner

    one, given = nn.Sequential(part()), HyperparameterSet(rate=Positive(0.25))
    assert list(named_sets(one, given)) == ["hypers", "given"]
    assert numbers(named_sets(one, given)) == {"hypers.decay": 0.5, "given.rate": 0.25}
    assert list(named_sets(nn.Sequential(part(), part()))) == ["0.hypers", "1.hypers"]
    assert named_sets(one, one[0].hypers).keys() == {"hypers"}
    hidden = HiddenParameters()
    hidden.hide(raw for part in named_sets(one).values() for raw in part.parameters())
    assert not one[0].hypers.raw["decay"].requires_grad
    hidden.show()
    assert one[0].hypers.raw["decay"].requires_grad


def test_decay_alone_is_worth_one_step_of_a_solve_and_hyperparameters_of_the_loss_five():
    module, _, tuned, losses = trained()
    decay = ["weight_decay"]
    assert ModuleHypergradient(losses, tuned, tune=decay).settings["maxiter"] == 1
    assert ModuleHypergradient(losses, tuned, "auto", {"maxiter": 3}, tune=decay).settings["maxiter"] == 3
    both = ModuleLosses(module, {"optimizer": tuned.hypers, "loss": HyperparameterSet(penalty=Positive(0.1))})
    assert ModuleHypergradient(both, tuned, tune=decay).settings["maxiter"] == 5
    assert "maxiter" not in ModuleHypergradient(losses, tuned, "ift_cg", tune=decay).settings
