"""Plans and decisions keep their promises for random arguments, and reach what they can."""

import math
import random

import pytest

from lightning_hpo.functional.batching.plan import BatchPlan, next_batch_size, plan_for


def random_arguments(seed: int) -> dict[str, int | None]:
    draw = random.Random(seed)
    arguments = {
        "batch_size": draw.choice([1, draw.randint(1, 20), draw.randint(1, 5000)]),
        "ranks": draw.choice([1, 1, 2, 3, 8]),
        "max_micro": draw.choice([1, draw.randint(1, 10), draw.randint(1, 500)]),
        "accumulation_multiple_of": draw.choice([1, 1, 2, 3, 4]),
        "min_groups": draw.choice([1, 2, 4, 5, 16]),
        "max_batch": None,
    }
    if draw.random() < 0.6:  # room for a sample in each group at least
        fewest = next(k for k in powers(arguments) if arguments["ranks"] * k >= arguments["min_groups"])
        arguments["max_batch"] = arguments["ranks"] * fewest + draw.choice([0, 1, draw.randint(0, 4000)])
    return arguments


def powers(arguments: dict) -> list[int]:
    return [arguments["accumulation_multiple_of"] * 2**i for i in range(16)]


@pytest.mark.parametrize("start", range(0, 3000, 500))
def test_plans_keep_their_promises(start: int) -> None:
    for seed in range(start, start + 500):
        arguments = random_arguments(seed)
        batch, ranks, max_micro = arguments["batch_size"], arguments["ranks"], arguments["max_micro"]
        plan = plan_for(**arguments)
        step = ranks * plan.accumulation
        samples = plan.samples(ranks)
        assert samples == step * plan.micro
        assert 1 <= plan.micro <= max_micro
        assert plan.accumulation in powers(arguments)
        assert step >= arguments["min_groups"]
        if arguments["max_batch"] is None:
            assert batch <= samples < batch + step  # enough, and no whole sample a micro-batch too many
        else:
            top = arguments["max_batch"]
            assert samples <= top
            assert samples > min(batch, top) - step or plan.micro == max_micro  # what is missing would not fit
            assert samples < min(batch, top) + step
        for fewer in (k for k in powers(arguments) if k < plan.accumulation):  # none with fewer micro-batches would do
            few_groups = ranks * fewer < arguments["min_groups"]
            too_large = math.ceil(min(batch, arguments["max_batch"] or batch) / (ranks * fewer)) > max_micro
            assert few_groups or too_large


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"batch_size": 8, "ranks": 1, "max_micro": 8}, BatchPlan(8, 1)),
        ({"batch_size": 9, "ranks": 1, "max_micro": 8}, BatchPlan(5, 2)),
        ({"batch_size": 33, "ranks": 2, "max_micro": 8}, BatchPlan(5, 4)),
        ({"batch_size": 8, "ranks": 1, "max_micro": 64, "min_groups": 4}, BatchPlan(2, 4)),
        ({"batch_size": 8, "ranks": 4, "max_micro": 64, "min_groups": 4}, BatchPlan(2, 1)),
        ({"batch_size": 2, "ranks": 1, "max_micro": 64, "min_groups": 4}, BatchPlan(1, 4)),
        ({"batch_size": 100, "ranks": 1, "max_micro": 10, "accumulation_multiple_of": 3}, BatchPlan(9, 12)),
        ({"batch_size": 1437, "ranks": 1, "max_micro": 256, "max_batch": 1437}, BatchPlan(179, 8)),
        ({"batch_size": 5000, "ranks": 1, "max_micro": 256, "max_batch": 1437}, BatchPlan(179, 8)),
        ({"batch_size": 5, "ranks": 1, "max_micro": 1, "max_batch": 5}, BatchPlan(1, 4)),
    ],
)
def test_known_plans(arguments: dict, expected: BatchPlan) -> None:
    assert plan_for(**arguments) == expected


def test_impossible_plans_are_refused() -> None:
    with pytest.raises(ValueError, match=r"max_batch=6 has no room for 8 micro-batches \(2 ranks, .* 3 groups\)"):
        plan_for(4, ranks=2, max_micro=4, accumulation_multiple_of=4, min_groups=3, max_batch=6)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0; max_micro must be at least 1, got -2"):
        plan_for(0, ranks=1, max_micro=-2)
    with pytest.raises(ValueError, match="micro must be at least 1, got 0; accumulation must be at least 1, got 0"):
        BatchPlan(0, 0)


def test_decisions_keep_their_promises() -> None:
    draw = random.Random(0)
    for _ in range(5000):
        minimum, current, maximum = sorted(draw.randint(1, 400) for _ in range(3))
        asked = draw.choice([draw.uniform(0, 600), math.inf, 0.0, float(current), 1e300])
        growth, shrinks = draw.choice([1.01, 1.5, 2.0, 10.0, math.inf]), draw.random() < 0.5
        size = next_batch_size(asked, current, minimum, maximum, growth, shrinks)
        assert isinstance(size, int)
        assert minimum <= size <= maximum
        assert size <= max(current * growth, current + 1)
        assert size >= (min(current / growth, current - 1) if shrinks else current)
        if size != max(minimum, min(maximum, math.ceil(asked) if asked < 1e9 else maximum)):  # then a bound is met
            bounds = {max(math.floor(min(current * growth, 1e6)), current + 1), current}
            bounds |= {min(math.ceil(current / growth), current - 1), minimum, maximum}
            assert size in bounds


@pytest.mark.parametrize(
    ("asked", "options", "expected"),
    [
        (10.0, {}, 16),
        (16.0, {}, 16),
        (16.1, {}, 17),
        (math.inf, {}, 32),
        (math.inf, {"growth": math.inf}, 100),
        (50.0, {"growth": 4.0}, 50),
        (10.2, {"shrinks": True}, 11),
        (1.0, {"shrinks": True}, 8),
        (1.0, {"shrinks": True, "growth": math.inf}, 4),
        (40.0, {"growth": 1.01}, 17),
        (0.0, {"growth": 1.01, "shrinks": True}, 15),
        (18.9, {"growth": 1.15}, 18),
    ],
)
def test_known_decisions(asked: float, options: dict, expected: int) -> None:
    assert next_batch_size(asked, current=16, minimum=4, maximum=100, **options) == expected


def test_a_batch_outside_the_bounds_is_brought_inside() -> None:
    assert next_batch_size(5.0, current=300, minimum=8, maximum=100) == 100
    assert next_batch_size(5.0, current=2, minimum=8, maximum=100) == 8


def test_wrong_decisions_are_refused() -> None:
    with pytest.raises(ValueError, match="asks for a batch size that is not a number"):
        next_batch_size(math.nan, 8, 1, 16)
    with pytest.raises(ValueError, match="growth must be above 1, got 1.0; sizes .* got 8, 4; current must be"):
        next_batch_size(8.0, 0, 8, 4, growth=1.0)
