"""Implicit hypergradients against the closed form of ridge regression and other known answers."""

import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_hpo.functional.bilevel.estimators import ESTIMATORS
from lightning_hpo.functional.bilevel.ift import ift, ift_cg, ift_exact, ift_gmres, ift_neumann, ift_normal_cg
from lightning_hpo.functional.bilevel.inner_problems import decayed, fixed_point
from lightning_hpo.functional.bilevel.linear_solve import bicgstab, cg, gmres, normal_cg
from lightning_hpo.functional.bilevel.optimizer_steps import functional_optimizer, sgd
from lightning_hpo.functional.bilevel.problem import Problem, Tensors
from lightning_hpo.functional.bilevel.t1t2 import t1t2
from lightning_hpo.functional.bilevel.unrolled import truncated

TIGHT = {"tol": 1e-10}


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("ift_cg", TIGHT),
        ("ift_normal_cg", TIGHT | {"maxiter": 200}),
        ("ift_gmres", TIGHT),
        ("ift_bicgstab", TIGHT),
        ("ift_exact", {}),
        ("ift_neumann", {"steps": 2000, "alpha": 0.4}),
        ("ift_cg", TIGHT | {"product": "fd"}),
    ],
)
def test_ridge_in_closed_form(ridge: Any, name: str, settings: dict[str, Any]) -> None:
    found = ESTIMATORS[name](ridge.problem, ridge.params, ridge.hparams, **settings)
    error = (found.gradients["log_decay"] - ridge.exact).norm() / ridge.exact.norm()
    assert error < (1e-6 if "product" in settings else 1e-8)


@pytest.mark.parametrize("sign", [1.0, -1.0])  # of the curvature
@pytest.mark.parametrize("product", ["exact", "fd"])
def test_one_step_of_conjugate_gradients_is_a_multiple_of_the_validation_gradient(sign: float, product: str) -> None:
    torch.manual_seed(0)
    weights, goal, log_decay = (torch.randn(4, dtype=torch.float64) for _ in range(3))
    scales = sign * torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    problem = Problem(
        lambda w, h: 0.5 * ((scales + h["log_decay"].exp()) * w["w"] ** 2).sum(),
        lambda w, h: 0.5 * (w["w"] - h["goal"]).square().sum(),
    )
    hparams = {"log_decay": log_decay if sign > 0 else log_decay - 9, "goal": goal}
    calls = []
    watched = replace(problem, train_loss=lambda w, h: (calls.append(1), problem.train_loss(w, h))[1])
    found = ift_cg(watched, {"w": weights}, hparams, maxiter=1, tol=0.0, product=product, strict=None)
    v, decay = weights - goal, hparams["log_decay"].exp()
    factor = (v @ v) / (v @ ((scales + decay) * v)) if sign > 0 else 1.0
    rtol = 1e-12 if product == "exact" else 1e-6
    torch.testing.assert_close(found.state["u"], factor * v, rtol=rtol, atol=0)
    torch.testing.assert_close(found.gradients["log_decay"], -factor * v * decay * weights, rtol=rtol, atol=0)
    torch.testing.assert_close(found.gradients["goal"], -v, rtol=1e-12, atol=0)
    assert len(calls) == (1 if product == "exact" else 2)


def test_no_validation_gradient_no_step() -> None:
    problem = Problem(lambda w, h: (h["a"] * w["w"] ** 2).sum(), lambda w, h: ((w["w"] - 1) ** 2).sum())
    for tol in (0.0, 1e-5):
        found = ift_cg(problem, {"w": torch.ones(2)}, {"a": torch.tensor(0.5)}, maxiter=1, tol=tol, strict=None)
        assert found.gradients["a"] == 0


def test_neumann_is_the_truncated_series(ridge: Any) -> None:
    point = ridge.params
    x = ridge.x[::2]
    hessian = x.T @ x / len(x) + torch.diag(ridge.hparams["log_decay"].exp())
    w = torch.cat([point["a"], point["b"].flatten()])
    rest = ridge.x[1::2]
    v = rest.T @ (rest @ w - ridge.y[1::2]) / len(rest)
    inverse = torch.eye(5, dtype=torch.float64) - 0.2 * hessian
    u = 0.2 * sum(torch.linalg.matrix_power(inverse, j) @ v for j in range(8))
    expected = 0.2 * ridge.hparams["log_decay"] - ridge.hparams["log_decay"].exp() * w * u
    found = ift_neumann(ridge.problem, point, ridge.hparams, steps=7, alpha=0.2)
    torch.testing.assert_close(found.gradients["log_decay"], expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(found.state["u"], u, rtol=1e-12, atol=1e-14)


def test_neumann_is_unrolling_at_the_solution(ridge: Any) -> None:
    optimizer = functional_optimizer(sgd, lr=0.2)
    series = ift_neumann(ridge.problem, ridge.params, ridge.hparams, steps=7, alpha=0.2).gradients
    through = truncated(ridge.problem, ridge.params, ridge.hparams, steps=20, keep=8, optimizer=optimizer).gradients
    torch.testing.assert_close(series, through, rtol=1e-12, atol=1e-13)


def test_t1t2_takes_the_gradient_for_the_solution(ridge: Any) -> None:
    w = torch.cat([ridge.params["a"], ridge.params["b"].flatten()])
    rest = ridge.x[1::2]
    v = rest.T @ (rest @ w - ridge.y[1::2]) / len(rest)
    expected = 0.2 * ridge.hparams["log_decay"] - ridge.hparams["log_decay"].exp() * w * v
    for product in ("exact", "fd"):
        found = t1t2(ridge.problem, ridge.params, ridge.hparams, product=product).gradients["log_decay"]
        torch.testing.assert_close(found, expected, rtol=1e-6 if product == "fd" else 1e-12, atol=1e-7)


@pytest.mark.parametrize("solve", [normal_cg, gmres, bicgstab])
def test_a_fixed_point_whose_derivative_is_not_symmetric(solve: Any) -> None:
    torch.manual_seed(0)
    mix, reach, v = torch.randn(4, 4).double() / 4, torch.randn(4, 2).double(), torch.randn(4).double()
    problem = Problem(
        train_loss=lambda w, h: w["w"].sum() * h["goal"].sum(),
        val_loss=lambda w, h: v @ w["w"],
        residual=fixed_point(lambda w, h: {"w": mix @ w["w"] + reach @ h["goal"]}),
    )
    expected = reach.T @ torch.linalg.solve(torch.eye(4).double() - mix.T, v)  # of w = (I - M)^{-1} N goal
    inputs = {"w": torch.zeros(4).double()}, {"goal": torch.zeros(2).double()}
    found = ift(problem, *inputs, solve=solve, tol=1e-10).gradients["goal"]
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(ift_exact(problem, *inputs).gradients["goal"], expected)


@pytest.mark.parametrize("scaled", [False, True])
def test_decay_by_the_optimizer_belongs_to_the_inner_problem(ridge: Any, scaled: bool) -> None:
    scale = {"a": torch.tensor([0.5, 2.0]).double(), "b": torch.tensor(3.0).double()} if scaled else None
    plain = ridge.problem.train_loss
    hparams = ridge.hparams | {"weight_decay": torch.tensor(0.3).double()}
    factors = scale or {"a": 1.0, "b": 1.0}

    def step(params: Tensors, hparams: Tensors) -> Tensors:  # AdamW with its root of squares held fixed, or SGD
        grads = torch.autograd.grad(plain(params, hparams), list(params.values()), create_graph=True)
        moves = {key: grad / factors[key] for (key, grad) in zip(params, grads, strict=True)}
        return {key: w - 0.1 * (moves[key] + hparams["weight_decay"] * w) for key, w in params.items()}

    params = ridge.params
    for _ in range(1000):
        leaves = {key: value.requires_grad_() for key, value in params.items()}
        params = {key: value.detach() for key, value in step(leaves, hparams).items()}
    by_loss = Problem(decayed(plain, scale=scale), ridge.problem.val_loss)
    by_step = Problem(plain, ridge.problem.val_loss, residual=fixed_point(step))
    found = ift_cg(by_loss, params, hparams, tol=1e-12).gradients
    torch.testing.assert_close(ift_gmres(by_step, params, hparams, tol=1e-12).gradients, found, rtol=1e-8, atol=1e-10)
    without = ift_cg(ridge.problem, params, ridge.hparams, tol=1e-12).gradients["log_decay"]
    assert (without - found["log_decay"]).norm() > 0.05 * found["log_decay"].norm()
    with pytest.raises(ValueError, match=r"scale must name the parameters \['a', 'b'\], got \['a'\]"):
        decayed(plain, scale={"a": 1.0})(params, hparams)


def test_the_error_is_of_first_order_in_the_inner_error(ridge: Any) -> None:
    errors = []
    for size in (1e-2, 1e-3, 1e-4):
        moved = {name: value + size for name, value in ridge.params.items()}
        found = ift_exact(ridge.problem, moved, ridge.hparams).gradients["log_decay"]
        errors.append(float((found - ridge.exact).norm()))
    assert errors[0] / errors[1] == pytest.approx(10, rel=0.1)
    assert errors[1] / errors[2] == pytest.approx(10, rel=0.1)


def test_a_warm_start_has_nothing_left_to_do(ridge: Any) -> None:
    first = ift_cg(ridge.problem, ridge.params, ridge.hparams, **TIGHT)
    again = ift_cg(ridge.problem, ridge.params, ridge.hparams, first.state, tol=1e-8)
    cold = ift_cg(ridge.problem, ridge.params, ridge.hparams, first.state, tol=1e-8, warm_start=False)
    assert again.info is not None
    assert again.info.iterations == 0
    assert cold.info is not None
    assert cold.info.iterations > 2
    torch.testing.assert_close(again.gradients, first.gradients)


def saddle() -> tuple[Problem, Tensors, Tensors]:
    signs = torch.tensor([1.0, -1.0]).double()
    problem = Problem(lambda w, h: (signs * (w["w"] - h["goal"]) ** 2).sum(), lambda w, h: (w["w"] ** 2).sum() / 2)
    return problem, {"w": torch.tensor([3.0, 4.0]).double()}, {"goal": torch.tensor(3.0).double()}


def test_negative_curvature_is_told_and_has_a_remedy() -> None:
    inputs = saddle()
    with pytest.warns(UserWarning, match="negative curvature: use ift_normal_cg, product='gauss_newton' or a ridge"):
        result = ift_cg(*inputs)
    assert result.info is not None
    assert result.info.negative_curvature
    assert result.gradients["goal"].isfinite()
    with pytest.raises(RuntimeError, match="did not converge"):
        ift_cg(*inputs, strict=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ift_cg(*inputs, strict=None)
    for solved in (ift_normal_cg(*inputs), ift_exact(*inputs)):
        torch.testing.assert_close(solved.gradients["goal"], torch.tensor(7.0).double())


def test_negative_curvature_in_the_first_direction_leaves_the_identity() -> None:
    """As :func:`t1t2`, and not the zero vector or the start that the solver was given."""
    problem = Problem(lambda w, h: -(h["a"] * w["w"] ** 2).sum(), lambda w, h: (w["w"] ** 2).sum() / 2)
    inputs = problem, {"w": torch.tensor([3.0, 4.0])}, {"a": torch.tensor(1.0)}
    expected = t1t2(*inputs).gradients
    assert expected["a"] == 50.0  # 2 w v with v = w
    for state in (None, {"u": torch.tensor([1e3, 1e3])}):
        result = ift_cg(*inputs, state, strict=None)
        torch.testing.assert_close(result.gradients, expected)
        torch.testing.assert_close(result.state["u"], torch.tensor([3.0, 4.0]))


def test_a_solve_cut_short_is_told(ridge: Any) -> None:
    with pytest.warns(UserWarning, match="raise maxiter or tol, or add a ridge"):
        ift_cg(ridge.problem, ridge.params, ridge.hparams, maxiter=1)


def test_a_ridge_is_added_to_the_curvature(ridge: Any) -> None:
    found = ift_cg(ridge.problem, ridge.params, ridge.hparams, ridge=0.5, **TIGHT)
    w = torch.cat([ridge.params["a"], ridge.params["b"].flatten()])
    x, rest = ridge.x[::2], ridge.x[1::2]
    hessian = x.T @ x / len(x) + torch.diag(ridge.hparams["log_decay"].exp()) + 0.5 * torch.eye(5).double()
    u = torch.linalg.solve(hessian, rest.T @ (rest @ w - ridge.y[1::2]) / len(rest))
    torch.testing.assert_close(found.state["u"], u, rtol=1e-8, atol=1e-10)


def test_vectors_are_wide_where_parameters_are_narrow() -> None:
    problem = Problem(lambda w, h: ((w["w"] - h["goal"]) ** 2).sum(), lambda w, h: (w["w"] ** 2).sum())
    result = ift_cg(problem, {"w": torch.ones(3, dtype=torch.bfloat16)}, {"goal": torch.tensor(3.0)})
    assert result.state["u"].dtype == torch.float32
    assert result.gradients == {"goal": torch.tensor(6.0)}


def test_gauss_newton_products_solve_what_exact_ones_cannot(network: Any) -> None:
    lighter = network.hparams | {"decay": torch.tensor([1e-3, 1e-3]).double()}
    network = replace(network, hparams=lighter)
    with pytest.warns(UserWarning, match="negative curvature"):
        ift_cg(network.problem, network.params, network.hparams)
    settings: dict[str, Any] = {"product": "gauss_newton", "maxiter": 200, "tol": 1e-10}
    found = ift_cg(network.problem, network.params, network.hparams, **settings)
    dense = ift_exact(network.problem, network.params, network.hparams, product="gauss_newton")
    torch.testing.assert_close(found.gradients, dense.gradients, rtol=1e-7, atol=1e-9)


def test_a_val_loss_without_parameters_is_refused(ridge: Any) -> None:
    problem = Problem(ridge.problem.train_loss, lambda w, h: h["log_decay"].sum())
    with pytest.raises(ValueError, match="val_loss does not depend on params"):
        ift(problem, ridge.params, ridge.hparams, solve=cg)


def test_a_residual_of_another_shape_is_refused(ridge: Any) -> None:
    residual = lambda w, h: {"a": w["a"], "b": w["b"].flatten()}  # noqa: E731
    problem = Problem(ridge.problem.train_loss, ridge.problem.val_loss, residual=residual)
    with pytest.raises(ValueError, match=r"\[\(2,\), \(1, 3\)\], got \[\(2,\), \(3,\)\]"):
        ift_exact(problem, ridge.params, ridge.hparams)


def test_a_hyperparameter_that_only_scales_the_loss_has_no_influence() -> None:
    problem = Problem(lambda w, h: h["scale"] * ((w["w"] - 1) ** 2).sum(), lambda w, h: (w["w"] ** 2).sum())
    found: Tensor = ift_cg(problem, {"w": torch.ones(3)}, {"scale": torch.tensor(2.0)}).gradients["scale"]
    assert found == 0


def test_a_tiny_validation_loss_does_not_underflow() -> None:
    goal = torch.tensor(3.0)
    problem = Problem(
        lambda w, h: (torch.tensor([1.0, 2.0, 5.0]) * (w["w"] - h["goal"]) ** 2).sum(),
        lambda w, h: 1e-25 * (w["w"] * torch.tensor([1.0, 2.0, 3.0])).sum(),
    )
    for name in ("ift_cg", "ift_normal_cg", "ift_gmres", "ift_bicgstab", "ift_exact", "ift_neumann"):
        settings = {"steps": 500, "alpha": 0.1} if name == "ift_neumann" else {}
        found = ESTIMATORS[name](problem, {"w": torch.ones(3)}, {"goal": goal}, **settings).gradients["goal"]
        torch.testing.assert_close(found * 1e25, torch.tensor(6.0), rtol=1e-4, atol=0.0)
