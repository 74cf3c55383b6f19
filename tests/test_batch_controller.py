"""Decisions from numbers alone."""

import math

import pytest

from lightning_hpo import CABS, AdaScale, DiveBatch, LinearRamp, NoiseScale, NormTest, NoScaling, SqrtScaling
from lightning_hpo.batch_controller import PATIENCE, BatchController


def controller(policy=None, rule=None, growth=1e9, smoothing=0.0, first=8, limit=10_000):
    made = BatchController(policy or NormTest(), rule or NoScaling(), growth, smoothing)
    made.begin(first, limit)
    return made


def reading(trace, square, samples, **more):
    """What a step of so many samples shows of a gradient with this trace and squared norm, on average."""
    return {"trace": trace, "square": square + trace / samples, **more}


def test_the_noise_scale_is_asked_for_whatever_the_batch():
    for samples in (8, 80, 800):
        made = controller()
        made.take_in(reading(120.0, 2.0, samples), samples)
        made.decide(samples, 0.1)
        assert made.wanted == 60
        assert made.noise_scale == pytest.approx(60)


def test_the_plain_test_uses_the_batch_of_the_reading():
    """With the present, larger batch the squared norm would be underestimated, and the batch jump to the limit."""
    made = controller(NormTest(eta=0.5, debias=False), growth=2.0)
    made.take_in(reading(80.0, 1.0, 8), 8)
    made.wanted = 64
    made.decide(64, 0.1)
    assert made.wanted == 64  # 80 / (0.25 * (1 + 80 / 8)) is 29
    made.take_in({"trace": 80.0, "square": 2.0}, 16, batch_size=8)  # two steps compared
    assert made.measured == 8


def test_it_never_shrinks_unless_the_policy_does():
    for policy, expected in ((NormTest(), 100), (NoiseScale(), 60)):
        made = controller(policy, first=8)
        made.wanted = 100
        made.take_in(reading(120.0, 2.0, 100), 100)
        made.decide(100, 0.1)
        assert made.wanted == expected


def test_growth_is_limited_and_so_is_the_batch():
    made, sizes = controller(growth=2.0, limit=100), []
    for _ in range(6):
        made.take_in(reading(1000.0, 1.0, 8), 8)
        made.decide(8, 0.1)
        sizes.append(made.wanted)
    assert sizes == [16, 32, 64, 100, 100, 100]


def test_statistics_are_averaged_before_their_ratio_is_taken():
    """The mean of ratios would be 505, and blow up where a gradient is small by chance."""
    made = controller(smoothing=0.5)
    made.take_in(reading(100.0, 10.0, 8), 8)
    made.take_in(reading(100.0, 0.1, 8), 8)
    square = (10.0 * 0.25 + 0.1 * 0.5) / 0.75
    assert made.noise_scale == pytest.approx(100 / square)


def test_noise_alone_asks_for_all_that_one_step_may_add():
    made = controller(growth=2.0)
    made.take_in({"trace": 80.0, "square": 5.0}, 8)  # less than noise alone would give
    assert made.noise_scale == math.inf
    assert made.decide(8, 0.1)
    assert made.wanted == 16


def test_no_noise_asks_for_nothing():
    made = controller()
    made.take_in({"trace": 0.0, "square": 5.0}, 8)
    assert not made.decide(8, 0.1)


@pytest.mark.parametrize("rule", [AdaScale(cap=4.0), SqrtScaling(cap=4.0)])
def test_the_batch_stops_where_the_learning_rate_does(rule):
    made = controller(NormTest(), rule, growth=2.0)
    for _ in range(20):
        made.take_in(reading(1000.0, 1.0, 8), 8)
        made.decide(made.wanted, 0.1)
    trace, square = made.statistics["trace"], made.statistics["square"]
    assert rule.factor(made.wanted, 8, trace, square) < 4.0
    assert rule.factor(made.wanted + 1, 8, trace, square) == 4.0
    free = controller(NormTest(), NoScaling(), growth=2.0)
    for _ in range(20):
        free.take_in(reading(1000.0, 1.0, 8), 8)
        free.decide(free.wanted, 0.1)
    assert free.wanted == 1000


@pytest.mark.parametrize(
    ("smoothing", "asked", "least"), [(0.9, None, 10), (0.0, None, 1), (0.75, None, 4), (0.9, 1, 1), (0.9, 3, 3)]
)
def test_the_batch_waits_for_as_many_readings_as_the_averages_remember(smoothing, asked, least):
    made = BatchController(NormTest(), NoScaling(), growth=2.0, smoothing=smoothing, min_readings=asked)
    made.begin(first=8, limit=1000)
    changed = []
    for _ in range(12):
        made.take_in(reading(1000.0, 1.0, 8), 8)
        changed.append(made.decide(made.wanted, 0.1))
    assert changed.index(True) == least - 1


def test_readings_that_are_not_finite_leave_no_trace_and_end_the_search():
    made = controller(smoothing=0.9)
    made.take_in(reading(100.0, 10.0, 8), 8)
    before = dict(made.statistics)
    for count in range(1, PATIENCE + 1):
        assert not made.take_in({"trace": math.nan, "square": 1.0}, 8)
        assert made.skipped == count
        assert made.frozen == (count == PATIENCE)
    assert made.statistics == before
    assert not made.due(None)


def test_large_batches_are_looked_at_rarely():
    made = controller()
    looked = [made.due(None) for made.steps in range(20)]
    assert all(looked)
    made.wanted = 2000
    assert [made.due(None) for made.steps in range(20)] == [True, *[False] * 9] * 2
    assert [made.due(4) for made.steps in range(8)] == [True, False, False, False] * 2


def test_the_variance_of_inner_products_gives_that_of_the_rest():
    made = controller()
    made.take_in({"trace": 10.0, "square": 4.0, "inner": 12.0}, 8)
    assert made.statistics["orthogonal"] == pytest.approx(10 - 12 / 4)


def test_cabs_uses_learning_rate_and_loss():
    made = controller(CABS())
    made.take_in({**reading(100.0, 1.0, 8), "loss": 0.5}, 8)
    made.decide(8, 0.1)
    assert made.wanted == 20


def test_policies_of_epochs_use_the_mean_of_the_epoch():
    made = controller(DiveBatch(delta=2.0), smoothing=0.9)
    for trace in (10.0, 20.0, 60.0):
        made.take_in(reading(trace, 1.0, 8), 8)
    assert made.statistics["trace"] == pytest.approx(30.0)
    made.decide(8, 0.1)
    assert made.wanted in (2 * 31, 2 * 31 + 1)  # rounded up, and averages are rounded, too
    made.end_epoch()
    made.take_in(reading(5.0, 1.0, 8), 8)
    assert made.statistics["trace"] == pytest.approx(5.0)


def test_ramps_need_no_statistics():
    made = controller(LinearRamp(increment=8, every=1, start=8))
    assert made.needs == frozenset()
    made.samples = 8
    made.decide(8, 0.1)
    assert made.wanted == 16


def test_a_state_goes_on_to_the_bit():
    def feed(made, steps):
        for step in steps:
            made.take_in(reading(100.0 + step, 1.0 + 0.1 * step, made.wanted), made.wanted)
            made.decide(made.wanted, 0.1)
            made.step_settings({"lr": 0.1}, made.wanted)
        return made

    whole = feed(controller(rule=AdaScale(), growth=1.5, smoothing=0.7), range(6))
    half = feed(controller(rule=AdaScale(), growth=1.5, smoothing=0.7), range(3))
    again = BatchController(NormTest(), AdaScale(), 1.5, 0.7)
    again.load_state_dict(half.state_dict())
    again.begin(99, 10_000)  # the first batch is that of the state
    assert feed(again, range(3, 6)).state_dict() == whole.state_dict()
