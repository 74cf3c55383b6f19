"""Gradient noise on one stream of gradients: our estimate, AdaptDL's formula written out slowly, the exact value."""

import math
from typing import Any

import torch
from batch_runs import Data, Method, train
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_hpo import AdaptiveBatchSize

KEEP = 0.999  # AdaptDL's decay in a step of the first batch size


class TwoBatch(Callback):
    r"""AdaptDL's noise scale: small and large batches of every step, and running averages of both statistics.

    With :math:`|g_m|^2` the mean over micro-batches of :math:`m` samples, and :math:`|g_b|^2` of their mean,
    :math:`S = (|g_m|^2 - |g_b|^2) / (1/m - 1/b)` and :math:`G = (b |g_b|^2 - m |g_m|^2) / (b - m)` (McCandlish et al.,
    2018); each average decays by :math:`0.999^{b/b_0}` a step.
    """

    def __init__(self, data: Data, every: int) -> None:
        self.data, self.every = data, every
        self.rows: list[dict[str, float]] = []
        self.samples = self.first = 0
        self.weight = 0.0
        self.averages = [0.0, 0.0]
        self._begin()

    def _begin(self) -> None:
        self.groups: list[Tensor] = []
        self.sizes: list[int] = []
        self.before: Tensor | None = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Counts."""
        self.sizes.append(len(batch[1]))

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The micro-batch's own gradient: what was added to the sum, without Lightning's division."""
        total = torch.cat([p.grad.flatten().double() for p in pl_module.parameters() if p.grad is not None])
        alone = total if self.before is None else total - self.before
        self.groups.append(alone * trainer.accumulate_grad_batches)
        self.before = total.clone()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Both estimates of this step, and the averages."""
        sizes, groups = self.sizes, self.groups
        self._begin()
        batch, micro = sum(sizes), sizes[0]
        self.samples += batch
        if len(sizes) < 2 or len(set(sizes)) > 1 or len(sizes) != trainer.accumulate_grad_batches:
            return
        small = sum(float(g @ g) for g in groups) / len(groups)
        mean = sum(groups[1:], groups[0]) / len(groups)
        large = float(mean @ mean)
        trace = (small - large) / (1 / micro - 1 / batch)
        square = (batch * large - micro * small) / (batch - micro)
        self.first = self.first or batch
        keep = KEEP ** (batch / self.first)
        self.weight = keep * self.weight + 1 - keep
        self.averages = [keep * a + (1 - keep) * v for a, v in zip(self.averages, (trace, square), strict=True)]
        self._note(trainer, pl_module, batch, trace)

    def _note(self, trainer: Trainer, pl_module: LightningModule, batch: int, trace: float) -> None:
        ours = next(c for c in trainer.callbacks if isinstance(c, AdaptiveBatchSize))  # type: ignore[attr-defined]
        if self.samples < len(self.rows) * self.every or not ours.reading or not 0 < ours.noise_scale < math.inf:
            return
        trace_exact, square_exact = exact_noise(pl_module.network, self.data)  # type: ignore[arg-type]
        adaptdl = max(self.averages[0], 1e-6) / max(self.averages[1], 1e-12)
        self.rows.append(
            {
                "samples": self.samples,
                "batch": batch,
                "trace_ours": float(f"{ours.reading['values'][0].item():.8g}"),
                "trace_adaptdl": float(f"{trace:.8g}"),
                "noise_ours": float(f"{ours.noise_scale:.4g}"),
                "noise_adaptdl": float(f"{adaptdl:.4g}"),
                "noise_exact": float(f"{trace_exact / square_exact:.4g}"),
            }
        )


def exact_noise(network: nn.Module, data: Data) -> tuple[float, float]:
    """Trace of the covariance and squared norm of the gradient over the whole training set."""
    parameters = {name: p.detach() for name, p in network.named_parameters()}

    def loss(values: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(torch.func.functional_call(network, values, (x[None],)), y[None])

    single = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))
    found = single(parameters, data.train.inputs, data.train.labels)
    every = torch.cat([g.flatten(1).double() for g in found.values()], 1)
    mean = every.mean(0)
    return float((every - mean).square().sum() / (len(every) - 1)), float(mean @ mean)


def compare_noise(data: Data, points: int = 12) -> list[dict[str, Any]]:
    """Along a run on the digits with four micro-batches a step."""
    twin = TwoBatch(data, every=len(data.train) * data.epochs // points)
    groups = {"estimator": "micro_batch", "max_batch_size": 1437, "max_micro_batch_size": 512}
    method = Method("noise", 2, accumulation=4, drop_last=True, adaptive=groups)
    train(data, "SGD", method, 0, twin)
    return twin.rows
