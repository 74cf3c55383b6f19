"""Optimality conditions: each gives the derivative of the solution, whichever solver found it."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from sklearn import datasets, linear_model, model_selection, preprocessing
from torch import Tensor

from lightning_hpo.functional.bilevel.implicit_differentiation import implicit_fixed_point, implicit_root
from lightning_hpo.functional.bilevel.kkt import kkt
from lightning_hpo.functional.bilevel.linear_solve import gmres, lu, neumann, normal_cg
from lightning_hpo.functional.bilevel.optimality import (
    block_proximal_gradient,
    gradient_step,
    mirror_descent,
    newton,
    projected_gradient,
    proximal_gradient,
    sgd_step,
    stationary,
)
from lightning_hpo.functional.bilevel.projections import (
    projection_kl_simplex,
    projection_non_negative,
    projection_simplex,
)
from lightning_hpo.functional.bilevel.proximal import prox_lasso

G = torch.Generator().manual_seed(0)
X = torch.randn(20, 5, dtype=torch.float64, generator=G)
Y = torch.randn(20, dtype=torch.float64, generator=G)
THETA = torch.tensor([0.5, 0.1, 2.0, 1.0, 0.3], dtype=torch.float64)
NOTHING = torch.zeros(5, dtype=torch.float64)


def fit(w: Tensor) -> Tensor:
    return (X @ w - Y).square().sum() / (2 * len(Y))


def ridge(w: Tensor, theta: Tensor) -> Tensor:
    return fit(w) + (theta * w * w).sum() / 2


def ridge_solution(init: Tensor, theta: Tensor) -> Tensor:
    return torch.linalg.solve(X.T @ X / len(Y) + torch.diag(theta), X.T @ Y / len(Y))


UNCONSTRAINED: dict[str, Callable[..., Any]] = {
    "stationary": partial(implicit_root, stationary(ridge)),
    "gradient step": partial(implicit_fixed_point, gradient_step(ridge)),
    "short gradient step": partial(implicit_fixed_point, gradient_step(ridge, 0.1)),
    "weight decay": partial(implicit_fixed_point, sgd_step(lambda w: fit(w), 0.1)),
    "newton": partial(implicit_fixed_point, newton(stationary(ridge))),
    "damped newton": partial(implicit_fixed_point, newton(stationary(ridge), 0.5, normal_cg)),
}


@pytest.mark.parametrize("name", UNCONSTRAINED)
@pytest.mark.parametrize("solve", [lu, partial(normal_cg, tol=1e-12)])
def test_unconstrained_conditions_agree_with_the_closed_form(name: str, solve: Callable[..., Any]) -> None:
    solution = UNCONSTRAINED[name](ridge_solution, solve=solve)
    expected = torch.autograd.functional.jacobian(lambda theta: ridge_solution(NOTHING, theta), THETA)
    reverse = torch.autograd.functional.jacobian(lambda theta: solution(NOTHING, theta), THETA)
    tolerance = 1e-4 if name == "damped newton" else 1e-9  # its own steps are solved to 1e-5
    assert (reverse - expected).norm() <= tolerance * expected.norm()
    v = torch.arange(5, dtype=torch.float64)
    forward = torch.func.jvp(lambda theta: solution(NOTHING, theta), (THETA,), (v,))[1]
    assert (forward - expected @ v).norm() <= tolerance * (expected @ v).norm()


def test_newton_reaches_the_root_in_one_step_of_a_quadratic_and_suits_neumann() -> None:
    step = newton(stationary(ridge))
    torch.testing.assert_close(step(NOTHING, THETA), ridge_solution(NOTHING, THETA))
    solution = implicit_fixed_point(step, ridge_solution, solve=partial(neumann, maxiter=1))  # I - dT = I
    expected = torch.func.grad(lambda theta: ridge_solution(NOTHING, theta).sum())(THETA)
    torch.testing.assert_close(torch.func.grad(lambda theta: solution(NOTHING, theta).sum())(THETA), expected)


def test_the_given_linear_solver_is_used() -> None:
    calls = []

    def solve(matvec: Callable[[Tensor], Tensor], b: Tensor, **settings: Any) -> Any:
        calls.append(b)
        return lu(matvec, b, **settings)

    theta = THETA.clone().requires_grad_()
    mapping = projected_gradient(portfolio, projection_non_negative)
    implicit_fixed_point(mapping, lambda init, hyper, theta: NOTHING, solve=solve)(None, None, theta).sum().backward()
    assert len(calls) == 1


def test_weight_decay_of_structures_and_fixed_decay() -> None:
    loss = lambda w, y: (w["a"] - y).square().sum() / 2 + w["b"].square().sum()  # noqa: E731
    w = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0])}
    decay = {"a": torch.tensor([0.5, 1.0]), "b": torch.tensor([2.0])}
    out = sgd_step(loss, 0.1)(w, decay, torch.zeros(2))
    torch.testing.assert_close(out["a"], w["a"] - 0.1 * (w["a"] + decay["a"] * w["a"]))
    torch.testing.assert_close(out["b"], w["b"] - 0.1 * (2 * w["b"] + 2 * w["b"]))
    torch.testing.assert_close(sgd_step(loss, 0.1, 0.5)(w, torch.zeros(2))["b"], torch.tensor([3 - 0.1 * (6 + 1.5)]))


# Lasso


def diabetes() -> tuple[Tensor, ...]:
    features, target = datasets.load_diabetes(return_X_y=True)
    split = model_selection.train_test_split(preprocessing.normalize(features), target, test_size=0.33, random_state=0)
    return tuple(torch.from_numpy(part) for part in split)


def squares(w: Tensor, features: Tensor, target: Tensor) -> Tensor:
    return (features @ w - target).square().sum() / (2 * len(target))


def lasso(weight: Tensor, features: Tensor, target: Tensor) -> Tensor:
    model = linear_model.Lasso(alpha=float(weight), fit_intercept=False, tol=1e-14, max_iter=1_000_000)
    return torch.from_numpy(model.fit(features.numpy(), target.numpy()).coef_)


def closed_form(w: Tensor, weight: Tensor, features: Tensor) -> Tensor:
    active = w != 0
    inside = features[:, active]
    slope = torch.zeros_like(w)
    slope[active] = -len(features) * torch.linalg.solve(inside.T @ inside, w[active].sign())
    return weight * slope  # in the logarithm of the weight


LASSO = {
    "proximal gradient": lambda X: proximal_gradient(squares, prox_lasso),
    "shorter step": lambda X: proximal_gradient(squares, prox_lasso, 0.3),
    "block": lambda X: block_proximal_gradient(squares, prox_lasso, len(X) / X.square().sum(0)),
}


@pytest.mark.parametrize("name", LASSO)
def test_lasso_of_the_diabetes_data(name: str) -> None:
    """Validation loss and hypergradient of a published example, and the closed form."""
    train, val, train_y, val_y = diabetes()
    solver = lambda init, weight, features, target: lasso(weight, features, target)  # noqa: E731
    solution = implicit_fixed_point(LASSO[name](train), solver, solve=lu)
    theta = torch.zeros((), dtype=torch.float64, requires_grad=True)
    w = solution(torch.zeros(10), theta.exp(), train, train_y)
    loss = (val @ w - val_y).square().mean()
    (gradient,) = torch.autograd.grad(loss, theta)
    assert loss.item() == pytest.approx(27214.584, abs=1e-3)
    assert gradient.item() == pytest.approx(-175.647, abs=1e-3)
    expected = closed_form(w.detach(), theta.detach().exp(), train)
    torch.testing.assert_close(
        torch.func.jvp(
            lambda t: solution(torch.zeros(10), t.exp(), train, train_y), (theta.detach(),), (torch.ones(()).double(),)
        )[1],
        expected,
        rtol=1e-6,
        atol=1e-6,
    )
    assert gradient.item() == pytest.approx((2 * (val @ w - val_y) @ (val @ expected) / len(val)).item(), rel=1e-9)


@pytest.mark.parametrize("solve", [partial(normal_cg, tol=1e-10, maxiter=500), partial(gmres, tol=1e-10)])
def test_iterative_solvers_serve_the_lasso_too(solve: Callable[..., Any]) -> None:
    train, val, train_y, val_y = diabetes()
    gradients = []
    for name in ("proximal gradient", "block"):
        solution = implicit_fixed_point(LASSO[name](train), lambda init, *theta: lasso(*theta), solve=solve)
        theta = torch.zeros((), dtype=torch.float64, requires_grad=True)
        loss = (val @ solution(torch.zeros(10), theta.exp(), train, train_y) - val_y).square().mean()
        gradients.append(torch.autograd.grad(loss, theta)[0].item())
    assert gradients == pytest.approx([-175.647, -175.647], abs=1e-3)
    assert gradients[0] == pytest.approx(gradients[1], rel=1e-6)


def test_blocks_with_rows_and_hyperparameters_of_their_own() -> None:
    objective = lambda x, y: (x - y).square().sum() / 2  # noqa: E731
    x, y = (torch.randn(4, 3, dtype=torch.float64, generator=G) for _ in range(2))
    sums, steps = torch.tensor([1.0, 2.0, 3.0, 4.0]).double(), torch.tensor([1.0, 0.5, 0.25, 2.0]).double()
    project = lambda row, total, scaling: projection_simplex(row, total)  # noqa: E731
    mapping = block_proximal_gradient(objective, project, steps, hyper_per_block=True)
    expected = projection_simplex(x - steps[:, None] * (x - y), sums)
    torch.testing.assert_close(mapping(x, sums, y), expected)
    free = block_proximal_gradient(objective, lambda row, hyper, scaling: row, steps)
    torch.testing.assert_close(free(x, None, y), x - steps[:, None] * (x - y))


# Constraints


Q = X.T @ X / len(Y) + 0.1 * torch.eye(5, dtype=torch.float64)


def portfolio(x: Tensor, theta: Tensor) -> Tensor:
    return x @ Q @ x / 2 - theta @ x


def descend(mapping: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def solver(init: Tensor, *theta: Tensor | None) -> Tensor:
        for _ in range(5000):
            init = mapping(init, *theta)
        return init

    return solver


def test_simplex_solutions_by_projected_gradient_mirror_descent_and_kkt() -> None:
    theta = torch.tensor([0.3, 0.2, 0.4, 0.3, 0.35], dtype=torch.float64)
    start = torch.full((5,), 0.2, dtype=torch.float64)
    project = projected_gradient(portfolio, projection_simplex, 0.3)
    mirror = mirror_descent(portfolio, projection_kl_simplex)
    total = torch.ones((), dtype=torch.float64)
    x = descend(project)(start, total, theta)
    assert (x > 0.01).all()  # the mirror's logarithm needs an interior solution

    def by_elimination(theta: Tensor, total: Tensor) -> Tensor:
        ones = torch.ones(5, dtype=torch.float64)
        free, along = torch.linalg.solve(Q, theta), torch.linalg.solve(Q, ones)
        return free - along * (free.sum() - total) / along.sum()

    torch.testing.assert_close(x, by_elimination(theta, total))
    expected = torch.autograd.functional.jacobian(by_elimination, (theta, total))
    fixed = lambda init, total, theta: x  # noqa: E731
    for mapping in (project, mirror):  # the mirror's derivative, though projected gradient found the solution
        solution = implicit_fixed_point(mapping, fixed, solve=lu)
        found = torch.autograd.functional.jacobian(lambda t, s: solution(start, s, t), (theta, total))  # noqa: B023
        torch.testing.assert_close(found, expected)

    F = kkt(lambda z, theta, total: portfolio(z, theta), equality=lambda z, theta, total: z.sum() - total)
    multiplier = (theta - Q @ x).mean()
    solution = implicit_root(F, lambda init, *theta: (x, multiplier), solve=lu)
    found = torch.autograd.functional.jacobian(lambda t, s: solution(None, t, s)[0], (theta, total))
    torch.testing.assert_close(found, expected)


def test_a_mirror_step_multiplies_by_the_exponential_of_the_descent() -> None:
    x = torch.tensor([0.1, 0.2, 0.3, 0.25, 0.15], dtype=torch.float64)
    weights = x * torch.exp(-0.4 * (Q @ x - THETA))
    mapping = mirror_descent(portfolio, projection_kl_simplex, step=0.4)
    torch.testing.assert_close(mapping(x, None, THETA), weights / weights.sum())


def test_active_and_inactive_inequalities() -> None:
    """A non-negative quadratic program: KKT conditions and projected gradient give the solution on the support."""
    theta = torch.tensor([0.3, -0.9, 0.4, -0.7, 0.5], dtype=torch.float64)
    project = projected_gradient(portfolio, projection_non_negative, 0.3)
    x = descend(project)(NOTHING, None, theta)
    support = x > 0
    assert 0 < support.sum() < 5
    expected = torch.zeros(5, 5, dtype=torch.float64)
    expected[torch.outer(support, support)] = torch.linalg.inv(Q[support][:, support]).flatten()
    solution = implicit_fixed_point(project, lambda init, hyper, theta: x, solve=lu)
    found = torch.autograd.functional.jacobian(lambda t: solution(NOTHING, None, t), theta)
    torch.testing.assert_close(found, expected)
    F = kkt(portfolio, inequality=lambda z, theta: -z)
    for solve in (lu, partial(normal_cg, tol=1e-12)):
        root = implicit_root(F, lambda init, theta: (x, Q @ x - theta), solve=solve)
        found = torch.autograd.functional.jacobian(lambda t: root(None, t)[0], theta)  # noqa: B023
        torch.testing.assert_close(found, expected)
        multipliers = torch.autograd.functional.jacobian(lambda t: root(None, t)[1], theta)  # noqa: B023
        torch.testing.assert_close(multipliers, (Q @ expected - torch.eye(5).double()) * ~support[:, None])


def test_kkt_of_a_problem_with_both_kinds_of_constraints_holds_at_its_solution() -> None:
    F = kkt(portfolio, lambda z, theta: z[:1] - 2, lambda z, theta: torch.stack([z[1] - 1, -z[2]]))
    z, nu, lam = (torch.randn(size, dtype=torch.float64, generator=G) for size in (5, 1, 2))
    stationarity, equal, slack = F((z, nu, lam), THETA)
    torch.testing.assert_close(
        stationarity, Q @ z - THETA + torch.stack([nu[0], lam[0], -lam[1], *torch.zeros(2).double()])
    )
    torch.testing.assert_close(equal, z[:1] - 2)
    torch.testing.assert_close(slack, lam * torch.stack([z[1] - 1, -z[2]]))


def test_degenerate_active_sets_are_singular_and_say_so() -> None:
    F = kkt(lambda z, theta: (z - theta).square().sum() / 2, inequality=lambda z, theta: -z)
    theta = torch.zeros(1, requires_grad=True)
    at_the_kink = lambda init, theta: (torch.zeros(1), torch.zeros(1))  # noqa: E731
    with pytest.raises(ValueError, match="singular; add a ridge or use normal_cg"):
        implicit_root(F, at_the_kink, solve=lu)(None, theta)[0].backward()


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="without any use stationary"):
        kkt(portfolio)
    with pytest.raises(ValueError, match="primal variable and 1 multipliers, got a tuple of 3"):
        kkt(portfolio, lambda z, theta: z)((NOTHING,) * 3, THETA)
    with pytest.raises(ValueError, match="value of the mapping G must have the shapes"):
        newton(lambda x, theta: x.sum())(NOTHING, THETA)
