"""What `Hypergradient` adds to whole training runs: the same run without it and with it, in turns."""

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from batch_runs import Held, digits, mnist
from common import alternate, console
from hypergradient_runs import fit
from lightning.pytorch import LightningModule, seed_everything
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_hpo import Hypergradient

__all__ = ["overhead"]

DECAY: dict[str, Any] = {"tune": ("weight_decay",)}
METHODS: dict[str, dict[str, Any]] = {
    "default settings": DECAY,
    "default, every_n_steps=5": {**DECAY, "every_n_steps": 5},
    "ift_cg(5)": {**DECAY, "estimator_args": {"maxiter": 5}},
    "unrolled(1)": {**DECAY, "estimator": "unrolled", "estimator_args": {"steps": 1}},
    "t1t2": {**DECAY, "estimator": "t1t2"},
    "darts_fd": {**DECAY, "estimator": "darts_fd"},
    "sama": {**DECAY, "estimator": "sama"},
    "darts_fd, every_n_steps=5": {**DECAY, "estimator": "darts_fd", "every_n_steps": 5},
}


class Plain(LightningModule):
    """A classifier of three layers that knows nothing of hypergradients."""

    def __init__(self, sizes: Sequence[int]) -> None:
        super().__init__()
        layers = [nn.Linear(fan_in, fan_out) for fan_in, fan_out in pairwise(sizes)]
        self.network = nn.Sequential(*[part for layer in layers for part in (layer, nn.ReLU())][:-1])

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy."""
        return F.cross_entropy(self.network(batch[0]), batch[1])

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy."""
        return F.cross_entropy(self.network(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD with momentum and decay."""
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)


def _loader(data: Held, shuffle: bool) -> DataLoader[tuple[Tensor, Tensor]]:
    return DataLoader(data, batch_size=128, shuffle=shuffle, collate_fn=tuple)


def _run(train: Held, val: Held, width: int, steps: int, arguments: dict[str, Any] | None) -> None:
    seed_everything(0, verbose=False)
    module = Plain([train.inputs.shape[1], width, width, 10])
    callbacks = [] if arguments is None else [Hypergradient(**arguments)]
    loaders = _loader(train, True), _loader(val, False)
    fit(module, *loaders, steps, *callbacks)


def overhead(quick: bool, rounds: int) -> list[dict[str, Any]]:
    """Whole runs, in units of the run without the callback in the same round."""
    try:
        name, data = ("digits", digits(0)) if quick else ("MNIST", mnist())
    except (FileNotFoundError, ValueError) as error:
        console.print(f"runs on digits: {error}")
        name, data = "digits", digits(0)
    rows = []
    for width in (64,) if quick else (256,):
        steps = 10 if quick else 200
        run = partial(_run, data.train, data.test, width, steps)
        methods = dict(list(METHODS.items())[:4] if quick else METHODS)
        timings = alternate({"none": partial(run, None), **{m: partial(run, a) for m, a in methods.items()}}, rounds)
        fastest = timings["none"].fastest
        for method, timing in timings.items():
            row = {"data": name, "width": width, "steps": steps, "method": method}
            row |= {"cpu_s": float(f"{timing.median:.4g}"), "plain_runs": round(timing.ratio, 3)}
            rows.append(row | {"fastest_to_fastest": round(timing.fastest / fastest, 3)})
    return rows
