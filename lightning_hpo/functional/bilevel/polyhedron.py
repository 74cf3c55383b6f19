"""Quadratic programs with inequalities, differentiated through their optimality conditions; polyhedra."""

import torch
from torch import Tensor

from lightning_hpo.functional.bilevel.implicit_differentiation import implicit_root
from lightning_hpo.functional.bilevel.interior_point import QuadraticProgram, interior_point
from lightning_hpo.functional.bilevel.kkt import kkt
from lightning_hpo.functional.bilevel.linear_solve import LinearSolve, lu

__all__ = ["projection_polyhedron", "solve_qp"]


def solve_qp(
    objective: tuple[Tensor, Tensor],
    equality: tuple[Tensor, Tensor] | None = None,
    inequality: tuple[Tensor, Tensor] | None = None,
    *,
    solve: LinearSolve = lu,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Solution of :math:`\min_z \tfrac12 z^\top Q z + c^\top z` with :math:`A z = b`, :math:`G z \le h`.

    An interior-point method on dense matrices finds it; the derivatives in all six follow from the KKT conditions.

    Args:
        objective: Q of shape ``(d, d)``, symmetric and positive semi-definite, and c of shape ``(d,)``.
        equality: A of shape ``(m, d)`` and b of shape ``(m,)``; none where None.
        inequality: G of shape ``(k, d)`` and h of shape ``(k,)``; none where None.
        solve: Linear solver of the derivatives. Where a constraint is active with multiplier 0, or active constraints
            are dependent, the system is singular and wants
            :func:`~lightning_hpo.functional.bilevel.linear_solve.normal_cg`.

    Returns:
        The solution, the multipliers of the equalities and those of the inequalities.

    Raises:
        ValueError: If the program is infeasible or unbounded.

    References:
        Amos and Kolter, "OptNet: Differentiable Optimization as a Layer in Neural Networks", ICML 2017.

    Example:
        >>> z, _, _ = solve_qp((torch.eye(2), -torch.tensor([2.0, 0.5])), inequality=(torch.eye(2), torch.ones(2)))
        >>> z
        tensor([1.0000, 0.5000])
    """
    c = objective[1]
    none = (c.new_zeros(0, len(c)), c.new_zeros(0))
    equality, inequality = equality or none, inequality or none

    def quadratic(z: Tensor, objective: tuple[Tensor, Tensor], *_: object) -> Tensor:
        return z @ objective[0] @ z / 2 + objective[1] @ z

    def equal(z: Tensor, _: object, equality: tuple[Tensor, Tensor], *__: object) -> Tensor:
        return equality[0] @ z - equality[1]

    def below(z: Tensor, _: object, __: object, inequality: tuple[Tensor, Tensor]) -> Tensor:
        return inequality[0] @ z - inequality[1]

    def solver(_: None, *theta: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        return interior_point(QuadraticProgram(*theta[0], *theta[1], *theta[2]))

    return implicit_root(kkt(quadratic, equal, below), solver, solve=solve)(None, objective, equality, inequality)


def projection_polyhedron(
    x: Tensor, hyper: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None], *, solve: LinearSolve = lu
) -> Tensor:
    r"""On the polyhedron :math:`\{A p = b, G p \le h\}`.

    Args:
        x: Shape ``(d,)``.
        hyper: A, b, G and h as for :func:`solve_qp`; the first two or the last two may be None.
        solve: Linear solver of the derivatives.

    Returns:
        The shape of ``x``.

    Raises:
        ValueError: If the polyhedron is empty.

    References:
        Amos and Kolter, "OptNet: Differentiable Optimization as a Layer in Neural Networks", ICML 2017.

    Example:
        >>> projection_polyhedron(torch.tensor([2.0, 0.5]), (None, None, torch.eye(2), torch.ones(2)))
        tensor([1.0000, 0.5000])
    """
    A, b, G, h = hyper
    eye = torch.eye(len(x), dtype=x.dtype, device=x.device)
    equality = None if A is None or b is None else (A, b)
    inequality = None if G is None or h is None else (G, h)
    return solve_qp((eye, -x), equality, inequality, solve=solve)[0]
