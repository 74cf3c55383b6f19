"""Small networks of many architectures, loaded by path from the tests next to it."""

from functools import partial

import timm
import torch
from timm.layers.attention import Attention as GatedAttention
from timm.models.metaformer import Attention, LayerNorm2dNoBias, LayerNormNoBias, MetaFormer, SepConv
from timm.models.vision_transformer import ResPostBlock

from lightning_hpo.functional.compression.diffrate import candidate_counts, kept_tokens
from lightning_hpo.nn.diffrate import attach, set_schedule
from lightning_hpo.nn.timm_models import describe

SMALL = {"img_size": 96, "depth": 4}
SMALL_14 = {"img_size": 84, "depth": 4}
CAFORMER = {
    "depths": (1, 1, 4, 2),
    "dims": (16, 32, 64, 96),
    "token_mixers": [SepConv, SepConv, Attention, Attention],
    "norm_layers": [LayerNorm2dNoBias] * 2 + [LayerNormNoBias] * 2,
}


def gated(**arguments):
    """A network with gates behind its attention, which timm offers for the layer."""
    model = timm.create_model("vit_tiny_patch16_224", **arguments)
    for block in model.blocks:
        block.attn = GatedAttention(192, num_heads=3, qkv_bias=True, gated=True)
    return model


NETWORKS = {
    "class token": ("vit_tiny_patch16_224", SMALL),
    "distilled": ("deit_tiny_distilled_patch16_224", SMALL),
    "DeiT-III": ("deit3_small_patch16_224", SMALL),
    "DINOv2 with registers": ("vit_small_patch14_reg4_dinov2", {**SMALL_14, "num_classes": 5}),
    "LayerScale, q/k norm, scale norm": (
        "vit_tiny_patch16_224",
        {"qk_norm": True, "init_values": 0.1, "scale_attn_norm": True, "scale_mlp_norm": True, **SMALL},
    ),
    "MAE pool": ("vit_tiny_patch16_224", {"global_pool": "avg", **SMALL}),
    "MAE pool with prefix": ("vit_tiny_patch16_224", {"global_pool": "avg", "pool_include_prefix": True, **SMALL}),
    "SigLIP": ("vit_base_patch16_siglip_224", {**SMALL, "depth": 3, "embed_dim": 64, "num_heads": 4}),
    "no class token": ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg", **SMALL}),
    "registers only": ("vit_medium_patch16_reg4_gap_256", {**SMALL, "embed_dim": 64, "num_heads": 4}),
    "post-norm": ("vit_tiny_patch16_224", {"block_fn": ResPostBlock, **SMALL}),
    "EVA-02": ("eva02_tiny_patch14_224", {**SMALL_14, "num_classes": 5}),
    "EVA-02 with scales": ("eva02_base_patch14_224", {**SMALL_14, "embed_dim": 64, "num_heads": 4, "init_values": 0.1}),
    "DINOv3": ("vit_small_patch16_dinov3", SMALL),
    "Perception Encoder": ("vit_pe_core_tiny_patch16_384", {**SMALL, "depth": 3}),
    "mixed RoPE": ("vit_small_patch16_rope_mixed_224", SMALL),
    "post-norm EVA": ("eva02_tiny_patch14_224", {**SMALL_14, "use_post_norm": True, "init_values": None}),
    "gated": (gated, SMALL),
    "grouped queries": (
        "eva02_tiny_patch14_224",
        {
            **SMALL_14,
            "attn_type": "rope",
            "num_kv_heads": 1,
            "qkv_fused": False,
            "rope_rotate_half": True,
            "attn_only_layer_scale": True,
        },
    ),
    "CAFormer": (MetaFormer, CAFORMER),
}


def build(name, dtype=torch.float32, seed=0, **changes):
    """A network whose every weight matters: timm's own start leaves scales and positions near zero."""
    generator = torch.Generator().manual_seed(seed)
    model, arguments = NETWORKS[name]
    make = partial(timm.create_model, model) if isinstance(model, str) else model
    model = make(**{**arguments, **changes})
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                fan_in = parameter[0].numel() if parameter.ndim != 3 else 1
                parameter.copy_(noise * fan_in**-0.5 * (1.5 if "qkv" in key or "q_proj" in key else 1.0))
            else:
                parameter.add_(0.3 * noise) if "gamma" not in key else parameter.copy_(0.3 + 0.1 * noise)
    return model.to(dtype).eval()


def image_size(model):
    return model.patch_embed.img_size[0] if hasattr(model, "patch_embed") else 96


def images(model, batch=2, seed=0):
    parameter = next(model.parameters())
    channels = model.patch_embed.proj.in_channels if hasattr(model, "patch_embed") else 3
    size = (batch, channels, image_size(model), image_size(model))
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(parameter.dtype)


def anatomy_of(model):
    return describe(model, image_size(model))


def falling_rates(layout, granularity=1, seed=0, dtype=torch.float32):
    """Raw rates under which every block prunes and merges some tokens, with the counts not quite certain."""
    candidates = candidate_counts(layout.patches, granularity).to(dtype)
    rows = len(layout.blocks)
    place = torch.arange(1, layout.kinds * rows + 1).view(rows, layout.kinds).T / (layout.kinds * rows + 1)
    wanted = layout.patches * (1 - 0.9 * place)
    raw = -(((candidates - wanted.to(dtype).unsqueeze(-1)) / (1.5 * granularity)) ** 2)
    noise = torch.randn(raw.shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return (raw + 0.3 * noise).requires_grad_()


def schedule_of(layout, raw, granularity=1):
    candidates = candidate_counts(layout.patches, granularity)
    return layout.schedule(kept_tokens(raw.detach().softmax(-1), candidates, prefix=0))


def learn(model, raw=None, granularity=1, **rules):
    """Attaches raw rates as the callback does, and the schedule they amount to; returns all three parts."""
    anatomy = anatomy_of(model)
    anatomy = anatomy.merging_pairs() if rules.get("matching") == "bipartite" else anatomy
    if raw is None:
        raw = falling_rates(anatomy.layout, granularity, dtype=next(model.parameters()).dtype)
    state = attach(anatomy, **rules, granularity=granularity, probabilities=lambda: raw.softmax(-1))
    state.learning = True
    set_schedule(anatomy, schedule_of(anatomy.layout, raw, granularity))
    return anatomy, raw, state
