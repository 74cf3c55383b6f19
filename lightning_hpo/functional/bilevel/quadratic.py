"""Quadratic programs with equality constraints: their conditions, and a differentiable solution by linear solvers."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_hpo.functional.bilevel.implicit_differentiation import check_solve, implicit_root
from lightning_hpo.functional.bilevel.linear_solve import LinearSolve, gmres, refinement
from lightning_hpo.functional.bilevel.trees import TreeLayout

__all__ = ["equality_qp", "quasi_definite", "solve_equality_qp"]

Product = Callable[[Any, Tensor], Tensor]  # (parameters, vector) to vector
Pair = tuple[Any, Tensor]


def equality_qp(matvec_Q: Product = torch.mv, matvec_A: Product = torch.mv) -> Callable[..., tuple[Tensor, Tensor]]:  # noqa: N803
    r"""Root mapping of :math:`\min_z \tfrac12 z^\top Q z + c^\top z` with :math:`A z = b`.

    .. math:: F = [Q z + c + A^\top \nu ;\; A z - b]

    Args:
        matvec_Q: Product ``(parameters, z) -> Q z``; with a matrix as the parameters where not given.
        matvec_A: Product ``(parameters, z) -> A z``.

    Returns:
        ``F((z, nu), (parameters_Q, c), (parameters_A, b))``.

    References:
        Blondel et al., "Efficient and Modular Implicit Differentiation", NeurIPS 2022, app. A.

    Example:
        >>> point = (torch.tensor([1.0]), torch.tensor([-3.0]))
        >>> Q, A = torch.tensor([[2.0]]), torch.tensor([[1.0]])
        >>> equality_qp()(point, (Q, torch.tensor([1.0])), (A, torch.tensor([1.0])))
        (tensor([0.]), tensor([0.]))
    """

    def mapping(x: tuple[Tensor, Tensor], objective: Pair, equality: Pair) -> tuple[Tensor, Tensor]:
        z, nu = x
        value, pull = torch.func.vjp(partial(matvec_A, equality[0]), z)[:2]
        return matvec_Q(objective[0], z) + objective[1] + pull(nu)[0], value - equality[1]

    return mapping


def solve_equality_qp(
    objective: Pair,
    equality: Pair,
    *,
    matvec_Q: Product = torch.mv,  # noqa: N803
    matvec_A: Product = torch.mv,  # noqa: N803
    solve: LinearSolve = gmres,
) -> tuple[Tensor, Tensor]:
    r"""Solution of :math:`\min_z \tfrac12 z^\top Q z + c^\top z` with :math:`A z = b`, differentiable in all four.

    Value and derivatives solve systems with the matrix :math:`[[Q, A^\top], [A, 0]]`, which is not formed. Where it is
    singular, as with dependent constraints, :func:`quasi_definite` wraps the solver.

    Args:
        objective: Parameters of Q, and c of shape ``(d,)``.
        equality: Parameters of A, and b of shape ``(m,)``.
        matvec_Q: Product ``(parameters, z) -> Q z`` with a symmetric Q; a matrix where not given.
        matvec_A: Product ``(parameters, z) -> A z``.
        solve: Linear solver for a symmetric indefinite system.

    Returns:
        The solution of shape ``(d,)`` and the multipliers of shape ``(m,)``.

    References:
        Blondel et al., "Efficient and Modular Implicit Differentiation", NeurIPS 2022, app. A.

    Example:
        >>> Q, A = torch.eye(2), torch.ones(1, 2)
        >>> solve_equality_qp((Q, torch.tensor([1.0, 0.0])), (A, torch.tensor([3.0])))[0]
        tensor([1.0000, 2.0000])
    """
    mapping = equality_qp(matvec_Q, matvec_A)

    def solver(init: tuple[Tensor, Tensor], *theta: Pair) -> tuple[Tensor, Tensor]:
        layout = TreeLayout(init)
        origin = layout.ravel(mapping(init, *theta))

        def matvec(p: Tensor) -> Tensor:
            return layout.ravel(mapping(layout.unravel(p), *theta)) - origin

        x, info = solve(matvec, -origin, rmatvec=matvec)
        check_solve(info)
        return layout.unravel(x)

    init = (torch.zeros_like(objective[1]), torch.zeros_like(equality[1]))
    return implicit_root(mapping, solver, solve=solve)(init, objective, equality)


def quasi_definite(
    primal: int, dual: int, delta: float = 1e-4, solve: LinearSolve = gmres, **settings: Any
) -> LinearSolve:
    r"""A solver for saddle-point systems: refinement around :math:`[[Q + \delta I, A^\top], [A, -\delta I]]`.

    The shifted matrix is invertible for any A and any positive semi-definite Q; the refinement takes the shift out.

    Args:
        primal: The number of unknowns d.
        dual: The number of constraints m.
        delta: The shift :math:`\delta`, positive.
        solve: The inner solver.
        settings: Keywords of :func:`~lightning_hpo.functional.bilevel.neumann.refinement`.

    Returns:
        A linear solver.

    Raises:
        ValueError: If ``delta`` is not positive.

    References:
        Vanderbei, "Symmetric Quasidefinite Matrices", 1995.

    Example:
        >>> twice = torch.tensor([[1.0, 1.0], [1.0, 1.0]])  # the same constraint twice
        >>> solve = quasi_definite(2, 2)
        >>> equality = (twice, torch.tensor([3.0, 3.0]))
        >>> solve_equality_qp((torch.eye(2), torch.tensor([1.0, 0.0])), equality, solve=solve)[0]
        tensor([1.0000, 2.0000])
    """
    if not delta > 0:
        raise ValueError(f"delta must be positive, got {delta!r}")

    def solver(matvec: Any, b: Tensor, **others: Any) -> Any:
        signs = torch.cat([b.new_ones(primal), -b.new_ones(dual)])
        return refinement(matvec, b, solve=solve, shift=delta * signs, **(settings | others))

    return solver
