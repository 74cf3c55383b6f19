"""The tuner on utilities that are known, and its slopes against closed forms and the engine."""

import json
import math
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_hpo.functional.bilevel.data_driven_tuning import grid_between, tune_over_tasks
from lightning_hpo.functional.bilevel.guarantees import empirical_gap, grid_gap
from lightning_hpo.functional.bilevel.ift import ift_exact
from lightning_hpo.functional.bilevel.problem import Problem

TASKS = [0.31, 0.42, 0.52, 0.39]
GRID = grid_between(0.0, 1.0, 6)


def peak(task: float, value: float) -> float:
    return 1 - (task - value) ** 2


def step(task: float, value: float) -> float:
    return float(value >= task)


class Counter:
    def __init__(self, function: Any = peak) -> None:
        self.function, self.calls = function, []

    def __call__(self, task: float, value: float) -> float:
        self.calls.append((task, value))
        return self.function(task, value)


def test_every_task_at_every_value() -> None:
    utility = Counter()
    tuning = tune_over_tasks(TASKS, utility, GRID, refine=None, recheck=False)
    assert tuning.values == tuple(GRID)
    assert sorted(utility.calls) == sorted((task, value) for task in TASKS for value in GRID)
    expected = torch.tensor([[peak(task, value) for value in GRID] for task in TASKS], dtype=torch.float64)
    assert torch.equal(tuning.utilities, expected)
    torch.testing.assert_close(tuning.means, expected.mean(0))
    torch.testing.assert_close(tuning.standard_errors, expected.std(0) / 2)
    assert tuning.best == 0.4
    assert tuning.reachable == 6


@pytest.mark.parametrize("log", [False, True])
def test_golden_section_comes_close(log: bool) -> None:
    grid = grid_between(0.1, 0.9, 5, log=log)
    settings: Any = {"refine_steps": 10, "log": log}
    tuning = tune_over_tasks(TASKS, peak, grid, **settings)
    assert tuning.best == pytest.approx(sum(TASKS) / 4, abs=0.01)
    assert tuning.origin.count("refine") == 10
    assert list(tuning.values) == sorted(tuning.values)
    assert tuning.reachable == 5 * (1 + 2**10)


@pytest.mark.parametrize("best", [-0.3, 0.0, 0.05, 0.95, 1.0, 1.4])
def test_golden_section_at_the_ends(best: float) -> None:
    tuning = tune_over_tasks([0, 1], lambda task, value: 1 - (value - best) ** 2 / 4, GRID, refine_steps=12)
    assert tuning.best == pytest.approx(min(max(best, 0), 1), abs=0.01)
    assert all(0 <= value <= 1 for value in tuning.values)


def test_the_reachable_values_of_a_golden_section_are_no_more_than_counted() -> None:
    seen: set[float] = set()
    for seed in range(200):
        noise = torch.rand(5000, generator=torch.Generator().manual_seed(seed)).tolist()
        tuning = tune_over_tasks(
            [0, 1], lambda _, v, noise=noise: noise[round(v * 4999)], [0.0, 0.5, 1.0], refine_steps=3
        )
        seen |= set(tuning.values)
    assert 3 + 3 * 2 < len(seen) <= tuning.reachable


def test_bisection_closes_in_on_every_jump() -> None:
    tuning = tune_over_tasks(TASKS, step, GRID, refine="bisect", refine_steps=5)
    for task in TASKS:
        low, high = next((a, b) for a, b in pairwise(tuning.values) if a < task <= b)
        assert high - low <= 0.2 / 2**5 + 1e-12
    assert len(tuning.values) < 6 + 4 * 5 + 1
    assert tuning.reachable == 5 * 2**5 + 1
    assert tuning.oscillations.tolist() == [1] * 4
    assert tuning.best == min(value for value in tuning.values if value >= max(TASKS))


def test_slopes_refine_within_the_neighbours() -> None:
    def slope(task: float, value: float) -> float:
        return 2 * (value - task)

    for log, grid in ((False, GRID), (True, grid_between(0.05, 0.95, 6, log=True))):
        tuning = tune_over_tasks(TASKS, peak, grid, refine=None, slope=slope, slope_steps=40, log=log)
        assert tuning.best == pytest.approx(0.41, abs=0.01)
        assert len(tuning.path) == 41
    away = tune_over_tasks(TASKS, peak, [0.0, 0.4, 1.0], refine=None, slope=lambda task, value: -1.0)
    assert max(away.path) == 1.0
    assert away.best == 0.4


def test_a_surrogate_from_a_flat_region_finds_the_same_as_from_a_good_one() -> None:
    """Slopes alone fail from 3, where the surrogate is flat and points away; the grid comes first."""

    def utility(task: float, value: float) -> float:
        return math.exp(-((math.log(value) - math.log(1.2 + task)) ** 2))

    def slope(task: float, value: float) -> float:
        return -1e-3 if value > 2.5 else value - 1.2 - task

    found = [
        tune_over_tasks([0.0, 0.1], utility, grid, slope=slope, log=True).best
        for grid in ([0.3, 0.6, 1.2, 3.0], [0.3, 0.6, 1.1, 3.0, 7.0])
    ]
    assert found[0] == pytest.approx(1.25, abs=0.05)
    assert found[1] == pytest.approx(1.25, abs=0.05)


def ridge(seed: int) -> tuple[Problem, Any]:
    generator = torch.Generator().manual_seed(seed)
    x, v = torch.randn(2, 12, 3, generator=generator, dtype=torch.float64)
    y, z = torch.stack([x, v]).sum(-1) + torch.randn(2, 12, generator=generator, dtype=torch.float64)

    def train(w: dict[str, Tensor], h: dict[str, Tensor]) -> Tensor:
        return ((x @ w["w"] - y) ** 2).mean() + h["decay"] * (w["w"] ** 2).sum()

    def solve(decay: float) -> Tensor:
        return torch.linalg.solve(x.T @ x / 12 + decay * torch.eye(3).double(), x.T @ y / 12)

    return Problem(train, lambda w, h: ((v @ w["w"] - z) ** 2).mean()), solve


@pytest.mark.parametrize("which", ["train", "val"])
def test_slopes_of_re_solved_ridge_problems(which: str) -> None:
    """The envelope theorem for the training loss, the implicit engine for the validation loss, against differences."""
    problem, solve = ridge(0)
    loss = problem.train_loss if which == "train" else problem.val_loss

    def value(decay: float) -> float:
        return float(loss({"w": solve(decay)}, {"decay": torch.tensor(decay, dtype=torch.float64)}))

    decay = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    params = {"w": solve(0.3)}
    if which == "train":
        (found,) = torch.autograd.grad(problem.train_loss(params, {"decay": decay}), decay)
    else:
        found = ift_exact(problem, params, {"decay": decay}).gradients["decay"]
    assert float(found) == pytest.approx((value(0.3 + 1e-5) - value(0.3 - 1e-5)) / 2e-5, abs=1e-6)


def test_ridge_over_tasks_by_implicit_slopes() -> None:
    problems = [ridge(seed) for seed in range(6)]

    def loss(task: int, decay: float) -> float:
        problem, solve = problems[task]
        return float(problem.val_loss({"w": solve(decay)}, {}))

    def slope(task: int, decay: float) -> float:
        problem, solve = problems[task]
        h = {"decay": torch.tensor(decay, dtype=torch.float64)}
        return float(ift_exact(problem, {"w": solve(decay)}, h).gradients["decay"])

    grid = grid_between(1e-2, 1e2, 5, log=True)
    settings: Any = {"upper": 10.0, "log": True, "refine": None}
    tuning = tune_over_tasks(range(6), lambda t, d: 10 - loss(t, d), grid, slope=slope, slope_steps=60, **settings)
    fine = tune_over_tasks(range(6), lambda t, d: 10 - loss(t, d), grid_between(1e-2, 1e2, 400, log=True), **settings)
    assert tuning.means.max() >= fine.means.max() - 1e-4
    assert tuning.means.max() > tuning.means[[tuning.values.index(v) for v in grid]].max() + 1e-4
    assert not tuning.bounds()[0].certified


def test_workers_change_nothing() -> None:
    settings: Any = {"refine": "bisect", "slope": lambda task, value: value - task}
    alone = tune_over_tasks(TASKS, peak, GRID, **settings)
    with ThreadPoolExecutor(4) as pool:
        together = tune_over_tasks(TASKS, peak, GRID, run=pool.map, **settings)
    assert together.values == alone.values
    assert torch.equal(together.utilities, alone.utilities)
    assert (together.best, together.path, together.cells) == (alone.best, alone.path, alone.cells)


def test_a_search_goes_on_where_it_stopped() -> None:
    settings: Any = {"slope": lambda task, value: value - task, "held_out": [0.47], "recheck": False}
    whole = Counter()
    expected = tune_over_tasks(TASKS, whole, GRID, **settings)

    class Stop(Exception):
        pass

    def stops(task: float, value: float) -> float:
        if len(done) == 17:
            raise Stop
        return peak(task, value)

    done: dict[str, float | None] = {}
    with pytest.raises(Stop):
        tune_over_tasks(TASKS, stops, GRID, done=done, **settings)
    assert len(done) == 17
    rest = Counter()
    tuning = tune_over_tasks(TASKS, rest, GRID, done=json.loads(json.dumps(done)), **settings)
    assert len(rest.calls) == len(whole.calls) - 17
    assert tuning.cells == expected.cells
    assert torch.equal(tuning.utilities, expected.utilities)
    again = Counter()
    tune_over_tasks(TASKS[::-1], again, GRID, done=dict(tuning.cells or {}), **settings)
    assert again.calls == []


def fails(at: set[tuple[float, float]]) -> Any:
    return lambda task, value: math.nan if (task, value) in at else peak(task, value)


def test_failed_cells_are_marked_and_the_search_goes_on() -> None:
    done: dict[str, float | None] = {}
    tuning = tune_over_tasks(TASKS, fails({(0.31, 0.4), (0.42, 0.0)}), GRID, refine=None, done=done)
    assert int(tuning.utilities.isnan().sum()) == list(done.values()).count(None) == 2
    assert tuning.means[2] == pytest.approx(sum(peak(t, 0.4) for t in TASKS[1:]) / 4)
    assert tuning.best == 0.6  # the mean at 0.4 counts the failure as 0
    assert int(tuning.oscillations.min()) >= 1
    assert json.loads(json.dumps(done)) == done


def test_many_failures_are_an_error() -> None:
    at = {(task, value) for task in TASKS[:2] for value in GRID[:3]}
    with pytest.raises(ValueError, match="6 of 24 cells failed, more than a fifth"):
        tune_over_tasks(TASKS, fails(at), GRID)
    at = {(task, value) for task in TASKS[:2] for value in GRID[:2]}
    tune_over_tasks(TASKS, fails(at), GRID, refine=None, recheck=False)
    with pytest.raises(ValueError, match="slope failed for every task"):
        tune_over_tasks(TASKS, peak, GRID, slope=lambda task, value: math.nan)


def test_other_tasks_judge_the_result() -> None:
    tuning = tune_over_tasks(TASKS, peak, GRID, held_out=[0.45, 0.0])
    assert tuning.held_out.tolist() == [peak(0.45, tuning.best), peak(0.0, tuning.best)]
    with pytest.raises(ValueError, match="must not be tuned on"):
        tune_over_tasks(TASKS, peak, GRID, held_out=[0.45, 0.31])


def test_leave_one_out_by_hand() -> None:
    tuning = tune_over_tasks(TASKS, step, [0.2, 0.4, 0.5, 0.6], refine=None)
    # Without the third task all others reach 1 at 0.5 first; it then gets 0. The others are judged at 0.6.
    assert tuning.leave_one_out().tolist() == [1.0, 1.0, 0.0, 1.0]


def test_statements_about_tasks_to_come() -> None:
    tuning = tune_over_tasks(TASKS, step, GRID, refine=None)
    grid, seen = tuning.bounds(delta=0.1)
    assert grid == grid_gap(4, 6, 0.1)
    assert (grid.certified, seen.certified) == (True, False)
    assert seen.value == empirical_gap([1] * 4, 0.1).value
    kinds = [gap.kind for gap in tuning.bounds(log2_b=1e4, exact=[1] * 4)]
    assert kinds == ["grid", "empirical", "uniform"]
    assert tuning.bounds(exact=[1] * 4)[1].certified
    assert grid_gap(tuning.tasks_needed(0.1), 6).value <= 0.1 < grid_gap(tuning.tasks_needed(0.1) - 1, 6).value
    with pytest.raises(ValueError, match="one count a task: 4, got 2"):
        tuning.bounds(exact=[1, 1])


def test_noise_is_noticed() -> None:
    draws = iter(range(1000))
    with pytest.warns(UserWarning, match="fix seeds"):
        tune_over_tasks(TASKS, lambda task, value: next(draws) / 1000, GRID, refine=None)


def test_identical_tasks_are_warned_of() -> None:
    with pytest.warns(UserWarning, match="1 of 3 tasks repeat others"):
        tuning = tune_over_tasks([0.3, 0.4, 0.3], peak, GRID, refine=None)
    assert torch.equal(tuning.utilities[0], tuning.utilities[2])


@pytest.mark.parametrize("value", [1.5, -0.1, math.inf, -math.inf])
def test_utilities_out_of_range(value: float) -> None:
    with pytest.raises(ValueError, match="must lie from 0 to upper=1.0"):
        tune_over_tasks(TASKS, lambda task, alpha: value, GRID)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tasks": [0.3], "grid": [0.5]}, ["at least 2 tasks", "at least 2 values"]),
        ({"grid": [1.0, 0.0], "upper": 0.0}, ["finite and rise", "upper must be positive"]),
        ({"grid": [0.0, math.inf], "log": True}, ["finite and rise", "positive grid"]),
        ({"grid": [0.0, 0.0], "refine": "random", "refine_steps": 0, "slope_steps": 0}, ["refine", "slope_steps"]),
        ({"keys": ["a"], "held_out_keys": ["b"]}, ["keys must name each task: 4, got 1", "held_out_keys"]),
    ],
)
def test_wrong_arguments_are_all_named(changes: dict[str, Any], said: list[str]) -> None:
    arguments = {"tasks": TASKS, "utility": peak, "grid": GRID} | changes
    with pytest.raises(ValueError) as caught:
        tune_over_tasks(**arguments)
    assert all(word in str(caught.value) for word in said)


def test_wrong_grids() -> None:
    with pytest.raises(ValueError, match=r"finite and rise.*at least 2 points.*positive low"):
        grid_between(0.0, -1.0, 1, log=True)
    with pytest.raises(ValueError, match="finite and rise"):
        grid_between(0.0, math.inf)
