"""What comparing micro-batches adds to an optimizer step over four of them, in many pairs of steps.

It is so little that a table of medians would not show it: a step alone and one with all that the estimator does (hooks,
and the reading at the end) are taken one after the other in changing order, in several processes, since where memory
happens to lie makes more difference between processes than anything does between rounds. `cost` is the mean over
processes of the median ratio of the two, `low` to `high` two standard errors to either side, `least` and `most` are
those of single processes; `inside` is the time spent in the estimator's own code over the rest of the same step.
"""

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch
from batch_windows import paired_cost, pooled
from common import conclude, console, parse, show
from gradient_statistics import MODELS, SLOWER, setting


def measured(name: str, size: int, rounds: int, threads: int) -> dict[str, float]:
    """The figures of one process."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    return paired_cost(*setting(name, size), rounds)


def main(arguments: Sequence[str] | None = None) -> None:
    batch = ("--batch", {"type": int, "nargs": "+", "default": [64, 256]})
    models = ("--models", {"nargs": "+", "default": list(MODELS), "choices": list(MODELS)})
    rounds = (
        "--rounds",
        {"type": int, "default": 60, "help": "in each process; fewer for the slow models"},
    )
    processes = ("--processes", {"type": int, "default": 12})
    chosen = parse(__doc__, arguments, batch, models, rounds, processes)
    rows = []
    for name in chosen.models[:2] if chosen.quick else chosen.models:
        for size in [4, 8] if chosen.quick else chosen.batch:
            turns = 4 if chosen.quick else max(8, chosen.rounds // SLOWER.get(name, 1) ** 3)
            work = [(name, size, turns, torch.get_num_threads())] * (1 if chosen.quick else chosen.processes)
            with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as pool:
                found = list(pool.map(measured, *zip(*work, strict=True)))
            rows.append({"model": name, "micro_batch": size, "rounds": turns, **pooled(found)})
            console.print(rows[-1])
    figures = dict.fromkeys(("cost", "low", "high", "least", "most", "inside"), ".4f")
    show("micro_batch", rows, {"model": "", "micro_batch": "d", "processes": "d", "rounds": "d"} | figures)
    conclude(__file__, chosen, rows)


if __name__ == "__main__":
    main()
