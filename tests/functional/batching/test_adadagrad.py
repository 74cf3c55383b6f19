"""The card's fixture, closed forms, slow twins, and the slips of the official code."""

import math

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from lightning_hpo.functional.batching.adadagrad import (
    GradientStatistics,
    Smoothed,
    coordinate_batch,
    group_trace,
    inner_product_test,
    inner_product_variance,
    norm_test,
    orthogonality_test,
    orthogonality_variance,
    ratio,
)

TRACE, SQUARE = 2.5284778340318788, 0.026076584034531784
INNER, ORTHOGONAL = 0.015099651302047719, 1.9494276301381444


def close(found: Tensor | float, expected: float, relative: float = 1e-10) -> None:
    assert float(found) == pytest.approx(expected, rel=relative, abs=0)


@pytest.fixture(scope="module")
def network_gradients() -> list[Tensor]:
    """Per-sample gradients of a small network, one tensor a parameter, made without a random number."""
    inputs = (3 * torch.linspace(-1, 1, 144, dtype=torch.float64).sin()).cos().view(24, 6)
    labels = torch.tensor([7 * i % 3 for i in range(24)])
    network = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3)).double()
    parameters = {}
    for k, (name, parameter) in enumerate(network.named_parameters()):
        index = torch.arange(parameter.numel(), dtype=torch.float64)
        parameters[name] = (0.5 * (0.37 * (k + 1) * index + k).sin()).view_as(parameter).requires_grad_()
    rows = []
    for sample, label in zip(inputs, labels, strict=True):  # one at a time: the slow twin
        loss = torch.nn.functional.cross_entropy(functional_call(network, parameters, (sample[None],)), label[None])
        rows.append(torch.autograd.grad(loss, list(parameters.values())))
    return [torch.stack(column) for column in zip(*rows, strict=True)]


@pytest.fixture(scope="module")
def gradients(network_gradients: list[Tensor]) -> Tensor:
    return torch.cat([g.flatten(1) for g in network_gradients], 1)


def sums(gradients: Tensor, mean: Tensor) -> dict[str, Tensor]:
    inner = gradients @ mean
    return {
        "sum_squares": gradients.square().sum(),
        "sum_inner_squares": inner.square().sum(),
        "sum_inner": inner.sum(),
        "sample_mean_square": gradients.mean(0).square().sum(),
    }


# The card's fixture


def test_the_fixture_has_the_cards_variances(gradients: Tensor) -> None:
    mean = gradients.mean(0)
    square = mean.square().sum()
    found = sums(gradients, mean)
    close(square, SQUARE)
    close(group_trace(found["sum_squares"], 24, 24, square), TRACE)
    close(inner_product_variance(found["sum_inner_squares"], 24, square), INNER)
    close(orthogonality_variance(found["sum_squares"], found["sum_inner_squares"], 24, square), ORTHOGONAL)


def test_the_fixture_has_the_cards_batches() -> None:
    statistics = GradientStatistics(
        batch_size=24, trace=TRACE, square=SQUARE - TRACE / 24, inner=INNER, orthogonal=ORTHOGONAL
    )
    close(statistics.biased_square, SQUARE)
    close(norm_test(statistics, eta=0.3, debias=False), 1077.3726, relative=1e-7)
    close(inner_product_test(statistics, theta=0.3), 246.7306, relative=1e-6)
    close(orthogonality_test(statistics, nu=0.3), 830.6420, relative=1e-7)
    close(norm_test(statistics, eta=0.3, debias=False), TRACE / (0.09 * SQUARE))


def test_the_fixture_in_four_groups_is_mccandlishs_two_batch_form(gradients: Tensor) -> None:
    groups = gradients.view(4, 6, -1).mean(1)
    square = gradients.mean(0).square().sum()
    trace = group_trace(6 * groups.square().sum(), 24, 4, square)
    close(trace, 0.44729094671441405)
    small, large = groups.square().sum(1).mean(), square
    close(trace, float((small - large) / (1 / 6 - 1 / 24)), relative=1e-12)
    close((24 * large - 6 * small) / (24 - 6), 0.0074394612547645355)
    close(square - trace / 24, 0.0074394612547645355)  # the debiased square of the statistics


# Identities


def test_the_trace_is_the_orthogonal_part_and_the_part_along_the_gradient(gradients: Tensor) -> None:
    mean = gradients.mean(0)
    square = mean.square().sum()
    found = sums(gradients, mean)
    trace = group_trace(found["sum_squares"], 24, 24, square)
    along = inner_product_variance(found["sum_inner_squares"], 24, square) / square
    across = orthogonality_variance(found["sum_squares"], found["sum_inner_squares"], 24, square)
    assert abs(trace - across - along) < 1e-12


def test_a_part_of_the_batch_needs_its_own_means(gradients: Tensor) -> None:
    mean, part = gradients.mean(0), gradients[:10]
    square = mean.square().sum()
    found = sums(part, mean)
    inner = inner_product_variance(found["sum_inner_squares"], 10, square, found["sum_inner"])
    close(inner, float((part @ mean).var()), relative=1e-12)
    orthogonal = part - (part @ mean / square)[:, None] * mean
    across = orthogonality_variance(
        found["sum_squares"], found["sum_inner_squares"], 10, square, found["sum_inner"], found["sample_mean_square"]
    )
    close(across, float(orthogonal.var(0).sum()), relative=1e-12)
    wrong = inner_product_variance(found["sum_inner_squares"], 10, square)
    assert abs(wrong - inner) > 1e-3 * inner


def test_groups_of_different_sizes_are_weighted() -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = torch.tensor([6, 6, 6, 2])
    found = []
    for _ in range(4000):
        samples = 3 + 2 * torch.randn(20, 5, generator=generator, dtype=torch.float64)
        groups = torch.stack([part.mean(0) for part in samples.split(sizes.tolist())])
        mean = samples.mean(0)
        found.append(group_trace((sizes[:, None] * groups.square()).sum(), 20, 4, mean.square().sum()))
    assert torch.stack(found).mean().item() == pytest.approx(5 * 4, rel=0.03)  # five coordinates of variance 4


def test_groups_estimate_the_trace_without_bias(gradients: Tensor) -> None:
    generator = torch.Generator().manual_seed(1)
    found = []
    for _ in range(400):
        drawn = gradients[torch.randint(24, (48,), generator=generator)]
        groups = drawn.view(8, 6, -1).mean(1)
        found.append(group_trace(6 * groups.square().sum(), 48, 8, drawn.mean(0).square().sum()))
    population = gradients.var(0, correction=0).sum()  # drawn with replacement
    assert float(torch.stack(found).mean() / population) == pytest.approx(1, abs=0.03)


def test_a_quadratic_bowl_asks_for_its_known_batch() -> None:
    generator = torch.Generator().manual_seed(0)
    points = 1.5 + 0.8 * torch.randn(200_000, 4, generator=generator, dtype=torch.float64)
    gradients = torch.tensor([3.0, 1.0, 0.0, 2.0], dtype=torch.float64) - points
    mean = gradients.mean(0)
    square = mean.square().sum()
    trace = group_trace(gradients.square().sum(), 200_000, 200_000, square)
    statistics = GradientStatistics(200_000, float(trace), float(square - trace / 200_000))
    distance = 1.5**2 + 0.5**2 + 1.5**2 + 0.5**2
    assert norm_test(statistics, eta=0.5) == pytest.approx(4 * 0.64 / (0.25 * distance), rel=0.01)


# Nothing to divide by


def test_a_trace_is_not_negative_and_one_group_has_none() -> None:
    square = torch.tensor(0.1)
    assert group_trace(square * 3 - 1e-9, 3, 3, square) == 0
    assert group_trace(torch.tensor(1.0), 5, 5, torch.tensor(3.0)) == 0
    assert group_trace(torch.tensor(7.0), torch.tensor(8), torch.tensor(1), torch.tensor(1.0)).isnan()
    assert inner_product_variance(torch.tensor(1.0), 1, torch.tensor(1.0)).isnan()


def test_sums_stay_tensors(gradients: Tensor) -> None:
    square = gradients.mean(0).square().sum()
    sizes = torch.tensor(24)
    found = group_trace(gradients.square().sum(), sizes, sizes, square)
    assert found.dtype == torch.float64
    close(found, TRACE)


@pytest.mark.parametrize(
    ("noise", "signal", "expected"),
    [(6.0, 3.0, 2.0), (6.0, 0.0, math.inf), (6.0, -1.0, math.inf), (0.0, 0.0, 0.0), (-1e-9, 3.0, 0.0)],
)
def test_ratios_of_a_vanishing_gradient(noise: float, signal: float, expected: float) -> None:
    assert ratio(noise, signal) == expected


def test_ratios_hide_no_missing_number() -> None:
    assert math.isnan(ratio(math.nan, 1.0))
    assert math.isnan(ratio(0.0, math.nan))
    assert ratio(1e300, 1e-300) == math.inf


def test_a_pure_noise_gradient_asks_for_everything() -> None:
    statistics = GradientStatistics(batch_size=8, trace=24.0, square=-0.5)
    assert norm_test(statistics, eta=1.0) == math.inf
    assert norm_test(statistics, eta=1.0, debias=False) == pytest.approx(24 / 2.5)
    assert statistics.noise_scale > 1e300


@pytest.mark.parametrize("test", [lambda s: inner_product_test(s, 0.9), lambda s: orthogonality_test(s, 0.9)])
def test_missing_statistics_are_named(test) -> None:
    with pytest.raises(ValueError, match="the statistics have no `(inner|orthogonal)`"):
        test(GradientStatistics(8, 1.0, 1.0))


# Slips of the official code


def test_inner_products_are_those_of_the_whole_vector_not_of_each_tensor(network_gradients: list[Tensor]) -> None:
    parts = [g.flatten(1) for g in network_gradients]
    separate = sum(float((g @ g.mean(0)).var()) for g in parts)
    close(separate, 0.01046, relative=1e-3)  # the official figure
    assert INNER / separate > 1.4


def test_projections_are_those_of_the_whole_vector_not_of_each_tensor(network_gradients: list[Tensor]) -> None:
    separate = 0.0
    for g in (g.flatten(1) for g in network_gradients):
        mean = g.mean(0)
        separate += float((g - (g @ mean / (mean @ mean))[:, None] * mean).var(0).sum())
    close(separate, 1.506, relative=1e-3)
    assert ORTHOGONAL / separate > 1.29


def test_ranks_pool_sums_not_variances(gradients: Tensor) -> None:
    mean = gradients.mean(0)
    square = mean.square().sum()
    ranks = [sums(part, mean) for part in gradients.split([16, 8])]
    pooled = {name: ranks[0][name] + ranks[1][name] for name in ("sum_squares", "sum_inner_squares")}
    close(group_trace(pooled["sum_squares"], 24, 24, square), TRACE, relative=1e-12)
    close(orthogonality_variance(**pooled, samples=24, mean_square=square), ORTHOGONAL, relative=1e-12)
    parts = gradients.split([16, 8])
    within = sum(len(p) * p.var(0).sum() for p in parts) / 24
    between = sum(len(p) * (p.mean(0) - mean).square().sum() for p in parts) / 24
    assert abs(within + between - TRACE) > 1e-3 * TRACE  # corrected within, uncorrected between


def test_the_mean_of_the_orthogonal_parts_is_subtracted_coordinate_by_coordinate() -> None:
    gradients = torch.tensor([[1.0, 4.0, -4.0], [3.0, 4.0, -4.0], [2.0, 4.0, -4.0]], dtype=torch.float64)
    along = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)  # the gradient of a larger batch
    found = sums(gradients, along)
    across = orthogonality_variance(
        found["sum_squares"],
        found["sum_inner_squares"],
        3,
        torch.tensor(1.0, dtype=torch.float64),
        found["sum_inner"],
        found["sample_mean_square"],
    )
    assert across == 0  # the square of the sum of the means, (4 - 4)^2, would leave 48


# Coordinates


def coordinates(gradients: Tensor) -> Tensor:
    return gradients.var(0) / gradients.mean(0).square()


@pytest.mark.parametrize("quantile", [0.0, 0.5, 0.9, 1.0])
def test_the_batch_of_a_quantile_of_coordinates(
    network_gradients: list[Tensor], gradients: Tensor, quantile: float
) -> None:
    moments = [g.square().sum(0) for g in network_gradients]
    found = coordinate_batch(moments, [g.mean(0) for g in network_gradients], 24, quantile)
    expected = torch.quantile(coordinates(gradients), quantile, interpolation="higher")
    close(found, float(expected), relative=1e-9)


def test_silent_coordinates_have_no_say_and_vanishing_ones_ask_for_everything() -> None:
    samples = torch.tensor([[1.0, 0.0, 0.0, 1.0], [3.0, 0.0, 0.0, 2.0]])
    moments, mean = [samples.square().sum(0)], [samples.mean(0)]
    assert coordinate_batch(moments, mean, 2, quantile=0.0).item() == pytest.approx(0.5 / 2.25)
    assert coordinate_batch(moments, mean, 2, quantile=1.0).item() == pytest.approx(0.5)
    assert coordinate_batch([torch.tensor([2.0, 5.0])], [torch.tensor([0.0, 1.0])], 2, 1.0) == math.inf
    assert coordinate_batch([torch.zeros(3)], [torch.zeros(3)], 2, 0.9) == 0
    assert coordinate_batch([torch.tensor([1.0, 2.0])], [torch.tensor([math.nan, 1.0])], 2, 0.0).isnan()


def test_a_quantile_of_very_many_coordinates_comes_from_a_subset() -> None:
    generator = torch.Generator().manual_seed(0)
    mean = torch.rand(3_000_000, generator=generator) + 0.5
    moments = 2 * mean.square() + 1.0  # every variance is 1
    found = coordinate_batch([moments[:10], moments[10:]], [mean[:10], mean[10:]], 2, 0.9)
    exact = (1 / mean.square()).kthvalue(2_700_000).values
    assert found.item() == pytest.approx(exact.item(), rel=0.01)
    top = coordinate_batch([moments[:10], moments[10:]], [mean[:10], mean[10:]], 2, 1.0)
    assert top.item() == pytest.approx((1 / mean.min().square()).item(), rel=1e-5)  # the maximum is of all of them


# Smoothing


def test_averages_correct_their_start_each_on_its_own() -> None:
    smoothed = Smoothed(0.9)
    values = [4.0, 1.0, 7.0, 2.0]
    for count, value in enumerate(values, 1):
        found = smoothed.update({"trace": value})
        weights = [0.9 ** (count - 1 - i) for i in range(count)]
        close(found["trace"], sum(w * v for w, v in zip(weights, values, strict=False)) / sum(weights))
    assert smoothed.update({"square": 3.0}) == {"square": pytest.approx(3.0)}  # a latecomer starts from itself


def test_no_decay_smooths_nothing() -> None:
    smoothed = Smoothed(0.0)
    smoothed.update({"trace": 1.0})
    assert smoothed.update({"trace": 5.0}) == {"trace": 5.0}


def test_averages_continue_from_their_state() -> None:
    whole, first, second = Smoothed(0.8), Smoothed(0.8), Smoothed(0.8)
    for value in (1.0, 2.0, 3.0):
        expected = whole.update({"trace": value})
    first.update({"trace": 1.0})
    first.update({"trace": 2.0})
    state = first.state_dict()
    assert {type(entry) for pair in state.values() for entry in pair} == {float}
    second.load_state_dict(state)
    assert second.update({"trace": 3.0}) == expected


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_refused_and_nothing_is_taken_in(value: float) -> None:
    smoothed = Smoothed(0.5)
    smoothed.update({"trace": 1.0, "square": 1.0})
    before = smoothed.state_dict()
    with pytest.raises(ValueError, match=f"only finite numbers can be averaged: square is {value}"):
        smoothed.update({"trace": 2.0, "square": value})
    assert smoothed.state_dict() == before


@pytest.mark.parametrize("decay", [-0.1, 1.0, math.nan])
def test_decays_lie_below_one(decay: float) -> None:
    with pytest.raises(ValueError, match="decay must be at least 0 and below 1"):
        Smoothed(decay)
