"""Ranks, wrong arguments and runs that go astray."""

import re
import warnings
from itertools import repeat
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_hpo.functional.bilevel.adjoint_watch import Watch
from lightning_hpo.functional.bilevel.bo_rep import SingleLoopBilevel
from lightning_hpo.functional.bilevel.outer_gradient import outer_gradient
from lightning_hpo.functional.bilevel.problem import Problem
from lightning_hpo.functional.bilevel.second_derivatives import SecondDerivativesMissingError

NOTHING = repeat(None)


def square(y: dict[str, Tensor], x: dict[str, Tensor], _: object = None) -> Tensor:
    return (y["y"] - x["x"]).square().sum() / 2


def goal(y: dict[str, Tensor], x: dict[str, Tensor], _: object = None) -> Tensor:
    return (y["y"] - 1).square().sum() / 2


def method(inner=square, outer=goal, **settings: Any) -> SingleLoopBilevel:
    return SingleLoopBilevel(inner, outer, **{"lr": 0.1, "inner_lr": 0.1, "z_lr": 0.1, **settings})


def start(settings: SingleLoopBilevel):
    return settings.start({"y": torch.zeros(2).double()}, {"x": torch.ones(2).double()})


# Ranks


@pytest.mark.parametrize("settings", [{}, {"solver": "neumann", "normalize": False}, {"product": "fd"}])
def test_two_ranks_are_one_process_with_the_joined_batch(make, ranks, settings):
    def run(network, steps=6):
        problem = network.problem
        engine = SingleLoopBilevel(
            lambda y, x, _: problem.train_loss(y, x),
            lambda y, x, _: problem.val_loss(y, x),
            **{"lr": 0.05, "inner_lr": 0.05, "z_lr": 0.05, "reduce": problem.reduce, **settings},
        )
        state = engine.start(network.params, network.hparams)
        state = engine.refine(state, NOTHING, steps=2, epochs=2)
        for _ in range(steps):
            state, _ = engine.step(state, NOTHING, NOTHING)
        return state

    rows = [slice(0, 6), slice(6, 12)]
    order = torch.arange(12).view(2, 6).flatten()
    assert order.tolist() == list(range(12))
    tolerance = 1e-6 if settings.get("product") == "fd" else 1e-12
    single = run(make["network"]())
    first, second = ranks.run(lambda rank, reduce: run(network_of(make, reduce, rows[rank])))
    for part, mine, theirs in zip(single[:4], first[:4], second[:4], strict=True):
        for name, value in part.items():
            assert torch.equal(mine[name], theirs[name])
            torch.testing.assert_close(mine[name], value, rtol=tolerance, atol=tolerance)


def network_of(make, reduce, rows):
    """The validation loss of the network flips its targets before it takes rows, so that halves stay halves."""
    return make["network"](reduce, rows)


def test_ranks_agree_on_what_is_reached(ranks):
    """One rank's inner loss does not know x: the other's does, and that is enough."""

    def work(rank, reduce):
        inner = square if rank else lambda y, x, _=None: y["y"].square().sum() / 2
        problem = Problem(inner, goal, reduce)
        z = {"y": torch.full((2,), 2.0)}
        return outer_gradient(problem, {"y": torch.zeros(2)}, {"x": torch.ones(2)}, z, z_lr=0.1)

    for found in ranks.run(work):
        assert found.gradients["x"].tolist() == [1.0, 1.0]  # half of z


# Arguments


def test_wrong_settings_are_listed_at_once():
    with pytest.raises(ValueError, match="SingleLoopBilevel") as caught:
        method(lr=0.0, inner_lr=-1.0, z_lr=float("nan"), momentum=1.0, interval=0, inner_steps=-1)
    for words in (
        "lr must be positive, got 0.0",
        "inner_lr must be positive, got -1.0",
        "z_lr must be positive, got nan",
        "momentum must be in [0, 1), got 1.0",
        "interval must be an integer of at least 1, got 0",
        "inner_steps must be an integer of at least 0, got -1",
    ):
        assert words in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"momentum": -0.1}, "momentum must be in [0, 1), got -0.1"),
        ({"normalize": True}, "normalize must be 'global', 'per_group' or False, got True"),
        ({"radius": 0.0}, "radius must be positive, got 0.0"),
        ({"min_norm": 0.0}, "min_norm must be positive, got 0.0"),
        ({"solver": "cg"}, "solver must be 'step' or 'neumann', got 'cg'"),
        ({"product": "gauss_newton"}, "product must be 'exact' or 'fd', got 'gauss_newton'"),
        ({"interval": 1.5}, "interval must be an integer of at least 1, got 1.5"),
    ],
)
def test_wrong_settings(settings, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        method(**settings)


def test_parameters_that_are_both_inner_and_outer_are_named():
    shared = torch.zeros(2)
    with pytest.raises(ValueError, match="inner and outer parameters overlap: 'weight' is the outer 'x'"):
        method().start({"y": torch.zeros(1), "weight": shared}, {"x": shared})


def test_an_outer_loss_without_inner_parameters():
    settings = method(outer=lambda y, x, _: x["x"].square().sum())
    with pytest.warns(UserWarning, match="the outer loss does not depend on the inner parameters"):
        settings.step(start(settings), NOTHING, NOTHING)


def test_an_outer_loss_of_nothing():
    settings = method(outer=lambda y, x, _: torch.tensor(1.0))
    with pytest.raises(ValueError, match="outer loss depends on neither"):
        settings.step(start(settings), NOTHING, NOTHING)


@pytest.mark.parametrize(
    "inner",
    [
        lambda y, x, _=None: y["y"].square().sum(),
        lambda y, x, _=None: y["y"].square().sum() + x["x"].square().sum(),
    ],
    ids=["no x", "separable"],
)
@pytest.mark.parametrize("outer", [goal, lambda y, x, _=None: goal(y, x) + x["x"].sum()], ids=["y", "y and x"])
def test_an_inner_loss_without_a_cross_derivative(inner, outer):
    settings = method(inner, outer)
    with pytest.raises(ValueError, match=r"cross derivative is zero: .* does not depend on the outer ones, \['x'\]"):
        settings.step(start(settings), NOTHING, NOTHING)


def test_one_outer_parameter_that_nobody_reads():
    settings = method()
    state = settings.start({"y": torch.zeros(2)}, {"x": torch.ones(2), "idle": torch.ones(1)})
    with pytest.raises(ValueError, match="'idle' is not reached by either loss"):
        settings.step(state, NOTHING, NOTHING)


class Once(torch.autograd.Function):
    """The identity, with a backward pass that cannot be differentiated."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return grad


def test_what_cannot_be_differentiated_twice_names_the_remedies():
    def inner(y, x, _):
        return (Once.apply(y["y"]) - x["x"]).square().sum() / 2

    settings = method(inner)
    with pytest.raises(SecondDerivativesMissingError, match=r"product='fd'.*MATH.*cudnn.flags\(enabled=False\)"):
        settings.step(start(settings), NOTHING, NOTHING)
    exact, fd = method(), method(inner, product="fd")
    ours, theirs = start(fd), start(exact)
    for _ in range(3):
        (ours, _), (theirs, _) = fd.step(ours, NOTHING, NOTHING), exact.step(theirs, NOTHING, NOTHING)
    torch.testing.assert_close(ours.outer, theirs.outer)


# Runs that go astray


def test_a_hypergradient_that_is_not_finite_is_left_out():
    bad = {2, 3}

    def outer(y, x, batch):
        return goal(y, x) * (float("inf") if batch in bad else 1.0)

    settings = method(outer=outer)
    state, batches = start(settings), iter(range(6))
    for k in range(6):
        before, (state, info) = state, settings.step(state, NOTHING, batches)
        assert info.skipped == (k in bad)
        if info.skipped:
            for part, old in zip((state.outer, state.z, state.m), (before.outer, before.z, before.m), strict=True):
                assert all(torch.equal(part[name], old[name]) for name in old)
        assert state.watch[1] == (k - 1 if k in bad else 0)
    assert all(torch.isfinite(v).all() for part in state[:4] for v in part.values())


def test_ten_in_a_row_are_an_error():
    settings = method(outer=lambda y, x, _: goal(y, x) * float("nan"))
    state = start(settings)
    for _ in range(9):
        state, info = settings.step(state, NOTHING, NOTHING)
        assert info.skipped
    with pytest.raises(FloatingPointError, match=r"10 hypergradients in a row were not finite.*z_lr=0.1 must stay"):
        settings.step(state, NOTHING, NOTHING)


def test_a_step_size_of_z_that_is_too_large_is_named_with_the_curvature():
    def inner(y, x, _):
        return 2.5 * (y["y"] - x["x"]).square().sum()

    settings = method(inner, z_lr=0.5)
    words = r"z_lr \(nu\) is 0.5, but must stay below 2 / lambda_max = 0.4: .* lambda_max is about 5"
    with pytest.warns(UserWarning, match=words):
        run(settings, 30)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(method(inner, z_lr=0.39), 220)


def run(settings, steps):
    state = start(settings)
    for _ in range(steps):
        state, _ = settings.step(state, NOTHING, NOTHING)


def test_a_length_that_swings_is_no_growth():
    watch = Watch()
    for k in range(1000):
        watch, usable, grown = watch.after(1.0, 1e-6 if k % 100 == 0 else 1.0, 1.0, 0.01)
        assert usable
        assert not grown
    for length in (1.0, 5.0, 9.0, 11.0):
        watch, _, grown = watch.after(1.0, length, 1.0, 0.01)
        assert grown == (length > 10)
