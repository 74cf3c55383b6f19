"""Do dropout rates that tune themselves do as well as rates that were searched for, and what does a step cost?

The digits as in `docs/methods/self_tuning_networks.md`: three rates from 0.05, in both modes and with both encodings,
beside fixed rates; Δ-STN also with a second pass that sees the whole batch, a third or a quarter of it, where it sees
half by default. Then the cost of a step in units of a plain one.
"""

import logging
import time
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import conclude, parse, show
from lightning.pytorch import Callback, LightningModule, Trainer
from matplotlib.figure import Figure
from self_tuning_cost import cost_rows
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_hpo import HyperparameterSet, Interval, SelfTuning
from lightning_hpo.nn.self_tuning_regularisers import TunedDropout

ASSETS = Path(__file__).parents[1] / "docs" / "assets"
TUNED = {
    "Δ-STN": {"mode": "delta", "encoding": "cos_sin"},
    "Δ-STN, identity": {"mode": "delta", "encoding": "identity"},
    "STN": {"mode": "stn", "encoding": "cos_sin"},
    "STN, identity": {"mode": "stn", "encoding": "identity"},
}
PARTS = {f"Δ-STN, response_parts={parts}": {"mode": "delta", "response_parts": parts} for parts in (1, 3, 4)}
FIXED = ((0.0, 0.0, 0.0), (0.05, 0.05, 0.05), (0.1, 0.3, 0.3), (0.2, 0.5, 0.5))


def digits() -> list[TensorDataset]:
    """300 images for training, 600 for validation, 897 for the test; the same whatever the seed of a run."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.RandomState(0).permutation(len(images))
    x, y = torch.tensor(images[order] / 16, dtype=torch.float32), torch.tensor(labels[order])
    return [TensorDataset(x[part], y[part]) for part in (slice(300), slice(300, 900), slice(900, None))]


class Digits(LightningModule):
    """Three layers, each behind a dropout whose rate is fixed or tuned."""

    def __init__(self, fixed: Sequence[float] | None = None) -> None:
        super().__init__()
        if fixed is None:
            hypers = self.hypers = HyperparameterSet(**{f"rate_{i}": Interval(0.05, 0.0, 0.95) for i in range(3)})
            drops = [TunedDropout(partial(hypers.__getitem__, name)) for name in hypers]
        else:
            drops = [TunedDropout(rate) for rate in fixed]
        hidden = [drops[0], nn.Linear(64, 256), nn.ReLU(), drops[1], nn.Linear(256, 256), nn.ReLU()]
        self.net = nn.Sequential(*hidden, drops[2], nn.Linear(256, 10))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Cross-entropy."""
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Cross-entropy."""
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        """SGD with momentum."""
        return torch.optim.SGD(self.net.parameters(), lr=0.01, momentum=0.9)


class Course(Callback):
    """Validation and test loss, accuracy and hyperparameters after every epoch."""

    def __init__(self, method: SelfTuning | None, val: TensorDataset, test: TensorDataset) -> None:
        self.method, self.val, self.test = method, val, test
        self.epochs: list[tuple[float, float, float]] = []
        self.values: list[dict[str, Any]] = []

    @torch.no_grad()
    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Scores the network as it stands."""
        pl_module.eval()
        (x_val, y_val), (x_test, y_test) = self.val.tensors, self.test.tensors
        logits = pl_module.net(x_test)
        losses = F.cross_entropy(pl_module.net(x_val), y_val).item(), F.cross_entropy(logits, y_test).item()
        self.epochs.append((*losses, (logits.argmax(1) == y_test).float().mean().item()))
        self.values.append(self.method.hyperparameters() if self.method is not None else {})
        pl_module.train()


def run(name: str, seed: int, epochs: int, fixed: Sequence[float] | None = None) -> tuple[dict[str, Any], Course]:
    """One run: its row, and its course."""
    train, val, test = digits()
    torch.manual_seed(seed)
    settings: Any = {**TUNED, **PARTS}.get(name, {})
    method = None if fixed is not None else SelfTuning(warmup_steps=50, train_steps=5, **settings)
    course = Course(method, val, test)
    quiet: dict[str, Any] = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar"), False)
    quiet |= {"enable_model_summary": False, "accelerator": "cpu", "num_sanity_val_steps": 0}
    trainer = Trainer(
        max_epochs=epochs,
        check_val_every_n_epoch=10_000,
        callbacks=[*([] if method is None else [method]), course],
        **quiet,
    )
    began = time.process_time()
    trainer.fit(Digits(fixed), DataLoader(train, 32, shuffle=True), DataLoader(val, 128))
    spent = time.process_time() - began
    loss, test_loss, accuracy = min(course.epochs)
    row: dict[str, Any] = {"method": name, "seed": seed, "val_loss": loss, "test_loss": test_loss}
    row |= {"test_accuracy": accuracy, "cpu_s": spent}
    return row, course


def summary(rows: list[dict[str, Any]], courses: dict[str, list[Course]]) -> list[dict[str, Any]]:
    """Means over seeds, and where rates and scales ended."""
    found = []
    for name in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == name]
        means = {
            key: round(float(np.mean([r[key] for r in own])), 4) for key in ("val_loss", "test_loss", "test_accuracy")
        }
        ends = [course.values[-1] for course in courses[name]]
        rates = [value for end in ends for key, value in end.items() if key.startswith("rate")]
        scales = [value for end in ends for key, value in end.items() if key.startswith("scale")]
        found.append(
            {
                "method": name,
                "seeds": len(own),
                **means,
                "rates": f"{min(rates):.2f} to {max(rates):.2f}" if rates else None,
                "scales": f"{min(scales):.1f} to {max(scales):.1f}" if scales else None,
                "cpu_s": round(float(np.mean([row["cpu_s"] for row in own])), 1),
            }
        )
    return found


def draw(courses: dict[str, list[Course]], path: Path) -> None:
    """Rates and scales over epochs: a column a method, a line a rate and seed."""
    figure = Figure(figsize=(11, 5), layout="constrained")
    axes = figure.subplots(2, len(TUNED), sharex=True, sharey="row", squeeze=False)
    for column, name in enumerate(TUNED):
        for course in courses[name]:
            for index in range(3):
                axes[0][column].plot([v[f"rate_{index}"] for v in course.values], color=f"C{index}", lw=1)
                axes[1][column].plot([v[f"scale.rate_{index}"] for v in course.values], color=f"C{index}", lw=1)
        axes[0][column].set_title(name)
        axes[1][column].set_xlabel("epoch")
    axes[0][0].set_ylabel("rate")
    axes[1][0].set_ylabel("scale of the perturbation")
    figure.legend(axes[0][0].lines[:3], ["input", "first hidden", "second hidden"], loc="outside right upper")
    figure.savefig(path)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs everything."""
    chosen = parse(__doc__, arguments)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    seeds, epochs = (1, 6) if chosen.quick else (3, 80)
    rows: list[dict[str, Any]] = []
    courses: dict[str, list[Course]] = {}
    fixed = {f"fixed {', '.join(f'{rate:g}' for rate in rates)}": rates for rates in FIXED}
    for name in (*TUNED, *PARTS, *fixed):
        for seed in range(seeds):
            row, course = run(name, seed, epochs, fixed.get(name))
            rows.append(row)
            courses.setdefault(name, []).append(course)
    means = summary(rows, courses)
    columns = {"val_loss": ".4f", "test_loss": ".4f", "test_accuracy": ".4f", "rates": "", "scales": "", "cpu_s": ".1f"}
    show("Digits, means over seeds", means, {"method": "", "seeds": "d", **columns})
    cost = cost_rows(chosen.quick)
    show("Cost", cost, {"layers": "", "what": "", "ms": ".3f", "time_ratio": ".2f", "memory_ratio": ".2f"})
    if not chosen.quick:
        draw(courses, ASSETS / "self_tuning_networks_digits.png")
    single = [{key: round(v, 4) if isinstance(v, float) else v for key, v in row.items()} for row in rows]
    conclude(__file__, chosen, means, runs=single, cost=cost)


if __name__ == "__main__":
    main()
