"""Statistics of single samples' gradients of a whole module: by layer rules where there are some, by vmap elsewhere."""

from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from lightning_hpo.nn.per_sample import PerSampleGradients, compiled_modules
from lightning_hpo.stateless import loss_of, per_sample_statistics

__all__ = ["SingleSampleSums", "SingleSamples"]

_CHUNK_BYTES = 2**25  # of gradients that vmap makes at a time
_MOST = 64  # samples at a time: beyond that nothing becomes faster
_LOOK = 4  # samples by which rules are judged
_AGREE = 0.1  # relative; the pass may have run in bfloat16


class SingleSampleSums(NamedTuple):
    r"""What is kept of the gradients :math:`g_i` of single samples' losses.

    Args:
        squared_norms: :math:`\|g_i\|^2`, shape ``(n,)``, in float64.
        inner_products: :math:`\langle g_i, g \rangle` with the gradient that was given, shape ``(n,)``, in float64;
            zero without one.
        second_moments: :math:`\sum_i g_i^2` by the name of the parameter; empty if not asked for.
    """

    squared_norms: Tensor
    inner_products: Tensor
    second_moments: dict[str, Tensor]


class SingleSamples:
    r"""Looks at single samples' gradients with respect to all parameters, for no more than that has to cost.

    Parameters of layers with a rule are read out of the user's own backward pass by
    :class:`~lightning_hpo.stateless.PerSampleGradients`. Only the rest, say those of a layer that the user has written,
    is differentiated sample by sample in a pass of its own; that pass makes no gradients for the others. There is none
    if every parameter has a rule.

    Rules do not see a weight that is also used outside its layer, nor layers whose first dimension does not count the
    samples. So, at the first question, some samples are differentiated with respect to these weights, too; unless both
    agree, rules are given up, :attr:`given_up` says why, and vmap does all of it. With dropout, which draws anew in
    every pass, that comparison is left out.

    Args:
        module: The user's module.
        parameters: Those to look at, by name.
        max_samples: Only look at the first so many samples; None for all.
        keep: Whether inner products and second moments will be asked for.

    Attributes:
        given_up: Why the rules of layers are not used any more; empty while they are.

    Example:
        >>> class Net(nn.Sequential):
        ...     def training_step(self, batch):
        ...         return self(batch).mean()
        >>> net, batch = Net(nn.Linear(2, 1, bias=False)), torch.tensor([[1.0, 2.0], [0.0, 3.0]])
        >>> samples = SingleSamples(net, dict(net.named_parameters()))
        >>> samples.enabled = True
        >>> net.training_step(batch).backward()
        >>> samples.take(batch, scale=2).squared_norms
        tensor([5., 9.], dtype=torch.float64)
    """

    def __init__(
        self, module: nn.Module, parameters: Mapping[str, Tensor], max_samples: int | None = None, keep: bool = False
    ) -> None:
        self.module, self.parameters, self.max_samples = module, dict(parameters), max_samples
        self.given_up = ""
        self._rules: PerSampleGradients | None = None
        self._trusted = False
        rules = PerSampleGradients(module, max_samples, keep=keep, strict=False)
        self._covered = self.parameters.keys() & set(rules.covered)
        if not compiled_modules(module) and self._covered == set(rules.covered) and self._covered:
            self._rules = rules.attach()
            self.enabled = False

    @property
    def enabled(self) -> bool:
        """Whether the next pass is looked at; set it before the forward pass."""
        return self._rules is not None and self._rules.enabled

    @enabled.setter
    def enabled(self, value: bool) -> None:
        if self._rules is not None and not self._rules.problem:
            self._rules.enabled = value
            if value:
                self._rules.clear()

    def take(
        self,
        batch: Any,
        scale: Tensor | float = 1.0,
        gradients: Mapping[str, Tensor] | None = None,
        moments: bool = False,
    ) -> SingleSampleSums:
        """The statistics of the samples of the latest backward pass.

        Args:
            batch: What its training step was given.
            scale: What turns a sample's contribution to the gradient of that pass into the gradient of its own loss:
                the number of samples, where the loss was their mean.
            gradients: A gradient to take inner products with; a name that is missing counts as zero.
            moments: Whether to sum the squares of every coordinate.

        Returns:
            The sums.

        Raises:
            RuntimeError: If a part without rules cannot be differentiated sample by sample.
        """
        found: list[SingleSampleSums] = []
        if (squares := self._squares(batch, scale)) is not None:
            found.append(self._by_rules(squares, scale, gradients, moments))
        if rest := {name: p for name, p in self.parameters.items() if not found or name not in self._covered}:
            found.append(self._by_vmap(rest, batch, gradients, moments, self.max_samples))
        return SingleSampleSums(
            torch.stack([sums.squared_norms for sums in found]).sum(0),
            torch.stack([sums.inner_products for sums in found]).sum(0),
            {name: moment for sums in found for name, moment in sums.second_moments.items()},
        )

    def remove(self) -> None:
        """Removes every hook."""
        if self._rules is not None:
            self._rules.remove()
            self._rules = None

    def _squares(self, batch: Any, scale: Tensor | float) -> Tensor | None:
        """Squared norms by the rules, or None if they are not to be used."""
        rules, squares = self._rules, cast(Tensor | None, None)
        if rules is None:
            return None
        try:
            squares = rules.take().double() * scale * scale
        except RuntimeError as error:  # none of the layers was called
            rules.problem = rules.problem or str(error)
        if squares is not None and not (self._trusted or _draws(self.module) or self._agrees(squares, batch)):
            rules.problem = "rules of layers do not agree with the derivatives of single samples"
        self._trusted = True
        if not rules.problem:
            return squares
        self.given_up = rules.problem
        self.remove()
        return None

    def _agrees(self, squares: Tensor, batch: Any) -> bool:
        """Whether derivatives say the same of the first samples; leaves random numbers as they were."""
        covered = {name: self.parameters[name] for name in self._covered}
        found = squares[:_LOOK]
        with torch.random.fork_rng([squares.device] if squares.is_cuda else []):
            exact = self._by_vmap(covered, batch, None, False, len(found)).squared_norms
        if exact.shape != found.shape:
            return False
        return bool(((found - exact).abs() <= _AGREE * exact.max()).all()) or not bool(torch.isfinite(found).all())

    def _by_rules(
        self, squares: Tensor, scale: Tensor | float, gradients: Mapping[str, Tensor] | None, moments: bool
    ) -> SingleSampleSums:
        rules = cast(PerSampleGradients, self._rules)
        inner = torch.zeros_like(squares) if gradients is None else rules.inner_products(gradients).double() * scale
        second = rules.second_moments() if moments else {}
        return SingleSampleSums(squares, inner, {name: moment * scale * scale for name, moment in second.items()})

    def _by_vmap(
        self,
        parameters: Mapping[str, Tensor],
        batch: Any,
        gradients: Mapping[str, Tensor] | None,
        moments: bool,
        max_samples: int | None,
    ) -> SingleSampleSums:
        size = sum(p.numel() * max(4, p.dtype.itemsize) for p in parameters.values())
        with torch.enable_grad():
            found = per_sample_statistics(
                loss_of(self.module),
                parameters,
                batch,
                chunk_size=max(1, min(_MOST, _CHUNK_BYTES // size)),
                gradients=gradients,
                moments=moments,
                max_samples=max_samples,
                sums=False,
            )
        squares = found.squared_norms.double()
        inner = torch.zeros_like(squares) if found.inner_products is None else found.inner_products.double()
        return SingleSampleSums(squares, inner, found.second_moments or {})


def _draws(module: nn.Module) -> bool:
    """Whether dropout makes two passes over the same samples differ."""
    layers = [layer for layer in module.modules() if layer.training]
    return any(
        (isinstance(layer, _DropoutNd) and layer.p > 0)
        or (type(layer).__name__ == "DropPath" and bool(getattr(layer, "drop_prob", 0)))
        for layer in layers
    )
