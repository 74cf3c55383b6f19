"""Digits as sequences with wrong labels, cleaned by weights of examples that BO-REP and relatives learn."""

import time
from collections.abc import Iterator
from typing import Any

import torch
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_hpo.functional.bilevel.bo_rep import SingleLoopBilevel

__all__ = ["cleaning"]

BATCH, RIDGE = 100, 1e-3 / 2
RUNS: dict[str, dict[str, Any]] = {
    "BO-REP": {},
    "not normalised (MA-SOBA)": {"normalize": False},
    "StocBio, 5 products": {"solver": "neumann", "normalize": False, "momentum": 0.0, "interval": 1},
}
AGAIN = (
    ("BO-REP", 0.5),
    ("BO-REP", 1.0),
    ("not normalised (MA-SOBA)", 100.0),
)  # with every seed; others with the first
# (method, lr, z_lr); StocBio's step size is the best of 100, 400 and 1500
GRID = [
    ("BO-REP", 0.25, 0.02),
    ("BO-REP", 0.5, 0.05),
    ("BO-REP", 0.5, 0.01),
    ("BO-REP", 1.0, 0.05),
    ("BO-REP", 2.0, 0.02),
    ("not normalised (MA-SOBA)", 12.5, 0.02),
    ("not normalised (MA-SOBA)", 100.0, 0.02),
    ("not normalised (MA-SOBA)", 800.0, 0.02),
    ("StocBio, 5 products", 400.0, 0.1),
]


class Rnn(nn.Module):
    """Rows of an image one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.RNN(8, 64, batch_first=True), nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Logits."""
        return self.head(self.rnn(images.view(-1, 8, 8))[0].amax(1))


def cleaning(seeds: int, steps: int) -> Iterator[dict[str, Any]]:
    """900 images, 40 % of them with a wrong label; 300 clean ones for validation, 597 for the test."""
    for seed in range(seeds):
        pixels, digits = load_digits(return_X_y=True)
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(digits), generator=generator)
        images, labels = torch.tensor(pixels / 16, dtype=torch.float32)[order], torch.tensor(digits)[order]
        bad = torch.rand(900, generator=generator) < 0.4
        noisy = torch.where(bad, (labels[:900] + torch.randint(1, 10, (900,), generator=generator)) % 10, labels[:900])
        parts = {"train": (images[:900], noisy), "val": (images[900:1200], labels[900:1200])}
        parts["test"] = (images[1200:], labels[1200:])
        yield _run("no cleaning", 0.0, 0.0, seed, steps, parts, bad)
        for method, lr, z_lr in [row for row in GRID if not seed or row[:2] in AGAIN]:
            yield _run(method, lr, z_lr, seed, steps, parts, bad)


def _run(
    method: str, lr: float, z_lr: float, seed: int, steps: int, parts: dict[str, tuple[Tensor, Tensor]], bad: Tensor
) -> dict[str, Any]:
    torch.manual_seed(seed)
    network = Rnn()
    generator = torch.Generator().manual_seed(seed + 1)

    def batches(part: str) -> Iterator[Tensor]:
        while True:
            yield torch.randint(len(parts[part][1]), (BATCH,), generator=generator)

    def losses(y: dict[str, Tensor], part: str, rows: Any) -> Tensor:
        images, labels = parts[part]
        return F.cross_entropy(torch.func.functional_call(network, y, (images[rows],)), labels[rows], reduction="none")

    def inner(y: dict[str, Tensor], x: dict[str, Tensor], rows: Tensor) -> Tensor:
        ridge = torch.stack([p.square().sum() for p in y.values()]).sum()
        weight = x["weight"][rows].sigmoid() if lr else 1.0
        return (weight * losses(y, "train", rows)).mean() + RIDGE * ridge

    settings: dict[str, Any] = {"lr": lr or 1.0, "inner_lr": 0.1, "z_lr": z_lr or 1.0, **RUNS.get(method, {})}
    engine = SingleLoopBilevel(inner, lambda y, _, rows: losses(y, "val", rows).mean(), **settings)
    state = engine.start(dict(network.named_parameters()), {"weight": torch.zeros(900)})
    train, val = batches("train"), batches("val")
    begun = time.process_time()
    products = settings.get("neumann_steps", 5) + 1 if settings.get("solver") == "neumann" else 1
    calls, reached = 0, None
    if not lr:
        state = engine.refine(state, train, steps=200 + steps // engine.interval * engine.inner_steps)
    else:
        state = engine.refine(state, train, steps=200)
        for step in range(steps):
            state, info = engine.step(state, train, val)
            calls += info.inner_steps + 2 + products  # gradients of both losses, and products
            if reached is None and step % 25 == 24 and losses(state.inner, "test", slice(None)).mean() <= 0.30:
                reached = calls
    spent = time.process_time() - begun
    with torch.no_grad():
        logits = torch.func.functional_call(network, state.inner, (parts["test"][0],))
    right = (logits.argmax(1) == parts["test"][1]).double().mean().item()
    auc = round(roc_auc_score(~bad.numpy(), state.outer["weight"].numpy()), 3) if lr else None
    return {
        "method": method,
        "lr": lr or None,
        "z_lr": z_lr or None,
        "seed": seed,
        "test_accuracy": round(right, 3),
        "test_loss": round(F.cross_entropy(logits, parts["test"][1]).item(), 3),
        "auc": auc,
        "calls_to_0.30": reached,
        "cpu_s": round(spent, 1),
    }
