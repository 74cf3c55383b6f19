"""Method of Adaptive Inexact Descent: bilevel optimization that chooses its step and its accuracies itself."""

import warnings
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from lightning_hpo.functional.bilevel.lower_problem import LowerProblem, LowerSolver
from lightning_hpo.functional.bilevel.lower_solvers import fista
from lightning_hpo.functional.bilevel.maid_evaluation import Evaluation
from lightning_hpo.functional.bilevel.maid_hypergradient import (
    InexactHypergradient,
    error_bound,
    estimated_constants,
    inexact_hypergradient,
)
from lightning_hpo.functional.bilevel.maid_line_search import LineSearch
from lightning_hpo.functional.bilevel.maid_problem import BilevelProblem
from lightning_hpo.functional.bilevel.maid_settings import Accuracy, argument_problems, start_problems, tightening
from lightning_hpo.functional.bilevel.maid_state import MAIDState

__all__ = ["MAID", "BilevelProblem", "LowerProblem", "MAIDState"]

_CONSTANTS = ("upper_smoothness", "cross_lipschitz", "inverse_lipschitz")


class MAID:
    r"""Descends :math:`f(\theta)` by inexact hypergradients; every accepted step certainly lowers the true f.

    A step solves the lower problem to an error :math:`\varepsilon` and the adjoint to a residual :math:`\delta`,
    and searches along the hypergradient z. It accepts where
    :math:`\psi = U_{up}(\theta_+) - U_{low}(\theta) + \lambda \langle z, \theta - \theta_+ \rangle \le 0`, in which
    both bounds know the errors that were achieved. If a search finds nothing, :math:`\varepsilon` and
    :math:`\delta` shrink by :math:`\nu` and it begins again, one trial longer; after a success they grow by
    :math:`\bar\nu`, and the step by :math:`\bar\rho`. So neither a learning rate nor a number of inner iterations is
    left to be set.

    :meth:`step` is a pure function of a :class:`~lightning_hpo.functional.bilevel.maid_state.MAIDState`: a run that
    is saved and taken up again goes on bit for bit.

    Args:
        problem: The problem, with what is known about it.
        solver: Solves the lower problem.
        accuracy: ``"adaptive"`` as above. For comparison in the same loop, ``"fixed"``, and HOAG's sequences
            ``"geometric"`` (:math:`0.9^k`), ``"quadratic"`` and ``"cubic"`` (:math:`1/k^2`, :math:`1/k^3`).
        eps0: First :math:`\varepsilon`; by default a tenth of the error of the first x.
        delta0: First :math:`\delta`; by default a tenth of the upper gradient there.
        alpha0: First step size; by default one that moves :math:`\theta` by its own length, at least by 1.
        rho: Factor of a step that is not accepted.
        rho_bar: Growth of the step after success.
        nu: Factor of both accuracies after failure; 0.5 by default.
        nu_bar: Their growth after success; 1.05 by default.
        eta: Margin of the descent test :math:`\omega \le (1 - \eta) \|z\|`.
        lam: The fraction :math:`\lambda` of the slope that a step must gain.
        kappa: Largest residual of the adjoint relative to the upper gradient.
        max_backtracks: Trials of the first search of a step.
        check_descent: Whether the error bound :math:`\omega` is formed, and the accuracies tightened until -z is
            certainly a direction of descent. Otherwise only steps are certified.
        bb_init: Whether a search begins at Barzilai and Borwein's step.
        nonmonotone: Whether the decrease may be measured from Zhang and Hager's average of past values as well.
        certify: Whether the errors enter :math:`\psi`. Without, it is a line search that believes its values.
        bounds: Lowest and highest :math:`\theta`, numbers or tensors; steps are projected.
        tolerance: Size of the hypergradient, and of the bound on its error, at which the run ends.
        lower_maxiter: Largest number of iterations of a lower solve.
        cg_maxiter: Largest number of iterations for an adjoint.
        allow_low_precision: Whether x may have 16 bits.

    Raises:
        ValueError: If an argument is out of range or two contradict each other; all are listed.

    References:
        Salehi, Mukherjee, Roberts, Ehrhardt, "An adaptively inexact first-order method for bilevel optimization with
        application to hyperparameter learning", SIAM J. Math. Data Sci. 7(3), 2025, alg. 3.1; Pedregosa,
        "Hyperparameter Optimization with Approximate Gradient", ICML 2016; Barzilai and Borwein, 1988; Zhang and
        Hager, 2004.

    Example:
        >>> A = torch.tensor([[2.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
        >>> goal = A.new_tensor([1.0, -1.0])
        >>> lower = LowerProblem(lambda x, t: ((A @ x - t) ** 2).sum() / 2, mu=1.0, smoothness=4.0)
        >>> problem = BilevelProblem(lower, lambda x: ((x - goal) ** 2).sum() / 2, 1.0, convex_upper=True)
        >>> end = MAID(problem).run(torch.zeros_like(goal), torch.zeros_like(goal), max_steps=100)
        >>> end.status, end.upper < 1e-9  # theta is A goal, (2, -1)
        ('stationary', True)
    """

    def __init__(
        self,
        problem: BilevelProblem,
        *,
        solver: LowerSolver = fista,
        accuracy: Accuracy = "adaptive",
        eps0: float | None = None,
        delta0: float | None = None,
        alpha0: float | None = None,
        rho: float = 0.5,
        rho_bar: float = 10 / 9,
        nu: float | None = None,
        nu_bar: float | None = None,
        eta: float = 0.5,
        lam: float = 1e-4,
        kappa: float | None = 0.03,
        max_backtracks: int = 10,
        check_descent: bool = False,
        bb_init: bool = False,
        nonmonotone: bool = False,
        certify: bool = True,
        bounds: tuple[Tensor | float | None, Tensor | float | None] | None = None,
        tolerance: float = 1e-6,
        lower_maxiter: int = 20_000,
        cg_maxiter: int = 1000,
        allow_low_precision: bool = False,
    ) -> None:
        if problems := argument_problems(locals()):
            raise ValueError("; ".join(problems))
        if problem.lower.mu_estimated:
            warnings.warn("`mu` is an estimate: nothing is certified, and too large a value hides errors", stacklevel=2)
        self.problem, self.accuracy = problem, accuracy
        self.evaluation = Evaluation(problem, solver, certify, bounds, lower_maxiter)
        self.eps0, self.delta0, self.alpha0 = eps0, delta0, alpha0
        self.search = LineSearch(self.evaluation, rho, rho_bar, lam, bb_init, nonmonotone)
        self.eta, self.kappa, self.cg_maxiter = eta, kappa, cg_maxiter
        self.nu, self.nu_bar = 0.5 if nu is None else nu, 1.05 if nu_bar is None else nu_bar
        self.max_backtracks, self.check_descent, self.tolerance = max_backtracks, check_descent, tolerance
        self.allow_low_precision = allow_low_precision

    @property
    def certified(self) -> bool:
        """Whether accepted steps certainly lower the true loss: all constants that this needs are given."""
        return self.evaluation.certify and self.problem.certified and not self.search.nonmonotone

    def init(self, theta: Tensor, x: Tensor) -> MAIDState:
        r"""The first state.

        Args:
            theta: Where to begin.
            x: Where the first lower solve begins; shape ``(m, ...)`` where batched.

        Returns:
            The state.

        Raises:
            ValueError: If a tensor, the bounds or a loss is not what it must be; stochastic losses, for instance.
        """
        theta, x = theta.detach().clone(), x.detach().clone()
        if problems := start_problems(self.problem, theta, x, self.evaluation.bounds, self.allow_low_precision):
            raise ValueError("; ".join(problems))
        lower = self.problem.lower
        mu = lower.modulus(theta, lower.count(x))
        first, zero = (lower.norms(lower.gradient(point, theta)) for point in (x, torch.zeros_like(x)))
        # The rounding error of a gradient is that of its largest part, which may cancel at the very start.
        size = torch.maximum(first, zero)
        eps = (0.1 * (torch.where(first > 0, first, size) / mu)).max()
        upper = self.problem.upper_at(x).norms.square().mean()
        size, eps, upper = self.problem.reduce(torch.stack([size.max(), eps, upper])).tolist()
        return MAIDState(
            theta,
            x,
            error=first / mu,
            eps=self.eps0 or eps or 1e-3,
            delta=self.delta0 or 0.1 * upper**0.5 or 1e-3,
            alpha=self.alpha0,
            scale=size,
        )

    def run(
        self,
        theta: Tensor | MAIDState,
        x: Tensor | None = None,
        *,
        max_steps: int = 100,
        on_step: Callable[[MAIDState], object] | None = None,
    ) -> MAIDState:
        """Takes steps until the run ends.

        Args:
            theta: Where to begin, or a state to go on from.
            x: Where the first lower solve begins; not with a state.
            max_steps: Largest number of steps taken by this call.
            on_step: Called with the state after every step.

        Returns:
            The last state; ``status`` says why it ended, ``"running"`` where ``max_steps`` were taken.

        Raises:
            ValueError: If ``x`` is missing, or the start is not what it must be.
            RuntimeError: If the lower problem cannot be solved.
        """
        if isinstance(theta, Tensor) == (x is None):
            raise ValueError("give theta and x to begin, or a state alone to go on")
        state = self.init(theta, x) if isinstance(theta, Tensor) and x is not None else theta
        if not isinstance(state, MAIDState):
            raise ValueError(f"theta must be a tensor or a MAIDState, got {type(state).__name__}")
        for _ in range(max_steps):
            if state.status != "running":
                break
            state = self.step(state)
            if on_step is not None:
                on_step(state)
        return state

    def step(self, state: MAIDState) -> MAIDState:
        """One outer iteration: a hypergradient, and line searches until a step is accepted.

        Args:
            state: Where the run stands; it is not changed.

        Returns:
            The next state; the same one if the run has ended.

        Raises:
            RuntimeError: If the lower problem cannot be solved, or is not convex, or no trial is finite.
        """
        if state.status != "running":
            return state
        before, state = state, replace(state, step_size=0.0)
        budget = self.max_backtracks
        while True:
            state, found = self._inexact_gradient(state, before.x)
            if state.status != "running":
                return replace(state, iteration=state.iteration + 1)
            state, accepted = self.search(state, found.z, budget)
            if accepted or self.accuracy not in ("adaptive", "fixed"):
                break  # an accuracy that was laid down beforehand gets finer without a step, too
            if self.accuracy == "fixed" or self.evaluation.at_floor(state):
                return replace(state, status="accuracy_floor", iteration=state.iteration + 1)
            state = replace(state, eps=self.nu * state.eps, delta=self.nu * state.delta)
            budget += 1
        factor = tightening(self.accuracy, state.iteration, self.nu_bar)
        ended = not accepted and self.evaluation.at_floor(state)
        return replace(
            state,
            eps=state.eps * factor,
            delta=state.delta * factor,
            status="accuracy_floor" if ended else "running",
            iteration=state.iteration + 1,
        )

    def _inexact_gradient(self, state: MAIDState, other: Tensor) -> tuple[MAIDState, InexactHypergradient]:
        """A hypergradient; with ``check_descent`` one whose error is below its length.

        A short one is no proof of a stationary point while the lower solution is coarse: there the bound on its error
        is formed in any case.
        """
        while True:
            solution = self.evaluation.solve(state)
            found = inexact_hypergradient(
                self.problem, state.theta, solution.x, state.delta, state.q, kappa=self.kappa, maxiter=self.cg_maxiter
            )
            length = _norm(state.theta - self.evaluation.project(state.theta - found.z))
            short = length <= self.tolerance
            bounded = self.check_descent or short
            estimates = estimated_constants(
                self.problem, state.theta, solution.x, found, other, state.estimates, _CONSTANTS[: 3 if bounded else 1]
            )
            low, up, _ = self.evaluation.value_bounds(state.theta, solution, found.upper, estimates)
            state = replace(
                state,
                x=solution.x,
                q=found.q,
                error=solution.error,
                lower=low,
                upper=up,
                lower_iterations=state.lower_iterations + solution.iterations,
                cg_iterations=state.cg_iterations + found.iterations,
                gradient_norm=length,
                omega=None,
                estimates=estimates,
                reference=low if state.reference is None else state.reference,
            )
            if not bounded:
                return state, found
            omega = error_bound(self.problem, state.theta, solution.x, solution.error, found, estimates)
            state = replace(state, omega=omega)
            finest = self.accuracy != "adaptive" or self.evaluation.at_floor(state)
            if short and (omega <= self.tolerance or finest or self._in_a_corner(state, found.z)):
                return replace(state, status="stationary"), found
            if not short and omega <= (1 - self.eta) * _norm(found.z):
                return state, found
            if finest:
                return replace(state, status="accuracy_floor"), found
            state = replace(state, eps=self.nu * state.eps, delta=self.nu * state.delta)

    def _in_a_corner(self, state: MAIDState, z: Tensor) -> bool:
        """Whether bounds hold every coordinate back, and the errors would not change that.

        Only directions that are to be certified need the bound on their error for it; its constants may be huge where
        the modulus is small. Otherwise solutions to a hundredth of their length will do.
        """
        if self.evaluation.bounds is None or state.gradient_norm > 0:
            return False
        sure = bool((z.abs() > (state.omega or 0.0)).all())
        close = bool((state.error <= 1e-2 * self.problem.lower.norms(state.x)).all())
        return sure or (close and not self.check_descent)


def _norm(tensor: Tensor) -> float:
    return torch.linalg.vector_norm(tensor, dtype=torch.float64).item()
