"""What a step of a self-tuning network costs beside a plain one."""

from collections.abc import Callable
from typing import Any

import torch
from common import alternate, peak_memory
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_hpo.hyper import HyperparameterSet, Interval
from lightning_hpo.module_losses import ModuleLosses
from lightning_hpo.nn.self_tuning_networks import convert
from lightning_hpo.nn.self_tuning_regularisers import TunedDropout
from lightning_hpo.perturbation import Perturbation
from lightning_hpo.response_training import Mode, ResponseTraining

__all__ = ["cost_rows"]


class Classifier(nn.Module):
    """A network with two tuned rates of dropout."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.hypers = HyperparameterSet(first=Interval(0.1, 0.0, 0.95), last=Interval(0.3, 0.0, 0.95))
        first, last = TunedDropout(lambda: self.hypers["first"]), TunedDropout(lambda: self.hypers["last"])
        if kind == "linear":
            layers = [nn.Flatten(), nn.Linear(768, 512), nn.ReLU(), first, nn.Linear(512, 512), nn.ReLU(), last]
            self.net = nn.Sequential(*layers, nn.Linear(512, 10))
        else:
            layers = [nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2), first]
            layers += [nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2)]
            layers += [nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.Flatten(), last]
            self.net = nn.Sequential(*layers, nn.Linear(1024, 10))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Cross-entropy."""
        return F.cross_entropy(self.net(batch[0]), batch[1])

    validation_step = training_step


def _steps(kind: str, batch_size: int) -> dict[str, Callable[[], Any]]:
    """A plain step, one of each mode, and an update of the hyperparameters."""
    batch = torch.rand(batch_size, 3, 16, 16), torch.randint(10, (batch_size,))

    def plain() -> Callable[[], Any]:
        module = Classifier(kind)
        optimizer = torch.optim.SGD(module.net.parameters(), lr=1e-3, momentum=0.9)

        def step() -> None:
            module.training_step(batch, 0).backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    def tuned(mode: Mode, parts: int = 2) -> tuple[Callable[[], Any], Callable[[], Any]]:
        module = Classifier(kind)
        sets = {"": module.hypers}
        perturbation = Perturbation(sets)
        response = convert(module.net, perturbation.inputs)
        training = ResponseTraining(response, perturbation, ModuleLosses(module, sets), mode, module.net, parts=parts)
        optimizers = [torch.optim.SGD(p.parameters(), lr=1e-3, momentum=0.9) for p in (module.net, response)]
        for raw in perturbation.raw_parameters():
            raw.requires_grad_(False)

        def step() -> None:
            if mode == "delta":
                training.respond(batch)
            else:
                training.perturb(batch)
            module.training_step(batch, 0).backward()
            training.settle()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()

        return step, lambda: training.hypergradient([batch], 1e-3)

    delta, update = tuned("delta")
    whole, _ = tuned("delta", parts=1)
    stn, _ = tuned("stn")
    return {
        "plain step": plain(),
        "Δ-STN step": delta,
        "Δ-STN step, whole batch": whole,
        "STN step": stn,
        "update": update,
    }


def cost_rows(quick: bool) -> list[dict[str, Any]]:
    """Time and memory in units of the plain step."""
    rows = []
    for kind in ("linear", "convolutions"):
        steps = _steps(kind, 8 if quick else 128)
        timings = alternate(steps, rounds=2 if quick else 15, warmup=1 if quick else 3)
        memory = {name: peak_memory(step) for name, step in steps.items()}
        for name, timing in timings.items():
            rows.append(
                {
                    "layers": kind,
                    "what": name,
                    "ms": round(timing.median * 1e3, 3),
                    "time_ratio": round(timing.ratio, 2),
                    "memory_ratio": round(memory[name] / memory["plain step"], 2),
                }
            )
    return rows
