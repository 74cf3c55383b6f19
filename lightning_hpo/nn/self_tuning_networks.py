"""Ordinary networks whose weights follow hyperparameters, and back."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, cast

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_hpo.nn.self_tuning_layers import (
    Attached,
    LayerResponse,
    ResponseInputs,
    SelfTuningConv1d,
    SelfTuningConv2d,
    SelfTuningConv3d,
    SelfTuningEmbedding,
    SelfTuningLinear,
    attached,
)
from lightning_hpo.nn.self_tuning_lstm import SelfTuningLSTM, SelfTuningLSTMCell, WeightDropLSTM

__all__ = ["BestResponse", "convert"]

KINDS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: SelfTuningLinear,
    nn.Conv1d: SelfTuningConv1d,
    nn.Conv2d: SelfTuningConv2d,
    nn.Conv3d: SelfTuningConv3d,
    nn.Embedding: SelfTuningEmbedding,
    nn.LSTMCell: SelfTuningLSTMCell,
    nn.LSTM: SelfTuningLSTM,
    WeightDropLSTM: SelfTuningLSTM,
}
# Their fused inference reads the weights of layers inside without calling them.
_FUSED = (nn.TransformerEncoderLayer, nn.MultiheadAttention)


class BestResponse(nn.Module):
    r"""How a network's weights respond to hyperparameters: what :func:`convert` gives.

    Its parameters are those of the response alone, :math:`W_r`, :math:`b_r` and the gates; the general weights are the
    network's own. Outside of :meth:`at` and :meth:`along` the network is what it was.

    Attributes:
        names: Names of the converted layers.
        skipped: Names of layers with weights that were not converted, each with the reason.
        keeps_general: Whether its state holds the general weights as well, and loading it brings them back.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> response = convert(net, inputs=1)
        >>> x, h = torch.ones(4, 2), torch.tensor([[-1.0], [0.0], [0.5], [1.0]])
        >>> with response.at(h):
        ...     net(x).shape
        torch.Size([4, 1])
        >>> response.revert()
        >>> type(net[0]).__name__
        'Linear'
    """

    def __init__(self, network: nn.Module, layers: Mapping[str, nn.Module], skipped: Mapping[str, str]) -> None:
        super().__init__()
        self.names, self.skipped = list(layers), dict(skipped)
        self.layers = nn.ModuleDict({_key(name): response for name, response in layers.items()})
        self.source = ResponseInputs()
        self.keeps_general = False
        self._network = (network,)  # in a tuple: it must not become a part of its response
        self._before = {name: type(network.get_submodule(name)) for name in layers}
        for name, response in layers.items():
            layer = network.get_submodule(name)
            layer.__class__ = cast(type[nn.Module], _kind(layer))
            layer.__dict__["_response"] = Attached(response, self.source)

    @property
    def network(self) -> nn.Module:
        """The converted network."""
        return self._network[0]

    def set(self, inputs: Tensor | None) -> None:
        """Makes the network respond to something from now on.

        Args:
            inputs: ``(batch, n)``, ``(n)``, or None for the general weights.
        """
        self.source.inputs = inputs

    @contextmanager
    def at(self, inputs: Tensor | None) -> Iterator[None]:
        """The network with the weights for some inputs of the hyper-network.

        Args:
            inputs: ``(batch, n)`` for weights that differ between examples, ``(n)`` for one set of weights, None for
                the general weights.
        """
        before, self.source.inputs = self.source.inputs, inputs
        try:
            yield
        finally:
            self.source.inputs = before

    @contextmanager
    def along(self, direction: Tensor, part: nn.Module | None = None) -> Iterator[list[int]]:
        r"""The network linearised in its response: it returns :math:`f(x; 0) + J_h f(x; 0)\,\delta`.

        One forward-mode pass, in which the general weights are held; the result is linear in the response.

        Args:
            direction: :math:`\delta`, ``(batch, n)``.
            part: The part whose output is the prediction; the converted network by default.

        Yields:
            A list that grows with every call of the part.
        """
        calls: list[int] = []

        def leave(_module: nn.Module, _args: Any, output: Any) -> Any:
            calls.append(1)
            return _together(output)

        handle = (self.network if part is None else part).register_forward_hook(leave)
        inputs = self.source.inputs
        try:
            # Fused attention has no forward mode.
            with forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
                self.source.inputs, self.source.direction = None, direction
                yield calls
        finally:
            self.source.inputs, self.source.direction = inputs, None
            handle.remove()

    def follow(self) -> None:
        """Takes each response to its layer's device and type, which the Trainer may have changed."""
        for name in self.names:
            self.layers[_key(name)].to(next(self.network.get_submodule(name).parameters()))

    def general(self) -> dict[str, Tensor]:
        """The general weights of converted layers, by name."""
        return {
            f"{name}.{part}" if name else part: weight
            for name in self.names
            for part, weight in self.network.get_submodule(name).named_parameters(recurse=False)
        }

    def folded(self, inputs: Tensor) -> dict[str, Tensor]:
        r"""The weights for one set of hyperparameters: :math:`\hat w(h)`.

        Args:
            inputs: :math:`h`, ``(n)``.

        Returns:
            Weights by name, like :meth:`general`; differentiable.
        """
        found: dict[str, Tensor] = {}
        for name in self.names:
            layer = self.network.get_submodule(name)
            for (weight, bias), response in _parts(layer, self.layers[_key(name)]):
                values = response.folded(
                    getattr(layer, weight), getattr(layer, bias, None), inputs, isinstance(layer, nn.Embedding)
                )
                prefix = f"{name}." if name else ""
                found |= {prefix + key: v for key, v in zip((weight, bias), values, strict=True) if v is not None}
        return found

    @torch.no_grad()
    def fold(self, inputs: Tensor) -> None:
        """Writes the weights for one set of hyperparameters into the network and forgets the response.

        Args:
            inputs: ``(n)``.
        """
        general = self.general()
        for name, value in self.folded(inputs).items():
            general[name].copy_(value)
        for gate in [p for name, p in self.named_parameters() if name.endswith("gate")]:
            gate.zero_()

    def get_extra_state(self) -> dict[str, Tensor]:
        """The general weights, if they belong to the state."""
        return {name: weight.detach().clone() for name, weight in self.general().items() if self.keeps_general}

    @torch.no_grad()
    def set_extra_state(self, state: Mapping[str, Tensor]) -> None:
        """Writes general weights into the network."""
        general = self.general()
        for name, weight in state.items():
            general[name].copy_(weight)

    def common_part(self) -> str:
        """Name of the smallest part of the network that holds all converted layers."""
        paths = [name.split(".") for name in self.names]
        shared: list[str] = []
        for step in zip(*paths, strict=False):
            if len(set(step)) > 1:
                break
            shared.append(step[0])
        return ".".join(shared)

    def revert(self, inputs: Tensor | None = None) -> None:
        """Makes the network an ordinary one again.

        Args:
            inputs: Which weights it gets: those for these inputs ``(n)``; the general ones where None.
        """
        if inputs is not None:
            self.fold(inputs)
        for name, kind in self._before.items():
            layer = self.network.get_submodule(name)
            layer.__class__ = kind
            layer.__dict__.pop("_response", None)


def convert(
    network: nn.Module,
    inputs: int,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    gate_std: float = 0.0,
    seed: int = 0,
) -> BestResponse:
    r"""Makes a network self-tuning: its linear layers, convolutions, embeddings and LSTMs follow hyperparameters.

    The network stays the same object with the same parameters, names and hooks, and with ``gate_std=0`` the same
    outputs. Layers of other classes, norms among them, are shared by all hyperparameters.

    Args:
        network: Any module.
        inputs: Size n of the hyper-network's input.
        include: Patterns of names of layers to convert.
        exclude: Patterns of names to leave alone.
        gate_std: Standard deviation of the gates at the beginning.
        seed: Decides the response's first values; torch's random numbers are not used up.

    Returns:
        The response.

    Raises:
        ValueError: If there is nothing to convert, or an argument is wrong; says which layers there are.

    References:
        MacKay et al., "Self-Tuning Networks", ICLR 2019, section 3.2.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 1))
        >>> response = convert(net, inputs=3)
        >>> response.names, response.skipped
        (['0', '3'], {'1': 'BatchNorm2d is shared'})
    """
    problems = [] if inputs > 0 else [f"inputs must be positive, got {inputs!r}"]
    problems += [] if 0 <= gate_std < float("inf") else [f"gate_std must be at least 0, got {gate_std!r}"]
    named = dict(network.named_modules())
    converted = [name for name, layer in named.items() if attached(layer) is not None]
    problems += [f"already converted: {converted}"] if converted else []
    wanted, skipped = _choose(network, named, include, exclude)
    unused = [p for p in (*include, *exclude) if not any(fnmatchcase(name, p) for name in named)]
    problems += [f"no layer is named like {unused}"] if unused else []
    if not wanted and not problems:
        kinds = ", ".join(kind.__name__ for kind in KINDS)
        problems.append(f"nothing to convert: needs one of {kinds}; left alone: {skipped or 'nothing'}")
    if problems:
        raise ValueError("; ".join(problems))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        layers = {name: _response(named[name], inputs, gate_std) for name in wanted}
    return BestResponse(network, layers, skipped)


def _choose(
    network: nn.Module, named: Mapping[str, nn.Module], include: Sequence[str], exclude: Sequence[str]
) -> tuple[list[str], dict[str, str]]:
    """Names of layers to convert, and why others with weights are left alone."""
    uses: dict[int, int] = {}
    for _, parameter in network.named_parameters(remove_duplicate=False):
        uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    fused = [name for name, part in named.items() if isinstance(part, _FUSED)]
    wanted, skipped = [], {}
    for name, layer in named.items():
        own = list(layer.parameters(recurse=False))
        if not own:
            continue
        inside = next((f for f in fused if name != f and name.startswith(f"{f}." if f else "")), None)
        if inside is not None:
            skipped[name] = f"{type(named[inside]).__name__} reads its weights directly"
        elif _kind(layer) is None:
            skipped[name] = f"{type(layer).__name__} is shared"
        elif reason := _unfit(layer):
            skipped[name] = reason
        elif any(uses[id(p)] > 1 for p in own):
            skipped[name] = "its weights are tied to another layer's"
        elif not any(fnmatchcase(name, p) for p in include) or any(fnmatchcase(name, p) for p in exclude):
            skipped[name] = "excluded"
        elif not any(p.requires_grad for p in own):
            skipped[name] = "frozen"
        else:
            wanted.append(name)
    return wanted, skipped


def _kind(layer: nn.Module) -> type[nn.Module] | None:
    """What a layer becomes; subclasses may compute something else, and stay what they are."""
    if type(layer).__module__ == "timm.layers.linear":  # the same layer, written for scripting
        return SelfTuningLinear
    return KINDS.get(type(layer))


def _unfit(layer: nn.Module) -> str | None:
    names = ["weight", "bias"]
    if isinstance(layer, nn.LSTM):
        names = [name for group in layer._all_weights for name in group]
    elif isinstance(layer, nn.LSTMCell):
        names = ["weight_ih", "weight_hh", "bias_ih", "bias_hh"]
    if any(getattr(layer, name, None) is not None and name not in layer._parameters for name in names):
        return "its weights are computed from other parameters (weight norm, spectral norm, pruning)"
    if isinstance(layer, nn.Embedding) and (layer.sparse or layer.max_norm is not None):
        return "an embedding with sparse gradients or a largest norm"
    if isinstance(layer, nn.LSTM) and layer.proj_size:
        return "an LSTM with projections"
    return None


def _response(layer: nn.Module, inputs: int, gate_std: float) -> nn.Module:
    """The response of one layer, on its device."""
    if isinstance(layer, (nn.LSTM, nn.LSTMCell)):
        parts: dict[str, nn.Module] = {}
        for name, other in _pairs(layer):
            w, b = getattr(layer, name), getattr(layer, other, None)
            parts[name.removeprefix("weight_")] = LayerResponse(
                w, b, inputs, fan_in=layer.hidden_size, gate_std=gate_std
            )
        return nn.ModuleDict(parts)
    weight, bias = cast(Tensor, layer.weight), getattr(layer, "bias", None)
    if isinstance(layer, nn.Embedding):
        own = LayerResponse(
            weight, None, inputs, fan_in=layer.embedding_dim, outputs=layer.embedding_dim, gate_std=gate_std
        )
        if layer.padding_idx is not None:
            own.weight.data[layer.padding_idx] = 0
        return own
    return LayerResponse(weight, bias, inputs, fan_in=weight[0].numel(), gate_std=gate_std)


def _pairs(layer: nn.Module) -> list[tuple[str, str]]:
    names = [name for name, _ in layer.named_parameters(recurse=False) if name.startswith("weight_")]
    return [(name, name.replace("weight_", "bias_")) for name in names]


def _parts(layer: nn.Module, response: Any) -> list[tuple[tuple[str, str], LayerResponse]]:
    """Names of weight and bias of every linear part, with its response."""
    if isinstance(layer, (nn.LSTM, nn.LSTMCell)):
        return [(pair, response[pair[0].removeprefix("weight_")]) for pair in _pairs(layer)]
    return [(("weight", "bias"), response)]


def _key(name: str) -> str:
    return name.replace(".", "/") or "network"  # dots mean parts of parts


def _together(output: Any) -> Any:
    """Value plus slope, wherever there are dual numbers."""
    if isinstance(output, Tensor):
        value, slope = forward_ad.unpack_dual(output)
        return value if slope is None else value + slope
    if isinstance(output, Mapping):
        items = {key: _together(item) for key, item in output.items()}
        return items if type(output) is dict else type(output)(**items)  # whose keys need not be strings
    if isinstance(output, (tuple, list)):
        parts = [_together(item) for item in output]
        return type(output)(*parts) if hasattr(output, "_fields") else type(output)(parts)
    if is_dataclass(output) and not isinstance(output, type):
        return replace(output, **{f.name: _together(getattr(output, f.name)) for f in fields(output) if f.init})
    return output
