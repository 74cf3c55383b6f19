"""What one hypergradient costs, beside hypertorch, TorchOpt, betty and higher, and what `Hypergradient` adds to a run.

1. Conjugate gradients and Neumann series with a fixed number of products, at trained weights of a network of three
   layers on scikit-learn's digits, pulled towards where they began, as in fine-tuning, so that the Hessian is positive
   definite; the hyperparameters are the log strength of the pull for each of the six parameters and a weight for each
   of 128 examples. All solve the same system from zero. `ours` is the time in units of ours in the same round, `passes`
   in units of one forward and backward pass, `difference` the relative distance of a hypergradient from ours.
2. Finite differences alone: `darts_fd` and `sama`.
3. Through the inner steps: T plain gradient steps and their hypergradient.
4. Memory of the implicit hypergradient after T inner steps, those included.
5. A whole run: a classifier of MNIST (of digits where `LIGHTNING_HPO_DATA` names no folder with it), with the callback
   against without it, in turns. `plain_runs` is the median ratio of a round, `fastest_to_fastest` that of the fastest
   runs, which says more where others use the machine.

Peak memory is in units of the parameters' own, beyond what was held before. A library that is not there is left out and
named. `hypergradient_peers.py` says where to find each.
"""

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from batch_runs import be_quiet
from common import alternate, conclude, console, parse, peak_memory, show
from hypergradient_peers import (
    Estimate,
    Peer,
    finite_difference_peers,
    implicit_peers,
    peer_versions,
    series_peers,
    unrolled_peers,
)
from hypergradient_runs import digits
from torch import Tensor
from torch.nn import functional as F

from lightning_hpo.functional.bilevel.estimators import ESTIMATORS, Problem
from lightning_hpo.functional.bilevel.optimizer_steps import functional_optimizer, sgd
from lightning_hpo.functional.bilevel.problem import Tensors
from lightning_hpo.functional.bilevel.sama import adam_slope

WIDTHS = {"30k": 128, "100k": 290, "1M": 965, "10M": 3125}  # of two hidden layers, by the number of parameters
EXACTLY: dict[str, Any] = {"tol": 0.0, "strict": None}  # a fixed number of products


class Task:
    """Digits, a network with decay for each parameter and a weight for each training example."""

    lr = 0.1
    adam_settings: dict[str, Any] = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8}

    def __init__(self, width: int, examples: int, steps: int) -> None:
        torch.manual_seed(0)
        images, labels = digits(0)
        self.images, self.labels = images[:examples], labels[:examples]
        self.val_images, self.val_labels = images[examples : 2 * examples], labels[examples : 2 * examples]
        sizes = [64, width, width, 10]
        self.start: list[Tensor] = []
        for fan_in, fan_out in pairwise(sizes):
            self.start += [torch.randn(fan_out, fan_in) * fan_in**-0.5, torch.zeros(fan_out)]
        self.origin = list(self.start)
        self.hparams: Tensors = {"decay": torch.full((len(self.start),), -1.5), "weight": torch.ones(examples)}
        for _ in range(steps):
            self.start = [value - self.lr * grad for value, grad in zip(self.start, self.gradient(), strict=True)]
        self.adam_state = [self._moments(grad) for grad in self.gradient()]
        self.problem = Problem(
            lambda params, hparams: self.train(list(params.values()), hparams["decay"], hparams["weight"]),
            lambda params, _: self.val(list(params.values())),
        )

    @property
    def size(self) -> int:
        """The number of parameters."""
        return sum(value.numel() for value in self.start)

    def train(self, weights: Sequence[Tensor], decay: Tensor, weight: Tensor) -> Tensor:
        """Weighted cross-entropy with decay."""
        losses = F.cross_entropy(_logits(weights, self.images), self.labels, reduction="none")
        moves = zip(weights, self.origin, strict=True)
        squares = torch.stack([(value - origin).square().sum() for value, origin in moves])
        return (weight * losses).mean() + 0.5 * (decay.exp() * squares).sum()

    def val(self, weights: Sequence[Tensor]) -> Tensor:
        """Cross-entropy."""
        return F.cross_entropy(_logits(weights, self.val_images), self.val_labels)

    def gradient(self) -> tuple[Tensor, ...]:
        """One forward and backward pass."""
        leaves = [value.detach().requires_grad_() for value in self.start]
        return torch.autograd.grad(self.train(leaves, *self.hparams.values()), leaves)

    def _moments(self, grad: Tensor) -> dict[str, Tensor]:
        # As after a step whose gradient is of the usual size, so that the slope is not zero.
        square = grad.square().mean().clamp_min(1e-12).expand_as(grad) + grad.square()
        return {"exp_avg": 0.5 * grad, "exp_avg_sq": square.clone(), "grad": grad}

    def ours(self, name: str, **settings: Any) -> Estimate:
        """One of this library's estimators."""
        params = {str(index): value for index, value in enumerate(self.start)}
        return lambda: list(ESTIMATORS[name](self.problem, params, self.hparams, **settings).gradients.values())

    def sama(self) -> Sequence[Tensor]:
        """Ours, the slope included, which the other library computes in its call, too."""
        slopes = [adam_slope(state["grad"], state, **self.adam_settings) for state in self.adam_state]
        return self.ours("sama", slope={str(index): slope for index, slope in enumerate(slopes)})()

    def after(self, steps: int, estimate: Callable[[list[Tensor]], Any]) -> None:
        """Inner steps in place, as an optimizer takes them, and then an estimate."""
        weights = [value.clone().requires_grad_() for value in self.start]
        optimizer = torch.optim.SGD(weights, lr=self.lr)
        for _ in range(steps):
            optimizer.zero_grad()
            self.train(weights, *self.hparams.values()).backward()
            optimizer.step()
        optimizer.zero_grad()
        estimate([value.detach() for value in weights])


def _logits(weights: Sequence[Tensor], images: Tensor) -> Tensor:
    first, first_bias, second, second_bias, last, last_bias = weights
    hidden = F.linear(F.linear(images, first, first_bias).tanh(), second, second_bias).tanh()
    return F.linear(hidden, last, last_bias)


class Bench:
    """Times and weighs methods on one task, the first of them ours."""

    def __init__(self, task: Task, rounds: int, absent: dict[str, None]) -> None:
        self.task, self.rounds, self.absent = task, rounds, absent

    def present(self, peers: Sequence[Peer], number: int) -> dict[str, Estimate]:
        """The peers that are there; the others are noted."""
        found = {}
        for peer in peers:
            if (why := peer.missing()) is None:
                found[peer.label] = peer.estimate(self.task, number)
            else:
                self.absent[why] = None
        return found

    def rows(self, ours: dict[str, Estimate], peers: dict[str, Estimate], **facts: Any) -> list[dict[str, Any]]:
        """One row a method."""
        methods = {**ours, **peers}
        found = {name: [part.detach().clone() for part in method()] for name, method in methods.items()}
        timings = alternate({**methods, "gradient": self.task.gradient}, self.rounds)
        first = next(iter(ours))
        rows = []
        for name, method in methods.items():
            row = {**facts, "method": name, "seconds": float(f"{timings[name].median:.4g}")}
            row |= {"ours": round(timings[name].ratio, 3)}
            row |= {"passes": round(timings[name].ratio / timings["gradient"].ratio, 2)}
            row |= {"memory": round(peak_memory(method) / (4 * self.task.size), 2)}
            rows.append(row | {"difference": _difference(found[name], found[first])})
        return rows


def _difference(found: Sequence[Tensor], reference: Sequence[Tensor]) -> float:
    mine, theirs = (torch.cat([part.double().reshape(-1) for part in parts]) for parts in (found, reference))
    return float(f"{float((mine - theirs).norm() / theirs.norm()):.1e}")


def implicit(task: Task, products: Sequence[int], rounds: int, absent: dict[str, None]) -> list[dict[str, Any]]:
    """Conjugate gradients and Neumann series."""
    bench, rows = Bench(task, rounds, absent), []
    for number in products:
        facts = {"parameters": task.size, "products": number}
        ours = {"ift_cg": task.ours("ift_cg", maxiter=number, **EXACTLY)}
        rows += bench.rows(ours, bench.present(implicit_peers(), number), **facts)
        ours = {"ift_neumann": task.ours("ift_neumann", steps=number, alpha=task.lr)}
        rows += bench.rows(ours, bench.present(series_peers(), number), **facts)
    return rows


def differences(task: Task, rounds: int, absent: dict[str, None]) -> list[dict[str, Any]]:
    """Estimators with first derivatives alone."""
    bench, rows = Bench(task, rounds, absent), []
    for name, ours in {"darts_fd": task.ours("darts_fd"), "sama": task.sama}.items():
        peers = bench.present([finite_difference_peers()[name]], 1)
        rows += bench.rows({name: ours}, peers, parameters=task.size)
    return rows


def through_steps(task: Task, steps: Sequence[int], rounds: int, absent: dict[str, None]) -> list[dict[str, Any]]:
    """Reverse mode through the inner steps."""
    bench, rows = Bench(task, rounds, absent), []
    optimizer = functional_optimizer(sgd, lr=task.lr)
    for number in steps:
        ours = {"unrolled": task.ours("unrolled", steps=number, optimizer=optimizer)}
        peers = bench.present(unrolled_peers(), number)
        rows += bench.rows(ours, peers, parameters=task.size, inner_steps=number)
    return rows


def memory_after(task: Task, steps: Sequence[int]) -> list[dict[str, Any]]:
    """Peak memory of inner steps and an implicit hypergradient, against their number."""

    def estimate(weights: list[Tensor]) -> None:
        params = {str(index): value for index, value in enumerate(weights)}
        ESTIMATORS["ift_cg"](task.problem, params, task.hparams, maxiter=10, **EXACTLY)

    def peak(number: int, last: Callable[[list[Tensor]], Any]) -> float:
        return peak_memory(partial(task.after, number, last)) / (4 * task.size)

    rows: list[dict[str, Any]] = [{"method": "one step alone", "memory": peak(1, lambda _: None)}]
    rows += [{"method": "ift_cg(10)", "inner_steps": number, "memory": peak(number, estimate)} for number in steps]
    for row in rows:
        row["to_the_first_T"] = round(row["memory"] / rows[1]["memory"], 4)
        row["memory"] = round(row["memory"], 2)
    return [{"parameters": task.size, **row} for row in rows]


def main(arguments: Sequence[str] | None = None) -> None:
    rounds = ("--rounds", {"type": int, "default": 5, "help": "of the timings; 5 by default"})
    largest = ("--largest", {"choices": list(WIDTHS), "default": "1M", "help": "parameters; 1M by default"})
    chosen = parse(__doc__, arguments, rounds, largest)
    be_quiet()
    warnings.filterwarnings("ignore", message=".*functorch.*", category=FutureWarning)  # TorchOpt's
    names = list(WIDTHS)
    sizes = names[:1] if chosen.quick else names[1 : names.index(chosen.largest) + 1]
    examples, trained, rounds_run = (64, 20, 1) if chosen.quick else (128, 100, chosen.rounds)
    absent: dict[str, None] = {}
    rows: list[dict[str, Any]] = []
    facts: dict[str, Any] = {"differences": [], "unrolled": [], "memory": []}
    for size in sizes:
        task = Task(WIDTHS[size], examples, trained)
        rows += implicit(task, [2, 3] if chosen.quick else [5, 10, 20] if size == "1M" else [10], rounds_run, absent)
        facts["differences"] += differences(task, rounds_run, absent)
        if size != "10M":
            facts["unrolled"] += through_steps(task, [10, 100] if size == "100k" else [10], rounds_run, absent)
        if size in ("30k", "1M"):
            facts["memory"] = memory_after(task, [10, 20] if chosen.quick else [10, 100, 1000])
    facts |= {"peers": peer_versions(), "absent": list(absent)}
    for why in absent:
        console.print(f"left out: {why}")
    _print(rows, facts)
    conclude(__file__, chosen, rows, **facts)


def _print(rows: list[dict[str, Any]], facts: dict[str, Any]) -> None:
    method = {"parameters": ",", "method": ""}
    figures = {"seconds": ".4f", "ours": ".3f", "passes": ".2f", "memory": ".2f", "difference": ".0e"}
    show("A number of products", rows, {"products": "d", **method, **figures})
    show("Finite differences", facts["differences"], {**method, **figures})
    show("Through the inner steps", facts["unrolled"], {"inner_steps": "d", **method, **figures})
    show("Memory", facts["memory"], {"inner_steps": "d", **method, "memory": ".2f", "to_the_first_T": ".4f"})


if __name__ == "__main__":
    main()
