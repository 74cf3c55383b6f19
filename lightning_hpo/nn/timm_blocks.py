"""timm's transformer blocks with token compression between attention and MLP.

A block becomes compressed by changing its class, so that its parameters, their names and every submodule stay what they
are: checkpoints fit both ways, and changing the class back undoes it exactly.
"""

from collections.abc import Callable
from typing import Any

from timm.models.eva import Eva, EvaBlock, EvaBlockPostNorm
from timm.models.metaformer import MetaFormerBlock
from timm.models.vision_transformer import Block, ResPostBlock, VisionTransformer
from torch import Tensor, nn

from lightning_hpo.functional.compression.diffrate import KeptPlan
from lightning_hpo.nn.timm_attention import attend
from lightning_hpo.nn.token_state import BlockCompression, RankedTokens, TokenState

__all__ = ["COMPRESSED_BLOCKS", "COMPRESSED_MODELS", "ORIGINALS"]

Attend = Callable[[Tensor], Tensor]
_MASK_EPS = 1e-6  # share that attention pooling leaves a dead token, so that its gradient stays finite
_NO_GRID = "Dense features need the whole grid, which token compression has shortened; undo it to read them."


class CompressedBlock(nn.Module):
    """What compressed blocks have in common; a subclass says what its two residual branches are."""

    token_compression: BlockCompression

    def attention_branch(self, x: Tensor, attention: Attend) -> Tensor:
        """Residual branch around ``attention``, which takes normalised tokens."""
        raise NotImplementedError

    def mlp_branch(self, x: Tensor) -> Tensor:
        """Residual branch around the MLP."""
        raise NotImplementedError

    def mixer(self) -> Any:
        """The attention layer."""
        return self.attn

    def forward(
        self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """Attention, then fewer tokens, then the MLP."""
        if attn_mask is not None or is_causal:
            raise ValueError("Token compression supports neither attention masks nor causal attention.")
        slot = self.token_compression
        state = slot.state
        if slot.opens:
            state.begin(x, slot.entry, slot.learns)
        state.require_order()
        plan = None if state.plan is None or slot.row is None else KeptPlan(*(part[:, slot.row] for part in state.plan))
        prune, merge = min(slot.prune, x.shape[1]), min(slot.merge, x.shape[1])
        slices = state.plan is None and min(prune, merge) < x.shape[1]

        found: list[RankedTokens | None] = []

        def attention(normed: Tensor) -> Tensor:
            out, ranked = attend(self.mixer(), normed, rope, state, rank=plan is not None or slices)
            found.append(ranked)
            return out

        x = self.attention_branch(x, attention)
        ranked = found[0]
        if ranked is not None:
            x = state.slice_tokens(x, ranked, prune, merge) if plan is None else state.mask_tokens(x, ranked, plan)
        x = self.mlp_branch(x)
        return state.restore_grid(x) if slot.restores else x


class CompressedViTBlock(CompressedBlock, Block):  # type: ignore[misc] # `forward` takes `rope`, too
    """Pre-norm block of ViT, DeiT, DINOv2, SigLIP."""

    def attention_branch(self, x: Tensor, attention: Attend) -> Tensor:
        """Adds attention of the normalised tokens."""
        return x + self.drop_path1(self.ls1(attention(self.norm1(x))))

    def mlp_branch(self, x: Tensor) -> Tensor:
        """Adds the MLP of the normalised tokens."""
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class CompressedResPostBlock(CompressedBlock, ResPostBlock):  # type: ignore[misc]
    """Block with the norm after each branch."""

    def attention_branch(self, x: Tensor, attention: Attend) -> Tensor:
        """Adds the normalised attention of the tokens."""
        return x + self.drop_path1(self.norm1(attention(x)))

    def mlp_branch(self, x: Tensor) -> Tensor:
        """Adds the normalised MLP of the tokens."""
        return x + self.drop_path2(self.norm2(self.mlp(x)))


class CompressedEvaBlock(CompressedBlock, EvaBlock):
    """Pre-norm block of EVA, EVA-02, DINOv3, Perception Encoder."""

    def attention_branch(self, x: Tensor, attention: Attend) -> Tensor:
        """Adds attention of the normalised tokens, scaled where the block has scales."""
        branch = attention(self.norm1(x))
        return x + self.drop_path1(branch if self.gamma_1 is None else self.gamma_1 * branch)

    def mlp_branch(self, x: Tensor) -> Tensor:
        """Adds the MLP of the normalised tokens, scaled where the block has scales."""
        branch = self.mlp(self.norm2(x))
        return x + self.drop_path2(branch if self.gamma_2 is None else self.gamma_2 * branch)


class CompressedEvaBlockPostNorm(CompressedBlock, EvaBlockPostNorm):
    """Block of EVA-giant: the norm after each branch."""

    attention_branch = CompressedResPostBlock.attention_branch
    mlp_branch = CompressedResPostBlock.mlp_branch


class CompressedMetaFormerBlock(CompressedBlock, MetaFormerBlock):
    """Attention block of CAFormer."""

    def mixer(self) -> Any:
        """The attention layer."""
        return self.token_mixer

    def attention_branch(self, x: Tensor, attention: Attend) -> Tensor:
        """Adds attention of the normalised tokens to the scaled tokens."""
        return self.res_scale1(x) + self.layer_scale1(self.drop_path1(attention(self.norm1(x))))

    def mlp_branch(self, x: Tensor) -> Tensor:
        """Adds the MLP of the normalised tokens to the scaled tokens."""
        return self.res_scale2(x) + self.layer_scale2(self.drop_path2(self.mlp(self.norm2(x))))


def _weighted_mean(x: Tensor, weight: Tensor) -> Tensor:
    weight = weight.unsqueeze(-1)
    return ((x * weight).sum(1) / weight.sum(1)).to(x.dtype)


def _attention_pool(pool: Any, x: Tensor, weight: Tensor | None) -> Tensor:
    if weight is None:
        return pool(x)
    return pool(x, attn_mask=(weight + _MASK_EPS).log()[:, None, None, :].to(x.dtype))


class CompressedVisionTransformer(VisionTransformer):
    """Vision Transformer whose pooling weighs each token by the patches it stands for."""

    token_compression: TokenState

    def pool(self, x: Tensor, pool_type: str | None = None) -> Tensor:
        """Pools as the uncompressed model would, tokens counted as often as they were merged."""
        prefix = self.num_prefix_tokens
        weight = self.token_compression.pool_weights(x, float(self.pool_include_prefix))
        if self.attn_pool is not None:
            first = 0 if self.pool_include_prefix else prefix
            return _attention_pool(self.attn_pool, x[:, first:], None if weight is None else weight[:, first:])
        pool_type = self.global_pool if pool_type is None else pool_type
        return super().pool(x, pool_type) if weight is None or pool_type != "avg" else _weighted_mean(x, weight)

    def forward_intermediates(self, *args: Any, **kwargs: Any) -> Any:
        """Refuses: after a compressed block the grid is no longer whole."""
        raise NotImplementedError(_NO_GRID)


class CompressedEva(Eva):
    """EVA whose pooling weighs each token by the patches it stands for."""

    token_compression: TokenState

    def pool(self, x: Tensor, pool_type: str | None = None) -> Tensor:
        """Pools as the uncompressed model would, tokens counted as often as they were merged."""
        if self.attn_pool is not None:
            return _attention_pool(self.attn_pool, x, self.token_compression.pool_weights(x, 1.0))
        weight = self.token_compression.pool_weights(x, 0.0)
        pool_type = self.global_pool if pool_type is None else pool_type
        return super().pool(x, pool_type) if weight is None or pool_type != "avg" else _weighted_mean(x, weight)

    def forward_intermediates(self, *args: Any, **kwargs: Any) -> Any:
        """Refuses: after a compressed block the grid is no longer whole."""
        raise NotImplementedError(_NO_GRID)


COMPRESSED_BLOCKS: dict[type[nn.Module], type[nn.Module]] = {
    Block: CompressedViTBlock,
    ResPostBlock: CompressedResPostBlock,
    EvaBlock: CompressedEvaBlock,
    EvaBlockPostNorm: CompressedEvaBlockPostNorm,
    MetaFormerBlock: CompressedMetaFormerBlock,
}
COMPRESSED_MODELS: dict[type[nn.Module], type[nn.Module]] = {
    VisionTransformer: CompressedVisionTransformer,
    Eva: CompressedEva,
}
ORIGINALS = {new: old for table in (COMPRESSED_BLOCKS, COMPRESSED_MODELS) for old, new in table.items()}
