"""Applying a schedule to a network, undoing it, copying it, and every mistake that is refused."""

import copy
import importlib.util
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn

from lightning_hpo import PUBLISHED_SCHEDULES
from lightning_hpo.functional.compression.schedule import TokenCompressionSchedule
from lightning_hpo.nn.diffrate import apply_token_compression, remove_token_compression, token_groups, vit_macs
from lightning_hpo.nn.timm_models import describe, find_networks

_spec = importlib.util.spec_from_file_location("networks", Path(__file__).with_name("networks.py"))
networks = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(networks)


def short_schedule(model):
    layout = networks.anatomy_of(model).layout
    return networks.schedule_of(layout, networks.falling_rates(layout))


def compressed(name="class token", **arguments):
    model = networks.build(name)
    return apply_token_compression(model, short_schedule(model), **arguments)


def tiny(**arguments):
    sizes = {"img_size": 8, "patch_size": 2, "in_chans": 1, "num_classes": 4, "embed_dim": 16, "num_heads": 2}
    return VisionTransformer(**{**sizes, "depth": 3, **arguments}).eval()


TINY = TokenCompressionSchedule((17, 12, 9), (17, 10, 7), (17, 17, 17))


@pytest.mark.parametrize("name", ["class token", "DINOv2 with registers", "SigLIP", "EVA-02", "CAFormer"])
def test_groups_hold_every_patch_once_or_it_was_pruned(name):
    model = networks.build(name)
    schedule = short_schedule(model)
    apply_token_compression(model, schedule, trace=True)
    if name == "CAFormer":  # its stages are traced one by one
        model.stages[3].register_forward_pre_hook(lambda *_: found.append(token_groups(model)))
    found = []
    with torch.no_grad():
        model(networks.images(model, batch=3))
    groups = found[0] if found else token_groups(model)
    left = min(schedule.merge[:4]) - schedule.prefix
    assert groups.shape == (3, schedule.patches)
    for row in groups:
        assert set(row.tolist()) - {-1} == set(range(left))
    pruned = sum(before - after for before, after, _ in schedule.running())
    assert (groups == -1).sum(1).max() <= schedule.patches - left
    assert bool((groups == -1).any()) == (pruned > 0)


def test_nothing_traced():
    model = compressed()
    model(networks.images(model))
    with pytest.raises(ValueError, match="trace=True"):
        token_groups(model)


@pytest.mark.parametrize(("name", "target"), [("vit_tiny_deit", "1.0"), ("vit_small_deit", "2.9")])
def test_published_schedules_cost_what_they_say_on_the_real_networks(name, target):
    model = timm.create_model({"vit_tiny_deit": "deit_tiny", "vit_small_deit": "deit_small"}[name] + "_patch16_224")
    schedule = PUBLISHED_SCHEDULES[name][target]
    assert vit_macs(model, schedule) == schedule.macs
    assert vit_macs(model) == schedule.full_macs


def test_caformer_counts_are_not_off_by_one_and_top_token_receives_merges():
    """Without a class token a count is a number of patches, and the most important patch may be a destination."""
    model = networks.build("CAFormer")
    layout = networks.anatomy_of(model).layout
    assert layout.prefix == 0
    assert layout.cost.entry == (36, 36, 36, 36, 9, 9)
    assert layout.exempt == (True, False, False, True, True, True)
    one = TokenCompressionSchedule(layout.cost.entry, (36, 1, 1, 1, 9, 9), layout.cost.entry, prefix=0)
    apply_token_compression(model, one)
    lengths = []
    model.stages[2].blocks[1].mlp.register_forward_pre_hook(lambda _, inputs: lengths.append(inputs[0].shape[1]))
    with torch.no_grad():
        assert torch.isfinite(model(networks.images(model))).all()
    assert lengths == [1]  # all 35 others went into the top token
    kept = (36, 20, 20, 36, 9, 9)
    pruning = TokenCompressionSchedule(kept, kept, layout.cost.entry, prefix=0)
    with pytest.raises(ValueError, match="merge tokens but not prune"):
        apply_token_compression(networks.build("CAFormer"), pruning)


def test_layer_scale_and_qk_norm_are_kept():
    """A block rewritten without them would not notice that they are switched off."""
    name = "LayerScale, q/k norm, scale norm"
    model = compressed(name)
    x = networks.images(model)
    with torch.no_grad():
        before = model(x)
        for part in ("ls1.gamma", "ls2.gamma", "attn.q_norm.weight", "attn.k_norm.weight", "attn.norm.weight"):
            changed = copy.deepcopy(model)
            for block in changed.blocks:
                block.get_parameter(part).mul_(0.5)
            assert (changed(x) - before).abs().max() > 1e-4, part


def test_last_block_gets_no_task_gradient_and_is_exempt_for_patch_pooled_heads():
    assert networks.anatomy_of(networks.build("class token")).layout.exempt == (True, False, False, False)
    for name in ("MAE pool", "SigLIP", "EVA-02", "no class token", "Perception Encoder"):
        exempt = networks.anatomy_of(networks.build(name)).layout.exempt
        assert exempt[0]
        assert exempt[-1]
        assert not any(exempt[1:-1])


def test_drop_path_and_dropout_of_the_blocks_stay_on():
    model = networks.build("class token", drop_path_rate=0.5, attn_drop_rate=0.2, proj_drop_rate=0.2)
    apply_token_compression(model, short_schedule(model)).train()
    x = networks.images(model)
    assert not torch.equal(model(x), model(x))
    learner = networks.build("class token", attn_drop_rate=0.3)
    networks.learn(learner)
    assert not torch.equal(learner.train()(x), learner(x))  # by mask, too
    assert torch.equal(learner.eval()(x), learner(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions(dtype):
    model = compressed()
    x = networks.images(model)
    with torch.no_grad():
        single, other = model(x), model.to(dtype)(x.to(dtype))
    assert other.dtype == dtype
    assert torch.isfinite(other).all()
    if dtype == torch.float64:  # half precision may rank tokens otherwise
        torch.testing.assert_close(other.float(), single, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("batch", [0, 1])
def test_one_image_and_none(batch):
    model = compressed()
    assert model(torch.randn(batch, 3, 96, 96)).shape == (batch, 1000)


@torch.no_grad()
@pytest.mark.parametrize("learning", [False, True])
@pytest.mark.parametrize(
    ("name", "prefix_weight"),
    [("MAE pool", 0.0), ("MAE pool with prefix", 1.0), ("no class token", 0.0), ("EVA-02", 0.0), ("DINOv3", 0.0)],
)
def test_average_pooling_counts_a_token_as_often_as_it_was_merged(name, prefix_weight, learning):
    if learning:
        model = networks.build(name)
        state = networks.learn(model)[2]
        model.train()
    else:
        model = compressed(name)
        state = model.blocks[0].token_compression.state
    features = model.forward_features(networks.images(model))
    for image in range(2):
        total, count = features.new_zeros(features.shape[-1]), 0.0
        for place, feature in enumerate(features[image]):
            patch = place - state.prefix
            dead = patch >= 0 and state.mask is not None and state.mask[image, patch] == 0
            weight = prefix_weight if patch < 0 else 0.0 if dead else state.size[image, patch].item()
            total, count = total + weight * feature, count + weight
        torch.testing.assert_close(model.pool(features)[image], total / count, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_images_of_a_batch_do_not_see_each_other():
    model = compressed("DINOv3")
    x = networks.images(model, batch=3)
    torch.testing.assert_close(model(x), torch.cat([model(image) for image in x.split(1)]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make_copy", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("learning", [False, True])
def test_copies(make_copy, learning):
    model = networks.build("class token") if learning else compressed()
    if learning:
        networks.learn(model)
        model.train()
    x = networks.images(model)
    logits = model(x)  # leaves tensors with a graph behind
    twin = make_copy(model)
    states = {id(block.token_compression.state) for block in twin.blocks}
    assert len(states) == 1
    assert states != {id(block.token_compression.state) for block in model.blocks}
    with torch.no_grad():
        torch.testing.assert_close(twin.eval()(x), logits, rtol=1e-4, atol=1e-5)  # sliced: it has left its learner
    plain = remove_token_compression(twin)
    assert type(plain) is VisionTransformer
    assert "token_compression" in vars(model.blocks[1])


def test_training_a_compressed_network():
    model = compressed()
    model.train()
    x = networks.images(model)
    model(x).square().mean().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    remove_token_compression(model)
    assert model(x).shape == (2, 1000)


def test_a_compiled_network_is_compressed_in_place():
    model = networks.build("class token")
    schedule, x = short_schedule(model), networks.images(model)
    wrapped = torch.compile(model, backend="eager")
    with torch.no_grad():
        dense = wrapped(x)
        assert apply_token_compression(wrapped, schedule) is wrapped
        torch.testing.assert_close(wrapped(x), model(x))
        assert (wrapped(x) - dense).abs().max() > 1e-3
        remove_token_compression(wrapped)
        torch.testing.assert_close(wrapped(x), dense)


def test_a_network_of_the_users_own():
    class Mine(VisionTransformer):
        pass

    sizes = {"img_size": 8, "patch_size": 2, "in_chans": 1, "num_classes": 4, "embed_dim": 16, "num_heads": 2}
    model = apply_token_compression(Mine(**sizes, depth=3), TINY)
    assert model(torch.randn(2, 1, 8, 8)).shape == (2, 4)
    assert type(remove_token_compression(model)) is Mine
    with pytest.raises(NotImplementedError, match="`Mine` pools patches in a way of its own"):
        describe(Mine(**sizes, depth=3, global_pool="avg"))

    class MyBlock(Block):
        pass

    with pytest.raises(TypeError, match="Blocks found: MyBlock"):
        describe(tiny(block_fn=MyBlock))


def test_networks_are_found_outermost_first():
    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.vision, self.swin = tiny(), timm.create_model("swin_tiny_patch4_window7_224", depths=(1, 1, 1, 1))
            self.compiled = torch.compile(tiny(), backend="eager")
            self.rest = nn.ModuleDict({"inner": nn.Sequential(nn.Linear(2, 2), tiny())})

    assert list(find_networks(Holder())) == ["vision", "compiled._orig_mod", "rest.inner.1"]
    assert list(find_networks(tiny())) == [""]


def test_a_schedule_carries_its_rules():
    """What it was learned with is what it is applied with, unless the call says otherwise."""
    model = networks.build("class token")
    tokens = networks.anatomy_of(model).layout.cost.entry[0]
    plain = TokenCompressionSchedule.constant(r=2, depth=len(model.blocks), tokens=tokens)
    paired = replace(plain, matching="bipartite", importance="mean", size_rule="unclamped")
    assert TokenCompressionSchedule.from_dict(paired.to_dict()) == paired
    x, logits = networks.images(model), []
    with torch.no_grad():
        for schedule, rules in (
            (paired, {}),
            (plain, {"matching": "bipartite", "importance": "mean", "size_rule": "unclamped"}),
            (paired, {"matching": "features", "importance": "class", "size_rule": "clamped"}),
            (plain, {}),
        ):
            logits.append(apply_token_compression(model, schedule, **rules)(x))
            remove_token_compression(model)
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[2], logits[3])
    assert not torch.equal(logits[0], logits[2])


def test_pairs_can_neither_prune_nor_lose_more_than_half():
    model = networks.build("class token")
    tokens, depth = networks.anatomy_of(model).layout.cost.entry[0], len(model.blocks)
    pruning = TokenCompressionSchedule.constant(r=2, depth=depth, tokens=tokens, kind="prune")
    steep = TokenCompressionSchedule.constant(r=tokens - 3, depth=depth, tokens=tokens)
    with pytest.raises(ValueError, match=r"blocks \[0, 1.*\] prune"):
        apply_token_compression(model, pruning, matching="bipartite")
    with pytest.raises(ValueError, match=r"blocks \[0.*\] give up more than half"):
        apply_token_compression(model, steep, matching="bipartite")
    apply_token_compression(model, steep)  # any number may merge into one there
