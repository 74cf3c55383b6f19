"""What does tuning over tasks cost beside plain Trainers, and does it help on citation graphs?

Speed: the width of a kernel for graphs of 200 digits, nine values, three tasks, 100 steps each. A Trainer for each cell
as it is by default (with checkpoints, a log and validation in each epoch), one that does nothing but train and validate
once, the tuner, and all values of a task in one network of stacked weights, which `torch.func.vmap` runs.

Citations: two-layer graph networks on Cora and CiteSeer. Edges are the citations and those of a kernel of the words,
to 16 neighbours; the share of the kernel is tuned. Tasks are ten random splits, 20 labels a class, and ten others to
judge by; utility is the accuracy on 1000 nodes without labels.
"""

import logging
import math
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import conclude, parse, show
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.utils.data import DataLoader, TensorDataset

from lightning_hpo import TaskDistributionTuner
from lightning_hpo.functional.bilevel.data_driven_tuning import grid_between
from lightning_hpo.nn.kernel_adjacency import KernelAdjacency
from lightning_hpo.tuners.task_data import seed_all, seed_of

LABELLED = 30
EXPECTED = "many workers|LeafSpec|makes all nodes alike|logging interval|Sparse CSR|jit.script"
SHARES = (0.0, 1.0, 9)  # of the kernel's graph: from, to, points
Task = tuple[DataLoader[Any], DataLoader[Any]]


class DigitNetwork(LightningModule):
    """Two layers of means over similar digits."""

    def __init__(self, sigma: float) -> None:
        super().__init__()
        self.adjacency = KernelAdjacency("rbf", nn.Parameter(torch.tensor(sigma), requires_grad=False))
        self.first, self.second = nn.Linear(64, 16, bias=False), nn.Linear(16, 10, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        adjacency = self.adjacency(x)
        return adjacency @ self.second(torch.relu(adjacency @ self.first(x)))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Cross-entropy where labels are given."""
        return F.cross_entropy(self(batch[0])[:LABELLED], batch[1][:LABELLED])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Accuracy where they are not."""
        right = self(batch[0])[LABELLED:].argmax(1) == batch[1][LABELLED:]
        self.log("val_accuracy", right.double().mean())

    def configure_optimizers(self) -> Any:
        """Adam with weight decay."""
        return torch.optim.Adam([*self.first.parameters(), *self.second.parameters()], lr=0.02, weight_decay=5e-4)


def digits(seed: int) -> Task:
    pixels, labels = load_digits(return_X_y=True)
    chosen = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))[:200]
    data = TensorDataset(torch.tensor(pixels / 16, dtype=torch.float32)[chosen], torch.tensor(labels)[chosen])
    return DataLoader(data, batch_size=200), DataLoader(data, batch_size=200)


def plain_trainers(tasks: Sequence[Task], values: Sequence[float], epochs: int, *, bare: bool) -> Tensor:
    """A Trainer a cell, as one would write it."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for train, val in tasks:
            for value in values:
                seed_everything(0, verbose=False)
                module = DigitNetwork(value)
                less: dict[str, Any] = {
                    "logger": False,
                    "enable_checkpointing": False,
                    "check_val_every_n_epoch": 10**9,
                }
                more: dict[str, Any] = {"logger": CSVLogger(folder), "default_root_dir": folder}
                quiet: dict[str, Any] = {
                    "enable_progress_bar": False,
                    "enable_model_summary": False,
                    "accelerator": "cpu",
                }
                trainer = Trainer(max_epochs=epochs, **(less if bare else more), **quiet)
                trainer.fit(module, train, val)
                found.append(trainer.validate(module, val, verbose=False)[0]["val_accuracy"])
    return torch.tensor(found, dtype=torch.float64).view(len(tasks), len(values))


def tuner(tasks: Sequence[Task], values: Sequence[float], epochs: int) -> TaskDistributionTuner:
    kwargs = {"max_epochs": epochs, "accelerator": "cpu"}
    low, high, points = values[0], values[-1], len(values)
    return TaskDistributionTuner(
        tasks, DigitNetwork, "sigma", low, high, log=True, n_grid=points, refine=None, trainer_kwargs=kwargs
    )


def stacked(tasks: Sequence[Task], values: Sequence[float], epochs: int) -> Tensor:
    """All values of a task at once, with the seeds of the tuner."""
    found = []
    for task, (train, _) in zip(tuner(tasks, values, epochs).tasks, tasks, strict=True):
        x, y = train.dataset[:]
        modules = []
        for value in values:
            seed_all(seed_of(0, task.key))
            modules.append(DigitNetwork(value))
        params, buffers = stack_module_state(modules)
        base = modules[0].train()
        logits = vmap(partial(_logits, base), in_dims=(0, 0, None))
        weights = [param for name, param in params.items() if param.requires_grad]
        optimizer = torch.optim.Adam(weights, lr=0.02, weight_decay=5e-4)
        for _ in range(epochs):
            optimizer.zero_grad()
            guesses = logits(params, buffers, x)[:, :LABELLED].flatten(0, 1)
            loss = F.cross_entropy(guesses, y[:LABELLED].repeat(len(values)), reduction="sum") / LABELLED
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            right = logits(params, buffers, x)[:, LABELLED:].argmax(-1) == y[LABELLED:]
        found.append(right.double().mean(1))
    return torch.stack(found)


def _logits(base: nn.Module, params: Any, buffers: Any, x: Tensor) -> Tensor:
    return functional_call(base, (params, buffers), (x,))


def speed(tasks: int, epochs: int) -> list[dict[str, Any]]:
    data, values = [digits(seed) for seed in range(tasks)], grid_between(0.3, 5.0, 9, log=True)
    ways: dict[str, Callable[[], Any]] = {
        "a Trainer a cell, default settings": lambda: plain_trainers(data, values, epochs, bare=False),
        "a Trainer a cell, nothing but training": lambda: plain_trainers(data, values, epochs, bare=True),
        "TaskDistributionTuner": lambda: tuner(data, values, epochs).run().utilities,
        "stacked weights, vmap": lambda: stacked(data, values, epochs),
    }
    stacked(data[:2], values, 2)  # compiles what is compiled once
    rows: list[dict[str, Any]] = []
    answers = {}
    for name, way in ways.items():
        began = time.process_time()
        answers[name] = way()
        seconds = time.process_time() - began
        rows.append({"what": "speed", "way": name, "cells": tasks * len(values), "cpu_s": seconds})
        rows[-1]["share"] = seconds / rows[0]["cpu_s"]
        rows[-1]["mean_accuracy"] = answers[name].mean().item()
    difference = (answers["TaskDistributionTuner"] - answers["stacked weights, vmap"]).abs().max().item()
    rows[-1]["difference"] = difference
    return rows


class Multiply(torch.autograd.Function):
    """A sparse matrix, given with its transpose, times a dense one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, matrix: Tensor, transpose: Tensor) -> Tensor:
        """The product."""
        ctx.transpose = transpose
        return matrix @ x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """The transpose times the gradient."""
        return ctx.transpose @ grad, None, None


def both_ways(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Row by row, and its transpose row by row: four times as fast as lists of entries."""
    return matrix.coalesce().to_sparse_csr(), matrix.t().coalesce().to_sparse_csr()


class CitationNetwork(LightningModule):
    """Two layers; the graph is a mixture of citations and a kernel of the words."""

    def __init__(self, share: float, graph: "Graph") -> None:
        super().__init__()
        self.graph = graph
        self.mixture = both_ways((1 - share) * graph.citations + share * graph.kernel)
        self.first = nn.Parameter(nn.init.xavier_uniform_(torch.empty(graph.words[0].shape[1], 16)))
        self.second = nn.Parameter(nn.init.xavier_uniform_(torch.empty(16, int(graph.y.max()) + 1)))

    def forward(self) -> Tensor:
        """Logits."""
        hidden = torch.relu(self.mixed(Multiply.apply(self.first, *self.graph.words)))
        return self.mixed(F.dropout(hidden, 0.5, self.training) @ self.second)

    def mixed(self, x: Tensor) -> Tensor:
        """Means over neighbours of both kinds."""
        return Multiply.apply(x, *self.mixture)

    def training_step(self, nodes: Tensor, batch_idx: int) -> Tensor:
        """Cross-entropy where labels are given."""
        return F.cross_entropy(self()[nodes], self.graph.y[nodes])

    def validation_step(self, nodes: Tensor, batch_idx: int) -> None:
        """Accuracy where they are not."""
        right = self()[nodes].argmax(1) == self.graph.y[nodes]
        self.log("val_accuracy", right.double().mean(), batch_size=1)

    def configure_optimizers(self) -> Any:
        """Adam with weight decay."""
        return torch.optim.Adam(self.parameters(), lr=0.01, weight_decay=5e-4)


class Graph:
    """Citations between papers, and the words of each."""

    def __init__(self, name: str) -> None:
        from torch_geometric.io import read_planetoid_data

        folder = Path(os.environ["LIGHTNING_HPO_DATA"]) / name / "raw"
        data = read_planetoid_data(str(folder), name.lower())
        words = F.normalize(data.x, p=1, dim=1)
        self.y, self.words = data.y, both_ways(words.to_sparse_coo())
        self.kernel = self._matrix(*KernelAdjacency("threshold", 0.0, neighbors=16)(words))
        source, target = torch.cat([data.edge_index, torch.arange(len(words)).repeat(2, 1)], 1)
        rows = torch.bincount(target, minlength=len(words)).float()
        self.citations = self._matrix(torch.stack([source, target]), 1 / rows[target])

    def _matrix(self, edges: Tensor, weights: Tensor) -> Tensor:
        size = (len(self.y), len(self.y))
        return torch.sparse_coo_tensor(edges.flip(0), weights, size, check_invariants=True).coalesce()

    def split(self, steps: int, seed: int) -> Task:
        """20 labels a class and 1000 other nodes; an epoch is the same batch many times."""
        order = torch.randperm(len(self.y), generator=torch.Generator().manual_seed(seed))
        some = [order[self.y[order] == label][:20] for label in range(int(self.y.max()) + 1)]
        labelled = torch.cat(some)
        rest = order[~torch.isin(order, labelled)][:1000]
        return DataLoader([labelled] * steps, batch_size=None), DataLoader([rest], batch_size=None)  # type: ignore[arg-type]


def citations(name: str, tasks: int, steps: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    graph = Graph(name)
    low, high, points = SHARES
    make = partial(CitationNetwork, graph=graph)
    kwargs = {"max_epochs": 1, "accelerator": "cpu"}
    mine, fresh = ([graph.split(steps, first + seed) for seed in range(tasks)] for first in (0, 100))
    search = partial(TaskDistributionTuner, module_fn=make, hparam="share", trainer_kwargs=kwargs)
    result = search(mine, low=low, high=high, n_grid=points, held_out=fresh).run()
    ends = search(fresh, low=0.0, high=1.0, n_grid=3, refine=None).run()  # citations, half of each, words
    gains = {share: result.held_out - ends.utilities[:, place] for place, share in enumerate((0.0, 0.5, 1.0))}
    rows = [
        {"what": name, "share": value, "accuracy": mean, "error": error}
        for value, mean, error in zip(
            result.values, result.means.tolist(), result.standard_errors.tolist(), strict=True
        )
    ]
    summary = {
        "graph": name,
        "best_share": result.best,
        "tuned": result.held_out.mean().item(),
        "citations_alone": ends.means[0].item(),
        "half_of_each": ends.means[1].item(),
        "words_alone": ends.means[2].item(),
        "gain_on_citations": gains[0.0].mean().item(),
        "its_error": gains[0.0].std().item() / math.sqrt(tasks),
        "gain_on_half": gains[0.5].mean().item(),
        "tasks_needed": result.tasks_needed(eps=0.1),
    }
    return rows, summary


def main(arguments: Sequence[str] | None = None) -> None:
    chosen = parse(__doc__, arguments)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=f".*({EXPECTED}).*")
    tasks, steps = (2, 2) if chosen.quick else (10, 100)
    fast = speed(tasks=2 if chosen.quick else 3, epochs=steps)
    columns = {"way": "", "cells": "d", "cpu_s": ".2f", "share": ".3f", "mean_accuracy": ".3f", "difference": ".3f"}
    show("CPU time of a search", fast, columns)
    rows, graphs = [], []
    if os.environ.get("LIGHTNING_HPO_DATA"):
        for name in ("Cora", "CiteSeer"):
            found, summary = citations(name, tasks, steps)
            rows += found
            graphs.append(summary)
        columns = dict.fromkeys(graphs[0], ".3f") | {"graph": "", "tasks_needed": "d"}
        show("Accuracy on ten other splits, share of the kernel tuned or fixed", graphs, columns)
    conclude(__file__, chosen, [*fast, *rows], speed=fast, citations=graphs)


if __name__ == "__main__":
    main()
