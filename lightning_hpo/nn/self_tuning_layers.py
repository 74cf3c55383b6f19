"""Layers whose weights follow hyperparameters, example by example.

Each is an ordinary layer whose class was changed by
:func:`~lightning_hpo.nn.self_tuning_networks.convert`: its own weights are the general part, and what follows the
hyperparameters stands in a :class:`LayerResponse` beside the network, so that the network's names stay what they are.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_hpo.functional.bilevel.best_response import per_row, response_branch, structured

__all__ = [
    "LayerResponse",
    "ResponseInputs",
    "SelfTuningConv1d",
    "SelfTuningConv2d",
    "SelfTuningConv3d",
    "SelfTuningEmbedding",
    "SelfTuningLinear",
    "attached",
]

Pair = tuple[Tensor, Tensor | None]


class ResponseInputs:
    """What the layers of one network are to respond to now; they share one object.

    Attributes:
        inputs: :math:`h`, ``(batch, n)`` for weights that differ between examples, ``(n)`` for one set of weights;
            None for the general weights alone.
        direction: A direction ``(batch, n)`` along which to differentiate instead, at :math:`h = 0`.

    Example:
        >>> ResponseInputs().inputs is None
        True
    """

    def __init__(self) -> None:
        self.inputs: Tensor | None = None
        self.direction: Tensor | None = None


class LayerResponse(nn.Module):
    r"""What a layer's response is made of: :math:`W_r`, :math:`b_r`, and the gates :math:`V_w, V_b`.

    Args:
        weight: A weight to be like; its first dimension is that of the outputs.
        bias: A bias to be like.
        inputs: Size n of the hyper-network's input.
        outputs: Number of gates, where it is not the weight's first dimension (embeddings).
        fan_in: :math:`W_r` and :math:`b_r` are uniform within one over its root.
        gate_std: Standard deviation of the gates; with 0 the network begins as it was.

    Example:
        >>> response = LayerResponse(torch.zeros(3, 2), torch.zeros(3), inputs=4, fan_in=2)
        >>> response.gate.shape
        torch.Size([6, 4])
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        inputs: int,
        *,
        fan_in: int,
        outputs: int | None = None,
        gate_std: float = 0.0,
    ) -> None:
        super().__init__()
        outputs = weight.shape[0] if outputs is None else outputs
        bound = max(fan_in, 1) ** -0.5
        gates = torch.zeros(outputs if bias is None else 2 * outputs, inputs)
        # Drawn on the CPU, so that all devices begin alike.
        self.weight = nn.Parameter(torch.empty(weight.shape).uniform_(-bound, bound).to(weight))
        self.bias = None if bias is None else nn.Parameter(torch.empty(bias.shape).uniform_(-bound, bound).to(bias))
        self.gate = nn.Parameter((gates.normal_(std=gate_std) if gate_std else gates).to(weight))

    def gates(self, inputs: Tensor) -> Pair:
        """:math:`V_w h` and :math:`V_b h`, the second only where there is a bias."""
        gates = F.linear(inputs.to(self.gate.dtype), self.gate)
        if self.bias is None:
            return gates, None
        weight, bias = gates.chunk(2, -1)
        return weight, bias

    def pair(self) -> Pair:
        """:math:`W_r` and :math:`b_r`."""
        return self.weight, self.bias

    def folded(self, weight: Tensor, bias: Tensor | None, inputs: Tensor, dim: int = 0) -> Pair:
        """The weights for one set of hyperparameters.

        Args:
            weight: :math:`W_e`.
            bias: :math:`b_e`.
            inputs: ``(n)``.
            dim: The weight's dimension of outputs.

        Returns:
            Weight and bias.
        """
        weight_gate, bias_gate = self.gates(inputs)
        shape = [1] * weight.ndim
        shape[dim] = -1
        weight = weight + (weight_gate.view(shape) * self.weight).to(weight.dtype)
        if bias is None or bias_gate is None or self.bias is None:
            return weight, bias
        return weight, bias + (bias_gate * self.bias).to(bias.dtype)


class Attached:
    """What a converted layer knows: its response, and what to respond to."""

    def __init__(self, response: Any, source: ResponseInputs) -> None:
        self.response, self.source = response, source  # recurrent layers have a response for each linear part


def attached(layer: nn.Module) -> Attached | None:
    """A converted layer's response.

    Args:
        layer: Any layer.

    Returns:
        The response and its inputs; None for other layers.

    Example:
        >>> attached(nn.Linear(1, 1)) is None
        True
    """
    return layer.__dict__.get("_response")  # beside the parameters: the layer's names are the user's


def respond(layer: Any, x: Tensor, call: Callable[[Tensor, Tensor, Tensor | None], Tensor], channel: int) -> Tensor:
    """The output of a converted linear layer or convolution.

    Args:
        layer: The layer, with ``weight`` and ``bias``.
        x: Its input.
        call: The same kind of layer as a function of input, weight and bias.
        channel: Dimension of the output channels.

    Returns:
        The output: plain, for one set of hyperparameters, for one each example, or a dual number with its slope.
    """
    own: Attached | None = attached(layer)
    if own is None or (own.source.inputs is None and own.source.direction is None):
        return call(x, layer.weight, layer.bias)
    response, inputs, direction = own.response, own.source.inputs, own.source.direction
    if direction is not None:
        seen, slope = forward_ad.unpack_dual(x)
        out, gates = call(seen, layer.weight, layer.bias), response.gates(direction)
        branch = response_branch(seen, call, response.pair(), gates, out, channel).to(out.dtype)
        # The response is 0 here, and so is its part of the chain rule.
        return forward_ad.make_dual(out, branch if slope is None else call(slope, layer.weight, None) + branch)
    if inputs is not None and inputs.ndim == 1:
        return call(x, *response.folded(layer.weight, layer.bias, inputs))
    return structured(x, call, (layer.weight, layer.bias), response.pair(), response.gates(inputs), channel)


def with_slope(out: Tensor, branch: Callable[[Tensor], Tensor]) -> Tensor:
    """Adds a slope to a dual number.

    Args:
        out: A tensor, with a slope or without.
        branch: A slope for its value.

    Returns:
        A dual number.
    """
    value, slope = forward_ad.unpack_dual(out)
    own = branch(value).to(value.dtype)
    return forward_ad.make_dual(value, own if slope is None else slope + own)


class SelfTuningLinear(nn.Linear):
    r"""A linear layer with :math:`\hat W(h) = W_e + \operatorname{diag}(V_w h) W_r`.

    References:
        MacKay et al., "Self-Tuning Networks", ICLR 2019, equation 8.

    Example:
        >>> from lightning_hpo.nn.self_tuning_networks import convert
        >>> net = nn.Sequential(nn.Linear(2, 3))
        >>> response = convert(net, inputs=1)
        >>> type(net[0]).__name__, sorted(net.state_dict())
        ('SelfTuningLinear', ['0.bias', '0.weight'])
    """

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
        """The layer's output, ``(batch, ..., out_features)``."""
        return respond(self, input, F.linear, -1)


class _SelfTuningConv:
    _conv_forward: Callable[[Tensor, Tensor, Tensor | None], Tensor]

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
        """The layer's output, ``(batch, out_channels, ...)``."""
        return respond(self, input, self._conv_forward, 1)


class SelfTuningConv1d(_SelfTuningConv, nn.Conv1d):
    """A convolution whose kernels follow hyperparameters, one gate an output channel.

    Example:
        >>> from lightning_hpo.nn.self_tuning_networks import convert
        >>> net = nn.Sequential(nn.Conv1d(2, 3, 1))
        >>> _ = convert(net, inputs=1)
        >>> type(net[0]).__name__
        'SelfTuningConv1d'
    """


class SelfTuningConv2d(_SelfTuningConv, nn.Conv2d):
    """A convolution whose kernels follow hyperparameters, one gate an output channel.

    Example:
        >>> from lightning_hpo.nn.self_tuning_networks import convert
        >>> net = nn.Sequential(nn.Conv2d(2, 3, 1))
        >>> _ = convert(net, inputs=1)
        >>> type(net[0]).__name__
        'SelfTuningConv2d'
    """


class SelfTuningConv3d(_SelfTuningConv, nn.Conv3d):
    """A convolution whose kernels follow hyperparameters, one gate an output channel.

    Example:
        >>> from lightning_hpo.nn.self_tuning_networks import convert
        >>> net = nn.Sequential(nn.Conv3d(2, 3, 1))
        >>> _ = convert(net, inputs=1)
        >>> type(net[0]).__name__
        'SelfTuningConv3d'
    """


class SelfTuningEmbedding(nn.Embedding):
    """A table whose entries follow hyperparameters, one gate a dimension.

    Example:
        >>> from lightning_hpo.nn.self_tuning_networks import convert
        >>> net = nn.Sequential(nn.Embedding(5, 3))
        >>> response = convert(net, inputs=1)
        >>> [tuple(p.shape) for p in response.parameters()]
        [(5, 3), (3, 1)]
    """

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
        """Rows of the table, ``(batch, ..., embedding_dim)``."""
        own = attached(self)
        if own is None or (own.source.inputs is None and own.source.direction is None):
            return self._look_up(input, self.weight)
        response, source = own.response, own.source
        if source.direction is None and source.inputs is not None and source.inputs.ndim == 1:
            return self._look_up(input, response.folded(self.weight, None, source.inputs, dim=1)[0])
        out, table = self._look_up(input, self.weight), self._look_up(input, response.weight)
        if source.direction is None:
            return out + table * per_row(response.gates(source.inputs)[0], out)
        gates = response.gates(source.direction)[0]
        return with_slope(out, lambda value: table * per_row(gates, value))

    def _look_up(self, index: Tensor, table: Tensor) -> Tensor:
        return F.embedding(index, table, self.padding_idx, self.max_norm, self.norm_type, self.scale_grad_by_freq)
