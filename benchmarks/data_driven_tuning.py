"""Does one hyperparameter tuned over past tasks serve new ones, and what does the graph of it cost?

Graphs: 200 handwritten digits, 30 of them labelled, a two-layer graph network on a kernel of the pixels; the width of
an rbf kernel is tuned over twelve graphs by accuracy on the other 170 digits and judged on twelve others, beside the
same network without a graph and beside each point of the grid. Activations: digits of five classes, 40 to learn from
and 260 to judge by, a small perceptron; the mixture of ReLU with another activation is tuned in the same way. Seeds
follow from the task alone, so that all values of a task begin with the same weights. Bounds hold with probability 95 %.
The last table is memory: forward and backward of a kernel with 32 neighbours, and with all.
"""

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from common import conclude, parse, peak_memory, show
from sklearn.datasets import load_digits
from torch import Tensor, nn

from lightning_hpo.functional.bilevel.data_driven_tuning import tune_over_tasks
from lightning_hpo.functional.bilevel.optimizer_steps import adam, functional_optimizer
from lightning_hpo.functional.bilevel.problem import Problem, Tensors
from lightning_hpo.functional.bilevel.task_tuning import TaskTuning
from lightning_hpo.functional.bilevel.unrolled import unrolled
from lightning_hpo.nn.interpolated_activation import InterpolatedActivation
from lightning_hpo.nn.kernel_adjacency import KernelAdjacency

SIGMAS = (0.3, 0.5, 0.7, 0.9, 1.2, 1.6, 2.2, 3.0, 5.0)
MIXTURES = (0.0, 0.25, 0.5, 0.75, 1.0)
SLOPES = 4  # tasks; each takes as long as ten trainings
FRESH = 100  # the first seed of tasks to judge by


class Task(NamedTuple):
    """Digits, the first of them labelled."""

    seed: int
    x: Tensor
    y: Tensor
    labelled: int


def digits() -> tuple[Tensor, Tensor]:
    found = load_digits()
    return torch.tensor(found.data, dtype=torch.float32) / 16, torch.tensor(found.target)


def graph_task(seed: int) -> Task:
    x, y = digits()
    chosen = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:200]
    return Task(seed, x[chosen], y[chosen], labelled=30)


def five_classes(seed: int) -> Task:
    x, y = digits()
    generator = torch.Generator().manual_seed(seed)
    classes = torch.randperm(10, generator=generator)[:5]
    places = torch.isin(y, classes).nonzero().flatten()
    chosen = places[torch.randperm(len(places), generator=generator)[:300]]
    return Task(seed, x[chosen], (y[chosen][:, None] == classes).long().argmax(1), labelled=40)


def train(task: Task, logits: Callable[[], Tensor], params: list[Tensor], epochs: int, lr: float, decay: float) -> None:
    optimizer = torch.optim.Adam(params, lr=lr, weight_decay=decay)
    for _ in range(epochs):
        optimizer.zero_grad()
        F.cross_entropy(logits()[: task.labelled], task.y[: task.labelled]).backward()
        optimizer.step()


def score(task: Task, logits: Tensor) -> tuple[float, float]:
    """Accuracy and cross-entropy where labels were not given."""
    logits, y = logits.detach()[task.labelled :], task.y[task.labelled :]
    return (logits.argmax(1) == y).double().mean().item(), F.cross_entropy(logits, y).item()


def graph_weights(task: Task) -> list[Tensor]:
    torch.manual_seed(task.seed)
    return [nn.init.xavier_uniform_(torch.empty(shape)) for shape in ((64, 16), (16, 10))]


def slope(task: Task, sigma: float, epochs: int) -> float:
    """Of the cross-entropy after training in log sigma, through all steps."""

    def logits(w: Tensors, h: Tensors) -> Tensor:
        adjacency = KernelAdjacency("rbf", lambda: h["log"].exp())(task.x)
        return adjacency @ torch.relu(adjacency @ task.x @ w["first"]) @ w["second"]

    problem = Problem(
        lambda w, h: F.cross_entropy(logits(w, h)[: task.labelled], task.y[: task.labelled]),
        lambda w, h: F.cross_entropy(logits(w, h)[task.labelled :], task.y[task.labelled :]),
    )
    params = dict(zip(("first", "second"), graph_weights(task), strict=True))
    step = functional_optimizer(adam, lr=0.02, weight_decay=5e-4)
    hparams = {"log": torch.tensor(sigma).log()}
    return unrolled(problem, params, hparams, steps=epochs, optimizer=step).gradients["log"].item()


def graph_network(task: Task, adjacency: Tensor, epochs: int) -> tuple[float, float]:
    first, second = (weight.requires_grad_() for weight in graph_weights(task))
    smoothed = adjacency @ task.x

    def logits() -> Tensor:
        return adjacency @ torch.relu(smoothed @ first) @ second

    train(task, logits, [first, second], epochs, lr=0.02, decay=5e-4)
    return score(task, logits())


def perceptron(task: Task, other: str, alpha: float, epochs: int) -> tuple[float, float]:
    torch.manual_seed(task.seed)
    network = nn.Sequential(
        nn.Linear(64, 32),
        InterpolatedActivation("relu", other, alpha),
        nn.Linear(32, 32),
        InterpolatedActivation("relu", other, alpha),
        nn.Linear(32, 5),
    )
    train(task, lambda: network(task.x), list(network.parameters()), epochs, lr=0.01, decay=0.0)
    return score(task, network(task.x))


class Recorded:
    """A utility that remembers the cross-entropy beside the accuracy."""

    def __init__(self, figures: Callable[[Task, float], tuple[float, float]]) -> None:
        self.figures = figures
        self.entropy: dict[tuple[int, float], float] = {}

    def __call__(self, task: Task, value: float) -> float:
        """The accuracy."""
        accuracy, self.entropy[task.seed, value] = self.figures(task, value)
        return accuracy

    def mean(self, tasks: Sequence[Task], value: float) -> float:
        """Mean cross-entropy of tasks at a value."""
        return sum(self.entropy[task.seed, value] for task in tasks) / len(tasks)


def search(
    make: Callable[[int], Task],
    figures: Callable[[Task, float], tuple[float, float]],
    grid: Sequence[float],
    tasks: int,
    log: bool,
) -> tuple[TaskTuning, list[dict[str, Any]], dict[str, Any]]:
    """Tunes, and evaluates the grid on other tasks as well."""
    mine, fresh = ([make(first + seed) for seed in range(tasks)] for first in (0, FRESH))
    utility, other = Recorded(figures), Recorded(figures)
    began = time.perf_counter()
    tuning = tune_over_tasks(mine, utility, grid, log=log, held_out=fresh)
    seconds = time.perf_counter() - began
    rows = [
        {
            "value": value,
            "accuracy": tuning.means[tuning.values.index(value)].item(),
            "error": tuning.standard_errors[tuning.values.index(value)].item(),
            "entropy": utility.mean(mine, value),
            "fresh_accuracy": sum(other(task, value) for task in fresh) / tasks,
        }
        for value in grid
    ]
    summary = {
        "best": tuning.best,
        "accuracy": tuning.means.max().item(),
        "leave_one_out": tuning.leave_one_out().mean().item(),
        "fresh_accuracy": tuning.held_out.mean().item(),
        "oscillations": tuning.oscillations.tolist(),
        "bounds": [str(gap) for gap in tuning.bounds()],
        "tasks_needed": tuning.tasks_needed(eps=0.1),
        "cells": tuning.utilities.numel(),
        "seconds": seconds,
    }
    return tuning, rows, summary


def graphs(tasks: int, epochs: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    def figures(task: Task, sigma: float) -> tuple[float, float]:
        return graph_network(task, KernelAdjacency("rbf", sigma)(task.x), epochs)

    _, rows, summary = search(graph_task, figures, SIGMAS, tasks, log=True)
    no_graph = [graph_network(graph_task(FRESH + seed), torch.eye(200), epochs)[0] for seed in range(tasks)]
    summary["fresh_without_graph"] = sum(no_graph) / tasks
    some = [graph_task(seed) for seed in range(min(tasks, SLOPES))]
    for row in rows:
        row["slope"] = sum(slope(task, row["value"], epochs) for task in some) / len(some)
    return [{"what": "rbf", **row} for row in rows], {"what": "rbf", **summary}


def activations(other: str, tasks: int, epochs: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    figures = partial(_mixture, other, epochs)
    _, rows, summary = search(five_classes, figures, MIXTURES, tasks, log=False)
    summary["fresh_relu"] = rows[-1]["fresh_accuracy"]
    return [{"what": f"relu-{other}", **row} for row in rows], {"what": f"relu-{other}", **summary}


def _mixture(other: str, epochs: int, task: Task, alpha: float) -> tuple[float, float]:
    return perceptron(task, other, alpha, epochs)


def memory(nodes: int) -> list[dict[str, Any]]:
    """Peak of one forward and backward in the parameter."""
    x = torch.rand(nodes, 64, generator=torch.Generator().manual_seed(0))

    def step(neighbors: int | None, searched: Tensor | None = None) -> None:
        sigma = torch.tensor(1.0, requires_grad=True)
        found = KernelAdjacency("rbf", sigma, neighbors=neighbors)(x, searched)
        (found if isinstance(found, Tensor) else found[1]).square().sum().backward()

    edges = KernelAdjacency("rbf", 1.0, neighbors=32).edges(x)
    forms = {
        "all": partial(step, None),
        "32 neighbours": partial(step, 32),
        "32 neighbours, searched before": partial(step, 32, edges),
    }
    bytes_of = {name: peak_memory(form) for name, form in forms.items()}
    return [
        {"what": "memory", "form": name, "nodes": nodes, "mebibytes": found / 2**20, "share": found / bytes_of["all"]}
        for name, found in bytes_of.items()
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    chosen = parse(__doc__, arguments)
    tasks, quick = (2, 3) if chosen.quick else (12, 0)
    rows, summaries = [], []
    for found, summary in (
        graphs(tasks, quick or 100),
        *(activations(other, tasks, quick or 150) for other in ("abs", "identity", "square", "hardtanh")),
    ):
        rows += found
        summaries.append(summary)
    columns = {"what": "", "value": "g", "accuracy": ".3f", "error": ".3f", "entropy": ".3f", "fresh_accuracy": ".3f"}
    columns |= {"slope": ".3g"}
    show("Means over tasks; entropy on the tasks tuned on, and its slope in log sigma on four of them", rows, columns)
    columns = {"what": "", "best": ".3f", "accuracy": ".3f", "leave_one_out": ".3f", "fresh_accuracy": ".3f"}
    columns |= {"fresh_without_graph": ".3f", "fresh_relu": ".3f", "tasks_needed": "d", "cells": "d", "seconds": ".0f"}
    show("Tuned on past tasks, judged on fresh ones; tasks needed for a gap of 0.1", summaries, columns)
    sizes = memory(200 if chosen.quick else 2000)
    show("Memory of a kernel", sizes, {"form": "", "nodes": "d", "mebibytes": ".2f", "share": ".3f"})
    conclude(__file__, chosen, [*rows, *sizes], summaries=summaries, memory=sizes)


if __name__ == "__main__":
    main()
