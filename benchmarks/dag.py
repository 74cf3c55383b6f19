"""How many communities does a graph have, and which? One run beside Louvain, Leiden, k-means and a grid over K.

Planted partitions, and citations (Cora and CiteSeer, looked for as `Cora/raw` under `LIGHTNING_HPO_DATA`, which is not
written to). Settings are the defaults of `DAGCommunityDetector` and `CommunityPruning`, the same for both; the number
of classes is told to k-means alone. Labels are read after training. Then what modularity on edges costs beside
torch-geometric's `DMoNPooling`, which needs a matrix of nodes by nodes.

    LIGHTNING_HPO_DATA=<folder> python benchmarks/dag.py --threads 1
"""

import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from common import conclude, parse, show, write
from dag_cost import cost_rows
from dag_peers import clustering_scores, peer_rows
from dag_plots import draw
from torch_geometric.data import Data
from torch_geometric.loader import DataLoader

from lightning_hpo import CommunityPruning, DAGCommunityDetector
from lightning_hpo.demos.graph_data import CitationDataModule, planted_partition
from lightning_hpo.testing import tiny_trainer

ASSETS = Path(__file__).parents[1] / "docs" / "assets"
EPOCHS = 350
GRID = (4, 5, 6, 7, 8, 10, 12, 16)
COLUMNS = {"graph": "", "method": "", "seeds": "", "communities": "", "acc": ".3f", "nmi": ".3f", "ari": ".3f"}
COLUMNS |= {"range": "", "modularity": ".3f", "seconds": ".1f"}


@dataclass
class Run:
    """A detector that was trained, and what it took."""

    model: DAGCommunityDetector
    pruning: CommunityPruning
    seconds: float
    scores: dict[str, float]


def train(data: Data, seed: int, epochs: int, search: bool = True, **arguments: Any) -> Run:
    """One run; without the search nothing is pruned and nothing asks for fewer communities."""
    torch.manual_seed(seed)
    model = DAGCommunityDetector(data.num_features, seed=seed, **arguments)
    warm, wait = arguments.get("warmup_epochs", 100), arguments.get("ramp_epochs", 50)
    pruning = CommunityPruning(warmup=wait if search else epochs, every=5)
    begun = time.process_time()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*nothing is pruned.*")
        tiny_trainer(pruning, max_epochs=max(epochs, warm + wait + 1)).fit(model, DataLoader([data]))
    seconds = time.process_time() - begun
    result = model.predict_communities(data)
    return Run(model, pruning, seconds, clustering_scores(result.labels, data))


def row(graph: str, method: str, runs: Sequence[Run]) -> dict[str, Any]:
    """Means over runs, and the range of the accuracy."""
    found = sorted({int(run.scores["communities"]) for run in runs})
    means = {name: round(mean(run.scores[name] for run in runs), 4) for name in ("acc", "nmi", "ari", "modularity")}
    accuracies = [run.scores["acc"] for run in runs]
    spread = f"{min(accuracies):.3f} to {max(accuracies):.3f}" if len(runs) > 1 else None
    communities = str(found[0]) if len(found) == 1 else f"{found[0]} to {found[-1]}"
    seconds = round(mean(run.seconds for run in runs), 1)
    return {
        "graph": graph,
        "method": method,
        "seeds": len(runs),
        "communities": communities,
        **means,
        "range": spread,
        "seconds": seconds,
    }


@contextmanager
def citations(components: int = 256) -> Iterator[dict[str, Data]]:
    """The two graphs, processed in a folder that goes away."""
    source = os.environ.get("LIGHTNING_HPO_DATA")
    names = [name for name in ("Cora", "CiteSeer") if source and (Path(source) / name / "raw").is_dir()]
    with tempfile.TemporaryDirectory() as folder:
        graphs = {}
        for name in names:
            shutil.copytree(Path(str(source)) / name / "raw", Path(folder) / name / "raw")
            module = CitationDataModule(folder, "Cora" if name == "Cora" else "CiteSeer", components)
            module.setup()
            graphs[name] = module.data
        yield graphs


def planted_rows(quick: bool) -> Iterator[dict[str, Any]]:
    """Five partitions of four communities, up to sixteen allowed."""
    small: dict[str, Any] = {
        "hidden_channels": 16 if quick else 64,
        "max_communities": 16,
        "warmup_epochs": 2 if quick else 50,
    }
    small["ramp_epochs"] = 1 if quick else 25
    size, seeds = (20, 2) if quick else (50, 5)
    graphs = [planted_partition(size=size, seed=seed) for seed in range(seeds)]
    runs = [train(data, seed, 5 if quick else 150, **small) for seed, data in enumerate(graphs)]
    yield row("planted, 4 communities", "DAG, up to 16", runs)
    yield from ({"graph": "planted, 4 communities", **found} for found in peer_rows(graphs[0], quick))


def citation_rows(name: str, data: Data, keep: Callable[[str, Run], None]) -> Iterator[dict[str, Any]]:
    """Three seeds, other upper bounds, and the peers."""
    runs = []
    for seed in range(3):
        runs.append(train(data, seed, EPOCHS))
        keep(name, runs[-1])
    yield row(name, "DAG, up to 32", runs)
    for columns in (16, 64):
        yield row(name, f"DAG, up to {columns}", [train(data, 0, EPOCHS, max_communities=columns)])


def grid_rows(data: Data, one: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The same network with K given, eight times, nothing pruned."""
    runs = [train(data, 0, EPOCHS, search=False, max_communities=k, sparsity_weight=0.0) for k in GRID]
    chosen = max(runs, key=lambda run: run.scores["modularity"])  # what can be seen without labels
    best = max(runs, key=lambda run: run.scores["nmi"])
    whole = sum(run.seconds for run in runs)
    ratio = round(one["seconds"] / whole, 4)
    yield {"way": "one run, K not given", **_picked(one), "seconds": one["seconds"], "ratio": ratio}
    for way, run in (("grid of 8, the highest modularity", chosen), ("grid of 8, the highest NMI, from labels", best)):
        yield {"way": way, **_picked(run.scores), "seconds": round(whole, 1), "ratio": 1.0}


def _picked(scores: Mapping[str, Any]) -> dict[str, Any]:
    found = {name: round(scores[name], 4) for name in ("acc", "nmi", "ari", "modularity")}
    count = scores["communities"]
    return {"communities": count if isinstance(count, str) else str(int(count)), **found}


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the tables."""
    chosen = parse(__doc__, arguments)
    warnings.filterwarnings("ignore", message=".*torch.jit.script.* is deprecated.*", category=FutureWarning)
    cost = cost_rows(chosen.quick)
    show("Modularity and its gradient", cost, {"graph": "", "way": "", "mb": ",.1f", "memory": ".3f", "ms": ",.1f"})
    rows = list(planted_rows(chosen.quick))
    facts: dict[str, Any] = {"cost": cost}
    kept: dict[str, list[Run]] = {}
    with citations() as graphs, citations(components=0) as words:
        for name, data in ({} if chosen.quick else graphs).items():
            for found in citation_rows(name, data, lambda name, run: kept.setdefault(name, []).append(run)):
                rows.append(found)
                write(__file__, chosen, rows, **facts)
            rows += [{"graph": name, **found} for found in peer_rows(words[name], chosen.quick)]
            write(__file__, chosen, rows, **facts)
        if "Cora" in kept:
            facts["courses"] = [
                {"graph": name, "seed": seed, "communities": run.pruning.history}
                for name, runs in kept.items()
                for seed, run in enumerate(runs)
            ]
            draw(ASSETS, {name: (runs[0].model, graphs[name]) for name, runs in kept.items()}, facts["courses"])
            (one,) = (found for found in rows if (found["graph"], found["method"]) == ("Cora", "DAG, up to 32"))
            facts["grid"] = list(grid_rows(graphs["Cora"], one))
    show("Communities", rows, COLUMNS)
    conclude(__file__, chosen, rows, **facts)


if __name__ == "__main__":
    main()
