"""Cone programs with known solutions: derivatives through the self-dual embedding."""

from functools import partial

import pytest
import torch
from torch import Tensor

from lightning_hpo.functional.bilevel.conic import (
    conic_point,
    conic_residual,
    conic_solution,
    projection_dual_cone,
    projection_second_order_cone,
)
from lightning_hpo.functional.bilevel.implicit_differentiation import implicit_root
from lightning_hpo.functional.bilevel.linear_solve import normal_cg

SOLVE = partial(normal_cg, tol=1e-13, maxiter=500)


def primal(cones: list, point: Tensor, *program: Tensor) -> Tensor:
    project = partial(projection_dual_cone, cones=cones)
    root = implicit_root(conic_residual(project), lambda init, program: point, solve=SOLVE)
    return conic_solution(root(None, program), len(program[1]), project)[0]


def check(cones: list, program: tuple[Tensor, ...], y: Tensor, closed_form) -> None:
    """The point is a root, and the derivative in E, c and d is that of the closed form."""
    x = closed_form(*program)
    E, _, d = program
    point = conic_point(x, y, d - E @ x)
    project = partial(projection_dual_cone, cones=cones)
    torch.testing.assert_close(conic_residual(project)(point, program), torch.zeros_like(point), rtol=0, atol=1e-12)
    torch.testing.assert_close(conic_solution(3 * point, len(x), project)[0], x)
    solution = partial(primal, cones, point)
    tangents = tuple(torch.randn(part.shape, dtype=part.dtype) for part in program)
    expected = torch.func.jvp(closed_form, program, tangents)[1]
    torch.testing.assert_close(torch.func.jvp(solution, program, tangents)[1], expected, rtol=1e-7, atol=1e-9)
    v = torch.arange(1.0, len(x) + 1).double()
    reverse = torch.autograd.functional.vjp(solution, program, v)[1]
    exact = torch.autograd.functional.vjp(closed_form, program, v)[1]
    torch.testing.assert_close(reverse, exact, rtol=1e-7, atol=1e-9)


def test_linear_program() -> None:
    """The least c'x above two lines and a third that is not active."""
    E = -torch.tensor([[2.0, 1.0], [1.0, 3.0], [1.0, 1.0]], dtype=torch.float64)
    d, c = -torch.tensor([4.0, 5.0, 1.0], dtype=torch.float64), torch.tensor([1.0, 1.0], dtype=torch.float64)
    y = torch.cat([torch.linalg.solve(-E[:2].T, c), torch.zeros(1).double()])
    assert (y[:2] > 0).all()
    check([("nonnegative", 3)], (E, c, d), y, lambda E, c, d: torch.linalg.solve(E[:2], d[:2]) + 0 * c)


def test_equalities_in_the_zero_cone() -> None:
    E = torch.tensor([[1.0, 1.0], [-1.0, 0.0], [0.0, -1.0]], dtype=torch.float64)  # on the simplex
    d, c = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64), torch.tensor([2.0, 5.0], dtype=torch.float64)
    y = torch.tensor([-2.0, 0.0, 3.0], dtype=torch.float64)
    rows = [0, 2]
    cones = [("zero", 1), ("nonnegative", 2)]
    check(cones, (E, c, d), y, lambda E, c, d: torch.linalg.solve(E[rows], d[rows]) + 0 * c)


def test_second_order_cone() -> None:
    """The least c'x in a ball of radius r about m is m - r c / |c|."""
    E = torch.cat([torch.zeros(1, 2), -torch.eye(2)]).double()
    d, c = torch.tensor([1.5, 0.3, -0.2], dtype=torch.float64), torch.tensor([3.0, 4.0], dtype=torch.float64)
    fixed = lambda E, c, d: -d[1:] - d[0] * c / c.norm()  # noqa: E731
    x = fixed(E, c, d)
    y = torch.cat([c.norm()[None], c])
    project = partial(projection_dual_cone, cones=[("second_order", 3)])
    point = conic_point(x, y, d - E @ x)
    torch.testing.assert_close(conic_residual(project)(point, (E, c, d)), torch.zeros(6).double(), rtol=0, atol=1e-12)
    solution = lambda c, d: primal([("second_order", 3)], point, E, c, d)  # noqa: E731
    found = torch.autograd.functional.jacobian(solution, (c, d))
    expected = torch.autograd.functional.jacobian(lambda c, d: fixed(E, c, d), (c, d))
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("point", [[3.0, 1, 2], [-3.0, 1, 2], [0.5, 1, 2]])
def test_projection_on_the_second_order_cone(point: list[float]) -> None:
    x = torch.tensor(point, dtype=torch.float64, requires_grad=True)
    p = projection_second_order_cone(x).detach()
    assert p[1:].norm() <= p[0] + 1e-12
    assert abs(p @ (x - p)) < 1e-12  # Moreau: orthogonal to what is left over,
    assert (p - x)[1:].norm() <= (p - x)[0] + 1e-12  # which lies in the polar cone
    torch.testing.assert_close(projection_second_order_cone(p), p)
    assert torch.autograd.gradcheck(projection_second_order_cone, x, check_forward_ad=True)


def test_the_axis_of_the_cone_gives_no_nan() -> None:
    for t in (1.0, -1.0, 0.0):
        x = torch.tensor([t, 0.0, 0.0], requires_grad=True)
        (gradient,) = torch.autograd.grad(projection_second_order_cone(x).sum(), x)
        assert torch.isfinite(gradient).all()


def test_wrong_cones_are_refused() -> None:
    with pytest.raises(ValueError, match="of 3 entries together"):
        projection_dual_cone(torch.ones(3), [("zero", 1)])
    with pytest.raises(ValueError, match="cones must be of kinds"):
        projection_dual_cone(torch.ones(3), [("exponential", 3)])
