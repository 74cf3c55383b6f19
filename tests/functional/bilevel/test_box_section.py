"""Projections on box sections and monotone vectors."""

import pytest
import torch
from sklearn.isotonic import isotonic_regression
from torch import Tensor

from lightning_hpo.functional.bilevel.box_section import projection_box_section
from lightning_hpo.functional.bilevel.isotonic import isotonic_l2
from lightning_hpo.functional.bilevel.projections import projection_simplex

G = torch.Generator().manual_seed(0)


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=G)


def section() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    lower, weights = random(6) - 1, random(6)
    upper = lower + random(6).abs() + 0.5
    return lower, upper, weights, (weights * (0.4 * lower + 0.6 * upper)).sum()


def test_the_simplex_is_a_box_section() -> None:
    x = random(4, 6)
    torch.testing.assert_close(projection_box_section(x, (0.0, 10.0, 1.0, 1.5)), projection_simplex(x, 1.5))


def test_nearest_point_and_idempotence() -> None:
    lower, upper, weights, level = hyper = section()
    x = random(3, 6)
    p = projection_box_section(x, hyper)
    assert ((p >= lower) & (p <= upper)).all()
    torch.testing.assert_close(p @ weights, level.expand(3), rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(projection_box_section(p, hyper), p, rtol=1e-12, atol=1e-12)
    others = projection_box_section(x + 0.5 * random(500, 3, 6), hyper)
    assert ((others >= lower) & (others <= upper)).all()
    torch.testing.assert_close(others @ weights, level.expand(500, 3), rtol=1e-12, atol=1e-12)
    assert ((others - x).norm(dim=-1) >= (p - x).norm(dim=-1) - 1e-12).all()


def test_derivatives() -> None:
    inputs = tuple(part.requires_grad_() for part in (random(6), *section()))
    function = lambda x, *hyper: projection_box_section(x, hyper)  # noqa: E731
    free = function(*inputs)
    assert 1 < ((free > inputs[1]) & (free < inputs[2])).sum() < 6
    assert torch.autograd.gradcheck(function, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, inputs)
    rows = random(3, 6)
    hyper = tuple(part.detach() for part in inputs[1:])
    mapped = torch.func.vmap(lambda row: projection_box_section(row, hyper))(rows)
    torch.testing.assert_close(mapped, projection_box_section(rows, hyper))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_half_is_half(dtype: torch.dtype) -> None:
    p = projection_box_section(torch.tensor([1.0, 1.0], dtype=dtype), (0.0, 1.0, 1.0, 1.0))
    assert p.tolist() == [0.5, 0.5]


def test_corners_and_weights_of_zero() -> None:
    x = torch.tensor([0.3, 5.0, -5.0])
    assert projection_box_section(x, (0.0, 1.0, 1.0, 3.0)).tolist() == [1, 1, 1]
    assert projection_box_section(x, (0.0, 1.0, 1.0, 0.0)).tolist() == [0, 0, 0]
    unweighted = projection_box_section(x, (0.0, 1.0, torch.tensor([1.0, 0.0, 0.0]), 0.75))
    torch.testing.assert_close(unweighted, torch.tensor([0.75, 1.0, 0.0]))


def test_empty_sections_are_refused() -> None:
    with pytest.raises(ValueError, match="weighted sum"):
        projection_box_section(torch.ones(2), (0.0, 1.0, 1.0, 2.5))
    with pytest.raises(ValueError, match="lower bound exceeds .*weighted sum"):
        projection_box_section(torch.ones(2), (1.0, 0.0, 1.0, 9.0))


@pytest.mark.parametrize("increasing", [True, False])
def test_isotonic_regression(increasing: bool) -> None:
    x = torch.arange(12).double() * (0.3 if increasing else -0.3) + random(3, 12)
    p = isotonic_l2(x, increasing)
    for row, found in zip(x, p, strict=True):
        expected = isotonic_regression(row.numpy(), increasing=increasing)
        torch.testing.assert_close(found, torch.from_numpy(expected.copy()))
    torch.testing.assert_close(isotonic_l2(p, increasing), p)
    function = lambda x: isotonic_l2(x, increasing)  # noqa: E731
    assert torch.autograd.gradcheck(function, x.clone().requires_grad_(), check_forward_ad=True)
    torch.testing.assert_close(torch.func.vmap(function)(x), p)
    same = (p[0][:, None] - p[0]).abs() < 1e-12
    jacobian = torch.autograd.functional.jacobian(function, x[0])
    torch.testing.assert_close(jacobian, same.double() / same.sum(1, keepdim=True))
    assert 1 < len(p[0].unique()) < 12


def test_isotonic_regression_refuses_nan() -> None:
    with pytest.raises(ValueError, match="finite"):
        isotonic_l2(torch.tensor([1.0, torch.nan]))
