"""Direct solvers: the matrix is formed from its products with the unit vectors, so for small systems only."""

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_hpo.functional.bilevel.linear_system import Matvec, SolveInfo, check_settings, checked, norm

__all__ = ["cholesky", "inv", "lu", "materialize", "qr"]

LIMIT = 10_000


def materialize(matvec: Matvec, b: Tensor, *, limit: int = LIMIT, batched: bool = False) -> Tensor:
    """The matrix of a linear map from as many numbers as it gives.

    Args:
        matvec: The map, shape ``(d,)`` to ``(d,)``.
        b: A vector of the size, dtype and device wanted.
        limit: Largest d that is accepted.
        batched: Whether to send all unit vectors through at once by :func:`torch.func.vmap`, which not every map bears.

    Returns:
        Shape ``(d, d)``.

    Raises:
        ValueError: If d is above the limit; the message says what the matrix would take.

    Example:
        >>> materialize(lambda p: torch.stack([p[1], 2 * p[0]]), torch.zeros(2))
        tensor([[0., 1.],
                [2., 0.]])
    """
    if len(b) > limit:
        gigabytes = b.element_size() * len(b) ** 2 / 1e9
        raise ValueError(
            f"a dense solver would form a {len(b)} x {len(b)} matrix of {gigabytes:.1f} GB, above its limit of {limit} "
            "unknowns; use cg, normal_cg or gmres"
        )
    eye = torch.eye(len(b), dtype=b.dtype, device=b.device)
    product = checked(matvec, "matvec", len(b))
    return torch.func.vmap(product, out_dims=1)(eye) if batched else torch.stack([product(row) for row in eye], 1)


def direct(
    name: str,
    factor: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    matvec: Matvec,
    b: Tensor,
    ridge: float,
    limit: int,
    batched: bool,
) -> tuple[Tensor, SolveInfo]:
    """Forms the matrix, solves with a factorization and reports.

    Args:
        name: Of the solver, for errors.
        factor: From the matrix and the right-hand side as a column to the solution and a pivot ratio; below rounding
            the matrix counts as singular.
        matvec: The map.
        b: Right-hand side.
        ridge: Added to the diagonal.
        limit: Largest size.
        batched: As for :func:`materialize`.

    Returns:
        The solution, and how the solve went.

    Raises:
        ValueError: If the matrix is singular to working precision or not finite.
    """
    check_settings(b, ridge, 0.0, 1)
    b = b.detach()
    matrix = materialize(matvec, b, limit=limit, batched=batched)
    matrix = matrix + ridge * torch.eye(len(b), dtype=b.dtype, device=b.device)
    if not bool(torch.isfinite(matrix).all()):
        raise ValueError(f"{name}: the matrix of the linear system is not finite")
    x, pivots = factor(matrix, b[:, None])
    if not bool(pivots > len(b) * torch.finfo(b.dtype).eps):
        definite = " or not positive definite" if name == "cholesky" else ""
        raise ValueError(f"{name}: the linear system is singular{definite}; add a ridge or use normal_cg")
    x = x[:, 0]
    length = norm(b)
    residual = norm(matrix @ x - b) / torch.where(length > 0, length, torch.ones_like(length))
    no = torch.zeros_like(pivots, dtype=torch.bool)
    return x, SolveInfo(no.long(), residual, residual < 1, no)


def ratio(pivots: Tensor) -> Tensor:
    """Smallest over largest absolute pivot; 0 where all are 0."""
    sizes = pivots.abs()
    largest = sizes.max()
    return sizes.min() / torch.where(largest > 0, largest, torch.ones_like(largest))


def lu(
    matvec: Matvec,
    b: Tensor,
    *,
    rmatvec: Matvec | None = None,  # noqa: ARG001
    init: Tensor | None = None,  # noqa: ARG001
    ridge: float = 0.0,
    tol: float = 0.0,  # noqa: ARG001
    maxiter: int = 1,  # noqa: ARG001
    limit: int = LIMIT,
    batched: bool = False,
) -> tuple[Tensor, SolveInfo]:
    """LU decomposition with pivoting, for any invertible A.

    Args:
        matvec: The map, shape ``(d,)`` to ``(d,)``.
        b: Right-hand side, shape ``(d,)``.
        rmatvec: Not needed.
        init: Not needed.
        ridge: Added to the diagonal of A.
        tol: Not needed.
        maxiter: Not needed.
        limit: Largest d that is accepted.
        batched: As for :func:`materialize`.

    Returns:
        The solution of shape ``(d,)``, and how the solve went: no iterations, and the residual.

    Raises:
        TypeError: If ``b`` is not a floating tensor.
        ValueError: If d is above the limit, or A is singular to working precision.

    Example:
        >>> lu(lambda p: torch.tensor([2.0, 4.0]) * p, torch.tensor([2.0, 2.0]))[0]
        tensor([1.0000, 0.5000])
    """

    def factor(matrix: Tensor, column: Tensor) -> tuple[Tensor, Tensor]:
        packed, pivots, _ = torch.linalg.lu_factor_ex(matrix)
        return torch.linalg.lu_solve(packed, pivots, column), ratio(packed.diagonal())

    return direct("lu", factor, matvec, b, ridge, limit, batched)


def cholesky(
    matvec: Matvec,
    b: Tensor,
    *,
    rmatvec: Matvec | None = None,  # noqa: ARG001
    init: Tensor | None = None,  # noqa: ARG001
    ridge: float = 0.0,
    tol: float = 0.0,  # noqa: ARG001
    maxiter: int = 1,  # noqa: ARG001
    limit: int = LIMIT,
    batched: bool = False,
) -> tuple[Tensor, SolveInfo]:
    """Cholesky decomposition, for a symmetric positive definite A.

    Args:
        matvec: The map, shape ``(d,)`` to ``(d,)``.
        b: Right-hand side, shape ``(d,)``.
        rmatvec: Not needed.
        init: Not needed.
        ridge: Added to the diagonal of A.
        tol: Not needed.
        maxiter: Not needed.
        limit: Largest d that is accepted.
        batched: As for :func:`materialize`.

    Returns:
        The solution of shape ``(d,)``, and how the solve went: no iterations, and the residual.

    Raises:
        TypeError: If ``b`` is not a floating tensor.
        ValueError: If d is above the limit, or A is not positive definite to working precision.

    Example:
        >>> cholesky(lambda p: torch.tensor([2.0, 4.0]) * p, torch.tensor([2.0, 2.0]))[0]
        tensor([1.0000, 0.5000])
    """

    def factor(matrix: Tensor, column: Tensor) -> tuple[Tensor, Tensor]:
        lower, failed = torch.linalg.cholesky_ex(matrix)
        return torch.cholesky_solve(column, lower), torch.where(failed == 0, ratio(lower.diagonal()) ** 2, 0.0)

    return direct("cholesky", factor, matvec, b, ridge, limit, batched)


def qr(
    matvec: Matvec,
    b: Tensor,
    *,
    rmatvec: Matvec | None = None,  # noqa: ARG001
    init: Tensor | None = None,  # noqa: ARG001
    ridge: float = 0.0,
    tol: float = 0.0,  # noqa: ARG001
    maxiter: int = 1,  # noqa: ARG001
    limit: int = LIMIT,
    batched: bool = False,
) -> tuple[Tensor, SolveInfo]:
    """QR decomposition, for any invertible A.

    Args:
        matvec: The map, shape ``(d,)`` to ``(d,)``.
        b: Right-hand side, shape ``(d,)``.
        rmatvec: Not needed.
        init: Not needed.
        ridge: Added to the diagonal of A.
        tol: Not needed.
        maxiter: Not needed.
        limit: Largest d that is accepted.
        batched: As for :func:`materialize`.

    Returns:
        The solution of shape ``(d,)``, and how the solve went: no iterations, and the residual.

    Raises:
        TypeError: If ``b`` is not a floating tensor.
        ValueError: If d is above the limit, or A is singular to working precision.

    Example:
        >>> qr(lambda p: torch.tensor([2.0, 4.0]) * p, torch.tensor([2.0, 2.0]))[0]
        tensor([1.0000, 0.5000])
    """

    def factor(matrix: Tensor, column: Tensor) -> tuple[Tensor, Tensor]:
        orthogonal, upper = torch.linalg.qr(matrix)
        return torch.linalg.solve_triangular(upper, orthogonal.T @ column, upper=True), ratio(upper.diagonal())

    return direct("qr", factor, matvec, b, ridge, limit, batched)


def inv(
    matvec: Matvec,
    b: Tensor,
    *,
    rmatvec: Matvec | None = None,  # noqa: ARG001
    init: Tensor | None = None,  # noqa: ARG001
    ridge: float = 0.0,
    tol: float = 0.0,  # noqa: ARG001
    maxiter: int = 1,  # noqa: ARG001
    limit: int = LIMIT,
    batched: bool = False,
) -> tuple[Tensor, SolveInfo]:
    """The inverse matrix, for any invertible A; less exact than the factorizations.

    Args:
        matvec: The map, shape ``(d,)`` to ``(d,)``.
        b: Right-hand side, shape ``(d,)``.
        rmatvec: Not needed.
        init: Not needed.
        ridge: Added to the diagonal of A.
        tol: Not needed.
        maxiter: Not needed.
        limit: Largest d that is accepted.
        batched: As for :func:`materialize`.

    Returns:
        The solution of shape ``(d,)``, and how the solve went: no iterations, and the residual.

    Raises:
        TypeError: If ``b`` is not a floating tensor.
        ValueError: If d is above the limit, or A is singular to working precision.

    Example:
        >>> inv(lambda p: torch.tensor([2.0, 4.0]) * p, torch.tensor([2.0, 2.0]))[0]
        tensor([1.0000, 0.5000])
    """

    def factor(matrix: Tensor, column: Tensor) -> tuple[Tensor, Tensor]:
        inverse, _ = torch.linalg.inv_ex(matrix)
        condition = torch.linalg.matrix_norm(inverse, 1) * torch.linalg.matrix_norm(matrix, 1)
        return inverse @ column, 1 / condition

    return direct("inv", factor, matvec, b, ridge, limit, batched)
