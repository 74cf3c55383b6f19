"""Lower solves of MAID, and the bounds on the outer loss that they give."""

import math
from collections.abc import Mapping
from contextlib import suppress

import torch
from torch import Tensor

from lightning_hpo.functional.bilevel.lower_problem import ConstantError, LowerSolution, LowerSolver
from lightning_hpo.functional.bilevel.maid_bounds import value_bounds
from lightning_hpo.functional.bilevel.maid_problem import BilevelProblem, UpperPoint
from lightning_hpo.functional.bilevel.maid_state import MAIDState

__all__ = ["Evaluation"]


class Evaluation:
    r"""What is known about the outer loss at a point, the same on all ranks.

    Args:
        problem: The problem.
        solver: Solves its lower problems.
        certify: Whether errors widen the bounds.
        bounds: Lowest and highest theta.
        maxiter: Largest number of iterations of a lower solve.

    Example:
        >>> from lightning_hpo.functional.bilevel.lower_problem import LowerProblem
        >>> from lightning_hpo.functional.bilevel.lower_solvers import fista
        >>> lower = LowerProblem(lambda x, t: ((x - t) ** 2).sum(), mu=2.0, smoothness=2.0)
        >>> evaluation = Evaluation(BilevelProblem(lower, lambda x: (x**2).sum(), 2.0), fista)
        >>> state = MAIDState(torch.tensor(3.0), torch.zeros(1), error=torch.ones(1), eps=0.1, delta=0.1)
        >>> evaluation.trial(torch.tensor(2.0), state, evaluation.accuracy(state))[1:]
        (4.0, 4.0)
    """

    def __init__(
        self,
        problem: BilevelProblem,
        solver: LowerSolver,
        certify: bool = True,
        bounds: tuple[Tensor | float | None, Tensor | float | None] | None = None,
        maxiter: int = 20_000,
    ) -> None:
        self.problem, self.solver, self.certify, self.bounds, self.maxiter = problem, solver, certify, bounds, maxiter

    def solve(self, state: MAIDState) -> LowerSolution:
        """The lower problems at the state's own theta, where failing is an error.

        Args:
            state: Where the run stands.

        Returns:
            The solution.

        Raises:
            RuntimeError: If the accuracy is not reached, on any rank.
        """
        eps = self.accuracy(state)
        solution = self.solver(self.problem.lower, state.theta, state.x, eps, maxiter=self.maxiter)
        failed = self.problem.reduce(solution.error.new_tensor(float(solution.status != "converged")))
        if failed.item() > 0:
            raise RuntimeError(
                f"the lower problem was not solved to eps={eps:.1e}: error {solution.error.max().item():.1e} after "
                f"{solution.iterations} iterations ({solution.status}); is the lower loss strongly convex with this "
                "`mu`, and `smoothness` large enough? Raise lower_maxiter, or add a ridge"
            )
        return solution

    def trial(self, theta: Tensor, state: MAIDState, eps: float) -> tuple[LowerSolution | None, float, float]:
        """The lower problems at a trial point, and the bounds on f there; infinite ones where they are not solved.

        Args:
            theta: The trial point.
            state: Where the run stands.
            eps: The largest error, :meth:`accuracy` of the state.

        Returns:
            The solution, None where theta does not allow of one; lower and upper bound.
        """
        bounds: tuple[float, float, float] | None = None
        solution: LowerSolution | None = None
        with suppress(ConstantError):  # the step leaves the region in which the lower problem is one
            solution = self.solver(self.problem.lower, theta, state.x, eps, maxiter=self.maxiter)
        if solution is not None and bool(torch.isfinite(solution.x).all()):
            bounds = self.value_bounds(theta, solution, self.problem.upper_at(solution.x), state.estimates)
        else:  # other ranks wait for this one
            self.problem.reduce(theta.new_ones(3, dtype=torch.float64))
        if bounds is None or bounds[2] > 0 or not math.isfinite(bounds[1]):
            return solution, math.inf, math.inf
        return solution, bounds[0], bounds[1]

    def value_bounds(
        self, theta: Tensor, solution: LowerSolution, upper: UpperPoint, estimates: Mapping[str, float]
    ) -> tuple[float, float, float]:
        """Bounds on f at theta.

        Args:
            theta: Hyperparameters.
            solution: Of the lower problems there.
            upper: The upper loss at the solution.
            estimates: Of Lipschitz constants that are not given.

        Returns:
            Lower and upper bound, and the share of ranks on which the solve failed.
        """
        error = solution.error if self.certify else torch.zeros_like(solution.error)
        (smoothness,) = self.problem.known(theta, estimates, len(error), ("upper_smoothness",)).values()
        low, up = value_bounds(upper.values, upper.norms, error, smoothness, self.problem.convex_upper)
        failed = torch.full_like(low[0], float(solution.status != "converged"))
        found = self.problem.reduce(torch.stack([low.mean(), up.mean(), failed])).tolist()
        extra = self.problem.regularization(theta)[0]
        return found[0] + extra, found[1] + extra, found[2]

    def floor(self, state: MAIDState) -> float:
        """The finest error that rounding lets a lower gradient show.

        Args:
            state: Where the run stands.

        Returns:
            Ten times the machine precision, of the size of what a gradient is made of, over the modulus.
        """
        lower, count = self.problem.lower, self.problem.lower.count(state.x)
        size = torch.full_like(state.error, state.scale, dtype=torch.float64)
        if lower.smoothness is not None:
            size = torch.maximum(size, lower.lipschitz(state.theta, count) * lower.norms(state.x))
        floor = 10 * torch.finfo(state.x.dtype).eps * (size / lower.modulus(state.theta, count)).max()
        return self.problem.reduce(floor).item()

    def accuracy(self, state: MAIDState) -> float:
        """The error to which lower problems are solved: the state's, or the floor.

        Args:
            state: Where the run stands.

        Returns:
            The larger of the two.
        """
        return max(state.eps, self.floor(state))

    def at_floor(self, state: MAIDState) -> bool:
        """Whether the accuracy cannot be any finer.

        Args:
            state: Where the run stands.

        Returns:
            Whether it is.
        """
        return state.eps <= self.floor(state)

    def project(self, theta: Tensor) -> Tensor:
        """The closest theta within the bounds.

        Args:
            theta: Any.

        Returns:
            Of the same shape.
        """
        if self.bounds is None:
            return theta
        low, high = (
            None if b is None else torch.as_tensor(b, dtype=theta.dtype, device=theta.device) for b in self.bounds
        )
        return torch.clamp(theta, low, high)
