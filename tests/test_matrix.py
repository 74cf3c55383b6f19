"""What every method must do, for every entry of `matrix.py`."""

import importlib.util
import sys
from pathlib import Path

import pytest

import lightning_hpo
from lightning_hpo.cli import main
from lightning_hpo.cli.methods import find_methods
from lightning_hpo.testing import (
    check_accumulation,
    check_bf16,
    check_checkpoint_independent,
    check_fits_twice,
    check_resume,
    check_teardown,
    check_trains,
    check_two_ranks,
    check_weights_only,
)

# Loaded by path: tests are no package under `--import-mode=importlib`.
_spec = importlib.util.spec_from_file_location("matrix", Path(__file__).with_name("matrix.py"))
matrix = sys.modules["matrix"] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(matrix)

pytestmark = pytest.mark.filterwarnings("ignore:.*(nothing is pruned in|still dying)")  # in so few steps

EXAMPLES = Path(lightning_hpo.__file__).parent.parent / "examples"

CHECKS = {
    "trains": [check_trains],
    "two ranks": [check_two_ranks],
    "fits twice": [check_fits_twice],
    "weights only": [check_weights_only],
    "checkpoint independence": [check_checkpoint_independent],
    "accumulation": [check_accumulation],
    "bf16": [check_bf16],
}

KILLS = {
    "first step": {"kill_at": 1},
    "mid-epoch": {"kill_at": 4},
    "between epochs": {"kill_at": 6},
    "mid second epoch": {"kill_at": 9},
    "mid-window": {"kill_at": 5, "accumulate_grad_batches": 2},
    "mid-window after a short one": {"kill_at": 10, "accumulate_grad_batches": 4},
}


def cases(what):
    return [pytest.param(case, id=case.name) for case in matrix.CASES if what in case.works_with]


@pytest.mark.parametrize(
    ("check", "case"),
    [
        pytest.param(check, case, id=f"{what}-{case.name}")
        for what, checks in CHECKS.items()
        for check in checks
        for case in matrix.CASES
        if what in case.works_with
    ],
)
def test_check(check, case):
    compare = {"compare": case.compare} if check in (check_two_ranks, check_accumulation) else {}
    check(case.callback, case.module, case.data, **compare)


@pytest.mark.parametrize("kill", KILLS.values(), ids=KILLS)
@pytest.mark.parametrize("case", cases("resume"))
def test_resumes_bit_for_bit(case, kill):
    check_resume(case.callback, case.module, case.data, **kill)


@pytest.mark.parametrize("interrupted", [False, True], ids=["finished", "interrupted"])
@pytest.mark.parametrize("case", cases("teardown"))
def test_leaves_the_module_as_it_was(case, interrupted):
    check_teardown(case.callback, case.module, case.data, interrupted=interrupted)


@pytest.mark.filterwarnings("ignore:.*training ended before any validation.*")  # three steps
@pytest.mark.parametrize("stem", sorted({case.stem for case in matrix.CASES if "command line" in case.works_with}))
def test_runs_from_the_command_line(stem, tmp_path):
    quick = ["--trainer.max_steps=3", "--trainer.limit_val_batches=1", f"--trainer.default_root_dir={tmp_path}"]
    assert main(["fit", "-c", str(EXAMPLES / f"{stem}.yaml"), "--trainer.accelerator=cpu", *quick]) == 0


@pytest.mark.parametrize("case", matrix.CASES, ids=lambda case: case.name)
def test_what_does_not_hold_has_a_reason(case):
    assert case.works_with <= matrix.EVERYTHING
    assert case.reasons.keys() == matrix.EVERYTHING - case.works_with
    assert all(len(reason.split()) > 3 for reason in case.reasons.values())


def test_every_method_has_an_entry():
    assert {case.stem for case in matrix.CASES} == {method.stem for method in find_methods()}
