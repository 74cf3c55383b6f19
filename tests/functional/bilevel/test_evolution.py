"""Evolution strategies with perturbations whose mean is exact, and their state."""

import io
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_hpo.functional.bilevel import evolution
from lightning_hpo.functional.bilevel.evolution import es, pes
from lightning_hpo.functional.bilevel.inner_steps import unroll
from lightning_hpo.functional.bilevel.optimizer_steps import functional_optimizer, sgd
from lightning_hpo.functional.bilevel.problem import Problem, Tensors
from lightning_hpo.functional.bilevel.unrolled import unrolled

SGD = functional_optimizer(sgd, lr=0.2, momentum=0.5)
# Linear dynamics and a quadratic score: a mean over signs instead of normal numbers gives the exact gradient.
LINEAR = Problem(
    lambda w, h: ((w["w"] - h["goal"]) ** 2).sum() / 2, lambda w, h: (w["w"] ** 2).sum() / 2 + 0.3 * h["goal"]
)
START: Any = {"w": torch.tensor([3.0, -1.0]).double()}, {"goal": torch.tensor(1.5).double()}
SIGNS = 0.01 * torch.tensor(list(itertools.product((-1.0, 1.0), repeat=3))).double()  # all of three calls


def exact(steps: int) -> Tensor:
    return unrolled(LINEAR, *START, steps=steps, optimizer=SGD).gradients["goal"]


def test_es_is_exact_in_the_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evolution._Search, "draw", lambda self: SIGNS[:, :1])
    found = es(LINEAR, *START, steps=6, optimizer=SGD).gradients["goal"]
    torch.testing.assert_close(found, exact(6), rtol=1e-9, atol=1e-9)


def episode(monkeypatch: pytest.MonkeyPatch, forget: bool = False) -> list[Tensor]:
    found, state = [], None
    for call in range(3):
        monkeypatch.setattr(evolution._Search, "draw", lambda self, call=call: SIGNS[:, call : call + 1])
        result = pes(LINEAR, *START, state, horizon=6, truncation=2, optimizer=SGD, pairs=8)
        found.append(result.gradients["goal"])
        state = result.state
        if forget:
            state["accumulated"] = torch.zeros_like(state["accumulated"])
    return found


def test_pes_adds_up_to_the_gradient_of_the_sum_of_all_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each call gives the whole influence of the hyperparameter so far, which short horizons miss."""
    for found, steps in zip(episode(monkeypatch), (2, 4, 6), strict=True):
        torch.testing.assert_close(found, exact(steps), rtol=1e-9, atol=1e-9)
    short = episode(monkeypatch, forget=True)
    torch.testing.assert_close(short[0], exact(2), rtol=1e-9, atol=1e-9)
    assert (short[2] - exact(6)).abs() > 0.1 * exact(6).abs()


def test_pes_with_one_piece_is_es(network: Any) -> None:
    settings: dict[str, Any] = {"optimizer": functional_optimizer(sgd, lr=0.1), "pairs": 3, "seed": 5}
    inputs: Any = network.problem, network.params, network.hparams
    whole, pieces = None, None
    for _ in range(3):
        one = es(*inputs, whole, steps=4, **settings)
        other = pes(*inputs, pieces, horizon=4, truncation=4, **settings)
        torch.testing.assert_close(one.gradients, other.gradients, rtol=0.0, atol=0.0)
        whole, pieces = one.state, other.state


def test_estimates_scatter_around_the_exact_gradient(network: Any) -> None:
    optimizer = functional_optimizer(sgd, lr=0.05)
    inputs: Any = network.problem, network.params, network.hparams
    expected = unrolled(*inputs, steps=3, optimizer=optimizer).gradients
    found = es(*inputs, steps=3, optimizer=optimizer, pairs=600, sigma=1e-3).gradients
    for name, value in expected.items():
        assert ((found[name] - value).norm() / value.norm()) < 0.2
        assert (found[name] * value > 0).all()


def test_a_saved_search_goes_on_to_the_bit(network: Any) -> None:
    settings: dict[str, Any] = {"optimizer": SGD, "horizon": 6, "truncation": 2, "pairs": 2}
    inputs: Any = network.problem, network.params, network.hparams
    state, saved, found = None, None, []
    for call in range(5):
        result = pes(*inputs, state, **settings)
        state = result.state
        found.append(result.gradients["decay"])
        if call == 1:
            saved = io.BytesIO()
            torch.save(state, saved)
    assert saved is not None
    saved.seek(0)
    state = torch.load(saved, weights_only=True)
    for before in found[2:]:
        result = pes(*inputs, state, **settings)
        state = result.state
        assert torch.equal(result.gradients["decay"], before)
    assert not torch.equal(found[0], found[3])  # a new training draws anew


def test_pairs_begin_anew_after_the_horizon() -> None:
    settings: dict[str, Any] = {"optimizer": SGD, "horizon": 4, "truncation": 2, "pairs": 2}
    ages, state = [], None
    for _ in range(5):
        state = pes(LINEAR, *START, state, **settings).state
        ages.append(state["age"])
    assert ages == [2, 4, 2, 4, 2]
    noise = evolution._Search(LINEAR, *START, None, 2, 0.01, 0)
    drawn = [noise.draw() for _ in range(5)]
    torch.testing.assert_close(state["accumulated"], drawn[4])
    moved = {"goal": START[1]["goal"] + drawn[4][0, 0]}
    expected = unroll(LINEAR, START[0], moved, steps=2, optimizer=SGD)
    torch.testing.assert_close(state["workers"][0][0]["params"], expected.params)


def test_losses_are_numbered_since_the_training_began() -> None:
    seen: list[int] = []

    def losses(index: int) -> Any:
        seen.append(index)
        return LINEAR.train_loss

    settings: dict[str, Any] = {"optimizer": SGD, "horizon": 4, "truncation": 2, "pairs": 1, "train_losses": losses}
    state = pes(LINEAR, *START, **settings).state
    seen.clear()
    pes(LINEAR, *START, state, **settings)
    assert seen == [2, 3, 2, 3]


def test_a_hyperparameter_may_enter_where_nothing_is_differentiable() -> None:
    def train_loss(params: Tensors, hparams: Tensors) -> Tensor:
        return (params["w"] * float(hparams["goal"])).sum()

    problem = Problem(train_loss, LINEAR.val_loss)
    found = es(problem, *START, steps=2, optimizer=functional_optimizer(sgd, lr=0.2), pairs=400).gradients["goal"]
    # w = start - 0.4 goal
    expected = -0.4 * (START[0]["w"] - 0.6).sum() + 0.3
    torch.testing.assert_close(found, expected, rtol=0.2, atol=0.05)


def test_what_has_no_influence_is_refused_at_first() -> None:
    hparams = START[1] | {"idle": torch.tensor(1.0).double()}
    with pytest.raises(ValueError, match="zero hypergradient: 'idle' is not reached"):
        es(LINEAR, START[0], hparams, steps=2, optimizer=SGD)
    with pytest.raises(ValueError, match="zero hypergradient: 'idle' is not reached"):
        pes(LINEAR, START[0], hparams, horizon=2, truncation=2, optimizer=SGD)


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="pairs must be at least 1, got 0; sigma must be positive, got 0"):
        es(LINEAR, *START, steps=1, optimizer=SGD, pairs=0, sigma=0)
    with pytest.raises(ValueError, match="horizon must be a multiple of truncation, got horizon=15, truncation=10"):
        pes(LINEAR, *START, horizon=15, optimizer=SGD)
    state = pes(LINEAR, *START, horizon=20, optimizer=SGD, pairs=2).state
    with pytest.raises(ValueError, match="the state has 2 pairs, not 3"):
        pes(LINEAR, *START, state, horizon=20, optimizer=SGD, pairs=3)
