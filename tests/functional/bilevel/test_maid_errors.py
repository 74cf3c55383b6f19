"""What MAID refuses, and in which words."""

import pytest
import torch

from lightning_hpo.functional.bilevel.lower_problem import LowerProblem
from lightning_hpo.functional.bilevel.lower_solvers import proximal_gradient
from lightning_hpo.functional.bilevel.maid import MAID, BilevelProblem

THETA, X = torch.zeros((), dtype=torch.float64), torch.ones(2, dtype=torch.float64)


def make(
    loss=lambda x, t: (x - t).square().sum() / 2 + x.square().sum() / 2, upper=lambda x: (x - 1).square().sum(), **kw
):
    lower = {"mu": 2.0, "smoothness": 2.0} | {k: v for k, v in kw.items() if k in LowerProblem.__dataclass_fields__}
    return BilevelProblem(LowerProblem(loss, **lower), upper, 2.0, convex_upper=True)


def test_arguments_are_checked_together():
    with pytest.raises(ValueError) as error:
        MAID(make(), rho=1.0, nu=0.0, rho_bar=1.0, nu_bar=0.5, eps0=-1.0, delta0=0.0, max_backtracks=0, tolerance=-1)
    for name in ("rho", "nu", "rho_bar", "nu_bar", "eps0", "delta0", "max_backtracks", "tolerance"):
        assert f"{name} must" in str(error.value)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"accuracy": "exact"}, "accuracy must be one of"),
        ({"check_descent": True, "lam": 0.6}, "lam must be below eta"),
        ({"accuracy": "fixed", "eps0": 1.0, "delta0": 1.0, "nu": 0.5}, "nothing to adapt: drop nu"),
        ({"accuracy": "cubic", "check_descent": True, "nu_bar": 1.1}, "drop nu_bar, check_descent"),
        ({"accuracy": "fixed"}, "needs eps0 and delta0"),
        ({"kappa": 1.0}, "kappa must be between 0 and 1"),
    ],
)
def test_settings_that_contradict_each_other(settings, match):
    with pytest.raises(ValueError, match=match):
        MAID(make(), **settings)


def test_an_estimated_modulus_is_warned_of():
    with pytest.warns(UserWarning, match="nothing is certified"):
        maid = MAID(make(mu_estimated=True))
    assert not maid.certified


@pytest.mark.parametrize(
    ("problem", "theta", "x", "settings", "match"),
    [
        (make(), THETA, X.bfloat16(), {}, "bfloat16 cannot show small errors"),
        (make(), THETA, X.half(), {}, "allow_low_precision"),
        (make(), THETA, X.long(), {}, "x must be a floating point tensor"),
        (make(), THETA[None][:0], X[:0], {}, "theta must be .* not empty.*; x must be"),
        (make(), THETA * torch.nan, X * torch.inf, {}, "theta is not finite; x is not finite"),
        (make(), THETA, X, {"bounds": (1.0, 2.0)}, "outside of its bounds"),
        (make(), THETA, X, {"bounds": (2.0, 1.0)}, "ordered"),
        (make(lambda x, t: (x - t - torch.rand(2)).square().sum()), THETA, X, {}, "lower loss gives another gradient"),
        (make(upper=lambda x: (x * torch.rand(2)).sum()), THETA, X, {}, "upper loss gives another gradient"),
        (make(lambda x, t: (x - t).square().sum() * torch.nan), THETA, X, {}, "lower loss is not finite"),
        (make(upper=lambda x: torch.ones(())), THETA, X, {}, "upper loss does not depend on x"),
        (make(lambda x, t: t.square()), THETA, X, {}, "lower loss does not depend on x"),
        (make(mu=lambda t: t), THETA, X, {}, "strong convexity.*ridge"),
        (make(prox=lambda x, t, s: x), THETA, X, {"solver": proximal_gradient}, "prox"),
    ],
)
def test_starts_that_are_refused(problem, theta, x, settings, match):
    with pytest.raises(ValueError, match=match):
        MAID(problem, **settings).run(theta, x)


def test_low_precision_on_request():
    end = MAID(make(), allow_low_precision=True, eps0=0.1, delta0=0.1).run(THETA.bfloat16(), X.bfloat16(), max_steps=2)
    assert end.x.dtype == torch.bfloat16


def test_a_lower_problem_that_is_not_solved_is_an_error():
    hard = make(lambda x, t: (torch.tensor([1.0, 1e6]) * (x - t) ** 2).sum() / 2, mu=1.0, smoothness=1e6)
    with pytest.raises(RuntimeError, match=r"not solved to eps=1.0e-08: error .* after 5 iterations .maxiter.*ridge"):
        MAID(hard, eps0=1e-8, lower_maxiter=5).run(THETA + 1, torch.zeros(2, dtype=torch.float64))
    concave = make(lambda x, t: -(x - t).square().sum(), mu=1.0, smoothness=2.0)
    with pytest.raises(RuntimeError, match="not_finite.*strongly convex"):
        MAID(concave).run(THETA, X)
    saddle = make(lambda x, t: (x - t)[0].square() - 0.1 * x[1].square(), mu=0.5, smoothness=2.0)
    with pytest.raises(RuntimeError, match="strongly convex"):  # found at its stationary point by conjugate gradients
        MAID(saddle).run(THETA, torch.zeros(2, dtype=torch.float64))


def test_what_run_is_given():
    maid = MAID(make())
    with pytest.raises(ValueError, match="give theta and x to begin"):
        maid.run(THETA)
    with pytest.raises(ValueError, match="give theta and x to begin"):
        maid.run(maid.init(THETA, X), X)
