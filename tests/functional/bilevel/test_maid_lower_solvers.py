"""Lower solves: the error they report is never below the true one, and momentum is what it should be."""

from functools import partial

import pytest
import torch
from torch.nn import functional as F

from lightning_hpo.functional.bilevel.lower_problem import LowerProblem
from lightning_hpo.functional.bilevel.lower_solvers import fista, gradient_descent, lbfgs, proximal_gradient
from lightning_hpo.functional.bilevel.proximal import prox_lasso

SOLVERS = {"fista": fista, "lbfgs": lbfgs, "gradient_descent": gradient_descent}
solvers = pytest.mark.parametrize("solve", SOLVERS.values(), ids=SOLVERS)


def quadratic(seed, size=6, condition=50.0):
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]
    scales = torch.logspace(0, torch.tensor(condition).log10().item(), size, dtype=torch.float64)
    matrix = basis @ torch.diag(scales) @ basis.T
    shift = torch.randn(size, generator=generator, dtype=torch.float64)
    problem = LowerProblem(
        lambda x, theta: 0.5 * x @ matrix @ x - x @ (shift + theta), mu=1.0, smoothness=condition + 1e-9
    )
    return problem, lambda theta: torch.linalg.solve(matrix, shift + theta), generator


def logistic(seed):
    generator = torch.Generator().manual_seed(seed)
    data = torch.randn(40, 5, generator=generator, dtype=torch.float64)
    labels = (torch.rand(40, generator=generator) < 0.5).double()
    bound = torch.linalg.eigvalsh(data.T @ data / 40)[-1].item() / 4
    problem = LowerProblem(
        lambda w, theta: F.binary_cross_entropy_with_logits(data @ w, labels) + 0.5 * (theta.exp() * w * w).sum(),
        mu=lambda theta: theta.exp().min(),
        smoothness=lambda theta: bound + theta.exp().max(),
    )

    def newton(theta):
        w = torch.zeros(5, dtype=torch.float64)
        for _ in range(60):
            p = torch.sigmoid(data @ w)
            slope = data.T @ (p - labels) / 40 + theta.exp() * w
            curvature = data.T @ torch.diag(p * (1 - p)) @ data / 40 + torch.diag(theta.exp())
            w = w - torch.linalg.solve(curvature, slope)
        return w

    return problem, newton, generator


@pytest.mark.parametrize("make", [quadratic, logistic])
@solvers
def test_the_error_is_certain(solve, make):
    violations, ratios = 0, []
    for seed in range(25):
        problem, exact, generator = make(seed)
        solution = exact(theta := torch.randn(6 if make is quadratic else 5, generator=generator).double())
        for tol in (1e-1, 1e-4, 1e-8):
            found = solve(problem, theta, torch.randn(len(theta), generator=generator).double(), tol)
            distance = (found.x - solution).norm().item()
            assert found.status == "converged"
            assert found.error.item() <= tol
            violations += distance > found.error.item() * (1 + 1e-9) + 1e-14
            ratios.append(distance / found.error.item())
            reached = problem.gradient(found.x, theta).norm() / problem.modulus(theta)
            torch.testing.assert_close(found.error, reached, rtol=1e-6, atol=1e-15)
    assert violations == 0
    assert max(ratios) > 0.01, "a certificate that says nothing"


def test_momentum_pays():
    """Within fifty times the root of the condition number, and ten times fewer than without momentum."""
    scales = torch.logspace(0, 4, 30, dtype=torch.float64)
    problem = LowerProblem(lambda x, theta: (scales * (x - 1) ** 2).sum() / 2, mu=1.0, smoothness=1e4)
    theta, x = torch.zeros(()), torch.zeros(30, dtype=torch.float64)
    tol = 1e-8 * problem.gradient(x, theta).norm().item()
    fast = fista(problem, theta, x, tol, maxiter=50 * 100)
    slow = gradient_descent(problem, theta, x, tol, maxiter=10 * fast.iterations)
    assert fast.status == "converged"
    assert fast.iterations <= 50 * 100
    assert slow.status == "maxiter"
    assert lbfgs(problem, theta, x, tol).iterations < fast.iterations


def test_the_first_steps_are_those_of_the_formulas():
    scales = torch.tensor([1.0, 7.0], dtype=torch.float64)
    problem = LowerProblem(lambda x, theta: (scales * x * x).sum() / 2, mu=1.0, smoothness=7.0)
    points, t = [torch.tensor([3.0, 2.0], dtype=torch.float64)] * 2, 0.0
    for _ in range(12):
        q = 1 / 7
        new = (1 - q * t**2 + ((1 - q * t**2) ** 2 + 4 * t**2) ** 0.5) / 2
        beta = (t - 1) / new * (1 - new * q) / (1 - q)
        z = points[-1] + beta * (points[-1] - points[-2])
        points, t = [points[-1], z - scales * z / 7], new
    found = fista(problem, torch.zeros(()), torch.tensor([3.0, 2.0], dtype=torch.float64), 1e-12, maxiter=11)
    assert found.status == "maxiter"
    torch.testing.assert_close(found.x, z, rtol=1e-12, atol=0)


@pytest.mark.parametrize("solve", [fista, gradient_descent, lbfgs], ids=["fista", "gradient_descent", "lbfgs"])
def test_batched_problems_do_not_know_of_each_other(solve):
    generator = torch.Generator().manual_seed(3)
    scales = 1 + 20 * torch.rand(4, 3, 2, generator=generator, dtype=torch.float64)
    goals = torch.randn(4, 3, 2, generator=generator, dtype=torch.float64)

    def make(part, batched):
        losses = lambda x, theta: (scales[part] * (x - theta * goals[part]) ** 2 / 2).flatten(-2).sum(-1)  # noqa: E731
        bounds = {"mu": scales[part].flatten(-2).amin(-1), "smoothness": scales[part].flatten(-2).amax(-1)}
        return LowerProblem(losses, **{n: (lambda theta, b=b: b) for n, b in bounds.items()}, batched=batched)

    theta, x = torch.tensor(2.0, dtype=torch.float64), torch.zeros(4, 3, 2, dtype=torch.float64)
    together = solve(make(slice(None), True), theta, x, 1e-6)
    assert together.error.shape == (4,)
    alone = [solve(make(i, False), theta, x[i], 1e-6) for i in range(4)]
    torch.testing.assert_close(together.x, torch.stack([found.x for found in alone]), rtol=0, atol=1e-14)
    torch.testing.assert_close(together.error, torch.cat([found.error for found in alone]), rtol=1e-6, atol=0)
    assert together.iterations == max(found.iterations for found in alone) or solve is lbfgs
    assert bool(((together.x - theta * goals).flatten(1).norm(dim=1) <= together.error * (1 + 1e-9)).all())


def test_how_often_the_host_looks_changes_nothing():
    problem, _, generator = quadratic(0)
    theta, x = torch.zeros(6, dtype=torch.float64), torch.randn(6, generator=generator).double()
    often, seldom = fista(problem, theta, x, 1e-6), fista(problem, theta, x, 1e-6, check_every=7)
    assert torch.equal(often.x, seldom.x)
    assert torch.equal(often.error, seldom.error)


def test_proximal_gradient_with_kinks():
    """Elastic net: zeros are found exactly, and the certificate bounds the distance there, too."""
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(30, 8, generator=generator, dtype=torch.float64)
    target = data[:, 0] - 2 * data[:, 1] + 0.1 * torch.randn(30, generator=generator).double()
    curvature = data.T @ data / 30
    problem = LowerProblem(
        lambda x, theta: (data @ x - target).square().mean() / 2 + 0.05 * x.square().sum(),
        mu=torch.linalg.eigvalsh(curvature)[0].item() + 0.1,
        smoothness=torch.linalg.eigvalsh(curvature)[-1].item() + 0.1,
        prox=lambda x, theta, step: prox_lasso(x, theta, step),
    )
    theta, x = torch.tensor(0.3, dtype=torch.float64), torch.zeros(8, dtype=torch.float64)
    exact = proximal_gradient(problem, theta, x, 1e-13).x
    assert 0 < (exact == 0).sum() < 8
    slope = problem.smooth_gradient(exact, theta)
    assert bool((slope[exact == 0].abs() <= 0.3 + 1e-9).all())
    torch.testing.assert_close(slope[exact != 0], -0.3 * exact[exact != 0].sign(), rtol=0, atol=1e-10)
    for tol in (1.0, 1e-2, 1e-5):
        found = proximal_gradient(problem, theta, x, tol)
        assert (found.x - exact).norm() <= found.error.item() <= tol
        assert found.iterations >= 1


def test_proximal_gradient_treats_stiff_penalties_as_cheap():
    """A ridge of 1e6 on one coordinate costs nothing where its prox is known."""
    weights = torch.tensor([1.0, 1e6], dtype=torch.float64)
    parts = {
        "loss": lambda x, theta: (x - 1).square().sum() / 2,
        "penalty": lambda x, theta: (weights * x * x).sum() / 2,
        "prox": lambda x, theta, step: x / (1 + step * weights),
    }
    problem = LowerProblem(**parts, mu=2.0, smoothness=1.0)
    start = torch.zeros(2, dtype=torch.float64)
    found = proximal_gradient(problem, torch.zeros(()), start, 1e-6)
    torch.testing.assert_close(found.x, 1 / (1 + weights), rtol=1e-6, atol=1e-9)
    assert found.iterations < 5
    again = proximal_gradient(problem, torch.zeros(()), found.x, 1e-6)
    assert again.iterations == 0
    assert torch.equal(again.x, found.x)
    batched = LowerProblem(
        lambda x, theta: (x - 1).square().sum(1) / 2,
        penalty=lambda x, theta: (weights * x * x).sum(1) / 2,
        prox=parts["prox"],
        mu=2.0,
        smoothness=1.0,
        batched=True,
    )
    two = proximal_gradient(batched, torch.zeros(()), torch.stack([start, start]), 1e-6)
    torch.testing.assert_close(two.x, torch.stack([found.x, found.x]))


@pytest.mark.parametrize("solve", [fista, lbfgs], ids=["fista", "lbfgs"])
def test_what_is_not_finite_is_said(solve):
    problem = LowerProblem(lambda x, theta: (x - theta).square().sum() * float("nan"), mu=1.0, smoothness=1.0)
    assert solve(problem, torch.zeros(()), torch.ones(2), 1e-3).status == "not_finite"


def test_a_smoothness_that_is_too_small_ends_in_overflow_or_at_the_cap():
    problem = LowerProblem(lambda x, theta: 50 * x.square().sum(), mu=1.0, smoothness=10.0)
    found = fista(problem, torch.zeros(()), torch.ones(2, dtype=torch.float64), 1e-6)
    assert found.status == "not_finite"
    assert not bool((found.error <= 1e-6).any())


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: LowerProblem(lambda x, t: x.sum(), mu=None), "modulus of strong convexity.*missing.*ridge"),
        (lambda: LowerProblem(lambda x, t: x.sum(), 1.0, penalty=lambda x, t: x.sum()), "needs its prox"),
        (lambda: LowerProblem(lambda x, t: x.sum(), mu=-1.0).modulus(torch.zeros(())), "got -1.*ridge"),
        (lambda: LowerProblem(lambda x, t: x.sum(), mu=lambda t: t).modulus(torch.zeros(())), "got 0"),
        (lambda: LowerProblem(lambda x, t: x.sum(), mu=torch.ones(3)).modulus(torch.zeros(()), 2), "each of 2"),
        (lambda: LowerProblem(lambda x, t: x.sum(), 1.0).lipschitz(torch.zeros(())), "give `smoothness`"),
        (lambda: LowerProblem(lambda x, t: x.sum(), 1.0, -1.0).lipschitz(torch.zeros(())), "smoothness must"),
        (lambda: LowerProblem(lambda x, t: x, 1.0).gradient(torch.ones(2), torch.zeros(())), "scalar"),
        (
            lambda: LowerProblem(lambda x, t: x.sum(), 1.0, batched=True).gradient(torch.ones(2, 1), torch.ones(1)),
            r"\(2,\)",
        ),
        (
            lambda: LowerProblem(lambda x, t: t.sum(), 1.0).gradient(torch.ones(2), torch.ones(1)),
            "does not depend on x",
        ),
    ],
)
def test_wrong_problems(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def test_wrong_arguments_are_listed_together():
    problem = LowerProblem(lambda x, t: x.square().sum(), 2.0, 2.0)
    for solve in (fista, gradient_descent, lbfgs, partial(proximal_gradient)):
        with pytest.raises(ValueError, match="tol must.*maxiter must"):
            solve(problem, torch.zeros(()), torch.ones(1), 0.0, maxiter=0)
    with pytest.raises(ValueError, match="needs the problem's `prox`"):
        proximal_gradient(problem, torch.zeros(()), torch.ones(1), 1.0)
    with pytest.raises(ValueError, match="use proximal_gradient"):
        fista(LowerProblem(problem.loss, 2.0, 2.0, prox=lambda x, t, s: x), torch.zeros(()), torch.ones(1), 1.0)
    with pytest.raises(ValueError, match="mu 3 is above smoothness 2"):
        fista(LowerProblem(problem.loss, 3.0, 2.0), torch.zeros(()), torch.ones(1), 1.0)
