r"""Best responses: how the trained weights follow the hyperparameters, learned beside them (STN and Δ-STN).

The weights that training would find for hyperparameters :math:`\lambda` are :math:`w^*(\lambda)`. Near the present
:math:`\lambda` they are learned as a function :math:`\hat w_\phi(\lambda)`, from examples that see hyperparameters of
their own, :math:`\lambda_i = \lambda + \operatorname{softplus}(s) \odot \varepsilon_i`. The validation loss is then
differentiated through :math:`\hat w_\phi` alone, so training need not be differentiable in :math:`\lambda`.
"""

from collections.abc import Callable
from math import e, pi
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_hpo.functional.bilevel.conditioning import encode_condition

__all__ = [
    "Encoding",
    "encode",
    "encoded_size",
    "encoding_direction",
    "entropy",
    "linearized",
    "per_row",
    "perturbed",
    "response_branch",
    "structured",
]

Encoding = Literal["cos_sin", "identity"]


def perturbed(raw: Tensor, scale: Tensor, noise: Tensor) -> Tensor:
    r"""Hyperparameters for each example, around the present ones.

    .. math:: \lambda_i = \lambda + \operatorname{softplus}(s) \odot \varepsilon_i

    Args:
        raw: :math:`\lambda`, of shape ``(n)``.
        scale: :math:`s`, likewise.
        noise: :math:`\varepsilon`, standard normal, ``(batch, n)``.

    Returns:
        ``(batch, n)``.

    References:
        MacKay et al., "Self-Tuning Networks", ICLR 2019, sections 3.1 and 3.3.

    Example:
        >>> perturbed(torch.tensor([2.0]), torch.tensor([0.5413]), torch.tensor([[-1.0], [0.5]]))
        tensor([[1.0000],
                [2.5000]])
    """
    return raw + F.softplus(scale) * noise


def entropy(scale: Tensor) -> Tensor:
    r"""Entropy of the perturbations, which keeps them from vanishing.

    .. math:: H = \sum_j \log\left(\operatorname{softplus}(s_j) \sqrt{2 \pi e}\right)

    Args:
        scale: :math:`s`, of any shape.

    Returns:
        A scalar.

    References:
        MacKay et al., "Self-Tuning Networks", ICLR 2019, equation 15.

    Example:
        >>> entropy(torch.tensor([0.5413]))  # a standard deviation of 1
        tensor(1.4189)
    """
    # softplus(s) underflows below s = -100 or so, its logarithm must not: log softplus(s) -> s.
    width = F.softplus(scale)
    log = torch.where(scale < -15, scale, width.clamp_min(torch.finfo(width.dtype).tiny).log())
    return log.sum() + 0.5 * scale.numel() * torch.tensor(2 * pi * e, dtype=scale.dtype, device=scale.device).log()


def encode(raw: Tensor, encoding: Encoding = "cos_sin") -> Tensor:
    r"""What the hyper-network sees of unconstrained hyperparameters.

    ``"identity"`` is :math:`\lambda` itself. ``"cos_sin"`` takes it to :math:`\gamma = \sigma(\lambda) \in [0, 1]` and
    to :math:`[\cos(\pi\gamma/2), \sin(\pi\gamma/2)]`, whose length is the root of n whatever the hyperparameters are,
    so that the scale of what is predicted does not depend on them.

    Args:
        raw: :math:`\lambda`, ``(..., n)``.
        encoding: Which.

    Returns:
        ``(..., n)`` or ``(..., 2 n)``: all cosines, then all sines.

    Raises:
        ValueError: If there is no such encoding.

    References:
        Gonzalez Ortiz, Guttag and Dalca, "Magnitude Invariant Parametrizations Improve Hypernetwork Learning", ICLR
        2024, section 4.

    Example:
        >>> encode(torch.tensor([0.0]))
        tensor([0.7071, 0.7071])
    """
    if encoding == "identity":
        return raw
    if encoding != "cos_sin":
        raise ValueError(f"encoding must be 'cos_sin' or 'identity', got {encoding!r}")
    return encode_condition(torch.sigmoid(raw))


def encoded_size(size: int, encoding: Encoding = "cos_sin") -> int:
    """How many numbers :func:`encode` makes of ``size``.

    Args:
        size: n.
        encoding: Which.

    Returns:
        The number of inputs of the hyper-network.

    Example:
        >>> encoded_size(3), encoded_size(3, "identity")
        (6, 3)
    """
    return int(encode(torch.zeros(size), encoding).shape[-1])


def encoding_direction(raw: Tensor, delta: Tensor, encoding: Encoding = "cos_sin") -> Tensor:
    r"""How the encoding changes along a direction: :math:`E'(\lambda)\,\delta`.

    Args:
        raw: :math:`\lambda`, ``(n)``.
        delta: :math:`\delta`, ``(batch, n)``.
        encoding: Which.

    Returns:
        ``(batch, n)`` or ``(batch, 2 n)``.

    Example:
        >>> encoding_direction(torch.zeros(1), torch.ones(1, 1))  # pi/2 times 1/4 times -sin and cos of 45 degrees
        tensor([[-0.2777,  0.2777]])
    """
    if encoding == "identity":
        return delta
    encode(raw[:0], encoding)  # refuses what it does not know
    share = torch.sigmoid(raw)
    angle = share * (pi / 2)
    slope = share * (1 - share) * (pi / 2)
    return torch.cat([-angle.sin() * slope * delta, angle.cos() * slope * delta], -1)


def structured(
    x: Tensor,
    layer: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    general: tuple[Tensor, Tensor | None],
    response: tuple[Tensor, Tensor | None],
    gates: tuple[Tensor, Tensor | None],
    channel: int = -1,
) -> Tensor:
    r"""A linear layer in which each example has weights of its own.

    .. math:: \hat W(h) = W_e + \operatorname{diag}(V_w h)\, W_r, \qquad \hat b(h) = b_e + (V_b h) \odot b_r

    computed as two ordinary layers of which the second is scaled, for each example and output channel.

    Args:
        x: Inputs, examples first.
        layer: Linear in weight and bias: ``F.linear``, or a convolution.
        general: :math:`W_e` and :math:`b_e`.
        response: :math:`W_r` and :math:`b_r`.
        gates: :math:`V_w h` and :math:`V_b h`, each ``(batch, out)``. Where ``x`` has a multiple of so many rows, each
            example's come one after another.
        channel: Dimension of the output channels.

    Returns:
        What the layer returns.

    Raises:
        ValueError: If rows do not fit.

    References:
        MacKay et al., "Self-Tuning Networks", ICLR 2019, section 3.2.

    Example:
        >>> one = torch.ones(1, 1)
        >>> x, gate = torch.tensor([[1.0], [1.0]]), torch.tensor([[0.0], [2.0]])
        >>> structured(x, F.linear, (one, None), (3 * one, None), (gate, None))
        tensor([[1.],
                [7.]])
    """
    out = layer(x, *general)
    return out + response_branch(x, layer, response, gates, out, channel)


def response_branch(
    x: Tensor,
    layer: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    response: tuple[Tensor, Tensor | None],
    gates: tuple[Tensor, Tensor | None],
    like: Tensor,
    channel: int = -1,
) -> Tensor:
    """The second part of :func:`structured`, linear in the gates.

    Args:
        x: Inputs, examples first.
        layer: As there.
        response: As there.
        gates: As there.
        like: An output of the layer.
        channel: As there.

    Returns:
        A tensor of the shape and type of ``like``.
    """
    weight, bias = response
    # Out of place: an in-place product would spoil the forward mode.
    branch = layer(x, weight, None) * per_row(gates[0], like, channel)
    if bias is not None and gates[1] is not None:
        branch = branch + per_row(gates[1] * bias, like, channel)
    return branch


def per_row(values: Tensor, like: Tensor, channel: int | None = -1) -> Tensor:
    """Values for each example in a shape that broadcasts with a tensor of examples.

    Args:
        values: ``(batch, channels)``; ``(batch)`` where ``channel`` is None.
        like: The tensor, with as many rows, or a multiple: then rows of one example come one after another.
        channel: Its dimension of channels.

    Returns:
        The values with as many dimensions as ``like``, of its type.

    Raises:
        ValueError: If rows do not fit.

    Example:
        >>> per_row(torch.ones(2, 5), torch.zeros(6, 5, 8, 8), channel=1).shape
        torch.Size([6, 5, 1, 1])
    """
    batch, rows = values.shape[0], like.shape[0]
    if rows % batch:
        raise ValueError(
            f"expected {batch} rows, one an example, or a multiple of it (B or B*T rows), got {rows}; examples must "
            "come first"
        )
    if rows != batch:
        values = values.repeat_interleave(rows // batch, 0)
    shape = [rows] + [1] * (like.ndim - 1)
    if channel is not None:
        shape[channel] = values.shape[1]
    return values.reshape(shape).to(like.dtype)


def linearized(function: Callable[[Tensor], Tensor], point: Tensor, delta: Tensor) -> Tensor:
    r"""The first two terms of a function's series: :math:`f(h_0) + J_f(h_0)\,\delta`, in one forward-mode pass.

    The prediction of Δ-STN's response step: with :math:`f` linear in the response, its loss is that of a linearised
    network, and what is learned is the derivative of the best response, not a fit to its values far away.

    Args:
        function: :math:`f`.
        point: :math:`h_0`.
        delta: :math:`\delta`, of its shape.

    Returns:
        A tensor like the function's; differentiable in whatever the function reads.

    References:
        Bae and Grosse, "Delta-STN: Efficient Bilevel Optimization for Neural Networks using Structured Response
        Jacobians", NeurIPS 2020, section 4.

    Example:
        >>> linearized(torch.square, torch.tensor([3.0]), torch.tensor([0.5]))
        tensor([12.])
    """
    found = torch.func.jvp(function, (point,), (delta,))
    return found[0] + found[1]
