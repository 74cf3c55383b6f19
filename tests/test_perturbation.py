"""Perturbed hyperparameters: domains, sharing, noise over ranks, and limits of a step."""

import pytest
import torch

from lightning_hpo.functional.bilevel.best_response import encode
from lightning_hpo.hyper import Choice, HyperparameterSet, Integer, Interval, Positive, UnitInterval
from lightning_hpo.perturbation import Noise, Perturbation


def sets():
    first = HyperparameterSet(drop=Interval(0.3, 0.0, 0.95), holes=Integer(2, 0, 4))
    return {"a": first, "b": HyperparameterSet(decay=Positive(torch.tensor([0.1, 0.2])))}


def test_values_are_those_of_the_domains_and_whole_where_they_must_be():
    perturbation = Perturbation(sets(), scale={"holes": 3.0}, encoding="identity")
    assert (len(perturbation), perturbation.inputs) == (4, 4)
    noise = torch.randn(200, 4, generator=torch.Generator().manual_seed(0))
    rows = perturbation.rows(noise)
    widths = torch.tensor([1.0, 3.0, 1.0, 1.0])
    torch.testing.assert_close(rows, perturbation.raw() + widths * noise)
    values = perturbation.values(rows)
    assert values["a"]["drop"].shape == (200,)
    assert values["b"]["decay"].shape == (200, 2)
    torch.testing.assert_close(values["a"]["drop"], 0.95 * torch.sigmoid(rows[:, 0]).detach())
    assert set(values["a"]["holes"].tolist()) == {0.0, 1.0, 2.0, 3.0, 4.0}
    assert not any(value.requires_grad for part in values.values() for value in part.values())
    scales = perturbation.scales()
    assert {name: round(value.item(), 4) for name, value in scales.items()} == {
        "a.drop": 1.0,
        "a.holes": 3.0,
        "b.decay": 1.0,
    }


def test_what_is_the_same_for_a_batch_has_one_value_and_one_input():
    perturbation = Perturbation(sets(), per_batch=["decay"], encoding="identity")
    rows = perturbation.rows(torch.randn(6, 4))
    assert torch.equal(rows[:, 2:], rows[:1, 2:].expand(6, 2))
    assert len(rows[:, 0].unique()) == 6
    values = perturbation.values(rows)
    assert values["b"]["decay"].shape == (2,)
    assert torch.equal(values["b"]["decay"], sets()["b"].domains["decay"].value(rows[0, 2:]))


@pytest.mark.parametrize("encoding", ["cos_sin", "identity"])
def test_gradients_reach_raw_values_and_scales_through_the_input_alone(encoding):
    parts = sets()
    perturbation = Perturbation(parts, encoding=encoding)
    rows = perturbation.rows(torch.ones(3, 4))
    difference = perturbation.difference(rows)
    here = perturbation.centre if encoding == "cos_sin" else 0.0
    expected = encode(rows - here, encoding) - encode(perturbation.raw() - here, encoding)
    torch.testing.assert_close(difference, expected, rtol=0, atol=1e-6)
    if encoding == "cos_sin":
        torch.testing.assert_close(perturbation.encoded(perturbation.raw()), torch.full((8,), 0.5**0.5))
    (difference * torch.randn_like(difference)).sum().backward()
    assert perturbation.scale.grad.abs().min() > 0
    assert all(raw.grad.abs().min() > 0 for raw in perturbation.raw_parameters())
    assert not perturbation.direction(rows).requires_grad
    assert torch.equal(perturbation.difference(perturbation.raw().detach()[None]), torch.zeros(1, perturbation.inputs))


def test_a_step_is_limited_and_stays_where_there_is_a_slope():
    parts = sets()
    perturbation = Perturbation(parts)
    before = perturbation.raw().detach().clone()
    with torch.no_grad():
        for raw in perturbation.raw_parameters():
            raw.sub_(2.0)
    perturbation.confine(before, most=0.5)
    torch.testing.assert_close(perturbation.raw(), before - 0.5)
    for _ in range(40):
        before = perturbation.raw().detach().clone()
        with torch.no_grad():
            for raw in perturbation.raw_parameters():
                raw.sub_(1.0)
        perturbation.confine(before, most=0.5)
    found = perturbation.raw().tolist()
    assert found[:2] == [pytest.approx(-6.9)] * 2
    assert max(found[2:]) < -15  # nothing flat about a small positive number


def test_noise_is_the_same_over_any_number_of_ranks(monkeypatch):
    whole = Noise(3, seed=1)
    whole.begin(7)
    expected = whole.rows(8)
    found = torch.empty(8, 3)
    for rank in range(2):
        monkeypatch.setattr("lightning_hpo.distributed.world_size", lambda: 2)
        monkeypatch.setattr("lightning_hpo.distributed.rank", lambda rank=rank: rank)
        own = Noise(3, seed=1)
        own.begin(7)
        found[rank::2] = torch.cat([own.rows(2), own.rows(2)])
    assert torch.equal(found, expected)
    whole.begin(8)
    assert not torch.equal(whole.rows(8), expected)


def test_noise_is_normal():
    noise = Noise(2)
    noise.begin(0)
    rows = noise.rows(50_000)
    torch.testing.assert_close(rows.mean(0), torch.zeros(2), atol=0.02, rtol=0)
    torch.testing.assert_close(rows.T.cov(), torch.eye(2), atol=0.02, rtol=0)
    assert (rows.abs() > 3).double().mean().item() == pytest.approx(0.0027, rel=0.25)


@pytest.mark.parametrize(
    ("parts", "arguments", "words"),
    [
        ({"": HyperparameterSet(act=Choice(["a", "b"]))}, {}, "`act` is a Choice, whose numbers depend"),
        (sets(), {"scale": 0.0}, "the scale of `drop` must be positive, got 0.0; the scale of `holes`"),
        (sets(), {"scale": {"no": 1.0}, "per_batch": ["never"]}, r"no hyperparameter `never`.*; there is no .*`no`"),
        ({}, {}, "no hyperparameter to perturb"),
        (sets(), {"encoding": "sin"}, "encoding must be 'cos_sin' or 'identity', got 'sin'"),
    ],
)
def test_refusals(parts, arguments, words):
    with pytest.raises(ValueError, match=words):
        Perturbation(parts, **arguments)


def test_scales_of_others_are_refused():
    other = Perturbation({"": HyperparameterSet(**{n: UnitInterval(0.5) for n in "abcd"})})
    with pytest.raises(ValueError, match=r"has scales of \['a', 'b', 'c', 'd'\], the module has \['drop'"):
        Perturbation(sets()).load_state_dict(other.state_dict())


def test_noise_follows_the_seed_and_the_step():
    drawn = []
    for seed in range(3):
        noise = Noise(4, seed)
        for step in range(3):
            noise.begin(step)
            drawn.append(tuple(noise.rows(2).flatten().tolist()))
    assert len(set(drawn)) == 9
