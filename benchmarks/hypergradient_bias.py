"""What one hypergradient costs with each estimator, and how far it points from the exact one."""

from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from common import alternate, peak_memory
from hypergradient_figures import solve
from hypergradient_runs import digits
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_hpo.functional.bilevel.estimators import ESTIMATORS, HypergradientResult, Problem
from lightning_hpo.functional.bilevel.optimizer_steps import adam, functional_optimizer, sgd
from lightning_hpo.functional.bilevel.problem import Tensors
from lightning_hpo.functional.bilevel.sama import step_slope

__all__ = ["estimators"]

LR, GROUPS, AHEAD = (
    0.25,
    20,
    1000,
)  # of the inner steps; weights of so many groups of 15 examples are the hyperparameters
FOLLOW = {"optimizer": functional_optimizer(sgd, lr=LR)}
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "t1t2": ("t1t2", {}),
    "darts_fd": ("darts_fd", {}),
    "sama": ("sama", {}),
    **{f"ift_neumann({n})": ("ift_neumann", {"steps": n, "alpha": LR}) for n in (3, 10, 30)},
    **{f"ift_cg({n})": ("ift_cg", {"maxiter": n, "tol": 0.0, "strict": None}) for n in (5, 10, 20, 50)},
    "ift_cg(10), fd": ("ift_cg", {"maxiter": 10, "tol": 0.0, "strict": None, "product": "fd"}),
    "ift_normal_cg(10)": ("ift_normal_cg", {"maxiter": 10, "tol": 0.0, "strict": None}),
    "ift_gmres(10)": ("ift_gmres", {"maxiter": 10, "strict": None}),
    "ift_bicgstab(10)": ("ift_bicgstab", {"maxiter": 10, "tol": 0.0, "strict": None}),
    **{f"unrolled({n})": ("unrolled", {"steps": n, **FOLLOW}) for n in (1, 10, 50)},
    "truncated(50, 10)": ("truncated", {"steps": 50, "keep": 10, **FOLLOW}),
    "forward(10)": ("forward", {"steps": 10, **FOLLOW}),
    "es(10)": ("es", {"steps": 10, "sigma": 0.1, **FOLLOW}),
    "pes(50, 10)": ("pes", {"horizon": 50, "truncation": 10, "sigma": 0.1, **FOLLOW}),
}


class Task:
    """300 digits, the labels of a quarter drawn anew, a weight for each group; 500 others for validation."""

    def __init__(self, *widths: int, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        images, self.labels = digits(0)
        self.images = images.to(dtype)
        self.noisy = self.labels[:300].clone()
        self.noisy[:75] = torch.randint(0, 10, (75,))
        sizes = [64, *widths, 10]
        layers = [nn.Linear(a, b, dtype=dtype) for a, b in pairwise(sizes)]
        self.network = nn.Sequential(*[part for layer in layers for part in (layer, nn.Tanh())][:-1])
        self.params: Tensors = {name: p.detach().clone() for name, p in self.network.named_parameters()}
        self.hparams: Tensors = {"weight": torch.zeros(GROUPS, dtype=dtype)}
        self.problem = Problem(self.train, self.val)

    def train(self, params: Tensors, hparams: Tensors, rows: slice | Tensor = slice(0, 300)) -> Tensor:
        """Weighted cross-entropy with decay."""
        weight = hparams["weight"].exp().repeat_interleave(300 // GROUPS)[rows]
        logits = torch.func.functional_call(self.network, params, (self.images[:300][rows],))
        losses = F.cross_entropy(logits, self.noisy[rows], reduction="none")
        return (weight * losses).mean() + 5e-3 * torch.stack([p.square().sum() for p in params.values()]).sum()

    def val(self, params: Tensors, hparams: Tensors) -> Tensor:
        """Cross-entropy on clean labels."""
        logits = torch.func.functional_call(self.network, params, (self.images[300:800],))
        return F.cross_entropy(logits, self.labels[300:800])

    def gradient(self, params: Tensors, rows: slice | Tensor = slice(0, 300)) -> Tensors:
        """One forward and backward pass."""
        leaves = {name: value.detach().requires_grad_() for name, value in params.items()}
        grads = torch.autograd.grad(self.train(leaves, self.hparams, rows), list(leaves.values()))
        return dict(zip(leaves, grads, strict=True))

    def descend(self, params: Tensors, steps: int) -> Tensors:
        """Gradient steps."""
        for _ in range(steps):
            grads = self.gradient(params)
            params = {name: value - LR * grads[name] for name, value in params.items()}
        return params

    def slope(self, params: Tensors) -> Tensors:
        """The slope of Adam's step, with moments of mini-batches' gradients at these parameters."""
        settings: dict[str, Any] = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8}
        states: dict[str, dict[str, Tensor]] = {name: {} for name in params}
        grads = self.gradient(params)
        for _ in range(100):
            grads = self.gradient(params, torch.randperm(300)[:64])
            states = {name: adam(params[name], grads[name], states[name], **settings)[1] for name in params}
        return {name: step_slope(adam, params[name], grads[name], states[name], settings) for name in params}


def calls(task: Task, params: Tensors) -> Mapping[str, Callable[[], HypergradientResult]]:
    """Every estimator at one point, ready to be called."""
    found: dict[str, Callable[[], HypergradientResult]] = {}
    for label, (name, settings) in SETTINGS.items():
        extra = {"slope": task.slope(params)} if name == "sama" else {}
        found[label] = partial(ESTIMATORS[name], task.problem, params, task.hparams, **settings, **extra)
    return found


def cosines(task: Task, params: Tensors, reference: tuple[str, dict[str, Any]]) -> dict[str, float]:
    """Of each estimator's answer to that of the reference, at one point."""
    inputs = task.problem, params, task.hparams
    true = ESTIMATORS[reference[0]](*inputs, **reference[1]).gradients["weight"]
    answers = {name: call().gradients["weight"] for name, call in calls(task, params).items()}
    answers["ift_exact"] = ESTIMATORS["ift_exact"](*inputs).gradients["weight"]
    return {name: round(F.cosine_similarity(answer, true, dim=0).item(), 3) for name, answer in answers.items()}


def estimators(quick: bool) -> list[dict[str, Any]]:
    """Cost on a network that is wide enough to be timed, directions on one small enough to be solved exactly."""
    small = Task(16, dtype=torch.float64)
    early = small.descend(small.params, 5 if quick else 50)
    late = solve(small.problem.train_loss, small.descend(early, 5 if quick else 5000), small.hparams)
    ahead: dict[str, Any] = {"steps": 5 if quick else AHEAD, **FOLLOW}
    towards = {
        "cosine_late": cosines(small, late, ("ift_exact", {})),
        "cosine_early": cosines(small, early, ("ift_exact", {})),
        "cosine_ahead": cosines(small, early, ("unrolled", ahead)),
    }
    wide = Task(*((16,) if quick else (512, 512)), dtype=torch.float32)
    plain = partial(wide.gradient, wide.params)
    ready = calls(wide, wide.params)
    timings = alternate({"": plain, **ready}, rounds=1 if quick else 3)
    base = peak_memory(plain)
    rows: list[dict[str, Any]] = []
    for name in towards["cosine_late"]:
        known = name in ready  # a dense solve of the wide network is out of reach
        cost = round(timings[name].ratio, 2) if known else None
        memory = round(peak_memory(ready[name]) / base, 2) if known else None
        row = {"estimator": name, "cost": cost, "memory": memory}
        rows.append(row | {key: values[name] for key, values in towards.items()})
    return rows
