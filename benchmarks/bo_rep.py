"""BO-REP: the law of its step, unbounded curvature, film reviews with an LSTM, and a transformer.

    python benchmarks/bo_rep.py --threads 1

takes about twenty minutes on one thread. The film reviews are read from the folder that LIGHTNING_HPO_DATA names;
without it that part is left out. Digits to clean are in `bo_rep_digits.py`.
"""

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from batch_runs import be_quiet
from bo_rep_plots import draw_curves
from bo_rep_text import text
from bo_rep_toys import cosh, law
from bo_rep_transformer import transformer
from common import conclude, parse, show

ASSETS = Path(__file__).parents[1] / "docs" / "assets"


def text_means(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over seeds of the runs with the chosen step size, and the losses of all step sizes with the first seed."""
    table = []
    for task, method in dict.fromkeys((row["task"], row["method"]) for row in rows):
        every = [row for row in rows if (row["task"], row["method"]) == (task, method)]
        same = [row for row in every if row["chosen"]]
        found: dict[str, Any] = {"task": task, "method": method, "seeds": len(same), "step": same[0]["lr"]}
        for key, digits in (("outer_loss", 4), ("test_accuracy", 2), ("auc", 3), ("cpu_s", 1)):
            values = [row[key] for row in same if key in row]
            found[key] = round(sum(values) / len(values), digits) if values else None
        losses = [row["outer_loss"] for row in same]
        found["lowest_and_highest"] = f"{min(losses):.3f} to {max(losses):.3f}"
        first = sorted((row["lr"], row["outer_loss"]) for row in every if row["seed"] == 0)
        found["loss_by_step"] = ", ".join(f"{lr:g}: {loss:.3f}" for lr, loss in first)
        table.append(found)
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    assets = ("--assets", {"type": Path, "help": "folder of the pictures; docs/assets by default, none with --quick"})
    chosen = parse(__doc__, arguments, assets)
    be_quiet()
    warnings.filterwarnings("ignore", message=".*z has grown 10-fold.*")  # what the un-normalised runs are there for
    rows = list(law(260 if chosen.quick else 4000))
    facts: dict[str, Any] = {"cosh": list(cosh(20 if chosen.quick else 2000))}
    show("Mean gap on a quadratic", rows, {"I": "d", "N": "d", "lr": "g", "gap": ".4g", "ratio": ".2f"})
    columns = {"method": "", "lr": "g", "arrives": "d", "stays_within": "g", "beyond_1e6_in_step": "d"}
    show("Curvature that grows with the gradient", facts["cosh"], columns | {"x_at_the_end": "g"})
    if os.environ.get("LIGHTNING_HPO_DATA") and not chosen.quick:
        runs = list(text(3, 800, None))
        facts |= {"text": text_means(runs), "text_runs": runs}
        draw_curves((chosen.assets or ASSETS) / "bo_rep_text.png", runs)
        columns = {"task": "", "method": "", "step": "g", "outer_loss": ".3f", "lowest_and_highest": ""}
        show("Film reviews", facts["text"], columns | {"test_accuracy": ".2f", "auc": ".3f", "loss_by_step": ""})
    facts["transformer"] = list(transformer(1, 30 if chosen.quick else 300))
    columns = {"outer": "", "method": "", "product": "", "lr": "g", "outer_loss": ".3f", "test_accuracy": ".1f"}
    show("A transformer", facts["transformer"], columns)
    conclude(__file__, chosen, rows, **facts)


if __name__ == "__main__":
    main()
