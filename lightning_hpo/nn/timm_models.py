"""Which timm networks token compression fits, and what it has to know of them."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from timm.layers import PatchEmbed
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.metaformer import MetaFormer, SepConv
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_hpo.functional.compression.macs import BlockMacs, TransformerMacs
from lightning_hpo.functional.compression.rates import RateLayout
from lightning_hpo.nn.timm_attention import SUPPORTED_ATTENTION
from lightning_hpo.nn.timm_blocks import COMPRESSED_BLOCKS, COMPRESSED_MODELS, CompressedBlock

__all__ = ["Anatomy", "describe", "find_networks"]

_REFUSED = {
    "ParallelScalingBlock": "attention and MLP run side by side, so no token can leave between them",
    "DiffParallelScalingBlock": "attention and MLP run side by side, so no token can leave between them",
    "ParallelThingsBlock": "it holds several attention layers, which would rank tokens differently",
    "DiffAttention": "differential attention has no attention weights to rank tokens by",
    "RelPosBlock": "its relative position bias belongs to the full grid",
    "ResPostRelPosBlock": "its relative position bias belongs to the full grid",
    "SwinTransformerBlock": "it attends inside windows of the full grid",
    "SwinTransformerV2Block": "it attends inside windows of the full grid",
    "SwinTransformerV2CrBlock": "it attends inside windows of the full grid",
    "HieraBlock": "it attends inside windows of the full grid",
    "mvitv2.MultiScaleBlock": "its attention pools the full grid and adds a relative position bias",
    "LayerScaleBlock": "its talking heads mix the attention maps",
    "XCABlock": "it attends over channels, not tokens",
    "LevitBlock": "its attention bias belongs to the full grid",
    "TinyVitBlock": "it attends inside windows of the full grid",
    "NaFlexVit": "its sequence length varies from image to image",
    "beit.Block": "its relative position bias belongs to the full grid",
    "vision_transformer_sam.Block": "it attends inside windows with a relative position bias",
}


@dataclass(frozen=True)
class Anatomy:
    """A network that token compression fits.

    Args:
        model: The network.
        blocks: Its transformer blocks, in the order in which they run.
        layout: Which of them compress, and what they cost. A network whose grid must be whole again only merges.
        importance: How patches are ranked by default.
        whole_grid: Whether the grid must be whole again behind the last block of a segment.
    """

    model: nn.Module
    blocks: tuple[nn.Module, ...]
    layout: RateLayout
    importance: Literal["class", "mean"]
    whole_grid: bool = False

    def merging_pairs(self) -> "Anatomy":
        """The same network where tokens merge in pairs (ToMe): nothing is pruned, and the first block takes part.

        DiffRate spares the first block because the class token does not rank patches well there; keys do.
        """
        spared = self.whole_grid or len(self.blocks) == 1
        exempt = (self.layout.exempt[0] and spared, *self.layout.exempt[1:])
        return replace(self, layout=replace(self.layout, exempt=exempt, prunes=False, halves=True))

    @property
    def has_class_token(self) -> bool:
        """Whether there is a class token to rank patches by."""
        return self.importance == "class"


def find_networks(module: nn.Module) -> dict[str, nn.Module]:
    """Networks inside ``module`` that token compression may fit, outermost first.

    Returns:
        Their names relative to ``module`` (empty for itself).
    """
    found: dict[str, nn.Module] = {}
    for name, child in module.named_modules():
        inside = any(name.startswith(f"{outer}.") or not outer for outer in found)
        if not inside and isinstance(child, (VisionTransformer, Eva, MetaFormer)):
            found[name] = child
    return found


def describe(model: nn.Module, image_size: int | None = None) -> Anatomy:
    """Looks a network over.

    Args:
        model: A timm ``VisionTransformer`` (DeiT, DeiT-III, DINOv2, MAE, SigLIP ...), ``Eva`` (EVA-02, DINOv3 ...) or
            CAFormer.
        image_size: Height and width of the images, for CAFormer; by default that of its pretrained weights.

    Returns:
        What token compression has to know.

    Raises:
        TypeError: If there is no supported transformer block.
        NotImplementedError: If a block, its attention or the pooling cannot be compressed; says why.
        RuntimeError: If the network is compressed already, or wrapped for distributed training.
        ValueError: If gradient checkpointing is on.
    """
    model = getattr(model, "_orig_mod", model)  # what `torch.compile` wraps
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise RuntimeError("Compress the network before it is wrapped in DistributedDataParallel.")
    if any(isinstance(m, CompressedBlock) for m in model.modules()):
        raise RuntimeError("Token compression is applied already; call `remove_token_compression(model)` first.")
    if refusal := _refusal(model):
        raise NotImplementedError(refusal)
    if isinstance(model, MetaFormer):
        anatomy = _describe_caformer(model, image_size)
    elif isinstance(model, (VisionTransformer, Eva)):
        anatomy = _describe_vit(model)
    else:
        raise TypeError(_nothing_found(model))
    if any(getattr(m, "grad_checkpointing", False) for m in model.modules()):
        raise ValueError(
            "Gradient checkpointing runs blocks twice, out of order; turn it off: compression saves memory."
        )
    return anatomy


def _describe_vit(model: Any) -> Anatomy:
    blocks = tuple(model.blocks)
    if not blocks or any(type(b) not in COMPRESSED_BLOCKS or type(b.attn) not in SUPPORTED_ATTENTION for b in blocks):
        raise TypeError(_nothing_found(model))
    if len(set(blocks)) < len(blocks):
        raise NotImplementedError(
            f"`{type(model).__name__}` runs one block several times; each needs counts of its own."
        )
    pools_patches = _check_pooling(model)
    exempt = [index == 0 for index in range(len(blocks))]
    exempt[-1] |= pools_patches
    prefix = model.num_prefix_tokens
    entry = (model.patch_embed.num_patches + prefix,) * len(blocks)
    cost = TransformerMacs(_stem_and_head(model, entry[0]), entry, tuple(_block_macs(b, b.attn) for b in blocks))
    importance: Literal["class", "mean"] = "class" if model.cls_token is not None else "mean"
    return Anatomy(model, blocks, RateLayout(cost, tuple(exempt), prefix), importance)


def _check_pooling(model: Any) -> bool:
    """Whether the head reads the patches; refuses heads that would read dropped tokens as if they were there."""
    pooling = "token" if isinstance(model, VisionTransformerDistilled) else model.global_pool
    if pooling not in ("token", "avg", "map"):
        raise NotImplementedError(
            f"Pooling {pooling!r} of `{type(model).__name__}` reads every token, the dropped ones too; "
            "'token', 'avg' and 'map' are supported."
        )
    if pooling != "token" and type(model) not in COMPRESSED_MODELS:
        raise NotImplementedError(f"`{type(model).__name__}` pools patches in a way of its own.")
    return pooling != "token"


def _describe_caformer(model: Any, image_size: int | None) -> Anatomy:
    stages = list(model.stages)
    convolutional = [isinstance(s.blocks[0].token_mixer, SepConv) for s in stages]
    if convolutional != [True, True, False, False]:
        raise TypeError(_nothing_found(model))
    size = image_size or model.pretrained_cfg["input_size"][-1]
    widths = [stage.blocks[0].mlp.fc2.out_features for stage in stages[2:]]
    widths = [stage.blocks[0].mlp.fc2.out_channels for stage in stages[:2]] + widths
    depths = [len(stage.blocks) for stage in stages]
    cost = TransformerMacs.caformer(widths, depths, size, model.num_classes)
    blocks = tuple(block for stage in stages[2:] for block in stage.blocks)
    exempt = [index in (0, depths[2] - 1) or index >= depths[2] for index in range(len(blocks))]  # the paper's
    return Anatomy(model, blocks, RateLayout(cost, tuple(exempt), prefix=0, prunes=False), "mean", whole_grid=True)


def _block_macs(block: Any, attn: Any) -> BlockMacs:
    return BlockMacs(_linear_weights(attn), 2 * attn.num_heads * attn.head_dim, _linear_weights(block.mlp))


def _linear_weights(module: nn.Module) -> int:
    return sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))


def _stem_and_head(model: Any, tokens: int) -> int:
    heads = sum(_linear_weights(getattr(model, name)) for name in ("head", "head_dist") if hasattr(model, name))
    if type(model.patch_embed) is PatchEmbed:
        return tokens * model.patch_embed.proj.weight.numel() + heads  # the paper charges prefix tokens, too
    counter = FlopCounterMode(display=False)
    parameter = next(model.parameters())
    height, width = model.patch_embed.img_size
    with torch.no_grad(), counter:
        model.patch_embed(torch.zeros(1, model.in_chans, height, width, dtype=parameter.dtype, device=parameter.device))
    return counter.get_total_flops() // 2 + heads


def _refusal(model: nn.Module) -> str:
    """Why something in ``model`` is refused by name; empty if nothing is."""
    for module in model.modules():
        package, _, home = type(module).__module__.rpartition(".")
        name = f"{home}.{type(module).__name__}"
        reason = _REFUSED.get(type(module).__name__, _REFUSED.get(name)) if package.startswith("timm.") else None
        if reason:
            return f"Token compression does not support `{name}`: {reason}."
    return ""


def _nothing_found(model: nn.Module) -> str:
    supported = ", ".join(f"{t.__module__.rpartition('.')[2]}.{t.__name__}" for t in COMPRESSED_BLOCKS)
    inside = ", ".join(sorted(set(_block_like(model)))) or "none"
    within = [f"`{name}`" for name in find_networks(model) if name]
    hint = f" Did you mean a network inside it, {' or '.join(within)}?" if within else ""
    return (
        f"`{type(model).__name__}` holds no supported transformer block. Supported: {supported}, inside timm's "
        f"VisionTransformer, Eva or CAFormer. Blocks found: {inside}.{hint}"
    )


def _block_like(model: nn.Module) -> Iterator[str]:
    return (type(m).__name__ for m in model.modules() if "Block" in type(m).__name__)
