"""Attention under a differentiable token mask."""

import torch
import torch.nn.functional as F
from torch import Tensor

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
    width = query.shape[-1]
    scale = width**-0.5 if scale is None else scale
    spare = _spare_columns(width + 2, query.device)
    live = mask[:, None, :, None].to(value.dtype).expand(*value.shape[:-1], 1)
    tilt = bias[:, None, :, None].to(key.dtype).expand_as(live)
    with torch.no_grad():
        self_logit = (query * key).sum(-1, keepdim=True) + tilt / scale
    zeros = torch.zeros((), dtype=value.dtype, device=value.device).expand(*value.shape[:-1], spare + 1)
    extra = F.pad(zeros.new_ones(1), (width + 1, spare)).expand(*value.shape[:2], 1, -1)  # key and value alike
    wide_query = torch.cat([query, torch.ones_like(live), self_logit, zeros[..., :spare]], -1)
    wide_key = torch.cat([torch.cat([key, tilt / scale, zeros], -1), extra], -2)
    wide_value = torch.cat([torch.cat([value * live, live, zeros], -1), extra], -2)
    sums = F.scaled_dot_product_attention(wide_query, wide_key, wide_value, scale=scale)
    plain, total, self_share, _ = sums.split([width, 1, 1, spare], -1)
    own = self_share.detach() * (1 - live)
    seen = (total + own).clamp(min=_FAINT if value.dtype == torch.float16 else _TINY)
    out = torch.addcmul(plain, own, value) / seen
    return torch.lerp(out.detach(), out, (seen.detach() / _FAINT).clamp(max=1.0))


def _spare_columns(width: int, device: torch.device) -> int:
    """Columns to add, as fused kernels of GPUs want a multiple of eight."""
    return 0 if device.type == "cpu" else -width % 8
