"""MetricObjectiveMixin is a door to the callback."""

import pytest
import torch

from lightning_hpo import MetricObjective, MetricObjectiveMixin
from lightning_hpo.demos import ImbalancedDataModule, TabularClassifier
from lightning_hpo.testing import tiny_trainer


class OwnCallback(MetricObjective):
    """To be told from the mixin's."""


class WithCallback(TabularClassifier):
    def configure_callbacks(self):
        return OwnCallback("mcc")


class Balanced(MetricObjectiveMixin, TabularClassifier):
    pass


class Both(MetricObjectiveMixin, WithCallback):
    pass


def trained(kind, *callbacks, **arguments):
    torch.manual_seed(0)
    module = kind(inputs=30, **arguments)
    tiny_trainer(*callbacks, max_epochs=2, limit_val_batches=0).fit(module, ImbalancedDataModule())
    return module


def test_it_trains_as_the_callback_does():
    ours = trained(Balanced, metric="gmean", metric_args={"warmup": 0.1})
    same = trained(TabularClassifier, MetricObjective("gmean", warmup=0.1))
    other = trained(TabularClassifier)
    pairs = [(a, b, c) for a, b, c in zip(ours.parameters(), same.parameters(), other.parameters(), strict=True)]
    assert all(torch.equal(a, b) for a, b, _ in pairs)
    assert not any(torch.equal(a, c) for a, _, c in pairs)


def test_callbacks_of_the_module_stay():
    own, ours = Both(inputs=3).configure_callbacks()
    assert isinstance(own, OwnCallback)
    assert (type(ours), ours.metric) == (MetricObjective, "f1")


def test_wrong_arguments_are_those_of_the_callback():
    with pytest.raises(ValueError, match="mix"):
        Balanced(inputs=3, metric_args={"mix": 2.0}).configure_callbacks()
