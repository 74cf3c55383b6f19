"""Roots against polynomials built from them, oscillations against hand-made vectors and a slow twin."""

import math

import pytest
import torch
from torch import Tensor, nn

from lightning_hpo.functional.bilevel.piecewise import (
    PIECEWISE,
    PiecewisePolynomial,
    count_oscillations,
    evaluate,
    multiply,
    piecewise_activation,
    roots_between,
)

MODULES = {
    "identity": nn.Identity(),
    "relu": nn.ReLU(),
    "leaky_relu": nn.LeakyReLU(),
    "abs": torch.abs,
    "square": torch.square,
    "hardtanh": nn.Hardtanh(),
    "relu6": nn.ReLU6(),
    "hardsigmoid": nn.Hardsigmoid(),
    "hardswish": nn.Hardswish(),
}


@pytest.mark.parametrize("name", PIECEWISE)
def test_activations_are_those_of_torch(name: str) -> None:
    points = torch.cat([torch.linspace(-8, 8, 4001), torch.tensor([-3.0, -1.0, 0.0, 1.0, 3.0, 6.0])]).double()
    torch.testing.assert_close(PIECEWISE[name](points), MODULES[name](points))


def test_other_activations_are_refused_with_what_holds_instead() -> None:
    for name in ("tanh", "gelu"):
        with pytest.raises(ValueError, match=rf"'{name}'.*grid_gap.*empirical_gap"):
            piecewise_activation(name)


def from_roots(roots: Tensor, factor: float = 1.0) -> Tensor:
    result = torch.full((*roots.shape[:-1], 1), factor, dtype=torch.float64)
    for root in roots.unbind(-1):
        result = multiply(result, torch.stack([-root, torch.ones_like(root)], -1))
    return result


@pytest.mark.parametrize("factor", [1.0, -3.0, 1e-6])
def test_all_roots_inside_are_found(factor: float) -> None:
    generator = torch.Generator().manual_seed(0)
    roots = (4 * torch.rand(200, 6, generator=generator, dtype=torch.float64) - 2).sort(-1).values
    roots = roots[(roots.diff(dim=-1) > 0.05).all(-1)]
    assert len(roots) > 20
    low, high = torch.full((len(roots),), -1.0).double(), torch.full((len(roots),), 1.5).double()
    found = roots_between(nn.functional.pad(from_roots(roots, factor), (0, 2)), low, high)
    expected = torch.where((roots > -1) & (roots < 1.5), roots, torch.inf).sort(-1).values
    torch.testing.assert_close(found, nn.functional.pad(expected, (0, 2), value=math.inf), rtol=0, atol=1e-9)


def test_touching_crossing_three_times_and_no_root() -> None:
    low, high = torch.tensor([-1.0]).double(), torch.tensor([1.0]).double()
    touching = from_roots(torch.tensor([[0.25, 0.25]]).double())
    assert not roots_between(touching, low, high).isfinite().any()
    triple = from_roots(torch.tensor([[0.25, 0.25, 0.25]]).double())
    found = roots_between(triple, low, high)
    torch.testing.assert_close(found[0, 0], torch.tensor(0.25).double(), rtol=0, atol=1e-5)
    assert not roots_between(torch.tensor([[0.0, 0.0, 0.0]]).double(), low, high).isfinite().any()
    assert roots_between(torch.tensor([[1.0]]).double(), low, high).shape == (1, 0)


def test_products_and_values() -> None:
    generator = torch.Generator().manual_seed(1)
    a, b = torch.randn(5, 3, generator=generator).double(), torch.randn(5, 4, generator=generator).double()
    x = torch.randn(5, generator=generator).double()
    torch.testing.assert_close(evaluate(multiply(a, b), x), evaluate(a, x) * evaluate(b, x))
    torch.testing.assert_close(multiply(a, b), multiply(b, a))


@pytest.mark.parametrize(
    ("values", "count"),
    [
        ([1.0], 0),
        ([2.0, 2.0, 2.0], 0),
        ([0.0, 1.0], 1),
        ([3.0, 2.0, 1.0], 1),
        ([0.0, 1.0, 0.0], 2),
        ([0.0, 1.0, 0.0, 2.0, 0.0], 4),
        ([5.0, 6.0, 5.0, 1.0, 0.0, 1.0], 2),
        ([0.5, 0.2, 0.9, 0.1, 0.5, 0.4, 0.6], 6),
    ],
)
def test_oscillations_of_hand_made_vectors(values: list[float], count: int) -> None:
    assert count_oscillations(values) == count
    assert count_oscillations([-v for v in values]) == count


def test_oscillations_against_a_loop_over_thresholds() -> None:
    values = torch.randint(0, 6, (50, 40), generator=torch.Generator().manual_seed(2)).double()
    slow = [max(int((row >= t).long().diff().abs().sum()) for t in row.unique()) for row in values]
    assert count_oscillations(values).tolist() == slow


def test_a_sample_counts_no_more_than_the_function_has() -> None:
    full = torch.sin(torch.linspace(0, 40, 4000).double())
    assert all(count_oscillations(full[::step]) <= count_oscillations(full) for step in (1, 3, 50, 331))


@pytest.mark.parametrize("values", [[], [math.nan, 1.0], [math.inf]])
def test_what_cannot_be_counted_is_refused(values: list[float]) -> None:
    with pytest.raises(ValueError, match="finite"):
        count_oscillations(values)


def test_wrong_pieces_are_refused() -> None:
    with pytest.raises(ValueError, match=r"need 3 pieces.*must rise"):
        PiecewisePolynomial((1.0, 0.0), ((0.0,), (1.0,)))


def test_the_best_utility_over_weights_jumps_at_most_twice_a_region() -> None:
    """One hidden threshold unit a line: f is constant on the cells that lines cut the plane into."""
    generator = torch.Generator().manual_seed(3)
    alpha, weight = torch.linspace(-1, 1, 1501).double(), torch.linspace(-1, 1, 801).double()
    for lines in (1, 2, 4, 7):
        normal = torch.randn(lines, 2, generator=generator, dtype=torch.float64)
        offset = 0.5 * torch.randn(lines, generator=generator, dtype=torch.float64)
        units = normal[:, :1, None] * alpha[:, None] + normal[:, 1:, None] * weight > offset[:, None, None]
        cell = ((2 ** torch.arange(lines))[:, None, None] * units).sum(0)
        utility = torch.rand(2**lines, generator=generator, dtype=torch.float64)
        best = utility[cell].amax(1)
        assert count_oscillations(best) <= (best.diff() != 0).sum() <= 2 * len(cell.unique())
