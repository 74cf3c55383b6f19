"""The ridge of a multiclass support vector machine, through conditions that its solver does not iterate."""

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from lightning_hpo.functional.bilevel.implicit_differentiation import implicit_fixed_point
from lightning_hpo.functional.bilevel.linear_solve import lu
from lightning_hpo.functional.bilevel.optimality import block_proximal_gradient, projected_gradient
from lightning_hpo.functional.bilevel.projections import projection_simplex

LOG_RIDGE = torch.tensor(3.5, dtype=torch.float64)


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    images, labels = load_digits(n_class=3, return_X_y=True)
    X, Y = torch.from_numpy(images) / 16, torch.nn.functional.one_hot(torch.from_numpy(labels)).double()
    return X[:20], Y[:20], X[20:120], Y[20:120]


X, Y, X_VAL, Y_VAL = digits()


def dual(beta: Tensor, ridge: Tensor) -> Tensor:
    """The problem of Crammer and Singer: one row of beta on the simplex for each sample."""
    return (X.T @ (Y - beta)).square().sum() / (2 * ridge) + (beta * (Y - 1)).sum()


def weights(beta: Tensor, ridge: Tensor) -> Tensor:
    return X.T @ (Y - beta) / ridge


def solver(init: Tensor, hyper: Tensor | None, ridge: Tensor) -> Tensor:
    """Accelerated projected gradient."""
    step = float(ridge) / float(torch.linalg.matrix_norm(X, 2) ** 2)
    beta = ahead = init
    for count in range(20_000):
        new = projection_simplex(ahead - step * (Y - 1 - X @ weights(ahead, ridge)))
        ahead, beta = new + count / (count + 3) * (new - beta), new
    return beta


def outer(beta: Tensor, ridge: Tensor) -> Tensor:
    return (X_VAL @ weights(beta, ridge) - Y_VAL).square().sum() / 2


@pytest.mark.parametrize("name", ["projected gradient", "block"])
def test_hypergradient_of_the_ridge_is_the_slope_of_the_validation_loss(name: str) -> None:
    start = torch.full_like(Y, 1 / 3)
    total = torch.ones((), dtype=torch.float64)
    if name == "block":  # a block is a sample, with the step size of its own curvature
        steps = LOG_RIDGE.exp() / X.square().sum(1)
        mapping = block_proximal_gradient(dual, lambda row, total, scaling: projection_simplex(row, total), steps)
    else:
        mapping = projected_gradient(dual, projection_simplex)
    found = solver(start, total, LOG_RIDGE.exp())
    torch.testing.assert_close(mapping(found, total, LOG_RIDGE.exp()), found, rtol=1e-8, atol=1e-8)

    log_ridge = LOG_RIDGE.clone().requires_grad_()
    solution = implicit_fixed_point(mapping, lambda *_: found, solve=lu)
    beta = solution(start, total, log_ridge.exp())
    (slope,) = torch.autograd.grad(outer(beta, log_ridge.exp()), log_ridge)
    ends = [(LOG_RIDGE + shift).exp() for shift in (1e-4, -1e-4)]
    above, below = (outer(solver(found, None, ridge), ridge) for ridge in ends)
    torch.testing.assert_close(slope, (above - below) / 2e-4, rtol=1e-5, atol=1e-5)
    assert abs(slope) > 1e-2
