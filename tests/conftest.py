"""Every test starts from the same seed, on one thread, in a folder of its own."""

import os
import random
from collections.abc import Iterator
from pathlib import Path

os.environ["MPLBACKEND"] = "Agg"  # before anybody imports matplotlib
os.environ["OMP_NUM_THREADS"] = "1"  # for processes that tests start

import numpy as np
import pytest
import torch
from lightning.fabric.utilities import data as lightning_loaders
from torch.utils.data import BatchSampler, DataLoader

torch.set_num_threads(1)  # `make test` runs one worker a core

DATA = "LIGHTNING_HPO_DATA"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leaves out what this machine cannot run, saying why."""
    reasons = {}
    if not torch.cuda.is_available():
        reasons["gpu"] = "no CUDA device"
    if not os.environ.get(DATA):
        reasons["data"] = f"{DATA} names no folder of images"
    for item in items:
        for marker in reasons.keys() & {mark.name for mark in item.iter_markers()}:
            item.add_marker(pytest.mark.skip(reason=reasons[marker]))


@pytest.fixture(autouse=True)
def _same_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fixes the seeds and keeps `lightning_logs` and the like out of the tree."""
    monkeypatch.chdir(tmp_path)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - torchmetrics and scikit-learn read the global generator
    torch.manual_seed(0)
    deterministic = torch.are_deterministic_algorithms_enabled()
    yield
    torch.use_deterministic_algorithms(deterministic)
    _take_back(DataLoader)
    _take_back(BatchSampler)


def _take_back(cls: type) -> None:
    """Undoes what Lightning patches while a hook makes loaders, and leaves behind if the hook raises.

    A second fit after that patches what is patched already, and takes back only its own.
    """
    for name in ("__init__", "__setattr__", "__delattr__"):
        own = vars(cls).get(name)
        while getattr(getattr(own, "__code__", None), "co_filename", None) == lightning_loaders.__file__:
            own = own.__wrapped__  # type: ignore[union-attr]
            setattr(cls, name, own)
        if f"__old{name}" in vars(cls):
            delattr(cls, f"__old{name}")
    for below in cls.__subclasses__():
        _take_back(below)


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder of real images; tests that ask for it carry the marker `data`."""
    return Path(os.environ[DATA])
