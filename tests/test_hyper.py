"""Domains against finite differences, exact round trips, and refusals that name every problem."""

from typing import Any

import pytest
import torch

from lightning_hpo.hyper import Choice, Domain, HyperparameterSet, Integer, Interval, Positive, Simplex, UnitInterval


def double(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


SMOOTH = {
    "positive": Positive(double(1e-3, 0.7, 30.0)),
    "interval": Interval(double(-1.9, 0.0, 2.9), low=-2.0, high=3.0),
    "unit": UnitInterval(double(0.01, 0.5, 0.99)),
    "simplex": Simplex(torch.stack([double(0.1, 0.2, 0.7), double(0.6, 0.3, 0.1)])),
    "choice": Choice(["relu", "gelu", None], init=double(0.2, 0.5, 0.3)),
}


@pytest.mark.parametrize("name", SMOOTH)
def test_set_grad_matches_finite_differences(name: str) -> None:
    domain = SMOOTH[name]
    hypers = HyperparameterSet(knob=domain)
    torch.manual_seed(1)
    gradient = torch.randn_like(domain.init)
    hypers.set_grad(knob=gradient)
    raw, step = hypers.raw["knob"].detach(), 1e-6
    numeric = torch.zeros_like(raw)
    for i in range(raw.numel()):
        nudge = torch.zeros(raw.numel(), dtype=raw.dtype)
        nudge[i] = step
        ahead, behind = (domain.value(raw + sign * nudge.view_as(raw)) for sign in (1, -1))
        numeric.view(-1)[i] = (gradient * (ahead - behind)).sum() / (2 * step)
    torch.testing.assert_close(hypers.raw["knob"].grad, numeric, rtol=1e-6, atol=1e-8)


def test_integer_passes_the_gradient_of_the_relaxed_value() -> None:
    domain = Integer(double(1, 4, 9), low=1, high=9)
    hypers = HyperparameterSet(depth=domain)
    hypers.set_grad(depth=double(1.0, -2.0, 3.0))
    raw = hypers.raw["depth"].detach()
    slope = (domain.relaxed(raw + 1e-6) - domain.relaxed(raw - 1e-6)) / 2e-6
    torch.testing.assert_close(hypers.raw["depth"].grad, slope * double(1.0, -2.0, 3.0), rtol=1e-6, atol=1e-8)
    assert (slope > 0.1).all()  # the bounds are not dead ends


def test_integer_is_whole_and_reaches_both_bounds() -> None:
    domain = Integer(2, low=-1, high=3)
    values = domain.value(torch.linspace(-200, 200, 4001))
    assert set(values.tolist()) == {-1.0, 0.0, 1.0, 2.0, 3.0}
    assert (values.diff() >= 0).all()


@pytest.mark.parametrize(
    "domain",
    [
        *(Positive(v) for v in (1e-8, 1e-4, 0.3, 1.0, 19.0, 21.0, 500.0)),
        *(Interval(v, -3.0, 5.0) for v in (-2.999, 0.0, 1.0, 4.999)),
        *(UnitInterval(v) for v in (1e-6, 0.1, 0.999)),
        *(Integer(v, 1, 12) for v in (1, 7, 12)),
        Simplex([0.001, 0.009, 0.99]),
        Simplex(torch.full((2, 3, 4), 0.25)),
        Choice(["a", "b"], init=[0.9, 0.1]),
        Positive(torch.tensor([[0.1, 2.0]])),
    ],
    ids=lambda domain: f"{type(domain).__name__}-{domain.init.flatten()[0]:g}",
)
def test_first_value_is_the_init(domain: Domain) -> None:
    torch.testing.assert_close(HyperparameterSet(knob=domain)["knob"].detach(), domain.init, rtol=1e-6, atol=1e-6)


def test_small_positive_values_keep_their_relative_precision() -> None:
    value = HyperparameterSet(decay=Positive(1e-8))["decay"].item()
    assert value == pytest.approx(1e-8, rel=1e-5)


def test_extreme_raw_values_stay_in_the_domain() -> None:
    far = torch.tensor([-80.0, 80.0])
    assert (Positive(1.0).value(far) > 0).all()
    for domain, low, high in ((UnitInterval(0.5), 0, 1), (Interval(0.0, -3, 3), -3, 3)):
        assert ((domain.value(far) >= low) & (domain.value(far) <= high)).all()
    torch.testing.assert_close(Simplex([0.5, 0.5]).value(far).sum(), torch.tensor(1.0))


def test_uniform_simplex_has_raw_zeros() -> None:
    hypers = HyperparameterSet(mix=Simplex([0.25] * 4), op=Choice(range(4)))
    assert torch.equal(hypers.raw["mix"], torch.zeros(4))
    assert torch.equal(hypers.raw["op"], torch.zeros(4))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Positive(0.0), ["Positive", "above 0"]),
        (lambda: Positive(float("nan")), ["above 0", "finite"]),
        (lambda: Positive(float("inf")), ["finite"]),
        (lambda: Interval(4.0, low=3.0, high=1.0), ["low < high, got 3 and 1", "strictly between", "got 4"]),
        (lambda: Interval(0.0, low=0.0, high=float("inf")), ["finite", "strictly between"]),
        (lambda: UnitInterval(1.0), ["UnitInterval", "strictly between 0 and 1"]),
        (lambda: Simplex(1.0), ["last dimension"]),
        (lambda: Simplex([0.5, -0.5, 0.5]), ["above 0", "sum to 1"]),
        (lambda: Integer(2.5, low=3, high=9), ["whole, got 2.5", "from 3 to 9"]),
        (lambda: Integer(1, low=0.5, high=0), ["low < high", "low must be whole"]),  # type: ignore[arg-type]
        (lambda: Choice(["a"]), ["at least two"]),
        (lambda: Choice([]), ["at least two"]),
        (lambda: Choice(["a", "a"], init=[0.1, 0.1, 0.8]), ["options must differ", "init must have 2 entries"]),
    ],
)
def test_refusals_list_every_problem(make: Any, words: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        make()
    assert [word for word in words if word not in str(caught.value)] == []


def test_set_grad_accumulates_and_refuses_everything_at_once() -> None:
    hypers = HyperparameterSet(a=Positive(1.0), b=UnitInterval(torch.tensor([0.5, 0.5])))
    hypers.set_grad(a=2.0)
    once = hypers.raw["a"].grad.clone()
    hypers.set_grad(a=torch.tensor(2.0), b=torch.ones(2))
    torch.testing.assert_close(hypers.raw["a"].grad, 2 * once)
    with pytest.raises(ValueError, match=r"no hyperparameter `c`.*`b` has shape \(2,\), its gradient \(3,\)"):
        hypers.set_grad(a=1.0, b=torch.ones(3), c=1.0)
    torch.testing.assert_close(hypers.raw["a"].grad, 2 * once)  # nothing was written


def test_set_grad_works_where_lightning_switches_gradients_off() -> None:
    hypers = HyperparameterSet(a=Positive(1.0))
    with torch.no_grad():
        hypers.set_grad(a=1.0)
    with torch.inference_mode():
        hypers.set_grad(a=torch.tensor(1.0))
    assert hypers.raw["a"].grad.item() == pytest.approx(2 * (1 - torch.tensor(-1.0).exp().item()), rel=1e-5)


def test_gradient_descent_finds_the_optimum() -> None:
    hypers = HyperparameterSet(a=Positive(1.0), n=Integer(2, 1, 10))
    optimizer = torch.optim.Adam(hypers.parameters(), lr=0.1)
    for _ in range(300):
        optimizer.zero_grad()
        hypers.set_grad(a=2 * (hypers["a"].detach() - 0.2), n=2 * (hypers["n"].detach() - 7))
        optimizer.step()
    assert hypers["a"].item() == pytest.approx(0.2, abs=1e-3)
    assert hypers["n"].item() == 7


def test_state_holds_raw_values_and_nothing_of_the_domain() -> None:
    source, target = (HyperparameterSet(a=Interval(v, 0, 1), mix=Simplex([0.5, 0.5])) for v in (0.2, 0.8))
    assert set(source.state_dict()) == {"raw.a", "raw.mix"}
    target.load_state_dict(source.state_dict())
    assert target["a"].item() == pytest.approx(0.2)


def test_values_and_numbers_are_detached() -> None:
    hypers = HyperparameterSet(a=Positive(0.5), op=Choice(["x", "y"]))
    assert not any(value.requires_grad for value in hypers.values().values())
    assert hypers.numbers() == {"a": pytest.approx(0.5), "op": pytest.approx([0.5, 0.5])}
    assert list(hypers) == ["a", "op"]
    assert len(hypers) == 2
    assert hypers.option("op") == "x"
    with pytest.raises(ValueError, match="`a` is a Positive, not a Choice"):
        hypers.option("a")


def test_an_empty_set_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one domain"):
        HyperparameterSet()
