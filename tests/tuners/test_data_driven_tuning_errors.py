"""What the tuner of tasks refuses, and what it warns of."""

from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from lightning_hpo import TaskDistributionTuner
from tests.tuners.shrunk import QUICK, UPPER, Shrinking, Shrunk, loader, pairs


def tuner(tasks: Any = None, module_fn: Any = Shrunk, low: float = 0.0, high: float = 1.0, **settings: Any) -> Any:
    chosen = {"utility": "neg_val_loss", "upper": UPPER, "n_grid": 2, "refine": None, "trainer_kwargs": QUICK}
    tasks = pairs() if tasks is None else tasks
    return TaskDistributionTuner(tasks, module_fn, "decay", low, high, **{**chosen, **settings})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tasks": pairs([1.2])}, "at least 2 tasks are needed, got 1"),
        ({"n_grid": 1}, "at least 2 points, got 1"),
        ({"low": 1.0, "high": 0.5}, "must be finite and rise"),
        ({"high": float("inf")}, "must be finite and rise"),
        ({"log": True}, "needs a positive low, got 0.0"),
        ({"upper": None}, "upper, the largest utility there can be, must be given"),
        ({"slope": "unrolled"}, "slope must be one of envelope, ift_cg"),
        ({"trainer_kwargs": {"devices": 2}}, "one device, got devices=2"),
        ({"trainer_kwargs": {"devices": "auto"}}, "one device, got devices='auto'"),
        ({"trainer_kwargs": {"strategy": "ddp"}}, "spread over ranks, not batches, got strategy='ddp'"),
        ({"trainer_kwargs": {"num_nodes": 2}}, "one node, got num_nodes=2"),
        ({"keys": ["a", "b"]}, "one key a task: 5, got 2"),
    ],
)
def test_wrong_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tuner(**settings)


def test_all_problems_are_listed() -> None:
    with pytest.raises(ValueError, match=r"at least 2 tasks.*devices=3.*must be given.*must be finite and rise"):
        tuner(pairs([1.2]), low=2.0, upper=None, trainer_kwargs={"devices": 3})


def test_something_else_than_tasks() -> None:
    with pytest.raises(TypeError, match=r"task 1 must be a LightningDataModule or a pair of loaders, got DataLoader"):
        tuner([*pairs([1.2]), loader(1.0)])


def test_something_else_than_a_module() -> None:
    with pytest.raises(TypeError, match="must return a LightningModule, got dict"):
        tuner(module_fn=dict).run()


def test_what_is_not_logged() -> None:
    with pytest.raises(ValueError, match=r"validation logs no 'val_acc', but \['val_loss'\]"):
        tuner(utility="val_acc").run()


def test_utilities_out_of_range() -> None:
    with pytest.raises(ValueError, match=r"from 0 to upper=0.1, got 0\.\d+: clip or scale"):
        tuner(utility="val_loss", upper=0.1).run()


def test_tasks_that_are_tuned_on_cannot_judge() -> None:
    with pytest.raises(ValueError, match="tasks to judge by must not be tuned on"):
        tuner([Shrinking(1.2), Shrinking(1.3)], held_out=pairs([1.3])).run()


def test_identical_tasks_are_told() -> None:
    with pytest.warns(UserWarning, match="1 of 3 tasks repeat others"):
        tuner(pairs([1.2, 1.3, 1.2])).run()


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter([torch.tensor([1.0, 2.0])])


def test_tasks_without_names_keep_no_cells(tmp_path: Any) -> None:
    tasks = [(DataLoader(Stream(), batch_size=None), loader(1.0)) for _ in range(2)]
    assert [task.key for task in tuner(tasks).tasks] == ["task 0", "task 1"]
    with pytest.raises(ValueError, match=r"what is in task 0, task 1 cannot be read.*give keys"):
        tuner(tasks, dirpath=tmp_path)
    with pytest.raises(ValueError, match=r"cannot be read.*give keys and held_out_keys"):
        tuner(tasks, held_out=pairs([1.2]))
    named = tuner(tasks, keys=["a", "b"], dirpath=tmp_path)
    assert [task.key for task in named.tasks] == ["a", "b"]
