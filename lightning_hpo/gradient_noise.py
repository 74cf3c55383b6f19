"""How noisy is the gradient? Sums from which the variance of single-sample gradients follows, read while training."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from lightning_hpo import distributed
from lightning_hpo.functional.batching.variances import coordinate_batch, group_trace, inner_product_variance
from lightning_hpo.gradients import GroupNorms, squared_norm
from lightning_hpo.noise_estimators import Estimator
from lightning_hpo.sharded_gradients import ShardedGradients
from lightning_hpo.single_samples import SingleSamples
from lightning_hpo.stateless import PerSampleGradients

__all__ = ["GradientNoise", "Reading"]

_FEWEST_GROUPS = 4  # below this the variance between micro-batches is mostly luck


class Reading(NamedTuple):
    """What one optimizer step tells of the gradient's noise, reduced over ranks, still on the device.

    Args:
        values: In float64: trace of the covariance of single-sample gradients, squared norm of the mean gradient,
            variance of the inner products with it, batch size that the coordinate-wise test asks for; the last two are
            0 where they are not needed.
        samples: Samples that the mean gradient was taken over.
    """

    values: Tensor
    samples: int


class GradientNoise:
    """Reads the noise of the gradient out of the steps that a training loop takes anyway.

    Args:
        module: The user's module.
        parameters: Those whose gradient is looked at, by name.
        estimators: Those that may be used, cheapest first: ``"micro_batch"`` compares the gradients of micro-batches
            and ranks, ``"ghost"`` takes the norms of single-sample gradients from the layers, ``"vmap"`` does so and
            differentiates single samples in an extra pass for what the layers do not tell, ``"difference"`` compares
            two steps in a row.
        inner: Whether the inner products with the mean gradient are needed; then ``"ghost"`` or ``"vmap"`` it is.
        coordinate: Quantile of the coordinate-wise test, or None where it is not needed; the same holds.
        max_samples: Samples that ``"ghost"`` and ``"vmap"`` look at in each micro-batch; None for all.
        sharded: Whether each rank holds a part of every gradient; then ``"micro_batch"`` it is, and a group is a
            micro-batch of all ranks together.
        strict: Whether it is an error if samples cannot be told apart in a layer; otherwise ghost norms are given up.
    """

    def __init__(
        self,
        module: nn.Module,
        parameters: Mapping[str, Tensor],
        estimators: Sequence[Estimator],
        inner: bool = False,
        coordinate: float | None = None,
        max_samples: int | None = None,
        sharded: bool = False,
        strict: bool = True,
    ) -> None:
        self.estimators, self.inner, self.coordinate, self.max_samples = estimators, inner, coordinate, max_samples
        self.module, self._parameters, self.strict = module, dict(parameters), strict
        self.using: Estimator | None = None  # in this window
        self._previous: list[Tensor] = []  # the last step's gradient, for "difference"
        self._previous_samples = 0
        self._sums: list[Tensor] = []
        self._seen = 0  # micro-batches of the window
        self._batch: Any = None
        self._shards = ShardedGradients(self._parameters.values()) if sharded else None
        self._groups: GroupNorms | None = None
        if "micro_batch" in estimators and not sharded:
            self._groups = GroupNorms(self._parameters.values())
        self._ghost: PerSampleGradients | None = None
        if "ghost" in estimators:
            self._ghost = PerSampleGradients(module, max_samples, keep=self._single, strict=strict)
            self._ghost.attach()
        self._samples: SingleSamples | None = None
        if "vmap" in estimators:
            self._samples = SingleSamples(module, self._parameters, max_samples, keep=self._single)
        self.begin(0)

    @property
    def _single(self) -> bool:
        return self.inner or self.coordinate is not None

    def begin(self, groups: int) -> None:
        """Begins a window.

        Args:
            groups: Groups of samples whose gradients can be told apart in it; 0 if nothing shall be read from it.
        """
        self._sums, self._seen = [], 0
        self.using = self._choose(groups) if groups else None
        if self._shards is not None:
            self._shards.clear()
            self._shards.enabled = self.using is not None
        if self._groups is not None:
            self._groups.clear()
            self._groups.enabled = self.using == "micro_batch"
        if self._ghost is not None:
            self._ghost.clear()
            self._ghost.enabled = self.using == "ghost" and not self._ghost.problem
        self._await(groups // distributed.world_size())

    def _await(self, left: int) -> None:
        """Looks at single samples in the window's last micro-batch."""
        self._left = left
        if self._samples is not None:
            self._samples.enabled = self.using == "vmap" and left == 1

    def _choose(self, groups: int) -> Estimator | None:
        least = _FEWEST_GROUPS if "ghost" in self.estimators else 2  # few groups are better than a biased estimate
        for estimator in self.estimators:
            if estimator != "micro_batch" or groups >= least:
                return estimator
        return None

    def before_backward(self) -> None:
        """Prepares for the backward pass of a micro-batch; call it when gradients will only be added to."""
        if self._shards is not None:
            self._shards.before_backward()
        if self._groups is not None:
            self._groups.drop()

    def after_backward(self, batch: Any, size: int, unscale: Tensor | float) -> None:
        """Notes what the backward pass of one micro-batch has shown.

        Args:
            batch: The micro-batch, for ``"vmap"``.
            size: Its samples on this rank.
            unscale: What turns the gradient seen into that of the micro-batch's mean loss.
        """
        if self._shards is not None:
            self._shards.after_backward()
        elif self.using == "micro_batch" and self._groups is not None:
            self._groups.close(size)
        elif self.using == "ghost" and self._ghost is not None:
            self._take_ghost(self._ghost, size, unscale)
        self._seen += 1
        self._size, self._unscale = size, unscale
        self._batch = batch if self.using == "vmap" else None
        self._await(self._left - 1)

    def _take_ghost(self, ghost: PerSampleGradients, size: int, unscale: Tensor | float) -> None:
        rows = 0 if ghost.problem else len(squares := ghost.take().double())
        if rows == min(size, self.max_samples or size):
            self._sums.append(squares.mean() * size * (size * unscale) ** 2)
            return
        problem = ghost.problem or f"layers see {rows} rows where the batch has {size} samples"
        if self.strict:
            raise RuntimeError(f"ghost norms: {problem}.")
        if distributed.rank() == 0:
            warnings.warn(
                f"Ghost norms are given up, and steps are compared with each other instead: {problem}.", stacklevel=2
            )
        ghost.enabled, self.using = False, None
        self.estimators = [name if name != "ghost" else "difference" for name in self.estimators]

    def read(self, sizes: Sequence[int], samples: int) -> Reading | None:
        """Reduces the window to one reading; call it where gradients are averaged, unscaled and not clipped.

        Args:
            sizes: Samples of the window's micro-batches on this rank.
            samples: Samples of the window on all ranks.

        Returns:
            The reading, or None if this window gives none.
        """
        unseen = self._seen != len(sizes)  # a step without a loss
        unseen = unseen or (self.using == "vmap" and self._left != 0)
        if unseen or self.using is None or samples < 2:
            return None
        if self._shards is not None:
            weighted, square = self._shards.read(sizes, self._unscale)
            trace = group_trace(weighted, samples, len(sizes), square)
            return Reading(torch.stack([trace, square, 0 * square, 0 * square]), samples)
        gradients = {name: p.grad for name, p in self._parameters.items() if p.grad is not None}
        if not gradients:
            return None
        if self.using == "difference":
            return self._difference(list(gradients.values()), samples)
        square = squared_norm(gradients.values())
        single = self._single_samples(gradients, samples) if self._single or self.using == "vmap" else {}
        weighted = single["squares"] * sum(sizes) if self.using == "vmap" else self._weighted_squares()
        groups = len(sizes) * distributed.world_size() if self.using == "micro_batch" else samples
        trace = group_trace(distributed.sum(weighted.to(square)), samples, groups, square)
        zero = torch.zeros_like(square)
        values = (trace, square, single.get("inner", zero), single.get("coordinate", zero))
        return Reading(torch.stack([value.to(square) for value in values]), samples)

    def _weighted_squares(self) -> Tensor:
        """The window's sum of n_j |g_j|^2 on this rank."""
        if self.using == "ghost":
            return torch.stack(self._sums).sum()
        return cast(GroupNorms, self._groups).weighted_squares() * (self._unscale * self._unscale)

    def _difference(self, gradients: list[Tensor], samples: int) -> Reading | None:
        """Two steps in a row as two groups: biased where the gradient has changed between them."""
        before, self._previous = self._previous, [g.detach().clone() for g in gradients]
        comparable, self._previous_samples = self._previous_samples == samples, samples
        if not before or not comparable:
            return None
        squares = (squared_norm(before) + squared_norm(gradients)) * samples
        mean = squared_norm(torch._foreach_add(before, gradients)) / 4
        trace = group_trace(squares, 2 * samples, 2, mean)
        return Reading(torch.stack([trace, mean, 0 * mean, 0 * mean]), 2 * samples)

    def _single_samples(self, gradients: Mapping[str, Tensor], samples: int) -> dict[str, Tensor]:
        """Means over single samples of the last micro-batch of every rank, and what follows from them."""
        squares, inner, moments = self._by_vmap(gradients) if self._ghost is None else self._by_ghost(gradients)
        local = torch.stack([squares.new_tensor(len(squares)), squares.sum(), inner.sum(), inner.square().sum()])
        count, squared, summed, summed_squares = distributed.sum(local).unbind()
        means = {"squares": squared / count}
        if self.inner:
            square = squared_norm(gradients.values())
            means["inner"] = inner_product_variance(summed_squares, count, square, summed)
        if self.coordinate is not None:
            second = [distributed.sum(moments[name]).double() * (samples / count) for name in gradients]
            means["coordinate"] = coordinate_batch(
                second, [g.double() for g in gradients.values()], samples, self.coordinate
            )
        return means

    def _by_ghost(self, gradients: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        ghost, unscale = cast(PerSampleGradients, self._ghost), self._size * self._unscale
        squares = ghost.take().double() * unscale * unscale
        inner = ghost.inner_products(gradients).double() * unscale
        moments = ghost.second_moments() if self.coordinate is not None else {}
        return squares, inner, {name: moment * unscale * unscale for name, moment in moments.items()}

    def _by_vmap(self, gradients: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        known = gradients if self._single else None
        return cast(SingleSamples, self._samples).take(
            self._batch, self._size * self._unscale, known, moments=self.coordinate is not None
        )

    def state_dict(self) -> dict[str, Any]:
        """The last step's gradient, where steps are compared, and the estimators that are left."""
        return {
            "gradient": list(self._previous),
            "samples": self._previous_samples,
            "estimators": list(self.estimators),
        }

    def load_state_dict(self, state_dict: dict[str, Any], device: torch.device | str) -> None:
        """Goes on with the gradient of the step before.

        Args:
            state_dict: What :meth:`state_dict` returned; nothing happens if it is empty.
            device: Where the module is.
        """
        if state_dict:
            self._previous = [g.to(device) for g in state_dict["gradient"]]
            self._previous_samples = state_dict["samples"]
            if set(state_dict["estimators"]) <= {*self.estimators, "difference"}:
                self.estimators = list(state_dict["estimators"])

    def remove(self) -> None:
        """Removes every hook."""
        if self._groups is not None:
            self._groups.remove()
        if self._ghost is not None:
            self._ghost.remove()
        if self._samples is not None:
            self._samples.remove()
