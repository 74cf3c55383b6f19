r"""Hypergradients at inexact solutions of lower problems, and how wrong they may be."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_hpo.functional.bilevel.conjugate_gradient import cg
from lightning_hpo.functional.bilevel.lower_derivatives import LowerDerivatives
from lightning_hpo.functional.bilevel.maid_bounds import hypergradient_error_bound
from lightning_hpo.functional.bilevel.maid_problem import BilevelProblem, UpperPoint

__all__ = ["InexactHypergradient", "error_bound", "estimated_constants", "inexact_hypergradient"]


class InexactHypergradient(NamedTuple):
    r"""A hypergradient and what it was made of.

    Attributes:
        z: :math:`z \approx \nabla f(\theta)`, in the shape of theta; the mean over ranks.
        q: The adjoint :math:`q \approx H^{-1} \nabla g`, in the shape of x.
        upper: The upper loss at x.
        derivatives: Second derivatives of the lower loss at x.
        delta: The residual that was asked for.
        iterations: Of conjugate gradients.
    """

    z: Tensor
    q: Tensor
    upper: UpperPoint
    derivatives: LowerDerivatives
    delta: float
    iterations: int


def inexact_hypergradient(
    problem: BilevelProblem,
    theta: Tensor,
    x: Tensor,
    delta: float,
    q: Tensor | None = None,
    *,
    kappa: float | None = 0.03,
    maxiter: int = 1000,
) -> InexactHypergradient:
    r"""The hypergradient at an inexact solution x, by conjugate gradients that begin at the last adjoint.

    .. math::

        \|H q - \nabla g(x)\| \le \min(\delta, \kappa \|\nabla g(x)\|), \qquad
        z = -\tfrac1m J^\top q + \nabla r(\theta)

    An absolute :math:`\delta` above :math:`\|\nabla g\|` would accept any start of the solve, 0 among them, and the
    direction could be anything: hence the cap. For m problems both norms are root mean squares.

    Args:
        problem: The problem.
        theta: Hyperparameters.
        x: Solutions; shape ``(m, ...)`` where batched.
        delta: Largest residual, positive.
        q: Where conjugate gradients begin, like x; 0 where None.
        kappa: Largest residual relative to :math:`\nabla g`; no cap where None.
        maxiter: Largest number of iterations.

    Returns:
        The hypergradient.

    Raises:
        ValueError: If the upper loss does not depend on x, or an argument is out of range.
        RuntimeError: If the lower loss has negative curvature, or the solve needs more iterations.

    References:
        Salehi et al., SIAM J. Math. Data Sci. 7(3), 2025, alg. 3.2.

    Example:
        >>> from lightning_hpo.functional.bilevel.lower_problem import LowerProblem
        >>> lower = LowerProblem(lambda x, t: ((x - t) ** 2).sum(), mu=2.0, smoothness=2.0)
        >>> problem = BilevelProblem(lower, lambda x: (x**2).sum())
        >>> inexact_hypergradient(problem, torch.tensor(3.0), torch.tensor([3.0]), 1e-3).z
        tensor(6.)
    """
    wrong = [] if delta > 0 else [f"delta must be positive, got {delta!r}"]
    wrong += [] if kappa is None or 0 < kappa < 1 else [f"kappa must be between 0 and 1, got {kappa!r}"]
    if wrong:
        raise ValueError("; ".join(wrong))
    upper = problem.upper_at(x)
    derivatives = LowerDerivatives(problem.lower, x, theta)
    count = problem.lower.count(x)
    right = upper.gradient.reshape(-1)
    length = upper.norms.square().sum().sqrt().item()
    relative = delta * count**0.5 / length if length > 0 else 1.0
    relative = relative if kappa is None else min(relative, kappa)
    start = None if q is None else q.reshape(-1)
    solution, info = cg(derivatives.hessian, right, init=start, tol=relative, maxiter=maxiter)
    _check(bool(info.negative_curvature), bool(info.converged), info.residual.item(), relative, int(info.iterations))
    slope = -derivatives.cross(solution) / count + problem.regularization(theta)[1]
    z = problem.reduce(slope)
    return InexactHypergradient(z, solution.view_as(x), upper, derivatives, relative * length, int(info.iterations))


def _check(curved: bool, converged: bool, residual: float, tol: float, iterations: int) -> None:
    if curved:
        raise RuntimeError(
            "the lower loss is not strongly convex: conjugate gradients met negative curvature after "
            f"{iterations} iterations; add a ridge"
        )
    if not converged:
        raise RuntimeError(
            f"conjugate gradients ended at a relative residual of {residual:.1e} instead of {tol:.1e} after "
            f"{iterations} iterations; raise cg_maxiter, or add a ridge"
        )


def error_bound(
    problem: BilevelProblem,
    theta: Tensor,
    x: Tensor,
    error: Tensor,
    found: InexactHypergradient,
    estimates: Mapping[str, float] | None = None,
) -> float:
    r"""The a-posteriori bound :math:`\omega \ge \|z - \nabla f(\theta)\|`, a mean over lower problems and ranks.

    The residual of the adjoint is computed anew (one product), not taken from conjugate gradients' recursion. Where
    ``cross_norm`` tells one number, or nothing, of many problems, these count as one with x stacked.

    Args:
        problem: The problem.
        theta: Hyperparameters.
        x: Solutions.
        error: Their errors, shape ``(m,)``.
        found: The hypergradient there.
        estimates: Running maxima of constants that are not given, of :func:`estimated_constants`.

    Returns:
        The bound.

    Example:
        >>> from lightning_hpo.functional.bilevel.lower_problem import LowerProblem
        >>> lower = LowerProblem(lambda x, t: ((x - t) ** 2).sum(), mu=2.0, smoothness=2.0)
        >>> problem = BilevelProblem(lower, lambda x: (x**2).sum(), 2.0, cross_norm=lambda x, t: 2.0,
        ...                          cross_lipschitz=0.0, inverse_lipschitz=0.0)
        >>> theta, x = torch.tensor([3.0]), torch.tensor([3.1])
        >>> found = inexact_hypergradient(problem, theta, x, 1e-3)  # 6.2 instead of 6
        >>> round(error_bound(problem, theta, x, torch.tensor([0.1]), found), 5)
        0.2
    """
    lower, count = problem.lower, problem.lower.count(x)
    mu = lower.modulus(theta, count)
    residual = lower.norms((found.derivatives.hessian(found.q) - found.upper.gradient.reshape(-1)).view_as(x))
    if problem.cross_norm is None:
        norm = found.derivatives.cross_norm(found.z).reshape(1)
    else:
        norm = torch.as_tensor(problem.cross_norm(x, theta), dtype=torch.float64, device=x.device).reshape(-1)
    error, slopes = error.double(), found.upper.norms
    if len(norm) != count:
        error, residual, slopes = ((v.square().sum().sqrt()).reshape(1) for v in (error, residual, slopes))
        mu = mu.min().reshape(1)
    constants = problem.known(theta, estimates or {}, len(norm))
    bound = hypergradient_error_bound(error, residual, mu=mu, cross_norm=norm, upper_gradient=slopes, **constants)
    return problem.reduce(bound.sum() / count).item()


def estimated_constants(
    problem: BilevelProblem,
    theta: Tensor,
    x: Tensor,
    found: InexactHypergradient,
    other: Tensor,
    maxima: Mapping[str, float],
    names: Sequence[str] = ("upper_smoothness", "cross_lipschitz", "inverse_lipschitz"),
) -> dict[str, float]:
    r"""Running maxima of difference quotients between two points, for Lipschitz constants that are not given.

    :math:`L_g` from the upper gradients, :math:`L_J` and :math:`L_H` from products with the adjoint, and
    :math:`L_{H^{-1}} = L_H / \mu^2`. Estimates from below: what rests on them is no certificate.

    Args:
        problem: The problem.
        theta: Hyperparameters.
        x: Solutions.
        found: The hypergradient there.
        other: Another point, as the solutions of the step before; a small step along the upper gradient is taken
            where it is the same.
        maxima: Those of before.
        names: Which are wanted.

    Returns:
        Those of now, by the names of the problem's arguments.

    Example:
        >>> from lightning_hpo.functional.bilevel.lower_problem import LowerProblem
        >>> lower = LowerProblem(lambda x, t: ((x - t) ** 2).sum(), mu=2.0, smoothness=2.0)
        >>> problem = BilevelProblem(lower, lambda x: (x**2).sum())
        >>> theta, x = torch.tensor(3.0), torch.tensor([3.0])
        >>> found = inexact_hypergradient(problem, theta, x, 1e-3)
        >>> round(estimated_constants(problem, theta, x, found, torch.tensor([2.0]), {})["upper_smoothness"], 6)
        2.0
    """
    missing = [name for name in names if getattr(problem, name) is None]
    if not missing:
        return dict(maxima)
    gap = torch.linalg.vector_norm((other - x).double())
    if not bool(gap > 0):
        along = found.upper.gradient
        length = torch.linalg.vector_norm(along)
        scale = 1e-3 * torch.linalg.vector_norm(x).clamp(min=1.0)
        other = x - scale * torch.where(length > 0, along / torch.where(length > 0, length, 1.0), 1.0)
        gap = torch.linalg.vector_norm((other - x).double())
    quotients = {"upper_smoothness": _distance(problem.upper_at(other).gradient, found.upper.gradient) / gap}
    length = torch.linalg.vector_norm(found.q.double())
    if set(missing) - {"upper_smoothness"}:
        there, here, q = LowerDerivatives(problem.lower, other, theta), found.derivatives, found.q.reshape(-1)
        share = torch.where(length > 0, gap * length, torch.full_like(gap, float("inf")))
        mu = problem.lower.modulus(theta, problem.lower.count(x)).min()
        quotients["cross_lipschitz"] = _distance(there.cross(q), here.cross(q)) / share
        quotients["inverse_lipschitz"] = _distance(there.hessian(q), here.hessian(q)) / share / mu.square()
    return dict(maxima) | {name: max(maxima.get(name, 0.0), quotients[name].item()) for name in missing}


def _distance(left: Tensor, right: Tensor) -> Tensor:
    return torch.linalg.vector_norm((left - right).double())
