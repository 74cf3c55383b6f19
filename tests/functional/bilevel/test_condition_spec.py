"""Named conditions: maps there and back, refusals and grids."""

import math

import pytest
import torch

from lightning_hpo import ConditionSpec
from lightning_hpo.functional.bilevel.condition_draws import sample_conditions


def spec():
    return ConditionSpec().add("decay", 1e-6, 1e-1, log=True).add("task", categories=3).add("noise", -1.0, 3.0)


def test_values_there_and_back():
    gamma = spec().encode({"noise": torch.tensor([-1.0, 2.0]), "task": torch.tensor([0, 2]), "decay": 1e-3})
    expected = [[0.6, 1, 0, 0, 0], [0.6, 0, 0, 1, 0.75]]
    torch.testing.assert_close(gamma, torch.tensor(expected))
    back = spec().decode(gamma)
    assert list(back) == ["decay", "task", "noise"]
    assert back["task"].tolist() == [0, 2]
    torch.testing.assert_close(back["noise"], torch.tensor([-1.0, 2.0]))
    torch.testing.assert_close(back["decay"], torch.full((2,), 1e-3), rtol=1e-5, atol=0)
    one = spec().encode({"decay": 1e-1, "task": 1, "noise": 3.0})
    assert one.tolist() == [1, 0, 1, 0, 1]
    assert spec().encode(spec().decode(one)).tolist() == one.tolist()  # rounding at an end is forgiven


def test_ranges_are_differentiable():
    gamma = torch.tensor([0.5, 0, 1, 0, 0.5], dtype=torch.float64, requires_grad=True)
    values = spec().decode(gamma)
    values["decay"].backward()
    assert gamma.grad[0].item() == pytest.approx(10**-3.5 * math.log(1e5))
    spec().decode(gamma)["noise"].backward()
    assert gamma.grad.tolist()[1:] == [0, 0, 0, 4]


@pytest.mark.parametrize("bad", [math.nan, math.inf, 0.2, 9e-7])
def test_values_that_are_refused(bad):
    with pytest.raises(ValueError, match=r"`decay` must be from 1e-06 to 0\.1, got"):
        spec().encode({"decay": bad, "task": 0, "noise": 0.0})


def test_everything_that_is_wrong_is_listed():
    with pytest.raises(ValueError) as error:
        spec().encode({"decay": torch.tensor([[1e-3]]), "task": 1.5, "nose": 0.0})
    for part in (
        "there is no condition `nose`, but ['decay', 'task', 'noise']",
        "`noise` is missing",
        "`decay` must be a number, or one for each example, got shape (1, 1)",
        "`task` must be a category from 0 to 2, got 1.5",
    ):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"low": 1.0, "high": 1.0}, "a range must be finite with low < high, got 1.0 and 1.0"),
        ({"high": math.nan}, "low < high"),
        ({"high": math.inf}, "finite"),
        ({"low": 0.0, "log": True}, "on the logarithm must lie above 0, got low=0.0"),
        ({"categories": 1}, "categories must be an integer of at least 2, got 1"),
        ({"categories": 2, "high": 3.0}, "categories have no range"),
    ],
)
def test_wrong_ranges(arguments, text):
    with pytest.raises(ValueError, match=f"`x`: .*{text}"):
        ConditionSpec().add("x", **arguments)


def test_a_name_is_taken_once_and_specs_compare():
    with pytest.raises(ValueError, match="there is a condition `noise` already"):
        spec().add("noise")
    assert spec() == spec()
    assert spec() != ConditionSpec().add("decay")
    assert len(spec()) == 5


def test_grids():
    grid = spec().grid(3)
    assert grid.shape == (3 * 3 * 3, 5)
    assert len({tuple(row) for row in grid.tolist()}) == 27
    assert {row[4] for row in grid.tolist()} == {0, 0.5, 1}
    assert spec().grid(1)[:, [0, 4]].unique().tolist() == [0.5]
    assert spec().centre().tolist() == [0.5, 1, 0, 0, 0.5]
    assert spec().ranges().tolist() == [True, False, False, False, True]
    assert spec().labels(spec().encode({"decay": 1e-3, "task": 2, "noise": 0.5})[None]) == [
        "decay_0.001_task_2_noise_0.5"
    ]


def test_categories_are_drawn_equally_often():
    gamma = spec().from_uniform(sample_conditions(range(32 * 9), 3))
    assert gamma[:, 1:4].sum(1).unique().tolist() == [1]
    assert gamma[:, 1:4].sum(0).tolist() == pytest.approx([96] * 3, abs=9)
    assert (gamma[:, [0, 4]] >= 0).all() & (gamma[:, [0, 4]] < 1).all()


def test_values_that_are_no_numbers():
    for bad in ("high", None, [[1.0], [2.0, 3.0]]):
        with pytest.raises(ValueError, match="`noise` must be a number, or one for each example, got"):
            spec().encode({"decay": 1e-3, "task": 0, "noise": bad})
    with pytest.raises(TypeError, match="`x`: low and high must be numbers, got '0' and 1.0"):
        ConditionSpec().add("x", "0")
    for name in ("", 3):
        with pytest.raises(TypeError, match=f"the name of a condition must be a text, got {name!r}"):
            ConditionSpec().add(name)


def test_labels_tell_conditions_apart():
    narrow = ConditionSpec().add("x", 1000.0, 1000.1)
    assert len(set(narrow.labels(narrow.grid(5)))) == 5
    assert ConditionSpec().add("x").labels(torch.tensor([[1 / 3], [0.5]])) == ["x_0.3333", "x_0.5"]
    assert ConditionSpec().add("x").labels(torch.tensor([[0.5], [0.5]])) == ["x_0.5"] * 2


def test_combinations_are_counted_without_being_made():
    assert spec().combinations(3) == len(spec().grid(3)) == 27
    many = ConditionSpec()
    for number in range(40):
        many.add(f"x{number}")
    assert many.combinations(5) == 5**40
