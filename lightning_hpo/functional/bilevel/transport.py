r"""Projections on the transport polytope :math:`\{P \ge 0, P 1 = a, P^\top 1 = b\}`, Euclidean and Kullback-Leibler.

Both are solved by their semi-dual, one number for each row: :math:`P_{\cdot j}(\alpha)` is the projection of
:math:`x_{\cdot j} - \alpha` on the simplex of mass :math:`b_j`, and :math:`P(\alpha) 1 = a` is the condition that is
differentiated.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_hpo.functional.bilevel.implicit_differentiation import implicit_root
from lightning_hpo.functional.bilevel.linear_solve import cg
from lightning_hpo.functional.bilevel.projections import projection_kl_simplex, projection_simplex
from lightning_hpo.functional.bilevel.sets import require

__all__ = [
    "kl_projection_birkhoff",
    "kl_projection_transport",
    "projection_birkhoff",
    "projection_transport",
]

Marginals = tuple[Tensor, Tensor]


class Divergence(NamedTuple):
    """What differs between both projections: the column problem, its regularizer, and minus d(row sums)/d(dual)."""

    columns: Callable[[Tensor, Tensor], Tensor]
    penalty: Callable[[Tensor], Tensor]
    hessian: Callable[[Tensor], Tensor]


def sparse_hessian(plan: Tensor) -> Tensor:
    support = (plan > 0).to(plan.dtype)
    return torch.diag(support.sum(1)) - (support / support.sum(0)) @ support.mT


def entropic_hessian(plan: Tensor) -> Tensor:
    return torch.diag(plan.sum(1)) - (plan / plan.sum(0)) @ plan.mT


EUCLIDEAN = Divergence(projection_simplex, lambda plan: plan.square().sum() / 2, sparse_hessian)
ENTROPIC = Divergence(projection_kl_simplex, lambda plan: torch.xlogy(plan, plan).sum(), entropic_hessian)


def projection_transport(x: Tensor, hyper: Marginals) -> Tensor:
    r"""Euclidean: :math:`\arg\min_P \|P - x\|^2`; most entries of the plan are 0.

    Args:
        x: Shape ``(n, m)``.
        hyper: The marginals a of shape ``(n,)``, at least 0, and b of shape ``(m,)``, positive, of equal sums.

    Returns:
        The plan, shape ``(n, m)``.

    Raises:
        ValueError: If the polytope is empty; all reasons are listed.
        RuntimeError: If the semi-dual was not solved.

    References:
        Blondel, Seguy and Rolet, "Smooth and Sparse Optimal Transport", AISTATS 2018.

    Example:
        >>> projection_transport(torch.tensor([[2.0, 0.0], [0.0, 1.0]]), (torch.ones(2), torch.ones(2)))
        tensor([[1., 0.],
                [0., 1.]])
    """
    return project(x, hyper, EUCLIDEAN)


def kl_projection_transport(x: Tensor, hyper: Marginals) -> Tensor:
    r"""Kullback-Leibler, from the dual space: :math:`\arg\min_P \mathrm{KL}(P \,\|\, e^x)`, entropic transport.

    Args:
        x: Shape ``(n, m)``; minus the cost over the regularization.
        hyper: The marginals a of shape ``(n,)`` and b of shape ``(m,)``, positive, of equal sums.

    Returns:
        The plan, shape ``(n, m)``.

    Raises:
        ValueError: If the polytope is empty or a mass is 0; all reasons are listed.
        RuntimeError: If the semi-dual was not solved.

    References:
        Cuturi, "Sinkhorn Distances", NeurIPS 2013; Cuturi and Peyré, "A Smoothed Dual Approach for Variational
        Wasserstein Problems", 2016.

    Example:
        >>> kl_projection_transport(torch.zeros(2, 2), (torch.tensor([0.5, 1.5]), torch.ones(2)))
        tensor([[0.2500, 0.2500],
                [0.7500, 0.7500]])
    """
    require(("row marginals must be positive", hyper[0] > 0))
    return project(x, hyper, ENTROPIC)


def projection_birkhoff(x: Tensor, hyper: None = None) -> Tensor:  # noqa: ARG001
    """Euclidean, on the doubly stochastic matrices: :func:`projection_transport` with marginals of ones.

    Args:
        x: Shape ``(n, n)``.
        hyper: Not used.

    Returns:
        The shape of ``x``.

    Raises:
        ValueError: If x is not square.

    Example:
        >>> projection_birkhoff(torch.zeros(2, 2))
        tensor([[0.5000, 0.5000],
                [0.5000, 0.5000]])
    """
    return projection_transport(x, (x.new_ones(len(x)), x.new_ones(x.shape[1])))


def kl_projection_birkhoff(x: Tensor, hyper: None = None) -> Tensor:  # noqa: ARG001
    """Kullback-Leibler, on the doubly stochastic matrices: :func:`kl_projection_transport` with marginals of ones.

    Args:
        x: Shape ``(n, n)``, logarithms.
        hyper: Not used.

    Returns:
        The shape of ``x``.

    Raises:
        ValueError: If x is not square.

    Example:
        >>> kl_projection_birkhoff(torch.zeros(2, 2))
        tensor([[0.5000, 0.5000],
                [0.5000, 0.5000]])
    """
    return kl_projection_transport(x, (x.new_ones(len(x)), x.new_ones(x.shape[1])))


def project(x: Tensor, hyper: Marginals, divergence: Divergence) -> Tensor:
    """The plan, through the semi-dual variable."""
    rows, masses = hyper
    if x.dim() != 2 or (tuple(rows.shape), tuple(masses.shape)) != ((x.shape[0],), (x.shape[1],)):
        shapes = f"{tuple(x.shape)}, {tuple(rows.shape)} and {tuple(masses.shape)}"
        raise ValueError(f"x, a and b must have the shapes (n, m), (n,) and (m,), got {shapes}")
    total = rows.sum()
    require(
        ("row marginals must be at least 0", rows >= 0),
        ("column marginals must be positive", masses > 0),
        (
            "row and column marginals must have the same sum",
            (total - masses.sum()).abs() <= 100 * torch.finfo(x.dtype).eps * total,
        ),
    )

    def plan(dual: Tensor, x: Tensor, masses: Tensor) -> Tensor:
        return divergence.columns((x - dual[:, None]).mT, masses).mT

    def residual(dual: Tensor, x: Tensor, rows: Tensor, masses: Tensor) -> Tensor:
        return rows - plan(dual, x, masses).sum(1)

    def solver(init: Tensor, x: Tensor, rows: Tensor, masses: Tensor) -> Tensor:
        dual = newton(init.double(), x.double(), rows.double(), masses.double(), divergence)
        return dual.to(x.dtype)

    # The matrix is singular, for a constant shift changes no plan, but symmetric, and its right-hand sides have no part
    # along the shift: conjugate gradients find the solution.
    solve = partial(cg, tol=max(1e-10, 10 * torch.finfo(x.dtype).eps), maxiter=10 * len(x) + 50)
    dual = implicit_root(residual, solver, solve=solve)(torch.zeros_like(rows), x, rows, masses)
    return plan(dual, x, masses)


def newton(dual: Tensor, x: Tensor, rows: Tensor, masses: Tensor, divergence: Divergence, maxiter: int = 500) -> Tensor:
    """Minimizes the convex semi-dual by Newton steps with as much damping as it takes to go down."""

    def state(dual: Tensor) -> tuple[Tensor, Tensor, float]:
        plan = divergence.columns((x - dual[:, None]).mT, masses).mT
        value = dual @ rows + (plan * (x - dual[:, None])).sum() - divergence.penalty(plan)
        return plan, plan.sum(1) - rows, float(value)

    eye = torch.eye(len(dual), dtype=dual.dtype, device=dual.device)
    plan, miss, value = state(dual)
    damping = 1.0
    for _ in range(maxiter):
        size = float(miss.norm())
        if size <= 1e-12 * float(masses.norm()):
            return dual
        move = torch.linalg.solve(divergence.hessian(plan) + damping * min(1.0, size) * eye, miss)
        after, missed, trial = state(dual + move)
        lower = trial <= value - 1e-4 * float(miss @ move)
        if lower or float(missed.norm()) < size:  # the value stops to tell near the solution
            dual, plan, miss, value, damping = dual + move, after, missed, trial, damping / 4
        else:
            damping *= 4
    raise RuntimeError(f"the semi-dual of the transport problem was not solved: marginals miss by {miss.norm():.1e}")
