"""Limited-memory BFGS for strongly convex lower problems, many at a time."""

import math

import torch
from torch import Tensor

from lightning_hpo.functional.bilevel.lower_problem import LowerProblem, LowerSolution

__all__ = ["lbfgs"]

_ARMIJO = 1e-4
_HALVINGS = 40


def lbfgs(
    problem: LowerProblem, theta: Tensor, x: Tensor, tol: float, *, maxiter: int = 20_000, memory: int = 10
) -> LowerSolution:
    r"""L-BFGS with backtracking; needs no Lipschitz constant, each problem has steps and pairs of its own.

    Strong convexity makes every pair's :math:`\langle s, y \rangle` positive, so that sufficient decrease is all that
    the line search has to look at. It allows for the rounding of the values, since close to the solution only the
    gradient tells how good a point is.

    Args:
        problem: The problem.
        theta: Hyperparameters.
        x: Where to begin; shape ``(m, ...)`` where batched.
        tol: Largest error :math:`\|x - \hat x\|` of each problem, positive.
        maxiter: Largest number of gradients beyond the first.
        memory: Pairs to remember.

    Returns:
        The point and its error; ``iterations`` counts the gradients of all trials.

    Raises:
        ValueError: If an argument is wrong.

    References:
        Nocedal and Wright, "Numerical Optimization", 2006, alg. 7.4 and 7.5.

    Example:
        >>> scales = torch.tensor([1.0, 1000.0], dtype=torch.float64)
        >>> problem = LowerProblem(lambda x, t: (scales * (x - t) ** 2).sum() / 2, mu=1.0)
        >>> found = lbfgs(problem, scales.new_tensor(2.0), torch.zeros(2, dtype=torch.float64), tol=1e-8)
        >>> found.status, found.iterations < 40
        ('converged', True)
    """
    wrong = [] if 0 < tol < math.inf else [f"tol must be positive and finite, got {tol!r}"]
    wrong += [f"{k} must be at least 1, got {v!r}" for k, v in (("maxiter", maxiter), ("memory", memory)) if v < 1]
    if wrong:
        raise ValueError("; ".join(wrong))
    mu = problem.modulus(theta, problem.count(x))
    bound, taken = mu * tol, 0

    def evaluate(rows: Tensor) -> tuple[Tensor, Tensor]:
        values, slope = problem.value_and_gradient(rows.view_as(x), theta)
        return values.double(), problem.rows(slope)

    point = problem.rows(x.detach())
    value, gradient = evaluate(point)
    pairs: list[tuple[Tensor, Tensor, Tensor]] = []
    while True:
        residual = torch.linalg.vector_norm(gradient, dim=1, dtype=torch.float64)
        running = (residual > bound) & torch.isfinite(residual)
        if taken >= maxiter or not bool(running.any()):
            break
        direction = -_two_loop(gradient, pairs)
        slope = (direction * gradient).sum(1).double()
        uphill = ~(slope < 0)  # a NaN, too
        direction = torch.where(uphill[:, None], -gradient, direction)
        slope = torch.where(uphill, -residual.square(), slope)
        step = torch.ones_like(mu) if pairs else 1 / residual.clamp(min=1.0)
        slack = 10 * torch.finfo(x.dtype).eps * value.abs()
        for _ in range(_HALVINGS):
            moved = torch.where(running, step, 0.0).to(x.dtype)[:, None] * direction
            new_value, new_gradient = evaluate(point + moved)
            taken += 1
            short = running & ~(new_value <= value + _ARMIJO * step * slope + slack)  # a NaN is too long a step
            if taken >= maxiter or not bool(short.any()):
                break
            step = torch.where(short, step / 2, step)
        if bool(short.any()):  # not to be lowered any further: what is there is the best
            break
        pairs = [*pairs, _pair(moved, new_gradient - gradient)][-memory:]
        point, value, gradient = point + moved, new_value, new_gradient
    status = "converged" if bool((residual <= bound).all()) else "maxiter"
    status = status if bool(torch.isfinite(residual).all()) else "not_finite"
    return LowerSolution(point.view_as(x), residual / mu, taken, status)


def _pair(s: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    r"""The pair with :math:`1 / \langle s, y \rangle`, 0 where the pair says nothing."""
    product = (s * y).sum(1)
    useful = product > torch.finfo(s.dtype).eps * (y * y).sum(1) * 1e-3
    return s, y, torch.where(useful, 1 / torch.where(useful, product, 1.0), 0.0)


def _two_loop(gradient: Tensor, pairs: list[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """The product of the inverse Hessian's approximation with the gradients, row by row."""
    q, factors = gradient, []
    for s, y, rho in reversed(pairs):
        factors.append(rho * (s * q).sum(1))
        q = q - factors[-1][:, None] * y
    scale = torch.ones_like(gradient[:, 0])
    for _, y, rho in pairs:  # of the latest pair that says something
        inverse = rho * (y * y).sum(1)
        scale = torch.where(inverse > 0, 1 / torch.where(inverse > 0, inverse, 1.0), scale)
    q = scale[:, None] * q
    for (s, y, rho), factor in zip(pairs, reversed(factors), strict=True):
        q = q + (factor - rho * (y * q).sum(1))[:, None] * s
    return q
