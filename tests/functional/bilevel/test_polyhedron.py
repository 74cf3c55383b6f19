"""Quadratic programs with inequalities, and polyhedra, against simpler projections and finite differences."""

from functools import partial

import pytest
import torch
from torch import Tensor

from lightning_hpo.functional.bilevel.interior_point import QuadraticProgram, interior_point
from lightning_hpo.functional.bilevel.linear_solve import normal_cg
from lightning_hpo.functional.bilevel.polyhedron import projection_polyhedron, solve_qp
from lightning_hpo.functional.bilevel.projections import projection_box, projection_simplex

G = torch.Generator().manual_seed(0)
EYE, ONES, NONE = torch.eye(5).double(), torch.ones(1, 5).double(), torch.zeros(5).double()


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=G)


def simplex(x: Tensor, total: Tensor) -> Tensor:
    return projection_polyhedron(x, (ONES, total[None], -EYE, NONE))


def test_the_simplex_is_a_polyhedron() -> None:
    x, total = random(5), torch.tensor(1.5, dtype=torch.float64)
    torch.testing.assert_close(simplex(x, total), projection_simplex(x, total), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(simplex(simplex(x, total), total), simplex(x, total), rtol=1e-9, atol=1e-9)
    found = torch.autograd.functional.jacobian(simplex, (x, total))
    expected = torch.autograd.functional.jacobian(projection_simplex, (x, total))
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)
    v = random(5)
    forward = torch.func.jvp(lambda x: simplex(x, total), (x,), (v,))[1]
    torch.testing.assert_close(forward, expected[0] @ v, rtol=1e-8, atol=1e-8)


def test_the_box_is_a_polyhedron_in_single_precision_too() -> None:
    x, lower, upper = random(5).float(), random(5).float() - 1, random(5).float() + 1
    eye = torch.eye(5)
    p = projection_polyhedron(x, (None, None, torch.cat([-eye, eye]), torch.cat([-lower, upper])))
    torch.testing.assert_close(p, projection_box(x, (lower, upper)), rtol=1e-5, atol=1e-5)


def test_only_equalities() -> None:
    A, b, x = random(2, 5), random(2), random(5)
    p = projection_polyhedron(x, (A, b, None, None))
    torch.testing.assert_close(p, x - A.T @ torch.linalg.solve(A @ A.T, A @ x - b))
    twice = projection_polyhedron(x, (torch.cat([A, A]), torch.cat([b, b]), None, None), solve=normal_cg)
    torch.testing.assert_close(twice, p, rtol=1e-8, atol=1e-8)


def problem() -> tuple[Tensor, ...]:
    root, inside = random(5, 5), random(5)
    A, G = random(1, 5), random(6, 5)
    return root @ root.T + torch.eye(5), 3 * random(5), A, A @ inside, G, G @ inside + random(6).abs() / 3


def test_derivatives_in_all_six() -> None:
    inputs = tuple(part.requires_grad_() for part in problem())
    z, _, multipliers = solve_qp(inputs[:2], inputs[2:4], inputs[4:])
    active = (inputs[4] @ z - inputs[5]).abs() < 1e-6
    assert 1 <= active.sum() < 5
    assert torch.equal(active, multipliers > 1e-6)
    solution = lambda Q, c, A, b, G, h: solve_qp((Q, c), (A, b), (G, h))  # noqa: E731
    assert torch.autograd.gradcheck(solution, inputs, eps=1e-5, atol=1e-5, check_forward_ad=True)


def test_multipliers_satisfy_the_conditions() -> None:
    Q, c, A, b, G, h = problem()
    z, nu, lam = interior_point(QuadraticProgram(Q, c, A, b, G, h))
    torch.testing.assert_close(Q @ z + c + A.T @ nu + G.T @ lam, NONE, rtol=0, atol=1e-9)
    torch.testing.assert_close(A @ z, b, rtol=1e-9, atol=1e-9)
    assert (G @ z <= h + 1e-9).all()
    assert (lam >= 0).all()
    assert abs(lam @ (G @ z - h)) <= 1e-9


@pytest.mark.parametrize(
    "hyper",
    [
        (None, None, torch.tensor([[1.0], [-1.0]]), torch.tensor([-1.0, -1.0])),  # p <= -1 and p >= 1
        (torch.tensor([[1.0]]), torch.tensor([2.0]), torch.tensor([[1.0]]), torch.tensor([1.0])),
        (torch.tensor([[1.0], [1.0]]), torch.tensor([1.0, 2.0]), None, None),
    ],
)
def test_empty_polyhedra_are_refused(hyper: tuple[Tensor | None, ...]) -> None:
    with pytest.raises(ValueError, match="empty polyhedron"):
        projection_polyhedron(torch.zeros(1), hyper)


def test_an_unbounded_program_is_refused() -> None:
    with pytest.raises(ValueError, match="unbounded"):
        solve_qp((torch.zeros(1, 1), torch.ones(1)), inequality=(torch.ones(1, 1), torch.ones(1)))


def test_a_degenerate_vertex_has_a_derivative_by_least_squares_alone() -> None:
    x = torch.tensor([2.0, 3.0], requires_grad=True)
    three = (None, None, torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]), torch.tensor([1.0, 1.0, 2.0]))
    with pytest.raises(ValueError, match="normal_cg"):
        projection_polyhedron(x, three).sum().backward()
    projection_polyhedron(x, three, solve=partial(normal_cg, maxiter=200)).sum().backward()
    torch.testing.assert_close(x.grad, torch.zeros(2), rtol=0, atol=1e-4)
