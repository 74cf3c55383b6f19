"""Limits of the rules, the card's numbers, and the equations behind them."""

import math
import random

import pytest
from jsonargparse import ArgumentParser

from lightning_hpo.functional.batching.learning_rate import (
    AdamSDE,
    AdaScale,
    LearningRateRule,
    LinearScaling,
    NoiseScaleLR,
    NoScaling,
    SqrtScaling,
    gain,
)

RULES = [NoScaling(), SqrtScaling(), LinearScaling(), AdaScale(), NoiseScaleLR(), AdamSDE()]
every_rule = pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)


@every_rule
def test_the_first_batch_keeps_its_learning_rate(rule: LearningRateRule) -> None:
    assert isinstance(rule, LearningRateRule)
    for trace, square in ((5.0, 1.0), (0.0, 1.0), (5.0, 0.0), (0.0, 0.0)):
        assert rule.factor(8, 8, trace, square) == pytest.approx(1.0)


@every_rule
def test_factors_stay_below_the_cap_and_grow_with_the_batch(rule: LearningRateRule) -> None:
    factors = [rule.factor(b, 8, trace=400.0, square=0.5) for b in (1, 2, 4, 8, 16, 64, 10**4, 10**9)]
    assert factors == sorted(factors)
    assert all(0 < factor <= 10 for factor in factors)
    if not isinstance(rule, NoScaling):
        assert factors[0] < 0.9  # a batch that shrank
        assert factors[-1] > 5


@pytest.mark.parametrize("rule", [AdaScale(), NoiseScaleLR()])
def test_the_gain_is_linear_in_noise_and_nothing_without(rule: LearningRateRule) -> None:
    assert rule.needs == {"trace"}
    assert rule.factor(32, 8, trace=1e12, square=1.0) == pytest.approx(4.0)
    assert rule.factor(32, 8, trace=1.0, square=1e12) == pytest.approx(1.0)
    assert rule.factor(32, 8, trace=5.0, square=-0.3) == 4.0  # an estimate of G below 0 counts as 0
    assert rule.factor(800, 8, trace=1e12, square=1.0) == 10.0
    assert rule.factor(2, 8, trace=1e12, square=1.0) == pytest.approx(0.25)


def test_the_gain_is_that_of_adascale() -> None:
    draw = random.Random(0)
    for _ in range(200):
        base, batch = draw.randint(1, 64), draw.randint(1, 500)
        trace, square = draw.uniform(0, 30), draw.uniform(0, 3)
        kappa = batch / base
        found = AdaScale(cap=1e9).factor(batch, base, trace, square)
        assert found == pytest.approx((trace / base + square) / (trace / batch + square))
        assert min(kappa, 1) - 1e-9 <= found <= max(kappa, 1) + 1e-9
        assert AdaScale(cap=1e9, power=0.5).factor(batch, base, trace, square) == pytest.approx(math.sqrt(found))
        assert NoiseScaleLR(cap=1e9).factor(batch, base, trace, square) == pytest.approx(found)
    assert gain(4.0, 3.0, 1.0) == pytest.approx(4 / 1.75)


def test_the_optimal_learning_rate_follows_the_noise_scale() -> None:
    def optimal(batch: float, noise: float) -> float:
        return 0.7 / (1 + noise / batch)

    rule = NoiseScaleLR(reference=50.0)
    for batch, trace, square in ((8, 100.0, 2.0), (64, 300.0, 1.0), (512, 30.0, 0.1)):
        expected = optimal(batch, trace / square) / optimal(8, 50.0)
        assert rule.factor(batch, 8, trace, square) == pytest.approx(expected)
    assert rule.factor(8, 8, trace=1.0, square=0.0) == 0.1  # pure noise: small, but training goes on


def test_square_roots_and_ratios() -> None:
    assert SqrtScaling().factor(50, 2) == 5
    assert LinearScaling().factor(18, 2) == 9
    assert LinearScaling(cap=4.0).factor(18, 2) == 4
    assert NoScaling().factor(18, 2) == 1
    assert {type(rule).__name__ for rule in RULES if rule.needs} == {"AdaScale", "NoiseScaleLR"}


def test_adams_equation_has_the_cards_numbers() -> None:
    (first, second), eps = AdamSDE().moments(4.0, (0.9, 0.999), 1e-8)
    assert (first, second, eps) == pytest.approx((0.6, 0.996, 5e-9))
    assert 1e-3 * AdamSDE().factor(32, 8) == pytest.approx(2e-3)
    (first, second), eps = AdamSDE().moments(0.25, (0.9, 0.999), 1e-8)
    assert (first, second, eps) == pytest.approx((0.975, 0.99975, 2e-8))


@pytest.mark.parametrize("kappa", [10.5, 100.0, 0.0, -1.0, math.nan])
def test_adams_decays_stay_positive(kappa: float) -> None:
    with pytest.raises(ValueError, match=r"decay of \(0.9, 0.999\) not positive; it must be above 0 and below 10"):
        AdamSDE().moments(kappa, (0.9, 0.999), 1e-8)
    with pytest.raises(ValueError, match="below 4"):
        AdamSDE().moments(4.0, (0.75, 0.999), 1e-8)


@pytest.mark.parametrize(
    ("make", "problems"),
    [
        (lambda: SqrtScaling(cap=0.5), ["cap must be at least 1, got 0.5"]),
        (lambda: LinearScaling(cap=math.nan), ["cap must be at least 1"]),
        (lambda: AdamSDE(cap=0.0), ["cap must be at least 1"]),
        (lambda: AdaScale(cap=0.0, power=2.0), ["cap must be at least 1", "power must be above 0"]),
        (lambda: NoiseScaleLR(cap=0.0, reference=-1.0), ["cap must be at least 1", "reference must not be negative"]),
    ],
)
def test_wrong_arguments_are_listed(make, problems: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        make()
    assert all(problem in str(error.value) for problem in problems)


@every_rule
@pytest.mark.parametrize("sizes", [(0, 8), (8, 0), (math.nan, 8), (math.inf, 8)])
def test_sizes_must_be_sizes(rule: LearningRateRule, sizes: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="no learning rate for batch sizes"):
        rule.factor(*sizes, trace=1.0, square=1.0)


@pytest.mark.parametrize("rule", [AdaScale(), NoiseScaleLR()])
def test_missing_statistics_are_not_hidden(rule: LearningRateRule) -> None:
    for numbers in ({"trace": math.nan, "square": 1.0}, {"trace": 1.0, "square": math.inf}):
        with pytest.raises(ValueError, match="they must be finite"):
            rule.factor(16, 8, **numbers)


class Owner:
    def __init__(self, rule: LearningRateRule) -> None:
        self.rule = rule


def test_the_command_line_builds_rules() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Owner, "owner")
    parsed = parser.parse_args(["--owner.rule=AdaScale", "--owner.rule.power=0.5"])
    build = parser.instantiate if hasattr(parser, "instantiate") else parser.instantiate_classes
    assert build(parsed).owner.rule == AdaScale(power=0.5)
