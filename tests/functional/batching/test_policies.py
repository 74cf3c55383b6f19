"""What each policy asks for in closed form, what it refuses, and how the command line names it."""

import math
from dataclasses import FrozenInstanceError, fields, replace

import pytest
import torch
from jsonargparse import ArgumentParser

from lightning_hpo.functional.batching.adadagrad import GradientStatistics
from lightning_hpo.functional.batching.policies import (
    CABS,
    AugmentedTest,
    CoordinateTest,
    DiveBatch,
    InnerProductTest,
    LinearRamp,
    NoiseScale,
    NormTest,
    Policy,
    SimiGrad,
    StageWise,
)

STATISTICS = GradientStatistics(
    batch_size=24,
    trace=60.0,
    square=1.5,  # the batch gradient's is 4
    inner=8.0,
    orthogonal=58.0,
    coordinate=90.0,
    loss=0.5,
    lr=0.1,
    samples=1000,
)
POLICIES = [
    NormTest(),
    InnerProductTest(),
    AugmentedTest(),
    CoordinateTest(),
    NoiseScale(),
    CABS(),
    DiveBatch(),
    SimiGrad(),
    StageWise(samples=10_000),
    LinearRamp(),
]
every_policy = pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: type(policy).__name__)


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (NormTest(), 60 / 1.5),
        (NormTest(eta=2.0), 60 / (4 * 1.5)),
        (NormTest(eta=0.5, debias=False), 60 / (0.25 * 4)),
        (InnerProductTest(theta=0.5), 8 / (0.25 * 16)),
        (InnerProductTest(), 8 / (0.81 * 16)),
        (AugmentedTest(theta=0.5, nu=0.5), 58 / (0.25 * 4)),
        (AugmentedTest(theta=0.01, nu=5.84), 8 / (1e-4 * 16)),
        (CoordinateTest(eta=3.0), 10),
        (NoiseScale(scale=0.5), 20),
        (CABS(), 0.1 * 60 / 0.5),
        (DiveBatch(delta=0.2), 0.2 * (60 + 1.5) / 1.5),
        (SimiGrad(target=0.5), 26.4),  # the cosine is 1.5 / (1.5 + 5)
        (SimiGrad(target=0.1, step=0.25), 18),
        (StageWise((3, 5, 7), samples=3000), 5),
        (LinearRamp(increment=10, every=5, start=20), 70),  # 5 * (20 + 30 + 40 + 50 + 60) = 1000
    ],
)
def test_batches_in_closed_form(policy: Policy, expected: float) -> None:
    assert policy(STATISTICS) == pytest.approx(expected, rel=1e-12)


def test_the_plain_norm_test_settles_at_its_fixed_point() -> None:
    trace, square, eta, batch = 60.0, 1.5, 0.5, 8.0
    policy = NormTest(eta=eta, debias=False)
    for _ in range(200):
        batch = policy(GradientStatistics(batch_size=batch, trace=trace, square=square))
    assert batch == pytest.approx(trace * (1 - eta**2) / (eta**2 * square))
    assert NormTest(eta=eta)(STATISTICS) == pytest.approx(trace / (eta**2 * square))  # debiased: at once, and more


def test_diversity_is_that_of_the_samples() -> None:
    gradients = torch.randn(40, 5, dtype=torch.float64) + 0.5
    mean = gradients.mean(0)
    trace = float(gradients.var(0, correction=0).sum())  # the epoch is the population
    statistics = GradientStatistics(batch_size=8, trace=trace, square=float(mean @ mean))
    diversity = gradients.square().sum() / gradients.sum(0).square().sum()
    assert DiveBatch(delta=0.3)(statistics) == pytest.approx(float(0.3 * 40 * diversity))


def test_similarity_settles_where_the_cosine_is_the_target() -> None:
    policy, batch = SimiGrad(target=0.6, step=0.01), 500.0
    for _ in range(500):
        batch = policy(replace(STATISTICS, batch_size=batch))
    assert 1.5 / (1.5 + 2 * 60 / batch) == pytest.approx(0.6, abs=0.01)
    assert policy(replace(STATISTICS, batch_size=119.0)) > 119 > policy(replace(STATISTICS, batch_size=121.0)) - 2
    assert policy(replace(STATISTICS, batch_size=121.0)) < 121


def test_expected_cosines_are_those_of_halves() -> None:
    generator = torch.Generator().manual_seed(0)
    mean = torch.full((2000,), 0.03)
    halves = mean + torch.randn(2, 50, 2000, generator=generator)
    cosine = torch.cosine_similarity(halves[0].mean(0), halves[1].mean(0), dim=0).item()
    statistics = GradientStatistics(batch_size=100, trace=2000.0, square=float(mean @ mean))
    assert SimiGrad(target=cosine * 0.8)(statistics) < 100 < SimiGrad(target=cosine * 1.2)(statistics)


@pytest.mark.parametrize("samples", [0, 1, 19, 20, 99, 100, 149, 150, 10**7])
def test_ramps_follow_their_simulation(samples: int) -> None:
    policy, seen, size, step = LinearRamp(increment=10, every=5, start=20), 0, 20, 0
    while seen + size <= samples:
        seen, step = seen + size, step + 1
        size = 20 + 10 * (step // 5)
    assert policy(replace(STATISTICS, samples=float(seen))) == size


def test_stages_have_equal_budgets() -> None:
    policy = StageWise((8, 16, 32, 64), samples=400)
    sizes = [policy(replace(STATISTICS, samples=n)) for n in range(400)]
    assert [sizes.count(size) for size in policy.sizes] == [100] * 4
    assert sizes == sorted(sizes)
    assert policy(replace(STATISTICS, samples=10**9)) == 64


# What all have in common


@every_policy
def test_a_policy_says_what_it_needs(policy: Policy) -> None:
    assert isinstance(policy, Policy)
    assert policy.needs <= {"trace", "inner", "coordinate", "loss"}
    assert policy.when == ("epoch" if isinstance(policy, DiveBatch) else "step")
    assert policy.shrinks == isinstance(policy, (NoiseScale, CABS, DiveBatch, SimiGrad, StageWise))
    bare = GradientStatistics(24, 60.0, 1.5, samples=1000, lr=0.1)
    given = {"inner": {"inner", "orthogonal"}, "trace": set()}
    names = set().union(*(given.get(need, {need}) for need in policy.needs))
    policy(replace(bare, **{name: getattr(STATISTICS, name) for name in names}))
    for name in names - ({"orthogonal"} if isinstance(policy, InnerProductTest) else set()):
        with pytest.raises(ValueError, match=f"no `{name}`"):
            policy(replace(STATISTICS, **{name: None}))


@every_policy
def test_policies_are_values(policy: Policy) -> None:
    assert policy == replace(policy)
    assert hash(policy) == hash(replace(policy))
    if fields(policy):
        with pytest.raises(FrozenInstanceError):
            setattr(policy, fields(policy)[0].name, 1)


@every_policy
def test_drowned_gradients_ask_for_more_and_a_missing_number_is_not_hidden(policy: Policy) -> None:
    drowned = policy(replace(STATISTICS, square=-1.0))
    if "trace" in policy.needs and not isinstance(policy, (CABS, InnerProductTest, AugmentedTest)):
        assert drowned == (math.inf if not isinstance(policy, SimiGrad) else pytest.approx(24 * 1.1))
    if policy.needs:
        missing = replace(STATISTICS, trace=math.nan, inner=math.nan, coordinate=math.nan)
        assert math.isnan(policy(missing))


def test_either_half_of_the_augmented_test_may_be_missing() -> None:
    for name in ("inner", "orthogonal"):
        assert math.isnan(AugmentedTest()(replace(STATISTICS, **{name: math.nan})))


def test_without_noise_nothing_grows() -> None:
    quiet = replace(STATISTICS, trace=0.0, inner=0.0, orthogonal=0.0, coordinate=0.0, square=0.0)
    for policy in POLICIES:
        if policy.needs:
            assert policy(quiet) < quiet.batch_size


# What is refused


@pytest.mark.parametrize(
    ("make", "problems"),
    [
        (lambda: NormTest(eta=0.0), ["eta must be positive"]),
        (lambda: NormTest(eta=1.0, debias=False), ["fixed point", r"b\* = S\(1-eta\^2\)/\(eta\^2 G\)"]),
        (lambda: NormTest(eta=math.nan), ["eta must be positive"]),
        (lambda: InnerProductTest(theta=-1.0), ["theta must be positive"]),
        (lambda: AugmentedTest(theta=0.0, nu=math.inf), ["theta must be positive", "nu must be positive"]),
        (lambda: CoordinateTest(eta=0.0, quantile=1.5), ["eta must be positive", "quantile must lie between 0 and 1"]),
        (lambda: NoiseScale(scale=0.0), ["scale must be positive"]),
        (lambda: DiveBatch(delta=-0.1), ["delta must be positive"]),
        (lambda: SimiGrad(target=1.0, step=0.0), ["target must lie", "step must lie"]),
        (lambda: StageWise((), samples=0), ["sizes must be positive integers", "samples must be a positive integer"]),
        (lambda: StageWise((8, 0), samples=10), ["sizes must be positive integers"]),
        (
            lambda: LinearRamp(increment=0, every=-1, start=2.5),
            ["increment must be a positive", "every must be a positive", "start must be a positive integer, got 2.5"],
        ),
    ],
)
def test_wrong_arguments_are_listed(make, problems: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        make()
    for problem in problems:
        assert pytest.raises(ValueError, match=problem).matches(error.value)


def test_right_arguments_at_the_edge() -> None:
    assert NormTest(eta=5.0).debias
    assert NormTest(eta=0.999, debias=False).eta == 0.999
    assert CoordinateTest(quantile=1.0).quantile == 1
    assert CoordinateTest(quantile=0.0).quantile == 0


# The command line


class Owner:
    def __init__(self, policy: Policy) -> None:
        self.policy = policy


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--policy=NormTest"], NormTest()),
        (["--policy=NormTest", "--policy.eta=0.5", "--policy.debias=false"], NormTest(0.5, False)),
        (
            ['--policy={"class_path": "StageWise", "init_args": {"sizes": [1], "samples": 9}}'],
            StageWise((1,), samples=9),
        ),
        (["--policy=StageWise", "--policy.samples=9"], StageWise(samples=9)),
        (["--policy=CABS"], CABS()),
        (["--policy=lightning_hpo.functional.batching.policies.DiveBatch", "--policy.delta=0.2"], DiveBatch(0.2)),
        (["--policy=LinearRamp", "--policy.increment=8"], LinearRamp(8)),
    ],
)
def test_the_command_line_builds_policies(arguments: list[str], expected: Policy) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Owner, "owner")
    parsed = parser.parse_args([argument.replace("--policy", "--owner.policy", 1) for argument in arguments])
    build = parser.instantiate if hasattr(parser, "instantiate") else parser.instantiate_classes
    assert build(parsed).owner.policy == expected
