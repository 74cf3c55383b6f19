"""What an outer step of BO-REP costs beside betty's Neumann series and hypertorch's stochastic AID.

    python benchmarks/bo_rep_cost.py --threads 1

takes about a minute, and with `--largest 10M` about ten. An outer step is a hypergradient of one training and one
validation batch, 100 digits each as eight rows, and what follows it: the step of z, of the momentum and of x. Inner
steps are left out of all methods, for they are the same. The peers take one product, betty's series anew and
hypertorch's AID from where its linear system stood, and step x with torch's SGD with momentum.

- *weights*: an RNN of 64 units is inner, weights of 900 examples are outer (the digits of `bo_rep.py`).
- *encoder*: a GRU is inner, a layer below it is outer.

`seconds` is the median of all rounds, `ours to it` the median ratio of our time to its time in a round, `passes` in
units of a forward and backward pass of the training loss. `memory` is the peak beyond what was held before, in units of
the bare double backward: three calls of `torch.autograd.grad` and nothing else. `difference` is the relative distance
of the hypergradient from ours with the same z. AID cannot take an outer loss that looks at the outer parameters itself
(it differentiates a graph that it has freed): that part is left out of it, which is in its favour. A library that is
not there is left out and named; `hypergradient_peers.py` says where to find them.
"""

import importlib
from collections.abc import Callable, Sequence
from itertools import repeat
from types import SimpleNamespace
from typing import Any

import torch
from batch_runs import be_quiet
from common import alternate, conclude, console, parse, peak_memory, show, write
from hypergradient_runs import digits
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_hpo.functional.bilevel.bo_rep import SingleLoopBilevel
from lightning_hpo.functional.bilevel.outer_gradient import outer_gradient
from lightning_hpo.functional.bilevel.problem import Problem, Tensors

Step = Callable[[], Any]
Z_LR = 0.05


class Network(nn.Module):
    """A layer on each row, a recurrent network over rows, and logits."""

    def __init__(self, kind: type[nn.RNN] | type[nn.GRU], hidden: int, encoder: bool) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(8, 64), nn.Tanh()) if encoder else nn.Identity()
        self.recurrent, self.head = kind(64 if encoder else 8, hidden, batch_first=True), nn.Linear(hidden, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Logits."""
        return self.head(self.recurrent(self.encoder(images.view(-1, 8, 8)))[0].amax(1))


class Task:
    """One network, one batch of each kind, and what is outer."""

    def __init__(self, name: str, kind: type[nn.RNN] | type[nn.GRU], hidden: int) -> None:
        torch.manual_seed(0)
        self.name = name
        network = Network(kind, hidden, encoder=name == "encoder")
        images, labels = digits(0)
        rows = torch.randint(900, (100,))
        batch, val = (images[rows].float(), labels[rows]), (images[900:1000].float(), labels[900:1000])
        named = {key: value.detach() for key, value in network.named_parameters()}
        self.y = {key: value for key, value in named.items() if not key.startswith("encoder")}
        self.x = {key: value for key, value in named.items() if key.startswith("encoder")}
        self.x = self.x or {"weight": torch.zeros(900)}

        def logits(y: Tensors, x: Tensors, inputs: Tensor) -> Tensor:
            return torch.func.functional_call(network, {**y, **x} if name == "encoder" else y, (inputs,))

        def train(y: Tensors, x: Tensors) -> Tensor:
            losses = F.cross_entropy(logits(y, x, batch[0]), batch[1], reduction="none")
            weight = x["weight"][rows].sigmoid() if name == "weights" else 1.0
            return (weight * losses).mean() + 5e-4 * torch.stack([p.square().sum() for p in y.values()]).sum()

        self.problem = Problem(train, lambda y, x: F.cross_entropy(logits(y, x, val[0]), val[1]))
        self.z = {key: 0.01 * torch.randn_like(value) for key, value in self.y.items()}

    @property
    def size(self) -> int:
        """The number of inner parameters."""
        return sum(value.numel() for value in self.y.values())

    def leaves(self, tensors: Tensors) -> list[Tensor]:
        """Copies that take gradients."""
        return [value.clone().requires_grad_() for value in tensors.values()]

    def train(self, y: Sequence[Tensor], x: Sequence[Tensor]) -> Tensor:
        """The training loss of lists."""
        return self.problem.train_loss(dict(zip(self.y, y, strict=True)), dict(zip(self.x, x, strict=True)))

    def val(self, y: Sequence[Tensor], x: Sequence[Tensor]) -> Tensor:
        """The validation loss of lists."""
        return self.problem.val_loss(dict(zip(self.y, y, strict=True)), dict(zip(self.x, x, strict=True)))

    def gradient(self) -> tuple[Tensor, ...]:
        """One forward and backward pass."""
        y = self.leaves(self.y)
        return torch.autograd.grad(self.train(y, list(self.x.values())), y)

    def double_backward(self) -> tuple[Tensor, ...]:
        """The least that gives a hypergradient with a z that is known."""
        y, x = self.leaves(self.y), self.leaves(self.x)
        torch.autograd.grad(self.val(y, x), [*y, *x], allow_unused=True)
        return torch.autograd.grad(
            torch.autograd.grad(self.train(y, x), y, create_graph=True), [*y, *x], list(self.z.values())
        )


def ours(task: Task, product: Any) -> Step:
    """An iteration without inner steps, from the state that it left last time."""
    inner, outer = (lambda y, x, _: task.problem.train_loss(y, x)), (lambda y, x, _: task.problem.val_loss(y, x))
    method = SingleLoopBilevel(inner, outer, lr=1e-3, inner_lr=0.1, z_lr=Z_LR, inner_steps=0, product=product)
    states = [method.start(task.y, task.x)]

    def step() -> None:
        states[0], _ = method.step(states[0], repeat(None), repeat(None))

    return step


def _outer(x: list[Tensor]) -> Callable[[Sequence[Tensor]], None]:
    """Torch's SGD for the outer parameters."""
    optimizer = torch.optim.SGD(x, lr=1e-3, momentum=0.9)

    def move(gradients: Sequence[Tensor]) -> None:
        for value, gradient in zip(x, gradients, strict=True):
            value.grad = gradient
        optimizer.step()

    return move


def betty(task: Task, function: Any) -> tuple[Step, float]:
    """A series of one term, and how far its hypergradient is from ours."""
    y, x = task.leaves(task.y), task.leaves(task.x)
    lower: Any = SimpleNamespace(
        config=SimpleNamespace(neumann_iterations=1, neumann_alpha=Z_LR),
        paths=[],
        cur_batch=None,
        training_step_exec=lambda _: task.train(y, x),
        trainable_parameters=lambda: y,
    )
    upper: Any = SimpleNamespace(trainable_parameters=lambda: x)

    def estimate() -> list[Tensor]:
        found = torch.autograd.grad(task.val(y, x), [*y, *x], allow_unused=True)
        indirect = function(found[: len(y)], lower, upper, False)
        parts = zip(found[len(y) :], indirect, strict=True)
        return [second if first is None else first + second for first, second in parts]

    known = outer_gradient(task.problem, task.y, task.x, z_lr=Z_LR, solver="neumann", neumann_steps=1).gradients
    away, move = _distance(estimate(), torch.cat([value.reshape(-1) for value in known.values()])), _outer(x)
    return (lambda: move(estimate())), away


def aid(task: Task, function: Any) -> tuple[Step, float]:
    """One step on the linear system, begun where the last one ended, and how far its hypergradient is from ours."""
    y, x = task.leaves(task.y), task.leaves(task.x)
    still, place = [value.detach() for value in x], [list(task.z.values())]
    settings = {"inner_loss": task.train, "set_grad": False, "verbose": False}

    def build(values: list[Tensor]) -> tuple[torch.optim.Optimizer, None]:
        return torch.optim.SGD(values, lr=Z_LR), None

    def estimate() -> list[Tensor]:
        score = lambda weights, _: task.val(weights, still)  # noqa: E731
        gradients, place[0] = function(y, x, score, K=1, linsys_start=place[0], optim_build=build, **settings)
        return gradients

    found = estimate()  # with the z after the step
    z = dict(zip(task.y, (value.detach() for value in place[0]), strict=True))
    indirect = Problem(task.problem.train_loss, lambda weights, _: task.problem.val_loss(weights, task.x))
    known = outer_gradient(indirect, task.y, task.x, z, z_lr=Z_LR).gradients
    away, move = _distance(found, torch.cat([value.reshape(-1) for value in known.values()])), _outer(x)
    return (lambda: move(estimate())), away


def _distance(found: Sequence[Tensor], known: Tensor) -> float:
    mine = torch.cat([value.detach().reshape(-1) for value in found])
    return float(f"{float((mine - known).norm() / known.norm()):.1e}")


PEERS: dict[str, tuple[str, str, Callable[[Task, Any], tuple[Step, float]]]] = {
    "betty neumann, 1 term": ("betty.hypergradient.neumann", "neumann", betty),
    "hypertorch stoch_AID, K=1": ("hypergrad.hypergradients", "stoch_AID", aid),
}


def cost(task: Task, rounds: int, absent: dict[str, None]) -> list[dict[str, Any]]:
    """One row a method."""
    steps: dict[str, Step] = {"BO-REP": ours(task, "exact"), "BO-REP, fd": ours(task, "fd")}
    away: dict[str, float] = {}
    for label, (module, name, make) in PEERS.items():
        try:
            steps[label], away[label] = make(task, getattr(importlib.import_module(module), name))
        except (ImportError, AttributeError) as error:
            absent[f"{label}: {error}"] = None
    steps["double backward alone"] = task.double_backward
    timings = alternate({**steps, "gradient": task.gradient}, rounds)
    base = peak_memory(task.double_backward)
    rows = []
    for label, step in steps.items():
        row = {"outer": task.name, "inner_parameters": task.size, "method": label}
        row |= {"seconds": float(f"{timings[label].median:.3g}"), "to_ours": round(timings[label].ratio, 3)}
        row |= {"passes": round(timings[label].ratio / timings["gradient"].ratio, 2)}
        row |= {"ours_to_it": round(1 / timings[label].ratio, 3), "memory": round(peak_memory(step) / base, 3)}
        rows.append(row | {"difference": away.get(label)})
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    rounds = ("--rounds", {"type": int, "default": 7, "help": "of the timings; 7 by default, more for small networks"})
    largest = ("--largest", {"choices": ["1M", "10M"], "default": "1M", "help": "inner parameters; 1M by default"})
    chosen = parse(__doc__, arguments, rounds, largest)
    be_quiet()
    tasks: list[tuple[str, Any, int]] = [("weights", nn.RNN, 64), ("encoder", nn.GRU, 64)]
    if not chosen.quick:
        tasks.append(("encoder", nn.GRU, 530))
    if chosen.largest == "10M":
        tasks += [("encoder", nn.GRU, 1790), ("weights", nn.GRU, 1790)]
    absent: dict[str, None] = {}
    rows: list[dict[str, Any]] = []
    for name, kind, hidden in tasks:
        many = 1 if chosen.quick else {64: 8 * chosen.rounds, 530: chosen.rounds}.get(hidden, chosen.rounds // 2 + 1)
        rows += cost(Task(name, kind, hidden), many, absent)
        if not chosen.quick:
            write(__file__, chosen, rows, absent=list(absent))
    for why in absent:
        console.print(f"left out: {why}")
    columns = {"outer": "", "inner_parameters": ",", "method": "", "seconds": ".4f", "ours_to_it": ".3f"}
    show("An outer step", rows, columns | {"passes": ".2f", "memory": ".3f", "difference": ".0e"})
    conclude(__file__, chosen, rows, absent=list(absent))


if __name__ == "__main__":
    main()
