"""A frozen module changes nothing but its anchor's gradient, and comes back as it was."""

import torch
from torch import nn

from lightning_hpo.frozen import FrozenModule


def network():
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def test_a_training_step_changes_nothing():
    net = network()
    net[0].weight.requires_grad_(False)
    flags = [parameter.requires_grad for parameter in net.parameters()]
    before = {name: value.clone() for name, value in net.state_dict().items()}
    optimizer = torch.optim.AdamW(net.parameters(), lr=1.0, weight_decay=0.5)
    frozen = FrozenModule(net, anchor=net[2].bias)
    frozen.hold_statistics()
    net(torch.randn(8, 3)).sum().backward()
    assert net[2].bias.grad is not None
    assert net[2].weight.grad is None
    frozen.drop_gradient()
    optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    frozen.restore()
    assert [parameter.requires_grad for parameter in net.parameters()] == flags
    assert net[1].training


def test_norms_in_eval_mode_stay_there():
    net = network()
    net[1].eval()
    frozen = FrozenModule(net, anchor=net[2].bias)
    frozen.hold_statistics()
    frozen.restore()
    assert not net[1].training


def test_two_one_after_the_other_restore_what_was_there_first():
    net = network()
    first = FrozenModule(net, anchor=net[2].bias)
    second = FrozenModule(net, anchor=net[0].bias, before=first.required)
    first.restore()
    second.restore()
    assert all(parameter.requires_grad for parameter in net.parameters())
