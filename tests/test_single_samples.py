"""Rules of layers and vmap together against autograd, one sample at a time."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_hpo import single_samples
from lightning_hpo.single_samples import SingleSamples

N = 6
EXACT = {"rtol": 1e-10, "atol": 1e-12}


class Gate(nn.Module):
    """A layer that no rule covers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.strength = nn.Parameter(torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.strength * x)


class Classifier(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(*layers)

    def training_step(self, batch: Any) -> Tensor:
        return F.cross_entropy(self.body(batch[0]), batch[1])


class Tied(Classifier):
    """Uses the weight of a layer without calling it."""

    def training_step(self, batch: Any) -> Tensor:
        return F.cross_entropy(F.linear(self.body(batch[0]), self.body[0].weight), batch[1])


class Uncalled(Classifier):
    def training_step(self, batch: Any) -> Tensor:
        return F.cross_entropy(F.linear(batch[0], self.body[0].weight), batch[1])


class Flat(Classifier):
    """Tells layers nothing of samples."""

    def training_step(self, batch: Any) -> Tensor:
        x = batch[0].view(len(batch[0]), 2, -1)
        return F.cross_entropy(self.body(x.flatten(0, 1)).view(*x.shape[:2], -1).sum(1), batch[1])


def mixed(*more: nn.Module) -> Classifier:
    return Classifier(nn.Linear(8, 8), Gate(8), nn.Linear(8, 8), *more, nn.Linear(8, 8))


NETWORKS = {
    "a layer without a rule": (mixed, {"body.1.strength"}),
    "rules for all": (lambda: Classifier(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)), set()),
    "no rules at all": (lambda: Classifier(Gate(8)), {"body.0.strength"}),
    "a weight used elsewhere, too": (lambda: Tied(nn.Linear(8, 8), nn.Tanh()), {"body.0.weight", "body.0.bias"}),
    "layers that are not called": (lambda: Uncalled(nn.Linear(8, 8, bias=False)), {"body.0.weight"}),
    "positions as samples": (lambda: Flat(nn.Linear(4, 8)), {"body.0.weight", "body.0.bias"}),
}


def setting(name: str):
    torch.manual_seed(0)
    net = NETWORKS[name][0]().double()
    return net, (torch.randn(N, 8, dtype=torch.float64), torch.randint(0, 8, (N,)))


def twin(net: Classifier, batch: Any, samples: int = N) -> dict[str, Tensor]:
    rows = []
    for i in range(samples):
        loss = net.training_step((batch[0][i : i + 1], batch[1][i : i + 1]))
        rows.append(torch.autograd.grad(loss, list(net.parameters())))
    return {
        name: torch.stack(row) for (name, _), row in zip(net.named_parameters(), zip(*rows, strict=True), strict=True)
    }


def watched(net: nn.Module, **options: Any) -> SingleSamples:
    samples = SingleSamples(net, dict(net.named_parameters()), **options)
    samples.enabled = True
    return samples


def spied(monkeypatch: pytest.MonkeyPatch) -> list[set[str]]:
    """What vmap is asked to differentiate with respect to."""
    asked: list[set[str]] = []
    real = single_samples.per_sample_statistics

    def spy(loss, params, *args, **kwargs):
        asked.append(set(params))
        return real(loss, params, *args, **kwargs)

    monkeypatch.setattr(single_samples, "per_sample_statistics", spy)
    return asked


@pytest.mark.parametrize("max_samples", [None, 3, 50])
@pytest.mark.parametrize("name", NETWORKS)
def test_statistics_are_those_of_single_samples(name, max_samples, monkeypatch):
    (net, batch), by_vmap = setting(name), NETWORKS[name][1]
    asked = spied(monkeypatch)
    rows = twin(net, batch, min(N, max_samples or N))
    samples = watched(net, max_samples=max_samples, keep=True)
    net.training_step(batch).backward()
    gradients = {n: p.grad for n, p in net.named_parameters()}
    for _ in range(2):  # rules are compared with derivatives the first time
        asked.clear()
        found = samples.take(batch, N, gradients, moments=True)
        squares = sum(row.flatten(1).square().sum(1) for row in rows.values())
        torch.testing.assert_close(found.squared_norms, squares, **EXACT)
        inner = sum(row.flatten(1) @ gradients[n].flatten() for n, row in rows.items())
        torch.testing.assert_close(found.inner_products, inner, **EXACT)
        assert found.second_moments.keys() == rows.keys()
        for n, row in rows.items():
            torch.testing.assert_close(found.second_moments[n], row.square().sum(0), **EXACT)
    assert asked == ([by_vmap] if by_vmap else [])


@pytest.mark.parametrize("name", NETWORKS)
def test_norms_alone_pass_after_pass(name):
    net, batch = setting(name)
    samples = watched(net)
    for factor in (1.0, 2.0):
        scaled = (factor * batch[0], batch[1])
        samples.enabled = True
        net.training_step(scaled).backward()
        samples.enabled = False
        net.training_step(batch).backward()  # is not looked at
        found = samples.take(scaled, N)
        squares = sum(row.flatten(1).square().sum(1) for row in twin(net, scaled).values())
        torch.testing.assert_close(found.squared_norms, squares, **EXACT)
        assert not found.inner_products.any()
        assert not found.second_moments
    samples.remove()
    assert not any(layer._forward_hooks for layer in net.modules())


def test_it_is_said_why_rules_are_given_up():
    reasons = {
        "a weight used elsewhere, too": "do not agree",
        "layers that are not called": "no gradient has arrived",
        "positions as samples": "do not agree",
        "a layer without a rule": "",
    }
    for name, reason in reasons.items():
        net, batch = setting(name)
        samples = watched(net)
        net.training_step(batch).backward()
        samples.take(batch, N)
        assert reason in samples.given_up
        assert bool(samples.given_up) == bool(reason)
        assert samples.enabled != bool(reason)


def test_dropout_is_no_disagreement_and_random_numbers_are_left_alone(monkeypatch):
    net, batch = setting("rules for all")
    net.body.append(nn.Dropout(0.5))
    asked = spied(monkeypatch)
    samples = watched(net)
    net.training_step(batch).backward()
    samples.take(batch, N)
    assert not samples.given_up
    assert not asked
    samples.remove()
    samples = watched(net.eval())
    net.training_step(batch).backward()
    before = torch.get_rng_state()
    samples.take(batch, N)
    assert torch.equal(torch.get_rng_state(), before)
    assert asked == [set(dict(net.named_parameters()))]


def test_gradients_that_are_not_finite_are_no_disagreement():
    net, (x, y) = setting("rules for all")
    samples = watched(net)
    broken = (x * torch.inf, y)
    net.training_step(broken).backward()
    assert not torch.isfinite(samples.take(broken, N).squared_norms).any()
    assert not samples.given_up


def test_compiled_modules_are_left_to_vmap():
    net, _ = setting("rules for all")
    net.body[0].compile(backend="eager")
    samples = SingleSamples(net, dict(net.named_parameters()))
    samples.enabled = True
    assert not samples.enabled
    samples.remove()


def test_a_parameter_without_a_gradient_counts_as_zero():
    net, batch = setting("a layer without a rule")
    rows = twin(net, batch)
    samples = watched(net, keep=True)
    net.training_step(batch).backward()
    gradients = {n: p.grad for n, p in net.named_parameters() if n != "body.1.strength"}
    inner = sum(rows[n].flatten(1) @ g.flatten() for n, g in gradients.items())
    torch.testing.assert_close(samples.take(batch, N, gradients).inner_products, inner, **EXACT)
