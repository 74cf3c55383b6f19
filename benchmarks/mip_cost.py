"""What a step of a hyper-network costs beside one of the network whose weights it predicts."""

from collections.abc import Callable
from typing import Any

import torch
from common import alternate
from torch import nn
from torch.nn import functional as F

from lightning_hpo import hypernetize

__all__ = ["cost_rows"]


def primary() -> nn.Module:
    """0.3 million parameters, 32x32 pixels."""
    layers: list[nn.Module] = []
    for before, after in ((3, 32), (32, 64), (64, 128), (128, 160)):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.GroupNorm(8, after), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(640, 10))


def _training(net: nn.Module, images: torch.Tensor, labels: torch.Tensor, **arguments: Any) -> Callable[[], Any]:
    trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1e-3, momentum=0.9)

    def step() -> None:
        F.cross_entropy(net(images, **arguments), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def cost_rows(quick: bool) -> list[dict[str, Any]]:
    """Time in units of the plain network's, a training step and an inference pass."""
    torch.manual_seed(0)
    batch = 2 if quick else 128
    images, labels, gamma = torch.rand(batch, 3, 32, 32), torch.randint(10, (batch,)), torch.tensor([0.3])
    plain, full, low = primary(), hypernetize(primary(), 1), hypernetize(primary(), 1, rank=16)
    steps = {
        "training step, plain": _training(plain, images, labels),
        "training step, MIP": _training(full, images, labels, gamma=gamma),
        "training step, MIP, rank=16": _training(low, images, labels, gamma=gamma),
    }
    fixed = full.materialize(gamma)

    def inference(net: nn.Module, **arguments: Any) -> Callable[[], Any]:
        def call() -> None:
            with torch.no_grad():
                net(images, **arguments)

        return call

    passes = {
        "inference, plain": inference(plain),
        "inference, MIP, weights predicted each time": inference(full, gamma=gamma),
        "inference, MIP, materialized": inference(fixed),
    }
    nets = [plain, full, low, plain, full, fixed]
    sizes = [sum(p.numel() for p in net.parameters() if p.requires_grad) for net in nets]
    rounds = 2 if quick else 9
    timings = {**alternate(steps, rounds), **alternate(passes, rounds)}
    return [
        {"what": what, "ms": round(timing.median * 1e3, 2), "ratio": round(timing.ratio, 3), "parameters": size}
        for (what, timing), size in zip(timings.items(), sizes, strict=True)
    ]
