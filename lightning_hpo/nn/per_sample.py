"""Hooks that read per-sample gradient statistics out of the user's own forward and backward passes."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Self
from weakref import WeakSet, ref

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_hpo.functional.batching.per_sample import Factors
from lightning_hpo.functional.batching.per_sample_rules import layer_factors, layer_rule, parameter_rules

__all__ = ["PerSampleGradients", "compiled_modules"]

_CAST_BY_AUTOCAST = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def compiled_modules(module: nn.Module) -> list[str]:
    """Parts of a module that are compiled already, and so do not run hooks that are added to them.

    Args:
        module: Any module.

    Returns:
        Their names.

    Example:
        >>> compiled_modules(nn.Sequential(nn.Linear(1, 1)))
        []
    """
    return [name or "the module itself" for name, part in module.named_modules() if _is_compiled(part)]


class PerSampleGradients:
    r"""Statistics of single samples' gradients, read out of the user's own forward and backward passes.

    Hooks on the layers see the inputs and the gradients of the outputs; squared norms follow from these layer by layer
    while the backward pass runs, and nothing of the size batch x parameters is ever held. No pass is added, no gradient
    is changed, nothing is copied to the host. A layer that is called several times in a pass, or that two modules
    share, counts with the sum of its calls.

    The figures are those of the loss as it is differentiated: where it is a mean over ``m`` samples, a sample's own
    squared norm is :math:`m^2` times what :meth:`take` returns. The first dimension of every layer's input must count
    the samples, and no layer may mix them: see :func:`lightning_hpo.stateless.batch_mixing_layers`.

    Works with autocast, checkpointing of activations, frozen parameters, layers that are not used, and losses of
    several forward passes over the same samples. Compiled modules are refused.

    Args:
        module: The user's module.
        max_samples: Only look at the first so many samples of each batch: cheaper, unbiased where batches are shuffled.
        keep: Keep inputs and output gradients until :meth:`clear` or the next forward pass, for
            :meth:`inner_products`, :meth:`second_moments` and :meth:`weighted_sum`.
        strict: Whether a layer whose samples cannot be told apart ends the backward pass in an error; otherwise the
            hooks are switched off for good and :attr:`problem` says why.

    Attributes:
        enabled: Switches the hooks off and on; in between they cost next to nothing.
        problem: Why the hooks were switched off; empty if they were not.

    Raises:
        ValueError: If ``max_samples`` is below 1.

    Example:
        >>> net = nn.Linear(2, 1)
        >>> with PerSampleGradients(net) as samples:
        ...     net(torch.tensor([[1.0, 2.0], [0.0, 3.0]])).sum().backward()
        ...     samples.take()
        tensor([ 6., 10.])
    """

    def __init__(
        self, module: nn.Module, max_samples: int | None = None, keep: bool = False, strict: bool = True
    ) -> None:
        if max_samples is not None and max_samples < 1:
            raise ValueError(f"max_samples must be at least 1, got {max_samples}")
        self.module, self.max_samples, self.keep = module, max_samples, keep
        self.strict, self.problem = strict, ""
        self.enabled = True
        self._layers: list[_Layer] = []
        self._norms: list[Tensor] = []
        self._samples = 0  # of this pass; 0 until a gradient arrives
        self._asked = False  # whether this pass has answered a question
        self._anchor = torch.empty(0, requires_grad=True)

    @property
    def covered(self) -> tuple[str, ...]:
        """Names of the trainable parameters that are looked at, in the order of the module."""
        return tuple(name for name, _, _, why in parameter_rules(self.module) if why is None)

    @property
    def uncovered(self) -> dict[str, str]:
        """Names of the other trainable parameters, each with the reason."""
        return {name: why for name, _, _, why in parameter_rules(self.module) if why is not None}

    def attach(self) -> Self:
        """Adds the hooks.

        Returns:
            This object.

        Raises:
            RuntimeError: If they are there already, or a module is compiled: it would not run them.
        """
        if self._layers:
            raise RuntimeError("the hooks are attached already")
        if compiled := compiled_modules(self.module):
            raise RuntimeError(f"compiled modules do not run the hooks that are added to them: {', '.join(compiled)}")
        layers: dict[nn.Module, _Layer] = {}
        for name, owner, own_name, why in parameter_rules(self.module, frozen=True):
            if why is None:
                layer = layers.setdefault(owner, _Layer(owner, name.rpartition(".")[0] or type(owner).__name__))
                layer.names[own_name] = name
        for module, layer in layers.items():
            layer.handle = module.register_forward_hook(_Hook(self, layer), with_kwargs=True, prepend=True)
        self._layers = list(layers.values())
        return self

    def remove(self) -> None:
        """Removes the hooks and forgets what they have seen."""
        for layer in self._layers:
            layer.handle.remove()
        self._layers, self._norms, self._samples = [], [], 0

    def __enter__(self) -> Self:
        return self.attach()

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def take(self) -> Tensor:
        """Squared norms of what each sample has contributed to the gradient of the covered parameters.

        With ``keep`` they can be taken again until :meth:`clear`; otherwise they are gone.

        Returns:
            Shape ``(n,)`` with the ``n`` samples of the latest backward pass, or the first ``max_samples`` of them.

        Raises:
            RuntimeError: If no gradient has arrived.
        """
        if self.keep:
            if not self._norms:
                self._norms = [self._sum("squared_norms")]
            return self._norms[0]
        with torch.no_grad():
            for layer in self._layers:
                self._finish(layer)
            norms = torch.stack(self._norms).sum(0) if self._norms else None
        self.clear()
        return self._found(norms)

    def inner_products(self, gradients: Mapping[str, Tensor]) -> Tensor:
        """Inner products of each sample's contribution with a gradient, over all covered parameters.

        Args:
            gradients: The gradient by the names of the parameters; a name that is missing counts as zero.

        Returns:
            Shape ``(n,)``.

        Raises:
            RuntimeError: If nothing has been kept.
        """
        return self._sum("inner_products", gradients)

    def second_moments(self) -> dict[str, Tensor]:
        """Sums over the samples of the squares of their contributions, coordinate by coordinate.

        Returns:
            Tensors in the shapes of the covered parameters, by name; zero where no gradient has arrived.

        Raises:
            RuntimeError: If nothing has been kept.
        """
        return self._each("second_moments")

    def weighted_sum(self, weights: Tensor) -> dict[str, Tensor]:
        """Weighted sums of the samples' contributions: with weights of one, the gradient.

        Args:
            weights: Shape ``(n,)``.

        Returns:
            Tensors in the shapes of the covered parameters, by name; zero where no gradient has arrived.

        Raises:
            RuntimeError: If nothing has been kept.
        """
        return self._each("weighted_sum", weights)

    def clear(self) -> None:
        """Forgets what has been seen, also of a forward pass whose backward pass is still to come."""
        for layer in self._layers:
            layer.pending = WeakSet()
        self._begin()

    def _begin(self) -> None:
        for layer in self._layers:
            layer.arrived = []
        self._norms, self._samples, self._asked = [], 0, False

    def _record(self, layer: "_Layer", inputs: Tensor, outputs: Tensor) -> None:
        inside = torch._C._current_graph_task_id() != -1  # checkpointing runs the forward pass again in a backward one
        if not inside:
            layer.recording = self.enabled
        if not (layer.recording and torch.is_grad_enabled() and outputs.requires_grad):
            return
        names = {own: name for own, name in layer.names.items() if layer.module._parameters[own].requires_grad}  # type: ignore[union-attr]
        if not names or _is_transformed():
            return
        if self._samples and not inside:
            self.clear()
        call = _Call(_Saved.apply(self._anchor, _as_computed(layer.module, inputs.detach())).grad_fn, names)
        layer.pending.add(call)
        outputs.register_hook(partial(self._arrive, layer, call))

    def _arrive(self, layer: "_Layer", call: "_Call", gradient: Tensor) -> None:
        if not self.enabled:
            return
        try:
            self._look(layer, call, gradient)
        except RuntimeError as error:
            if self.strict:
                raise
            self.problem, self.enabled = str(error), False
            self.clear()

    def _look(self, layer: "_Layer", call: "_Call", gradient: Tensor) -> None:
        if call.saved is None:
            raise RuntimeError(
                "a second backward pass runs through a graph whose per-sample gradients have been read; set `enabled` "
                "to False for one of the two passes"
            )
        (inputs,), call.saved = call.saved.saved_tensors, None
        if call not in layer.pending:  # cleared in between
            return
        layer.pending.discard(call)
        if self._asked:  # a new pass: under checkpointing, the forward pass may not have shown it
            self._begin()
        samples = self._checked(layer, inputs, gradient)
        with torch.no_grad(), _full_precision(inputs.device.type):
            find = layer_rule(layer.module) if inputs.ndim >= 2 else layer_factors  # the latter says what is wrong
            of_layer = find(layer.module, inputs[:samples], gradient[:samples], tuple(call.names))
            layer.arrived.append({call.names[own]: factors for own, factors in of_layer.items()})
            if not (self.keep or layer.pending):
                self._finish(layer)

    def _checked(self, layer: "_Layer", inputs: Tensor, gradient: Tensor) -> int:
        self._samples = self._samples or inputs.shape[0]
        if {inputs.shape[0], gradient.shape[0]} != {self._samples}:
            raise RuntimeError(
                f"`{layer.name}` maps {inputs.shape[0]} rows to {gradient.shape[0]}, but the batch has {self._samples} "
                "samples: the first dimension of every layer must count the samples, or their gradients cannot be told "
                "apart"
            )
        return self._samples if self.max_samples is None else min(self._samples, self.max_samples)

    def _finish(self, layer: "_Layer") -> None:
        self._norms += [factors.squared_norms() for factors in layer.joined().values()]
        layer.arrived = []

    @torch.no_grad()
    def _sum(self, question: str, gradients: Mapping[str, Tensor] | None = None) -> Tensor:
        total: Tensor | None = None
        for name, factors in self._kept():
            if gradients is None or name in gradients:
                rows = getattr(factors, question)(*([] if gradients is None else [gradients[name]]))
                total = rows if total is None else total + rows
        return self._found(total)

    @torch.no_grad()
    def _each(self, question: str, *arguments: Tensor) -> dict[str, Tensor]:
        found = {name: getattr(factors, question)(*arguments) for name, factors in self._kept()}
        self._found(next(iter(found.values()), None))
        own = dict(self.module.named_parameters())
        return {name: found[name] if name in found else torch.zeros_like(own[name]) for name in self.covered}

    def _kept(self) -> Iterator[tuple[str, Factors]]:
        if not self.keep:
            raise RuntimeError("nothing is kept; construct with `keep=True`")
        for layer in self._layers:
            yield from layer.joined().items()

    def _found(self, result: Tensor | None) -> Tensor:
        if result is None:
            raise RuntimeError(
                "no gradient has arrived at a layer with a rule: attach the hooks, enable them before the forward pass "
                "and run a backward pass"
            )
        self._asked = True
        return result


class _Layer:
    """A layer with hooks, and what has been seen of it in this pass."""

    def __init__(self, module: nn.Module, name: str) -> None:
        self.module, self.name = module, name
        self.names: dict[str, str] = {}  # of its parameters: own name to full name
        self.handle: RemovableHandle
        self.recording = False
        self.pending: WeakSet[_Call] = WeakSet()  # calls whose graphs are alive
        self.arrived: list[dict[str, Factors]] = []

    def joined(self) -> dict[str, Factors]:
        if len(self.arrived) < 2:
            return dict(*self.arrived)
        names = dict.fromkeys(name for call in self.arrived for name in call)
        calls = {name: [call[name] for call in self.arrived if name in call] for name in names}
        return {name: type(of_name[0]).joined(of_name) for name, of_name in calls.items()}


class _Call:
    """One call of a layer; only the graph of this call holds it."""

    def __init__(self, saved: Any, names: dict[str, str]) -> None:
        self.saved, self.names = saved, names


class _Saved(torch.autograd.Function):
    """Keeps a tensor as layers do: changes in place are noticed, checkpointing and offloading see to it."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, tensor: Tensor) -> Tensor:
        ctx.save_for_backward(tensor)
        return anchor.view_as(anchor)


class _Hook:
    """The forward hook of one layer; copies of the module get one that does nothing."""

    def __init__(self, owner: PerSampleGradients, layer: _Layer) -> None:
        self.owner, self.layer = ref(owner), layer

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Tensor) -> None:
        owner = self.owner()
        if owner is not None and module is self.layer.module:
            owner._record(self.layer, args[0] if args else next(iter(kwargs.values())), outputs)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Nothing, ()


class _Nothing:
    def __call__(self, *args: Any) -> None:
        pass


def _as_computed(layer: nn.Module, inputs: Tensor) -> Tensor:
    """Inputs in the precision in which the layer used them: this is also what autograd keeps."""
    if not torch._C._is_any_autocast_enabled() or not isinstance(layer, _CAST_BY_AUTOCAST):
        return inputs
    kind = inputs.device.type
    return inputs.to(torch.get_autocast_dtype(kind)) if inputs.dtype != torch.float64 and _autocasts(kind) else inputs


def _autocasts(kind: str) -> bool:
    any_kind = torch._C._is_any_autocast_enabled()  # much faster than to ask for each
    return any_kind and torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def _full_precision(kind: str) -> AbstractContextManager[Any]:
    return torch.autocast(kind, enabled=False) if _autocasts(kind) else nullcontext()


def _is_transformed() -> bool:
    """Whether a transform of `torch.func`, or a tracer, is running."""
    return torch._C._functorch.maybe_current_level() is not None or torch._C._get_tracing_state() is not None


def _is_compiled(module: nn.Module) -> bool:
    return type(module).__name__ == "OptimizedModule" or getattr(module, "_compiled_call_impl", None) is not None
