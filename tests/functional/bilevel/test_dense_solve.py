"""Direct solvers against torch, and what they refuse."""

import pytest
import torch

from lightning_hpo.functional.bilevel.dense_solve import cholesky, inv, lu, materialize, qr

every_solver = pytest.mark.parametrize("solve", [lu, cholesky, qr, inv])


def definite() -> torch.Tensor:
    root = torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return root @ root.T + torch.eye(6, dtype=torch.float64)


@every_solver
@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("ridge", [0.0, 0.7])
def test_solution_and_report(solve, batched: bool, ridge: float) -> None:
    A = definite()
    if solve is not cholesky:
        A = A + torch.arange(36, dtype=torch.float64).reshape(6, 6) / 10
    b = torch.arange(6, dtype=torch.float64)
    x, info = solve(lambda p: A @ p, b, ridge=ridge, batched=batched)
    expected = torch.linalg.solve(A + ridge * torch.eye(6, dtype=torch.float64), b)
    assert (x - expected).norm() <= 1e-10 * expected.norm()
    assert info.converged
    assert info.residual < 1e-12
    assert info.iterations == 0


@every_solver
def test_tiny_and_zero_right_hand_sides(solve) -> None:
    A = definite().float()
    x, info = solve(lambda p: A @ p, torch.full((6,), 1e-13))
    torch.testing.assert_close(A @ x * 1e13, torch.ones(6), rtol=1e-4, atol=1e-4)
    assert solve(lambda p: A @ p, torch.zeros(6))[0].count_nonzero() == 0
    assert info.converged


@every_solver
def test_a_singular_matrix_is_an_error_with_the_remedy(solve) -> None:
    A = torch.tensor([[1.0, 2.0], [2.0, 4.0]])
    with pytest.raises(ValueError, match=f"{solve.__name__}: the linear system is singular.*ridge.*normal_cg"):
        solve(lambda p: A @ p, torch.ones(2))
    assert solve(lambda p: A @ p, torch.ones(2), ridge=0.1)[1].converged


def test_cholesky_refuses_indefinite_matrices() -> None:
    with pytest.raises(ValueError, match="not positive definite"):
        cholesky(lambda p: -p, torch.ones(2))


@every_solver
def test_large_systems_are_refused_before_any_product(solve) -> None:
    def matvec(p: torch.Tensor) -> torch.Tensor:
        raise AssertionError

    with pytest.raises(ValueError, match=r"10001 x 10001 matrix of 0\.4 GB.*normal_cg"):
        solve(matvec, torch.ones(10_001))
    with pytest.raises(ValueError, match="not finite"):
        solve(lambda p: p * torch.inf, torch.ones(2))


def test_the_matrix_is_not_its_transpose() -> None:
    A = torch.arange(9.0).reshape(3, 3)
    torch.testing.assert_close(materialize(lambda p: A @ p, torch.zeros(3)), A)
    torch.testing.assert_close(materialize(lambda p: A @ p, torch.zeros(3), batched=True), A)
