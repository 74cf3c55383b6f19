"""What comparing micro-batches costs: so little that single rounds drown in noise."""

import copy
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast
from unittest import mock

import torch
from torch import Tensor, nn

from lightning_hpo.gradient_noise import GradientNoise
from lightning_hpo.gradients import GroupNorms

MICRO_BATCHES = 4  # of an optimizer step, as many as `estimator="auto"` asks for


class Window:
    """An optimizer step over four micro-batches, with or without the estimator that compares them.

    `inside` is the CPU time that the latest step has spent in the estimator.
    """

    def __init__(self, model: nn.Module, batch: tuple[Tensor, Tensor], observed: bool) -> None:
        self.model, self.batch, self.inside = model, batch, 0.0
        self.optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
        self.noise: GradientNoise | None = None
        if observed:
            with mock.patch.multiple(
                GroupNorms, _note=self._timed(GroupNorms._note), _note_small=self._timed(GroupNorms._note_small)
            ):
                self.noise = GradientNoise(model, dict(model.named_parameters()), ["micro_batch"])
            for name in ("begin", "after_backward", "read"):
                setattr(self.noise, name, self._timed(getattr(self.noise, name)))

    def _timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any) -> Any:
            start = time.process_time()
            result = function(*arguments)
            self.inside += time.process_time() - start
            return result

        return timed

    def step(self) -> float:
        """Takes the step; returns its CPU time."""
        self.inside, size, start = 0.0, len(self.batch[0]), time.process_time()
        self.optimizer.zero_grad()
        if self.noise is not None:
            self.noise.begin(MICRO_BATCHES)
        for _ in range(MICRO_BATCHES):
            (cast(Any, self.model).training_step(self.batch) / MICRO_BATCHES).backward()
            if self.noise is not None:
                self.noise.after_backward(self.batch, size, MICRO_BATCHES)
        if self.noise is not None:
            self.noise.read([size] * MICRO_BATCHES, size * MICRO_BATCHES)
        self.optimizer.step()
        return time.process_time() - start


def paired_cost(model: nn.Module, batch: tuple[Tensor, Tensor], rounds: int) -> dict[str, float]:
    """Both forms of the step in turn, in changing order, in CPU time.

    Returns:
        `cost`: the second relative to the first, a median; `inside`: the estimator's time over the rest of its step.
    """
    alone, observed = (Window(copy.deepcopy(model), batch, observed) for observed in (False, True))
    ratios, inside = [], []
    for turn in range(-3, rounds):
        order = (alone, observed) if turn % 2 else (observed, alone)
        spent = {window: window.step() for window in order}
        if turn >= 0:
            ratios.append(spent[observed] / spent[alone])
            inside.append(observed.inside / (spent[observed] - observed.inside))
    return {"cost": statistics.median(ratios), "inside": statistics.median(inside)}


def pooled(processes: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean over processes with two standard errors to either side, and how far single processes spread."""
    costs = [figures["cost"] for figures in processes]
    mean = statistics.fmean(costs)
    reach = 0.0
    if len(costs) > 1:
        reach = 2 * statistics.stdev(costs) / math.sqrt(len(costs))
    inside = statistics.fmean(figures["inside"] for figures in processes)
    figures = {"cost": mean, "low": mean - reach, "high": mean + reach, "least": min(costs), "most": max(costs)}
    return {"processes": len(costs)} | {name: round(value, 4) for name, value in {**figures, "inside": inside}.items()}
