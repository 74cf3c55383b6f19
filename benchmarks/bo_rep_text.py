"""Film reviews with an LSTM in a Trainer: an encoder as outer parameters, and weights of examples with wrong labels."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_hpo import (
    DataHyperCleaning,
    Hypergradient,
    IndexedDataset,
    NormalizedMomentum,
    SingleLoopHypergradient,
    SingleLoopMixin,
)
from lightning_hpo.demos import SST2DataModule
from lightning_hpo.held_out import HeldOutBatches

__all__ = ["text"]

EVERY = 2  # inner steps to an outer one
REFINE = {"representation": 20, "cleaning": 100}
GRIDS: dict[tuple[str, str], tuple[float, ...]] = {
    ("representation", "BO-REP"): (0.3, 1.0, 3.0),
    ("representation", "not normalised"): (3.0, 10.0, 30.0),
    ("representation", "alternating"): (3.0, 10.0, 30.0),
    ("representation", "alternating, fixed length"): (0.1, 0.3, 1.0),
    ("cleaning", "BO-REP"): (1.0, 3.0),
    ("cleaning", "not normalised"): (300.0, 1000.0),
    ("cleaning", "alternating"): (300.0, 1000.0),
}
# Gradients and products of an outer step: of both losses and one product; the encoder's alternation has one gradient.
CALLS = {("representation", "alternating"): 1, ("representation", "alternating, fixed length"): 1}


class Encoder(nn.Module):
    """Words to a vector: an LSTM's largest outputs."""

    def __init__(self, words: int, width: int = 32) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, width, padding_idx=0)
        self.lstm = nn.LSTM(width, width, batch_first=True)

    def forward(self, sentences: Tensor) -> Tensor:
        """Shape ``(batch, width)``."""
        outputs = self.lstm(self.embedding(sentences))[0]
        return outputs.masked_fill(sentences[..., None] == 0, -2.0).amax(1)


class Representation(SingleLoopMixin, LightningModule):
    """The head follows one half of the training sentences, the encoder the other half through the head."""

    def __init__(self, words: int) -> None:
        super().__init__()
        self.encoder, self.head = Encoder(words), nn.Linear(32, 2)

    def outer_loss(self, batch: Any) -> Tensor:
        """Cross-entropy."""
        return F.cross_entropy(self.head(self.encoder(batch[0])), batch[1])

    def inner_loss(self, batch: Any) -> Tensor:
        """Cross-entropy and a penalty on the head."""
        return self.outer_loss(batch) + 1e-3 * self.head.weight.square().sum()

    def configure_callbacks(self) -> list[Callback]:
        """None: the run brings its own."""
        return []

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD for the head."""
        return torch.optim.SGD(self.head.parameters(), lr=0.5)


class Cleaning(DataHyperCleaning):
    """Encoder and head are inner, weights of examples outer."""

    def configure_callbacks(self) -> list[Callback]:
        """None: the run brings its own."""
        return []

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD with momentum."""
        return torch.optim.SGD(self.network.parameters(), lr=0.2, momentum=0.9)


class Alternating(Callback):
    """The plain scheme for an encoder: a step of its own on validation batches, the head held still."""

    def __init__(self, lr: float, loader: DataLoader[Any], normalize: Any = False) -> None:
        self.lr, self.held_out, self.loader, self.normalize = lr, HeldOutBatches(), loader, normalize

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Makes the optimizer."""
        self.held_out.attach(self.loader)
        self.outer = list(pl_module.encoder.parameters())  # type: ignore[union-attr]
        self.optimizer = NormalizedMomentum(self.outer, self.lr, normalize=self.normalize)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Takes a step."""
        after = trainer.global_step - REFINE["representation"]
        if after > 0 and after % EVERY == 0:
            with torch.enable_grad():
                loss = pl_module.outer_loss(next(self.held_out))  # type: ignore[operator]
                grads = torch.autograd.grad(loss, self.outer)
            for parameter, gradient in zip(self.outer, grads, strict=True):
                parameter.grad = gradient
            self.optimizer.step()
            self.optimizer.zero_grad()


class Curve(Callback):
    """Outer loss on all held-out sentences against gradients and products."""

    def __init__(self, batch: tuple[Tensor, ...], refine: int, calls: int, points: int = 12) -> None:
        self.batch, self.refine, self.calls, self.points = batch, refine, calls, points
        self.found: list[tuple[int, float]] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Notes a point now and then."""
        step = trainer.global_step
        if step % max(1, trainer.max_steps // self.points) == 0:
            outer = max(0, step - self.refine) // EVERY
            with torch.no_grad():
                loss = pl_module.outer_loss(self.batch).item()  # type: ignore[operator]
            self.found.append((step + self.calls * outer, round(loss, 4)))


def text(seeds: int, steps: int, limit: int | None) -> Iterator[dict[str, Any]]:
    """Every step size with the first seed; the one with the lowest outer loss at the end with the others, too.

    All methods of a task get the same number of gradients and products, so cheaper ones take more steps.
    """
    data = SST2DataModule()
    data.setup()
    if data.train_set is None:
        raise RuntimeError("the sentences were not read")
    parts = [data.train_set.tensors, data.val_set.tensors, data.test_set.tensors]
    parts = [tuple(tensor[:limit] for tensor in part) for part in parts]
    for (task, method), grid in GRIDS.items():
        make: Callable[..., dict[str, Any]] = _represent if task == "representation" else _clean
        length = steps if task == "representation" else 3 * steps // 4
        length = length * (EVERY + 3) // (EVERY + CALLS.get((task, method), 3))
        rows = [make(method, lr, 0, length, parts, data.words) for lr in grid]
        best = min(rows, key=lambda row: row["outer_loss"])
        for row in rows:
            yield row | {"chosen": row is best}
        for seed in range(1, seeds):
            yield make(method, best["lr"], seed, length, parts, data.words) | {"chosen": True}


def _represent(
    method: str, lr: float, seed: int, steps: int, parts: list[tuple[Tensor, ...]], words: int
) -> dict[str, Any]:
    (sentences, labels), _, test = parts
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    support, query = ((sentences[rows], labels[rows]) for rows in order.chunk(2))
    val = DataLoader(TensorDataset(*query), batch_size=32)
    seed_everything(seed, verbose=False)
    module = Representation(words)
    with torch.no_grad():
        module.encoder.embedding.weight.mul_(0.1)
    outer: Callback = Alternating(lr, val, "global" if "fixed" in method else False)
    if not method.startswith("alternating"):
        normalize: Any = "global" if method == "BO-REP" else False
        settings: dict[str, Any] = {"every_n_steps": EVERY, "refine_steps": REFINE["representation"], "z_lr": 0.1}
        outer = SingleLoopHypergradient(("encoder",), lr=lr, normalize=normalize, **settings)
    return _fit("representation", method, lr, seed, steps, module, outer, support, val, query, test)


def _clean(
    method: str, lr: float, seed: int, steps: int, parts: list[tuple[Tensor, ...]], words: int
) -> dict[str, Any]:
    (sentences, labels), clean, test = parts
    generator = torch.Generator().manual_seed(seed)
    rows = torch.arange(len(labels))
    bad = torch.rand(len(rows), generator=generator) < 0.3
    noisy = torch.where(bad, 1 - labels[rows], labels[rows])
    val = DataLoader(TensorDataset(*clean), batch_size=128)
    seed_everything(seed, verbose=False)
    network = nn.Sequential(Encoder(words), nn.Linear(32, 2))
    module = Cleaning(network, len(rows), weight_decay=3e-4)
    shared: dict[str, Any] = {"every_n_steps": EVERY}
    outer: Callback
    if method == "alternating":  # the identity in the place of the inverse Hessian
        optimizer = lambda raws: torch.optim.SGD(raws, lr=lr, momentum=0.9, dampening=0.9)  # noqa: E731
        shared |= {"warmup_steps": REFINE["cleaning"], "estimator": "t1t2"}
        outer = Hypergradient(optimizer=optimizer, **shared)
    else:
        normalize: Any = "global" if method == "BO-REP" else False
        shared |= {"refine_steps": REFINE["cleaning"], "z_lr": 0.05}
        outer = SingleLoopHypergradient(lr=lr, normalize=normalize, **shared)
    row = _fit("cleaning", method, lr, seed, steps, module, outer, (sentences[rows], noisy), val, clean, test)
    return row | {"auc": round(roc_auc_score(~bad.numpy(), module.sample_weights().numpy()), 3)}


def _fit(
    task: str,
    method: str,
    lr: float,
    seed: int,
    steps: int,
    module: Any,
    outer: Callback,
    train: tuple[Tensor, ...],
    val: DataLoader[Any],
    scored: tuple[Tensor, ...],
    test: tuple[Tensor, ...],
) -> dict[str, Any]:
    curve = Curve(scored, REFINE[task], CALLS.get((task, method), 3))
    data: Any = TensorDataset(*train)
    data = IndexedDataset(data) if task == "cleaning" else data
    loader = DataLoader(data, batch_size=32 if task == "representation" else 128, shuffle=True)
    quiet: dict[str, Any] = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    )
    trainer = Trainer(
        max_steps=steps,
        accelerator="cpu",
        devices=1,
        callbacks=[outer, curve],
        check_val_every_n_epoch=steps,
        num_sanity_val_steps=0,
        **quiet,
    )
    begun = time.process_time()
    trainer.fit(module, loader, val)
    spent = time.process_time() - begun
    network = module.network if task == "cleaning" else nn.Sequential(module.encoder, module.head)
    with torch.no_grad():
        right = (network(test[0]).argmax(1) == test[1]).double().mean().item()
        loss = module.outer_loss(scored).item()
    row = {"task": task, "method": method, "lr": lr, "seed": seed, "outer_loss": round(loss, 4)}
    return row | {"test_accuracy": round(100 * right, 2), "cpu_s": round(spent, 1), "curve": curve.found}
