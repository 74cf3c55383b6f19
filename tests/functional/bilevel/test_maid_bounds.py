"""Bounds of MAID against closed forms: on the hypergradient, on the outer loss, on its decrease."""

import pytest
import torch

from lightning_hpo.functional.bilevel.ift import ift_cg
from lightning_hpo.functional.bilevel.lower_derivatives import LowerDerivatives
from lightning_hpo.functional.bilevel.lower_problem import LowerProblem
from lightning_hpo.functional.bilevel.lower_solvers import fista
from lightning_hpo.functional.bilevel.maid_bounds import decrease_gap, hypergradient_error_bound, value_bounds
from lightning_hpo.functional.bilevel.maid_hypergradient import (
    error_bound,
    estimated_constants,
    inexact_hypergradient,
)
from lightning_hpo.functional.bilevel.maid_problem import BilevelProblem
from lightning_hpo.functional.bilevel.problem import Problem

N, D = 6, 3


class Quadratic:
    """h = |A x + B theta - c|^2 / 2 and g = |x - goal|^2_G / 2, with everything known in closed form."""

    def __init__(self, seed, estimated=False):
        self.generator = torch.Generator().manual_seed(seed)
        self.A, self.B = self.draw(N + 4, N), self.draw(N + 4, D)
        self.c, self.goal = self.draw(N + 4), self.draw(N)
        self.G = torch.diag(0.1 + self.draw(N).abs())
        scales = torch.linalg.eigvalsh(self.A.T @ self.A)
        lower = LowerProblem(
            lambda x, theta: (self.A @ x + self.B @ theta - self.c).square().sum() / 2,
            mu=scales[0].item(),
            smoothness=scales[-1].item(),
        )
        norm = torch.linalg.matrix_norm(self.A.T @ self.B, 2).item()
        known = {"cross_norm": lambda x, theta: norm, "cross_lipschitz": 0.0, "inverse_lipschitz": 0.0}
        known |= {"upper_smoothness": self.G.max().item()}
        self.problem = BilevelProblem(lower, self.g, convex_upper=True, **({} if estimated else known))

    def draw(self, *shape):
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def g(self, x):
        return 0.5 * (x - self.goal) @ self.G @ (x - self.goal)

    def solution(self, theta):
        return torch.linalg.solve(self.A.T @ self.A, self.A.T @ (self.c - self.B @ theta))

    def f(self, theta):
        return self.g(self.solution(theta)).item()

    def slope(self, theta):
        theta = theta.clone().requires_grad_()
        return torch.autograd.grad(self.g(self.solution(theta)), theta)[0]


def test_the_bounds_hold_on_a_hundred_quadratics():
    violations, ratios = 0, []
    for seed in range(100):
        case = Quadratic(seed)
        problem, theta = case.problem, case.draw(D)
        for eps, delta in ((1.0, 1.0), (1e-2, 1e-1), (1e-5, 1e-5)):
            solution = fista(problem.lower, theta, case.draw(N), eps)
            found = inexact_hypergradient(problem, theta, solution.x, delta, case.draw(N), kappa=None)
            omega = error_bound(problem, theta, solution.x, solution.error, found)
            wrong = (found.z - case.slope(theta)).norm().item()
            violations += wrong > omega * (1 + 1e-9) + 1e-12
            ratios.append(wrong / omega)
            low, up = value_bounds(
                found.upper.values, found.upper.norms, solution.error, problem.upper_smoothness, True
            )
            violations += not low.item() - 1e-12 <= case.f(theta) <= up.item() + 1e-12
    assert violations == 0
    assert max(ratios) > 0.02, f"the bound is idle: at most {max(ratios):.1e} of it is used"


def test_the_bound_holds_where_second_derivatives_move():
    """h = x^2 / 2 + x^4 / 12 - theta x^2 / 2 ...: J and H depend on x; the constants are those on |x| <= 2."""
    lower = LowerProblem(
        lambda x, t: (x**2 / 2 + x**4 / 12 + t * x**2 / 2 - 2 * x).sum(), mu=lambda t: 1 + t, smoothness=lambda t: 5 + t
    )
    problem = BilevelProblem(
        lower,
        lambda x: (x - 0.3).square().sum() / 2,
        upper_smoothness=1.0,
        cross_norm=lambda x, t: x.abs(),
        cross_lipschitz=1.0,
        inverse_lipschitz=lambda t: 4 / (1 + t) ** 2,  # |x h'''| <= 4
    )
    theta = torch.tensor(0.5, dtype=torch.float64)
    exact = fista(lower, theta, torch.ones(1, dtype=torch.float64), 1e-14).x
    curvature = 1 + exact**2 + theta
    truth = -exact * (exact - 0.3) / curvature
    for gap in (-0.5, -0.1, -0.01, 0.01, 0.1, 0.5):
        x = exact + gap
        error = lower.norms(lower.gradient(x, theta)) / lower.modulus(theta)
        assert abs(gap) <= error.item()
        found = inexact_hypergradient(problem, theta, x, 1e-12)
        wrong = (found.z - truth).abs().item()
        assert 0 < wrong <= error_bound(problem, theta, x, error, found)


def test_the_formula_of_the_bound():
    numbers = {"mu": 2.0, "cross_norm": 3.0, "upper_gradient": 5.0, "upper_smoothness": 7.0}
    tensors = {name: torch.tensor([value]) for name, value in numbers.items()}
    found = hypergradient_error_bound(
        torch.tensor([0.1]), torch.tensor([0.2]), **tensors, inverse_lipschitz=11.0, cross_lipschitz=13.0
    )
    c = 7 * 3 / 2 + 11 * 5 * 3 + 13 * 5 / 2
    torch.testing.assert_close(found, torch.tensor([c * 0.1 + 3 / 2 * 0.2 + 13 * 7 / 2 * 0.01]))


def test_estimates_reach_the_constants_of_a_quadratic():
    case = Quadratic(1, estimated=True)
    problem, theta = case.problem, case.draw(D)
    x, estimates = case.draw(N), {}
    for _ in range(30):
        found = inexact_hypergradient(problem, theta, x, 1e-9)
        estimates = estimated_constants(problem, theta, x, found, case.draw(N), estimates)
    assert 0.5 * case.G.max() < estimates["upper_smoothness"] <= case.G.max() * (1 + 1e-9)
    assert estimates["cross_lipschitz"] < 1e-9
    assert estimates["inverse_lipschitz"] < 1e-9
    assert not problem.certified
    assert not problem.bound_certified
    assert Quadratic(1).problem.bound_certified
    # where the points are the same, a small step is taken
    again = estimated_constants(problem, theta, x, found, x, {})
    assert 0 < again["upper_smoothness"] <= case.G.max() * (1 + 1e-6)


def test_second_derivatives():
    case = Quadratic(2)
    at = LowerDerivatives(case.problem.lower, case.draw(N), case.draw(D))
    p, v = case.draw(N), case.draw(D)
    torch.testing.assert_close(at.hessian(p), case.A.T @ case.A @ p)
    torch.testing.assert_close(at.cross(p), case.B.T @ case.A @ p)
    torch.testing.assert_close(at.push_cross(v), case.A.T @ case.B @ v)
    norm = torch.linalg.matrix_norm(case.A.T @ case.B, 2)
    torch.testing.assert_close(at.cross_norm(v, 60), norm, rtol=1e-6, atol=0)
    assert 0.9 * norm < at.cross_norm(torch.zeros(D, dtype=torch.float64)) <= norm * (1 + 1e-12)


def test_a_hypergradient_at_a_tight_solution_is_that_of_the_implicit_engine():
    generator = torch.Generator().manual_seed(0)
    data, target = torch.randn(20, 4, generator=generator).double(), torch.randn(20, generator=generator).double()

    def h(x, theta):
        return torch.log(torch.cosh(data @ x - target)).mean() + 0.5 * (theta.exp() * x * x).sum()

    def g(x):
        return torch.sin(x).sum() + x.square().sum()

    bound = torch.linalg.eigvalsh(data.T @ data / 20)[-1].item()
    lower = LowerProblem(h, lambda t: t.exp().min(), lambda t: bound + t.exp().max())
    theta = torch.tensor([-1.0, 0.0, -2.0, 0.5], dtype=torch.float64)
    x = fista(lower, theta, torch.zeros(4, dtype=torch.float64), 1e-13).x
    found = inexact_hypergradient(BilevelProblem(lower, g), theta, x, 1e-13)
    problem = Problem(lambda w, t: h(w["x"], t["theta"]), lambda w, t: g(w["x"]))
    engine = ift_cg(problem, {"x": x}, {"theta": theta}, tol=1e-14, maxiter=100)
    torch.testing.assert_close(found.z, engine.gradients["theta"], rtol=1e-8, atol=1e-10)


def test_batched_problems_are_the_mean_of_single_ones():
    cases = [Quadratic(seed) for seed in range(3)]
    theta = cases[0].draw(D)
    stack = lambda name: torch.stack([getattr(case, name) for case in cases])  # noqa: E731
    A, B, c, G, goal = (stack(name) for name in ("A", "B", "c", "G", "goal"))
    mus = torch.tensor([case.problem.lower.mu for case in cases], dtype=torch.float64)
    tops = torch.tensor([case.problem.lower.smoothness for case in cases], dtype=torch.float64)
    norms = torch.tensor([case.problem.cross_norm(None, None) for case in cases], dtype=torch.float64)
    lower = LowerProblem(
        lambda x, t: (torch.einsum("mij,mj->mi", A, x) + B @ t - c).square().sum(1) / 2,
        mu=lambda t: mus,
        smoothness=lambda t: tops,
        batched=True,
    )
    upper = lambda x: 0.5 * torch.einsum("mi,mij,mj->m", x - goal, G, x - goal)  # noqa: E731
    smoothness = max(case.problem.upper_smoothness for case in cases)
    fixed = {"upper_smoothness": smoothness, "cross_lipschitz": 0.0, "inverse_lipschitz": 0.0}
    solution = fista(lower, theta, torch.zeros(3, N, dtype=torch.float64), 1e-3)
    truth = torch.stack([case.slope(theta) for case in cases]).mean(0)
    bounds = []
    for cross_norm in (lambda x, t: norms, None):
        problem = BilevelProblem(lower, upper, cross_norm=cross_norm, **fixed)
        found = inexact_hypergradient(problem, theta, solution.x, 1e-3)
        bounds.append(error_bound(problem, theta, solution.x, solution.error, found))
        assert (found.z - truth).norm() <= bounds[-1]
    assert bounds[0] < bounds[1] < 10 * bounds[0]  # one bound for all together is coarser, not another
    tight = fista(lower, theta, solution.x, 1e-12)
    exact = inexact_hypergradient(problem, theta, tight.x, 1e-12)
    torch.testing.assert_close(exact.z, truth, rtol=1e-8, atol=1e-10)


def test_a_residual_above_the_gradient_is_capped():
    """An absolute residual that 0 would satisfy must not make the direction 0."""
    case = Quadratic(3)
    theta = case.draw(D)
    x = case.solution(theta)
    idle = inexact_hypergradient(case.problem, theta, x, 1e3, kappa=None)
    assert idle.iterations == 0
    assert idle.z.norm() == 0
    capped = inexact_hypergradient(case.problem, theta, x, 1e3)
    assert capped.iterations > 0
    assert torch.cosine_similarity(capped.z, case.slope(theta), dim=0) > 0.95


@pytest.mark.parametrize("convex", [True, False])
def test_the_gap_is_never_closed_by_an_error_that_is_understated(convex):
    """Whatever the points: where psi with the true errors is not positive, the true loss falls."""
    generator = torch.Generator().manual_seed(0)
    curvature = 3 * torch.rand(3000, generator=generator).double() * (1 if convex else -1)
    before, after = torch.randn(2, 3000, generator=generator).double()
    errors = 0.2 * torch.rand(2, 3000, generator=generator).double()
    shifts = 2 * torch.rand(2, 3000, generator=generator).double() - 1
    exact = torch.stack([before, after]) + errors * shifts  # within the errors of the inexact ones

    def g(x):
        return 0.5 * curvature * x**2 + x

    def slope(x):
        return (curvature * x + 1).abs()

    low, _ = value_bounds(g(before), slope(before), errors[0], curvature.abs(), convex)
    _, up = value_bounds(g(after), slope(after), errors[1], curvature.abs(), convex)
    gaps = torch.tensor([decrease_gap(u, v, 0.05) for u, v in zip(up.tolist(), low.tolist(), strict=True)])
    fallen = g(exact[1]) <= g(exact[0]) - 0.05 + 1e-12
    accepted = (gaps <= 0).sum()
    assert bool(fallen[gaps <= 0].all())
    # with errors that are understated the same test would let through what does not fall
    _, naive = value_bounds(g(after), slope(after), 0 * errors[1], curvature.abs(), convex)
    assert not bool(fallen[naive - g(before) + 0.05 <= 0].all())
    assert accepted > 200


@pytest.mark.parametrize(
    ("settings", "match"), [({"delta": 0.0}, "delta must"), ({"delta": 1.0, "kappa": 1.0}, "kappa must")]
)
def test_wrong_arguments(settings, match):
    case = Quadratic(0)
    with pytest.raises(ValueError, match=match):
        inexact_hypergradient(case.problem, case.draw(D), case.draw(N), **settings)


def test_wrong_problems():
    case = Quadratic(0)
    with pytest.raises(ValueError, match="upper_smoothness must.*cross_lipschitz must"):
        BilevelProblem(case.problem.lower, case.g, upper_smoothness=-1.0, cross_lipschitz=-1.0)
    flat = BilevelProblem(case.problem.lower, lambda x: torch.ones(()))
    with pytest.raises(ValueError, match="does not depend on x"):
        flat.upper_at(case.draw(N))
    with pytest.raises(ValueError, match="a scalar, got"):
        BilevelProblem(case.problem.lower, lambda x: x).upper_at(case.draw(N))
    wrong = BilevelProblem(case.problem.lower, case.g, regularizer=lambda t: torch.ones(()))
    with pytest.raises(ValueError, match="depends on theta"):
        wrong.regularization(case.draw(D))
    curved = LowerProblem(lambda x, t: (t * x).sum() - x.square().sum(), mu=1.0)
    with pytest.raises(RuntimeError, match="not strongly convex.*negative curvature"):
        inexact_hypergradient(BilevelProblem(curved, lambda x: x.sum()), torch.ones(2), torch.ones(2), 1e-3)
    with pytest.raises(RuntimeError, match="raise cg_maxiter"):
        inexact_hypergradient(case.problem, case.draw(D), case.draw(N), 1e-12, maxiter=1)
