"""Attention under a differentiable token mask."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["masked_attention", "masked_softmax"]

_FAINT = 1e-6  # smallest living share of a row's attention that is told from zero: the paper's epsilon
_TINY = 1e-30  # smallest one that float32 and bfloat16 can divide by, and divide the result by once more


def masked_softmax(logits: Tensor, mask: Tensor, eps: float = 1e-6) -> Tensor:
    r"""Softmax over living keys, differentiable in the mask; the plain form.

    :math:`P_{jk} = (e_{jk} \tilde M_{jk} + \epsilon / N) / (\sum_k e_{jk} \tilde M_{jk} + \epsilon)` with
    :math:`e = \exp(a - \max a)`, :math:`\tilde M_{jk} = M_k` off the diagonal and 1 on it: a token always sees itself.

    Args:
        logits: Attention logits, shape ``(batch, heads, tokens, tokens)``.
        mask: Which keys live, one value a token, shape ``(batch, tokens)``.
        eps: Smoothing; 0 makes a 0/1 mask equal to slicing.

    Returns:
        Attention weights, same shape as ``logits``.

    References:
        Rao et al., "DynamicViT", NeurIPS 2021, eq. 11; used by Chen et al., "DiffRate", ICCV 2023.

    Example:
        >>> masked_softmax(torch.zeros(1, 1, 2, 2), torch.tensor([[1.0, 0.0]]), eps=0.0)
        tensor([[[[1.0000, 0.0000],
                  [0.5000, 0.5000]]]])
    """
    tokens = logits.shape[-1]
    itself = torch.eye(tokens, dtype=mask.dtype, device=mask.device)
    visible = mask[:, None, None, :] * (1 - itself) + itself
    weight = (logits - logits.amax(-1, keepdim=True)).exp() * visible
    return (weight + eps / tokens) / (weight.sum(-1, keepdim=True) + eps)


def masked_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, bias: Tensor, scale: float | None = None
) -> Tensor:
    r"""Attention that sees living tokens only, differentiable in the mask, at the cost of fused attention.

    Equals ``masked_softmax(query @ key.T / sqrt(d) + bias, mask, eps=0) @ value``. With :math:`A` the ordinary
    attention over all keys, that is

    .. math:: o_j = \frac{\sum_k A_{jk} M_k v_k + A_{jj} (1 - M_j) v_j}{\sum_k A_{jk} M_k + A_{jj} (1 - M_j)},

    so the mask is only a factor of the values: one fused call with the columns :math:`M v` and :math:`M` returns both
    sums. One more key, whose logit is that of the token with itself, returns :math:`A_{jj}` whatever the range of the
    logits; it is a constant in the backward pass, which is exact for the mask, and for everything else where nothing
    reads the outputs of dead tokens. Where dead tokens would draw all but ``1e-6`` of a row's attention, the output is
    still exact while its gradient shrinks in proportion, which bounds how strongly they may ask to be kept, as the
    smoothing of the paper does.

    Args:
        query: Shape ``(batch, heads, tokens, width)``.
        key: Same shape.
        value: Same shape.
        mask: One value a token, shape ``(batch, tokens)``.
        bias: Added to the logits of each key (the logarithm of its size), shape ``(batch, tokens)``.
        scale: Factor of the logits; ``width ** -0.5`` by default.

    Returns:
        The output, shape of ``query``.

    References:
        Chen et al., "DiffRate", ICCV 2023, sec. 3.4; Bolya et al., "Token Merging", ICLR 2023, eq. 1 (size bias).

    Example:
        >>> q = torch.randn(1, 2, 3, 4)
        >>> out = masked_attention(q, q, q, torch.tensor([[1.0, 1.0, 0.0]]), torch.zeros(1, 3))
        >>> sliced = torch.nn.functional.scaled_dot_product_attention(*(q[:, :, :2],) * 3)
        >>> torch.allclose(out[:, :, :2], sliced, atol=1e-6)
        True
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    wide: tuple[Tensor, Tensor, Tensor] = _Widen.apply(query, key, value, mask.to(value.dtype), bias / scale)
    sums = F.scaled_dot_product_attention(*wide, scale=scale)
    out: Tensor = _Divide.apply(sums, value, mask.to(value.dtype))
    return out


class _Widen(torch.autograd.Function):
    """The columns and the key that make one fused call return both sums and each token's attention to itself.

    Written into place at once, because copies of copies cost as much as the attention of a small network.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, tilt: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        *grid, tokens, width = query.shape
        ones, own = width, width + 1  # columns: what every key adds or every value counts; a token's own logit or share
        columns = width + 2 + _spare_columns(width + 2, query.device)
        live, tilt = mask[:, None, :], tilt[:, None, :]
        wide_query = query.new_zeros(*grid, tokens, columns)
        wide_query[..., :width] = query
        wide_query[..., ones] = 1
        wide_query[..., own] = (query * key).sum(-1) + tilt
        wide_key = key.new_zeros(*grid, tokens + 1, columns)
        wide_key[..., :tokens, :width] = key
        wide_key[..., :tokens, ones] = tilt
        wide_value = value.new_zeros(*grid, tokens + 1, columns)
        wide_value[..., :tokens, :width] = value * live[..., None]
        wide_value[..., :tokens, ones] = live
        wide_key[..., tokens, own] = wide_value[..., tokens, own] = 1
        ctx.save_for_backward(value, mask)
        return wide_query, wide_key, wide_value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        value, mask = ctx.saved_tensors
        tokens, width = value.shape[-2:]
        of_query, of_key, of_value = grads
        of_live = of_value[..., :tokens, : width + 1]
        of_mask = (of_live[..., :width] * value).sum((1, -1)) + of_live[..., width].sum(1)
        of_tilt = of_key[..., :tokens, width].sum(1) if ctx.needs_input_grad[4] else None
        through = of_live[..., :width] * mask[:, None, :, None]
        return of_query[..., :width], of_key[..., :tokens, :width], through, of_mask, of_tilt


class _Divide(torch.autograd.Function):
    """One sum over the other, the token's own share added to both; backwards faint rows shrink."""

    @staticmethod
    def forward(ctx: Any, sums: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        width = value.shape[-1]
        plain, total, share = sums[..., :width], sums[..., width, None], sums[..., width + 1, None]
        own = share * (1 - mask[:, None, :, None])
        seen = (total + own).clamp_(min=_FAINT if value.dtype == torch.float16 else _TINY)
        out = torch.addcmul(plain, own, value).div_(seen)
        ctx.save_for_backward(sums, value, own, seen, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        sums, value, own, seen, out = ctx.saved_tensors
        width = value.shape[-1]
        grad = grad / seen.clamp(min=_FAINT)
        of_seen = (grad * out).sum(-1)
        of_sums = torch.zeros_like(sums)
        of_sums[..., :width] = grad
        of_sums[..., width] = -of_seen
        of_own = (grad * value).sum(-1) - of_seen
        of_mask = (sums[..., width + 1] * of_own).sum(1).neg()
        return of_sums, grad.mul_(own), of_mask


def _spare_columns(width: int, device: torch.device) -> int:
    """Columns to add, as fused kernels of GPUs want a multiple of eight."""
    return 0 if device.type == "cpu" else -width % 8
