"""Whole training runs with `Hypergradient` on scikit-learn's digits: decay for each layer, and weights of examples."""

import time
from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_hpo import BilevelMixin, Hypergradient, HyperparameterSet, UnitInterval

__all__ = ["cleaning", "decay_run", "fit"]

WEIGHTS: dict[str, dict[str, Any]] = {
    "auto: ift_cg(5)": {"every_n_steps": 5},
    "darts_fd": {"estimator": "darts_fd", "every_n_steps": 2},
    "unrolled(1)": {"estimator": "unrolled", "estimator_args": {"steps": 1}, "every_n_steps": 1},
}


def digits(seed: int) -> tuple[Tensor, Tensor]:
    """Images and labels, shuffled."""
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    return torch.tensor(images / 16, dtype=torch.float32)[order], torch.tensor(labels)[order]


def fit(module: LightningModule, train: DataLoader[Any], val: DataLoader[Any], steps: int, *callbacks: Any) -> float:
    """Trains without looking at the validation set on the way, and says how long: seconds of CPU time."""
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    begun = time.process_time()
    trainer = Trainer(
        max_steps=steps,
        accelerator="cpu",
        devices=1,
        callbacks=list(callbacks),
        check_val_every_n_epoch=steps,
        num_sanity_val_steps=0,
        **quiet,  # type: ignore[arg-type]
    )
    trainer.fit(module, train, val)
    return time.process_time() - begun


@torch.no_grad()
def score(network: nn.Module, images: Tensor, labels: Tensor) -> tuple[float, float]:
    """Loss and accuracy."""
    logits = network(images)
    return F.cross_entropy(logits, labels).item(), (logits.argmax(1) == labels).double().mean().item()


class Layers(LightningModule):
    """Three layers, each a group of the optimizer; nothing here knows of hypergradients."""

    def __init__(self, decay: float) -> None:
        super().__init__()
        self.decay = decay
        self.network = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy."""
        return F.cross_entropy(self.network(batch[0]), batch[1])

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy."""
        return F.cross_entropy(self.network(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD with momentum."""
        layers = [layer for layer in self.network if isinstance(layer, nn.Linear)]
        groups = [{"params": list(layer.parameters()), "weight_decay": self.decay} for layer in layers]
        return torch.optim.SGD(groups, lr=0.1, momentum=0.9)


def decay_run(
    method: str, first: float, seed: int, steps: int, callback: Hypergradient | None = None
) -> dict[str, Any]:
    """300 training images, whole batches, from one decay for all layers: what comes of it."""
    images, labels = digits(seed)
    train = DataLoader(TensorDataset(images[:300], labels[:300]), batch_size=300)
    val = DataLoader(TensorDataset(images[300:800], labels[300:800]), batch_size=500)
    seed_everything(seed, verbose=False)
    module = Layers(first)
    spent = fit(module, train, val, steps, *([] if callback is None else [callback]))
    loss, _ = score(module.network, images[300:800], labels[300:800])
    right = score(module.network, images[800:], labels[800:])[1]
    learned: Any = [first] if callback is None else callback.hyperparameters()["weight_decay"]
    row = {
        "steps": steps,
        "method": method,
        "seed": seed,
        "val_loss": round(loss, 4),
        "test_accuracy": round(100 * right, 2),
    }
    return row | {"cpu_s": round(spent, 2), "decay": " ".join(f"{value:.1e}" for value in learned)}


class Weighted(BilevelMixin, LightningModule):
    """A classifier whose training loss gives every example a weight; without learning, given ones."""

    def __init__(self, width: int, weights: Tensor | None, **arguments: Any) -> None:
        super().__init__(**arguments)
        hidden = [nn.Linear(64, width), nn.ReLU()] if width else []
        self.network = nn.Sequential(*hidden, nn.Linear(width or 64, 10))
        self.fixed = weights
        self.hypers = HyperparameterSet(weight=UnitInterval(torch.full((1000,), 0.5)))

    def inner_loss(self, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """Weighted cross-entropy, and a little decay."""
        index, images, labels = batch
        weight = self.hypers["weight"][index] if self.fixed is None else self.fixed[index]
        decay = torch.stack([p.square().sum() for p in self.network.parameters()]).sum()
        return (weight * F.cross_entropy(self.network(images), labels, reduction="none")).mean() + 1e-3 * decay

    def outer_loss(self, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """Cross-entropy on clean labels."""
        return F.cross_entropy(self.network(batch[1]), batch[2])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD with momentum."""
        return torch.optim.SGD(self.network.parameters(), lr=0.2, momentum=0.9)

    def configure_callbacks(self) -> list[Any]:
        """None where the weights are given."""
        return list(super().configure_callbacks()) if self.fixed is None else []


def cleaning(seeds: int, steps: int) -> Iterator[dict[str, Any]]:
    """1000 examples, 40 % of them with a wrong label; 300 clean ones for validation, the rest for the test."""
    for width in (0, 64):
        for seed in range(seeds):
            images, labels = digits(seed)
            generator = torch.Generator().manual_seed(seed + 100)
            bad = torch.rand(1000, generator=generator) < 0.4
            wrong = (labels[:1000] + torch.randint(1, 10, (1000,), generator=generator)) % 10
            noisy = torch.where(bad, wrong, labels[:1000])
            train = TensorDataset(torch.arange(1000), images[:1000], noisy)
            val = TensorDataset(torch.arange(300), images[1000:1300], labels[1000:1300])
            given: dict[str, Any] = {"corrupted set": torch.ones(1000), "clean part only": (~bad).float()}
            for method in [*given, *WEIGHTS]:
                seed_everything(seed, verbose=False)
                arguments = {"lr": 0.3, **WEIGHTS.get(method, {})}
                module = Weighted(width, given.get(method), hypergradient_args=arguments)
                loaders = DataLoader(train, batch_size=200, shuffle=True), DataLoader(val, batch_size=300)
                spent = fit(module, *loaders, steps)
                right = score(module.network, images[1300:], labels[1300:])[1]
                found = None
                if method in WEIGHTS:
                    found = round(roc_auc_score(bad.numpy(), 1 - module.hypers["weight"].detach().numpy()), 4)
                yield {
                    "network": f"{width} hidden units" if width else "linear",
                    "method": method,
                    "seed": seed,
                    "auc": found,
                    "test_accuracy": round(100 * right, 2),
                    "cpu_s": round(spent, 2),
                }
