"""Cost model of compressed transformers against an independent loop, finite differences and published integers."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import lightning_hpo.functional.compression as compression
from lightning_hpo.functional.compression.counts import segments, whole_number
from lightning_hpo.functional.compression.macs import BlockMacs, TransformerMacs

PUBLISHED = json.loads((Path(compression.__file__).parent / "diffrate_schedules.json").read_text())["models"]
VIT_ROWS = [
    (name, target) for name, model in PUBLISHED.items() if name != "caformer_s36" for target in model["schedules"]
]
HIERARCHICAL = TransformerMacs(7, (9, 9, 9, 4, 4), (BlockMacs(10, 1, 100),) * 3 + (BlockMacs(20, 2, 300),) * 2)
MIXED = TransformerMacs(3, (20,) * 4, tuple(BlockMacs(10 + i, 1 + i, 100 * i) for i in range(4)))


def vit_loop(width, patches, pixels, prune, merge, prefix=1, classes=1000):
    """The published formula, written down once more."""
    tokens = patches + prefix
    cost = tokens * width * pixels + width * classes
    for after_prune, after_merge in zip(prune, merge, strict=True):
        cost += 4 * tokens * width**2 + 2 * tokens**2 * width
        tokens = min(tokens, after_prune, after_merge)
        cost += 8 * tokens * width**2
    return cost


def random_schedule(rng, depth, tokens):
    return [[rng.randint(2, tokens) for _ in range(depth)] for _ in range(2)]


class PassingMinimum(torch.autograd.Function):
    """Minimum of three whose gradient goes to both kept counts as it is, and not to the tokens before."""

    @staticmethod
    def forward(ctx, before: Tensor, prune: Tensor, merge: Tensor) -> Tensor:
        return torch.minimum(torch.minimum(before, prune), merge)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[None, Tensor, Tensor]:
        return None, grad, grad


def cost_twin(cost, prune, merge):
    """Block by block through `PassingMinimum`."""
    total = torch.tensor(float(cost.fixed), dtype=prune.dtype)
    for i, (entry, block) in enumerate(zip(cost.entry, cost.blocks, strict=True)):
        if i == 0 or entry != cost.entry[i - 1]:
            tokens = torch.tensor(float(entry), dtype=prune.dtype)
        total = total + tokens * block.attention + tokens * tokens * block.pair
        tokens = PassingMinimum.apply(tokens, prune[i], merge[i])
        total = total + tokens * block.mlp
    return total


@pytest.mark.parametrize(("name", "target"), VIT_ROWS)
def test_published_vit_integers(name, target):
    model = PUBLISHED[name]
    row = model["schedules"][target]
    pixels = 3 * model["patch_size"] ** 2
    cost = TransformerMacs.vit(model["width"], model["depth"], model["patches"], patch_pixels=pixels)
    assert cost.count(row["prune"], row["merge"]) == row["macs"]
    assert vit_loop(model["width"], model["patches"], pixels, row["prune"], row["merge"]) == row["macs"]
    assert cost.full == model["full_macs"]


@pytest.mark.parametrize("target", ["5.2", "5.6", "6.0"])
def test_published_caformer_integers(target):
    row = PUBLISHED["caformer_s36"]["schedules"][target]
    cost = TransformerMacs.caformer()
    assert cost.count(cost.entry, row["merge"]) == row["macs"]
    assert cost.full == PUBLISHED["caformer_s36"]["full_macs"] == 7972596736


def test_there_are_31_published_rows():
    assert len(VIT_ROWS) == 28
    assert len(PUBLISHED["caformer_s36"]["schedules"]) == 3


def test_count_equals_the_loop_on_random_schedules():
    rng = random.Random(0)
    for _ in range(200):
        width, depth, patches, prefix = rng.randint(1, 64), rng.randint(1, 20), rng.randint(4, 300), rng.randint(0, 5)
        prune, merge = random_schedule(rng, depth, patches + prefix)
        cost = TransformerMacs.vit(width, depth, patches, prefix, patch_pixels=48, classes=10)
        assert cost.count(prune, merge) == vit_loop(width, patches, 48, prune, merge, prefix, classes=10)


@pytest.mark.parametrize("cost", [TransformerMacs.vit(32, 6, 50), HIERARCHICAL, MIXED])
def test_count_grows_with_every_kept_count(cost):
    rng = random.Random(1)
    depth = len(cost.blocks)
    for _ in range(50):
        lists = [[rng.randint(1, n) for n in cost.entry] for _ in range(2)]
        base = cost.count(*lists)
        assert base <= cost.full
        for which in range(2):
            for block in range(depth):
                more = [list(x) for x in lists]
                more[which][block] += rng.randint(1, 5)
                assert cost.count(*more) >= base


def test_a_change_of_entry_starts_the_tokens_anew():
    kept = [3, 3, 3, 4, 2]
    by_hand = 7 + 9 * 10 + 81 + 300 + 2 * (30 + 9 + 300) + (80 + 32 + 1200) + (80 + 32 + 600)
    assert HIERARCHICAL.count(kept, kept) == by_hand
    assert list(segments(HIERARCHICAL.entry)) == [(0, 3), (3, 5)]


@pytest.mark.parametrize("cost", [TransformerMacs.vit(32, 6, 50), HIERARCHICAL, MIXED])
def test_count_and_slope_equal_autograd_of_the_passing_minimum(cost):
    rng = random.Random(2)
    for _ in range(50):
        lists = [[rng.randint(1, n + 2) for n in cost.entry] for _ in range(2)]
        prune, merge = (torch.tensor(x, dtype=torch.double, requires_grad=True) for x in lists)
        expected = cost_twin(cost, prune, merge)
        expected.backward()
        total, slope = cost.count_and_slope(prune, merge)
        assert not total.requires_grad
        assert not slope.requires_grad
        assert total.item() == expected.item() == cost.count(*lists)
        torch.testing.assert_close(slope, prune.grad, rtol=0, atol=0)
        torch.testing.assert_close(slope, merge.grad, rtol=0, atol=0)


def test_slope_is_the_closed_form():
    width, depth = 48, 5
    cost = TransformerMacs.vit(width, depth, 60)
    kept = torch.tensor([50.0, 40.0, 45.0, 20.0, 3.0], dtype=torch.double)
    _, slope = cost.count_and_slope(kept, kept + 1)
    alive = kept.cummin(0).values
    expected = 8 * width**2 + (torch.arange(depth) < depth - 1) * (4 * width**2 + 4 * alive * width)
    torch.testing.assert_close(slope, expected, rtol=0, atol=0)


@pytest.mark.parametrize("cost", [TransformerMacs.vit(32, 6, 50), MIXED])
def test_slope_is_the_derivative_in_the_binding_count(cost):
    depth, step = len(cost.blocks), 1e-3
    merge = torch.linspace(18, 5, depth, dtype=torch.double)  # strictly decreasing and below prune: merge binds
    prune = merge + 0.5
    _, slope = cost.count_and_slope(prune, merge)
    for block in range(depth):
        bump = step * torch.eye(depth, dtype=torch.double)[block]
        for binding, expected in ((True, slope[block]), (False, torch.zeros((), dtype=torch.double))):
            up, down = ((prune, merge + s * bump) if binding else (prune + s * bump, merge) for s in (1, -1))
            difference = (cost.count_and_slope(*up)[0] - cost.count_and_slope(*down)[0]) / (2 * step)
            torch.testing.assert_close(difference, expected, rtol=1e-6, atol=1e-4)


def test_slope_is_close_in_float32_and_half_precision_is_widened():
    cost = TransformerMacs.vit(1280, 32, 256, patch_pixels=588)
    row = PUBLISHED["vit_huge_mae"]["schedules"]["103.4"]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):  # whole numbers up to 256 are exact in all three
        kept = [torch.tensor(row[key], dtype=dtype) for key in ("prune", "merge")]
        total, slope = cost.count_and_slope(*kept)
        assert total.dtype == slope.dtype == torch.float32
        assert total.item() == pytest.approx(103337077760, rel=1e-2 if dtype is torch.bfloat16 else 1e-6)


def test_count_and_slope_reads_nothing_back():
    """Meta tensors hold no values: any read or branch on a value raises."""
    kept = torch.empty(5, device="meta")
    total, slope = HIERARCHICAL.count_and_slope(kept, kept)
    assert total.shape == ()
    assert slope.shape == (5,)


@pytest.mark.parametrize("cost", [HIERARCHICAL, MIXED])
def test_count_and_slope_compiles_as_one_graph(cost):
    prune, merge = (torch.rand(len(cost.blocks), dtype=torch.double) * 9 for _ in range(2))
    compiled = torch.compile(cost.count_and_slope, backend="eager", fullgraph=True)
    for got, expected in zip(compiled(prune, merge), cost.count_and_slope(prune, merge), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("prune", "message"),
    [
        ([3, 3], "`prune` has 2 entries, the model has 5 blocks"),
        ([3, 3, 3, 3, 3.0], "non-negative integers"),
        ([3, 3, 3, 3, True], "non-negative integers"),
        ([3, 3, 3, 3, -1], "non-negative integers"),
    ],
)
def test_count_refuses(prune, message):
    with pytest.raises(ValueError, match=message):
        HIERARCHICAL.count(prune, [3] * 5)


@pytest.mark.parametrize("kept", [torch.ones(5, dtype=torch.int64), torch.ones(4), torch.ones(1, 5)])
def test_count_and_slope_refuses(kept):
    with pytest.raises(ValueError, match="must be floating point of shape"):
        HIERARCHICAL.count_and_slope(torch.ones(5), kept)


def test_costs_are_integers():
    with pytest.raises(ValueError, match=r"`attention`=1.0, `mlp`=-2"):
        BlockMacs(1.0, 2, -2)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`fixed`"):
        TransformerMacs(1.5, (3,), (BlockMacs(1, 1, 1),))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="2 entries, the model has 1"):
        TransformerMacs(1, (3, 3), (BlockMacs(1, 1, 1),))
    with pytest.raises(ValueError, match="at least one block"):
        TransformerMacs(1, (), ())
    stored = BlockMacs(np.int64(1), np.int32(2), np.uint8(3))
    assert [type(x) for x in (stored.attention, stored.pair, stored.mlp)] == [int] * 3


def test_cost_models_are_hashable_values():
    assert TransformerMacs.vit(8, 2, 4) == TransformerMacs.vit(8, 2, 4)
    assert len({TransformerMacs.vit(8, 2, 4), TransformerMacs.vit(8, 2, 4), TransformerMacs.vit(8, 2, 5)}) == 2


@pytest.mark.parametrize("arguments", [{"image_size": 225}, {"widths": (1, 2, 3)}, {"image_size": 0}])
def test_caformer_refuses(arguments):
    with pytest.raises(ValueError, match="CAFormer"):
        TransformerMacs.caformer(**arguments)


def test_mlp_ratio_and_prefix_enter_the_vit():
    cost = TransformerMacs.vit(width=10, depth=1, patches=4, prefix=2, patch_pixels=3, classes=5, mlp_ratio=2)
    assert cost.full == 6 * 10 * 3 + 10 * 5 + 6 * 400 + 2 * 36 * 10 + 6 * 400


@pytest.mark.parametrize("value", [True, np.bool_(True), torch.tensor(True), 2.0, np.float32(2), "2", None])
def test_whole_number_refuses(value):
    assert whole_number(value) is None


@pytest.mark.parametrize("value", [2, np.int64(2), torch.tensor(2)])
def test_whole_number_takes_integer_types(value):
    assert whole_number(value) == 2
    assert type(whole_number(value)) is int
