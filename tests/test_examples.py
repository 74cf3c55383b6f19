"""Everything in `examples/` runs."""

import os
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


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configuration_runs(path, tmp_path):
    limits = {"max_steps": 4, "limit_val_batches": 1, "log_every_n_steps": 1, "enable_progress_bar": "false"}
    words = [f"--trainer.{name}={value}" for name, value in limits.items()]
    assert main(["fit", "-c", str(path), f"--trainer.default_root_dir={tmp_path}", *words]) == 0
    (csv,) = tmp_path.rglob("hyperparameters.csv")  # every example reports what was learned
    assert len(csv.read_text().splitlines()) > 2


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
