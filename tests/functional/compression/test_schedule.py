"""Schedules: checks, running minimum, files, constant and published ones."""

import json
import math
import random
import warnings

import numpy as np
import pytest

from lightning_hpo.functional.compression.counts import running_counts
from lightning_hpo.functional.compression.macs import BlockMacs, TransformerMacs
from lightning_hpo.functional.compression.schedule import (
    PUBLISHED_SCHEDULES,
    TokenCompressionSchedule,
)

Schedule = TokenCompressionSchedule
ROWS = [(name, target) for name in PUBLISHED_SCHEDULES for target in PUBLISHED_SCHEDULES[name]]


def random_schedules(count=200, seed=0):
    rng = random.Random(seed)
    for _ in range(count):
        prefix = rng.randint(0, 5)
        entry = [n for n in (rng.randint(prefix + 1, 60) for _ in range(3)) for _ in range(rng.randint(1, 6))]
        prune, merge = ([rng.randint(prefix + 1, n) for n in entry] for _ in range(2))
        yield Schedule(prune, merge, entry, prefix)


# ---------------------------------------------------------------------------------------------- construction


def test_fields_become_plain_integers():
    schedule = Schedule(np.array([5, 4]), [np.int32(4), 4], (9, 9), np.int64(1), macs=np.int64(7))
    numbers = [*schedule.prune, *schedule.merge, *schedule.entry, schedule.prefix, schedule.macs]
    assert [type(n) for n in numbers] == [int] * len(numbers)
    assert schedule == Schedule((5, 4), (4, 4), (9, 9), 1, 7)
    assert hash(schedule) == hash(Schedule((5, 4), (4, 4), (9, 9), 1, 7))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([5], [4, 4], [9, 9]), "`prune` has 1 entries for 2 blocks"),
        (([5, 4], [4, 4, 4], [9, 9]), "`merge` has 3 entries for 2 blocks"),
        (([5, 10], [4, 4], [9, 9]), "block 1: `prune` keeps 10 of 9 tokens"),
        (([5, 5], [4, 5], [9, 4]), "block 1: `merge` keeps 5 of 4 tokens"),
        (([5, 5], [4, 1], [9, 9]), r"block 1: `merge` is 1, at least prefix \+ 1 = 2 tokens"),
        (([5, 5], [4, 5], [9, 9], 4), r"block 0: `merge` is 4, at least prefix \+ 1 = 5 tokens"),
        (([5, 5.0], [4, 4], [9, 9]), "block 1: `prune` is not an integer: 5.0"),
        (([5, True], [4, 4], [9, 9]), "block 1: `prune` is not an integer: True"),
        (([5, 5], [4, np.float32(4)], [9, 9]), "block 1: `merge` is not an integer"),
        (([5, 5], [4, "4"], [9, 9]), "block 1: `merge` is not an integer: '4'"),
        (([5, 5], [4, 4], [9, 9.5]), "block 1: `entry` is not an integer: 9.5"),
        (([5, 5], [4, 4], [9, 1]), "block 1: `entry` is 1"),
        (([5], [4], [9], -1), "`prefix` must be a non-negative integer, got -1"),
        (([5], [4], [9], 1.0), "`prefix` must be a non-negative integer, got 1.0"),
        (([5], [4], [9], 1, 0), "`macs` must be a positive integer, got 0"),
        (([5], [4], [9], 1, 5, 2.5), "`full_macs` must be a positive integer, got 2.5"),
        (([], [], []), "at least one block"),
        ((5, [4], [9]), "`prune` must be a sequence of integers, got 5"),
        ((["5"], "4", [9]), "`merge` must be a sequence of integers, got '4'"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        Schedule(*arguments)


def test_all_problems_come_at_once():
    with pytest.raises(ValueError, match="Invalid token compression schedule") as raised:
        Schedule([5, 10, 1.5], [4, 4], [9, 9, 9], macs=-1)
    for part in ("`merge` has 2", "block 1: `prune` keeps 10 of 9", "block 2: `prune` is not", "`macs` must be"):
        assert part in str(raised.value)


# ------------------------------------------------------------------------------------------- running minimum


def test_running_is_the_minimum_so_far_in_each_segment():
    for schedule in random_schedules():
        alive = None
        for block, (entering, pruned, merged) in enumerate(schedule.running()):
            new_segment = block == 0 or schedule.entry[block] != schedule.entry[block - 1]
            assert entering == (schedule.entry[block] if new_segment else alive)
            assert pruned == min(entering, schedule.prune[block])
            assert merged == min(entering, schedule.prune[block], schedule.merge[block])
            assert schedule.prefix + 1 <= merged <= pruned <= entering
            alive = merged


def test_running_counts_cost_what_the_listed_ones_cost():
    for schedule in random_schedules(50):
        cost = TransformerMacs(5, schedule.entry, (BlockMacs(10, 1, 100),) * len(schedule.entry))
        _, pruned, merged = zip(*schedule.running(), strict=True)
        assert cost.count(pruned, merged) == cost.count(schedule.prune, schedule.merge)
        assert running_counts(schedule.entry, pruned, merged) == schedule.running()


def test_running_schedules_are_monotone():
    for schedule in random_schedules(50):
        _, pruned, merged = zip(*schedule.running(), strict=True)
        effective = Schedule(pruned, merged, schedule.entry, schedule.prefix)
        assert effective.nonmonotone() == ()
        assert bool(schedule.nonmonotone()) <= (effective != schedule)


def test_nonmonotone_blocks():
    schedule = Schedule([9, 5, 6, 9, 4], [9, 5, 5, 9, 5], [9] * 5)
    # Block 3 lists all tokens, so it compresses nothing; block 4 merges to more than its pruning leaves.
    assert schedule.nonmonotone() == (2, 4)


def test_nonmonotone_published_rows():
    rows = {(name, target) for name, target in ROWS if PUBLISHED_SCHEDULES[name][target].nonmonotone()}
    vit_large = {("vit_large_mae", target) for target in ("31.0", "34.7", "38.5", "42.3")}
    vit_huge = {("vit_huge_mae", target) for target in PUBLISHED_SCHEDULES["vit_huge_mae"]}
    assert rows == {("vit_tiny_deit", "1.0"), ("vit_small_deit", "2.5")} | vit_large | vit_huge
    assert PUBLISHED_SCHEDULES["vit_tiny_deit"]["1.0"].nonmonotone() == (6, 7, 8)
    assert PUBLISHED_SCHEDULES["vit_small_deit"]["2.5"].nonmonotone() == (6, 7)


# -------------------------------------------------------------------------------------------------- validate


def test_validate_accepts_its_own_model_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PUBLISHED_SCHEDULES["vit_small_deit"]["2.9"].validate([197] * 12, prefix=1)
        PUBLISHED_SCHEDULES["caformer_s36"]["5.6"].validate([196] * 18 + [49] * 3, prefix=0)


def test_validate_warns_naming_blocks_and_what_is_used():
    schedule = PUBLISHED_SCHEDULES["vit_small_deit"]["2.5"]
    with pytest.warns(UserWarning, match=r"blocks 6, 7 \(counted from 0\).*107/96, 96/82"):
        schedule.validate([197] * 12)


@pytest.mark.parametrize(
    ("entry", "prefix", "message"),
    [
        ([257] * 12, 1, r"schedule is for 196 patches, model has 256\."),
        ([198] * 12, 2, r"schedule is for 1 prefix tokens, model has 2\."),
        ([197] * 24, 1, r"schedule has 12 blocks, model has 24\."),
        ([197] * 11 + [50], 1, r"schedule is for 196 patches, model has 49 in block 11\."),
        ([256] * 24, 0, "12 blocks, model has 24; .* 1 prefix tokens, model has 0; .* 196 patches, model has 256"),
    ],
)
def test_validate_refuses_another_model(entry, prefix, message):
    with pytest.raises(ValueError, match=message):
        PUBLISHED_SCHEDULES["vit_small_deit"]["2.9"].validate(entry, prefix)


# ------------------------------------------------------------------------------------------------------ JSON


def test_round_trip_is_exact(tmp_path):
    for i, schedule in enumerate([*random_schedules(20), PUBLISHED_SCHEDULES["vit_huge_mae"]["103.4"]]):
        path = tmp_path / f"{i}.json"
        schedule.to_json(path)
        assert Schedule.from_json(path) == schedule
        assert Schedule.from_json(str(path)) == schedule
        assert Schedule.from_dict(schedule.to_dict()) == schedule
        assert len(path.read_text().splitlines()) == 9  # one line a field, two braces


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, "`format_version` is 2, this version of the package reads 1"),
        ({"format_version": None}, "`format_version` is None"),
        ({"format_version": True}, "`format_version` is True"),
        ({"rate": 3, "keep": 1}, "unknown key 'rate', unknown key 'keep'"),
        ({"prune": [10]}, "block 0: `prune` keeps 10 of 9"),
        ({"merge": [4.0]}, "block 0: `merge` is not an integer: 4.0"),
        ({"entry": "9"}, "`entry` must be a sequence"),
    ],
)
def test_from_json_refuses(tmp_path, change, message):
    path = tmp_path / "schedule.json"
    path.write_text(json.dumps({**Schedule([5], [4], [9]).to_dict(), **change}))
    with pytest.raises(ValueError, match=message) as raised:
        Schedule.from_json(path)
    assert "schedule.json" in str(raised.value)


def test_from_json_refuses_what_is_no_schedule(tmp_path):
    path = tmp_path / "x.json"
    for text in ("[1, 2]", "{", "", '{"format_version": 1, "prune": [3]}'):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"x\.json"):
            Schedule.from_json(path)
    with pytest.raises(ValueError, match="missing key 'merge', missing key 'entry'"):
        Schedule.from_dict({"format_version": 1, "prune": [3]})
    assert Schedule.from_dict({"format_version": 1, "prune": [3], "merge": [3], "entry": [9]}).prefix == 1


# -------------------------------------------------------------------------------------------------- constant


@pytest.mark.parametrize("r", [0, 1, 8, 13, 16, 40, 300])
def test_constant_is_the_closed_form(r):
    kept = [max(2, 197 - r * (block + 1)) for block in range(12)]
    merged = Schedule.constant(r, depth=12, tokens=197)
    pruned = Schedule.constant(r, depth=12, tokens=197, kind="prune")
    assert list(merged.merge) == list(pruned.merge) == list(pruned.prune) == kept
    assert list(merged.prune) == [197, *kept[:-1]]
    assert merged.nonmonotone() == pruned.nonmonotone() == ()
    assert [(n, n) for n, _, _ in merged.running()] == [(n, p) for n, p, _ in merged.running()]  # nothing is pruned


@pytest.mark.parametrize("r", [0.25, 0.5, 1 / 3, 2.75, 7.1])
def test_fractional_r_rounds_the_cumulative_drop(r):
    kept = Schedule.constant(r, depth=24, tokens=300, prefix=3, first=4).merge
    assert kept[:4] == (300,) * 4
    for block in range(4, 24):
        assert abs(300 - kept[block] - r * (block - 3)) <= 0.5
    drops = [a - b for a, b in zip((300, *kept), kept, strict=False)][4:]
    assert set(drops) <= {math.floor(r), math.ceil(r)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"r": -1}, "`r` must be a finite number"),
        ({"r": math.nan}, "`r` must be a finite number"),
        ({"r": math.inf}, "`r` must be a finite number"),
        ({"r": True}, "`r` must be a finite number"),
        ({"r": "8"}, "`r` must be a finite number"),
        ({"depth": 0}, "`depth` must be a positive integer"),
        ({"depth": 2.0}, "`depth` must be a positive integer"),
        ({"tokens": 1}, "`entry` is 1"),
        ({"tokens": 9.0}, "`entry` is not an integer"),
        ({"prefix": -1}, "`prefix`"),
        ({"kind": "both"}, "`kind` must be 'merge' or 'prune', got 'both'"),
        ({"first": 4}, "`first` must be a block, 0 to 3, got 4"),
        ({"first": -1}, "`first` must be a block"),
        ({"r": -1, "kind": "both", "tokens": 1}, "`entry` is 1.*`r` must be.*`kind` must be"),
    ],
)
def test_constant_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        Schedule.constant(**{"r": 2, "depth": 4, "tokens": 9, **arguments})
