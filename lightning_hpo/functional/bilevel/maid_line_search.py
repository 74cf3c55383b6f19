"""MAID's search for a step that certainly lowers the outer loss."""

import math
from dataclasses import replace

import torch
from torch import Tensor

from lightning_hpo.functional.bilevel.lower_problem import LowerSolution
from lightning_hpo.functional.bilevel.maid_bounds import decrease_gap
from lightning_hpo.functional.bilevel.maid_evaluation import Evaluation
from lightning_hpo.functional.bilevel.maid_state import MAIDState

__all__ = ["LineSearch"]

_REFERENCE = 0.85  # weight of the past in the non-monotone reference
_STEPS = (1e-12, 1e12)  # of Barzilai and Borwein


class LineSearch:
    r"""Backtracks from the last step that was taken, or from Barzilai and Borwein's, until the decrease is certain.

    Args:
        evaluation: Solves trial points and bounds f there.
        rho: Factor of a step that is not accepted.
        rho_bar: Growth of the step after success.
        lam: The fraction of the slope that a step must gain.
        bb_init: Whether it begins at Barzilai and Borwein's step.
        nonmonotone: Whether the decrease may be measured from Zhang and Hager's average of past values as well.

    References:
        Salehi et al., SIAM J. Math. Data Sci. 7(3), 2025, alg. 3.1; Barzilai and Borwein, 1988; Zhang and Hager, 2004.

    Example:
        >>> from lightning_hpo.functional.bilevel.lower_problem import LowerProblem
        >>> from lightning_hpo.functional.bilevel.lower_solvers import fista
        >>> from lightning_hpo.functional.bilevel.maid_problem import BilevelProblem
        >>> lower = LowerProblem(lambda x, t: ((x - t) ** 2).sum(), mu=2.0, smoothness=2.0)
        >>> search = LineSearch(Evaluation(BilevelProblem(lower, lambda x: (x**2).sum(), 2.0), fista), 0.5, 2.0, 1e-4)
        >>> state = MAIDState(torch.tensor(3.0), torch.tensor([3.0]), error=torch.zeros(1), eps=0.1, delta=0.1,
        ...                   lower=9.0, alpha=1.0)
        >>> state, accepted = search(state, torch.tensor(6.0), budget=5)  # 3 - 6 is as high as 3, 3 - 6 / 2 the minimum
        >>> accepted, state.theta, state.trials, state.alpha
        (True, tensor(0.), 2, 1.0)
    """

    def __init__(
        self,
        evaluation: Evaluation,
        rho: float,
        rho_bar: float,
        lam: float,
        bb_init: bool = False,
        nonmonotone: bool = False,
    ) -> None:
        self.evaluation, self.rho, self.rho_bar, self.lam = evaluation, rho, rho_bar, lam
        self.bb_init, self.nonmonotone = bb_init, nonmonotone

    def __call__(self, state: MAIDState, z: Tensor, budget: int) -> tuple[MAIDState, bool]:
        """The first of ``budget`` shrinking steps that is accepted, if one is.

        Args:
            state: Where the run stands.
            z: The hypergradient there.
            budget: Largest number of trials.

        Returns:
            The state after the step, or the same with a failure more; whether a step was accepted.

        Raises:
            RuntimeError: If no trial could be solved.
        """
        alpha, broken = self._first_step(state, z), 0
        state, eps = replace(state, alpha=alpha), self.evaluation.accuracy(state)
        for _ in range(budget):
            theta = self.evaluation.project(state.theta - alpha * z)
            decrease = self.lam * (z.double() * (state.theta - theta).double()).sum().item()
            solution, low, up = self.evaluation.trial(theta, state, eps)
            taken = 0 if solution is None else solution.iterations
            state = replace(state, trials=state.trials + 1, lower_iterations=state.lower_iterations + taken)
            broken += not math.isfinite(up)
            if solution is not None and self._accepts(state, up, decrease):
                return self._accepted(state, z, theta, solution, low, up, alpha), True
            alpha *= self.rho
        if broken == budget:
            raise RuntimeError(
                f"none of {budget} trials from step {state.alpha:.1e} on could be solved: their losses are not finite, "
                "or need more than lower_maxiter iterations; lower alpha0, or give bounds"
            )
        return replace(state, failures=state.failures + 1), False

    def _accepts(self, state: MAIDState, up: float, decrease: float) -> bool:
        if decrease_gap(up, state.lower, decrease) <= 0:
            return True
        return self.nonmonotone and decrease_gap(up, state.reference or 0.0, decrease) <= 0

    def _accepted(
        self, state: MAIDState, z: Tensor, theta: Tensor, solution: LowerSolution, low: float, up: float, alpha: float
    ) -> MAIDState:
        weight = _REFERENCE * state.reference_weight + 1
        past = _REFERENCE * state.reference_weight * (low if state.reference is None else state.reference)
        return replace(
            state,
            theta=theta,
            x=solution.x,
            error=solution.error,
            lower=low,
            upper=up,
            alpha=self.rho_bar * alpha,
            step_size=alpha,
            previous=(state.theta, z),
            reference=(past + low) / weight,
            reference_weight=weight,
        )

    def _first_step(self, state: MAIDState, z: Tensor) -> float:
        if self.bb_init and state.previous is not None:
            s, y = (state.theta - state.previous[0]).double(), (z - state.previous[1]).double()
            product = (s * y).sum().item()
            if product > 0:
                return min(max((s * s).sum().item() / product, _STEPS[0]), _STEPS[1])
        return max(_norm(state.theta), 1.0) / _norm(z) if state.alpha is None else state.alpha


def _norm(tensor: Tensor) -> float:
    return torch.linalg.vector_norm(tensor, dtype=torch.float64).item()
