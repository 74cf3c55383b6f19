"""Linear solvers against dense solutions and closed forms."""

from functools import partial

import pytest
import torch
from torch import Tensor

from lightning_hpo.functional.bilevel.linear_solve import (
    LinearSolve,
    bicgstab,
    cg,
    gmres,
    neumann,
    normal_cg,
    refinement,
)

DIM = 12


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def definite() -> Tensor:
    root = torch.randn(DIM, DIM, dtype=torch.float64, generator=generator())
    return root @ root.T / DIM + 0.5 * torch.eye(DIM, dtype=torch.float64)


def general() -> Tensor:
    return definite() + 0.3 * torch.randn(DIM, DIM, dtype=torch.float64, generator=generator(1))


def rhs() -> Tensor:
    return torch.randn(DIM, dtype=torch.float64, generator=generator(2))


def products(A: Tensor) -> dict:
    return {"matvec": lambda p: A @ p, "rmatvec": lambda q: A.T @ q}


SYMMETRIC: dict[str, LinearSolve] = {
    "cg": cg,
    "neumann": partial(neumann, alpha=0.3, maxiter=2000),
    "refinement": partial(refinement, solve=cg, shift=0.1, maxiter=100),
}
GENERAL: dict[str, LinearSolve] = {
    "normal_cg": normal_cg,
    "bicgstab": bicgstab,
    "gmres": gmres,
    "gmres restarted": partial(gmres, restart=5, maxiter=300),
    "refined gmres": partial(refinement, solve=gmres, shift=torch.full((DIM,), 0.01, dtype=torch.float64), maxiter=60),
}
every_solver = pytest.mark.parametrize("name", [*SYMMETRIC, *GENERAL])


def pick(name: str) -> tuple[LinearSolve, Tensor]:
    return (SYMMETRIC[name], definite()) if name in SYMMETRIC else (GENERAL[name], general())


@every_solver
@pytest.mark.parametrize("ridge", [0.0, 0.4])
def test_solution_and_report(name: str, ridge: float) -> None:
    solve, A = pick(name)
    b = rhs()
    x, info = solve(**products(A), b=b, ridge=ridge, tol=1e-10)
    eye = ridge * torch.eye(DIM, dtype=torch.float64)
    if name == "normal_cg":
        expected = torch.linalg.solve(A.T @ A + eye, A.T @ b)
        residual = (A.T @ (A @ x - b) + ridge * x).norm() / (A.T @ b).norm() if ridge else (A @ x - b).norm() / b.norm()
    else:
        expected = torch.linalg.solve(A + eye, b)
        residual = ((A + eye) @ x - b).norm() / b.norm()
    assert (x - expected).norm() <= 1e-8 * expected.norm()
    assert info.converged
    assert not info.negative_curvature
    assert info.residual <= 1e-10
    if name != "neumann":  # which reports one term fewer
        assert info.residual == pytest.approx(residual.item(), rel=0.1, abs=1e-12)


@every_solver
def test_a_good_start_saves_the_iterations(name: str) -> None:
    solve, A = pick(name)
    x = torch.linalg.solve(A, rhs())
    answer, info = solve(**products(A), b=rhs(), init=x, tol=1e-8)
    assert info.iterations == 0
    torch.testing.assert_close(answer, x, rtol=1e-14, atol=0)
    start = torch.ones(DIM, dtype=torch.float64)
    torch.testing.assert_close(solve(**products(A), b=rhs(), init=start, tol=1e-12)[0], x, rtol=1e-8, atol=1e-8)


@every_solver
@pytest.mark.parametrize("tol", [0.0, 1e-5])
def test_zero_gives_zero(name: str, tol: float) -> None:
    solve, A = pick(name)
    x, info = solve(**products(A), b=torch.zeros(DIM, dtype=torch.float64), init=rhs(), tol=tol)
    assert x.count_nonzero() == 0
    assert info.residual == 0
    assert info.converged


@every_solver
@pytest.mark.parametrize("size", [1e-13, 1e-30, 1e30])
def test_tiny_and_huge_right_hand_sides_in_single_precision(name: str, size: float) -> None:
    solve, A = pick(name)
    if name == "refined gmres":
        solve = partial(refinement, solve=gmres, shift=0.01, maxiter=60)
    A = A.float()
    x, info = solve(**products(A), b=size * rhs().float())
    expected = torch.linalg.solve(A.double(), rhs())
    assert info.converged
    assert (x.double() / size - expected).norm() <= 1e-3 * expected.norm()


@every_solver
def test_many_fixed_iterations_neither_break_nor_drift(name: str) -> None:
    solve, A = pick(name)
    x, info = solve(**products(A), b=rhs(), tol=0.0, maxiter=200)
    assert torch.isfinite(x).all()
    assert not info.negative_curvature
    torch.testing.assert_close(A @ x, rhs(), rtol=1e-9, atol=1e-9)


def test_no_number_is_read_back_with_a_fixed_number_of_iterations() -> None:
    A = definite().to("meta")  # a meta tensor cannot be read
    for solve in (cg, normal_cg, bicgstab, partial(neumann, alpha=0.3)):
        assert solve(lambda p: A @ p, rhs().to("meta"), rmatvec=lambda p: A @ p, tol=0.0, maxiter=3)[0].shape == (DIM,)


def test_conjugate_gradients_end_in_as_many_steps_as_eigenvalues() -> None:
    A = torch.diag(torch.tensor([1.0, 1, 1, 5, 5, 9], dtype=torch.float64))
    _, info = cg(lambda p: A @ p, torch.ones(6, dtype=torch.float64), tol=1e-10)
    assert info.iterations == 3


def test_fixed_iterations_are_the_krylov_optimum() -> None:
    A, b = definite(), rhs()
    krylov = torch.linalg.qr(torch.stack([b, A @ b, A @ A @ b], 1))[0]
    expected = krylov @ torch.linalg.solve(krylov.T @ A @ krylov, krylov.T @ b)
    torch.testing.assert_close(cg(lambda p: A @ p, b, tol=0.0, maxiter=3)[0], expected)
    A = general()
    krylov = torch.linalg.qr(torch.stack([b, A @ b, A @ A @ b], 1))[0]
    expected = krylov @ torch.linalg.lstsq(A @ krylov, b[:, None])[0][:, 0]
    torch.testing.assert_close(gmres(lambda p: A @ p, b, tol=0.0, maxiter=3)[0], expected)


def test_gmres_stays_orthogonal_in_a_badly_conditioned_system() -> None:
    size = 60
    basis = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator(6)))[0]
    A = basis @ torch.diag(torch.logspace(0, -10, size, dtype=torch.float64)) @ basis.T
    _, info = gmres(lambda p: A @ p, torch.ones(size, dtype=torch.float64), tol=0.0, maxiter=size, restart=size)
    assert info.residual <= 1e-5  # with one pass of Gram and Schmidt 1e-3


@pytest.mark.parametrize("tol", [0.0, 1e-5])
def test_negative_curvature_stops_with_the_iterate_at_hand(tol: float) -> None:
    A = torch.diag(torch.tensor([4.0, 3.0, -1.0]))
    b = torch.tensor([1.0, 1.0, 0.5])
    x, info = cg(lambda p: A @ p, b, tol=tol, maxiter=20)
    assert info.negative_curvature
    assert not info.converged
    assert info.iterations == 1
    torch.testing.assert_close(x, b * (b @ b) / (b @ A @ b))  # the first step of steepest descent
    x, info = cg(lambda p: A @ p, torch.tensor([0.0, 0.0, 1.0]), tol=tol)
    assert info.negative_curvature
    assert x.tolist() == [0, 0, 0]
    assert cg(lambda p: A @ p, b, ridge=1.5, tol=tol)[1].converged


@pytest.mark.parametrize("shape", [(5, 3), (3, 5)])
def test_normal_equations_of_maps_that_are_not_square(shape: tuple[int, int]) -> None:
    A = torch.randn(*shape, dtype=torch.float64, generator=generator(3))
    b = torch.randn(shape[0], dtype=torch.float64, generator=generator(4))
    x, info = normal_cg(**products(A), b=b, tol=1e-12)
    assert info.converged
    torch.testing.assert_close(x, torch.linalg.pinv(A) @ b)
    assert info.residual == pytest.approx(((A @ x - b).norm() / b.norm()).item(), abs=1e-10)


def test_singular_systems_have_their_least_squares_solution() -> None:
    A = torch.diag(torch.tensor([2.0, 1.0, 0.0]))
    x, info = normal_cg(**products(A), b=torch.tensor([2.0, 3.0, 5.0]))
    torch.testing.assert_close(x, torch.tensor([1.0, 3.0, 0.0]))
    assert info.converged
    for solve in (cg, bicgstab, gmres):
        x, info = solve(**products(A), b=torch.tensor([2.0, 3.0, 5.0]))
        assert torch.isfinite(x).all()
        assert not info.converged


@pytest.mark.parametrize("steps", [1, 4, 9])
def test_neumann_is_the_truncated_series_and_the_fixed_point_iteration(steps: int) -> None:
    A, b, alpha = definite(), rhs(), 0.3
    step = torch.eye(DIM, dtype=torch.float64) - alpha * A
    series = alpha * sum(torch.linalg.matrix_power(step, j) @ b for j in range(steps + 1))
    x, info = neumann(lambda p: A @ p, b, maxiter=steps, alpha=alpha)
    torch.testing.assert_close(x, series, rtol=1e-12, atol=1e-12)
    assert info.iterations == steps
    walk = torch.zeros_like(b)
    for k in range(steps + 1):
        if k == steps:
            assert info.residual == pytest.approx(((b - A @ walk).norm() / b.norm()).item(), rel=1e-10)
        walk = walk - alpha * (A @ walk - b)
    torch.testing.assert_close(x, walk, rtol=1e-12, atol=1e-12)


def test_a_diverging_series_says_so() -> None:
    assert not neumann(lambda p: 5 * p, torch.ones(2))[1].converged


def test_refinement_takes_the_shift_out_of_a_saddle_point() -> None:
    Q = torch.diag(torch.tensor([2.0, 1.0, 3.0], dtype=torch.float64))
    E = torch.tensor([[1.0, 1.0, 1.0], [2.0, 2.0, 2.0]], dtype=torch.float64)  # dependent rows: a singular system
    S = torch.cat([torch.cat([Q, E.T], 1), torch.cat([E, torch.zeros(2, 2, dtype=torch.float64)], 1)])
    b = torch.tensor([1.0, 2.0, 3.0, 1.0, 2.0], dtype=torch.float64)
    shift = torch.tensor([1e-3] * 3 + [-1e-3] * 2, dtype=torch.float64)
    x, info = refinement(**products(S), b=b, solve=partial(gmres, tol=1e-12), shift=shift, tol=1e-10, maxiter=50)
    assert info.converged
    torch.testing.assert_close(S @ x, b)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"b": torch.ones(2, 2)}, "vector"),
        ({"b": torch.ones(0)}, "not empty"),
        ({"ridge": -1.0, "tol": -1.0, "maxiter": 0}, "ridge .*tol .*maxiter"),
        ({"init": torch.ones(3)}, "init must have shape"),
        ({"matvec": lambda p: p[:1]}, "matvec must return a vector of shape"),
    ],
)
@pytest.mark.parametrize("solve", [cg, normal_cg, bicgstab, gmres, neumann, partial(refinement, solve=cg)])
def test_bad_arguments(solve: LinearSolve, change: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        solve(**({"matvec": lambda p: p, "rmatvec": lambda p: p, "b": torch.ones(2)} | change))


def test_bad_arguments_of_single_solvers() -> None:
    with pytest.raises(TypeError, match="floating"):
        cg(lambda p: p, torch.ones(2, dtype=torch.long))
    with pytest.raises(ValueError, match="rmatvec"):
        normal_cg(lambda p: p, torch.ones(2))
    with pytest.raises(ValueError, match="restart"):
        gmres(lambda p: p, torch.ones(2), restart=0)
    with pytest.raises(ValueError, match="alpha"):
        neumann(lambda p: p, torch.ones(2), alpha=0.0)
