"""Hyper-networks: magnitudes that do not depend on the condition, and modules with predicted weights."""

import copy
import random

import pytest
import torch
from torch import nn

from lightning_hpo.functional.bilevel.conditioning import encode_condition, proportionality
from lightning_hpo.nn import hyper_network
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
        plain = kernel(encoding="none", residual=False).double()
    for gamma in torch.rand(5, 1).double():
        for factor in (0.0, 0.01, 0.5, 7.0):
            torch.testing.assert_close(plain(factor * gamma)["w"], factor * plain(gamma)["w"], rtol=1e-12, atol=1e-15)
    assert proportionality(lambda gamma: plain(gamma)["w"], GAMMAS) == pytest.approx(1.0, abs=1e-3)


def ratio(network):
    first, last = (network(gamma)["w"].std().item() for gamma in (GAMMAS[0], GAMMAS[-1]))
    return max(first / last, last / first)


def test_with_mip_it_does_not_depend_on_it():
    for seed in range(40):
        torch.manual_seed(seed)
        base = nn.init.kaiming_normal_(torch.empty(16, 8, 3, 3), a=0.01)
        mip = HyperNetwork({"w": base}, conditions=1).double()
        assert abs(proportionality(lambda gamma, mip=mip: mip(gamma)["w"], GAMMAS)) < 0.05
        assert ratio(mip) < 1.1


def test_beside_a_smaller_base_what_is_added_counts_for_more():
    """torch's own initialisation has a standard deviation less than half as large: some seeds go beyond 1.1."""
    ratios = []
    for seed in range(40):
        torch.manual_seed(seed)
        ratios.append(ratio(HyperNetwork({"w": nn.Conv2d(8, 16, 3).weight}, conditions=1)))
    assert sorted(ratios)[20] < 1.1 < max(ratios) < 1.5


def test_what_is_added_begins_as_an_ordinary_layer_and_vectors_at_zero():
    targets = {"kernel": torch.zeros(64, 32, 3, 3), "matrix": torch.zeros(10, 32), "bias": torch.zeros(64)}
    heads = HyperNetwork(targets, conditions=1).heads
    for name in ("kernel", "matrix"):
        expected = (2 / 1.0001 / targets[name].numel()) ** 0.5
        assert heads[name].weight.std().item() == pytest.approx(expected, rel=0.05)
    assert heads["bias"].weight.abs().max() == 0
    alone = HyperNetwork({"bias": torch.zeros(64)}, conditions=1, residual=False)
    assert alone.heads["bias"].weight.std().item() == pytest.approx((2 / 1.0001 / 64) ** 0.5, rel=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_deltas_keep_a_pretrained_network_bit_for_bit(dtype):
    net = convnet().to(dtype)
    x = torch.randn(3, 1, 8, 8, dtype=dtype)
    expected = net(x)
    hyper = hypernetize(copy.deepcopy(net), conditions=2, delta_init="zeros").to(dtype)
    for gamma in torch.rand(3, 2, dtype=dtype):
        assert torch.equal(hyper(x, gamma=gamma), expected)
        assert torch.equal(hyper.materialize(gamma)(x), expected)


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


@pytest.mark.parametrize("shape", [(2,), (3, 2)])
@pytest.mark.parametrize("rank", [None, 3])
def test_the_gradient_in_the_condition_is_a_difference(shape, rank):
    hyper = hypernetize(convnet(), conditions=2, include=("0.*", "4.*"), rank=rank).double()
    x, gamma = torch.randn(3, 1, 8, 8).double(), 0.1 + 0.8 * torch.rand(shape).double()
    with torch.no_grad():
        for parameter in hyper.hyper_network.parameters():  # vectors begin at zero
            parameter.add_(0.1 * torch.randn_like(parameter))
    gamma.requires_grad_()
    hyper(x, gamma=gamma).square().mean().backward()
    step = 1e-5
    with torch.no_grad():
        for index in range(gamma.numel()):
            change = torch.zeros(gamma.numel()).double()
            change[index] = step
            up, down = (hyper(x, gamma=gamma + s * change.view(shape)).square().mean().item() for s in (1, -1))
            slope = (up - down) / (2 * step)
            assert gamma.grad.flatten()[index].item() == pytest.approx(slope, rel=1e-6, abs=1e-8)


def test_gradients_reach_the_condition_the_base_and_what_is_left():
    hyper = hypernetize(convnet(), conditions=1, include=("4.*",)).double()
    hyper(torch.randn(3, 1, 8, 8).double(), gamma=torch.tensor([0.3])).square().mean().backward()
    wanted = {n for n, p in hyper.named_parameters() if p.requires_grad}
    assert {n for n, p in hyper.named_parameters() if p.grad is not None} == wanted
    assert {"module.0.weight", "hyper_network.base.4/weight"} <= wanted
    assert "module.4.weight" not in wanted


@pytest.mark.parametrize("seed", range(3))
def test_names_and_not_order_say_what_is_what(seed):
    shapes = {"a.weight": (2, 3), "a.bias": (2,), "b": (), "c": (3, 2), "d.weight": (2, 3), "e": (6,)}
    targets = {name: torch.randn(shape) for name, shape in shapes.items()}
    first = HyperNetwork(targets, conditions=1, residual=False)
    shuffled = random.Random(seed).sample(list(targets.items()), len(targets))
    assert list(dict(shuffled)) != list(targets)
    other = HyperNetwork(dict(shuffled), conditions=1, residual=False)
    other.load_state_dict(first.state_dict())
    one, two = first(torch.tensor([0.7])), other(torch.tensor([0.7]))
    for name, target in targets.items():
        assert one[name].shape == target.shape
        assert torch.equal(one[name], two[name])
    based = HyperNetwork(dict(shuffled), conditions=1, delta_init="zeros")(torch.tensor([0.7]))
    assert all(torch.equal(based[name], target) for name, target in targets.items())
    assert first(torch.rand(5, 1))["b"].shape == (5,)
    decayed = first.parameter_groups(weight_decay=0.1)
    assert [group["weight_decay"] for group in decayed] == [0.0, 0.1]
    assert sum(len(group["params"]) for group in decayed) == len(list(first.parameters()))


def test_a_parameter_may_have_the_name_of_a_method():
    targets = {name: torch.randn(2, 2) for name in ("keys", "values", "type", "forward", "training", "a.keys")}
    found = HyperNetwork(targets, conditions=1, delta_init="zeros")(torch.tensor([0.2]))
    assert all(torch.equal(found[name], target) for name, target in targets.items())


def test_it_is_where_the_targets_are_and_takes_a_condition_from_elsewhere():
    with torch.device("meta"):
        module = nn.Linear(2, 3)
    hyper = hypernetize(module, conditions=1)
    assert {parameter.device.type for parameter in hyper.parameters()} == {"meta"}
    assert hyper(torch.zeros(4, 2, device="meta"), gamma=torch.tensor([0.5])).device.type == "meta"


def test_last_layers_that_fill_the_memory_are_warned_of(monkeypatch):
    target = {"w": torch.zeros(64, 64)}
    monkeypatch.setattr(hyper_network, "_free_memory", lambda: 2 * 128 * 64 * 64 * 4 - 1)
    with pytest.warns(UserWarning, match="the last layers take 0.002 GiB, and 0.0039 are free; give `rank`") as caught:
        HyperNetwork(target, conditions=1)
    assert caught[0].filename == __file__
    with pytest.warns(UserWarning, match="the last layers take") as caught:
        hypernetize(nn.Linear(64, 64), conditions=1)
    HyperNetwork(target, conditions=1, rank=16)
    HyperNetwork(target, conditions=1, hidden=(16, 127))
    monkeypatch.setattr(hyper_network, "_free_memory", lambda: None)
    HyperNetwork(target, conditions=1)


@pytest.mark.parametrize("shape", [(1,), (3, 1)])
def test_an_exception_leaves_the_module_clean(shape):
    hyper, gamma = hypernetize(convnet(), conditions=1).double(), torch.full(shape, 0.5)
    before = {name: (p, p.data_ptr(), p.clone()) for name, p in hyper.module.named_parameters()}
    x = torch.randn(3, 1, 8, 8).double()
    expected = hyper(x, gamma=gamma)
    with pytest.raises(RuntimeError):
        hyper(torch.randn(3, 2, 8, 8).double(), gamma=gamma)
    after = dict(hyper.module.named_parameters())
    assert after.keys() == before.keys()
    for name, (parameter, place, value) in before.items():
        assert after[name] is parameter
        assert after[name].data_ptr() == place
        assert torch.equal(after[name], value)
    assert torch.equal(hyper(x, gamma=gamma), expected)


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
    for hidden in (16, "16"):
        with pytest.raises(TypeError, match=f"hidden must be a sequence of sizes, got {hidden!r}"):
            HyperNetwork({"w": torch.zeros(2, 2)}, conditions=1, hidden=hidden)
    with pytest.raises(
        ValueError, match=r"positive integer, got 1.5; hidden sizes must be positive integers, got \(1.5,"
    ):
        HyperNetwork({"w": torch.zeros(2, 2)}, conditions=1.5, hidden=(1.5, True))
    of_two = HyperNetwork({"w": torch.zeros(2, 2)}, conditions=2)
    with pytest.raises(ValueError, match=r"a condition has 2 numbers, got shape \(3,\)"):
        of_two(torch.zeros(3))
