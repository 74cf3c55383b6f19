r"""Solvers of strongly convex lower problems that return the error they achieved.

All have one signature, ``solve(problem, theta, x, tol, *, maxiter) -> LowerSolution``, and stop where the certificate
:math:`\|\nabla_x h\| / \mu \le \mathrm{tol}` holds for every problem.
"""

import math

import torch
from torch import Tensor

from lightning_hpo.functional.bilevel.lower_lbfgs import lbfgs
from lightning_hpo.functional.bilevel.lower_problem import ConstantError, LowerProblem, LowerSolution, LowerSolver

__all__ = ["LowerProblem", "LowerSolution", "LowerSolver", "fista", "gradient_descent", "lbfgs", "proximal_gradient"]


def fista(
    problem: LowerProblem, theta: Tensor, x: Tensor, tol: float, *, maxiter: int = 20_000, check_every: int = 1
) -> LowerSolution:
    r"""Accelerated gradient descent for strong convexity: about :math:`\sqrt{L / \mu}` iterations for each digit.

    .. math::

        t_+ = \tfrac12 \Bigl(1 - q t^2 + \sqrt{(1 - q t^2)^2 + 4 t^2}\Bigr), \quad
        \beta = \frac{t - 1}{t_+} \frac{1 - q t_+}{1 - q}, \quad
        z = x_k + \beta (x_k - x_{k-1}), \quad x_{k+1} = z - \nabla h(z) / L

    with :math:`q = \mu / L` and :math:`t = 0` at first. It stops on the gradient at z, and returns that z.

    Args:
        problem: The problem, with its ``smoothness``.
        theta: Hyperparameters.
        x: Where to begin; shape ``(m, ...)`` where batched.
        tol: Largest error :math:`\|x - \hat x\|` of each problem, positive.
        maxiter: Largest number of steps.
        check_every: Steps from one look at the residual on the host to the next; the answer does not depend on it.

    Returns:
        The point and its error.

    Raises:
        ValueError: If an argument is wrong, or the problem has no ``smoothness``.

    References:
        Beck and Teboulle, "A Fast Iterative Shrinkage-Thresholding Algorithm for Linear Inverse Problems", 2009;
        Chambolle and Pock, "An introduction to continuous optimization for imaging", Acta Numerica 2016, alg. 5.

    Example:
        >>> scales = torch.tensor([1.0, 100.0], dtype=torch.float64)
        >>> problem = LowerProblem(lambda x, t: (scales * (x - t) ** 2).sum() / 2, mu=1.0, smoothness=100.0)
        >>> found = fista(problem, scales.new_tensor(2.0), torch.zeros(2, dtype=torch.float64), tol=1e-6)
        >>> found.status, found.iterations < 200, bool(found.error <= 1e-6)
        ('converged', True, True)
    """
    check_settings(problem, tol, maxiter, check_every)
    step, mu, q = _constants(problem, theta, x)
    return _descend(problem, theta, x, tol, maxiter, check_every, step, mu, q)


def gradient_descent(
    problem: LowerProblem, theta: Tensor, x: Tensor, tol: float, *, maxiter: int = 20_000, check_every: int = 1
) -> LowerSolution:
    r"""Gradient descent with step 1/L, to compare with: about :math:`L / \mu` iterations for each digit.

    Args:
        problem: The problem, with its ``smoothness``.
        theta: Hyperparameters.
        x: Where to begin.
        tol: Largest error of each problem, positive.
        maxiter: Largest number of steps.
        check_every: Steps from one look at the residual on the host to the next.

    Returns:
        The point and its error.

    Raises:
        ValueError: If an argument is wrong, or the problem has no ``smoothness``.

    Example:
        >>> problem = LowerProblem(lambda x, t: ((x - t) ** 2).sum(), mu=2.0, smoothness=2.0)
        >>> gradient_descent(problem, torch.tensor(1.0), torch.zeros(2), tol=1e-3).x
        tensor([1., 1.])
    """
    check_settings(problem, tol, maxiter, check_every)
    step, mu, _ = _constants(problem, theta, x)
    return _descend(problem, theta, x, tol, maxiter, check_every, step, mu, None)


def proximal_gradient(
    problem: LowerProblem, theta: Tensor, x: Tensor, tol: float, *, maxiter: int = 20_000, check_every: int = 1
) -> LowerSolution:
    r"""Proximal gradient steps, for h = f + r with a smooth f and the proximal operator of r.

    .. math:: x_+ = \mathrm{prox}_{r / L}(x - \nabla f(x) / L), \qquad
        v = L (x - x_+) - \nabla f(x) + \nabla f(x_+) \in \partial h(x_+)

    The certificate is :math:`\|v\| / \mu`, which is exact where r has kinks, too. With a ``penalty`` that is given as
    a function, a start that is good enough is returned as it is.

    Args:
        problem: The problem, with ``prox`` and ``smoothness``.
        theta: Hyperparameters.
        x: Where to begin.
        tol: Largest error of each problem, positive.
        maxiter: Largest number of steps.
        check_every: Steps from one look at the residual on the host to the next.

    Returns:
        The point and its error.

    Raises:
        ValueError: If an argument is wrong, or the problem has no ``prox`` or no ``smoothness``.

    References:
        Parikh and Boyd, "Proximal Algorithms", 2014, sec. 4.2.

    Example:
        >>> from lightning_hpo.functional.bilevel.proximal import prox_lasso
        >>> problem = LowerProblem(lambda x, t: ((x - 3) ** 2).sum() / 2, mu=1.0, smoothness=1.0,
        ...                        prox=lambda x, t, step: prox_lasso(x, t, step))
        >>> proximal_gradient(problem, torch.tensor(1.0), torch.zeros(2), tol=1e-4).x
        tensor([2., 2.])
    """
    check_settings(problem, tol, maxiter, check_every, needs_prox=True)
    step, mu, _ = _constants(problem, theta, x)
    bound, shape = mu * tol, (-1, *[1] * (x.dim() - 1)) if problem.batched else ()
    factor = step.to(x.dtype).reshape(shape)
    answer, gradient = x.detach(), problem.smooth_gradient(x, theta)
    residual = torch.full_like(mu, math.inf)
    if problem.penalty is not None:
        residual = problem.norms(problem.gradient(x, theta))
    running = ~(residual <= bound)
    taken = 0
    while taken < maxiter and (taken % check_every or bool(running.any())):
        taken += 1
        after = problem.prox(answer - factor * gradient, theta.detach(), factor).detach()  # type: ignore[misc]
        slope = problem.smooth_gradient(after, theta)
        found = problem.norms((answer - after) / factor - gradient + slope)
        alive = running.view(shape)
        answer, gradient = torch.where(alive, after, answer), torch.where(alive, slope, gradient)
        residual = torch.where(running, found, residual)
        running = running & (residual > bound) & torch.isfinite(residual)
    return LowerSolution(answer, residual / mu, taken, outcome(residual, bound))


def _descend(
    problem: LowerProblem,
    theta: Tensor,
    x: Tensor,
    tol: float,
    maxiter: int,
    check_every: int,
    step: Tensor,
    mu: Tensor,
    q: Tensor | None,
) -> LowerSolution:
    """Gradient steps with momentum for ``q``, without where it is None; a problem that is solved stays where it is."""
    rows = problem.rows(x.detach())
    bound, step, t = mu * tol, step.to(x.dtype)[:, None], torch.zeros_like(mu)
    before = current = answer = rows
    residual, running = torch.full_like(mu, math.inf), torch.ones_like(mu, dtype=torch.bool)
    taken = 0
    while True:
        z = current
        if q is not None:
            t, beta = _momentum(t, q)
            z = current + beta.to(x.dtype)[:, None] * (current - before)
        gradient = problem.rows(problem.gradient(z.view_as(x), theta))
        found = torch.linalg.vector_norm(gradient, dim=1, dtype=torch.float64)
        answer = torch.where(running[:, None], z, answer)
        residual = torch.where(running, found, residual)
        running = running & (residual > bound) & torch.isfinite(residual)
        if taken >= maxiter or (taken % check_every == 0 and not bool(running.any())):
            break
        before, current = current, z - step * gradient
        taken += 1
    return LowerSolution(answer.view_as(x), residual / mu, taken, outcome(residual, bound))


def _momentum(t: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """The next t, and the factor of the extrapolation."""
    rest = 1 - q * t * t
    after = (rest + (rest * rest + 4 * t * t).sqrt()) / 2
    beta = (t - 1) / after * (1 - after * q) / torch.where(q < 1, 1 - q, torch.ones_like(q))
    return after, torch.where((t > 0) & (q < 1), beta, torch.zeros_like(beta))


def _constants(problem: LowerProblem, theta: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Step 1/L, modulus and their product, each of shape ``(m,)``."""
    count = problem.count(x)
    mu, lipschitz = problem.modulus(theta, count), problem.lipschitz(theta, count)
    if problem.prox is None and bool((mu > lipschitz * (1 + 1e-6)).any()):
        raise ConstantError(
            f"mu {mu.max().item():g} is above smoothness {lipschitz.min().item():g}: one of them is wrong"
        )
    return 1 / lipschitz, mu, (mu / lipschitz).clamp(max=1.0)


def check_settings(
    problem: LowerProblem, tol: float, maxiter: int, check_every: int = 1, needs_prox: bool = False
) -> None:
    """Refuses wrong arguments of a solver, all at once.

    Args:
        problem: The problem.
        tol: Largest error.
        maxiter: Largest number of iterations.
        check_every: Steps between looks.
        needs_prox: Whether the problem must have a ``prox``.

    Raises:
        ValueError: If an argument is out of range.
    """
    checks = {
        f"tol must be positive and finite, got {tol!r}": 0 < tol < math.inf,
        f"maxiter must be at least 1, got {maxiter!r}": maxiter >= 1,
        f"check_every must be at least 1, got {check_every!r}": check_every >= 1,
        "proximal_gradient needs the problem's `prox`": problem.prox is not None or not needs_prox,
        "the problem has a `prox`: use proximal_gradient, or lbfgs": problem.prox is None or needs_prox,
    }
    if problems := [message for message, good in checks.items() if not good]:
        raise ValueError("; ".join(problems))


def outcome(residual: Tensor, bound: Tensor) -> str:
    """The status of a solve.

    Args:
        residual: Of each problem.
        bound: At which it counts as solved.

    Returns:
        ``"converged"``, ``"maxiter"`` or ``"not_finite"``.

    Example:
        >>> outcome(torch.tensor([0.1]), torch.tensor([0.2]))
        'converged'
    """
    if not bool(torch.isfinite(residual).all()):
        return "not_finite"
    return "converged" if bool((residual <= bound).all()) else "maxiter"
