"""Best responses against their closed forms: perturbations, encodings, and the ridge regression of the paper."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from lightning_hpo.functional.bilevel.best_response import (
    encode,
    encoded_size,
    encoding_direction,
    entropy,
    linearized,
    perturbed,
    structured,
)


def test_perturbations_have_their_scale():
    scale = torch.tensor([0.3, 2.0]).expm1().log()  # softplus of it
    noise = torch.randn(40_000, 2, generator=torch.Generator().manual_seed(0))
    rows = perturbed(torch.tensor([1.0, -3.0]), scale, noise)
    torch.testing.assert_close(rows.mean(0), torch.tensor([1.0, -3.0]), atol=0.03, rtol=0)
    torch.testing.assert_close(rows.std(0), torch.tensor([0.3, 2.0]), rtol=0.02, atol=0)


@pytest.mark.parametrize("low", [-3.0, -40.0])
def test_entropy_is_that_of_normal_distributions(low):
    scale = torch.tensor([low, 0.7, 30.0], dtype=torch.float64, requires_grad=True)
    normal = torch.distributions.Normal(torch.zeros(3).double(), F.softplus(scale))
    torch.testing.assert_close(entropy(scale), normal.entropy().sum())
    (found,) = torch.autograd.grad(entropy(scale), scale)
    torch.testing.assert_close(found, torch.sigmoid(scale) / F.softplus(scale))  # towards wider ones


def test_entropy_of_hardly_any_perturbation_is_finite():
    scale = torch.tensor([-200.0], requires_grad=True)
    value = entropy(scale)
    value.backward()
    assert value.item() == pytest.approx(-200 + 0.5 * math.log(2 * math.pi * math.e), rel=1e-5)
    assert scale.grad.item() == pytest.approx(1.0)


def test_the_encoding_has_one_length_and_tells_values_apart():
    raw = torch.linspace(-30, 30, 7).double()[:, None] * torch.tensor([1.0, -0.3, 0.1]).double()
    encoded = encode(raw)
    torch.testing.assert_close(encoded.norm(dim=-1), torch.full((7,), 3**0.5).double(), rtol=1e-7, atol=0)
    assert encoded.shape[-1] == encoded_size(3) == 6
    assert torch.pdist(encoded).min() > 0.01
    assert torch.equal(encode(raw, "identity"), raw)
    assert (encode(torch.tensor([-100.0])) - torch.tensor([1.0, 0.0])).abs().max() < 1e-6  # cosines first
    with pytest.raises(ValueError, match="encoding must be 'cos_sin' or 'identity', got 'fourier'"):
        encoding_direction(raw[0], raw, "fourier")


@pytest.mark.parametrize("encoding", ["cos_sin", "identity"])
def test_the_direction_is_the_derivative_of_the_encoding(encoding):
    torch.manual_seed(0)
    raw, delta = torch.randn(3).double(), torch.randn(4, 3).double()
    step = 1e-6
    numeric = (encode(raw + step * delta, encoding) - encode(raw - step * delta, encoding)) / (2 * step)
    torch.testing.assert_close(encoding_direction(raw, delta, encoding), numeric, rtol=1e-7, atol=1e-9)


def test_linearised_is_value_and_slope():
    torch.manual_seed(0)
    weight = torch.randn(3, 2).double().requires_grad_()
    point, delta = torch.randn(2).double(), torch.randn(2).double()

    def function(h):
        return (weight @ h).tanh()

    step = 1e-6
    slope = (function(point + step * delta) - function(point - step * delta)) / (2 * step)
    found = linearized(function, point, delta)
    torch.testing.assert_close(found, function(point) + slope, rtol=1e-8, atol=1e-8)
    assert torch.autograd.gradcheck(
        lambda w: linearized(lambda h: (w @ h).tanh(), point, delta), (weight,)
    )  # what the response learns from


# Ridge regression: f = |X w - y|^2 / 2n + exp(l) |w|^2 / 2, the response w0 + theta (l_i - l), as large as it can be.

LOG_L2 = torch.tensor(-1.0, dtype=torch.float64)


def ridge():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(12, 4, generator=generator, dtype=torch.float64)
    y = x @ torch.tensor([1.0, -2.0, 0.5, 0.0], dtype=torch.float64) + torch.randn(12, generator=generator).double()
    hessian = x.T @ x / len(x)
    general = torch.linalg.solve(hessian + LOG_L2.exp() * torch.eye(4).double(), x.T @ y / len(x))
    return x, y, hessian, general


def best_response(hessian, general, sigma):
    """What Δ-STN's objective is least for."""
    l2 = (LOG_L2 + sigma**2 / 2).exp()
    return torch.linalg.solve(hessian + l2 * (1 + sigma**2) * torch.eye(4).double(), -l2 * general)


@pytest.mark.parametrize("sigma", [0.3, 1.0])
def test_the_best_response_of_ridge_regression(sigma):
    """The objective itself, with quadrature in place of chance; it is quadratic in the response."""
    x, y, hessian, general = ridge()
    nodes, weights = (torch.from_numpy(part) for part in np.polynomial.hermite_e.hermegauss(40))
    weights = weights / weights.sum()
    scale = torch.tensor([sigma], dtype=torch.float64).expm1().log()
    raw = perturbed(LOG_L2.view(1), scale, nodes[:, None])
    delta = raw - LOG_L2

    def objective(theta):
        # One output whose weights differ between rows; each row sees all the data.
        rows, gates = x.repeat(len(raw), 1), delta.repeat_interleave(len(x), 0)
        predicted = structured(rows, F.linear, (general[None], None), (theta[None], None), (gates, None))
        losses = (predicted.view(len(raw), -1) - y).square().mean(1) / 2
        return (weights * (losses + raw[:, 0].exp() * (general + delta * theta).square().sum(1) / 2)).sum()

    zero = torch.zeros(4, dtype=torch.float64)
    theta = torch.linalg.solve(torch.func.hessian(objective)(zero), -torch.func.grad(objective)(zero))
    torch.testing.assert_close(theta, best_response(hessian, general, sigma), rtol=1e-8, atol=1e-10)


def test_the_best_response_tends_to_the_implicit_derivative():
    _, _, hessian, general = ridge()
    implicit = torch.linalg.solve(hessian + LOG_L2.exp() * torch.eye(4).double(), -LOG_L2.exp() * general)
    near = [(best_response(hessian, general, s) - implicit).norm() / implicit.norm() for s in (0.2, 0.1, 1e-4)]
    assert near[0] / near[1] == pytest.approx(4, rel=0.05)  # the square of the perturbation
    assert near[2] < 1e-7
