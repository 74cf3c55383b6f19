r"""A strongly convex lower problem whose solutions carry a certificate, alone or many side by side.

Strong convexity turns a gradient into a distance: with the modulus :math:`\mu` of :math:`h(\cdot, \theta)` every point
satisfies :math:`\|x - \hat x(\theta)\| \le \|\nabla_x h(x, \theta)\| / \mu`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from lightning_hpo.functional.bilevel.problem import identity

__all__ = [
    "Constant",
    "ConstantError",
    "LowerLoss",
    "LowerProblem",
    "LowerSolution",
    "LowerSolver",
    "Prox",
    "constant",
]

LowerLoss = Callable[[Tensor, Tensor], Tensor]
Prox = Callable[[Tensor, Tensor, Tensor], Tensor]  # (x, theta, step) to x
Constant = float | Callable[[Tensor], "Tensor | float"]  # a number, or a function of theta


class ConstantError(ValueError):
    """A constant of a problem is no positive number where it was asked for."""


class LowerSolution(NamedTuple):
    r"""A point and how far from the solution it is at most.

    Attributes:
        x: The point, in the shape of the start.
        error: The error achieved, :math:`e_i = \|\nabla_x h_i(x_i, \theta)\| / \mu_i \ge \|x_i - \hat x_i\|`; shape
            ``(m,)`` in float64, with one entry for a problem that is not batched.
        iterations: Gradients that were taken beyond the first, of all problems together as one.
        status: ``"converged"``, ``"maxiter"`` or ``"not_finite"``.
    """

    x: Tensor
    error: Tensor
    iterations: int
    status: str


class LowerSolver(Protocol):
    r"""Solves a lower problem until its error is certified; further settings are bound with ``functools.partial``."""

    def __call__(
        self, problem: "LowerProblem", theta: Tensor, x: Tensor, tol: float, *, maxiter: int = ...
    ) -> LowerSolution:
        r"""A point with :math:`e_i \le \mathrm{tol}` for all problems, begun at ``x``."""
        ...


@dataclass(frozen=True)
class LowerProblem:
    r"""Strongly convex in x, differentiable in :math:`\theta`: :math:`\hat x(\theta) = \arg\min_x h(x, \theta)`.

    **Batched problems.** With ``batched=True`` the first dimension of ``x`` counts m independent problems
    :math:`h_i(x_i, \theta)` that share :math:`\theta`: images to denoise, tasks, folds. ``loss`` takes x of shape
    ``(m, ...)`` and returns m values, the i-th a function of ``x[i]`` alone. All are solved in the same passes, and
    each stops at its own accuracy: the answer and the error :math:`e_i` of a problem do not depend on its neighbours.

    Args:
        loss: :math:`h(x, \theta)`, a scalar; ``(m,)`` where batched. With a ``penalty`` the rest of h.
        mu: Modulus of strong convexity :math:`\mu` of h, positive: a number, or a function of :math:`\theta` that
            returns a number or one for each problem. A value that is too large makes every certificate void.
        smoothness: Lipschitz constant L of :math:`\nabla_x h` (with a ``prox``: of the gradient of ``loss``), given
            like ``mu``; L-BFGS goes without.
        batched: Whether the first dimension of x counts problems.
        reduce: Mean over ranks that each hold a part of the data of the *same* problems.
        prox: :math:`\mathrm{prox}_{s r(\cdot, \theta)}(x)` as ``prox(x, theta, step)`` for a part r of h; only
            :func:`~lightning_hpo.functional.bilevel.lower_solvers.proximal_gradient` uses it. Batched, the step has
            shape ``(m, 1, ..., 1)``.
        penalty: That part :math:`r(x, \theta)` as a function, where it is twice differentiable; without it there is
            no hypergradient of a problem with a ``prox``.
        mu_estimated: Whether ``mu`` is an estimate, so that nothing is certified.

    Raises:
        ValueError: If ``mu`` is missing, or a ``penalty`` comes without a ``prox``.

    References:
        Salehi, Mukherjee, Roberts, Ehrhardt, "An adaptively inexact first-order method for bilevel optimization with
        application to hyperparameter learning", SIAM J. Math. Data Sci. 7(3), 2025, sec. 2.

    Example:
        >>> ridge = LowerProblem(lambda x, t: ((x - 3) ** 2).sum() + t.exp() * (x**2).sum() / 2,
        ...                      mu=lambda t: 2 + t.exp(), smoothness=lambda t: 2 + t.exp())
        >>> ridge.gradient(torch.zeros(2), torch.tensor(0.0))
        tensor([-6., -6.])
    """

    loss: LowerLoss
    mu: Constant | None
    smoothness: Constant | None = None
    batched: bool = False
    reduce: Callable[[Tensor], Tensor] = identity
    prox: Prox | None = None
    penalty: LowerLoss | None = None
    mu_estimated: bool = False

    def __post_init__(self) -> None:
        problems = []
        if self.mu is None:
            problems.append(_NO_MODULUS.format("it is missing"))
        if self.penalty is not None and self.prox is None:
            problems.append("a penalty needs its prox; without one it belongs into the loss")
        if problems:
            raise ValueError("; ".join(problems))

    def count(self, x: Tensor) -> int:
        """The number of problems m that x belongs to."""
        return len(x) if self.batched else 1

    def rows(self, x: Tensor) -> Tensor:
        """Shape ``(m, n)``: one row a problem."""
        return x.reshape(self.count(x), -1)

    def norms(self, v: Tensor) -> Tensor:
        """Euclidean norm for each problem, shape ``(m,)`` in float64."""
        return torch.linalg.vector_norm(self.rows(v), dim=1, dtype=torch.float64)

    def modulus(self, theta: Tensor, count: int = 1) -> Tensor:
        r""":math:`\mu` at :math:`\theta`, shape ``(m,)`` in float64.

        Args:
            theta: The hyperparameters.
            count: The number of problems m.

        Returns:
            One number a problem.

        Raises:
            ConstantError: If one is not positive.
        """
        found = constant(self.mu, theta, count)
        if not bool((found > 0).all() & torch.isfinite(found).all()):
            raise ConstantError(_NO_MODULUS.format(f"got {found.min().item():g}"))
        return found

    def lipschitz(self, theta: Tensor, count: int = 1) -> Tensor:
        r"""L at :math:`\theta`, shape ``(m,)`` in float64.

        Args:
            theta: The hyperparameters.
            count: The number of problems m.

        Returns:
            One number a problem.

        Raises:
            ValueError: If it is not given; a :class:`ConstantError` if it is not positive.
        """
        if self.smoothness is None:
            raise ValueError("give `smoothness`, the Lipschitz constant of the lower gradient, or solve by `lbfgs`")
        found = constant(self.smoothness, theta, count)
        if not bool((found > 0).all() & torch.isfinite(found).all()):
            raise ConstantError(f"smoothness must be positive and finite, got {found.min().item():g}")
        return found

    def total(self, x: Tensor, theta: Tensor) -> Tensor:
        """h, shape ``(m,)``, with a graph if x or theta has one.

        Args:
            x: Shape ``(m, ...)`` where batched.
            theta: The hyperparameters.

        Returns:
            One value a problem.

        Raises:
            ValueError: If the losses have another shape, or a part of h is known by its prox alone.
        """
        if self.prox is not None and self.penalty is None:
            raise ValueError("a part of h is known by its prox alone: give `penalty`, or use `proximal_gradient`")
        values = self._values(self.loss, x, theta)
        return values if self.penalty is None else values + self._values(self.penalty, x, theta)

    def gradient(self, x: Tensor, theta: Tensor) -> Tensor:
        r""":math:`\nabla_x h` in the shape of x, without a graph."""
        return self._slopes(self.total, x, theta)[1]

    def value_and_gradient(self, x: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
        r"""The loss h of shape ``(m,)`` and :math:`\nabla_x h` in the shape of x, without graphs."""
        return self._slopes(self.total, x, theta, values=True)

    def smooth_gradient(self, x: Tensor, theta: Tensor) -> Tensor:
        """The gradient of ``loss`` alone."""
        return self._slopes(lambda x, theta: self._values(self.loss, x, theta), x, theta)[1]

    def _slopes(self, function: LowerLoss, x: Tensor, theta: Tensor, values: bool = False) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            found = function(leaf, theta.detach())
            if not found.requires_grad:
                raise ValueError("the lower loss does not depend on x: is it computed from the x that it is given?")
            (slope,) = torch.autograd.grad(found.sum(), leaf)
        if not values:
            return found.detach(), self.reduce(slope)
        both = self.reduce(torch.cat([found.detach().to(slope.dtype), slope.reshape(-1)]))
        return both[: len(found)], both[len(found) :].view_as(slope)

    def _values(self, function: LowerLoss, x: Tensor, theta: Tensor) -> Tensor:
        found = function(x, theta)
        shape = (len(x),) if self.batched else ()
        if not isinstance(found, Tensor) or tuple(found.shape) != shape:
            got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            what = f"one value a problem, {shape}" if self.batched else "a scalar tensor"
            raise ValueError(f"the lower loss must return {what}, got {got}")
        return found.reshape(-1)


_NO_MODULUS = (
    "`mu` must be the modulus of strong convexity of the lower loss, a positive number or a function of theta ({}): "
    "add a ridge 0.5 * c * x.square().sum() and give c"
)


def constant(value: Constant | None, theta: Tensor, count: int) -> Tensor:
    """A constant at theta as ``(count,)`` in float64.

    Args:
        value: A number, or a function of theta that returns one or ``count`` of them.
        theta: The hyperparameters.
        count: How many entries are wanted.

    Returns:
        The entries.

    Raises:
        ValueError: If there is neither one nor ``count`` of them.

    Example:
        >>> constant(lambda t: t.exp().min(), torch.zeros(3), 2)
        tensor([1., 1.], dtype=torch.float64)
    """
    found = value(theta.detach()) if callable(value) else value
    found = torch.as_tensor(found, device=theta.device).detach().to(torch.float64).reshape(-1)
    if len(found) not in (1, count):
        raise ValueError(f"a constant must be one number or one for each of {count} problems, got {len(found)}")
    return found.expand(count)
