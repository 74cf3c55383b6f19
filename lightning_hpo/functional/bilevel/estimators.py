"""The estimators of hypergradients by name; each has its equation in its own file.

All have one signature, ``estimate(problem, params, hparams, state=None, **settings)``, and return a
:class:`~lightning_hpo.functional.bilevel.problem.HypergradientResult` whose ``state`` the next call may be given.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType

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


# (problem, params, hparams, state=None, **settings); nothing that it is given is changed, `.grad` included.
Estimator = Callable[..., HypergradientResult]

ESTIMATORS: Mapping[str, Estimator] = MappingProxyType(
    {
        "ift_cg": ift_cg,
        "ift_normal_cg": ift_normal_cg,
        "ift_gmres": ift_gmres,
        "ift_bicgstab": ift_bicgstab,
        "ift_neumann": ift_neumann,
        "ift_exact": ift_exact,
        "t1t2": t1t2,
        "darts_fd": darts_fd,
        "sama": sama,
        "unrolled": unrolled,
        "truncated": truncated,
        "forward": forward,
        "es": es,
        "pes": pes,
    }
)
