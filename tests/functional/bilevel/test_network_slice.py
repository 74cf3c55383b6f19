"""Slices of networks against the networks themselves on a fine grid."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_hpo.functional.bilevel.component_counts import log2_components_activation
from lightning_hpo.functional.bilevel.network_slice import StepFunction, network_slice
from lightning_hpo.functional.bilevel.piecewise import PIECEWISE, count_oscillations

GRID = torch.linspace(0, 1, 20_001).double()
PAIRS = [("relu", "abs"), ("relu", "square"), ("hardtanh", "leaky_relu"), ("hardswish", "identity")]
SIZES = [3, 5, 4, 3]
EXAMPLES = 12


class Case:
    def __init__(self, pair: tuple[str, str], moving: bool, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.first, self.second = (PIECEWISE[name] for name in pair)

        def layers(scale: float) -> list[tuple[Tensor, Tensor]]:
            return [
                (
                    scale * torch.randn(after, before, generator=generator, dtype=torch.float64),
                    scale * torch.randn(after, generator=generator, dtype=torch.float64),
                )
                for before, after in pairwise(SIZES)
            ]

        self.layers, self.direction = layers(1.0), layers(1.0) if moving else None
        self.inputs = torch.randn(EXAMPLES, SIZES[0], generator=generator, dtype=torch.float64)
        self.targets = torch.randint(0, SIZES[-1], (EXAMPLES,), generator=generator)

    def slice(self) -> Any:
        return network_slice(self.layers, self.inputs, self.first, self.second, direction=self.direction)

    def run(self, alphas: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs and activation patterns by an ordinary forward pass."""
        x, patterns = self.inputs.expand(len(alphas), -1, -1), []
        along = self.direction or [(torch.zeros_like(w), torch.zeros_like(b)) for w, b in self.layers]
        alpha = alphas[:, None, None]
        for index, ((w, b), (dw, db)) in enumerate(zip(self.layers, along, strict=True)):
            if index:
                knots = torch.tensor(sorted({*self.first.knots, *self.second.knots}), dtype=torch.float64)
                patterns.append(torch.bucketize(x, knots))
                x = alpha * self.first(x) + (1 - alpha) * self.second(x)
            x = torch.einsum("kei,koi->keo", x, w + alpha * dw) + b + alpha * db
        return x, torch.cat(patterns, -1)


CASES = {
    f"{'-'.join(pair)}-{'moving' if moving else 'fixed'}": (pair, moving) for pair in PAIRS for moving in (False, True)
}
cases = pytest.mark.parametrize("case", [Case(*settings) for settings in CASES.values()], ids=CASES.keys())


@cases
def test_outputs_are_those_of_the_network(case: Case) -> None:
    expected, _ = case.run(GRID)
    torch.testing.assert_close(case.slice().outputs(GRID), expected, rtol=1e-9, atol=1e-9)


@cases
def test_breakpoints_are_where_activation_patterns_change(case: Case) -> None:
    found = case.slice()
    breaks = found.breakpoints()
    assert len(breaks) >= 3
    _, patterns = case.run(GRID)
    changed = (patterns.diff(dim=0) != 0).flatten(1).any(1)
    inside = torch.histogram(breaks, GRID).hist > 0
    assert bool((inside >= changed).all())
    before, after = case.run(breaks - 1e-9)[1], case.run(breaks + 1e-9)[1]
    assert bool((before != after).flatten(1).any(1).all())
    assert len(found.start) - EXAMPLES >= int((patterns.diff(dim=0) != 0).any(-1).sum())


@cases
def test_accuracy_is_that_of_the_network_and_jumps_nowhere_else(case: Case) -> None:
    accuracy = case.slice().accuracy(case.targets)
    outputs, _ = case.run(GRID)
    torch.testing.assert_close(accuracy(GRID), (outputs.argmax(-1) == case.targets).double().mean(-1))
    assert bool((accuracy.values.diff() != 0).all())
    for edge, (low, high) in zip(accuracy.edges[1:-1], pairwise(accuracy.values), strict=True):
        around = (case.run(edge + torch.tensor([-1e-9, 1e-9]).double())[0].argmax(-1) == case.targets).double().mean(-1)
        torch.testing.assert_close(around, torch.stack([low, high]))
    assert accuracy.oscillations() >= count_oscillations(accuracy(GRID[::500]))


def test_oscillations_stay_below_the_count_for_the_worst_network() -> None:
    networks = [Case(("relu", "abs"), True, seed) for seed in range(5)]
    most = max(network.slice().accuracy(network.targets).oscillations() for network in networks)
    assert most > 0
    assert torch.tensor(most).log2() <= 1 + log2_components_activation(SIZES, EXAMPLES, breakpoints=1, degree=1)


def test_units_that_reach_no_output_leave_no_breakpoint() -> None:
    case = Case(("relu", "abs"), True)
    case.layers[-1] = (torch.zeros_like(case.layers[-1][0]), case.layers[-1][1])
    case.direction[-1] = (torch.zeros_like(case.direction[-1][0]), case.direction[-1][1])
    assert len(case.slice().breakpoints()) == 0


def test_a_step_function_between_its_edges() -> None:
    step = StepFunction(torch.tensor([0.0, 0.25, 0.5, 1.0]), torch.tensor([1.0, 0.0, 1.0]))
    assert step(torch.tensor([0.0, 0.2, 0.25, 0.6, 1.0])).tolist() == [1.0, 1.0, 0.0, 1.0, 1.0]
    assert step.oscillations() == 2


def test_wrong_arguments_are_all_named() -> None:
    w, b, x = torch.ones(2, 3), torch.ones(2), torch.ones(4, 3)
    relu = PIECEWISE["relu"]
    with pytest.raises(ValueError, match=r"must be finite and rise.*one entry a layer.*does not take 5 inputs"):
        network_slice([(w, b)], torch.ones(4, 5), relu, relu, low=1.0, high=0.0, direction=[])
    with pytest.raises(ValueError, match=r"no layer.*\(examples, in\)"):
        network_slice([], torch.ones(4), relu, relu)
    with pytest.raises(ValueError, match="targets must be 4 classes from 0 to 1"):
        network_slice([(w, b)], x, relu, relu).accuracy(torch.tensor([0, 1, 2, 0]))
    with pytest.raises(ValueError, match="at least two outputs"):
        network_slice([(w[:1], b[:1])], x, relu, relu).accuracy(torch.zeros(4, dtype=torch.long))
