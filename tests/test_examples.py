"""Everything in `examples/` runs."""

import csv
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import lightning_hpo
from lightning_hpo.cli import main

ROOT = Path(lightning_hpo.__file__).parent.parent
CONFIGS = sorted((ROOT / "examples").glob("*.yaml"))
PROGRAMS = sorted((ROOT / "examples").glob("*.py"))


def test_there_are_examples():
    assert CONFIGS
    assert [path for path in PROGRAMS if path.stem == "demo"]


@pytest.mark.filterwarnings("ignore:.*nothing is pruned in")  # in so few steps
@pytest.mark.filterwarnings("ignore:.*training ended before any validation.*")  # four steps
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configuration_runs(path, tmp_path):
    limits = {"max_steps": 4, "limit_val_batches": 1, "log_every_n_steps": 1, "enable_progress_bar": "false"}
    words = [f"--trainer.{name}={value}" for name, value in limits.items()]
    assert main(["fit", "-c", str(path), f"--trainer.default_root_dir={tmp_path}", *words]) == 0
    (course,) = tmp_path.rglob("hyperparameters.csv")  # every example reports what was learned
    assert len(course.read_text().splitlines()) > 2


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configuration_says_how_to_run_it_and_fixes_the_seed(path):
    text = path.read_text()
    assert f"lightning-hpo fit -c examples/{path.name}" in text
    assert isinstance(yaml.safe_load(text)["seed_everything"], int)


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.stem)
def test_program_runs(path, tmp_path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [sys.executable, str(path), "--quick"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    if path.stem == "demo":
        said = done.stdout
        assert "multiply-accumulates: 5," in said
        assert "test accuracy:" in said
        written = {file.name for file in (tmp_path / "demo_output").iterdir()}
        assert written >= {"hyperparameters.csv", "hyperparameters.png", "schedule.json"}
        _check_course(tmp_path / "demo_output" / "weight_decay")
        _check_course(tmp_path / "demo_output" / "dropout")
    if path.stem == "dataset_distillation":
        assert (tmp_path / "demo_output" / "distilled_images.png").stat().st_size
        noise, *_, distilled = (float(share) for share in re.findall(r"accuracy ([\d.]+)%", done.stdout))
        assert distilled > noise + 20  # even after two steps
    if path.stem == "adapt_optimizer":
        lr, decay = _check_course(tmp_path / "demo_output" / "adapt_optimizer" / "lr_0.0002")
        assert lr > 1  # a rate that is far too low rises
        assert decay > 0
        loss, adapted = map(float, re.findall(r"validation loss ([\d.]+)", done.stdout)[:2])
        assert adapted <= loss
    if path.stem == "single_loop_cleaning":
        assert re.search(r"AUC 0\.\d{3}; test accuracy \d+\.\d%", done.stdout)
    if path.stem == "layer_decay":
        _check_course(tmp_path / "demo_output" / "layer_decay")
        assert len(re.findall(r"^ *(?:patches|block \d|head) ", done.stdout, re.MULTILINE)) == 6


def _check_course(folder):
    """The last values of a report in which every hyperparameter has moved, and which has its picture."""
    assert (folder / "hyperparameters.png").stat().st_size
    with (folder / "hyperparameters.csv").open(newline="") as file:
        header, first, *_, last = csv.reader(file)
    columns = [i for i, name in enumerate(header) if "/" in name]
    assert columns
    assert all(first[i] != last[i] for i in columns)
    return [float(last[i]) for i in columns]
