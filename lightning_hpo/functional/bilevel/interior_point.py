"""A primal-dual interior-point method for small dense quadratic programs."""

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["QuadraticProgram", "interior_point"]


class QuadraticProgram(NamedTuple):
    r"""The problem :math:`\min_z \tfrac12 z^\top Q z + c^\top z` with :math:`A z = b` and :math:`G z \le h`.

    Attributes:
        Q: Shape ``(d, d)``, symmetric and positive semi-definite.
        c: Shape ``(d,)``.
        A: Shape ``(m, d)``; m may be 0.
        b: Shape ``(m,)``.
        G: Shape ``(k, d)``; k may be 0.
        h: Shape ``(k,)``.
    """

    Q: Tensor
    c: Tensor
    A: Tensor
    b: Tensor
    G: Tensor
    h: Tensor


Step = tuple[Tensor, Tensor, Tensor, Tensor]


def interior_point(program: QuadraticProgram, tol: float = 1e-12, maxiter: int = 60) -> tuple[Tensor, Tensor, Tensor]:
    """Solves a quadratic program by Mehrotra's predictor and corrector steps, in double precision on dense matrices.

    Args:
        program: The program.
        tol: Largest residual of the optimality conditions, relative to the size of the data.
        maxiter: Largest number of steps.

    Returns:
        The solution, the multipliers of the equalities and those of the inequalities.

    Raises:
        ValueError: If it does not converge: the program is infeasible or unbounded, or its scales are too different.

    References:
        Mehrotra, "On the Implementation of a Primal-Dual Interior Point Method", 1992; Nocedal and Wright, "Numerical
        Optimization", 2006, sec. 16.6.

    Example:
        >>> eye, none = torch.eye(1), torch.zeros(0, 1)
        >>> program = QuadraticProgram(eye, torch.tensor([-3.0]), none, torch.zeros(0), eye, torch.tensor([1.0]))
        >>> z, _, multiplier = interior_point(program)  # the nearest point to 3 below 1
        >>> z, multiplier
        (tensor([1.]), tensor([2.]))
    """
    dtype = program.c.dtype
    program = QuadraticProgram(*(part.double() for part in program))
    program = program._replace(Q=(program.Q + program.Q.mT) / 2)
    Q, c, A, b, G, h = program
    z, nu = torch.zeros_like(c), torch.zeros_like(b)
    s, lam = (h - G @ z).clamp(min=1.0), torch.ones_like(h)
    scale = 1 + max(float(part.abs().max()) for part in program if part.numel())
    for _ in range(maxiter):
        dual = Q @ z + c + A.mT @ nu + G.mT @ lam
        residuals = (dual, A @ z - b, G @ z + s - h)
        gap = s @ lam / max(len(s), 1)
        if max(float(gap), *(float(part.abs().max()) for part in residuals if part.numel())) <= tol * scale:
            z, nu, lam = polish(program, z, nu, lam, lam > s)
            return z.to(dtype), nu.to(dtype), lam.to(dtype)
        predicted = newton_step(program, s, lam, residuals, s * lam)
        size = step_size(s, lam, predicted)
        _, _, ds, dlam = predicted
        after = (s + size * ds) @ (lam + size * dlam) / max(len(s), 1)
        center = (after / gap) ** 3 * gap if len(s) else gap
        step = newton_step(program, s, lam, residuals, s * lam + ds * dlam - center)
        size = 0.99 * step_size(s, lam, step) if len(s) else 1.0
        z, nu, s, lam = (part + size * move for part, move in zip((z, nu, s, lam), step, strict=True))
        if not bool(torch.isfinite(z).all()):
            break
    raise ValueError(
        "the quadratic program was not solved: its constraints contradict each other (an empty polyhedron), it is "
        "unbounded, or its scales are too different"
    )


def polish(
    program: QuadraticProgram, z: Tensor, nu: Tensor, lam: Tensor, active: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The exact solution on the active constraints, if it is feasible: the method ends near a vertex, not on it."""
    Q, c, A, b, G, h = program
    rows = torch.cat([A, G[active]])
    zero = rows.new_zeros(len(rows), len(rows))
    matrix = torch.cat([torch.cat([Q, rows.mT], 1), torch.cat([rows, zero], 1)])
    rhs = torch.cat([-c, b, h[active]])
    found = torch.linalg.pinv(matrix, hermitian=True) @ rhs  # least squares: constraints may be dependent
    exact, multipliers = found[: len(c)], found[len(c) + len(b) :]
    slack = 1e-9 * (1 + rhs.abs().max())
    good = (matrix @ found - rhs).abs().max() <= slack
    if not bool(good & (G @ exact <= h + slack).all() & (multipliers >= -slack).all()):
        return z, nu, lam
    return exact, found[len(c) : len(c) + len(b)], torch.zeros_like(lam).masked_scatter(active, multipliers)


def newton_step(
    program: QuadraticProgram, s: Tensor, lam: Tensor, residuals: tuple[Tensor, Tensor, Tensor], complement: Tensor
) -> Step:
    """Moves of z, the equality multipliers, the slacks and the inequality multipliers that cancel the residuals."""
    Q, _, A, _, G, _ = program
    dual, equal, inequal = residuals
    top = Q + G.mT @ ((lam / s)[:, None] * G)
    tiny = 1e-12 * torch.eye(len(A), dtype=top.dtype, device=top.device)  # for dependent equalities
    matrix = torch.cat([torch.cat([top, A.mT], 1), torch.cat([A, -tiny], 1)])
    rhs = torch.cat([-dual - G.mT @ ((lam * inequal - complement) / s), -equal])
    solution = torch.linalg.solve_ex(matrix, rhs).result
    dz, dnu = solution[: len(Q)], solution[len(Q) :]
    ds = -inequal - G @ dz
    return dz, dnu, ds, -(complement + lam * ds) / s


def step_size(s: Tensor, lam: Tensor, step: Step) -> float:
    """The longest step up to 1 that keeps slacks and multipliers positive."""
    values, moves = torch.cat([s, lam]), torch.cat([step[2], step[3]])
    if not len(values):
        return 1.0
    ratios = torch.where(moves < 0, -values / moves, torch.full_like(values, torch.inf))
    return min(1.0, float(ratios.min()))
