"""What `Hypergradient` adds to whole training runs: the same run without it and with it, in turns."""

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial, wraps
from itertools import pairwise
from typing import Any

import torch
from batch_runs import Held, be_quiet, digits, mnist
from common import conclude, console, parse, show
from hypergradient_runs import fit
from lightning.pytorch import LightningModule, seed_everything
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_hpo import Hypergradient

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

HOOKS = ("setup", "on_train_start", "on_train_batch_start", "on_before_optimizer_step", "on_train_batch_end")


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


class Timed(Hypergradient):
    """Notes the CPU time that it spends itself."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.inside = 0.0
        for hook in HOOKS:
            setattr(self, hook, self._timed(getattr(self, hook)))

    def _timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def timed(*given: Any, **named: Any) -> Any:
            begun = time.process_time()
            result = function(*given, **named)
            self.inside += time.process_time() - begun
            return result

        return timed


def _run(train: Held, val: Held, width: int, steps: int, arguments: dict[str, Any] | None) -> tuple[float, float]:
    """CPU time of a run, and what of it passed inside the callback."""
    seed_everything(0, verbose=False)
    module = Plain([train.inputs.shape[1], width, width, 10])
    callbacks = [] if arguments is None else [Timed(**arguments)]
    loaders = _loader(train, True), _loader(val, False)
    spent = fit(module, *loaders, steps, *callbacks)
    return spent, sum(callback.inside for callback in callbacks)


def _compare(run: Callable[[dict[str, Any] | None], tuple[float, float]], method: Any, rounds: int) -> dict[str, float]:
    """Runs with the callback, each between two without it: the machine's speed drifts."""
    run(method)
    spent, ratios, inside = [], [], []
    for _ in range(rounds):
        (before, _), (middle, within), (after, _) = run(None), run(method), run(None)
        spent.append(middle)
        ratios.append(2 * middle / (before + after))
        inside.append(middle / (middle - within))
    low, median, high = statistics.quantiles(ratios, n=4) if rounds > 1 else ratios * 3
    found = {"cpu_s": statistics.median(spent), "plain_runs": median, "quartile_1": low, "quartile_3": high}
    return {name: round(value, 3) for name, value in {**found, "inside": statistics.median(inside)}.items()}


def _overhead(quick: bool, rounds: int) -> list[dict[str, Any]]:
    """Whole runs, in units of the run without the callback."""
    try:
        name, data = ("digits", digits(0)) if quick else ("MNIST", mnist())
    except (FileNotFoundError, ValueError) as error:
        console.print(f"runs on digits: {error}")
        name, data = "digits", digits(0)
    width, steps = (64, 10) if quick else (256, 400)
    run = partial(_run, data.train, data.test, width, steps)
    facts = {"data": name, "width": width, "steps": steps}
    methods = dict(list(METHODS.items())[:4]) if quick else METHODS
    return [{**facts, "method": label, **_compare(run, method, rounds)} for label, method in methods.items()]


def main(arguments: Sequence[str] | None = None) -> None:
    rounds = ("--rounds", {"type": int, "default": 7, "help": "7 by default"})
    chosen = parse(__doc__, arguments, rounds)
    be_quiet()
    rows = _overhead(chosen.quick, 1 if chosen.quick else chosen.rounds)
    columns = {"data": "", "steps": "d", "method": "", "cpu_s": ".2f"}
    ratios = dict.fromkeys(("plain_runs", "quartile_1", "quartile_3", "inside"), ".3f")
    show("Whole runs", rows, {**columns, **ratios})
    conclude(__file__, chosen, rows)


if __name__ == "__main__":
    main()
