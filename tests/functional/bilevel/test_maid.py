"""The loop: every accepted step lowers the true loss, and a run goes on bit for bit."""

import math
from itertools import pairwise

import pytest
import torch
from torch.nn import functional as F

from lightning_hpo.functional.bilevel.lower_problem import LowerProblem
from lightning_hpo.functional.bilevel.lower_solvers import fista, lbfgs, proximal_gradient
from lightning_hpo.functional.bilevel.maid import MAID, BilevelProblem, MAIDState

SETTINGS = {
    "steps certified": {},
    "directions certified": {"check_descent": True},
    "by L-BFGS": {"solver": lbfgs},
    "Barzilai-Borwein": {"bb_init": True},
    "fixed": {"accuracy": "fixed", "eps0": 1e-4, "delta0": 1e-4},
    "geometric": {"accuracy": "geometric", "eps0": 1e-2, "delta0": 1e-2},
}


class Quadratic:
    """h = |A x + B theta - c|^2 / 2, g = |x - goal|^2 / 2, r = 0.05 |theta|^2, all in closed form."""

    def __init__(self, seed=0, dtype=torch.float64, n=8, d=4, rows=14):
        generator = torch.Generator().manual_seed(seed)
        draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)  # noqa: E731
        self.A, self.B, self.c, self.goal = draw(rows, n), draw(rows, d), draw(rows), draw(n)
        self.theta, self.x = draw(d), torch.zeros(n, dtype=dtype)
        scales = torch.linalg.eigvalsh(self.A.T @ self.A)
        self.lower = LowerProblem(
            lambda x, t: (self.A @ x + self.B @ t - self.c).square().sum() / 2, scales[0].item(), scales[-1].item()
        )
        norm = torch.linalg.matrix_norm(self.A.T @ self.B, 2).item()
        self.known = {"cross_norm": lambda x, t: norm, "cross_lipschitz": 0.0, "inverse_lipschitz": 0.0}
        self.problem = BilevelProblem(self.lower, self.g, 1.0, True, self.r, **self.known)

    def g(self, x):
        return 0.5 * (x - self.goal).square().sum()

    def r(self, theta):
        return 0.05 * theta.square().sum()

    def f(self, theta):
        x = torch.linalg.solve(self.A.T @ self.A, self.A.T @ (self.c - self.B @ theta))
        return (self.g(x) + self.r(theta)).item()

    def slope(self, theta):
        theta = theta.clone().requires_grad_()
        x = torch.linalg.solve(self.A.T @ self.A, self.A.T @ (self.c - self.B @ theta))
        return torch.autograd.grad(self.g(x) + self.r(theta), theta)[0]


def course(maid, theta, x, steps):
    states = [maid.init(theta, x)]
    maid.run(states[0], max_steps=steps, on_step=states.append)
    return states


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_every_accepted_step_lowers_the_true_loss(settings):
    accepted = 0
    for seed in range(4):
        case = Quadratic(seed)
        maid = MAID(case.problem, **settings)
        assert maid.certified
        states = course(maid, case.theta, case.x, 25)
        for before, after in pairwise(states):
            moved = (after.theta - before.theta).norm().item()
            assert after.lower - 1e-12 <= case.f(after.theta) <= after.upper + 1e-12
            if after.step_size == 0:
                assert moved == 0
                continue
            accepted += 1
            fallen = case.f(before.theta) - case.f(after.theta)
            assert fallen >= maid.search.lam * moved**2 / after.step_size - 1e-12
        assert case.f(states[-1].theta) < case.f(case.theta)
    assert accepted > 20


def test_it_converges_to_the_minimum():
    case = Quadratic(1)
    end = MAID(case.problem, check_descent=True).run(case.theta, case.x, max_steps=2000)
    assert end.status == "stationary"
    assert case.slope(end.theta).norm() <= end.gradient_norm + end.omega <= 2e-6
    assert end.work == end.lower_iterations + end.cg_iterations > 0


def test_certified_directions_are_directions_of_descent():
    case = Quadratic(2)
    maid = MAID(case.problem, check_descent=True, eta=0.5)
    state = maid.init(case.theta, case.x)
    for _ in range(20):
        at, state = state.theta, maid.step(state)
        z = (at - state.theta) / state.step_size
        assert state.omega <= 0.5 * z.norm()
        assert (z - case.slope(at)).norm() <= state.omega + 1e-12
        assert z @ case.slope(at) > 0


def test_accuracies_follow_the_rules():
    case = Quadratic(0)
    start = {"eps0": 0.08, "delta0": 0.04}
    states = course(MAID(case.problem, **start), case.theta, case.x, 30)
    for before, after in pairwise(states):
        tightened = after.failures - before.failures
        assert math.isclose(after.eps, before.eps * 0.5**tightened * 1.05)
        assert math.isclose(after.delta, before.delta * 0.5**tightened * 1.05)
    assert states[-1].failures > 0
    for accuracy, factor in {"geometric": 0.9**10, "quadratic": 1 / 121, "cubic": 1 / 1331}.items():
        end = MAID(case.problem, accuracy=accuracy, **start).run(case.theta, case.x, max_steps=10)
        assert math.isclose(end.eps, 0.08 * factor, rel_tol=1e-9)


def test_the_step_grows_after_success_and_is_not_carried_over_a_failure():
    case = Quadratic(0)
    maid = MAID(case.problem, alpha0=64.0, eps0=0.05)
    state = maid.init(case.theta, case.x)
    for _ in range(20):
        before, state = state, maid.step(state)
        trials = math.log2(before.alpha / state.step_size)
        assert math.isclose(trials, round(trials), abs_tol=1e-9)
        assert math.isclose(state.alpha, state.step_size * 10 / 9)


def test_barzilai_and_borwein_need_fewer_steps_without_monotony():
    case = Quadratic(3, n=8, d=5, rows=10)
    minimum = MAID(case.problem, bb_init=True, nonmonotone=True, check_descent=True).run(
        case.theta, case.x, max_steps=300
    )
    plain = MAID(case.problem, check_descent=True).run(case.theta, case.x, max_steps=minimum.iteration)
    assert minimum.status == "stationary"
    assert plain.status == "running"
    assert case.f(minimum.theta) < case.f(plain.theta)


def test_fixed_accuracy_that_is_too_coarse_takes_no_step():
    case = Quadratic(0)
    end = MAID(case.problem, accuracy="fixed", eps0=10.0, delta0=10.0).run(case.theta, case.x, max_steps=50)
    assert (end.status, end.iteration) == ("accuracy_floor", 1)
    assert torch.equal(end.theta, case.theta)


def test_without_certificates_steps_are_believed():
    """The same coarse accuracy, with values taken at face value: it moves, and nothing says where to."""
    case = Quadratic(0)
    maid = MAID(case.problem, accuracy="fixed", eps0=1.0, delta0=1.0, certify=False)
    end = maid.run(case.theta, case.x, max_steps=5)
    assert end.iteration - end.failures > 0
    assert not maid.certified
    assert end.lower == end.upper


def test_the_floor_of_float32_is_a_status():
    case = Quadratic(0, torch.float32)
    maid = MAID(case.problem, tolerance=0.0)
    end = maid.run(case.theta, case.x, max_steps=500)
    assert end.status == "accuracy_floor"
    assert end.eps <= 2 * maid.evaluation.floor(end)
    best = MAID(Quadratic(0).problem).run(Quadratic(0).theta, Quadratic(0).x, max_steps=2000)
    assert abs(case.f(end.theta) - Quadratic(0).f(best.theta)) < 1e-3
    assert MAID(case.problem).step(end) is end


def test_a_stationary_start_is_a_status():
    case = Quadratic(0)
    best = MAID(case.problem, tolerance=1e-8).run(case.theta, case.x, max_steps=3000)
    again = MAID(case.problem, eps0=1e-10, delta0=1e-10).run(best.theta, best.x)
    assert (again.status, again.iteration, again.trials) == ("stationary", 1, 0)


def test_bounds_are_kept_and_their_corners_are_found():
    case = Quadratic(0)
    bounds = (torch.full((4,), -0.1, dtype=torch.float64), 0.1)
    start = case.theta.clamp(-0.1, 0.1)
    states = course(MAID(case.problem, bounds=bounds, check_descent=True), start, case.x, 300)
    assert all(bool((state.theta.abs() <= 0.1).all()) for state in states)
    end = states[-1]
    assert end.status == "stationary"
    slope, low, high = case.slope(end.theta), end.theta == -0.1, end.theta == 0.1
    assert bool((low | high).any())
    assert bool((slope[low] > 0).all())
    assert bool((slope[high] < 0).all())
    torch.testing.assert_close(slope[~(low | high)], slope[~(low | high)] * 0, rtol=0, atol=1e-5)
    values = [case.f(state.theta) for state in states]
    assert values == sorted(values, reverse=True)


@pytest.mark.parametrize(
    "settings",
    [{}, {"bb_init": True, "nonmonotone": True}, {"check_descent": True}, {"accuracy": "cubic"}],
    ids=["plain", "accelerated", "check_descent", "cubic"],
)
def test_a_run_that_is_taken_up_again_goes_on_bit_for_bit(settings, tmp_path):
    case = Quadratic(4)
    problem = BilevelProblem(case.lower, case.g)  # with estimates of all constants
    whole = course(MAID(problem, **settings), case.theta, case.x, 12)
    torch.save(whole[5].state_dict(), tmp_path / "state.pt")
    loaded = MAIDState.from_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    resumed = MAID(problem, **settings).run(loaded, max_steps=7)
    expected, found = whole[12].state_dict(), resumed.state_dict()
    for name, value in expected.items():
        left, right = (v if isinstance(v, tuple) else (v,) for v in (value, found[name]))
        for a, b in zip(left, right, strict=True):
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, name
    with pytest.raises(ValueError, match="`alpha` is missing; `beta` is unknown"):
        MAIDState.from_state_dict({**{k: v for k, v in expected.items() if k != "alpha"}, "beta": 1})


def logistic(rows=slice(None), reduce=lambda v: v):
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(2, 40, 5, generator=generator, dtype=torch.float64)
    labels = (data[..., 0] + torch.randn(2, 40, generator=generator).double() > 0).double()
    bounds = [torch.linalg.eigvalsh(part.T @ part / 40)[-1].item() / 4 for part in data]
    entropy = F.binary_cross_entropy_with_logits
    lower = LowerProblem(
        lambda w, t: entropy(data[0, rows] @ w, labels[0, rows]) + 0.5 * (t.exp() * w * w).sum(),
        lambda t: t.exp().min(),
        lambda t: bounds[0] + t.exp().max(),
        reduce=reduce,
    )
    problem = BilevelProblem(lower, lambda w: entropy(data[1, rows] @ w, labels[1, rows]), bounds[1], convex_upper=True)
    return problem, torch.full((5,), -1.0, dtype=torch.float64), torch.zeros(5, dtype=torch.float64)


def test_two_ranks_that_share_data_are_one_process(ranks):
    alone = MAID(logistic()[0], check_descent=True).run(*logistic()[1:], max_steps=15)

    def work(rank, reduce):
        problem, theta, x = logistic(slice(rank, None, 2), reduce)
        return MAID(problem, check_descent=True).run(theta, x, max_steps=15)

    first, second = ranks.run(work)
    assert torch.equal(first.theta, second.theta)
    assert first.lower_iterations == second.lower_iterations == alone.lower_iterations
    torch.testing.assert_close(first.theta, alone.theta, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(first.x, alone.x, rtol=1e-12, atol=1e-12)
    assert (first.trials, first.failures) == (alone.trials, alone.failures)


def denoising(part=slice(None), reduce=lambda v: v):
    """Four signals to smooth, one weight of smoothness."""
    generator = torch.Generator().manual_seed(0)
    clean = torch.sin(torch.linspace(0, 6, 20, dtype=torch.float64) + torch.arange(4)[:, None])
    noisy = clean + 0.4 * torch.randn(4, 20, generator=generator, dtype=torch.float64)
    clean, noisy = clean[part], noisy[part]
    lower = LowerProblem(
        lambda x, t: (x - noisy).square().sum(1) / 2 + t.exp() * x.diff(dim=1).square().sum(1) / 2,
        1.0,
        lambda t: 1 + 4 * t.exp(),
        batched=True,
    )
    problem = BilevelProblem(lower, lambda x: (x - clean).square().sum(1) / 2, 1.0, True, reduce=reduce)
    return problem, torch.tensor(-2.0, dtype=torch.float64), noisy


def test_two_ranks_that_own_problems_are_one_process(ranks):
    settings = {"eps0": 1e-8, "delta0": 1e-8}  # solved tightly: each rank stops its solves when its own are done
    problem, theta, x = denoising()
    alone = MAID(problem, **settings).run(theta, x, max_steps=10)
    assert problem.upper(alone.x).mean() < 0.6 * problem.upper(x).mean()

    def work(rank, reduce):
        problem, theta, x = denoising(slice(2 * rank, 2 * rank + 2), reduce)
        return MAID(problem, **settings).run(theta, x, max_steps=10)

    first, second = ranks.run(work)
    assert torch.equal(first.theta, second.theta)
    torch.testing.assert_close(first.theta, alone.theta, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(torch.cat([first.x, second.x]), alone.x, rtol=1e-6, atol=1e-6)
    assert (first.trials, first.upper) == (second.trials, second.upper)


def test_a_penalty_may_be_stepped_by_its_prox():
    """Log weights of a ridge, by proximal gradient: the same hyperparameters as by FISTA."""
    plain, theta, x = logistic()
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(2, 40, 5, generator=generator, dtype=torch.float64)
    labels = (data[..., 0] + torch.randn(2, 40, generator=generator).double() > 0).double()
    lower = LowerProblem(
        lambda w, t: F.binary_cross_entropy_with_logits(data[0] @ w, labels[0]),
        lambda t: t.exp().min(),
        plain.lower.smoothness(torch.full((1,), -torch.inf)),
        prox=lambda w, t, step: w / (1 + step * t.exp()),
        penalty=lambda w, t: 0.5 * (t.exp() * w * w).sum(),
    )
    problem = BilevelProblem(lower, plain.upper, plain.upper_smoothness, convex_upper=True)
    tight = {"eps0": 1e-9, "delta0": 1e-9, "accuracy": "fixed"}
    ends = [
        MAID(p, solver=s, **tight).run(theta, x, max_steps=5) for p, s in ((plain, fista), (problem, proximal_gradient))
    ]
    torch.testing.assert_close(ends[0].theta, ends[1].theta, rtol=1e-6, atol=1e-6)


def test_trials_that_are_not_finite_are_backed_out_of():
    """theta > 1 has no lower problem, and g overflows in between: steps shrink until they are on this side."""
    lower = LowerProblem(lambda x, t: (1 - t) * x.square().sum() / 2 - x.sum(), lambda t: 1 - t, lambda t: 1 - t)
    upper = lambda x: torch.where(x.sum() > 50, torch.inf, 1.0) * (x - 3.0).square().sum()  # noqa: E731
    problem = BilevelProblem(lower, upper, 2.0, convex_upper=True)
    start = torch.tensor(-1.0, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    end = MAID(problem, alpha0=1e3, max_backtracks=20).run(*start, max_steps=60)
    torch.testing.assert_close(end.theta, torch.tensor(2 / 3, dtype=torch.float64), rtol=1e-4, atol=0)
    with pytest.raises(RuntimeError, match="none of 3 trials from step 1.0e.06"):
        MAID(problem, alpha0=1e6, max_backtracks=3).run(*start)
