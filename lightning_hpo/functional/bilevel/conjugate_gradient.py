"""Conjugate gradients, for positive definite and for any invertible systems."""

import torch
from torch import Tensor

from lightning_hpo.functional.bilevel.linear_system import Matvec, SolveInfo, check_settings, checked, scale, stop_at

__all__ = ["cg", "normal_cg"]


def cg(
    matvec: Matvec,
    b: Tensor,
    *,
    rmatvec: Matvec | None = None,  # noqa: ARG001
    init: Tensor | None = None,
    ridge: float = 0.0,
    tol: float = 1e-5,
    maxiter: int = 50,
) -> tuple[Tensor, SolveInfo]:
    r"""Conjugate gradients for a symmetric positive definite A.

    Stops where :math:`\|A x - b\| \le \mathrm{tol} \|b\|` and where a direction of negative curvature,
    :math:`p^\top A p \le 0` up to rounding, is met: it then returns the iterate it has, with the flag. One product an
    iteration, and one number read back to the host; none with ``tol=0``.

    Args:
        matvec: The map :math:`p \mapsto A p`, shape ``(d,)`` to ``(d,)``; the same function in every call.
        b: Right-hand side, shape ``(d,)``.
        rmatvec: Not needed, A is symmetric.
        init: First iterate, shape ``(d,)``; 0 where None.
        ridge: Added to the diagonal of A.
        tol: Relative tolerance; 0 for exactly ``maxiter`` iterations.
        maxiter: Largest number of iterations.

    Returns:
        The solution of shape ``(d,)``, and how the solve went.

    Raises:
        TypeError: If ``b`` is not a floating tensor.
        ValueError: If an argument is out of range or shapes do not fit.

    References:
        Hestenes and Stiefel, "Methods of Conjugate Gradients for Solving Linear Systems", 1952; Nocedal and Wright,
        "Numerical Optimization", 2006, alg. 7.1 for the test of curvature.

    Example:
        >>> A = torch.tensor([[4.0, 1.0], [1.0, 3.0]])
        >>> x, info = cg(lambda p: A @ p, torch.tensor([1.0, 2.0]))
        >>> x, bool(info.converged)
        (tensor([0.0909, 0.6364]), True)
    """
    system = scale(matvec, b, init=init, ridge=ridge, tol=tol, maxiter=maxiter)
    x, r = system.x, system.r  # fresh tensors, updated in place: memory is what an iteration costs beside its product
    p, rr = r.clone(), r @ r
    before = rr
    threshold = stop_at(tol, b.dtype) ** 2
    running = rr > threshold
    negative = torch.zeros_like(running)
    iterations = torch.zeros_like(rr, dtype=torch.long)
    largest, eps = torch.zeros_like(rr), torch.finfo(b.dtype).eps
    for step in range(maxiter):
        if tol > 0 and not bool(running):
            break
        if step > 0:
            p.mul_(torch.where(running, rr / before, torch.zeros_like(rr))).add_(r)
        product = system.apply(p)
        curvature, pp = p @ product, p @ p
        largest = torch.maximum(largest, curvature / torch.where(pp > 0, pp, torch.ones_like(pp)))
        negative = negative | (running & (curvature <= eps * largest * pp))  # 0 up to rounding: A is singular
        running = running & ~negative
        alpha = torch.where(running, rr / curvature, torch.zeros_like(rr))
        x.addcmul_(alpha, p)
        r.addcmul_(-alpha, product)
        before, rr = rr, r @ r
        iterations = iterations + running
        running = running & (rr > threshold)
    return system.finish(x, rr.sqrt(), iterations, negative)


def normal_cg(
    matvec: Matvec,
    b: Tensor,
    *,
    rmatvec: Matvec | None = None,
    init: Tensor | None = None,
    ridge: float = 0.0,
    tol: float = 1e-5,
    maxiter: int = 50,
) -> tuple[Tensor, SolveInfo]:
    r"""Conjugate gradients on the normal equations :math:`(A^\top A + \mathrm{ridge} I) x = A^\top b`, for any A.

    The residual of :math:`A x = b` is carried along (the form called CGLS), which rounds less than products with
    :math:`A^\top A`. Stops where :math:`\|A x - b\| \le \mathrm{tol} \|b\|`, or at a least-squares solution where none
    solves the system: :math:`\|A^\top r\| \le \mathrm{tol} \|A^\top b\| \|r\| / \|b\|`. With a ridge it stops where the
    residual of the normal equations is within the tolerance, and reports that one. Two products an iteration.

    Args:
        matvec: The map :math:`p \mapsto A p`, shape ``(d,)`` to ``(m,)``; the same function in every call.
        b: Right-hand side, shape ``(m,)``.
        rmatvec: The map :math:`q \mapsto A^\top q`; required. For a symmetric A pass ``matvec`` again.
        init: First iterate, shape ``(d,)``; 0 where None.
        ridge: Added to the diagonal of :math:`A^\top A`.
        tol: Relative tolerance; 0 for exactly ``maxiter`` iterations.
        maxiter: Largest number of iterations.

    Returns:
        The solution of shape ``(d,)``, and how the solve went; a least-squares solution counts as converged.

    Raises:
        TypeError: If ``b`` is not a floating tensor.
        ValueError: If ``rmatvec`` is missing, an argument is out of range or shapes do not fit.

    References:
        Paige and Saunders, "LSQR: An Algorithm for Sparse Linear Equations and Sparse Least Squares", 1982.

    Example:
        >>> A = torch.tensor([[0.0, 2.0], [-1.0, 0.0]])  # neither symmetric nor definite
        >>> x, info = normal_cg(lambda p: A @ p, torch.tensor([2.0, 3.0]), rmatvec=lambda q: A.T @ q)
        >>> x, int(info.iterations)
        (tensor([-3.0000,  1.0000]), 2)
    """
    if rmatvec is None:
        raise ValueError("normal_cg needs rmatvec, the product with the transpose; for a symmetric A pass matvec again")
    check_settings(b, ridge, tol, maxiter)
    transpose = checked(rmatvec, "rmatvec", None)
    image = transpose(b.detach())  # tells the number of unknowns too: A need not be square
    system = scale(matvec, b, init=init, ridge=0.0, tol=tol, maxiter=maxiter, size=len(image))
    x, r = system.x, system.r
    first = torch.where(system.length > 0, image / system.length, torch.zeros_like(image))
    s = first if init is None else transpose(r) - ridge * x
    p, ss, start = s.clone(), s @ s, first @ first
    bound = stop_at(tol, b.dtype) ** 2

    def unfinished(r: Tensor, ss: Tensor) -> Tensor:
        rr = r @ r
        return ss > bound * start if ridge else (rr > bound) & (ss > bound * start * rr)

    running = unfinished(r, ss)
    iterations = torch.zeros_like(ss, dtype=torch.long)
    for _ in range(maxiter):
        if tol > 0 and not bool(running):
            break
        q = system.apply(p)
        alpha = torch.where(running, ss / (q @ q + ridge * (p @ p)), torch.zeros_like(ss))
        x.addcmul_(alpha, p)
        r.addcmul_(-alpha, q)
        s = transpose(r) - ridge * x
        before, ss = ss, s @ s
        iterations = iterations + running
        p.mul_(torch.where(running, ss / before, torch.zeros_like(ss))).add_(s)
        running = running & unfinished(r, ss)
    whole = torch.where(start > 0, start, torch.ones_like(start))
    residual = (ss / whole).sqrt() if ridge else torch.where(torch.isfinite(ss), r @ r, ss).sqrt()
    answer, info = system.finish(x, residual, iterations)
    return answer, info._replace(converged=info.converged | (torch.isfinite(ss) & ~unfinished(r, ss)))
