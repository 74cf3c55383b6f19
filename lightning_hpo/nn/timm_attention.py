"""timm's attention layers, opened where token compression has to reach in: size bias, mask and token scores."""

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import apply_rot_embed_cat
from timm.layers.attention import Attention, AttentionRope
from timm.models.eva import EvaAttention
from timm.models.metaformer import Attention as MetaFormerAttention
from torch import Tensor

from lightning_hpo.functional.compression.masked_attention import masked_attention, masked_softmax
from lightning_hpo.nn.token_state import RankedTokens, TokenState

__all__ = ["SUPPORTED_ATTENTION", "attend"]

SUPPORTED_ATTENTION = (Attention, AttentionRope, EvaAttention, MetaFormerAttention)


def attend(
    attn: Any, x: Tensor, rope: Tensor | None, state: TokenState, rank: bool
) -> tuple[Tensor, RankedTokens | None]:
    """Runs an attention layer over the tokens that live, and ranks its patches if asked to.

    Args:
        attn: One of :data:`SUPPORTED_ATTENTION`; its own projections, norms, gates and dropout are used.
        x: Normalised tokens, shape ``(batch, tokens, width)``.
        rope: Rotary table, or None.
        state: Sizes and mask of the tokens.
        rank: Whether the block compresses, so that scores and keys are wanted.

    Returns:
        The layer's output, shape of ``x``, and what the ranking found.
    """
    query, key, value = _project(attn, x, state.rotary(rope))
    bias, mask = state.log_size(), state.token_mask()
    dropout = attn.attn_drop.p if attn.training else 0.0
    if mask is None:
        additive = None if bias is None else bias[:, None, None, :].to(query.dtype)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=additive, dropout_p=dropout, scale=attn.scale)
    else:
        out = _masked(query, key, value, mask, bias, dropout, attn.scale)
    ranked = _rank(query, key, bias, mask, state, attn.scale) if rank else None
    out = out.transpose(1, 2)
    if torch.onnx.is_in_onnx_export():  # written out as plain attention, the result lies in another order in memory
        out = out.clone(memory_format=torch.contiguous_format)
    return _finish(attn, out.flatten(2), x), ranked


def _masked(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, bias: Tensor | None, dropout: float, scale: float
) -> Tensor:
    bias = torch.zeros_like(mask) if bias is None else bias
    if not dropout:
        return masked_attention(query, key, value, mask, bias, scale)
    logits = (query * scale @ key.transpose(-2, -1)).float() + bias[:, None, None, :]
    return F.dropout(masked_softmax(logits, mask), dropout).to(value.dtype) @ value


@torch.no_grad()
def _rank(
    query: Tensor, key: Tensor, bias: Tensor | None, mask: Tensor | None, state: TokenState, scale: float
) -> RankedTokens:
    """Scores of the patches: attention that the class token, or the mean living token, pays them."""
    by_class = state.rules.importance == "class"
    if by_class:  # one row; a matrix product would first copy the keys, which lie interleaved with the values
        logits = (key * (query[:, :, :1] * scale)).sum(-1, dtype=torch.float32).unsqueeze(2)
    else:
        logits = (query * scale @ key.transpose(-2, -1)).float()
    if bias is not None:
        logits = logits + bias[:, None, None, :]
    if mask is not None:
        logits = logits.masked_fill(mask[:, None, None, :] < 0.5, -torch.inf)
    weights = logits.softmax(-1).mean(1)
    if mask is not None and not by_class:
        weights = weights * mask.unsqueeze(-1)
    keys = None if state.rules.matching == "features" else key.mean(1)[:, state.prefix :]
    return RankedTokens(weights.sum(1)[:, state.prefix :], keys)


def _project(attn: Any, x: Tensor, rope: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    batch, tokens, _ = x.shape
    if attn.qkv is not None:
        joint = _joint_projection(attn, x).view(batch, tokens, 3, attn.num_heads, attn.head_dim)
        query, key, value = joint.permute(2, 0, 3, 1, 4).unbind(0)
    else:
        separate = (attn.q_proj(x), attn.k_proj(x), attn.v_proj(x))
        query, key, value = (y.view(batch, tokens, -1, attn.head_dim).transpose(1, 2) for y in separate)
    if hasattr(attn, "q_norm"):
        query, key = attn.q_norm(query), attn.k_norm(key)
    if rope is not None:
        query, key = (_rotate(attn, y, rope).type_as(value) for y in (query, key))
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    return query, key, value


def _joint_projection(attn: Any, x: Tensor) -> Tensor:
    if getattr(attn, "q_bias", None) is None:
        return attn.qkv(x)
    bias = torch.cat((attn.q_bias, attn.k_bias, attn.v_bias))
    return attn.qkv(x) + bias if attn.qkv_bias_separate else F.linear(x, attn.qkv.weight, bias)


def _rotate(attn: Any, x: Tensor, rope: Tensor) -> Tensor:
    prefix = attn.num_prefix_tokens
    rotated = apply_rot_embed_cat(x[:, :, prefix:], rope, half=getattr(attn, "rotate_half", False))
    return torch.cat([x[:, :, :prefix], rotated.to(x.dtype)], dim=2)


def _finish(attn: Any, out: Tensor, x: Tensor) -> Tensor:
    if hasattr(attn, "norm"):
        out = attn.norm(out)
    if getattr(attn, "gate", None) is not None:
        out = out * attn.gate(x).sigmoid()
    return attn.proj_drop(attn.proj(out))
