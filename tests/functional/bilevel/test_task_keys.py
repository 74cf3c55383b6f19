"""Names of tasks follow their contents and nothing else."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from lightning_hpo.functional.bilevel.task_keys import check_tasks, task_key, task_keys


@dataclass
class Split:
    x: torch.Tensor
    seed: int


def make(seed: int = 0, shift: float = 0.0) -> Split:
    return Split(torch.arange(4.0) + shift, seed)


def test_equal_contents_have_equal_names() -> None:
    assert task_key(make()) == task_key(make())
    assert task_key({"a": 1, "b": [make()]}) == task_key({"b": [make()], "a": 1})
    strided = torch.arange(8.0)[::2]
    assert task_key(strided) == task_key(strided.clone())


@pytest.mark.parametrize(
    ("one", "two"),
    [
        (make(), make(seed=1)),
        (make(), make(shift=1e-6)),
        (torch.zeros(4), torch.zeros(2, 2)),
        (torch.zeros(2), torch.zeros(1, dtype=torch.float64)),
        (1, 1.0),
        (True, 1),
        ("ab", ["a", "b"]),
        ([["a"], "b"], [["a", "b"]]),
        (None, "None"),
        ({"a": 1}, ["a", 1]),
        (torch.zeros(2).bfloat16(), torch.zeros(2).half()),
    ],
)
def test_other_contents_have_other_names(one: Any, two: Any) -> None:
    assert None not in (task_key(one), task_key(two))
    assert task_key(one) != task_key(two)


def test_what_has_no_known_contents_is_named_by_its_place() -> None:
    keys = task_keys([object(), make(), [object()]])
    assert (keys[0], keys[2]) == ("task 0", "task 2")
    assert keys[1] == task_key(make())


def test_lists_of_tasks() -> None:
    assert check_tasks(["a", "b"], ["c"]) == []
    assert check_tasks(["a"], ["a"]) == [
        "at least 2 tasks are needed, got 1",
        "tasks to judge by must not be tuned on: a",
    ]
    with pytest.warns(UserWarning, match="2 of 4 tasks repeat others"):
        check_tasks(["a", "b", "a", "a"], [])
