"""Is a weight decay that is chosen after training of one hyper-network as good as the best of nine networks?"""

import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_hpo import ConditionSpec, hypernetize
from lightning_hpo.demos import MNISTDataModule
from lightning_hpo.functional.bilevel.condition_draws import sample_conditions

__all__ = ["decay_rows"]

LOW, HIGH = 1e-6, 1e-1


def primary() -> nn.Module:
    """Two convolutions and a linear layer."""
    first = [nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    second = [nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*first, *second, nn.Flatten(), nn.Linear(1568, 10))


def _data(quick: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """10,000 images, 8,000 of them for training; noise where it has to be quick."""
    if quick:
        images, labels = torch.rand(128, 1, 28, 28), torch.randint(10, (128,))
    else:
        data = MNISTDataModule(limit=10_000, val_fraction=0.0)
        data.setup()
        train: Any = data.train_set
        images, labels = train.__getitems__(range(len(train)))
    held = len(images) // 5
    return images[held:], labels[held:], images[:held], labels[:held]


def _squares(weights: dict[str, Tensor]) -> Tensor:
    return torch.stack([value.square().sum() for value in weights.values()]).sum()


def _optimizer(net: nn.Module, steps: int) -> tuple[Any, Any]:
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.05, momentum=0.9)
    return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)


def _train(net: nn.Module, loss: Any, images: Tensor, labels: Tensor, epochs: int) -> float:
    """Trains; returns the CPU time."""
    began, number = time.process_time(), 0
    optimizer, schedule = _optimizer(net, epochs * -(-len(images) // 128))
    for _ in range(epochs):
        for rows in torch.randperm(len(images)).split(128):
            optimizer.zero_grad()
            loss(net, images[rows], labels[rows], number).backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            number += 1
    return time.process_time() - began


def decay_rows(quick: bool) -> list[dict[str, Any]]:
    """Nine networks, and one hyper-network whose best decay is looked for on 21 values."""
    images, labels, val_images, val_labels = _data(quick)
    epochs, decays = (1, (LOW, HIGH)) if quick else (10, torch.logspace(-6, -1, 9).tolist())
    rows = []
    for decay in decays:
        torch.manual_seed(0)
        net = primary()

        def plain(net: nn.Module, x: Tensor, y: Tensor, _: int, decay: float = decay) -> Tensor:
            return F.cross_entropy(net(x), y) + decay / 2 * _squares(dict(net.named_parameters()))

        spent = _train(net, plain, images, labels, epochs)
        with torch.no_grad():
            loss = F.cross_entropy(net(val_images), val_labels).item()
        rows.append({"what": "a network", "weight_decay": decay, "val_loss": loss, "cpu_s": spent})

    torch.manual_seed(0)
    hyper = hypernetize(primary(), ConditionSpec().add("decay", LOW, HIGH, log=True))

    def conditioned(net: Any, x: Tensor, y: Tensor, number: int) -> Tensor:
        gamma = sample_conditions(range(number, number + 1), 1)[0]
        weights = net.hyper_network(gamma)  # once, for the network and for the penalty
        found = torch.func.functional_call(net.module, weights, x)
        return F.cross_entropy(found, y) + net.spec.decode(gamma)["decay"] / 2 * _squares(weights)

    spent = _train(hyper, conditioned, images, labels, epochs)
    began = time.process_time()
    with torch.no_grad():
        curve = [(F.cross_entropy(hyper(val_images, gamma=g), val_labels).item(), g) for g in hyper.spec.grid(21)]
    spent += time.process_time() - began
    loss, gamma = min(curve, key=lambda pair: pair[0])
    decay = hyper.spec.decode(gamma)["decay"].item()
    rows.append({"what": "MIP, chosen afterwards", "weight_decay": decay, "val_loss": loss, "cpu_s": spent})
    return [{key: v if isinstance(v, str) else float(f"{v:.4g}") for key, v in row.items()} for row in rows]
