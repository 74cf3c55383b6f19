"""Is a weight decay for each layer, learned in one run, as good as the best shared one of a grid?

A network of three layers on 300 digits, SGD with momentum, whole batches. Decay is learned from 1e-6 by
`Hypergradient(tune=("weight_decay",))` with the estimator that is named and all else as it comes; the grid has 11
shared values, and its best is chosen by the same validation loss as steers the learning. Short runs end while the
weights still answer to their decay; long ones end near a solution, which is where implicit differentiation looks. Time
is CPU time, in units of a run without tuning.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from batch_runs import be_quiet
from common import conclude, parse, show, write
from hypergradient_plots import draw_decay
from hypergradient_runs import decay_run

from lightning_hpo import Hypergradient

ASSETS = Path(__file__).parents[1] / "docs" / "assets"
LOW = 1e-6  # where a learned decay begins
METHODS: dict[str, dict[str, Any]] = {
    "default settings": {},
    "ift_cg(5)": {"estimator_args": {"maxiter": 5}},
    "ift_cg(10)": {"estimator_args": {"maxiter": 10}},
    "ift_neumann(10), every 5": {
        "estimator": "ift_neumann",
        "estimator_args": {"steps": 10, "alpha": 0.1},
        "every_n_steps": 5,
    },
    "darts_fd": {"estimator": "darts_fd"},
    "unrolled(1)": {"estimator": "unrolled", "estimator_args": {"steps": 1}},
}


def runs(seeds: int, steps: int) -> Iterator[dict[str, Any]]:
    """No decay, the grid, and decays that are learned."""
    for seed in range(seeds):
        yield decay_run("none", 0.0, seed, steps)
        for power in torch.linspace(-6, -1, 11).tolist():
            yield decay_run(f"shared, 1e{power:g}", 10**power, seed, steps)
        for name, arguments in METHODS.items():
            yield decay_run(name, LOW, seed, steps, Hypergradient(tune=("weight_decay",), **arguments))


def means(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over the seeds of one length; the best of the grid is chosen with each seed."""
    seeds = sorted({row["seed"] for row in rows})
    grids = {seed: [r for r in rows if r["seed"] == seed and r["method"].startswith("shared")] for seed in seeds}
    plain = {seed: sum(row["cpu_s"] for row in grid) / len(grid) for seed, grid in grids.items()}
    best = [min(grid, key=lambda row: row["val_loss"]) | {"method": "best of the grid"} for grid in grids.values()]
    for row in best:
        row["cpu_s"] = sum(r["cpu_s"] for r in grids[row["seed"]])
    table = []
    for method in ["none", "best of the grid", *METHODS]:
        same = [row for row in [*rows, *best] if row["method"] == method]
        mean: dict[str, Any] = {"steps": same[0]["steps"], "method": method}
        mean |= {key: round(sum(r[key] for r in same) / len(same), 4) for key in ("val_loss", "test_accuracy")}
        mean["plain_runs"] = round(sum(row["cpu_s"] / plain[row["seed"]] for row in same) / len(same), 2)
        differences = [r["val_loss"] - b["val_loss"] for r in same for b in best if b["seed"] == r["seed"]]
        learned = method in METHODS
        mean["to_the_grid"] = " ".join(f"{difference:+.4f}" for difference in differences) if learned else None
        mean["at_or_below"] = f"{sum(d <= 0 for d in differences)} of {len(seeds)}" if learned else None
        table.append(mean | {"decay": same[0]["decay"]})
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    seeds = ("--seeds", {"type": int, "default": 3, "help": "3 by default"})
    steps = ("--steps", {"type": int, "nargs": "+", "default": [3000, 12000], "help": "3000 and 12000 by default"})
    assets = ("--assets", {"type": Path, "help": "folder of the picture; docs/assets by default, none with --quick"})
    chosen = parse(__doc__, arguments, seeds, steps, assets)
    be_quiet()
    rows: list[dict[str, Any]] = []
    table: list[dict[str, Any]] = []
    for length in [20] if chosen.quick else chosen.steps:
        rows += runs(1 if chosen.quick else chosen.seeds, length)
        table += means([row for row in rows if row["steps"] == length])
        write(__file__, chosen, table, runs=rows)
    if folder := chosen.assets or (None if chosen.quick else ASSETS):
        longest = max(row["steps"] for row in rows)
        draw_decay(folder / "implicit_differentiation_decay.png", [row for row in rows if row["steps"] == longest])
    columns = {"steps": "d", "method": "", "val_loss": ".4f", "test_accuracy": ".2f", "plain_runs": ".2f"}
    show("Decay for each layer", table, columns | {"to_the_grid": "", "at_or_below": "", "decay": ""})
    conclude(__file__, chosen, table, runs=rows)


if __name__ == "__main__":
    main()
