"""A bilevel problem with what a certificate of descent has to know about it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_hpo.functional.bilevel.lower_problem import Constant, LowerProblem, constant
from lightning_hpo.functional.bilevel.problem import identity

__all__ = ["BilevelProblem", "UpperPoint"]

_CONSTANTS = ("upper_smoothness", "cross_lipschitz", "inverse_lipschitz")


class UpperPoint(NamedTuple):
    r"""The upper loss at a point.

    Attributes:
        values: :math:`g_i(x_i)`, shape ``(m,)`` in float64.
        gradient: :math:`\nabla g_i(x_i)` in the shape of x.
        norms: :math:`\|\nabla g_i\|`, shape ``(m,)`` in float64.
    """

    values: Tensor
    gradient: Tensor
    norms: Tensor


@dataclass(frozen=True)
class BilevelProblem:
    r"""Hyperparameters that minimise a loss of the solutions of lower problems.

    .. math::

        \min_\theta f(\theta) = \frac1m \sum_{i=1}^m g_i(\hat x_i(\theta)) + r(\theta), \qquad
        \hat x_i(\theta) = \arg\min_x h_i(x, \theta)

    Constants that are not given are estimated by running maxima of difference quotients; steps are then made to the
    best of that knowledge, and :attr:`certified` is false.

    Args:
        lower: The lower problem, or the m of them.
        upper: :math:`g(x)`, a scalar; batched, m values of which the i-th is a function of ``x[i]`` alone.
        upper_smoothness: Lipschitz constant :math:`L_g` of :math:`\nabla g`.
        convex_upper: Whether g is convex, which tightens the lower bound on its value.
        regularizer: :math:`r(\theta)`, a scalar.
        cross_norm: :math:`\|J\|` at ``(x, theta)``, one number for x stacked, or one for each problem; by power
            iteration where None. Only the error bound of the hypergradient needs it, like the next two.
        cross_lipschitz: Lipschitz constant :math:`L_J` in x of :math:`J = \nabla^2_{x\theta} h`: a number or a
            function of :math:`\theta`; 0 where J does not depend on x.
        inverse_lipschitz: Lipschitz constant in x of :math:`H^{-1}`; 0 for a quadratic h, at most :math:`L_H / \mu^2`.
        reduce: Mean over ranks that own *different* lower problems, the same number each. (Ranks that share the data
            of the same problems are told to the lower problem, whose ``reduce`` serves g as well.)

    Raises:
        ValueError: If a constant is negative.

    References:
        Salehi et al., SIAM J. Math. Data Sci. 7(3), 2025, sec. 2 and 3.

    Example:
        >>> lower = LowerProblem(lambda x, t: ((x - t) ** 2).sum(), mu=2.0, smoothness=2.0)
        >>> problem = BilevelProblem(lower, lambda x: (x**2).sum(), upper_smoothness=2.0)
        >>> problem.upper_at(torch.tensor([3.0])).values, problem.certified
        (tensor([9.], dtype=torch.float64), True)
    """

    lower: LowerProblem
    upper: Callable[[Tensor], Tensor]
    upper_smoothness: float | None = None
    convex_upper: bool = False
    regularizer: Callable[[Tensor], Tensor] | None = None
    cross_norm: Callable[[Tensor, Tensor], Tensor | float] | None = None
    cross_lipschitz: Constant | None = None
    inverse_lipschitz: Constant | None = None
    reduce: Callable[[Tensor], Tensor] = identity

    def __post_init__(self) -> None:
        given = {name: getattr(self, name) for name in _CONSTANTS}
        wrong = [
            f"{n} must be at least 0, got {v!r}" for n, v in given.items() if isinstance(v, (int, float)) and v < 0
        ]
        if wrong:
            raise ValueError("; ".join(wrong))

    @property
    def certified(self) -> bool:
        r"""Whether an accepted step certainly lowers the true loss: :math:`\mu` and :math:`L_g` are given."""
        return self.upper_smoothness is not None and not self.lower.mu_estimated

    @property
    def bound_certified(self) -> bool:
        """Whether the error bound of the hypergradient is one: all constants are given."""
        given = (self.cross_norm, self.cross_lipschitz, self.inverse_lipschitz)
        return self.certified and all(value is not None for value in given)

    def upper_at(self, x: Tensor) -> UpperPoint:
        """The upper loss and its gradient.

        Args:
            x: Solutions; shape ``(m, ...)`` where batched.

        Returns:
            Values, gradient and its norms.

        Raises:
            ValueError: If the loss has another shape, or does not depend on x.
        """
        lower = self.lower
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            values = self.upper(leaf)
            shape = (len(x),) if lower.batched else ()
            if not isinstance(values, Tensor) or tuple(values.shape) != shape:
                got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
                raise ValueError(f"the upper loss must return {f'shape {shape}' if shape else 'a scalar'}, got {got}")
            found = torch.autograd.grad(values.sum(), leaf, allow_unused=True)[0] if values.requires_grad else None
        if found is None:
            raise ValueError("the upper loss does not depend on x: theta could not change it")
        both = lower.reduce(torch.cat([values.detach().reshape(-1).to(found.dtype), found.reshape(-1)]))
        count = lower.count(x)
        gradient = both[count:].view_as(x)
        return UpperPoint(both[:count].double(), gradient, lower.norms(gradient))

    def regularization(self, theta: Tensor) -> tuple[float, Tensor]:
        """The value and the gradient of r; zeros without one.

        Args:
            theta: Hyperparameters.

        Returns:
            A number, and a tensor like theta.

        Raises:
            ValueError: If r is no scalar that depends on theta.
        """
        if self.regularizer is None:
            return 0.0, torch.zeros_like(theta)
        with torch.enable_grad():
            leaf = theta.detach().requires_grad_()
            value = self.regularizer(leaf)
            if value.numel() != 1 or not value.requires_grad:
                raise ValueError("the regularizer must return a scalar that depends on theta")
            (slope,) = torch.autograd.grad(value.reshape(()), leaf)
        return value.item(), slope

    def known(
        self, theta: Tensor, estimates: Mapping[str, float], count: int, names: Sequence[str] = _CONSTANTS
    ) -> dict[str, Tensor]:
        """Lipschitz constants at theta, given or estimated.

        Args:
            theta: Hyperparameters.
            estimates: Running maxima by name, for those that are not given.
            count: The number of lower problems.
            names: Which are wanted; all three by default.

        Returns:
            By name, shape ``(count,)``.
        """
        given = {name: getattr(self, name) for name in names}
        return {
            name: constant(estimates.get(name, 0.0) if value is None else value, theta, count)
            for name, value in given.items()
        }
