"""What hypergradients are worth: known figures, corrupted labels, and what one of them costs.

1. Three problems with known figures, through the functional engine alone: digits distilled to ten images, a penalty for
   each feature of breast_cancer, the lasso on diabetes. The splits are those of numpy's and scikit-learn's seed 0, the
   first images normal numbers of seed 0 over 64; a figure agrees within 0.01 (accuracy) or 5 % (all others).
2. 1000 digits, 40 % with a wrong label, a weight for each example: the area under the ROC curve at finding the wrong
   ones, and the test accuracy against training on all, and on the clean ones alone.
3. One hypergradient with each estimator: its time and memory in units of one forward and backward pass (a network of
   300,000 parameters), and its cosine to an exact one (a network of 1,210): to a dense solve at the minimum (`late`)
   and after 50 steps (`early`), where the Hessian is indefinite, and there also to the derivative through the next 1000
   steps (`ahead`), which is what one would like to follow.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from batch_runs import be_quiet
from common import conclude, parse, show, write
from hypergradient_bias import estimators
from hypergradient_figures import figures
from hypergradient_plots import draw_bias
from hypergradient_runs import cleaning

ASSETS = Path(__file__).parents[1] / "docs" / "assets"


def cleaning_means(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over seeds."""
    table = []
    for network, method in dict.fromkeys((row["network"], row["method"]) for row in rows):
        same = [row for row in rows if (row["network"], row["method"]) == (network, method)]
        found = [row["auc"] for row in same]
        auc = None if None in found else round(sum(found) / len(found), 3)
        lowest = None if None in found else round(min(found), 3)
        right = sum(row["test_accuracy"] for row in same) / len(same)
        mean = {"network": network, "method": method, "seeds": len(same), "auc": auc, "lowest_auc": lowest}
        mean |= {"test_accuracy": round(right, 2), "cpu_s": round(sum(r["cpu_s"] for r in same) / len(same), 1)}
        table.append(mean)
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    seeds = ("--seeds", {"type": int, "default": 3, "help": "of the training runs; 3 by default"})
    assets = ("--assets", {"type": Path, "help": "folder of the pictures; docs/assets by default, none with --quick"})
    chosen = parse(__doc__, arguments, seeds, assets)
    be_quiet()
    seeds_run = 1 if chosen.quick else chosen.seeds
    facts: dict[str, Any] = {"estimators": estimators(chosen.quick), "figures": figures(chosen.quick)}
    rows = facts["figures"]
    write(__file__, chosen, rows, **facts)  # the rest takes a while
    cleaned = list(cleaning(seeds_run, 20 if chosen.quick else 1000))
    facts |= {"cleaning": cleaning_means(cleaned), "cleaning_runs": cleaned}
    if folder := chosen.assets or (None if chosen.quick else ASSETS):
        draw_bias(folder / "implicit_differentiation_bias.png", facts["estimators"])
    show("Known figures", rows, {"problem": "", "figure": "", "expected": ".4f", "found": ".4f", "agrees": ""})
    columns = {"network": "", "method": "", "auc": ".3f", "lowest_auc": ".3f", "test_accuracy": ".2f", "cpu_s": ".1f"}
    show("Corrupted labels", facts["cleaning"], columns)
    columns = {
        "estimator": "",
        "cost": ".2f",
        "memory": ".2f",
        "cosine_late": ".3f",
        "cosine_early": ".3f",
        "cosine_ahead": ".3f",
    }
    show("One hypergradient", facts["estimators"], columns)
    conclude(__file__, chosen, rows, **facts)


if __name__ == "__main__":
    main()
