"""What token compression refuses, and what it says then."""

import importlib.util
from pathlib import Path

import pytest
import timm
import torch
import torch.distributed as dist
from timm.models.vision_transformer import (
    DiffParallelScalingBlock,
    ParallelScalingBlock,
    ParallelThingsBlock,
    VisionTransformer,
)
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lightning_hpo.functional.compression.schedule import TokenCompressionSchedule
from lightning_hpo.nn.diffrate import apply_token_compression, attach, vit_macs
from lightning_hpo.nn.timm_models import describe

_spec = importlib.util.spec_from_file_location("networks", Path(__file__).with_name("networks.py"))
networks = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(networks)

TINY = TokenCompressionSchedule((17, 12, 9), (17, 10, 7), (17, 17, 17))


def tiny(**arguments):
    sizes = {"img_size": 8, "patch_size": 2, "in_chans": 1, "num_classes": 4, "embed_dim": 16, "num_heads": 2}
    return VisionTransformer(**{**sizes, "depth": 3, **arguments}).eval()


def images(size=8):
    return torch.randn(2, 1, size, size)


@pytest.mark.parametrize("name", ["resnet18", "mixer_s32_224", "poolformer_s12", "convformer_s18"])
def test_no_transformer_block(name):
    with pytest.raises(TypeError, match=r"holds no supported transformer block\. Supported: vision_transformer\.Block"):
        vit_macs(timm.create_model(name))


def test_the_network_inside_is_named():
    with pytest.raises(TypeError, match=r"Did you mean a network inside it, `1`\?"):
        describe(nn.Sequential(nn.Identity(), tiny()))


@pytest.mark.parametrize(
    ("make", "block", "reason"),
    [
        (lambda: timm.create_model("swin_tiny_patch4_window7_224"), "SwinTransformerBlock", "windows"),
        (lambda: timm.create_model("swinv2_tiny_window8_256"), "SwinTransformerV2Block", "windows"),
        (lambda: timm.create_model("hiera_tiny_224"), "HieraBlock", "windows"),
        (lambda: timm.create_model("tiny_vit_5m_224"), "TinyVitBlock", "windows"),
        (lambda: timm.create_model("samvit_base_patch16", depth=2), "vision_transformer_sam.Block", "windows"),
        (lambda: timm.create_model("beit_base_patch16_224", depth=2), "beit.Block", "relative position bias"),
        (lambda: timm.create_model("vit_relpos_small_patch16_224"), "RelPosBlock", "relative position bias"),
        (lambda: timm.create_model("mvitv2_tiny"), "mvitv2.MultiScaleBlock", "relative position bias"),
        (lambda: timm.create_model("levit_128"), "LevitBlock", "attention bias"),
        (lambda: timm.create_model("cait_xxs24_224"), "LayerScaleBlock", "talking heads"),
        (lambda: timm.create_model("xcit_nano_12_p16_224"), "XCABlock", "channels"),
        (lambda: timm.create_model("naflexvit_base_patch16_gap"), "NaFlexVit", "varies"),
        (lambda: tiny(block_fn=ParallelScalingBlock), "ParallelScalingBlock", "side by side"),
        (lambda: tiny(block_fn=DiffParallelScalingBlock), "DiffParallelScalingBlock", "side by side"),
        (lambda: tiny(block_fn=ParallelThingsBlock), "ParallelThingsBlock", "several attention layers"),
        (lambda: tiny(attn_layer="diff"), "DiffAttention", "differential attention"),
    ],
)
def test_blocks_that_are_refused_by_name_with_the_reason(make, block, reason):
    with pytest.raises(NotImplementedError, match=f"{block}`: .*{reason}"):
        describe(make())


def test_a_namesake_from_another_family_is_not_given_its_reason():
    with pytest.raises(TypeError, match="Blocks found: .*MultiScaleBlock"):
        describe(timm.create_model("crossvit_9_240"))


@pytest.mark.parametrize("pool", ["avgmax", "max", ""])
def test_pooling_that_reads_dropped_tokens(pool):
    with pytest.raises(NotImplementedError, match="'token', 'avg' and 'map' are supported"):
        describe(tiny(global_pool=pool, class_token=True))


def test_a_block_that_runs_several_times():
    model = tiny()
    model.blocks[2] = model.blocks[1]
    with pytest.raises(NotImplementedError, match="runs one block several times"):
        describe(model)


def test_applying_twice():
    model = apply_token_compression(tiny(), TINY)
    for act in (lambda: apply_token_compression(model, TINY), lambda: describe(model), lambda: vit_macs(model)):
        with pytest.raises(RuntimeError, match="applied already; call `remove_token_compression"):
            act()


def test_applying_after_ddp_wrapping(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(tiny())
        with pytest.raises(RuntimeError, match="before it is wrapped in DistributedDataParallel"):
            apply_token_compression(wrapped, TINY)
    finally:
        dist.destroy_process_group()


def test_schedule_of_the_wrong_length():
    with pytest.raises(ValueError, match="schedule has 3 blocks, model has 4"):
        apply_token_compression(tiny(depth=4), TINY)


def test_schedule_made_for_another_resolution():
    with pytest.raises(ValueError, match="schedule is for 16 patches, model has 36"):
        apply_token_compression(tiny(img_size=12), TINY)


def test_schedule_for_another_prefix():
    with pytest.raises(ValueError, match="schedule is for 1 prefix tokens?, model has 3"):
        apply_token_compression(tiny(reg_tokens=2), TINY)
    with pytest.raises(ValueError, match="model has 0"):
        apply_token_compression(tiny(class_token=False, global_pool="avg"), TINY)


def test_a_schedule_that_is_not_monotone_warns_and_takes_the_running_minimum():
    wavy = TokenCompressionSchedule((17, 10, 12), (17, 8, 12), (17, 17, 17))
    model = tiny()
    with pytest.warns(UserWarning, match="block"):
        apply_token_compression(model, wavy)
    assert vit_macs(tiny(), wavy) == describe(tiny()).layout.cost.count((17, 8, 8), (17, 8, 8))
    x = images()
    steady = apply_token_compression(tiny(), TokenCompressionSchedule((17, 10, 8), (17, 8, 8), (17, 17, 17)))
    steady.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(model(x), steady(x))


def test_class_importance_without_a_class_token():
    model = tiny(class_token=False, global_pool="avg")
    entry = (16, 16, 16)
    with pytest.raises(ValueError, match="no class token to rank patches by; use `importance='mean'`"):
        apply_token_compression(model, TokenCompressionSchedule((16, 9, 16), (16, 9, 16), entry, 0), importance="class")
    assert type(model) is VisionTransformer  # nothing was begun


@pytest.mark.parametrize("wrong", [{"importance": "cls"}, {"matching": "values"}, {"size_rule": "clamp"}])
def test_unknown_rules(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be one of"):
        attach(describe(tiny()), **wrong)


def test_gradient_checkpointing_before_and_after():
    model = tiny()
    model.set_grad_checkpointing(True)
    with pytest.raises(ValueError, match="Gradient checkpointing"):
        apply_token_compression(model, TINY)
    model.set_grad_checkpointing(False)
    apply_token_compression(model, TINY).train()
    model.set_grad_checkpointing(True)
    with pytest.raises(ValueError, match="Gradient checkpointing"):
        model(images()).sum().backward()
    model.set_grad_checkpointing(False)
    model(images()).sum().backward()


def test_checkpointing_the_network_as_a_whole_is_fine():
    model, x = apply_token_compression(tiny(), TINY).train(), images()
    torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False).square().sum().backward()
    again = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model(x).square().sum().backward()
    for first, parameter in zip(again, model.parameters(), strict=True):
        torch.testing.assert_close(first, parameter.grad)


def test_dynamic_image_size_at_another_size():
    model = apply_token_compression(tiny(dynamic_img_size=True), TINY)
    assert model(images(8)).shape == (2, 4)
    with pytest.raises(ValueError, match="set up for 16 patches, 36 arrived"):
        model(images(12))


def test_patch_dropout_in_training():
    model = apply_token_compression(tiny(patch_drop_rate=0.5), TINY)
    assert model(images()).shape == (2, 4)
    with pytest.raises(ValueError, match="patch dropout change"):
        model.train()(images())


def test_attention_masks():
    with pytest.raises(ValueError, match="neither attention masks nor causal"):
        apply_token_compression(tiny(), TINY)(images(), attn_mask=torch.ones(17, 17))


@pytest.mark.parametrize("name", ["class token", "DINOv3"])
def test_dense_features(name):
    model = networks.build(name)
    layout = networks.anatomy_of(model).layout
    apply_token_compression(model, networks.schedule_of(layout, networks.falling_rates(layout)))
    with pytest.raises(NotImplementedError, match="Dense features need the whole grid"):
        model.forward_intermediates(networks.images(model))
