"""Every architecture: dense is untouched, training by mask is slicing, gradients arrive, undo is exact."""

import importlib.util
from pathlib import Path

import pytest
import torch

from lightning_hpo.functional.compression.schedule import TokenCompressionSchedule
from lightning_hpo.nn.diffrate import apply_token_compression, remove_token_compression, vit_macs

_spec = importlib.util.spec_from_file_location("networks", Path(__file__).with_name("networks.py"))
networks = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(networks)

every_network = pytest.mark.parametrize("name", networks.NETWORKS)


def dense_schedule(model):
    layout = networks.anatomy_of(model).layout
    return TokenCompressionSchedule(layout.cost.entry, layout.cost.entry, layout.cost.entry, layout.prefix)


def short_schedule(model):
    layout = networks.anatomy_of(model).layout
    return networks.schedule_of(layout, networks.falling_rates(layout))


def close(first, second, tolerance):
    assert first.abs().max() > 0.05, "the network hardly answers, so nothing is shown"
    assert ((first - second).abs().max() / first.abs().max().clamp(min=1)).item() < tolerance


@every_network
@torch.no_grad()
def test_no_compression_equals_the_untouched_network(name):
    model = networks.build(name)
    x = networks.images(model)
    untouched = model(x)
    apply_token_compression(model, dense_schedule(model))
    close(untouched, model(x), 1e-6)
    close(untouched, model.train()(x), 1e-6)


@every_network
@torch.no_grad()
def test_undo_is_exact(name):
    model = networks.build(name)
    x, keys = networks.images(model), list(model.state_dict())
    untouched, types = model(x), [type(m) for m in model.modules()]
    attributes = [set(vars(m)) for m in model.modules()]
    apply_token_compression(model, short_schedule(model))
    assert not torch.equal(untouched, model(x))
    assert list(model.state_dict()) == keys
    assert remove_token_compression(model) is model
    assert [type(m) for m in model.modules()] == types
    assert [set(vars(m)) for m in model.modules()] == attributes
    assert list(model.state_dict()) == keys
    assert torch.equal(untouched, model(x))


@pytest.mark.parametrize(
    ("dtype", "rules"),
    [
        (torch.float64, {}),
        (torch.float32, {}),
        (torch.float64, {"matching": "keys"}),
        (torch.float64, {"size_rule": "unclamped"}),
        (torch.float64, {"matching": "keys", "size_rule": "unclamped", "importance": "mean"}),
        (torch.float64, {"granularity": 5}),
        (torch.float64, {"matching": "bipartite"}),
        (torch.float32, {"matching": "bipartite"}),
    ],
    ids=["double", "single", "keys", "unclamped", "mean", "granularity", "pairs", "pairs-single"],
)
@every_network
def test_masked_training_equals_sliced_inference(name, dtype, rules):
    model = networks.build(name, dtype)
    x = networks.images(model, batch=3)
    _, _, state = networks.learn(model, **rules)
    trained = model.train()(x)
    state.learning = False
    with torch.no_grad():
        close(model.eval()(x), trained, 1e-5)
        remove_token_compression(model)
        assert (model(x) - trained).abs().max() > 1e-3  # something was compressed


@every_network
def test_gradient_reaches_every_learnable_row(name):
    """All but the last block of networks whose head reads the class token alone: nobody looks at its patches."""
    model = networks.build(name, torch.float64)
    anatomy, raw, _ = networks.learn(model)
    model.train()(networks.images(model)).square().sum().backward()
    reached = raw.grad.abs().sum(-1) > 1e-12
    read_by_nobody = anatomy.layout.blocks[-1] == len(anatomy.blocks) - 1
    assert reached[:, :-1].all() if read_by_nobody else reached.all()
    if read_by_nobody:
        assert not reached[:, -1].any()
        assert model.global_pool == "token"


@every_network
def test_gradient_reaches_the_rates_of_pairs(name):
    """The first block among them, where DiffRate spares it and ToMe does not."""
    model = networks.build(name, torch.float64)
    anatomy, raw, _ = networks.learn(model, matching="bipartite")
    assert raw.shape[0] == 1
    assert (anatomy.layout.blocks[0] == 0) == (name != "CAFormer")
    model.train()(networks.images(model)).square().sum().backward()
    assert (raw.grad.abs().sum(-1) > 1e-12)[:, :-1].all()


@every_network
def test_really_shorter_sequences_of_the_scheduled_lengths(name):
    model = networks.build(name)
    schedule = short_schedule(model)
    apply_token_compression(model, schedule)
    lengths = []
    for block in (m for m in model.modules() if "token_compression" in vars(m) and hasattr(m, "mlp_branch")):
        block.mlp.register_forward_pre_hook(lambda _, inputs: lengths.append(inputs[0].shape[1]))
    with torch.no_grad():
        model(networks.images(model))
    assert tuple(lengths) == schedule.merge
    assert min(lengths) < schedule.entry[0] / 2


@every_network
def test_macs_grow_with_the_schedule_and_the_dense_count_is_an_upper_bound(name):
    model = networks.build(name)
    size = {"image_size": 96} if name == "CAFormer" else {}
    dense, short = vit_macs(model, **size), vit_macs(model, short_schedule(model), **size)
    assert 0 < short < dense == vit_macs(model, dense_schedule(model), **size)
    assert short == short_schedule(model).macs


@every_network
def test_weights_fit_both_ways(name):
    plain, compressed = networks.build(name, seed=1), networks.build(name, seed=2)
    apply_token_compression(compressed, short_schedule(compressed))
    assert compressed.load_state_dict(plain.state_dict()).missing_keys == []
    apply_token_compression(plain, short_schedule(plain))
    x = networks.images(plain)
    with torch.no_grad():
        assert torch.equal(plain(x), compressed(x))
