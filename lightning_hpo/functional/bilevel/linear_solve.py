"""Linear solvers, one signature: ``solve(matvec, b, *, rmatvec, init, ridge, tol, maxiter) -> (x, info)``.

The map A is known by its products with 1-D vectors. Every solver scales the right-hand side to unit length, answers 0
to 0 and returns a :class:`SolveInfo` whose entries stay on the device. Further settings are keywords, to be bound with
:func:`functools.partial`.
"""

from lightning_hpo.functional.bilevel.conjugate_gradient import cg, normal_cg
from lightning_hpo.functional.bilevel.dense_solve import cholesky, inv, lu, qr
from lightning_hpo.functional.bilevel.krylov import bicgstab, gmres
from lightning_hpo.functional.bilevel.linear_system import LinearSolve, Matvec, SolveInfo
from lightning_hpo.functional.bilevel.neumann import neumann, refinement

__all__ = [
    "LinearSolve",
    "Matvec",
    "SolveInfo",
    "bicgstab",
    "cg",
    "cholesky",
    "gmres",
    "inv",
    "lu",
    "neumann",
    "normal_cg",
    "qr",
    "refinement",
]
