"""Every benchmark runs, and writes the figures that it prints."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"
SCRIPTS = sorted(path.stem for path in FOLDER.glob("*.py") if "__main__" in path.read_text(encoding="utf-8"))


def test_there_is_a_script_for_each_question():
    assert SCRIPTS == [
        "adaptive_batch_quality",
        "adaptive_loader",
        "anyloss",
        "anyloss_cost",
        "bo_rep",
        "bo_rep_cost",
        "bo_rep_digits",
        "dag",
        "data_driven_tuning",
        "denoising",
        "gradient_statistics",
        "hypergradient_cost",
        "hypergradient_overhead",
        "hypergradient_tasks",
        "inference_speed",
        "layer_decay",
        "maid_mnist",
        "maid_overhead",
        "maid_quality",
        "micro_batch_cost",
        "mip_hypernetworks",
        "rate_learning_step",
        "self_tuning_networks",
        "self_tuning_search",
        "survival_mask",
        "task_distribution",
        "token_compression_quality",
    ]


@pytest.mark.parametrize(
    "script", [s if s == "survival_mask" else pytest.param(s, marks=pytest.mark.slow) for s in SCRIPTS]
)
def test_quick_run(script, tmp_path):
    out = tmp_path / "figures.json"
    command = [sys.executable, str(FOLDER / f"{script}.py"), "--quick", "--threads", "1", "--out", str(out)]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300, check=False)
    assert ran.returncode == 0, ran.stderr
    found = json.loads(out.read_text(encoding="utf-8"))
    assert found["machine"]["threads"] == 1
    assert found["command"].startswith(f"python benchmarks/{script}.py --quick --threads 1")
    assert all(len(row) > 2 for row in found["rows"])
    assert len(found["rows"]) >= 4
    assert [path.name for path in tmp_path.iterdir()] == ["figures.json"]


@pytest.mark.parametrize("path", sorted((FOLDER / "results").glob("*.json")), ids=lambda path: path.stem)
def test_committed_figures_name_what_they_were_measured_with(path):
    found = json.loads(path.read_text(encoding="utf-8"))
    assert path.stem in SCRIPTS
    assert found["command"].startswith(f"python benchmarks/{path.name.replace('.json', '.py')}")
    assert "--quick" not in found["command"]
    assert {"processor", "threads", "torch", "timm"} <= found["machine"].keys()
