"""LSTMs whose weights follow hyperparameters, and weights of LSTMs that are dropped at a rate that may be tuned."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from lightning_hpo.functional.bilevel.best_response import response_branch
from lightning_hpo.nn.self_tuning_layers import Attached, LayerResponse, attached, with_slope
from lightning_hpo.nn.setting import Setting, current, setting_problems

__all__ = ["SelfTuningLSTM", "SelfTuningLSTMCell", "WeightDropLSTM"]

State = tuple[Tensor, Tensor]
_MOST = 0.95  # a rate of dropout beyond which what is left is blown up too much


class SelfTuningLSTMCell(nn.LSTMCell):
    """One step of an LSTM whose weights follow hyperparameters: two linear layers of four gates a unit.

    References:
        MacKay et al., "Self-Tuning Networks", ICLR 2019, appendix on recurrent networks.

    Example:
        >>> from lightning_hpo.nn.self_tuning_networks import convert
        >>> net = nn.ModuleDict({"cell": nn.LSTMCell(2, 3)})
        >>> response = convert(net, inputs=1)
        >>> h, c = net["cell"](torch.ones(4, 2))
        >>> h.shape
        torch.Size([4, 3])
    """

    def forward(self, input: Tensor, hx: State | None = None) -> State:  # noqa: A002 - torch's name
        """The next hidden state and the next cell, each ``(batch, hidden_size)``."""
        own = attached(self)
        if own is None or (own.source.inputs is None and own.source.direction is None):
            return super().forward(input, hx)
        if input.ndim != 2:
            raise ValueError(f"a self-tuning LSTM cell needs inputs (batch, features), got {tuple(input.shape)}")
        if hx is None:
            zeros = input.new_zeros(input.shape[0], self.hidden_size)
            hx = (zeros, zeros)
        sides = [(getattr(self, f"weight_{side}"), getattr(self, f"bias_{side}", None)) for side in ("ih", "hh")]
        found: list[Any] = [getattr(own.response, side) for side in ("ih", "hh")]
        into, across = (_Side(own, response, *pair) for response, pair in zip(found, sides, strict=True))
        return _step(into(input), across(hx[0]), hx[1])


class WeightDropLSTM(nn.LSTM):
    """An LSTM whose recurrent weights are dropped in training (DropConnect), the same for all examples of a batch.

    Args:
        *args: Those of ``torch.nn.LSTM``.
        weight_drop: The rate, from 0 to below 1: a number, or a function that returns one, such as
            ``lambda: hypers["weight_drop"]``. It takes one value a batch.
        **kwargs: Those of ``torch.nn.LSTM``.

    Raises:
        ValueError: If the rate is out of range, or a value an example.

    References:
        Merity, Keskar and Socher, "Regularizing and Optimizing LSTM Language Models", ICLR 2018.

    Example:
        >>> lstm = WeightDropLSTM(2, 3, weight_drop=0.5)
        >>> lstm(torch.ones(7, 4, 2))[0].shape
        torch.Size([7, 4, 3])
    """

    def __init__(self, *args: Any, weight_drop: Setting = 0.5, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if problems := setting_problems("weight_drop", weight_drop, lambda p: (p >= 0) & (p < 1), "lie from 0 to 1"):
            raise ValueError("; ".join(problems))
        self.weight_drop = weight_drop

    def forward(self, input: Any, hx: State | None = None) -> Any:  # noqa: A002 - torch's name
        """Outputs of all steps, and the last states."""
        masks = recurrent_masks(self)
        if masks is None:
            return super().forward(input, hx)
        if isinstance(input, PackedSequence):
            raise ValueError("`WeightDropLSTM` takes tensors, no packed sequences; pad them")
        return _fused(self, input, hx, [w * masks.get(n, 1) for n, w in _named_weights(self)])


def recurrent_masks(lstm: nn.LSTM) -> dict[str, Tensor] | None:
    """Masks of the recurrent weights of one pass, by name; None where nothing is dropped."""
    setting = getattr(lstm, "weight_drop", None)
    if setting is None or not lstm.training:
        return None
    rate = current(setting)
    if isinstance(rate, Tensor) and rate.numel() > 1:
        raise ValueError("`weight_drop` takes one value a batch, got one an example: name it in `per_batch`")
    masks = {}
    for name, weight in _named_weights(lstm):
        if "weight_hh" in name:
            chance = (
                rate.reshape(()).to(weight) if isinstance(rate, Tensor) else torch.tensor(rate, device=weight.device)
            )
            kept = 1 - chance.clamp(0, _MOST).to(weight.dtype)
            masks[name] = (torch.rand_like(weight) < kept).to(weight.dtype) / kept
    return masks


class SelfTuningLSTM(nn.LSTM):
    """An LSTM whose weights follow hyperparameters.

    Where examples have weights of their own it runs step by step; otherwise it is torch's. Masks of dropped weights are
    shared by the general and the response part.

    Example:
        >>> from lightning_hpo.nn.self_tuning_networks import convert
        >>> net = nn.ModuleDict({"lstm": nn.LSTM(2, 3, num_layers=2, batch_first=True)})
        >>> response = convert(net, inputs=1)
        >>> net["lstm"](torch.ones(4, 7, 2))[0].shape
        torch.Size([4, 7, 3])
    """

    def forward(self, input: Any, hx: State | None = None) -> Any:  # noqa: A002 - torch's name
        """Outputs of all steps, and the last states."""
        own, masks = attached(self), recurrent_masks(self)
        plain = own is None or (own.source.inputs is None and own.source.direction is None)
        if plain and masks is None:
            return super().forward(input, hx)
        if isinstance(input, PackedSequence):
            raise ValueError("a self-tuning LSTM takes tensors, no packed sequences; pad them")
        if own is None or plain or (own.source.inputs is not None and own.source.inputs.ndim == 1):
            return _fused(self, input, hx, self._weights(own, masks or {}))
        return self._by_steps(own, input, hx, masks or {})

    def _weights(self, own: Attached | None, masks: dict[str, Tensor]) -> list[Tensor]:
        """One set of weights for all examples."""
        named = dict(_named_weights(self))
        if own is not None and own.source.inputs is not None:
            for weight, bias, name in self._names():
                response: LayerResponse = getattr(own.response, name)
                folded = response.folded(named[weight], named.get(bias), own.source.inputs)
                named |= {key: value for key, value in zip((weight, bias), folded, strict=True) if value is not None}
        return [value * masks.get(name, 1) for name, value in named.items()]

    def _names(self) -> list[tuple[str, str, str]]:
        """Names of weight, bias and response of every linear part."""
        ends = [f"l{layer}{end}" for layer in range(self.num_layers) for end in _ends(self)]
        return [
            (f"weight_{side}_{end}", f"bias_{side}_{end}", f"{side}_{end}") for end in ends for side in ("ih", "hh")
        ]

    def _by_steps(self, own: Attached, x: Tensor, hx: State | None, masks: dict[str, Tensor]) -> Any:
        if x.ndim != 3:
            raise ValueError(f"a self-tuning LSTM needs a batch of sequences, got {tuple(x.shape)}")
        x = x if self.batch_first else x.transpose(0, 1)
        directions = len(_ends(self))
        if hx is None:
            zeros = x.new_zeros(self.num_layers * directions, x.shape[0], self.hidden_size)
            hx = (zeros, zeros)
        hidden, cells = [], []
        for layer in range(self.num_layers):
            outputs = []
            for turn, end in enumerate(_ends(self)):
                index = layer * directions + turn
                start = hx[0][index], hx[1][index]
                out, (h, c) = self._run(own, x, start, f"l{layer}{end}", bool(turn), masks)
                outputs.append(out)
                hidden.append(h)
                cells.append(c)
            x = torch.cat(outputs, -1)
            if self.dropout and self.training and layer < self.num_layers - 1:
                x = F.dropout(x, self.dropout)
        out = x if self.batch_first else x.transpose(0, 1)
        return out, (torch.stack(hidden), torch.stack(cells))

    def _run(
        self, own: Attached, x: Tensor, state: State, end: str, backwards: bool, masks: dict[str, Tensor]
    ) -> tuple[Tensor, State]:
        sides = []
        for side in ("ih", "hh"):
            weight, bias = getattr(self, f"weight_{side}_{end}"), getattr(self, f"bias_{side}_{end}", None)
            response: Any = getattr(own.response, f"{side}_{end}")
            sides.append(_Side(own, response, weight, bias, masks.get(f"weight_{side}_{end}")))
        into, across = sides
        steps = into(x).unbind(1)
        found = []
        for step in reversed(steps) if backwards else steps:
            state = _step(step, across(state[0]), state[1])
            found.append(state[0])
        return torch.stack(found[::-1] if backwards else found, 1), state


class _Side:
    """One of the linear parts: of the input, or of the hidden state."""

    def __init__(
        self, own: Attached, response: LayerResponse, weight: Tensor, bias: Tensor | None, mask: Tensor | None = None
    ) -> None:
        weight_r, self.bias_r = response.pair()
        self.weight, self.bias = (weight if mask is None else weight * mask), bias
        self.weight_r = weight_r if mask is None else weight_r * mask
        self.source, self.response = own.source, response
        rows = own.source.direction if own.source.direction is not None else own.source.inputs
        self.gates = response.gates(rows) if rows is not None and rows.ndim > 1 else None

    def __call__(self, x: Tensor) -> Tensor:
        if self.gates is None:
            inputs: Any = self.source.inputs
            return F.linear(x, *self.response.folded(self.weight, self.bias, inputs))
        gates, pair, out = self.gates, (self.weight_r, self.bias_r), F.linear(x, self.weight, self.bias)
        if self.source.direction is None:
            return out + response_branch(x, F.linear, pair, gates, out)
        seen = torch.autograd.forward_ad.unpack_dual(x).primal
        return with_slope(out, lambda value: response_branch(seen, F.linear, pair, gates, value))


def _step(from_input: Tensor, from_hidden: Tensor, cell: Tensor) -> State:
    into, forget, candidate, out = (from_input + from_hidden).chunk(4, -1)  # torch's order of gates
    cell = forget.sigmoid() * cell + into.sigmoid() * candidate.tanh()
    return out.sigmoid() * cell.tanh(), cell


def _ends(lstm: nn.LSTM) -> tuple[str, ...]:
    return ("", "_reverse") if lstm.bidirectional else ("",)


def _named_weights(lstm: nn.LSTM) -> list[tuple[str, Tensor]]:
    kinds = ("weight_ih", "weight_hh", "bias_ih", "bias_hh") if lstm.bias else ("weight_ih", "weight_hh")
    names = [f"{kind}_l{layer}{end}" for layer in range(lstm.num_layers) for end in _ends(lstm) for kind in kinds]
    return [(name, getattr(lstm, name)) for name in names]


def _fused(lstm: nn.LSTM, x: Tensor, hx: State | None, weights: Sequence[Tensor]) -> Any:
    """Torch's own loop with other weights."""
    if x.ndim != 3:
        raise ValueError(f"an LSTM with dropped or tuned weights needs a batch of sequences, got {tuple(x.shape)}")
    if hx is None:
        rows = x.shape[0 if lstm.batch_first else 1]
        zeros = x.new_zeros(lstm.num_layers * len(_ends(lstm)), rows, lstm.hidden_size)
        hx = (zeros, zeros)
    settings = lstm.bias, lstm.num_layers, lstm.dropout, lstm.training, lstm.bidirectional, lstm.batch_first
    out, h, c = torch.lstm(x, hx, list(weights), *settings)
    return out, (h, c)
