"""Denoising: formulas against slow twins, derivatives against differences, bounds on curvature that hold."""

import math

import pytest
import torch

from lightning_hpo.functional.bilevel.denoising import (
    FieldOfExperts,
    TotalVariation,
    cosine_filters,
    denoising_loss,
    denoising_problem,
    reconstruction_loss,
)
from lightning_hpo.functional.bilevel.lower_derivatives import LowerDerivatives
from lightning_hpo.functional.bilevel.lower_solvers import fista, lbfgs
from lightning_hpo.functional.bilevel.maid import MAID

generator = torch.Generator().manual_seed(0)


def draw(*shape):
    return torch.randn(shape, generator=generator, dtype=torch.float64)


EXPERTS = FieldOfExperts(count=5, size=3)
CASES = {
    "tv": (TotalVariation(), torch.tensor([-1.0, -2.0], dtype=torch.float64)),
    "experts": (EXPERTS, EXPERTS.start(-1.0, -2.0, torch.float64) + 0.1 * draw(EXPERTS.parameters)),
    "free": (
        FieldOfExperts(count=4, size=4, free=True),
        FieldOfExperts(count=4, size=4, free=True).start(-1.0, -2.0, torch.float64) + 0.1 * draw(1 + 4 * 18),
    ),
}
cases = pytest.mark.parametrize(("regularizer", "theta"), CASES.values(), ids=CASES)


def slow_variation(x, theta):
    total = 0.0
    for i in range(x.shape[0]):
        for j in range(x.shape[1]):
            down = x[i + 1, j] - x[i, j] if i + 1 < x.shape[0] else 0.0
            right = x[i, j + 1] - x[i, j] if j + 1 < x.shape[1] else 0.0
            total += math.sqrt(down**2 + right**2 + math.exp(theta[1]) ** 2)
    return math.exp(theta[0]) * total


def slow_experts(x, regularizer, theta):
    weights, smoothings, filters = regularizer.experts(theta)
    total, size = 0.0, regularizer.size
    for weight, smoothing, kernel in zip(weights, smoothings, filters, strict=True):
        for i in range(x.shape[0] - size + 1):
            for j in range(x.shape[1] - size + 1):
                answer = (kernel * x[i : i + size, j : j + size]).sum()
                total += weight * (answer**2 + smoothing**2).sqrt()
    return total


@cases
def test_values_are_those_of_the_formula(regularizer, theta):
    x = draw(2, 6, 5)
    for found, image in zip(regularizer(x, theta), x, strict=True):
        tv = isinstance(regularizer, TotalVariation)
        expected = slow_variation(image, theta) if tv else slow_experts(image, regularizer, theta)
        assert float(found) == pytest.approx(float(expected), rel=1e-12)


def test_parameters_are_in_the_order_that_is_documented():
    experts = FieldOfExperts(count=2, size=2)
    theta = torch.arange(float(experts.parameters), dtype=torch.float64) / 10
    weights, smoothings, filters = experts.experts(theta)
    torch.testing.assert_close(weights.log(), theta[:2])
    torch.testing.assert_close(smoothings.log(), theta[2:4])
    basis = cosine_filters(2)[1:]
    torch.testing.assert_close(filters[1], sum(theta[7 + j] * basis[j] for j in range(3)))
    free = FieldOfExperts(count=2, size=2, free=True)
    theta = torch.arange(float(free.parameters), dtype=torch.float64) / 10
    weights, _, filters = free.experts(theta)
    torch.testing.assert_close(weights.log(), theta[0] + theta[1:3])
    torch.testing.assert_close(filters[0], sum(theta[5 + j] * cosine_filters(2)[j] for j in range(4)))


@pytest.mark.parametrize("size", [2, 3, 5, 7])
def test_cosine_filters(size):
    filters = cosine_filters(size).flatten(1)
    products = filters @ filters.T
    torch.testing.assert_close(products, products.diagonal().diag())
    torch.testing.assert_close(filters[1:].sum(1), torch.zeros(size**2 - 1).double(), atol=1e-12, rtol=0)
    assert products.diagonal()[1:].mean().item() == pytest.approx(1.0)
    at = torch.arange(size, dtype=torch.float64)  # one that goes twice as fast along the rows is twice as long
    rows = torch.cos(math.pi / size * (at + 0.5))[:, None].expand(size, size).flatten()
    slow = max(range(1, 3), key=lambda k: (filters[k] @ rows).abs().item())
    if size > 2:
        lengths = products.diagonal().sqrt()
        twice = torch.cos(2 * math.pi / size * (at + 0.5))[:, None].expand(size, size).flatten()
        fast = max(range(1, size**2), key=lambda k: (filters[k] @ twice).abs().item() / lengths[k].item())
        assert (lengths[fast] / lengths[slow]).item() == pytest.approx(2.0)


@cases
def test_gradients_and_products_against_differences(regularizer, theta):
    x, noisy, p, v = draw(2, 7, 6), draw(2, 7, 6), draw(84), draw(len(theta))
    problem = denoising_problem(noisy, noisy, regularizer).lower
    step = 1e-6

    def slope(x, theta):
        return problem.gradient(x, theta).flatten()

    def value(x):
        return denoising_loss(x, theta, noisy, regularizer).sum()

    along = p.view_as(x)
    numeric = (value(x + step * along) - value(x - step * along)) / (2 * step)
    torch.testing.assert_close(slope(x, theta) @ p, numeric, rtol=1e-7, atol=1e-7)
    at = LowerDerivatives(problem, x, theta)
    numeric = (slope(x + step * along, theta) - slope(x - step * along, theta)) / (2 * step)
    torch.testing.assert_close(at.hessian(p), numeric, rtol=1e-6, atol=1e-7)
    numeric = (slope(x, theta + step * v) - slope(x, theta - step * v)) / (2 * step)
    torch.testing.assert_close(at.push_cross(v), numeric, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(at.cross(p) @ v, p @ at.push_cross(v), rtol=1e-10, atol=1e-12)


@cases
@pytest.mark.parametrize("spread", [0.0, 0.05, 1.0])
def test_curvature_lies_between_the_bounds(regularizer, theta, spread):
    x = spread * draw(1, 14, 13)
    problem = denoising_problem(x, x, regularizer).lower
    at = LowerDerivatives(problem, x, theta)
    hessian = torch.stack([at.hessian(row) for row in torch.eye(x.numel(), dtype=torch.float64)])
    values = torch.linalg.eigvalsh(hessian)
    assert values[0] >= problem.modulus(theta).item() * (1 - 1e-12)
    assert values[-1] <= problem.lipschitz(theta).item() * (1 + 1e-12)
    if spread == 0.0:  # nothing but smoothing is left of the roots: the bounds are met up to the image's border
        assert values[-1] > 0.75 * problem.lipschitz(theta).item()


@pytest.mark.parametrize("size", [2, 5, 9])
def test_the_spectrum_between_grid_points_is_below_the_bound(size):
    experts = FieldOfExperts(count=3, size=size)
    theta = draw(experts.parameters)
    weights, smoothings, filters = experts.experts(theta)
    fine = torch.fft.rfft2(filters, s=(1999, 1999)).abs().square()  # a prime: other frequencies than the bound's
    largest = ((weights / smoothings)[:, None, None] * fine).sum(0).max()
    assert largest <= experts.smoothness(theta) <= 1.2 * largest


def test_convolution_and_its_adjoint_fit_together():
    """The gradient of the sum of roots is the adjoint filter bank of the weighted answers."""
    x, theta = draw(1, 6, 6), CASES["experts"][1]
    weights, smoothings, filters = EXPERTS.experts(theta)
    leaf = x.clone().requires_grad_()
    (found,) = torch.autograd.grad(EXPERTS(leaf, theta).sum(), leaf)
    expected = torch.zeros_like(x[0])
    for w, nu, kernel in zip(weights, smoothings, filters, strict=True):
        for i in range(4):
            for j in range(4):
                answer = (kernel * x[0, i : i + 3, j : j + 3]).sum()
                expected[i : i + 3, j : j + 3] += w * answer / (answer**2 + nu**2).sqrt() * kernel
    torch.testing.assert_close(found[0], expected)


@cases
def test_flat_images_stay_where_they_are(regularizer, theta):
    flat = torch.full((1, 8, 8), 0.4, dtype=torch.float64)
    found = fista(denoising_problem(flat, flat, regularizer).lower, theta, flat, 1e-8)
    free = getattr(regularizer, "free", False)
    assert (torch.allclose(found.x, flat) and not found.iterations) != free


@pytest.mark.parametrize("solver", [fista, lbfgs])
@cases
def test_images_are_denoised_one_by_one(regularizer, theta, solver):
    noisy = draw(3, 8, 8)
    together = solver(denoising_problem(noisy, noisy, regularizer).lower, theta, noisy, 1e-6)
    assert (together.error <= 1e-6).all()
    for i in range(3):
        one = noisy[i : i + 1]
        alone = solver(denoising_problem(one, one, regularizer).lower, theta, one, 1e-6)
        assert torch.linalg.vector_norm(together.x[i] - alone.x[0]) <= 2e-6


def test_maid_finds_the_best_total_variation():
    """Against a fine grid around what it found, and with the hypergradient as the slope of the exact loss."""
    clean = torch.zeros(2, 12, 12, dtype=torch.float64)
    clean[0, :, 6:], clean[1, 4:8, 4:8] = 1.0, 0.5
    noisy = clean + 0.1 * draw(2, 12, 12)
    problem = denoising_problem(noisy, clean, TotalVariation())

    def exact(theta):
        return problem.upper_at(lbfgs(problem.lower, theta, noisy, 1e-9).x).values.mean().item()

    end = MAID(problem, tolerance=1e-4, bounds=(-5.0, 1.0)).run(noisy.new_tensor([-3.0, -3.0]), noisy, max_steps=60)
    value = exact(end.theta)
    assert end.lower - 1e-9 <= value <= end.upper + 1e-9
    assert value < 0.25 * reconstruction_loss(noisy, clean).mean().item()
    for step in ([0.1, 0.0], [-0.1, 0.0], [0.0, 0.3]):
        assert exact(end.theta + noisy.new_tensor(step)) > value


def test_experts_learn_more_than_total_variation_of_stripes():
    """Along a diagonal nothing changes: filters can learn that, a total variation knows no directions."""
    at = torch.arange(16, dtype=torch.float64)
    clean = ((at[:, None] + at) / 1.5).sin()[None] / 2
    noisy = clean + 0.2 * draw(1, 16, 16)
    start = clean.new_full((2,), -3.0)
    tv = MAID(denoising_problem(noisy, clean, TotalVariation()), alpha0=0.1).run(start, noisy, max_steps=10)
    experts = FieldOfExperts(count=8, size=3)
    settings = {"bb_init": True, "nonmonotone": True, "alpha0": 0.1, "solver": lbfgs}
    theta = experts.start(-3.0, -3.0, torch.float64)
    end = MAID(denoising_problem(noisy, clean, experts), **settings).run(theta, noisy, max_steps=15)
    assert end.upper < 0.7 * tv.lower


def test_what_is_refused():
    with pytest.raises(ValueError, match="count must be at least 1, got 0; size must be at least 2, got 1"):
        FieldOfExperts(0, 1)
    with pytest.raises(ValueError, match="8 cosine filters of size 3, not 9"):
        FieldOfExperts(9, 3).start()
    with pytest.raises(ValueError, match=r"theta must have shape \(50,\), got \(3,\)"):
        EXPERTS.experts(torch.zeros(3))
    with pytest.raises(ValueError, match="at least 3 pixels"):
        EXPERTS(torch.zeros(1, 2, 9), EXPERTS.start())
    with pytest.raises(ValueError, match=r"must both have shape .* got \(3, 3\), \(1, 3, 3\)"):
        denoising_problem(torch.zeros(3, 3), torch.zeros(1, 3, 3), TotalVariation())
