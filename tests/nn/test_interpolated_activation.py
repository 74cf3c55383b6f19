"""Mixtures of activations against their two ends, differences and integrals."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn

from lightning_hpo.functional.bilevel.piecewise import PIECEWISE
from lightning_hpo.hyper import HyperparameterSet, UnitInterval
from lightning_hpo.nn.interpolated_activation import ACTIVATIONS, InterpolatedActivation, replace_activations

X = torch.randn(64, generator=torch.Generator().manual_seed(0))


def bits(x: torch.Tensor) -> list[bytes]:
    return [pickle.dumps(v) for v in x.tolist()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("first", "second"), [("relu", "abs"), ("gelu", "square"), ("hardtanh", "tanh")])
def test_the_ends_are_the_activations_to_the_bit(first: str, second: str, dtype: torch.dtype) -> None:
    x = X.to(dtype)
    for end, name in ((0.0, second), (1.0, first)):
        expected = bits(ACTIVATIONS[name](x))
        for alpha in (end, torch.tensor(end), lambda end=end: torch.tensor(end, dtype=torch.float64)):
            found = InterpolatedActivation(first, second, alpha)(x)
            assert found.dtype == dtype
            assert bits(found) == expected


def test_mixture_and_slopes() -> None:
    alpha = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    x = X.double().requires_grad_()
    activation = InterpolatedActivation("relu", "square", alpha)
    torch.testing.assert_close(activation(x), 0.3 * x.relu() + 0.7 * x**2)
    for index in (0, 5, 40):
        (slope,) = torch.autograd.grad(activation(x)[index], alpha)
        torch.testing.assert_close(slope, (x.relu() - x**2)[index].detach())

    def mixed(a: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return InterpolatedActivation("tanh", "square", lambda: a)(x)

    assert torch.autograd.gradcheck(mixed, (alpha, x))
    assert torch.autograd.gradgradcheck(mixed, (alpha, x))


def test_one_value_a_channel() -> None:
    alpha = torch.tensor([0.0, 0.5, 1.0])
    x = X[:60].view(20, 3)
    found = InterpolatedActivation("relu", "abs", alpha)(x)
    torch.testing.assert_close(
        found, torch.stack([x[:, 0].abs(), (x[:, 1].relu() + x[:, 1].abs()) / 2, x[:, 2].relu()], 1)
    )


def test_the_names_agree_with_those_whose_pieces_are_known() -> None:
    assert set(PIECEWISE) <= set(ACTIVATIONS)
    for name, pieces in PIECEWISE.items():
        torch.testing.assert_close(ACTIVATIONS[name](4 * X.double()), pieces(4 * X.double()))


@pytest.mark.parametrize(
    ("first", "second", "alpha", "power"),
    [
        ("relu", "abs", 1.0, 0.5),
        ("relu", "abs", 0.0, 1.0),
        ("relu", "abs", 0.5, (0.25 * 1 + 1 * 1) / 2),
        ("relu", "square", 0.0, 3.0),
        ("identity", "square", 0.4, 0.16 + 0.36 * 3),
        ("relu", "square", 0.4, 0.16 * 0.5 + 0.36 * 3 + 2 * 0.24 * math.sqrt(2 / math.pi)),
        ("hardtanh", "abs", 1.0, 1 - math.sqrt(2 / (math.pi * math.e))),
    ],
)
def test_the_gain_keeps_the_scale(first: str, second: str, alpha: float, power: float) -> None:
    """E[relu z * z^2] = sqrt(2 / pi); E[min(z^2, 1)] = 1 - sqrt(2 / (pi e))."""
    assert InterpolatedActivation(first, second, alpha).gain() == pytest.approx(power**-0.5, rel=1e-6)


def test_the_gain_holds_through_depth() -> None:
    torch.manual_seed(0)
    activation = InterpolatedActivation("relu", "abs", alpha=0.3)
    x = torch.randn(64, 512)
    for _ in range(10):
        x = activation(x) @ (torch.randn(512, 512) * activation.gain() / 512**0.5)
    assert 0.5 < x.square().mean().item() < 2.0


def test_a_hyperparameter_set_is_followed_and_gets_its_gradient() -> None:
    hypers = HyperparameterSet(alpha=UnitInterval(0.5))
    network = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4), nn.Sequential(nn.GELU()))
    keys = set(network.state_dict())
    assert replace_activations(network, "abs", lambda: hypers["alpha"]) == ["1", "3.0"]
    assert set(network.state_dict()) == keys
    for _ in range(2):  # a graph of its own in each pass
        network(torch.randn(5, 3)).sum().backward()
    grad = hypers.raw["alpha"].grad
    assert grad is not None
    assert grad != 0


def test_a_parameter_is_a_weight_shared_by_all() -> None:
    network = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU())
    alpha = nn.Parameter(torch.tensor(0.5))
    replace_activations(network, alpha=alpha)
    assert sum(p is alpha for p in network.parameters()) == 1
    twin = copy.deepcopy(network)
    assert twin[1].alpha is twin[3].alpha
    assert twin[1].alpha is not alpha


def test_replacing_keeps_sharing_names_and_inputs() -> None:
    shared = nn.ReLU(inplace=True)
    network = nn.Sequential(shared, nn.Identity(), shared).eval()
    assert replace_activations(network, "abs", 0.5) == ["0", "2"]
    assert network[0] is network[2]
    assert not network[0].training
    assert shared.inplace
    with pytest.raises(ValueError, match="nothing to replace"):  # mixtures are not mixed again
        replace_activations(network)
    x = torch.tensor([-2.0, 4.0])
    assert network[0](x).tolist() == [1.0, 4.0]
    assert x.tolist() == [-2.0, 4.0]


def test_one_mixture_a_layer() -> None:
    network = nn.Sequential(nn.ReLU(), nn.ReLU())
    replace_activations(network, "abs", {"0": 0.0, "1": 1.0})
    x = torch.tensor([-2.0])
    assert (network[0](x).item(), network[1](x).item()) == (2.0, 0.0)
    other = nn.Sequential(nn.ReLU(), nn.ReLU())
    with pytest.raises(ValueError, match=r"missing: \['1'\], unknown: \['2'\]"):
        replace_activations(other, "abs", {"0": 0.0, "2": 1.0})
    assert all(isinstance(child, nn.ReLU) for child in other)


def test_nothing_to_replace_is_an_error() -> None:
    for network in (nn.Linear(1, 1), nn.ReLU()):
        with pytest.raises(ValueError, match=r"no submodule is one of ReLU, GELU"):
            replace_activations(network)


@pytest.mark.parametrize("alpha", [-0.1, 1.5, math.nan, torch.tensor([0.5, 2.0]), torch.tensor(math.nan)])
def test_alpha_out_of_range(alpha) -> None:
    with pytest.raises(ValueError, match=r"unknown activation 'relux'.*alpha must lie from 0 to 1"):
        InterpolatedActivation("relux", "abs", alpha)


def test_a_tensor_inside_a_graph_is_refused() -> None:
    raw = torch.tensor(0.0, requires_grad=True)
    with pytest.raises(ValueError, match="give a function"):
        InterpolatedActivation(alpha=raw.sigmoid())


def test_no_gain_of_nothing() -> None:
    with pytest.raises(ValueError, match="no gain"):
        InterpolatedActivation(torch.zeros_like, torch.zeros_like).gain()


def test_what_is_printed() -> None:
    assert repr(InterpolatedActivation("relu", nn.Tanh(), 0.25)).startswith(
        "InterpolatedActivation(\n  relu, Tanh, alpha=0.25"
    )
