import pytest
import torch
from torch import nn

from lightning_hpo.testing import assert_same, module_structure


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ({"a": 1}, {"a": 2}, r"\['a'\]: 1 != 2"),
        ({"a": 1}, {"b": 1}, r"\['a'\] is only in the first"),
        ({}, {"b": 1}, r"\['b'\] is only in the second"),
        ([1, 2], [1], "2 entries != 1 entries"),
        ([1.0], [1], "1.0 != 1"),
        (torch.ones(2), torch.ones(3), r"\(2,\) torch.float32 != \(3,\)"),
        (torch.ones(2), torch.ones(2).double(), "float64"),
        (torch.ones(2), torch.ones(2).nextafter(torch.full((2,), 2.0)), "largest difference 1.19e-07"),
        (torch.tensor([1, 2]), torch.tensor([1, 3]), "integers differ"),
        (float("nan"), 1.0, "nan != 1.0"),
        ("a", "b", "'a' != 'b'"),
        (list(range(20)), list(range(1, 21)), "and 10 more"),
    ],
)
def test_differences_are_named(first, second, message):
    with pytest.raises(AssertionError, match=message):
        assert_same(first, second, "states")


def test_equal_states():
    state = {"a": [torch.tensor([float("nan"), 1.0]), (1, "x", None)], "b": {"c": float("nan")}}
    assert_same(state, {"a": [torch.tensor([float("nan"), 1.0]), (1, "x", None)], "b": {"c": float("nan")}}, "states")


def test_tolerances():
    assert_same([1.0, torch.ones(2)], [1.0 + 1e-6, torch.ones(2) + 1e-6], "states", atol=1e-5)
    with pytest.raises(AssertionError):
        assert_same([1.0], [1.001], "states", atol=1e-5)


class _Other(nn.Linear):
    pass


def _forward(module):
    module[0].forward = lambda x: x


def _class(module):
    module[0].__class__ = _Other


def _replace(module):
    module[1] = nn.ReLU()


def _parameter(module):
    module[0].weight = nn.Parameter(module[0].weight.detach().clone())


def _gradient_hook(module):
    module[0].weight.register_hook(lambda g: g)


def _attribute(module):
    module[0].in_features = 7


@pytest.mark.parametrize("change", [_forward, _class, _replace, _parameter, _gradient_hook, _attribute, nn.Module.eval])
def test_structure_sees(change):
    module = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    before = module_structure(module)
    assert_same(before, module_structure(module), "modules")
    change(module)
    with pytest.raises(AssertionError):
        assert_same(before, module_structure(module), "modules")


def test_structure_ignores_values_of_weights():
    module = nn.Linear(2, 2)
    before = module_structure(module)
    with torch.no_grad():
        module.weight.add_(1)
    assert_same(before, module_structure(module), "modules")
