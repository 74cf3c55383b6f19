"""Bounds against figures worked out by hand, exact integers, and simulated tasks."""

import math

import pytest
import torch

from lightning_hpo.functional.bilevel.guarantees import (
    Gap,
    empirical_gap,
    grid_gap,
    pdim_from_oscillations,
    pdim_order,
    tasks_needed,
    uniform_gap,
)

COVERAGE = 0.95


@pytest.mark.parametrize(("log2_b", "dimension"), [(-math.inf, 0), (0, 1), (10, 13), (100, 106)])
def test_the_dimension_is_the_published_one(log2_b: float, dimension: int) -> None:
    assert pdim_from_oscillations(log2_b) == dimension


@pytest.mark.parametrize("power", [0, 1, 2, 5, 31, 49, 50, 51, 64, 333, 4096])
def test_the_dimension_agrees_with_whole_numbers(power: int) -> None:
    count = 2**power
    exact = max(n for n in range(power + 30) if 2**n <= n * count + 1)
    assert pdim_from_oscillations(power) == exact


@pytest.mark.parametrize("count", [3, 5, 6, 7, 100, 12345])
def test_the_dimension_of_counts_that_are_no_powers(count: int) -> None:
    assert pdim_from_oscillations(math.log2(count)) == max(n for n in range(40) if 2**n <= n * count + 1)


@pytest.mark.parametrize(("tasks", "value"), [(30, 1.273), (100, 0.774), (1000, 0.285)])
def test_the_uniform_gap_is_the_published_one(tasks: int, value: float) -> None:
    gap = uniform_gap(tasks, log2_b=0.0)
    assert float(gap) == pytest.approx(value, abs=1e-3)
    assert gap.vacuous == (tasks == 30)
    assert gap.certified


def test_gaps_by_hand() -> None:
    tail = math.sqrt(math.log(1 / 0.1) / 100)
    assert uniform_gap(50, 2.0, 0.1, 3.0).value == pytest.approx(3 * (2 * math.sqrt(2 * math.log(402) / 50) + tail))
    tail = 3 * math.sqrt(math.log(4 / 0.1) / 8)
    assert empirical_gap([3, 0, 1, 2], 0.1, 2.0).value == pytest.approx(
        2 * (2 * math.sqrt(2 * math.log(14) / 4) + tail)
    )
    assert grid_gap(40, 7, 0.1, 2.0).value == pytest.approx(2 * math.sqrt(math.log(140) / 80))


def test_a_huge_count_neither_overflows_nor_passes_for_a_statement() -> None:
    gap = uniform_gap(1000, log2_b=1e6)
    assert math.isfinite(gap.value)
    assert gap.value == pytest.approx(2 * math.sqrt(2 * 1e6 * math.log(2) / 1000), rel=1e-2)
    assert gap.vacuous
    assert "vacuous" in str(gap)
    assert format(gap.value, ".4g") not in str(gap)
    assert not Gap(0.5, 1.0, "grid").vacuous
    assert Gap(math.nan, 1.0, "grid").vacuous


def simulated_gaps(tasks: int, grid: bool) -> torch.Tensor:
    """The true gap in 2000 repeats: u = 1[alpha >= tau] with uniform tau, whose mean is alpha."""
    generator = torch.Generator().manual_seed(tasks)
    tau = torch.rand(2000, tasks, generator=generator, dtype=torch.float64).sort(-1).values
    if grid:
        alphas = torch.linspace(0.1, 0.9, 9, dtype=torch.float64)
        return ((tau[:, :, None] <= alphas).double().mean(1) - alphas).abs().amax(-1)
    ranks = torch.arange(tasks + 1, dtype=torch.float64) / tasks
    return torch.maximum((ranks[1:] - tau).amax(-1), (tau - ranks[:-1]).amax(-1))


@pytest.mark.parametrize(("tasks", "quantile"), [(30, 0.243), (100, 0.134), (1000, 0.042)])
def test_the_gaps_cover_simulated_tasks(tasks: int, quantile: float) -> None:
    true = simulated_gaps(tasks, grid=False)
    assert true.quantile(COVERAGE).item() == pytest.approx(quantile, rel=0.06)
    assert (true <= uniform_gap(tasks, 0.0).value).double().mean() >= COVERAGE
    assert (true <= empirical_gap([1] * tasks, exact=True).value).double().mean() >= COVERAGE


@pytest.mark.parametrize("tasks", [10, 30, 300])
def test_the_grid_gap_covers_and_is_not_far_off(tasks: int) -> None:
    true = simulated_gaps(tasks, grid=True)
    gap = grid_gap(tasks, 9).value
    assert (true <= gap).double().mean() >= COVERAGE
    assert gap <= 2.5 * true.quantile(COVERAGE)


def test_tasks_needed_is_the_first_number_that_does() -> None:
    for gap in (lambda m: grid_gap(m, 21), lambda m: uniform_gap(m, 3.0), lambda m: uniform_gap(m, 5e4)):
        tasks = tasks_needed(0.2, gap)
        assert gap(tasks).value <= 0.2 < gap(tasks - 1).value
    assert tasks_needed(5.0, lambda m: grid_gap(m, 2)) == 1
    with pytest.raises(ValueError, match="stays above eps"):
        tasks_needed(0.1, lambda m: Gap(1.0, 1.0, "grid"))


def test_the_order_grows_with_each_argument() -> None:
    base = {"log2_pieces": 10.0, "variables": 3, "degree": 2, "polynomials": 4}
    assert pdim_order(**base) == 10 + 3 * 3
    assert all(pdim_order(**base | {name: value * 2}) > 19 for name, value in base.items())


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: pdim_from_oscillations(math.nan), ["log2_b"]),
        (lambda: pdim_from_oscillations(-1.0), ["log2_b"]),
        (lambda: uniform_gap(0, math.inf, 0.0, math.inf), ["tasks", "log2_b", "delta", "upper"]),
        (lambda: empirical_gap([], 1.0, -1.0), ["tasks", "delta", "upper"]),
        (lambda: empirical_gap([1, -2]), ["oscillations must be at least 0, got -2"]),
        (lambda: grid_gap(3, 0, 2.0), ["points", "delta"]),
        (lambda: tasks_needed(0.0, lambda m: grid_gap(m, 2)), ["eps"]),
        (lambda: pdim_order(math.nan, -1, 0, 0), ["variables", "degree", "polynomials", "log2_pieces"]),
    ],
)
def test_wrong_arguments_are_all_named(call, said: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        call()
    assert all(word in str(caught.value) for word in said)
