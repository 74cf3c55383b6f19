"""How much of MAID's time is spent outside of lower solves, hypergradients and the upper loss?

The rest are the bounds of every trial, the line search's arithmetic and a state of its own for every step. `rows`: CPU
seconds of a run, those within lower solves, within hypergradients, and within the upper loss and its gradient at trial
points, and the share of the rest. Problems of a few unknowns, of which a gradient takes microseconds, are the worst
case.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any, ClassVar
from unittest.mock import patch

import torch
from common import conclude, parse, show
from maid_problems import breast_cancer, digits, quadratic

from lightning_hpo.demos.denoising_data import PhotoDenoisingDataModule
from lightning_hpo.functional.bilevel import maid as engine
from lightning_hpo.functional.bilevel.denoising import FieldOfExperts, Regularizer, TotalVariation, denoising_problem
from lightning_hpo.functional.bilevel.lower_solvers import fista, lbfgs
from lightning_hpo.functional.bilevel.maid import MAID, BilevelProblem
from lightning_hpo.functional.bilevel.maid_hypergradient import inexact_hypergradient


class Stopwatch:
    """Seconds within the functions that it wraps, where no other one is running."""

    running: ClassVar[bool] = False

    def __init__(self) -> None:
        self.seconds = 0.0

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, on the clock."""

        def run(*args: Any, **kwargs: Any) -> Any:
            if Stopwatch.running:
                return function(*args, **kwargs)
            Stopwatch.running, began = True, time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                Stopwatch.running = False
                self.seconds += time.process_time() - began

        return run


def row(name: str, problem: BilevelProblem, theta: torch.Tensor, x: torch.Tensor, steps: int, **settings: Any) -> Any:
    """One run."""
    solves, slopes, uppers = Stopwatch(), Stopwatch(), Stopwatch()
    solver = settings.pop("solver", fista)
    maid = MAID(problem, solver=solves.timed(solver), **settings)
    with (
        patch.object(engine, "inexact_hypergradient", slopes.timed(inexact_hypergradient)),
        patch.object(BilevelProblem, "upper_at", uppers.timed(BilevelProblem.upper_at)),
    ):
        began = time.process_time()
        end = maid.run(theta, x, max_steps=steps)
        whole = time.process_time() - began
    rest = whole - solves.seconds - slopes.seconds - uppers.seconds
    return {
        "problem": name,
        "solver": solver.__name__,
        "unknowns": x.numel(),
        "steps": end.iteration,
        "cpu_s": whole,
        "solves_s": solves.seconds,
        "hypergradients_s": slopes.seconds,
        "upper_s": uppers.seconds,
        "rest_percent": 100 * rest / whole,
    }


def denoising(regularizer: Regularizer, size: int) -> tuple[BilevelProblem, torch.Tensor]:
    """Crops of a photograph, and where x begins."""
    data = PhotoDenoisingDataModule(size=size)
    data.setup()
    noisy, clean = next(iter(data.train_dataloader()))
    return denoising_problem(noisy, clean, regularizer), noisy


def main(arguments: Sequence[str] | None = None) -> None:
    chosen = parse(__doc__, arguments)
    steps, size = (2, 32) if chosen.quick else (20, 64)
    few, many, one = quadratic(), digits(), breast_cancer(0.0)
    experts, start = FieldOfExperts(8, 3), torch.full((2,), -5.0).double()
    (variation, noisy), (learned, _) = denoising(TotalVariation(), size), denoising(experts, size)
    rows = [
        row("quadratic", few.problem, few.theta, few.x, steps, alpha0=0.01),
        row("breast cancer, one weight", one.problem, one.theta, one.x, steps, bounds=(-12.0, 6.0)),
        row("digits, 640 weights", many.problem, many.theta, many.x, steps, alpha0=1.0),
        row("digits, 640 weights", many.problem, many.theta, many.x, steps, alpha0=1.0, solver=lbfgs),
        row("total variation", variation, start, noisy, steps, solver=lbfgs),
        row("8 experts", learned, experts.start(dtype=start.dtype), noisy, steps // 2, solver=lbfgs, alpha0=1.0),
    ]
    shown = {"problem": "", "solver": "", "unknowns": "d", "steps": "d"}
    shown |= dict.fromkeys(("cpu_s", "solves_s", "hypergradients_s", "upper_s", "rest_percent"), ".2f")
    show("Time outside of solves, hypergradients and the upper loss", rows, shown)
    conclude(__file__, chosen, rows)


if __name__ == "__main__":
    main()
