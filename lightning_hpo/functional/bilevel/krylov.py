"""Krylov solvers for systems that are neither symmetric nor definite: BiCGSTAB and GMRES."""

import torch
from torch import Tensor

from lightning_hpo.functional.bilevel.linear_system import Matvec, SolveInfo, System, norm, scale, stop_at

__all__ = ["bicgstab", "gmres"]


def bicgstab(
    matvec: Matvec,
    b: Tensor,
    *,
    rmatvec: Matvec | None = None,  # noqa: ARG001
    init: Tensor | None = None,
    ridge: float = 0.0,
    tol: float = 1e-5,
    maxiter: int = 50,
) -> tuple[Tensor, SolveInfo]:
    r"""Stabilised bi-conjugate gradients for a square A, without products with its transpose.

    Two products an iteration; the answer is the iterate with the smallest residual. It stops early where the recursion
    breaks down, as for a skew-symmetric A; the residual then says that it did not converge.

    Args:
        matvec: The map :math:`p \mapsto A p`, shape ``(d,)`` to ``(d,)``; the same function in every call.
        b: Right-hand side, shape ``(d,)``.
        rmatvec: Not needed.
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
        van der Vorst, "Bi-CGSTAB: A Fast and Smoothly Converging Variant of Bi-CG", 1992.

    Example:
        >>> A = torch.tensor([[2.0, 1.0], [0.0, -1.0]])
        >>> bicgstab(lambda p: A @ p, torch.tensor([3.0, 1.0]))[0]
        tensor([ 2.0000, -1.0000])
    """
    system = scale(matvec, b, init=init, ridge=ridge, tol=tol, maxiter=maxiter)
    x, r = system.x, system.r
    shadow, p = r, r
    rho = shadow @ r
    zero = torch.zeros_like(rho)
    threshold = stop_at(tol, b.dtype) ** 2
    best, least = x, r @ r
    running = least > threshold
    iterations = torch.zeros_like(rho, dtype=torch.long)
    for _ in range(maxiter):
        if tol > 0 and not bool(running):
            break
        v = system.apply(p)
        along = shadow @ v
        running = running & (along != 0)
        alpha = torch.where(running, rho / along, zero)
        s = torch.addcmul(r, -alpha, v)
        t = system.apply(s)
        tt = t @ t
        omega = torch.where(running & (tt > 0), (t @ s) / tt, zero)
        x = torch.addcmul(torch.addcmul(x, alpha, p), omega, s)
        r = torch.addcmul(s, -omega, t)
        before, rho = rho, shadow @ r
        rr = r @ r
        best, least = torch.where(rr < least, x, best), torch.where(rr < least, rr, least)
        iterations = iterations + running
        running = running & (omega != 0) & (rho != 0) & (rr > threshold)
        beta = torch.where(running, (rho / before) * (alpha / omega), zero)
        p = torch.addcmul(r, beta, torch.addcmul(p, -omega, v))
    return system.finish(best, least.sqrt(), iterations)


def gmres(
    matvec: Matvec,
    b: Tensor,
    *,
    rmatvec: Matvec | None = None,  # noqa: ARG001
    init: Tensor | None = None,
    ridge: float = 0.0,
    tol: float = 1e-5,
    maxiter: int = 50,
    restart: int = 20,
) -> tuple[Tensor, SolveInfo]:
    r"""Generalised minimal residuals for a square A, restarted.

    One product an iteration and one more at the end of each cycle, for its true residual; a cycle keeps ``restart + 1``
    vectors.

    Args:
        matvec: The map :math:`p \mapsto A p`, shape ``(d,)`` to ``(d,)``; the same function in every call.
        b: Right-hand side, shape ``(d,)``.
        rmatvec: Not needed.
        init: First iterate, shape ``(d,)``; 0 where None.
        ridge: Added to the diagonal of A.
        tol: Relative tolerance; 0 for exactly ``maxiter`` iterations.
        maxiter: Largest number of iterations over all cycles.
        restart: Iterations a cycle.

    Returns:
        The solution of shape ``(d,)``, and how the solve went.

    Raises:
        TypeError: If ``b`` is not a floating tensor.
        ValueError: If an argument is out of range or shapes do not fit.

    References:
        Saad and Schultz, "GMRES: A Generalized Minimal Residual Algorithm for Solving Nonsymmetric Linear Systems",
        1986.

    Example:
        >>> A = torch.tensor([[0.0, 1.0], [-1.0, 0.0]])  # skew: BiCGSTAB breaks down here
        >>> gmres(lambda p: A @ p, torch.tensor([3.0, 1.0]))[0]
        tensor([-1.,  3.])
    """
    if restart < 1:
        raise ValueError(f"restart must be at least 1, got {restart!r}")
    system = scale(matvec, b, init=init, ridge=ridge, tol=tol, maxiter=maxiter)
    x, r = system.x, system.r
    left, iterations = maxiter, 0
    while left > 0 and not (tol > 0 and bool(norm(r) <= stop_at(tol, b.dtype))):
        step, used = cycle(system, r, min(restart, left, len(b)))
        x = x + step
        r = system.b - system.apply(x)
        left, iterations = left - used, iterations + used
    return system.finish(x, norm(r), torch.full_like(system.length, iterations, dtype=torch.long))


def cycle(system: System, r: Tensor, steps: int) -> tuple[Tensor, int]:
    r"""One cycle of Arnoldi's process, and the combination of its vectors that leaves the smallest residual.

    With :math:`A V_k = V_{k+1} \bar H_k` the smallest residual has the length :math:`\|r\| / \|z\|`, where :math:`z_0 =
    1` and :math:`z^\top \bar H_k = 0`: one short inner product an iteration tells whether to stop.

    Args:
        system: The system.
        r: Residual that the cycle starts from.
        steps: Largest number of iterations.

    Returns:
        What to add to the iterate, and the number of iterations.
    """
    length = norm(r)
    basis = r.new_zeros(steps + 1, len(r))
    hessenberg = r.new_zeros(steps + 1, steps)
    null = r.new_zeros(steps + 1)
    basis[0] = r / torch.where(length > 0, length, torch.ones_like(length))
    null[0] = 1
    done = 0
    for k in range(steps):
        w = system.apply(basis[k])
        before = norm(w)
        for _ in range(2):  # the second pass takes out what rounding left of the first
            along = basis[: k + 1] @ w
            w = w - along @ basis[: k + 1]
            hessenberg[: k + 1, k] += along
        beyond = norm(w)
        beyond = torch.where(beyond > 10 * torch.finfo(w.dtype).eps * before, beyond, torch.zeros_like(beyond))
        hessenberg[k + 1, k] = beyond
        basis[k + 1] = torch.where(beyond > 0, w / beyond, torch.zeros_like(w))
        null[k + 1] = -(null[: k + 1] @ hessenberg[: k + 1, k]) / beyond
        done = k + 1
        if system.tol > 0 and bool(length <= stop_at(system.tol, r.dtype) * torch.linalg.vector_norm(null)):
            break
    rhs = length * torch.eye(1, done + 1, dtype=r.dtype, device=r.device)[0]
    return (torch.linalg.pinv(hessenberg[: done + 1, :done]) @ rhs) @ basis[:done], done
