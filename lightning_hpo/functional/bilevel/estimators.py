"""The estimators of hypergradients by name; each has its equation in its own file.

All have one signature, ``estimate(problem, params, hparams, state=None, **settings)``, and return a
:class:`~lightning_hpo.functional.bilevel.problem.HypergradientResult` whose ``state`` the next call may be given.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from torch import Tensor

from lightning_hpo.functional.bilevel.darts_fd import darts_fd
from lightning_hpo.functional.bilevel.evolution import es, pes
from lightning_hpo.functional.bilevel.forward_mode import forward
from lightning_hpo.functional.bilevel.ift import (
    ift_bicgstab,
    ift_cg,
    ift_exact,
    ift_gmres,
    ift_neumann,
    ift_normal_cg,
)
from lightning_hpo.functional.bilevel.problem import HypergradientResult, Problem
from lightning_hpo.functional.bilevel.sama import sama
from lightning_hpo.functional.bilevel.t1t2 import t1t2
from lightning_hpo.functional.bilevel.unrolled import truncated, unrolled

__all__ = ["ESTIMATORS", "Estimator", "HypergradientResult", "Problem"]


@dataclass(frozen=True)
class Estimator:
    """An estimator, and what a training loop must know to call it.

    Args:
        estimate: ``(problem, params, hparams, state=None, **settings)``; nothing that it is given is changed, ``.grad``
            included.
        follows_steps: Whether it takes the optimizer's steps, from ``params`` and ``states`` before a step on. Learning
            rate and momentum have a slope for such estimators alone, since they do not change where training ends.
        needs_slope: Whether it wants the slope of the optimizer's step in the gradient, as ``slope``.
        has_product: Whether its second derivatives may be differences, by ``product="fd"``.
        iterative: Whether it solves by iterations that may stop short, which ``strict`` is about.
        cheap: Settings of a few passes, for use while training runs.

    Example:
        >>> ESTIMATORS["unrolled"].follows_steps, ESTIMATORS["ift_cg"].follows_steps
        (True, False)
    """

    estimate: Callable[..., HypergradientResult]
    follows_steps: bool = False
    needs_slope: bool = False
    has_product: bool = False
    iterative: bool = False
    cheap: Mapping[str, Any] = field(default_factory=dict)

    def __call__(
        self,
        problem: Problem,
        params: Mapping[str, Tensor],
        hparams: Mapping[str, Tensor],
        state: Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> HypergradientResult:
        """The estimate."""
        return self.estimate(problem, params, hparams, state, **settings)


# A solve cut short goes along the large curvatures alone. Begun where the last one ended it would reach the small and
# the negative ones, too, which are noise: the hypergradient of a network then grows without end.
_FEW_STEPS = {"maxiter": 5, "tol": 0.0, "warm_start": False}

ESTIMATORS: Mapping[str, Estimator] = MappingProxyType(
    {
        "ift_cg": Estimator(ift_cg, has_product=True, iterative=True, cheap=_FEW_STEPS),
        "ift_normal_cg": Estimator(ift_normal_cg, has_product=True, iterative=True),
        "ift_gmres": Estimator(ift_gmres, has_product=True, iterative=True),
        "ift_bicgstab": Estimator(ift_bicgstab, has_product=True, iterative=True),
        "ift_neumann": Estimator(ift_neumann, has_product=True, iterative=True),
        "ift_exact": Estimator(ift_exact, has_product=True),
        "t1t2": Estimator(t1t2, has_product=True),
        "darts_fd": Estimator(darts_fd),
        "sama": Estimator(sama, needs_slope=True),
        "unrolled": Estimator(unrolled, follows_steps=True, has_product=True, cheap={"steps": 1}),
        "truncated": Estimator(truncated, follows_steps=True, has_product=True),
        "forward": Estimator(forward, follows_steps=True),
        "es": Estimator(es, follows_steps=True),
        "pes": Estimator(pes, follows_steps=True),
    }
)
