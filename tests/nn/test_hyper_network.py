"""Hyper-networks: magnitudes that do not depend on the condition, and modules with predicted weights."""

import copy

import pytest
import torch
from torch import nn

from lightning_hpo.functional.bilevel.conditioning import encode_condition, proportionality
from lightning_hpo.nn.hyper_network import HyperNetwork
from lightning_hpo.nn.mip_hypernetworks import hypernetize


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def convnet():
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)).double()


def kernel(**arguments):
    return HyperNetwork({"w": torch.zeros(16, 8, 3, 3)}, conditions=1, **arguments)


@pytest.mark.parametrize("k", [1, 5])
def test_encodings_have_one_length(k):
    gamma = torch.rand(50, k, dtype=torch.float64)
    gamma[:2] = torch.tensor([[0.0], [1.0]])
    encoded = encode_condition(gamma)
    torch.testing.assert_close(encoded.norm(dim=-1), torch.full((50,), k**0.5, dtype=torch.float64), rtol=1e-12, atol=0)
    torch.testing.assert_close(
        encode_condition(gamma, "complement").abs().sum(-1), torch.full((50,), float(k)).double()
    )
    with pytest.raises(ValueError, match="encoding must be 'cos_sin', 'complement' or 'none', got 'l2'"):
        encode_condition(gamma, "l2")


GAMMAS = torch.tensor([[0.01], [0.03], [0.1], [0.3], [1.0]])


def test_without_mip_the_output_is_proportional_to_the_condition():
    with pytest.warns(UserWarning, match="without an encoding and a residual the predicted magnitudes are prop"):
        plain = kernel(encoding="none", residual=False)
    torch.testing.assert_close(
        plain(torch.tensor([0.8]))["w"], 8 * plain(torch.tensor([0.1]))["w"], rtol=1e-5, atol=1e-8
    )
    assert proportionality(lambda gamma: plain(gamma)["w"], GAMMAS) == pytest.approx(1.0, abs=1e-3)


def test_with_mip_it_does_not_depend_on_it():
    base = torch.randn(16, 8, 3, 3) * (2 / 72) ** 0.5
    for seed in range(3):
        torch.manual_seed(seed)
        mip = HyperNetwork({"w": base}, conditions=1)
        assert abs(proportionality(lambda gamma, mip=mip: mip(gamma)["w"], GAMMAS)) < 0.05
        first, last = (mip(gamma)["w"].std() for gamma in (GAMMAS[0], GAMMAS[-1]))
        assert max(first / last, last / first) < 1.15


def test_what_is_added_begins_as_an_ordinary_layer_and_vectors_at_zero():
    heads = HyperNetwork({"w": torch.zeros(64, 32, 3, 3), "b": torch.zeros(64)}, conditions=1).heads
    assert heads["w"].weight.std().item() == pytest.approx((2 / 1.0001 / (64 * 32 * 9)) ** 0.5, rel=0.05)
    assert heads["b"].weight.abs().max() == 0
    alone = HyperNetwork({"b": torch.zeros(64)}, conditions=1, residual=False)
    assert alone.heads["b"].weight.std() > 0.1


def test_zero_deltas_keep_a_pretrained_network_bit_for_bit():
    net = convnet()
    x = torch.randn(3, 1, 8, 8).double()
    expected = net(x)
    hyper = hypernetize(copy.deepcopy(net), conditions=2, delta_init="zeros").double()
    for gamma in torch.rand(3, 2).double():
        assert torch.equal(hyper(x, gamma=gamma), expected)


@pytest.mark.parametrize("hidden", [(), (16, 32)])
def test_a_condition_for_each_example_is_a_loop(hidden):
    hyper = hypernetize(convnet(), conditions=2, include=("0.*", "4.weight"), hidden=hidden).double()
    x, gamma = torch.randn(4, 1, 8, 8).double(), torch.rand(4, 2).double()
    found = hyper(x, gamma=gamma)
    expected = torch.cat([hyper(x[i : i + 1], gamma=gamma[i]) for i in range(4)])
    torch.testing.assert_close(found, expected)
    plain = hyper.materialize(gamma[1])
    assert all(p.requires_grad for p in plain.parameters())
    torch.testing.assert_close(plain(x), hyper(x, gamma=gamma[1]))


def test_gradients_reach_the_condition_the_base_and_what_is_left():
    hyper = hypernetize(convnet(), conditions=1, include=("4.*",)).double()
    x = torch.randn(3, 1, 8, 8).double()
    gamma = torch.tensor([0.3]).double().requires_grad_()
    loss = hyper(x, gamma=gamma).square().mean()
    loss.backward()
    step = 1e-6
    with torch.no_grad():
        numeric = [hyper(x, gamma=gamma + s).square().mean() for s in (step, -step)]
    assert gamma.grad.item() == pytest.approx((numeric[0] - numeric[1]).item() / (2 * step), rel=1e-6)
    wanted = {n for n, p in hyper.named_parameters() if p.requires_grad}
    assert {n for n, p in hyper.named_parameters() if p.grad is not None} == wanted
    assert {"module.0.weight", "hyper_network.base.4/weight"} <= wanted
    assert "module.4.weight" not in wanted


def test_names_and_not_order_say_what_is_what():
    targets = {"a.weight": torch.randn(2, 3), "b": torch.randn(()), "c": torch.randn(3)}
    first = HyperNetwork(targets, conditions=1)
    other = HyperNetwork(dict(reversed(targets.items())), conditions=1)
    other.load_state_dict(first.state_dict())
    one, two = first(torch.tensor([0.7])), other(torch.tensor([0.7]))
    for name, target in targets.items():
        assert one[name].shape == target.shape
        torch.testing.assert_close(one[name], two[name])
    assert first(torch.rand(5, 1))["b"].shape == (5,)
    decayed = first.parameter_groups(weight_decay=0.1)
    assert [group["weight_decay"] for group in decayed] == [0.0, 0.1]
    assert sum(len(group["params"]) for group in decayed) == len(list(first.parameters()))


def test_an_exception_leaves_the_module_clean():
    hyper = hypernetize(convnet(), conditions=1).double()
    before = {name: p.data_ptr() for name, p in hyper.module.named_parameters()}
    with pytest.raises(RuntimeError):
        hyper(torch.randn(3, 2, 8, 8).double(), gamma=torch.tensor([0.5]).double())
    assert {name: p.data_ptr() for name, p in hyper.module.named_parameters()} == before


def test_one_network_learns_a_family():
    """The best constant under a loss with weight gamma is gamma itself, for each gamma."""
    hyper = HyperNetwork({"c": torch.zeros(1, 1)}, conditions=1, hidden=(16,))
    optimizer = torch.optim.Adam(hyper.parameter_groups()[0]["params"] + list(hyper.base.values()), lr=0.01)
    for _ in range(300):
        gamma = torch.rand(32, 1)
        optimizer.zero_grad()
        c = hyper(gamma)["c"][:, 0]
        (gamma * (c - 1).square() + (1 - gamma) * c.square()).mean().backward()
        optimizer.step()
    grid = torch.linspace(0.05, 0.95, 10)[:, None]
    torch.testing.assert_close(hyper(grid)["c"][:, 0], grid, atol=0.05, rtol=0)


def test_refusals():
    with pytest.raises(
        ValueError, match=r"nothing to predict; conditions must be a positive integer, got 0; hidden sizes .*\(0,\)"
    ):
        HyperNetwork({}, conditions=0, hidden=(0,))
    with pytest.raises(TypeError, match=r"not \['steps'\]"):
        HyperNetwork({"steps": torch.zeros(1, dtype=torch.long)}, conditions=1)
    with pytest.raises(ValueError, match=r"no trainable parameter is named like \['no'\]; there are"):
        hypernetize(nn.Linear(1, 1), conditions=1, include=("no",))
    of_two = HyperNetwork({"w": torch.zeros(2, 2)}, conditions=2)
    with pytest.raises(ValueError, match=r"a condition has 2 numbers, got shape \(3,\)"):
        of_two(torch.zeros(3))
