"""Single-loop bilevel training with normalised momentum (BO-REP), and its un-normalised relatives."""

import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import inf
from typing import Any

import torch
from torch import Tensor

from lightning_hpo.functional.arguments import is_whole
from lightning_hpo.functional.bilevel.epoch_sgd import epoch_sgd, projected_sgd
from lightning_hpo.functional.bilevel.outer_gradient import OuterGradient, Solver, largest_curvature, outer_gradient
from lightning_hpo.functional.bilevel.problem import Problem, Tensors, identity, scalar, wide_dtype
from lightning_hpo.functional.bilevel.products import Product
from lightning_hpo.functional.bilevel.single_loop_state import SingleLoopInfo, SingleLoopState, judge, wide_zeros
from lightning_hpo.functional.bilevel.trees import TreeLayout
from lightning_hpo.functional.optim.normalized_momentum import Normalize, momentum_problems, step_factors

__all__ = ["SingleLoopBilevel", "SingleLoopInfo", "SingleLoopState"]

BatchLoss = Callable[[Tensors, Tensors, Any], Tensor]


@dataclass(frozen=True)
class SingleLoopBilevel:
    r"""Minimises :math:`f(x, y^*(x))` over x with :math:`y^*(x) = \arg\min_y g(x, y)`, one stochastic step at a time.

    Every :math:`I`-th iteration, except for the first, begins with :math:`N` steps
    :math:`y \leftarrow \Pi_{B(\bar y, R)}(y - \gamma \nabla_y G)` on fresh batches. Every iteration then goes

    .. math::

        h &= \nabla_x F - \nabla^2_{xy} G\, z \\
        z &\leftarrow z - \nu (\nabla^2_{yy} G\, z - \nabla_y F) \\
        m &\leftarrow \beta m + (1 - \beta) h \\
        x &\leftarrow x - \eta\, m / \max(\|m\|, m_0)

    so that each step of x has length :math:`\eta`, whatever the scale of the outer loss. ``normalize=False`` with
    ``interval=1`` and ``inner_steps=1`` is MA-SOBA, and ``solver="neumann"`` without momentum is StocBio. An object
    holds settings only; methods take a state and return the next one, and write to nothing that they are given.

    Args:
        inner_loss: :math:`G(y, x, \text{batch})`, a scalar, strongly convex in y for the theory to hold.
        outer_loss: :math:`F(y, x, \text{batch})`, a scalar.
        lr: Length of an outer step, :math:`\eta`.
        inner_lr: Inner step size :math:`\gamma`.
        z_lr: Step size on the linear system, :math:`\nu`; below :math:`2 / \lambda_{\max}` of :math:`\nabla^2_{yy} G`.
        momentum: :math:`\beta`.
        interval: Iterations between inner updates, :math:`I`.
        inner_steps: Steps of an inner update, :math:`N`.
        radius: :math:`R`, how far an inner update may go.
        normalize: ``"global"``: one norm; ``"per_group"``: one for each outer parameter; False: none.
        min_norm: :math:`m_0`: shorter momenta give shorter steps.
        solver: ``"step"``, or ``"neumann"`` for a series that is begun anew each time.
        neumann_steps: Products of the series.
        product: ``"exact"`` differentiates twice, ``"fd"`` takes differences of gradients.
        reduce: Mean over ranks of a flat vector.

    Raises:
        ValueError: If a setting is out of range; all are listed.

    References:
        Hao, Gong and Liu, "Bilevel Optimization under Unbounded Smoothness: A New Algorithm and Convergence Analysis",
        ICLR 2024, alg. 1; Chen, Xiao and Balasubramanian, "Optimal Algorithms for Stochastic Bilevel Optimization under
        Relaxed Smoothness Conditions" (MA-SOBA), JMLR 2024; Ji, Yang and Liang (StocBio), ICML 2021.

    Example:
        >>> from itertools import repeat
        >>> method = SingleLoopBilevel(
        ...     inner_loss=lambda y, x, _: ((y["y"] - x["x"]) ** 2).sum() / 2,
        ...     outer_loss=lambda y, x, _: ((y["y"] - 1) ** 2).sum() / 2,
        ...     lr=0.02, inner_lr=0.5, z_lr=0.5,
        ... )
        >>> state = method.start({"y": torch.zeros(1)}, {"x": torch.tensor([-2.0])})
        >>> state = method.refine(state, repeat(None), steps=20)
        >>> for _ in range(200):
        ...     state, info = method.step(state, repeat(None), repeat(None))
        >>> bool((state.outer["x"] - 1).abs() < 0.3)
        True
    """

    inner_loss: BatchLoss
    outer_loss: BatchLoss
    lr: float
    inner_lr: float
    z_lr: float = 0.01
    momentum: float = 0.9
    interval: int = 2
    inner_steps: int = 3
    radius: float = inf
    normalize: Normalize = "global"
    min_norm: float = 1e-10
    solver: Solver = "step"
    neumann_steps: int = 5
    product: Product = "exact"
    reduce: Callable[[Tensor], Tensor] = identity

    def __post_init__(self) -> None:
        checks = {
            f"inner_lr must be positive, got {self.inner_lr!r}": 0 < self.inner_lr < inf,
            f"z_lr must be positive, got {self.z_lr!r}": 0 < self.z_lr < inf,
            f"interval must be an integer of at least 1, got {self.interval!r}": is_whole(self.interval, 1),
            f"inner_steps must be an integer of at least 0, got {self.inner_steps!r}": is_whole(self.inner_steps, 0),
            f"radius must be positive, got {self.radius!r}": self.radius > 0,
            f"solver must be 'step' or 'neumann', got {self.solver!r}": self.solver in ("step", "neumann"),
            f"neumann_steps must be an integer of at least 0, got {self.neumann_steps!r}": is_whole(
                self.neumann_steps, 0
            ),
            f"product must be 'exact' or 'fd', got {self.product!r}": self.product in ("exact", "fd"),
        }
        problems = momentum_problems(self.lr, self.momentum, self.normalize, self.min_norm)
        problems += [problem for problem, holds in checks.items() if not holds]
        if problems:
            raise ValueError(f"`SingleLoopBilevel`: {'; '.join(problems)}.")

    def start(self, inner: Mapping[str, Tensor], outer: Mapping[str, Tensor]) -> SingleLoopState:
        """The first state: z and m are zero.

        Args:
            inner: Inner parameters by name.
            outer: Outer parameters by name.

        Returns:
            The state, on copies.

        Raises:
            ValueError: If a tensor is in both; all are named.
        """
        owners = {id(value): name for name, value in inner.items()}
        both = [f"'{owners[id(value)]}' is the outer '{name}'" for name, value in outer.items() if id(value) in owners]
        if both:
            raise ValueError(f"inner and outer parameters overlap: {', '.join(both)}")
        inner, outer = ({name: value.detach().clone() for name, value in part.items()} for part in (inner, outer))
        return SingleLoopState(inner, outer, wide_zeros(inner), wide_zeros(outer))

    def refine(
        self,
        state: SingleLoopState,
        train: Iterator[Any],
        *,
        steps: int,
        epochs: int | None = None,
        lr: float | None = None,
        radius: float = inf,
    ) -> SingleLoopState:
        """Brings y close to the solution for the first x, before anything else.

        Args:
            state: Where to begin.
            train: Training batches.
            steps: Steps of plain SGD, or of the first epoch of Epoch-SGD.
            epochs: Epochs of :func:`~lightning_hpo.functional.bilevel.epoch_sgd.epoch_sgd`; plain SGD where None.
            lr: Step size, the first one with epochs; ``inner_lr`` where None.
            radius: How far y may go, the first radius with epochs.

        Returns:
            The state with another y.
        """
        gradient, size = self._inner_gradient(state.outer, train), self.inner_lr if lr is None else lr
        if epochs is None:
            inner = projected_sgd(gradient, state.inner, lr=size, steps=steps, radius=radius)
        else:
            inner = epoch_sgd(gradient, state.inner, lr=size, steps=steps, epochs=epochs, radius=radius)
        return state._replace(inner=inner)

    def step(
        self, state: SingleLoopState, train: Iterator[Any], val: Iterator[Any], *, lr: float | None = None
    ) -> tuple[SingleLoopState, SingleLoopInfo]:
        """One iteration.

        Args:
            state: Where it begins.
            train: Training batches: one is drawn, and one for each inner step.
            val: Validation batches: one is drawn.
            lr: Length of this step in place of the usual one, for schedules.

        Returns:
            The next state, and how it went.

        Raises:
            ValueError: As :func:`~lightning_hpo.functional.bilevel.outer_gradient.outer_gradient`.
            FloatingPointError: If hypergradients were not finite ten times in a row.
        """
        inner, taken = self.inner_update(state.inner, state.outer, state.step, train)
        batch = next(train)
        found = self.estimate(inner, state.outer, state.z, batch, next(val))
        outer, m = self.outer_update(state.outer, state.m, found.gradients, lr)
        watch, info, grown = judge(state.watch, found.norms, found.loss, m, taken, self.z_lr)
        if grown:
            warnings.warn(watch.words(self.z_lr, self.curvature(inner, state.outer, batch)), stacklevel=2)
        if info.skipped:
            return state._replace(inner=inner, step=state.step + 1, watch=watch.plain()), info
        return SingleLoopState(inner, outer, found.z, m, state.step + 1, watch.plain()), info

    # The parts of a step; `SingleLoopTasks` puts them together in another way

    def inner_update(self, inner: Tensors, outer: Tensors, step: int, train: Iterator[Any]) -> tuple[Tensors, int]:
        """The inner steps that belong to an iteration.

        Args:
            inner: Inner parameters.
            outer: Outer parameters.
            step: Number of the iteration.
            train: Training batches.

        Returns:
            The inner parameters after them, and how many there were.
        """
        if not step or step % self.interval:
            return inner, 0
        gradient, count = self._inner_gradient(outer, train), self.inner_steps
        return projected_sgd(gradient, inner, lr=self.inner_lr, steps=count, radius=self.radius), count

    def estimate(self, inner: Tensors, outer: Tensors, z: Tensors, train: Any, val: Any) -> OuterGradient:
        """The hypergradient of one training and one validation batch.

        Args:
            inner: Inner parameters.
            outer: Outer parameters.
            z: The running solution.
            train: A training batch.
            val: A validation batch.

        Returns:
            The hypergradient, and what belongs to the next one.
        """
        settings: dict[str, Any] = {"z_lr": self.z_lr, "solver": self.solver, "neumann_steps": self.neumann_steps}
        return outer_gradient(self._problem(train, val), inner, outer, z, product=self.product, **settings)

    def outer_update(
        self, outer: Tensors, m: Tensors, gradients: Tensors, lr: float | None = None
    ) -> tuple[Tensors, Tensors]:
        """A step along a hypergradient.

        Args:
            outer: Outer parameters.
            m: Momentum.
            gradients: The hypergradient.
            lr: Length of this step in place of the usual one.

        Returns:
            Outer parameters and momentum after it.
        """
        m = {name: self.momentum * old + (1 - self.momentum) * gradients[name].to(old.dtype) for name, old in m.items()}
        # With one norm for all, the order of groups does not matter.
        factors = step_factors([[value] for value in m.values()], self.normalize, self.min_norm)
        size = self.lr if lr is None else lr
        steps = {name: size * factor * m[name] for name, factor in zip(m, factors, strict=True)}
        return {name: value - steps[name].to(value.dtype) for name, value in outer.items()}, m

    def curvature(self, inner: Tensors, outer: Tensors, train: Any) -> float:
        r"""The largest curvature of the inner loss, by power iteration, on the host.

        Args:
            inner: Inner parameters.
            outer: Outer parameters.
            train: A training batch.

        Returns:
            :math:`|\lambda|_{\max}`, what ``2 / z_lr`` must stay above.
        """
        return largest_curvature(self._problem(train, None), inner, outer, product=self.product).item()

    def _problem(self, train: Any, val: Any) -> Problem:
        return Problem(lambda y, x: self.inner_loss(y, x, train), lambda y, x: self.outer_loss(y, x, val), self.reduce)

    def _inner_gradient(self, outer: Tensors, train: Iterator[Any]) -> Callable[[Tensors], Tensors]:
        """Gradients of the inner loss, each on the next batch, averaged over ranks."""

        def gradient(inner: Tensors) -> Tensors:
            leaves = {name: value.detach().requires_grad_() for name, value in inner.items()}
            with torch.enable_grad():
                value = scalar(self.inner_loss(leaves, outer, next(train)), "inner loss")
            grads = torch.autograd.grad(value, list(leaves.values()), allow_unused=True, materialize_grads=True)
            layout = TreeLayout(inner)
            mean = self.reduce(layout.ravel(dict(zip(leaves, grads, strict=True)), dtype=wide_dtype(inner)))
            return layout.unravel(mean)

        return gradient
