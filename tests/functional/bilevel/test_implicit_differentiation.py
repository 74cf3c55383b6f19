"""Derivatives of solutions against closed forms, in both modes and of second order."""

import warnings
from functools import partial

import pytest
import torch
from torch import Tensor

from lightning_hpo.functional.bilevel.error_bound import jacobian_error_bound
from lightning_hpo.functional.bilevel.implicit_differentiation import (
    implicit_fixed_point,
    implicit_root,
    root_jvp,
    root_vjp,
)
from lightning_hpo.functional.bilevel.linear_solve import (
    bicgstab,
    cg,
    cholesky,
    gmres,
    inv,
    lu,
    neumann,
    normal_cg,
    qr,
    refinement,
)

G = torch.Generator().manual_seed(0)
X = torch.randn(20, 5, dtype=torch.float64, generator=G)
Y = torch.randn(20, dtype=torch.float64, generator=G)
THETA = torch.tensor([0.5, 0.1, 2.0, 1.0, 0.3], dtype=torch.float64)
SOLVERS = {
    "cg": partial(cg, tol=1e-10),
    "normal_cg": partial(normal_cg, tol=1e-10),
    "gmres": partial(gmres, tol=1e-10),
    "bicgstab": partial(bicgstab, tol=1e-10),
    "neumann": partial(neumann, alpha=0.5, maxiter=1000, tol=1e-10),
    "refinement": partial(refinement, solve=cg, shift=0.01, tol=1e-10, maxiter=60),
    "lu": lu,
    "cholesky": cholesky,
    "qr": qr,
    "inv": inv,
}
every_solve = pytest.mark.parametrize("solve", SOLVERS.values(), ids=SOLVERS)


def ridge_gradient(x: Tensor, theta: Tensor, scale: Tensor | float = 1.0) -> Tensor:
    return X.T @ (X @ x - scale * Y) / len(Y) + theta * x


def ridge_solver(init: Tensor, theta: Tensor, scale: Tensor | float = 1.0) -> Tensor:
    return torch.linalg.solve(X.T @ X / len(Y) + torch.diag(theta), scale * X.T @ Y / len(Y))


def ridge_jacobian() -> Tensor:
    H = X.T @ X / len(Y) + torch.diag(THETA)
    return -torch.linalg.solve(H, torch.diag(ridge_solver(THETA, THETA)))


INIT = torch.zeros(5, dtype=torch.float64)


@every_solve
def test_ridge_closed_form_in_both_modes(solve) -> None:
    solution = implicit_root(ridge_gradient, ridge_solver, solve=solve)
    expected = ridge_jacobian()
    reverse = torch.autograd.functional.jacobian(lambda theta: solution(INIT, theta), THETA)
    assert (reverse - expected).norm() <= 1e-8 * expected.norm()
    columns = [torch.func.jvp(lambda t: solution(INIT, t), (THETA,), (e,))[1] for e in torch.eye(5).double()]
    assert (torch.stack(columns, 1) - expected).norm() <= 1e-8 * expected.norm()


def test_both_modes_agree() -> None:
    solve = partial(normal_cg, tol=1e-14, maxiter=200)
    x = ridge_solver(INIT, THETA)
    u, v = (torch.randn(5, dtype=torch.float64, generator=G) for _ in range(2))
    (backward,), _ = root_vjp(ridge_gradient, x, (THETA,), u, solve=solve)
    forward, _ = root_jvp(ridge_gradient, x, (THETA,), (v,), solve=solve)
    assert abs(backward @ v - u @ forward) <= 1e-10


def test_products_can_be_differentiated_again_or_leave_no_graph() -> None:
    theta = THETA.clone().requires_grad_()
    u = torch.ones(5, dtype=torch.float64)
    x = implicit_root(ridge_gradient, ridge_solver, solve=lu)(INIT, theta)
    (backward,), _ = root_vjp(ridge_gradient, x, (theta,), u, solve=lu)
    forward, _ = root_jvp(ridge_gradient, x, (theta,), (u,), solve=lu)
    expected = torch.autograd.functional.hessian(lambda theta: ridge_solver(INIT, theta).sum(), THETA)
    torch.testing.assert_close(torch.autograd.grad(backward.sum(), theta, retain_graph=True)[0], expected.sum(0))
    torch.testing.assert_close(torch.autograd.grad(forward.sum(), theta)[0], expected.sum(0))
    with torch.no_grad():
        assert not root_vjp(ridge_gradient, x, (theta,), u, solve=lu)[0][0].requires_grad
        assert not root_jvp(ridge_gradient, x, (theta,), (u,), solve=lu)[0].requires_grad


def test_loss_backward_and_func_transforms_agree() -> None:
    solution = implicit_root(ridge_gradient, ridge_solver, solve=lu)

    def outer(theta):
        return solution(INIT, theta).pow(2).sum()

    theta = THETA.clone().requires_grad_()
    outer(theta).backward()
    expected = 2 * ridge_jacobian().T @ ridge_solver(INIT, THETA)
    torch.testing.assert_close(theta.grad, expected)
    torch.testing.assert_close(torch.func.grad(outer)(THETA), expected)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(THETA, torch.ones_like(THETA))
        tangent = torch.autograd.forward_ad.unpack_dual(outer(dual)).tangent
    torch.testing.assert_close(tangent, expected.sum())


def test_second_derivatives_in_every_composition() -> None:
    solution = implicit_root(ridge_gradient, ridge_solver, solve=lu)

    def outer(theta):
        return (solution(INIT, theta) * Y[:5]).sin().sum()

    def exact(theta):
        return (ridge_solver(INIT, theta) * Y[:5]).sin().sum()

    expected = torch.autograd.functional.hessian(exact, THETA)
    v = torch.randn(5, dtype=torch.float64, generator=G)
    torch.testing.assert_close(torch.autograd.functional.hessian(outer, THETA), expected)
    torch.testing.assert_close(torch.func.jvp(torch.func.grad(outer), (THETA,), (v,))[1], expected @ v)

    def slope(theta):
        return torch.func.jvp(outer, (theta,), (v,))[1]

    torch.testing.assert_close(torch.func.grad(slope)(THETA), expected @ v)
    torch.testing.assert_close(torch.func.jvp(slope, (THETA,), (v,))[1], v @ expected @ v)


def test_second_derivatives_with_iterative_solvers_and_several_arguments() -> None:
    solution = implicit_root(ridge_gradient, ridge_solver, solve=partial(cg, tol=1e-12))
    theta, scale = THETA.clone().requires_grad_(), torch.tensor(1.5, dtype=torch.float64, requires_grad=True)

    def outer(theta, scale):
        return solution(INIT, theta, scale).pow(3).sum()

    assert torch.autograd.gradcheck(outer, (theta, scale), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(outer, (theta, scale))


def test_jacobians_and_batches_of_problems() -> None:
    def by_numpy(init: Tensor, theta: Tensor) -> Tensor:
        return torch.from_numpy(ridge_solver(init, theta).numpy().copy())  # sees plain tensors, inside of any transform

    solution = implicit_root(ridge_gradient, by_numpy, solve=partial(cg, tol=1e-12))
    for jacobian in (torch.func.jacrev, torch.func.jacfwd):
        torch.testing.assert_close(jacobian(lambda theta: solution(INIT, theta))(THETA), ridge_jacobian())
    thetas = torch.stack([THETA, 2 * THETA])
    batch = torch.func.vmap(lambda theta: solution(INIT, theta))(thetas)
    torch.testing.assert_close(batch, torch.stack([ridge_solver(INIT, theta) for theta in thetas]))
    gradients = torch.func.vmap(torch.func.grad(lambda theta: solution(INIT, theta).sum()))(thetas)
    torch.testing.assert_close(gradients[0], ridge_jacobian().sum(0))
    aux = implicit_root(ridge_gradient, lambda init, theta: (by_numpy(init, theta), 3), has_aux=True)
    with pytest.raises(NotImplementedError, match="has_aux does not go with"):
        torch.func.vmap(lambda theta: aux(INIT, theta)[0])(thetas)


def test_operations_without_forward_mode_or_in_short_types() -> None:
    class Cube(torch.autograd.Function):
        @staticmethod
        def forward(x):
            return x**3

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs)

        @staticmethod
        def backward(ctx, gradient):
            return 3 * ctx.saved_tensors[0] ** 2 * gradient

    theta = torch.tensor([8.0, 27.0], requires_grad=True)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
        root = implicit_root(lambda x, t: Cube.apply(x) - t, lambda init, t: torch.tensor([2.0, 3.0]).to(t.dtype))
        (gradient,) = torch.autograd.grad(root(None, theta.to(dtype)).sum(), theta)
        torch.testing.assert_close(gradient, torch.tensor([1 / 12, 1 / 27]), rtol=tolerance, atol=0)


def test_structures_for_x_and_for_theta() -> None:
    def optimality(x, theta, shift):
        return {"a": [theta["p"] * x["a"][0] - x["b"]], "b": x["b"] - theta["q"] ** 2 - shift}

    def solver(init, theta, shift):
        b = theta["q"] ** 2 + shift
        return {"b": b.detach(), "a": [(b / theta["p"]).detach()]}  # keys in another order

    theta = {"p": torch.tensor([2.0], requires_grad=True), "q": torch.tensor([3.0], requires_grad=True)}
    shift = torch.tensor([1.0])
    x = implicit_root(optimality, solver, solve=lu)({"a": [torch.zeros(1)], "b": torch.zeros(1)}, theta, shift)
    p, q = torch.autograd.grad(x["a"][0].sum(), list(theta.values()))
    torch.testing.assert_close((p, q), (torch.tensor([-10.0 / 4]), torch.tensor([6.0 / 2])))
    (of_theta, of_shift), _ = root_vjp(
        optimality, x, (theta, shift), {"a": [torch.ones(1)], "b": torch.zeros(1)}, needed=[False, True]
    )
    assert of_theta is None
    torch.testing.assert_close(of_shift.detach(), torch.tensor([0.5]))
    tangent, _ = root_jvp(optimality, x, (theta, shift), (None, torch.ones(1)))
    torch.testing.assert_close(tangent["a"][0].detach(), torch.tensor([0.5]))
    torch.testing.assert_close(tangent["b"].detach(), torch.tensor([1.0]))


def test_one_reverse_solve_is_shared_and_unneeded_arguments_cost_nothing() -> None:
    solves, reached = [], []

    def solve(matvec, b, **settings):
        solves.append(b)
        return lu(matvec, b, **settings)

    def optimality(x, theta, scale):
        reached.append((theta.requires_grad, scale.requires_grad))
        return ridge_gradient(x, theta, scale)

    scale = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    theta = THETA.clone().requires_grad_()
    implicit_root(optimality, ridge_solver, solve=solve)(INIT, theta, scale).sum().backward()
    assert len(solves) == 1
    assert theta.grad is not None
    expected = ridge_solver(INIT, THETA).sum()  # linear in the scale
    torch.testing.assert_close(scale.grad, expected)
    theta.grad = None
    implicit_root(optimality, ridge_solver, solve=solve)(INIT, THETA, scale).sum().backward()
    assert theta.grad is None


def test_the_initial_point_gets_no_gradient() -> None:
    init = INIT.clone().requires_grad_()
    theta = THETA.clone().requires_grad_()

    def solver(init, theta):
        return 0 * init + ridge_solver(init, theta)

    x = implicit_root(ridge_gradient, solver, solve=lu)(init, theta)
    x.sum().backward()
    assert init.grad is None
    torch.testing.assert_close(theta.grad, ridge_jacobian().sum(0))
    unrolled = implicit_root(ridge_gradient, solver, solve=lu, implicit_diff=False)(init, theta)
    unrolled.sum().backward()
    assert init.grad is not None


def test_init_carrying_theta_is_cut() -> None:
    """No derivative sneaks in through the start, as it would with a solver that stops at once."""
    theta = THETA.clone().requires_grad_()
    x = implicit_root(ridge_gradient, lambda init, theta: init, solve=lu)(ridge_solver(INIT, theta), theta)
    torch.testing.assert_close(torch.autograd.grad(x.sum(), theta)[0], ridge_jacobian().sum(0))


@pytest.mark.parametrize("steps", [5, 40, 400])
def test_unrolled_steps_approach_the_implicit_derivative(steps: int) -> None:
    def descent(init, theta):
        for _ in range(steps):
            init = init - 0.3 * ridge_gradient(init, theta)
        return init

    theta = THETA.clone().requires_grad_()
    unrolled = implicit_root(ridge_gradient, descent, implicit_diff=False)(INIT, theta)
    (gradient,) = torch.autograd.grad(unrolled.sum(), theta)
    error = (gradient - ridge_jacobian().sum(0)).norm()
    slowest = 1 - 0.3 * torch.linalg.eigvalsh(X.T @ X / len(Y) + torch.diag(THETA)).min()
    assert error <= 3 * (steps + 1) * slowest**steps + 1e-12


def test_auxiliary_output_passes_without_gradient() -> None:
    def solver(init, theta):
        return ridge_solver(init, theta), {"steps": 3, "loss": theta.sum(), "name": "direct"}

    theta = THETA.clone().requires_grad_()
    x, aux = implicit_root(ridge_gradient, solver, has_aux=True, solve=lu)(INIT, theta)
    assert (aux["steps"], aux["name"]) == (3, "direct")
    assert not aux["loss"].requires_grad
    torch.testing.assert_close(torch.autograd.grad(x.sum(), theta)[0], ridge_jacobian().sum(0))


def test_decorator_and_report() -> None:
    reports = []

    @implicit_root(ridge_gradient, solve=partial(cg, tol=1e-12), report=reports.append)
    def solution(init, theta):
        """Solves ridge regression."""
        return ridge_solver(init, theta)

    assert solution.__name__ == "solution"
    theta = THETA.clone().requires_grad_()
    solution(INIT, theta).sum().backward()
    assert [int(info.iterations) for info in reports] == [5]


@pytest.mark.parametrize(
    "solve", [normal_cg, partial(neumann, maxiter=200), gmres], ids=["normal_cg", "neumann", "gmres"]
)
def test_fixed_point_is_the_root(solve) -> None:
    def step(x, theta):
        return x - 0.3 * ridge_gradient(x, theta)

    solution = implicit_fixed_point(step, ridge_solver, solve=partial(solve, tol=1e-10))
    gradient = torch.func.grad(lambda theta: solution(INIT, theta).sum())(THETA)
    torch.testing.assert_close(gradient, ridge_jacobian().sum(0), rtol=1e-8, atol=1e-8)


def test_gradient_inside_the_optimality_mapping() -> None:
    def objective(x, theta):
        return (X @ x - Y).pow(2).sum() / (2 * len(Y)) + (theta * x * x).sum() / 2

    solution = implicit_root(torch.func.grad(objective), ridge_solver, solve=cg)
    theta = THETA.clone().requires_grad_()
    torch.testing.assert_close(
        torch.autograd.grad(solution(INIT, theta).sum(), theta)[0], ridge_jacobian().sum(0), rtol=1e-4, atol=1e-4
    )


def test_training_inside_the_solver_with_its_own_backward() -> None:
    def solver(init, theta):
        w = torch.nn.Parameter(init.clone())
        optimizer = torch.optim.LBFGS([w], max_iter=200, tolerance_grad=1e-12, tolerance_change=0)

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = (X @ w - Y).pow(2).sum() / (2 * len(Y)) + (theta * w * w).sum() / 2
            loss.backward()
            return loss

        optimizer.step(closure)
        return w

    theta = THETA.clone().requires_grad_()
    implicit_root(ridge_gradient, solver, solve=lu)(INIT, theta).sum().backward()
    torch.testing.assert_close(theta.grad, ridge_jacobian().sum(0), rtol=1e-6, atol=1e-6)


def test_a_tiny_cotangent_in_single_precision() -> None:
    solution = implicit_root(lambda x, t: x**3 - t, lambda init, t: t ** (1 / 3))
    theta = torch.tensor([8.0, 27.0], requires_grad=True)
    (gradient,) = torch.autograd.grad(1e-13 * solution(torch.ones(2), theta).sum(), theta)
    torch.testing.assert_close(gradient * 1e13, torch.tensor([1 / 12, 1 / 27]), rtol=1e-4, atol=0)
    (gradient,) = torch.autograd.grad(0 * solution(torch.ones(2), theta).sum(), theta)
    assert gradient.tolist() == [0, 0]


def test_wrong_output_of_the_mapping() -> None:
    theta = THETA.clone().requires_grad_()
    x = implicit_root(lambda x, theta: (x * theta).sum(), ridge_solver)(INIT, theta)
    with pytest.raises(ValueError, match=r"value of the optimality mapping F must have the shapes .*5.*got .*\(\)"):
        x.sum().backward()
    x = implicit_fixed_point(lambda x, theta: (x * theta).sum(), ridge_solver)(INIT, theta)
    with pytest.raises(ValueError, match=r"value of the fixed-point mapping T must have the shapes"):
        x.sum().backward()
    x = implicit_root(lambda x, theta: [x * theta], ridge_solver)(INIT, theta)
    with pytest.raises(ValueError, match="structure"):
        x.sum().backward()


def test_a_solver_that_records_its_steps_is_warned_of_and_cut() -> None:
    captured = THETA.clone().requires_grad_()

    def solver(init, theta):
        return ridge_solver(init, captured)  # not the argument: the graph of the closure

    with pytest.warns(UserWarning, match="graph of its own, which is cut"):
        x = implicit_root(ridge_gradient, solver, solve=lu)(INIT, captured)
    torch.testing.assert_close(torch.autograd.grad(x.sum(), captured)[0], ridge_jacobian().sum(0))


def test_a_solve_that_does_not_converge() -> None:
    theta = THETA.clone().requires_grad_()
    solve = partial(normal_cg, maxiter=1)
    with pytest.warns(
        UserWarning, match=r"did not converge: relative residual \d\.\de-\d+ after 1 iterations; .*ridge"
    ):
        implicit_root(ridge_gradient, ridge_solver, solve=solve)(INIT, theta).sum().backward()
    with pytest.raises(RuntimeError, match="did not converge"):
        implicit_root(ridge_gradient, ridge_solver, solve=solve, strict=True)(INIT, theta).sum().backward()
    with pytest.raises(RuntimeError, match="relative residual nan"):
        implicit_root(lambda x, t: x * t * torch.nan, ridge_solver)(INIT, theta).sum().backward()


def test_negative_curvature_and_singular_systems_are_told() -> None:
    theta = torch.ones(2, requires_grad=True)

    def saddle(x, theta):
        return torch.stack([x[0], -x[1]]) - theta

    x = implicit_root(saddle, lambda init, theta: theta.clone(), solve=cg)(theta, theta)
    with pytest.warns(UserWarning, match="negative curvature .*normal_cg"):
        x.sum().backward()

    def singular(x, theta):
        return (x.sum() - theta.sum()).expand(2)

    for solve, error, match in ((lu, ValueError, "ridge or use normal_cg"), (bicgstab, None, "did not converge")):
        x = implicit_root(singular, lambda init, theta: theta.clone(), solve=solve)(theta, theta)
        with pytest.raises(error, match=match) if error else pytest.warns(UserWarning, match=match):
            x[0].backward()


def test_bad_arguments() -> None:
    with pytest.raises(TypeError, match=r"argument 0: torch.int64, 2: torch.bool.*closure"):
        implicit_root(ridge_gradient, ridge_solver)(INIT, torch.arange(5), THETA, torch.ones(1, dtype=torch.bool))
    with pytest.raises(TypeError, match="theta argument 0 must hold tensors only, got float"):
        implicit_root(ridge_gradient, ridge_solver)(INIT, 0.1)
    with pytest.raises(ValueError, match="one entry for each of 1 arguments, got 2"):
        root_vjp(ridge_gradient, INIT, (THETA,), INIT, needed=[True, False])
    with pytest.raises(ValueError, match="nothing to differentiate"):
        root_vjp(ridge_gradient, INIT, (THETA,), INIT, needed=[False])
    with pytest.raises(ValueError, match="the cotangent must have the shapes"):
        root_vjp(ridge_gradient, INIT, (THETA,), torch.ones(2))
    with pytest.raises(ValueError, match="the tangent of argument 0 must have the shapes"):
        root_jvp(ridge_gradient, INIT, (THETA,), (torch.ones(2),))
    with pytest.raises(ValueError, match="one tangent for each of 1 arguments, got 0"):
        root_jvp(ridge_gradient, INIT, (THETA,), ())


def test_nothing_warns_where_all_is_well() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        implicit_root(ridge_gradient, ridge_solver)(INIT, THETA.clone().requires_grad_()).sum().backward()


def test_error_of_the_jacobian_at_an_approximate_root_is_within_the_bound() -> None:
    theta = THETA.clone()
    x = ridge_solver(INIT, theta)
    A = X.T @ X / len(Y) + torch.diag(theta)  # constant in x, so gamma = 0; B = diag(x) is 1-Lipschitz
    alpha = torch.linalg.eigvalsh(A).min().item()
    for size in (1e-1, 1e-3, 1e-6):
        nearby = x + size * torch.nn.functional.normalize(torch.ones(5, dtype=torch.float64), dim=0)
        rows = [root_vjp(ridge_gradient, nearby, (theta,), e, solve=lu)[0][0] for e in torch.eye(5).double()]
        error = torch.linalg.matrix_norm(torch.stack(rows) - ridge_jacobian(), 2)
        bound = jacobian_error_bound(size, alpha=alpha, beta=1.0, gamma=0.0, radius=x.abs().max().item())
        assert 0 < error <= bound
    with pytest.raises(ValueError, match="alpha .*gamma"):
        jacobian_error_bound(1.0, alpha=0.0, beta=1.0, gamma=-1.0, radius=1.0)
