"""Equality-constrained quadratic programs against dense solutions."""

from functools import partial

import pytest
import torch
from torch import Tensor

from lightning_hpo.functional.bilevel.kkt import kkt
from lightning_hpo.functional.bilevel.linear_solve import cg, gmres, lu, normal_cg
from lightning_hpo.functional.bilevel.quadratic import equality_qp, quasi_definite, solve_equality_qp

G = torch.Generator().manual_seed(0)
ROOT = torch.randn(5, 5, dtype=torch.float64, generator=G)
A = torch.randn(2, 5, dtype=torch.float64, generator=G)
C, B = torch.randn(5, dtype=torch.float64, generator=G), torch.randn(2, dtype=torch.float64, generator=G)


def dense(root: Tensor, c: Tensor, A: Tensor, b: Tensor) -> Tensor:
    Q = root @ root.T + torch.eye(5, dtype=torch.float64)
    matrix = torch.cat([torch.cat([Q, A.T], 1), torch.cat([A, torch.zeros(2, 2, dtype=torch.float64)], 1)])
    return torch.linalg.solve(matrix, torch.cat([-c, b]))


@pytest.mark.parametrize(
    "solve",
    [lu, partial(gmres, tol=1e-12), partial(normal_cg, tol=1e-12), quasi_definite(5, 2, 1e-3, lu, tol=1e-12)],
)
def test_solution_and_derivatives_in_all_four(solve) -> None:
    def solution(root: Tensor, c: Tensor, A: Tensor, b: Tensor) -> Tensor:
        product = lambda root, z: root @ (root.T @ z) + z  # noqa: E731
        return torch.cat(solve_equality_qp((root, c), (A, b), matvec_Q=product, solve=solve))

    inputs = (ROOT, C, A, B)
    torch.testing.assert_close(solution(*inputs), dense(*inputs))
    v = torch.randn(7, dtype=torch.float64, generator=G)
    found = torch.autograd.functional.vjp(solution, inputs, v)[1]
    torch.testing.assert_close(found, torch.autograd.functional.vjp(dense, inputs, v)[1], rtol=1e-7, atol=1e-9)
    tangents = tuple(torch.randn_like(part) for part in inputs)
    forward = torch.func.jvp(solution, inputs, tangents)[1]
    torch.testing.assert_close(forward, torch.func.jvp(dense, inputs, tangents)[1], rtol=1e-7, atol=1e-9)


def test_the_mapping_is_the_kkt_mapping_of_the_program() -> None:
    Q = ROOT @ ROOT.T
    z, nu = torch.randn(5, dtype=torch.float64, generator=G), torch.randn(2, dtype=torch.float64, generator=G)
    general = kkt(lambda z: z @ Q @ z / 2 + C @ z, equality=lambda z: A @ z - B)
    torch.testing.assert_close(equality_qp()((z, nu), (Q, C), (A, B)), general((z, nu)))


def test_dependent_constraints_need_the_quasi_definite_solver() -> None:
    twice = (torch.cat([A, A[:1]]), torch.cat([B, B[:1]]))
    Q = ROOT @ ROOT.T + torch.eye(5, dtype=torch.float64)
    with pytest.raises(ValueError, match="singular"):
        solve_equality_qp((Q, C), twice, solve=lu)
    c = C.clone().requires_grad_()
    solve = quasi_definite(5, 3, 1e-3, lu, tol=1e-12)
    z, _ = solve_equality_qp((Q, c), twice, solve=solve)
    torch.testing.assert_close(z, dense(ROOT, C, A, B)[:5])
    (gradient,) = torch.autograd.grad(z.sum(), c)
    exact = torch.autograd.functional.jacobian(lambda c: dense(ROOT, c, A, B)[:5].sum(), C)
    torch.testing.assert_close(gradient, exact)
    with pytest.raises(ValueError, match="delta"):
        quasi_definite(5, 3, 0.0)


def test_the_shift_is_positive_on_the_primal_and_negative_on_the_dual_block() -> None:
    seen = []

    def inner(matvec, b: Tensor, **settings):
        seen.append(matvec(torch.ones(3)))
        return lu(matvec, b, **settings)

    quasi_definite(2, 1, 0.5, inner)(lambda p: p, torch.ones(3))
    torch.testing.assert_close(seen[0], torch.tensor([1.5, 1.5, 0.5]))


def test_conjugate_gradients_do_not_suit_a_saddle_point() -> None:
    with pytest.warns(UserWarning, match="negative curvature"):
        solve_equality_qp((ROOT @ ROOT.T, C), (A, B), solve=partial(cg, maxiter=200))
