"""What is found to be outer, and what is said where nothing or everything is."""

import torch
from torch import nn

from lightning_hpo import HyperparameterSet, Positive
from lightning_hpo.outer_parameters import OuterParameters


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.head = nn.Linear(2, 2), nn.Linear(2, 1)
        self.encoder2 = nn.Linear(2, 2)


def test_a_name_is_a_part_and_not_the_beginning_of_a_word():
    outer = OuterParameters(Net(), ["encoder"])
    assert list(outer.parts) == ["encoder.weight", "encoder.bias"]
    assert list(OuterParameters(Net(), ["encoder.bias", "encoder2"]).parts) == [
        "encoder.bias",
        "encoder2.weight",
        "encoder2.bias",
    ]


def test_names_win_over_the_method_and_sets_are_always_outer():
    net = Net()
    net.outer_parameters = lambda: [net.head.weight, net.hypers.raw["decay"]]
    net.hypers = HyperparameterSet(decay=Positive(0.5))
    assert list(OuterParameters(net).parts) == ["head.weight"]
    outer = OuterParameters(net, ["encoder"], HyperparameterSet(other=Positive(2.0)))
    assert list(outer.sets) == ["hypers", "given"]
    assert [len(group) for group in outer.groups()] == [2, 1, 1]
    numbers = outer.numbers()
    assert abs(numbers["hypers.decay"] - 0.5) < 1e-6
    assert abs(numbers["given.other"] - 2.0) < 1e-6
    torch.testing.assert_close(torch.tensor(numbers["encoder.bias"]), net.encoder.bias.norm())


def test_hiding_is_undone():
    net = Net()
    net.encoder.bias.requires_grad_(False)
    outer = OuterParameters(net, ["encoder"])
    assert list(outer.parts) == ["encoder.weight"]
    outer.hide()
    assert not net.encoder.weight.requires_grad
    outer.release()
    assert [p.requires_grad for p in net.encoder.parameters()] == [True, False]


def test_problems_are_listed_together():
    net = Net()
    found = OuterParameters(net, ["encodr", "encoder", "encoder2", "head"]).problems
    assert found == [
        "`outer` names 'encodr', but the module has no such parameter or part.",
        "every parameter is outer, and nothing is left to be inner; name fewer.",
    ]
    assert "nothing is outer" in OuterParameters(net).problems[0]
