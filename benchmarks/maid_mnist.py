"""MAID's largest experiment: a log l2 weight for each of the 1440 coefficients of a linear classifier of MNIST.

Images are shrunk to 12 by 12. The lower problem is multinomial regression on the first training images, the upper loss
that of the 10,000 test images, as in the paper; the last 10,000 training images, which neither sees, judge the outcome
(`test_loss`). All settings begin at -3 with the same first step. They end after `--steps` outer steps, after
`--seconds` of CPU time, or at the last of the validation losses to reach.

1. `rows`: MAID from coarse and fine first accuracies, a fixed accuracy, HOAG's geometric sequence, and MAID with L-BFGS
   for the lower problems. Work is gradients of the lower loss and iterations of conjugate gradients, `to_...` what it
   took to a validation loss.
2. `shared`: shared l2 weights, each solved exactly.
3. `refined`: MAID with L-BFGS from the best of these on, at most 20 steps.

    LIGHTNING_HPO_DATA=<folder with MNIST/raw> python benchmarks/maid_mnist.py --threads 1

Figures are written as they come. `--quick` takes scikit-learn's digits instead, and needs no files.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from common import conclude, console, parse, show, write
from maid_plots import draw_work
from maid_problems import Task, mnist, mnist_images
from maid_quality import both, run

from lightning_hpo.functional.bilevel.lower_solvers import lbfgs

ASSETS = Path(__file__).parents[1] / "docs" / "assets"
TARGETS = (0.7, 0.55, 0.45)
FIRST_STEP = 400.0  # with that of MAID, by which theta moves by its own length, two trials take 20,000 iterations each
SETTINGS: dict[str, dict[str, Any]] = {
    "MAID, eps0 1e-1": both(1e-1),
    "MAID, eps0 1e-3": both(1e-3),
    "fixed 1e-5": both(1e-5) | {"accuracy": "fixed"},
    "HOAG, geometric from 1e-1": both(1e-1) | {"accuracy": "geometric"},
    "HOAG, values believed": both(1e-1) | {"accuracy": "geometric", "certify": False},
    "MAID, eps0 1e-1, L-BFGS": both(1e-1) | {"solver": lbfgs},
}


def mnist_rows(task: Task, chosen: Any, save: Callable[..., object]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """A row a setting, and the courses behind them."""
    rows: list[dict[str, Any]] = []
    courses: dict[str, Any] = {}
    for name, settings in SETTINGS.items():
        began = time.process_time()

        def enough(at: dict[str, float], began: float = began) -> bool:
            return at["val_loss"] <= TARGETS[-1] or time.process_time() - began > chosen.seconds

        row, course = run(task, chosen.steps, enough, alpha0=FIRST_STEP, **settings)
        for target in TARGETS:
            row[f"to_{target}"] = next((at["work"] for at in course if at["val_loss"] <= target), None)
        rows.append({"setting": name, **row})
        courses[name] = course
        save(rows)
    return rows, courses


def shared_rows(task: Task, quick: bool) -> list[dict[str, Any]]:
    """One weight for all, from large to small."""
    w, rows = task.x, []
    for log in (-3.0, -5.0, -7.0, -9.0, -10.0, -11.0, -12.0, -13.0)[: 1 if quick else None]:
        began = time.process_time()
        found = lbfgs(task.problem.lower, torch.full_like(task.theta, log), w, 1e-2, maxiter=5000)
        w, spent = found.x, time.process_time() - began
        figures = task.figures(torch.tensor(log), w)
        rows.append({"log_l2": log, **figures, "lower_its": found.iterations, "cpu_s": round(spent, 1)})
    return rows


def refined_rows(task: Task, shared: Sequence[dict[str, Any]], chosen: Any) -> list[dict[str, Any]]:
    """Where the 1440 weights get that begin at the best shared one, every five steps."""
    best, began = min(shared, key=lambda row: row["val_loss"]), time.process_time()
    start = task._replace(theta=torch.full_like(task.theta, best["log_l2"]))
    settings = SETTINGS["MAID, eps0 1e-1, L-BFGS"]
    row, course = run(
        start,
        min(chosen.steps, 20),
        lambda _: time.process_time() - began > chosen.seconds,
        alpha0=FIRST_STEP,
        **settings,
    )
    picked = [step for step in (1, 5, 10, 15, 20) if step < len(course)] + [len(course)]
    names = ("val_loss", "test_loss", "test_accuracy", "least", "work")
    rows = [{"steps": step, **{name: course[step - 1][name] for name in names}} for step in picked]
    rows[-1]["cpu_s"] = row["cpu_s"]
    return [{"steps": 0, **{name: best.get(name) for name in names}}, *rows]


def main(arguments: Sequence[str] | None = None) -> None:
    chosen = parse(
        __doc__,
        arguments,
        ("--assets", {"type": Path, "help": "folder of the picture; docs/assets by default, none with --quick"}),
        ("--lower", {"type": int, "default": 20_000, "help": "training images of the lower problem, at most 50,000"}),
        ("--steps", {"type": int, "default": 60, "help": "largest number of outer steps"}),
        ("--seconds", {"type": float, "default": 500, "help": "of CPU time after which a setting takes no more steps"}),
    )
    if chosen.quick:
        chosen.lower, chosen.steps = 900, 2
    try:
        task = mnist(*mnist_images(chosen.quick), chosen.lower)
    except FileNotFoundError as error:
        console.print(f"MNIST left out, and there is nothing else: {error}")
        return
    facts = {"shared": shared_rows(task, chosen.quick)}
    facts["refined"] = refined_rows(task, facts["shared"], chosen)
    rows, courses = mnist_rows(task, chosen, lambda rows: write(__file__, chosen, rows, **facts))
    losses = {"val_loss": ".4f", "test_loss": ".4f", "test_accuracy": ".1f"}
    counts = {"steps": "d", "lower_its": "d", "cg_its": "d", "trials": "d", "status": "", "cpu_s": ".1f"}
    show("1440 weights", rows, {"setting": "", **losses, **counts, **{f"to_{target}": "d" for target in TARGETS}})
    show("One weight for all", facts["shared"], {"log_l2": "g", **losses, "lower_its": "d", "cpu_s": ".1f"})
    show("1440 weights from there", facts["refined"], {"steps": "d", **losses, "least": ".2f", "work": "d"})
    if folder := chosen.assets or (None if chosen.quick else ASSETS):
        draw_work(folder / "maid_mnist.png", courses)
    conclude(__file__, chosen, rows, **facts)


if __name__ == "__main__":
    main()
