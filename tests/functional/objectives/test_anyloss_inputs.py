"""What can be wrong with shapes, values and arguments."""

import re

import pytest
import torch

from lightning_hpo.functional.objectives.anyloss import anyloss
from lightning_hpo.functional.objectives.anyloss_arguments import metric_problems, surrogate_problems
from lightning_hpo.functional.objectives.anyloss_inputs import (
    arrange,
    look_like_probabilities,
    suspicion,
    value_problems,
)
from lightning_hpo.functional.objectives.temperature import cross_entropy, fit_temperature


@pytest.mark.parametrize(
    ("logits", "target", "task", "message"),
    [
        ((5, 1), (5,), "binary", "(5, 1) and targets of shape (5,) differ"),
        ((5,), (5, 1), "binary", "(5,) and targets of shape (5, 1) differ"),
        ((5, 3), (5,), "binary", "did you mean task='multiclass'?"),
        ((5, 3), (5, 3), "binary", "did you mean task='multilabel'?"),
        ((5,), (5,), "multiclass", "C >= 2"),
        ((5, 1), (5,), "multiclass", "C >= 2"),
        ((5, 3), (5, 1), "multiclass", "do not fit"),
        ((5, 3), (5,), "multilabel", "(N, K) for both"),
        ((0,), (0,), "binary", "the batch is empty"),
    ],
)
def test_shapes_are_named(logits, target, task, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        anyloss(torch.zeros(logits), torch.zeros(target, dtype=torch.long), "f1", task)


def test_types_are_named():
    with pytest.raises(ValueError, match="class numbers, got targets of type torch.float32"):
        anyloss(torch.zeros(2, 3), torch.zeros(2), "f1", "multiclass")
    with pytest.raises(ValueError, match="logits must be floating point numbers, got torch.int64"):
        anyloss(torch.zeros(2, dtype=torch.long), torch.zeros(2))
    with pytest.raises(ValueError, match=re.escape("weights of shape (3,) do not fit targets of shape (2,)")):
        anyloss(torch.zeros(2), torch.zeros(2), weight=torch.ones(3))


@pytest.mark.parametrize(
    ("target", "task", "problem"),
    [
        ([0, 1, 2, 5], "binary", "targets must be 0 or 1, got 2, 5"),
        ([-1.0, 1.0, 1.0, 1.0], "binary", "targets must be 0 or 1, got -1"),
        ([0.0, 0.25, 1.0, 1.0], "binary", "targets must be 0 or 1, got 0.25"),
        ([0, 3, 1, 1], "multiclass", "targets must be class numbers from 0 to 2, got 3"),
        ([0, -100, 1, 1], "multiclass", "targets must be class numbers from 0 to 2, got -100"),
        ([0, 1, 1, 1], "binary", None),
        ([0, 1, 2, 1], "multiclass", None),
    ],
)
def test_values_of_targets_are_named(target, task, problem):
    logits = torch.zeros(4, 3) if task == "multiclass" else torch.zeros(4)
    inputs = arrange(logits, torch.tensor(target), task)
    expected = [] if problem is None else [problem]
    assert value_problems(inputs, task) == expected
    assert value_problems(inputs, task, suspicion(inputs, task).tolist()) == expected


def test_many_targets_are_not_suspected_for_their_rounding():
    target = (torch.rand(1_000_003, generator=torch.Generator().manual_seed(0)) < 0.3).float()
    inputs = arrange(torch.zeros(len(target)), target, "binary")
    assert value_problems(inputs, "binary", suspicion(inputs, "binary").tolist()) == []


def test_probabilities_are_recognised():
    assert look_like_probabilities(torch.rand(50, 3).softmax(1), "multiclass")
    assert not look_like_probabilities(torch.rand(50, 3) * 0.1, "multiclass")
    assert not look_like_probabilities(torch.zeros(50), "binary")  # a network that begins at 0
    assert not look_like_probabilities(torch.tensor([0.2, 0.3]), "binary")  # by chance


def test_probabilities_are_accepted_where_they_are_announced():
    z = torch.linspace(-3, 3, 13, dtype=torch.float64)
    inputs = arrange(z.sigmoid(), torch.ones(13), "binary", from_logits=False)
    torch.testing.assert_close(inputs.logits, z)
    logits = torch.randn(5, 3, dtype=torch.float64)
    inputs = arrange(logits.softmax(1), torch.zeros(5, dtype=torch.long), "multiclass", from_logits=False)
    torch.testing.assert_close(inputs.logits.softmax(1), logits.softmax(1))
    assert arrange(torch.tensor([0.0, 1.0]), torch.ones(2), "binary", from_logits=False).logits.isfinite().all()


def test_every_wrong_argument_is_named():
    assert metric_problems("f1", "binary", "macro", 1.0) == []
    assert "['accuracy', 'balanced_accuracy', 'f1'" in metric_problems("auc", "binary", "macro", 1.0)[0]
    assert len(metric_problems("auc", "ordinal", "median", 0.0)) == 4
    assert "not averaged" in metric_problems("mcc", "multiclass", "micro", 1.0)[0]
    with pytest.raises(ValueError, match="metric must be one of"):
        anyloss(torch.zeros(2), torch.tensor([0, 1]), "auc")
    assert surrogate_problems("anyloss", 73.0, 0.5, 0.1, "binary") == []
    assert len(surrogate_problems("hinge", 0.0, 1.0, 0.0, "binary")) == 4
    assert "no effect" in surrogate_problems("sol-uniform", 5.0, 0.5, 0.1, "binary")[0]
    assert "largest logit" in surrogate_problems("anyloss", None, 0.4, 0.1, "multiclass")[0]


# Temperature


@pytest.mark.parametrize("task", ["binary", "multiclass", "multilabel"])
def test_the_temperature_undoes_a_scale(task):
    generator = torch.Generator().manual_seed(0)
    shape = (40_000,) if task == "binary" else (40_000, 3)
    logits = torch.randn(shape, generator=generator)
    if task == "multiclass":
        target = torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]
    else:
        target = (torch.rand(shape, generator=generator) < logits.sigmoid()).long()
    found = fit_temperature(4 * logits, target, task)
    assert found == pytest.approx(4, rel=0.05)
    best = cross_entropy(4 * logits / found, target, task)
    assert all(best < cross_entropy(4 * logits / (found * f), target, task) for f in (0.9, 1.1))


def test_a_temperature_has_limits():
    logits = torch.tensor([3.0, -3.0])
    assert fit_temperature(logits, torch.tensor([1, 0])) == pytest.approx(0.01)
    assert fit_temperature(logits, torch.tensor([0, 1])) == pytest.approx(100)
    with pytest.raises(ValueError, match="finite"):
        fit_temperature(torch.tensor([torch.nan]), torch.tensor([1]))
