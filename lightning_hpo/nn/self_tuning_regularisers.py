"""Regularisers that take a strength for each example: dropout, noise of the input's scale, penalties on activations."""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn

from lightning_hpo.functional.bilevel.best_response import per_row
from lightning_hpo.nn.setting import Setting, current, setting_problems

__all__ = ["TunedDropout", "TunedInputScale", "activation_penalty", "strength", "temporal_penalty", "tune_dropout"]

_MOST = 0.95  # beyond this rate what is left is blown up twentyfold


def strength(setting: Setting, like: Tensor) -> Tensor:
    """A setting's value now, in a shape that broadcasts with a tensor of examples.

    Args:
        setting: A number, or a function that returns one, or one for each example.
        like: Examples first.

    Returns:
        ``(batch, 1, ...)`` or a scalar, of the tensor's type and without a gradient.

    Raises:
        ValueError: If there are values for another number of examples.

    Example:
        >>> strength(lambda: torch.tensor([0.1, 0.2]), torch.zeros(2, 3, 4)).shape
        torch.Size([2, 1, 1])
    """
    value = current(setting)
    if not isinstance(value, Tensor):
        return torch.full((), value, dtype=like.dtype, device=like.device)
    value = value.detach().to(like.device)
    if value.ndim > 1:
        raise ValueError(f"a strength is one number, or one an example, got shape {tuple(value.shape)}")
    return per_row(value, like, None) if value.ndim else value.to(like.dtype)


class TunedDropout(nn.Module):
    r"""Dropout with a rate for each example: :math:`x \odot m / (1 - p_i)` with :math:`m \sim B(1 - p_i)`.

    The identity in eval mode. Rates above 0.95 count as 0.95.

    Args:
        rate: :math:`p`: a number, or a function that returns one, or one for each example, such as
            ``lambda: hypers["dropout"]``.
        per: What is dropped together: ``"element"``, or ``"channel"``, the second dimension.

    Raises:
        ValueError: If the rate is out of range.

    Example:
        >>> dropout = TunedDropout(lambda: torch.tensor([0.0, 0.5]))
        >>> x = dropout(torch.ones(2, 1000))
        >>> x[0].unique(), x[1].unique(), abs(x[1].mean() - 1) < 0.1
        (tensor([1.]), tensor([0., 2.]), tensor(True))
    """

    def __init__(self, rate: Setting, per: Literal["element", "channel"] = "element") -> None:
        super().__init__()
        problems = setting_problems("rate", rate, lambda p: (p >= 0) & (p < 1), "be at least 0 and below 1")
        problems += [] if per in ("element", "channel") else [f"per must be 'element' or 'channel', got {per!r}"]
        if problems:
            raise ValueError("; ".join(problems))
        self.rate, self.per = rate, per

    def forward(self, x: Tensor) -> Tensor:
        """The same shape."""
        return drop(x, self.rate, self.per) if self.training else x


def drop(x: Tensor, rate: Setting, per: Literal["element", "channel"] = "element") -> Tensor:
    """Dropout with a rate for each example.

    Args:
        x: Examples first.
        rate: As for :class:`TunedDropout`.
        per: As there.

    Returns:
        The same shape.

    Example:
        >>> drop(torch.ones(3), 0.0)
        tensor([1., 1., 1.])
    """
    kept = 1 - strength(rate, x).clamp(0, _MOST)
    shape = x.shape if per == "element" else (*x.shape[:2], *[1] * (x.ndim - 2))
    # At full precision: in half of it rates would be rounded to multiples of 1/256.
    mask = torch.rand(shape, device=x.device) < kept
    return _times(x, (mask / kept).to(x.dtype))


def _times(x: Tensor, constant: Tensor) -> Tensor:
    """The product; torch's own takes a hundred times as long for a dual number times one without a slope."""
    value, slope = forward_ad.unpack_dual(x)
    product = value * constant
    return product if slope is None else forward_ad.make_dual(product, slope * constant)


class _SwappedDropout(nn.Dropout):
    """``torch.nn.Dropout`` whose rate is asked for in every pass."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
        return drop(input, self.__dict__["_rate"]) if self.training else input


class _SwappedDropout2d(nn.Dropout2d):
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
        return drop(input, self.__dict__["_rate"], "channel") if self.training else input


_SWAPPED: dict[type[nn.Module], type[nn.Module]] = {nn.Dropout: _SwappedDropout, nn.Dropout2d: _SwappedDropout2d}


class tune_dropout:  # noqa: N801 - a verb, as a function would be
    """Gives dropout layers of a network rates that are asked for in every pass, until :meth:`undo`.

    Layers stay the same objects under the same names. A layer that several modules share stays one.

    Args:
        network: The network.
        rates: A rate by the name of a ``torch.nn.Dropout`` or ``Dropout2d``.

    Raises:
        ValueError: If a name is none of such a layer.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.1))
        >>> tuned = tune_dropout(net, {"1": lambda: torch.tensor(0.9)})
        >>> round((net(torch.ones(1000, 2)) == 0).double().mean().item(), 1)
        0.9
        >>> tuned.undo()
    """

    def __init__(self, network: nn.Module, rates: dict[str, Setting]) -> None:
        named = dict(network.named_modules())
        if wrong := [name for name in rates if type(named.get(name)) not in _SWAPPED]:
            raise ValueError(f"{wrong} are no dropout layers; there are {dropout_layers(network) or 'none'}")
        self.layers = [named[name] for name in rates]
        for layer, rate in zip(self.layers, rates.values(), strict=True):
            layer.__class__ = _SWAPPED[type(layer)]
            layer.__dict__["_rate"] = rate

    def undo(self) -> None:
        """Makes them what they were."""
        back = {ours: theirs for theirs, ours in _SWAPPED.items()}
        for layer in self.layers:
            layer.__class__ = back[type(layer)]
            layer.__dict__.pop("_rate", None)
        self.layers = []


def dropout_layers(network: nn.Module) -> list[str]:
    """Names of a network's dropout layers that :func:`tune_dropout` can change.

    Args:
        network: The network.

    Returns:
        Names.

    Example:
        >>> dropout_layers(nn.Sequential(nn.Linear(1, 1), nn.Dropout()))
        ['1']
    """
    fused = [n for n, m in network.named_modules() if isinstance(m, (nn.TransformerEncoderLayer, nn.LSTM))]
    return [
        name
        for name, layer in network.named_modules()
        if type(layer) in _SWAPPED and not any(name.startswith(f"{part}.") for part in fused if part)
    ]


class TunedInputScale(nn.Module):
    r"""Multiplies each example by a factor from :math:`U(1 / (1 + a_i), 1 + a_i)`; the identity in eval mode.

    Args:
        amount: :math:`a`, at least 0: a number, or a function that returns one, or one for each example.

    Raises:
        ValueError: If the amount is negative.

    Example:
        >>> scaled = TunedInputScale(lambda: torch.tensor([0.0, 1.0]))(torch.ones(2, 5))
        >>> scaled[0], bool((scaled[1] >= 0.5).all() and (scaled[1] <= 2).all())
        (tensor([1., 1., 1., 1., 1.]), True)
    """

    def __init__(self, amount: Setting) -> None:
        super().__init__()
        if problems := setting_problems("amount", amount, lambda a: a >= 0, "be at least 0"):
            raise ValueError("; ".join(problems))
        self.amount = amount

    def forward(self, x: Tensor) -> Tensor:
        """The same shape."""
        if not self.training:
            return x
        most = 1 + strength(self.amount, x).clamp_min(0)
        shape: Sequence[int] = (x.shape[0], *[1] * (x.ndim - 1))
        return x * (1 / most + (most - 1 / most) * torch.rand(shape, device=x.device, dtype=x.dtype))


def activation_penalty(outputs: Tensor, weight: Setting) -> Tensor:
    r"""Penalty on the size of activations: the mean over examples of :math:`\alpha_i \overline{h_i^2}`.

    Args:
        outputs: :math:`h`, examples first; what dropout left of a recurrent layer's outputs.
        weight: :math:`\alpha`, a number, or a function that returns one, or one for each example.

    Returns:
        A scalar to be added to the training loss; leave it out of the validation loss.

    References:
        Merity, McCann and Socher, "Revisiting Activation Regularization for Language RNNs", 2017.

    Example:
        >>> activation_penalty(torch.tensor([[1.0, 3.0], [2.0, 2.0]]), lambda: torch.tensor([1.0, 2.0]))
        tensor(6.5000)
    """
    return (strength(weight, outputs) * outputs.square()).mean()


def temporal_penalty(outputs: Tensor, weight: Setting, time: int = 1) -> Tensor:
    r"""Penalty on changes over time: the mean over examples of :math:`\beta_i \overline{(h_{t+1} - h_t)^2}`.

    Args:
        outputs: :math:`h`, examples first.
        weight: :math:`\beta`, as for :func:`activation_penalty`.
        time: Dimension of time.

    Returns:
        A scalar to be added to the training loss.

    Example:
        >>> temporal_penalty(torch.tensor([[[0.0], [1.0], [3.0]]]), 2.0)
        tensor(5.)
    """
    return activation_penalty(outputs.diff(dim=time), weight)
