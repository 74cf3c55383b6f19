"""Digits as sequences with wrong labels, cleaned by weights of examples that BO-REP and relatives learn.

1. `rows`: test loss, and how well weights tell wrong labels, over an eightfold range of step sizes, beside MA-SOBA and
   StocBio. BO-REP's steps of constant length have two seeds each.
2. `spread`: what three seeds give.
3. `scaled`: what it changes to multiply the outer loss by 1000.
"""

import math
import time
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from common import conclude, parse, show
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_hpo.functional.bilevel.bo_rep import SingleLoopBilevel
from lightning_hpo.functional.bilevel.weight_auc import weight_auc

BATCH, RIDGE = 100, 1e-3 / 2
RUNS: dict[str, dict[str, Any]] = {
    "BO-REP": {},
    "BO-REP, cosine": {},
    "not normalised (MA-SOBA)": {"normalize": False},
    "StocBio, 5 products": {"solver": "neumann", "normalize": False, "momentum": 0.0, "interval": 1},
}
# (method, lr, z_lr)
GRID = [
    ("BO-REP", 0.25, 0.02),
    ("BO-REP", 0.5, 0.05),
    ("BO-REP", 0.5, 0.01),
    ("BO-REP", 1.0, 0.05),
    ("BO-REP", 2.0, 0.02),
    ("BO-REP, cosine", 1.0, 0.05),
    ("BO-REP, cosine", 2.0, 0.02),
    ("not normalised (MA-SOBA)", 12.5, 0.02),
    ("not normalised (MA-SOBA)", 100.0, 0.02),
    ("not normalised (MA-SOBA)", 800.0, 0.02),
    ("StocBio, 5 products", 400.0, 0.1),  # the best of 100, 400 and 1500
]
# With every seed; the others with the first.
AGAIN = {("BO-REP", lr) for lr in (0.25, 0.5, 1.0, 2.0)} | {("not normalised (MA-SOBA)", 100.0)}
SPREAD = [("BO-REP", 1.0, 0.05), ("BO-REP, cosine", 1.0, 0.05)]  # with more seeds


class Rnn(nn.Module):
    """Rows of an image one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.RNN(8, 64, batch_first=True), nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Logits."""
        return self.head(self.rnn(images.view(-1, 8, 8))[0].amax(1))


class Data:
    """900 images, 40 % of them with a wrong label; 300 clean ones for validation, 597 for the test."""

    def __init__(self, seed: int) -> None:
        pixels, digits = load_digits(return_X_y=True)
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(digits), generator=generator)
        images, labels = torch.tensor(pixels / 16, dtype=torch.float32)[order], torch.tensor(digits)[order]
        self.bad = torch.rand(900, generator=generator) < 0.4
        wrong = (labels[:900] + torch.randint(1, 10, (900,), generator=generator)) % 10
        self.train = (images[:900], torch.where(self.bad, wrong, labels[:900]))
        self.val = (images[900:1200], labels[900:1200])
        self.test = (images[1200:], labels[1200:])


class Cleaning:
    """The two losses, and batches that are drawn with replacement."""

    def __init__(self, data: Data, seed: int, learned: bool = True, scale: float = 1.0, double: bool = False) -> None:
        torch.manual_seed(seed)
        self.data, self.learned, self.scale = data, learned, scale
        self.kind = torch.float64 if double else torch.float32
        self.network = Rnn().to(self.kind)
        self.generator = torch.Generator().manual_seed(seed + 1)
        self.weights = torch.zeros(900, dtype=self.kind)

    def batches(self, size: int) -> Iterator[Tensor]:
        """Rows."""
        while True:
            yield torch.randint(size, (BATCH,), generator=self.generator)

    def losses(self, y: dict[str, Tensor], part: tuple[Tensor, Tensor], rows: Any) -> Tensor:
        """Cross-entropies."""
        logits = torch.func.functional_call(self.network, y, (part[0][rows].to(self.kind),))
        return F.cross_entropy(logits, part[1][rows], reduction="none")

    def inner(self, y: dict[str, Tensor], x: dict[str, Tensor], rows: Tensor) -> Tensor:
        """Weighted cross-entropy and the ridge; weights that are not learned are 1 / 2, where the others begin."""
        ridge = torch.stack([p.square().sum() for p in y.values()]).sum()
        weight = x["weight"][rows].sigmoid() if self.learned else 0.5
        return (weight * self.losses(y, self.data.train, rows)).mean() + RIDGE * ridge

    def outer(self, y: dict[str, Tensor], _: dict[str, Tensor], rows: Tensor) -> Tensor:
        """Cross-entropy of clean images."""
        return self.scale * self.losses(y, self.data.val, rows).mean()


def cleaning(seeds: int, steps: int) -> Iterator[dict[str, Any]]:
    """Without cleaning and the chosen rows with every seed, the others with the first."""
    for seed in range(seeds):
        yield _run("no cleaning", None, None, seed, steps)
        for method, lr, z_lr in GRID:
            if not seed or (method, lr) in AGAIN:
                yield _run(method, lr, z_lr, seed, steps)


def spread(rows: list[dict[str, Any]], seeds: int, steps: int) -> Iterator[dict[str, Any]]:
    """What other seeds give: rows that are there already are not run again."""
    for method, lr, z_lr in SPREAD:
        known = {row["seed"]: row for row in rows if (row["method"], row["lr"], row["z_lr"]) == (method, lr, z_lr)}
        found = [known[seed] if seed in known else _run(method, lr, z_lr, seed, steps) for seed in range(seeds)]
        row: dict[str, Any] = {"method": method, "lr": lr, "z_lr": z_lr, "seeds": seeds}
        for key in ("test_accuracy", "test_loss", "auc"):
            values = sorted(each[key] for each in found)
            row[key] = round(sum(values) / seeds, 3)
            row[f"{key}_range"] = f"{values[0]:.3f} to {values[-1]:.3f}"
        yield row


def scaled(steps: int) -> Iterator[dict[str, Any]]:
    """How far weights are after the outer loss was multiplied by 1000, relative to how far they have moved."""
    for method, lr, z_lr in (("BO-REP", 0.5, 0.05), ("not normalised (MA-SOBA)", 100.0, 0.02)):
        ends = []
        for scale in (1.0, 1000.0):
            task = Cleaning(Data(0), 0, scale=scale, double=True)
            engine = SingleLoopBilevel(task.inner, task.outer, lr=lr, inner_lr=0.1, z_lr=z_lr, **RUNS[method])
            state = engine.start(dict(task.network.named_parameters()), {"weight": task.weights})
            train, val = task.batches(900), task.batches(300)
            state = engine.refine(state, train, steps=20)
            for _ in range(steps):
                state, _info = engine.step(state, train, val)
            ends.append(state.outer["weight"])
        moved = ((ends[0] - ends[1]).norm() / ends[0].norm()).item()
        yield {"method": method, "lr": lr, "z_lr": z_lr, "steps": steps, "relative_difference": float(f"{moved:.1e}")}


def _run(method: str, lr: float | None, z_lr: float | None, seed: int, steps: int) -> dict[str, Any]:
    data = Data(seed)
    task = Cleaning(data, seed, learned=lr is not None)
    settings: dict[str, Any] = {"lr": lr or 1.0, "inner_lr": 0.1, "z_lr": z_lr or 1.0, **RUNS.get(method, {})}
    engine = SingleLoopBilevel(task.inner, task.outer, **settings)
    state = engine.start(dict(task.network.named_parameters()), {"weight": task.weights})
    train, val = task.batches(900), task.batches(300)
    begun = time.process_time()
    products = settings.get("neumann_steps", 5) + 1 if settings.get("solver") == "neumann" else 1
    calls, reached, everything = 0, None, slice(None)
    if lr is None:
        state = engine.refine(state, train, steps=200 + steps // engine.interval * engine.inner_steps)
    else:
        state = engine.refine(state, train, steps=200)
        for step in range(steps):
            size = lr * (1 + math.cos(math.pi * step / steps)) / 2 if method.endswith("cosine") else lr
            state, info = engine.step(state, train, val, lr=size)
            calls += info.inner_steps + 2 + products  # gradients of both losses, and products
            if reached is None and step % 25 == 24:
                with torch.no_grad():
                    reached = calls if task.losses(state.inner, data.test, everything).mean() <= 0.30 else None
    spent = time.process_time() - begun
    with torch.no_grad():
        logits = torch.func.functional_call(task.network, state.inner, (data.test[0],))
    right = (logits.argmax(1) == data.test[1]).double().mean().item()
    return {
        "method": method,
        "lr": lr,
        "z_lr": z_lr,
        "seed": seed,
        "test_accuracy": round(right, 3),
        "test_loss": round(F.cross_entropy(logits, data.test[1]).item(), 3),
        "auc": round(weight_auc(state.outer["weight"], data.bad).item(), 3) if lr else None,
        "calls_to_0.30": reached,
        "cpu_s": round(spent, 1),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    chosen = parse(__doc__, arguments)
    warnings.filterwarnings("ignore", message=".*z has grown 10-fold.*")  # what the un-normalised runs are there for
    seeds, steps = (1, 10) if chosen.quick else (2, 1500)
    facts: dict[str, Any] = {"scaled": list(scaled(10 if chosen.quick else 300))}
    rows = list(cleaning(seeds, steps))
    facts["spread"] = list(spread(rows, 1 if chosen.quick else 3, steps))
    show("The outer loss times 1000", facts["scaled"], {"method": "", "lr": "g", "relative_difference": ".0e"})
    columns = {"method": "", "lr": "g", "z_lr": "g", "seed": "d", "test_accuracy": ".3f", "test_loss": ".3f"}
    show("Digits with wrong labels", rows, columns | {"auc": ".3f", "calls_to_0.30": "d", "cpu_s": ".1f"})
    conclude(__file__, chosen, rows, **facts)


if __name__ == "__main__":
    main()
