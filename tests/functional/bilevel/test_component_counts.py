"""Counts of pieces against brute force, and against the formulas written out."""

import math

import pytest
import torch

from lightning_hpo.functional.bilevel.component_counts import (
    log2_components_activation,
    log2_components_gcn,
    log_components,
    log_sign_vectors,
)


@pytest.mark.parametrize("degree", [1, 2, 3])
@pytest.mark.parametrize("polynomials", [1, 2, 3, 5, 8])
def test_the_bound_dominates_the_sign_patterns_of_random_polynomials(polynomials: int, degree: int) -> None:
    generator = torch.Generator().manual_seed(polynomials * 10 + degree)
    x, y = 6 * torch.rand(2, 100_000, generator=generator, dtype=torch.float64) - 3
    powers = torch.stack([x**i * y**j for i in range(degree + 1) for j in range(degree + 1 - i)])
    most = 0
    for _ in range(3):
        values = torch.randn(polynomials, len(powers), generator=generator, dtype=torch.float64) @ powers
        codes = (2 ** torch.arange(polynomials)) @ (values > 0).long()
        most = max(most, len(codes.unique()))
    assert most > 1
    assert math.log(most) <= log_sign_vectors(polynomials, degree, variables=2)


def test_lines_cut_the_plane_into_as_many_cells_as_are_known() -> None:
    for lines in range(2, 40):
        cells = 1 + lines + lines * (lines - 1) // 2
        assert math.log(cells) <= log_components(lines, 1, 2)
        assert math.log(cells) <= log_sign_vectors(lines, 1, 2)


def test_the_two_bounds_written_out() -> None:
    assert log_sign_vectors(100, 3, 4) == pytest.approx(math.log(2 * (2 * math.e * 100 * 3 / 4) ** 4))
    assert log_sign_vectors(3, 9, 4) == pytest.approx(math.log(2**3))
    assert log_components(100, 3, 4) == pytest.approx(math.log((4 * math.e * 100 * 3 / 4) ** 4))
    assert log_components(2, 3, 4) == pytest.approx(math.log((4 * math.e * 3) ** 4))


def test_the_activation_count_written_out() -> None:
    """Three weight layers 2-3-4-3 with biases: 9, 16 and 15 weights; degrees 1, 4, 10 of squares."""
    examples, p, degree = 50, 2, 2
    logs = log_sign_vectors(examples * 3 * p, 1, 1 + 9) + log_sign_vectors(examples * 4 * p, 4, 1 + 9 + 16)
    logs += log_sign_vectors(examples * 3, 10, 1 + 40)
    for ties in (1, 2):
        total = logs + log_components(ties * (examples * 7 * p + examples * 3), 10, 41)
        found = log2_components_activation([2, 3, 4, 3], examples, p, degree, ties=ties == 2)
        assert found * math.log(2) == pytest.approx(total)


def test_the_activation_count_without_bias_or_hidden_layer() -> None:
    expected = log_sign_vectors(7, 1, 5) + log_components(7, 1, 5)
    found = log2_components_activation([2, 2], 7, 1, 1, bias=False, ties=False)
    assert found * math.log(2) == pytest.approx(expected)
    assert log2_components_activation([2, 1], 7, 1, 1) > 0
    assert log2_components_activation([2, 3, 2], 7, 0, 2) < log2_components_activation([2, 3, 2], 7, 1, 2)


def test_the_graph_count_written_out() -> None:
    """20 nodes, 4 features, 2 hidden units: 40 boundaries of degree 4, then 5 * 3 of degree 3 * 21 + 2."""
    logs = log_sign_vectors(40, 4, 9) + log_sign_vectors(15, 65, 15)
    expected = logs + log_components(55, 65, 15)
    assert log2_components_gcn(20, 4, 2, 3, 5, degree=3, ties=False) * math.log(2) == pytest.approx(expected)


def test_graph_boundaries_have_the_degree_that_is_claimed() -> None:
    """By finite differences: times its denominators, a logit difference is a polynomial of that degree and no less."""
    generator = torch.Generator().manual_seed(0)
    nodes, degree = 4, 2
    similarity = torch.rand(nodes, nodes, generator=generator, dtype=torch.float64)
    similarity = (similarity + similarity.T) / 2
    x = torch.rand(nodes, 3, generator=generator, dtype=torch.float64)
    slopes = torch.rand(2, 3, 2, generator=generator, dtype=torch.float64)
    points = torch.linspace(0, 1, degree * (nodes + 1) + 4, dtype=torch.float64)
    values = []
    for t in points:
        a = (similarity + t) ** degree
        a.fill_diagonal_(1.0)
        sums = a.sum(1)
        w0, w1 = slopes[0] * (1 + t), slopes[1][:2].T.reshape(2, 2) * (1 - t)
        logits = (a / sums[:, None]) @ torch.relu((a / sums[:, None]) @ x @ w0) @ w1
        values.append((logits[0, 0] - logits[0, 1]) * sums[0] * sums.prod())
    differences, orders = torch.stack(values), []
    scale = differences.abs().max()
    for _ in range(len(points) - 1):
        differences = differences.diff()
        orders.append(bool(differences.abs().max() > 1e-9 * scale))
    assert sum(orders) == degree * (nodes + 1) + 2


def test_small_networks_have_huge_counts() -> None:
    assert log2_components_activation([64, 32, 32, 5], examples=260, breakpoints=2, degree=1) > 1e4


def test_symmetric_normalization_is_not_certified() -> None:
    with pytest.warns(UserWarning, match="does not certify"):
        found = log2_components_gcn(20, 4, 2, 3, 5, 3, normalize="sym")
    assert found == log2_components_gcn(20, 4, 2, 3, 5, 3)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: log_sign_vectors(0, 1.5, -1), ["polynomials", "degree", "variables"]),
        (lambda: log_components(1, 0, 1), ["degree must be a positive integer"]),
        (lambda: log2_components_activation([3], 0, -1, 0), ["widths", "examples", "breakpoints", "degree"]),
        (lambda: log2_components_activation([3, 0, 2], 1, 1, 1), [r"widths[1]"]),
        (lambda: log2_components_gcn(1, 1, 1, 1, 0, 1.5, normalize="col"), ["labelled", "degree", "normalize"]),
    ],
)
def test_wrong_arguments_are_all_named(call, said: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        call()
    assert all(word in str(caught.value) for word in said)
