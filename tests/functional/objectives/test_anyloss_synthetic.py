"""The paper's kind of experiment, against figures that were measured with other code."""

import importlib.util
import sys
from pathlib import Path

import pytest

import lightning_hpo

_path = Path(lightning_hpo.__file__).parents[1] / "benchmarks" / "anyloss_synthetic.py"
_spec = importlib.util.spec_from_file_location("anyloss_synthetic", _path)
synthetic = sys.modules["anyloss_synthetic"] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(synthetic)

# Accuracy, F1, F0.5, F2, G-mean and balanced accuracy over ten folds, by what was trained on.
EXPECTED = {
    "cross-entropy": (0.9203, 0.5284, 0.6163, 0.4630, 0.6461, 0.7029),
    "accuracy": (0.9227, 0.5708, 0.6328, 0.5205, 0.6912, 0.7325),
    "F1": (0.9147, 0.6323, 0.5976, 0.6721, 0.8114, 0.8208),
    "F0.5": (0.9236, 0.5816, 0.6375, 0.5351, 0.7023, 0.7402),
    "F2": (0.8714, 0.5873, 0.4909, 0.7311, 0.8723, 0.8725),
    "G-mean": (0.8609, 0.5737, 0.4723, 0.7307, 0.8752, 0.8755),
    "balanced accuracy": (0.8590, 0.5704, 0.4687, 0.7286, 0.8741, 0.8745),
}


@pytest.mark.parametrize(
    "trained_on", [name if name == "F1" else pytest.param(name, marks=pytest.mark.slow) for name in EXPECTED]
)
def test_the_synthetic_table(trained_on):
    row = synthetic.synthetic_row(trained_on)
    found = [row[name] for name in synthetic.COLUMNS]
    assert found == pytest.approx(EXPECTED[trained_on], abs=0.003)
