"""A transformer on digits as sequences of rows, in an ordinary Trainer: the encoder outer, or a part of it inner."""

import time
from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_hpo import SingleLoopHypergradient, SingleLoopMixin

__all__ = ["transformer"]

# (what is outer, product, normalised, length or size of a step)
RUNS: list[tuple[tuple[str, ...], str, Any, float]] = [
    (("rows", "encoder"), "exact", "global", 0.03),
    (("rows", "encoder"), "exact", "global", 0.1),
    (("rows", "encoder"), "exact", "global", 0.3),
    (("rows", "encoder"), "exact", False, 0.1),
    (("rows", "encoder"), "exact", False, 1.0),
    (("rows", "encoder"), "fd", "global", 0.1),
    (("rows",), "exact", "global", 0.1),
    (("rows",), "fd", "global", 0.1),
]


class Reader(SingleLoopMixin, LightningModule):
    """Rows of an image as words; two blocks; a head."""

    def __init__(self, outer: tuple[str, ...], lr: float) -> None:
        super().__init__()
        self.outer, self.lr = outer, lr
        self.rows, self.places = nn.Linear(8, 32), nn.Parameter(torch.randn(8, 32) / 4)
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(32, 10)

    def outer_parameters(self) -> list[nn.Parameter]:
        """Those of the parts that are outer."""
        return [p for part in self.outer for p in self.get_submodule(part).parameters()]

    def forward(self, images: Tensor) -> Tensor:
        """Logits."""
        return self.head(self.encoder(self.rows(images.view(-1, 8, 8)) + self.places).mean(1))

    def outer_loss(self, batch: Any) -> Tensor:
        """Cross-entropy."""
        return F.cross_entropy(self(batch[0]), batch[1])

    def inner_loss(self, batch: Any) -> Tensor:
        """Cross-entropy and a penalty on what is inner."""
        own = {id(p) for p in self.outer_parameters()}
        squares = [p.square().sum() for p in self.parameters() if id(p) not in own]
        return self.outer_loss(batch) + 5e-4 * torch.stack(squares).sum()

    def configure_callbacks(self) -> list[Callback]:
        """None: the run brings its own."""
        return []

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD for what is inner."""
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def transformer(seeds: int, steps: int) -> Iterator[dict[str, Any]]:
    """600 images for what is inner, 600 for what is outer, 597 for the test; means over seeds."""
    for outer, product, normalize, lr in RUNS:
        found = [_run(outer, product, normalize, lr, seed, steps) for seed in range(seeds)]
        row: dict[str, Any] = {"outer": " and ".join(outer), "method": "BO-REP" if normalize else "not normalised"}
        row |= {"product": product, "lr": lr, "seeds": seeds}
        for key, digits in (("outer_loss", 3), ("test_loss", 3), ("test_accuracy", 1), ("cpu_s", 1)):
            row[key] = round(sum(each[key] for each in found) / seeds, digits)
        losses = [each["test_loss"] for each in found]
        yield row | {"test_loss_range": f"{min(losses):.3f} to {max(losses):.3f}"}


def _run(outer: tuple[str, ...], product: Any, normalize: Any, lr: float, seed: int, steps: int) -> dict[str, Any]:
    pixels, digits = load_digits(return_X_y=True)
    order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(seed))
    images, labels = torch.tensor(pixels / 16, dtype=torch.float32)[order], torch.tensor(digits)[order]
    train, val = (TensorDataset(images[rows], labels[rows]) for rows in (slice(600), slice(600, 1200)))
    seed_everything(seed, verbose=False)
    attentive = "encoder" not in outer  # blocks are more curved than a head
    module = Reader(outer, lr=0.05 if attentive else 0.1)
    settings: dict[str, Any] = {"every_n_steps": 2, "refine_steps": 20, "z_lr": 0.02 if attentive else 0.1}
    callback = SingleLoopHypergradient(lr=lr, normalize=normalize, product=product, **settings)
    quiet: dict[str, Any] = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    )
    trainer = Trainer(
        max_steps=steps,
        accelerator="cpu",
        devices=1,
        callbacks=[callback],
        check_val_every_n_epoch=steps,
        num_sanity_val_steps=0,
        **quiet,
    )
    begun = time.process_time()
    trainer.fit(module, DataLoader(train, batch_size=64, shuffle=True), DataLoader(val, batch_size=64))
    spent = time.process_time() - begun
    module.eval()
    with torch.no_grad():
        test = (images[1200:], labels[1200:])
        right = (module(test[0]).argmax(1) == test[1]).double().mean().item()
        losses = {"outer_loss": module.outer_loss(val.tensors).item(), "test_loss": module.outer_loss(test).item()}
    return losses | {"test_accuracy": 100 * right, "cpu_s": spent}
