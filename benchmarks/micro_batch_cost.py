"""What comparing micro-batches adds to an optimizer step over four of them, in many pairs of steps.

It is so little that a table of medians would not show it: a step alone and one with all that the estimator does (hooks,
and the reading at the end) are taken one after the other in changing order. `cost` is the median ratio of the two with
its 95 % confidence interval `low` to `high`, and the quartiles of single rounds; `inside` is the time spent in the
estimator's own code over the rest of the same step.
"""

from collections.abc import Sequence

import torch
from batch_windows import paired_cost
from common import conclude, console, parse, show
from gradient_statistics import MODELS, SLOWER, setting


def main(arguments: Sequence[str] | None = None) -> None:
    batch = ("--batch", {"type": int, "nargs": "+", "default": [64, 256]})
    models = ("--models", {"nargs": "+", "default": list(MODELS), "choices": list(MODELS)})
    rounds = ("--rounds", {"type": int, "default": 200, "help": "fewer for the ViT and the transformer"})
    chosen = parse(__doc__, arguments, batch, models, rounds)
    torch.manual_seed(0)
    rows = []
    for name in chosen.models[:1] if chosen.quick else chosen.models:
        for size in [8] if chosen.quick else chosen.batch:
            turns = 4 if chosen.quick else max(8, chosen.rounds // SLOWER.get(name, 1) ** 3)
            rows.append({"model": name, "micro_batch": size, **paired_cost(*setting(name, size), turns)})
            console.print(rows[-1])
    figures = dict.fromkeys(("cost", "low", "high", "quartile_1", "quartile_3", "inside"), ".4f")
    show("micro_batch", rows, {"model": "", "micro_batch": "d", "rounds": "d"} | figures)
    conclude(__file__, chosen, rows)


if __name__ == "__main__":
    main()
