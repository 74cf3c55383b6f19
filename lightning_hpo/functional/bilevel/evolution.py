"""Hypergradients from losses alone: evolution strategies over whole and over truncated inner training."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_hpo.functional.bilevel.inner_steps import Batches, Moment, unroll
from lightning_hpo.functional.bilevel.optimizer_steps import FunctionalOptimizer, State
from lightning_hpo.functional.bilevel.problem import (
    HypergradientResult,
    Point,
    Problem,
    Tensors,
    require_reached,
    wide_dtype,
)
from lightning_hpo.functional.bilevel.trees import TreeLayout

__all__ = ["es", "pes"]


def es(
    problem: Problem,
    params: Mapping[str, Tensor],
    hparams: Mapping[str, Tensor],
    state: Mapping[str, Any] | None = None,
    *,
    steps: int,
    optimizer: FunctionalOptimizer,
    train_losses: Batches = None,
    states: Mapping[str, State] | None = None,
    pairs: int = 8,
    sigma: float = 0.01,
    seed: int = 0,
) -> HypergradientResult:
    r"""Hypergradient of the validation loss after T inner steps, smoothed, by antithetic evolution strategies.

    .. math::

        \frac{dL}{d\theta} \approx \frac{1}{N} \sum_{i=1}^{N}
        \xi_i \frac{L(\theta + \xi_i) - L(\theta - \xi_i)}{2 \sigma^2}, \qquad \xi_i \sim \mathcal N(0, \sigma^2 I)

    It follows no derivative in the hyperparameters, so they may enter through sampling, rounding or branches. Noise
    grows with their number. All ranks draw the same :math:`\xi`, and hyperparameters that must be positive should be
    given on a logarithmic scale, since they are moved by :math:`\sigma` either way.

    Args:
        problem: The problem.
        params: Where each training begins.
        hparams: Hyperparameters, those of the optimizer among them.
        state: That of the result before, with the generator.
        steps: T, at least 1.
        optimizer: As for :func:`~lightning_hpo.functional.bilevel.unrolled.unrolled`.
        train_losses: As for :func:`~lightning_hpo.functional.bilevel.unrolled.unrolled`.
        states: The optimizer's states at the start; empty where None.
        pairs: N, trainings up and down.
        sigma: :math:`\sigma`, positive.
        seed: Of the generator, where there is no state.

    Returns:
        The hypergradient, no report, and ``{"generator": its state}``.

    Raises:
        ValueError: If a setting is out of range, or the loss does not change with a hyperparameter (tried in the first
            call).

    References:
        Salimans et al., "Evolution Strategies as a Scalable Alternative to Reinforcement Learning", 2017.

    Example:
        >>> from lightning_hpo.functional.bilevel.optimizer_steps import functional_optimizer, sgd
        >>> problem = Problem(lambda w, h: ((w["w"] - h["goal"]) ** 2).sum(), lambda w, h: (w["w"] ** 2).sum())
        >>> start, goal = {"w": torch.tensor([3.0])}, {"goal": torch.tensor(3.0)}
        >>> sgd_step = functional_optimizer(sgd, lr=0.25)
        >>> found = es(problem, start, goal, steps=3, optimizer=sgd_step, pairs=1000).gradients["goal"]
        >>> bool(abs(found - 5.25) < 0.5)
        True
    """
    search = _Search(problem, params, hparams, state, pairs, sigma, seed)

    def train(values: Tensors) -> Moment:
        return unroll(
            problem, params, values, steps=steps, optimizer=optimizer, train_losses=train_losses, states=states
        )

    if not state:
        search.require_influence(train)
    noise = search.draw()
    losses = [[search.loss(train(moved), moved) for moved in search.moved(xi)] for xi in noise]
    return HypergradientResult(search.estimate(noise, losses), None, {"generator": search.generator.get_state()})


def pes(
    problem: Problem,
    params: Mapping[str, Tensor],
    hparams: Mapping[str, Tensor],
    state: Mapping[str, Any] | None = None,
    *,
    horizon: int,
    optimizer: FunctionalOptimizer,
    truncation: int = 10,
    train_losses: Batches = None,
    states: Mapping[str, State] | None = None,
    pairs: int = 8,
    sigma: float = 0.01,
    seed: int = 0,
) -> HypergradientResult:
    r"""Persistent evolution strategies: :func:`es` in pieces, without the bias of short horizons.

    Each of N pairs of inner trainings goes on for K steps a call and is then scored on the validation loss. A pair
    remembers the sum of all perturbations since it began,

    .. math::

        \frac{dL}{d\theta} \approx \frac{1}{N} \sum_{i=1}^{N}
        \Big(\sum_{s \le t} \xi_{i,s}\Big) \frac{L^+_{i,t} - L^-_{i,t}}{2 \sigma^2}

    so that the estimates of one training of ``horizon`` steps add up to the gradient of the sum of its scores. After
    ``horizon`` steps all pairs begin anew from ``params``. With K = ``horizon`` it is :func:`es`. Memory is 2 N times
    parameters and states.

    Args:
        problem: The problem.
        params: Where trainings begin, and begin anew.
        hparams: Hyperparameters, those of the optimizer among them.
        state: That of the result before.
        horizon: Steps of a whole training, a multiple of ``truncation``.
        optimizer: As for :func:`~lightning_hpo.functional.bilevel.unrolled.unrolled`.
        truncation: K, steps a call.
        train_losses: A list for the steps of this call, or a function of the step's number since the training began;
            the problem's where None.
        states: The optimizer's states at the start; empty where None.
        pairs: N.
        sigma: :math:`\sigma`, positive.
        seed: Of the generator, where there is no state.

    Returns:
        The hypergradient, no report, and the trainings: ``generator``, ``age``, ``accumulated`` and ``workers``.

    Raises:
        ValueError: If a setting is out of range, or the loss does not change with a hyperparameter (tried in the first
            call).

    References:
        Vicol, Metz and Sohl-Dickstein, "Unbiased Gradient Estimation in Unrolled Computation Graphs with Persistent
        Evolution Strategies", ICML 2021, alg. 2.

    Example:
        >>> from lightning_hpo.functional.bilevel.optimizer_steps import functional_optimizer, sgd
        >>> problem = Problem(lambda w, h: ((w["w"] - h["goal"]) ** 2).sum(), lambda w, h: (w["w"] ** 2).sum())
        >>> start, goal = {"w": torch.tensor([3.0])}, {"goal": torch.tensor(3.0)}
        >>> settings = {"optimizer": functional_optimizer(sgd, lr=0.25), "horizon": 20, "pairs": 2}
        >>> first = pes(problem, start, goal, **settings)
        >>> second = pes(problem, start, goal, first.state, **settings)
        >>> first.state["age"], second.state["age"]
        (10, 20)
    """
    if truncation < 1 or horizon < 1 or horizon % truncation:
        raise ValueError(f"horizon must be a multiple of truncation, got horizon={horizon}, truncation={truncation}")
    search = _Search(problem, params, hparams, state, pairs, sigma, seed)
    begin = Moment({name: value.detach() for name, value in params.items()}, dict(states or {}))
    fresh = not state or state["age"] >= horizon
    age = 0 if fresh else state["age"]  # type: ignore[index]
    starts = [(begin, begin)] * pairs if fresh else [_moments(pair) for pair in state["workers"]]  # type: ignore[index]
    if len(starts) != pairs:
        raise ValueError(f"the state has {len(starts)} pairs, not {pairs}")

    def train(values: Tensors, start: Moment = begin) -> Moment:
        return unroll(
            problem,
            start.params,
            values,
            steps=truncation,
            optimizer=optimizer,
            train_losses=train_losses,
            states=start.states,
            first=age,
        )

    if not state:
        search.require_influence(train)
    noise = search.draw()
    accumulated = noise if fresh else state["accumulated"] + noise  # type: ignore[index]
    losses, workers = [], []
    for xi, pair in zip(noise, starts, strict=True):
        values = search.moved(xi)
        ends = [train(moved, start) for moved, start in zip(values, pair, strict=True)]
        losses.append([search.loss(end, moved) for end, moved in zip(ends, values, strict=True)])
        workers.append([end._asdict() for end in ends])
    kept = {"generator": search.generator.get_state(), "age": age + truncation, "accumulated": accumulated}
    return HypergradientResult(search.estimate(accumulated, losses), None, kept | {"workers": workers})


class _Search:
    """Perturbations of the hyperparameters, and what follows from the losses there."""

    def __init__(
        self,
        problem: Problem,
        params: Mapping[str, Tensor],
        hparams: Mapping[str, Tensor],
        state: Mapping[str, Any] | None,
        pairs: int,
        sigma: float,
        seed: int,
    ) -> None:
        problems = [] if pairs >= 1 else [f"pairs must be at least 1, got {pairs!r}"]
        problems += [] if sigma > 0 else [f"sigma must be positive, got {sigma!r}"]
        if problems:
            raise ValueError("; ".join(problems))
        self.problem, self.pairs, self.sigma = problem, pairs, sigma
        self.hparams = {name: value.detach() for name, value in Point(params, hparams).hparams.items()}
        self.layout, self.dtype = TreeLayout(self.hparams), wide_dtype(self.hparams)
        self.flat = self.layout.ravel(self.hparams, dtype=self.dtype)
        self.generator = torch.Generator().manual_seed(seed)
        if state:
            self.generator.set_state(state["generator"])

    def draw(self) -> Tensor:
        """One perturbation a pair; drawn on the host, so that every device sees the same."""
        noise = torch.randn(self.pairs, self.layout.size, generator=self.generator, dtype=self.dtype)
        return self.sigma * noise.to(self.flat.device)

    def moved(self, xi: Tensor) -> tuple[Tensors, Tensors]:
        return self.layout.unravel(self.flat + xi), self.layout.unravel(self.flat - xi)

    def loss(self, moment: Moment, hparams: Tensors) -> Tensor:
        with torch.no_grad():
            return self.problem.val_loss(moment.params, hparams).reshape(())

    def estimate(self, accumulated: Tensor, losses: list[list[Tensor]]) -> Tensors:
        values = torch.stack([torch.stack(pair) for pair in losses]).flatten()
        above, below = self.problem.reduce(values).to(self.dtype).view(self.pairs, 2).unbind(1)
        return self.layout.unravel(accumulated.T @ (above - below) / (2 * self.sigma**2 * self.pairs))

    def require_influence(self, train: Callable[[Tensors], Moment]) -> None:
        """Moves one hyperparameter after the other: noise would hide that one has no influence."""
        tried = [self.hparams, *({**self.hparams, key: value + self.sigma} for key, value in self.hparams.items())]
        losses = self.problem.reduce(torch.stack([self.loss(train(values), values) for values in tried])).tolist()
        require_reached([name for name, loss in zip(self.hparams, losses[1:], strict=True) if loss == losses[0]])


def _moments(pair: list[dict[str, Any]]) -> tuple[Moment, ...]:
    return tuple(Moment(**worker) for worker in pair)
