"""Neumann series and iterative refinement."""

import torch
from torch import Tensor

from lightning_hpo.functional.bilevel.linear_system import LinearSolve, Matvec, SolveInfo, norm, scale, stop_at

__all__ = ["neumann", "refinement"]


def neumann(
    matvec: Matvec,
    b: Tensor,
    *,
    rmatvec: Matvec | None = None,  # noqa: ARG001
    init: Tensor | None = None,
    ridge: float = 0.0,
    tol: float = 0.0,
    maxiter: int = 10,
    alpha: float = 1.0,
) -> tuple[Tensor, SolveInfo]:
    r"""Truncated Neumann series :math:`x_K = \alpha \sum_{j=0}^{K} (I - \alpha A)^j b` with K = ``maxiter`` products.

    It converges if and only if :math:`\|I - \alpha A\| < 1` in some norm, and equals K + 1 steps of
    :math:`x \leftarrow x - \alpha (A x - b)` from 0. It bears a matvec that changes from call to call.

    Args:
        matvec: The map :math:`p \mapsto A p`, shape ``(d,)`` to ``(d,)``.
        b: Right-hand side, shape ``(d,)``.
        rmatvec: Not needed.
        init: First iterate, whose residual is then expanded (one product more); 0 where None.
        ridge: Added to the diagonal of A.
        tol: Relative tolerance; 0 for exactly ``maxiter`` products.
        maxiter: The number K.
        alpha: The factor :math:`\alpha`, positive; below :math:`2 / \lambda_{\max}` for a positive definite A.

    Returns:
        The sum of shape ``(d,)``, and how the solve went. The residual is that of one term fewer, an overestimate while
        the series converges: its own would cost one product more.

    Raises:
        TypeError: If ``b`` is not a floating tensor.
        ValueError: If an argument is out of range or shapes do not fit.

    References:
        Lorraine, Vicol and Duvenaud, "Optimizing Millions of Hyperparameters by Implicit Differentiation", AISTATS
        2020, alg. 3.

    Example:
        >>> x, info = neumann(lambda p: 0.5 * p, torch.tensor([1.0]), maxiter=3)
        >>> x, info.residual  # 1 + 1/2 + 1/4 + 1/8
        (tensor([1.8750]), tensor(0.1250))
    """
    if not alpha > 0:
        raise ValueError(f"alpha must be positive, got {alpha!r}")
    system = scale(matvec, b, init=init, ridge=ridge, tol=tol, maxiter=maxiter)
    term = system.r  # fresh tensors, updated in place: memory is what a term costs beside its product
    x = system.x.add_(term, alpha=alpha)
    iterations = 0
    for _ in range(maxiter):
        if tol > 0 and bool(term @ term <= stop_at(tol, b.dtype) ** 2):
            break
        term.sub_(system.apply(term), alpha=alpha)
        x.add_(term, alpha=alpha)
        iterations += 1
    return system.finish(x, norm(term), torch.full_like(system.length, iterations, dtype=torch.long))


def refinement(
    matvec: Matvec,
    b: Tensor,
    *,
    rmatvec: Matvec | None = None,
    init: Tensor | None = None,
    ridge: float = 0.0,
    tol: float = 1e-5,
    maxiter: int = 10,
    solve: LinearSolve,
    shift: float | Tensor = 0.0,
) -> tuple[Tensor, SolveInfo]:
    r"""Iterative refinement: :math:`r \leftarrow b - A x,\; x \leftarrow x + \tilde A^{-1} r`.

    The inner solver sees the better conditioned :math:`\tilde A = A + \mathrm{diag}(\mathrm{shift})`; the refinement
    takes the error that the shift, or a loose inner tolerance, makes out again. For the saddle-point matrix of a
    quadratic program the shift is positive on the primal and negative on the dual block.

    Args:
        matvec: The map :math:`p \mapsto A p`, shape ``(d,)`` to ``(d,)``.
        b: Right-hand side, shape ``(d,)``.
        rmatvec: The map :math:`q \mapsto A^\top q`, where the inner solver needs it.
        init: First iterate; 0 where None.
        ridge: Added to the diagonal of A.
        tol: Relative tolerance; 0 for exactly ``maxiter`` rounds.
        maxiter: Largest number of inner solves.
        solve: The inner solver; its own settings are bound with :func:`functools.partial`.
        shift: Added to the diagonal in the inner solver alone, a number or of shape ``(d,)``.

    Returns:
        The solution of shape ``(d,)``, and how the solve went; the iterations are those of the inner solver together.

    Raises:
        TypeError: If ``b`` is not a floating tensor.
        ValueError: If an argument is out of range or shapes do not fit.

    References:
        Wilkinson, "Rounding Errors in Algebraic Processes", 1963, ch. 3; Vanderbei, "Symmetric Quasidefinite Matrices",
        1995.

    Example:
        >>> from lightning_hpo.functional.bilevel.conjugate_gradient import cg
        >>> A = torch.diag(torch.tensor([1.0, 0.25]))
        >>> x, info = refinement(lambda p: A @ p, torch.tensor([1.0, 1.0]), solve=cg, shift=0.25, maxiter=40)
        >>> x
        tensor([1.0000, 4.0000])
    """
    system = scale(matvec, b, init=init, ridge=ridge, tol=tol, maxiter=maxiter)
    x, r = system.x, system.r
    iterations = torch.zeros_like(system.length, dtype=torch.long)
    negative = torch.zeros_like(iterations, dtype=torch.bool)

    def inner(vector: Tensor) -> Tensor:
        return system.apply(vector) + shift * vector

    def transpose(vector: Tensor) -> Tensor:
        product = rmatvec(vector) if rmatvec is not None else vector
        return product + (ridge + shift) * vector

    for _ in range(maxiter):
        if tol > 0 and bool(norm(r) <= stop_at(tol, b.dtype)):
            break
        step, info = solve(inner, r, rmatvec=None if rmatvec is None else transpose)
        x = x + step
        r = system.b - system.apply(x)
        iterations, negative = iterations + info.iterations, negative | info.negative_curvature
    return system.finish(x, norm(r), iterations, negative)
