"""Constant schedules of a given cost, and the published ones."""

import math
import subprocess
import sys

import numpy as np
import pytest

from lightning_hpo.functional.compression.counts import constant_drop
from lightning_hpo.functional.compression.macs import BlockMacs, TransformerMacs
from lightning_hpo.functional.compression.presets import PUBLISHED_SCHEDULES, constant_at_macs
from lightning_hpo.functional.compression.schedule import TokenCompressionSchedule

Schedule = TokenCompressionSchedule
ROWS = [(name, target) for name in PUBLISHED_SCHEDULES for target in PUBLISHED_SCHEDULES[name]]
VIT = TransformerMacs.vit(width=384, depth=12, patches=196)
HIERARCHICAL = TransformerMacs(7, (36,) * 4 + (9,) * 2, (BlockMacs(10, 1, 100),) * 4 + (BlockMacs(20, 2, 300),) * 2)


@pytest.mark.parametrize("kind", ["merge", "prune"])
@pytest.mark.parametrize(("cost", "prefix", "first"), [(VIT, 1, 0), (VIT, 1, 1), (HIERARCHICAL, 0, 0)])
def test_constant_at_macs_is_the_nearest_of_a_fine_grid(cost, prefix, first, kind):
    reachable = {
        cost.count(left, left)
        for r in np.arange(0, 200, 1 / 64)
        for left in [constant_drop(r, cost.entry, prefix + 1, first)[1]]
    }
    for share in (0.95, 0.8, 0.63, 0.55):
        target = share * cost.full
        schedule = constant_at_macs(cost, target, prefix, kind, first)
        assert schedule.macs == cost.count(schedule.prune, schedule.merge)
        assert schedule.full_macs == cost.full
        assert abs(schedule.macs - target) <= min(abs(macs - target) for macs in reachable)
        assert (schedule.prune == schedule.merge) == (kind == "prune")
        assert schedule.merge[:first] == cost.entry[:first]
        schedule.validate(cost.entry, prefix)


def test_constant_at_macs_reaches_integer_r_exactly_and_both_ends():
    for r in (1, 8, 13):
        schedule = Schedule.constant(r, depth=12, tokens=197)
        found = constant_at_macs(VIT, VIT.count(schedule.prune, schedule.merge))
        assert (found.prune, found.merge) == (schedule.prune, schedule.merge)
    assert constant_at_macs(VIT, VIT.full).merge == (197,) * 12
    floor = VIT.count([2] * 12, [2] * 12)
    assert constant_at_macs(VIT, floor).macs == floor


@pytest.mark.parametrize("target", [0, 4.7e9, -1, math.nan, math.inf])
def test_constant_at_macs_refuses_what_cannot_be_reached(target):
    with pytest.raises(ValueError, match=r"0\.\d+ G to 4\.599 G"):
        constant_at_macs(VIT, target)


@pytest.mark.parametrize("arguments", [{"kind": "both"}, {"first": 12}, {"first": -1}])
def test_constant_at_macs_refuses(arguments):
    with pytest.raises(ValueError, match="`kind` must be 'merge' or 'prune' and `first` 0 to 11"):
        constant_at_macs(VIT, 3e9, **arguments)


# ------------------------------------------------------------------------------------------------- published


@pytest.mark.parametrize(("name", "target"), ROWS)
def test_published_schedules_cost_exactly_what_was_published(name, target):
    schedule, cost = PUBLISHED_SCHEDULES[name][target], PUBLISHED_SCHEDULES.cost(name)
    assert cost.count(schedule.prune, schedule.merge) == schedule.macs
    assert cost.full == schedule.full_macs
    assert schedule.macs / 1e9 == pytest.approx(float(target), rel=0.1)  # ViT-T at 0.6 G missed its target most
    assert schedule.entry == cost.entry
    assert schedule.prefix == (0 if name == "caformer_s36" else 1)


def test_published_mapping():
    assert len(ROWS) == 31
    assert len(PUBLISHED_SCHEDULES) == 7
    assert PUBLISHED_SCHEDULES["vit_small_deit"]["2.9"].prune[:4] == (197, 196, 190, 168)
    assert "vit_small_deit" in PUBLISHED_SCHEDULES
    assert PUBLISHED_SCHEDULES.get("resnet") is None
    assert "'5.2', '5.6', '6.0'" in repr(PUBLISHED_SCHEDULES)
    for access in (PUBLISHED_SCHEDULES.__getitem__, PUBLISHED_SCHEDULES.cost):
        with pytest.raises(KeyError, match="'resnet'; there are vit_tiny_deit, "):
            access("resnet")
    with pytest.raises(TypeError):
        PUBLISHED_SCHEDULES["vit_small_deit"]["2.9"] = None  # type: ignore[index]


def test_caformer_prunes_nothing():
    for schedule in PUBLISHED_SCHEDULES["caformer_s36"].values():
        assert schedule.prune == tuple(entering for entering, _, _ in schedule.running())
        assert all(entering == pruned for entering, pruned, _ in schedule.running())


def test_whole_numbers_need_no_torch():
    code = (
        "import sys; from lightning_hpo.functional.compression.schedule import *; "
        "s = PUBLISHED_SCHEDULES['vit_base_mae']['11.5']; "
        "assert PUBLISHED_SCHEDULES.cost('vit_base_mae').count(s.prune, s.merge) == s.macs; "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_schedule_module_offers_both():
    from lightning_hpo.functional.compression import schedule

    assert schedule.PUBLISHED_SCHEDULES is PUBLISHED_SCHEDULES
    assert schedule.constant_at_macs is constant_at_macs
    with pytest.raises(AttributeError, match="no attribute 'PUBLISHED'"):
        _ = schedule.PUBLISHED
