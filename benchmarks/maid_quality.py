"""Does MAID need no tuning, and what does a certified step cost?

1. `rows`: handwritten digits, one l2 weight for each of 640 coefficients, 60 outer steps from coarse and fine
   first accuracies, beside fixed accuracies and HOAG's geometric sequence in the same loop. Work is gradients of the
   lower loss and iterations of conjugate gradients; `work_to_0.131` is what it took to that validation loss.
2. `shared`: the best of six shared l2 weights on the same split, each solved exactly.
3. `quadratic`: the paper's quadratic, 200 outer steps; its least value is 0.0495.
4. `breast_cancer`: one shared l2 weight from three starts that lie far apart.
5. `conditions`: work until 0.5 % above the least value on quadratics whose lower problems get worse, against a fixed
   accuracy of 1e-4.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from common import conclude, parse, show
from maid_plots import draw
from maid_problems import Task, breast_cancer, conditioned, digits, quadratic

from lightning_hpo.functional.bilevel.lower_solvers import lbfgs
from lightning_hpo.functional.bilevel.maid import MAID, MAIDState

ASSETS = Path(__file__).parents[1] / "docs" / "assets"
TARGET = 0.131
ACCELERATED = {"bb_init": True, "nonmonotone": True, "check_descent": True}


def both(accuracy: float) -> dict[str, Any]:
    return {"eps0": accuracy, "delta0": accuracy}


def run(
    task: Task, steps: int, enough: Callable[[dict[str, float]], bool] | None = None, **settings: Any
) -> tuple[dict[str, Any], list[dict[str, float]]]:
    """The figures at the end, and those of every step; ends early where it is enough."""
    maid, course = MAID(task.problem, **settings), []
    began = time.process_time()
    state = maid.init(task.theta, task.x)

    def keep(state: MAIDState) -> None:
        course.append(
            {"work": state.work, "eps": state.eps, "delta": state.delta, "upper": state.upper, "lower": state.lower}
            | task.figures(state.theta, state.x)
        )

    for _ in range(steps):
        state = maid.run(state, max_steps=1, on_step=keep)
        if state.status != "running" or (enough and enough(course[-1])):
            break
    end = task.figures(state.theta, state.x) | {
        "steps": state.iteration,
        "lower_its": state.lower_iterations,
        "cg_its": state.cg_iterations,
        "trials": state.trials,
        "status": state.status,
        "cpu_s": round(time.process_time() - began, 1),
    }
    return end, course


def _below(target: float, name: str = "val_loss") -> Callable[[dict[str, float]], bool]:
    return lambda at: at[name] <= target


def digits_rows(quick: bool) -> tuple[list[dict[str, Any]], dict[str, list[dict[str, float]]]]:
    task, steps = digits(), 2 if quick else 60
    settings: dict[str, dict[str, Any]] = {
        "MAID, eps0 1e-1": both(1e-1),
        "MAID, eps0 1e-3": both(1e-3),
        "MAID, eps0 1e-1, no cap on the residual": both(1e-1) | {"kappa": None},
        "fixed 1e-5": both(1e-5) | {"accuracy": "fixed"},
        "fixed 1e-1": both(1e-1) | {"accuracy": "fixed"},
        "HOAG, geometric from 1e-1": both(1e-1) | {"accuracy": "geometric"},
        "HOAG, values believed": both(1e-1) | {"accuracy": "geometric", "certify": False},
    }
    rows, courses = [], {}
    for name, chosen in settings.items():
        hoag = "HOAG" in name  # its accuracy does not let it move at first
        end, course = run(task, steps * (3 if hoag else 1), _below(TARGET if hoag else 0.0), alpha0=1.0, **chosen)
        there = next((at["work"] for at in course if at["val_loss"] <= TARGET), None)
        rows.append({"setting": name, **end, "work_to_0.131": there})
        courses[name] = course
    base = next(row for row in rows if row["setting"] == "fixed 1e-5")["work_to_0.131"]
    for row in rows:
        row["of_fixed"] = row["work_to_0.131"] / base if row["work_to_0.131"] and base else None
    return rows, courses


def shared_rows(quick: bool) -> list[dict[str, Any]]:
    task, rows = digits(), []
    w = task.x
    for log in (-3.0, -5.0, -7.0, -9.0, -11.0, -13.0)[: 1 if quick else None]:
        w = lbfgs(task.problem.lower, torch.full_like(task.theta, log), w, 1e-2, maxiter=5000).x
        rows.append({"log_l2": log, **task.figures(task.theta, w)})
    return rows


def quadratic_rows(quick: bool) -> tuple[list[dict[str, Any]], list[dict[str, float]]]:
    """The table, and the course of its first row."""
    task, rows, courses = quadratic(), [], []
    common: dict[str, Any] = {"alpha0": 0.01}
    settings: dict[str, dict[str, Any]] = {
        "MAID, nu_bar 1.25": {"nu_bar": 1.25},
        "MAID, nu_bar 1.05": {},
        "MAID, nu 0.25, nu_bar 1.1": {"nu": 0.25, "nu_bar": 1.1},
        "directions certified": {"check_descent": True},
        "accelerated": ACCELERATED,
        "fixed": {"accuracy": "fixed"},
    }
    for name, chosen in settings.items():
        for accuracy in (1e-1, 1e-3, 1e-5):
            end, course = run(task, 3 if quick else 200, **common, **both(accuracy), **chosen)
            courses.append(course)
            rows.append({"setting": name, "eps0": accuracy, **end})
    return rows, courses[0]


def breast_rows(quick: bool) -> list[dict[str, Any]]:
    rows = []
    for start in (-10.0, 0.0, 2.0):
        task = breast_cancer(start)
        end, _ = run(task, 3 if quick else 60, bounds=(-12.0, 6.0), lower_maxiter=100_000)
        rows.append({"start": start, **end})
    return rows


def condition_rows(quick: bool) -> list[dict[str, Any]]:
    rows = []
    settings: dict[str, dict[str, Any]] = {
        "maid": {},
        "accelerated": {"bb_init": True, "nonmonotone": True},
        "fixed": both(1e-4) | {"accuracy": "fixed"},
    }
    for condition in (2, 5, 10, 20, 30)[: 2 if quick else None]:
        task, least = conditioned(condition)
        row: dict[str, Any] = {"condition": condition}
        for name, chosen in settings.items():
            end, course = run(task, 400, _below(1.005 * least, "f"), **chosen)
            row |= {name: int(course[-1]["work"]), f"{name}_steps": end["steps"]}
        rows.append(
            row
            | {"maid_of_fixed": row["maid"] / row["fixed"], "accelerated_of_fixed": row["accelerated"] / row["fixed"]}
        )
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    assets = ("--assets", {"type": Path, "help": "folder of the picture; docs/assets by default, none with --quick"})
    chosen = parse(__doc__, arguments, assets)
    table, quadratic_course = quadratic_rows(chosen.quick)
    facts = {
        "conditions": condition_rows(chosen.quick),
        "quadratic": table,
        "breast_cancer": breast_rows(chosen.quick),
        "shared": shared_rows(chosen.quick),
    }
    rows, courses = digits_rows(chosen.quick)
    counts = {"lower_its": "d", "cg_its": "d", "trials": "d", "status": "", "cpu_s": ".1f"}
    losses = {"val_loss": ".4f", "test_loss": ".4f", "test_accuracy": ".1f"}
    show("Digits, 640 weights", rows, {"setting": "", **losses, **counts, "work_to_0.131": "d", "of_fixed": ".3f"})
    show("Digits, one weight for all", facts["shared"], {"log_l2": "g", **losses})
    show("Quadratic", facts["quadratic"], {"setting": "", "eps0": "g", "f": ".4f", **counts})
    show(
        "Breast cancer",
        facts["breast_cancer"],
        {"start": "g", "val_loss": ".5f", "theta": ".3f", "steps": "d", **counts},
    )
    show("Condition numbers", facts["conditions"], dict.fromkeys(facts["conditions"][0], "g"))
    if folder := chosen.assets or (None if chosen.quick else ASSETS):
        draw(folder / "maid_quality.png", courses, quadratic_course)
    conclude(__file__, chosen, rows, **facts)


if __name__ == "__main__":
    main()
