"""Every check passes for a correct method and fails for a method with the defect it is there to find."""

import importlib.util
from pathlib import Path

import pytest
import torch

from lightning_hpo.testing import (
    TinyClassifier,
    check_accumulation,
    check_bf16,
    check_checkpoint_independent,
    check_fits_twice,
    check_resume,
    check_teardown,
    check_trains,
    check_two_ranks,
    check_weights_only,
    kill_and_resume,
)

# Loaded by path: tests are no package under `--import-mode=importlib`.
_spec = importlib.util.spec_from_file_location("toys", Path(__file__).with_name("toys.py"))
toys = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(toys)

RESUMES = [
    {"kill_at": 1},
    {"kill_at": 4},  # in the middle of an epoch of six
    {"kill_at": 6},  # between two epochs
    {"kill_at": 9},  # in the middle of the second epoch
    {"kill_at": 5, "accumulate_grad_batches": 2},  # in the middle of a window
    {"kill_at": 10, "accumulate_grad_batches": 4},  # in the middle of a window, after a short one
]


@pytest.mark.parametrize(
    "check",
    [
        check_accumulation,
        check_bf16,
        check_checkpoint_independent,
        check_fits_twice,
        check_teardown,
        check_trains,
        check_two_ranks,
        check_weights_only,
    ],
)
def test_correct_method_passes(check):
    check(toys.GradientScale)


@pytest.mark.parametrize("arguments", RESUMES, ids=str)
def test_correct_method_resumes(arguments):
    check_resume(toys.GradientScale, **arguments)


def test_correct_method_passes_teardown_after_an_interruption():
    check_teardown(toys.GradientScale, interrupted=True)


@pytest.mark.parametrize(
    ("check", "defect", "message"),
    [
        (check_trains, toys.LearnsNothing, "no hyperparameter moved in 8 steps"),
        (check_trains, toys.Diverges, "not finite numbers"),
        (check_trains, toys.LogsNothing, "nothing is logged under `toys/`"),
        (check_trains, toys.ReportsNothing, "`hyperparameters\\(\\)` is empty"),
        (check_resume, toys.ForgetsMomentum, "hyperparameters of the uninterrupted and the resumed run differ"),
        (check_resume, toys.DrawsUnsavedNumbers, "hyperparameters of the uninterrupted and the resumed run differ"),
        (check_resume, toys.SavesNothing, "hyperparameters of the uninterrupted and the resumed run differ"),
        (check_two_ranks, toys.ForgetsToReduce, "states on rank 0 and rank 1 .*reduce statistics"),
        (check_two_ranks, toys.SumsOverRanks, "two ranks and one process on the joined batch differ"),
        (check_fits_twice, toys.FitsOnce, "no hyperparameter moved"),
        (check_fits_twice, toys.LeavesAHook, "after the first and after the second fit differ"),
        (check_weights_only, toys.SavesAClass, "refuses the checkpoint"),
        (check_weights_only, toys.SavesNothing, r"holds no state under `SavesNothing\{\}`"),
        (check_checkpoint_independent, toys.RegistersAParameter, r"'network.rate'\] is only in the first"),
        (check_checkpoint_independent, toys.AddsAnEntry, "entries of checkpoints with and without"),
        (check_checkpoint_independent, toys.RefusesForeignCheckpoints, "written without me"),
        (check_teardown, toys.LeavesAHook, r"'network'\]\['hooks'\]\['_forward_hooks'\]: 0 != 1"),
        (check_teardown, toys.LeavesItFrozen, r"'network.norm.weight'\]\['requires_grad'\]: True != False"),
        (check_teardown, toys.LeavesAForward, r"network.blocks.0'\]\['functions on the instance'\]"),
        (check_teardown, toys.RegistersAParameter, r"'network.rate'\] is only in the second"),
        (check_accumulation, toys.StepsEveryMicroBatch, "differ"),
        (
            check_accumulation,
            toys.SeesTheLastMicroBatchOnly,
            "method: two micro-batches of 4 .* differ",
        ),
        (check_bf16, toys.KeepsHalfPrecision, r"'scale'\] is torch.bfloat16"),
    ],
)
def test_defect_is_found(check, defect, message):
    with pytest.raises(AssertionError, match=message):
        check(defect)


def test_a_module_left_changed_by_an_interruption_is_found():
    check_teardown(toys.LeavesAForwardWhenInterrupted)
    with pytest.raises(AssertionError, match="before and after an interrupted fit differ"):
        check_teardown(toys.LeavesAForwardWhenInterrupted, interrupted=True)


def test_resume_needs_a_run_that_can_be_killed():
    with pytest.raises(AssertionError, match="micro-batch 10 is not within the run of 10"):
        check_resume(toys.GradientScale, kill_at=10)
    with pytest.raises(AssertionError, match="no optimizer step had been taken"):
        check_resume(toys.GradientScale, kill_at=1, accumulate_grad_batches=2)


def test_the_killed_run_really_stops_and_the_resumed_one_really_starts_there():
    whole, killed, resumed = kill_and_resume(toys.GradientScale, steps=10, kill_at=7)
    assert len(killed.losses) == 7
    assert killed.global_step == 0  # never reached the end
    assert len(resumed.losses) == 3
    assert len(whole.losses) == 10


def test_a_module_with_dropout_is_not_blamed_on_the_method():
    class Dropping(TinyClassifier):
        def __init__(self):
            super().__init__()
            self.network.head_drop = torch.nn.Dropout(0.5)

    with pytest.raises(AssertionError, match="uninterrupted and the resumed run differ"):
        check_resume(toys.GradientScale, Dropping)
