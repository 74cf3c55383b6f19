"""Plain types out, the same object back in."""

from collections import OrderedDict, deque
from typing import NamedTuple

import numpy as np
import pytest
import torch

from lightning_hpo.state import restored, saved


class Pair(NamedTuple):
    left: int
    right: int


def test_containers_become_plain_and_are_copied() -> None:
    inner = [1, "a", None, True, 2.5, b"x"]
    plain = saved(OrderedDict(inner=inner, pair=Pair(1, 2)), "knob")
    assert plain == {"inner": inner, "pair": (1, 2)}
    assert (type(plain), type(plain["pair"])) == (dict, tuple)
    inner.append(3)
    assert len(plain["inner"]) == 6


def test_tensors_are_copied_without_their_graph() -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    copy = saved([weight * 2], "knob")[0]
    assert (copy.tolist(), copy.requires_grad) == ([2.0, 2.0], False)


@pytest.mark.parametrize("foreign", [deque([1]), np.float64(1.0), {1}, object(), torch.float32])
def test_what_weights_only_loading_refuses_is_named(foreign: object) -> None:
    with pytest.raises(TypeError, match=rf"`knob\['deep'\]\[1\]` is a `{type(foreign).__name__}`"):
        saved({"deep": [1, foreign]}, "knob")


def test_objects_take_their_state_in() -> None:
    source, target = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)
    assert restored(target, saved(source, "layer"), "layer") is target
    assert torch.equal(target.weight, source.weight)
    assert restored(target, None, "layer") is target


def test_parameters_are_written_in_place_in_their_own_type() -> None:
    weight = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
    assert restored(weight, torch.ones(2), "weight") is weight
    assert (weight.dtype, weight.requires_grad, weight.tolist()) == (torch.float64, True, [1.0, 1.0])


def test_plain_values_and_other_shapes_are_replaced_by_copies() -> None:
    state = torch.ones(3)
    replaced = restored(torch.zeros(2), state, "average")
    assert replaced is not state
    assert torch.equal(replaced, state)
    assert restored(3, 4, "count") == 4
    assert restored(None, [1], "history") == [1]
