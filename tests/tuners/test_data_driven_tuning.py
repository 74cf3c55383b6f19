"""The tuner of tasks on a problem with known utilities, with the same random numbers, and going on after a stop."""

import inspect
import json
import math
import os
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_hpo
from lightning_hpo import TaskDistributionTuner
from lightning_hpo.functional.bilevel.data_driven_tuning import tune_over_tasks
from tests.tuners.shrunk import MEANS, QUICK, UPPER, Learned, Shrinking, Shrunk, loader, pairs, utility

BEST = sum(m * m for m in MEANS) / sum(MEANS) - 1  # of the mean of all tasks, in closed form


def tuner(tasks: Any = None, module_fn: Any = Shrunk, **settings: Any) -> TaskDistributionTuner:
    chosen = {"utility": "neg_val_loss", "upper": UPPER, "n_grid": 6, "trainer_kwargs": QUICK, **settings}
    return TaskDistributionTuner(pairs() if tasks is None else tasks, module_fn, "decay", 0.0, 1.0, **chosen)


@pytest.mark.parametrize("data", [Shrinking, lambda mean: (loader(mean), loader(1.0))], ids=["modules", "loaders"])
def test_utilities_are_those_of_the_closed_form(data: Any) -> None:
    result = tuner([data(mean) for mean in MEANS]).run()
    expected = torch.tensor([[utility(mean, value) for value in result.values] for mean in MEANS], dtype=torch.float64)
    torch.testing.assert_close(result.utilities, expected, rtol=0, atol=1e-6)
    assert result.origin.count("grid") == 6
    assert abs(result.best - BEST) < 0.05
    assert len(result.keys) == len(set(result.keys)) == 5


def test_the_answer_is_that_of_the_core_on_the_closed_form() -> None:
    result = tuner(refine_steps=6).run()
    core = tune_over_tasks(MEANS, utility, [0.0, 0.2, 0.4, 0.6000000000000001, 0.8, 1.0], upper=UPPER, refine_steps=6)
    assert result.best == pytest.approx(core.best, abs=1e-12)
    assert result.leave_one_out().tolist() == pytest.approx(core.leave_one_out().tolist(), abs=1e-6)
    assert [str(gap) for gap in result.bounds()] == [str(gap) for gap in core.bounds()]
    assert result.tasks_needed(eps=0.1) == core.tasks_needed(eps=0.1)


def test_a_logged_metric_is_a_utility_and_held_out_tasks_judge() -> None:
    class Accurate(Shrunk):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_accuracy", 1 - (self.mean - 1).abs())

    others = pairs([1.5, 1.55])
    result = tuner(module_fn=Accurate, utility="val_accuracy", upper=None, refine=None, held_out=others).run()
    assert result.upper == 1
    assert result.utilities[0, 0].item() == pytest.approx(0.7, abs=1e-6)
    expected = [1 - abs(mean / (1 + result.best) - 1) for mean in (1.5, 1.55)]
    assert result.held_out.tolist() == pytest.approx(expected, abs=1e-6)


def test_a_function_is_a_utility() -> None:
    def mine(trainer: Any, module: Any, task: Any) -> float:
        assert trainer.global_step == 1
        return float(module.mean.detach()) / task[0].dataset.tensors[0].mean().item()

    result = tuner(utility=mine, upper=1.0, refine=None).run()
    assert result.utilities[2].tolist() == pytest.approx([1 / (1 + value) for value in result.values], abs=1e-6)


def test_losses_beyond_the_largest_are_clipped() -> None:
    result = tuner(upper=0.1, refine=None).run()
    assert result.utilities[3, 0].item() == 0  # the loss is 0.65
    assert result.utilities[4, 1].item() == pytest.approx(0.1 - 0.02 / 3, abs=1e-6)


class Draws(Shrunk):
    """Notes its weights and the order of its data; larger values take more random numbers to begin with."""

    def __init__(self, decay: float) -> None:
        super().__init__(decay)
        self.noted = [torch.rand(3)]
        torch.rand(1 + int(10 * decay))
        self.dropout = nn.Dropout(0.5)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        noise = torch.tensor([random.random(), np.random.rand()])  # noqa: NPY002
        self.noted += [batch[0].clone(), self.dropout(torch.ones(8)), noise]
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("own", [False, True], ids=["global", "generator"])
def test_all_values_of_a_task_see_the_same_random_numbers(own: bool) -> None:
    noted: dict[float, list[torch.Tensor]] = {}

    def note(trainer: Any, module: Any, task: Any) -> float:
        noted.setdefault(float(task[0].dataset.tensors[0][1]), []).append(torch.cat(module.noted))
        return 0.5

    values = torch.arange(8.0, dtype=torch.float64)
    tasks = []
    for start in (0.0, 10.0):
        generator = torch.Generator().manual_seed(3) if own else None
        data = DataLoader(TensorDataset(values + start), batch_size=4, shuffle=True, generator=generator)
        tasks.append((data, loader(1.0)))
    state, seed = torch.get_rng_state(), os.environ.get("PL_GLOBAL_SEED")  # set, if another test has seeded everything
    tuner(tasks, Draws, utility=note, upper=1.0, refine=None, trainer_kwargs={**QUICK, "max_epochs": 2}).run()
    assert torch.equal(torch.get_rng_state(), state)
    assert os.environ.get("PL_GLOBAL_SEED") == seed
    first, second = noted.values()
    assert len(first) == 7  # six values, and one again
    assert all(torch.equal(run, first[0]) for run in first)
    assert all(torch.equal(run, second[0]) for run in second)
    assert not torch.equal(first[0][:3], second[0][:3])


def test_seeds_that_are_not_fixed_are_noticed() -> None:
    loose = torch.Generator().manual_seed(0)

    class Loose(Shrunk):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", torch.rand((), generator=loose))

    with pytest.warns(UserWarning, match="fix seeds and the order of data"):
        tuner(module_fn=Loose, refine=None).run()


def test_another_seed_is_another_search_and_places_in_the_list_are_none() -> None:
    class Noisy(Shrunk):
        def __init__(self, decay: float) -> None:
            super().__init__(decay)
            self.start = torch.rand(())

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", self.start)

    first, turned = tuner(module_fn=Noisy).run(), tuner(pairs(MEANS[::-1]), Noisy).run()
    assert torch.equal(first.utilities[:, 0], turned.utilities[:, 0].flip(0))
    assert not torch.equal(first.utilities[:, 0], tuner(module_fn=Noisy, seed=1).run().utilities[:, 0])


def test_every_run_has_callbacks_of_its_own() -> None:
    class Once(Callback):
        used = 0

        def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
            self.used += 1
            assert self.used == 1

    mine = Once()
    tuner(trainer_kwargs={**QUICK, "callbacks": [mine]}, refine=None).run()
    assert mine.used == 0


def test_settings_on_the_page_are_those_of_the_constructor() -> None:
    page = Path(lightning_hpo.__file__).parents[1] / "docs" / "methods" / "data_driven_tuning.md"
    text = page.read_text().partition("## Settings")[2].partition("## Cost")[0]
    rows = [row.split("|")[1:-1] for row in text.splitlines() if row.startswith("| `")]
    named = {name: row[3] for row in rows for name in re.findall(r"`(\w+)`", row[0])}
    parameters = inspect.signature(TaskDistributionTuner).parameters
    assert sorted(named) == sorted(parameters)
    for name, parameter in parameters.items():
        if parameter.default not in (None, inspect.Parameter.empty):
            assert str(parameter.default) in named[name]


# Failed cells


class Fails(Shrunk):
    worst = 0.9

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        failed = self.decay > self.worst and batch_idx == 0
        self.log("val_loss", torch.tensor(math.nan) if failed else (batch[0] - self.mean).square().mean())


def test_failed_cells_are_marked_and_count_as_the_worst() -> None:
    result = tuner(module_fn=Fails, refine=None).run()
    assert result.utilities.isnan().tolist() == [[False] * 5 + [True]] * 5
    assert result.means[-1] == 0
    assert "failed cells, counted as 0: 5 of 30" in result.lines()


def test_more_than_a_fifth_is_an_error() -> None:
    class FailsMore(Fails):
        worst = 0.7

    with pytest.raises(ValueError, match="10 of 30 cells failed, more than a fifth"):
        tuner(module_fn=FailsMore, refine=None).run()


# Going on


class Stops(Shrunk):
    left = 10**9

    def on_fit_start(self) -> None:
        type(self).left -= 1
        if type(self).left < 0:
            raise RuntimeError("stopped")


def test_a_search_goes_on_where_it_was(tmp_path: Any) -> None:
    whole = tuner(module_fn=Stops).run()

    Stops.left = 13
    with pytest.raises(RuntimeError, match="stopped"):
        tuner(module_fn=Stops, dirpath=tmp_path).run()
    kept = json.loads((tmp_path / "tuner_state.json").read_text())["cells"]
    assert len(kept) == 13

    Stops.left, Stops.made = 10**9, 0
    resumed = tuner(module_fn=Stops, dirpath=tmp_path).run()
    assert Stops.made == whole.utilities.numel() - 13
    assert torch.equal(resumed.utilities, whole.utilities)
    assert (resumed.values, resumed.best) == (whole.values, whole.best)

    Stops.made = 0
    again = tuner(module_fn=Stops, dirpath=tmp_path).run()
    assert Stops.made == 0
    assert torch.equal(again.utilities, whole.utilities)
    assert [file.name for file in tmp_path.iterdir()] == ["tuner_state.json"]

    more = tuner([*pairs(), *pairs([1.7])], Stops, dirpath=tmp_path, refine=None).run()
    assert Stops.made == 6
    assert torch.equal(more.utilities[:5], whole.utilities[:, [o == "grid" for o in whole.origin]])


def test_failed_cells_are_not_tried_again(tmp_path: Any) -> None:
    first = tuner(module_fn=Fails, refine=None, dirpath=tmp_path).run()
    Fails.made = 0
    second = tuner(module_fn=Fails, refine=None, dirpath=tmp_path).run()
    assert Fails.made == 0
    assert torch.equal(first.utilities.isnan(), second.utilities.isnan())


def test_cells_of_another_search_are_refused(tmp_path: Any) -> None:
    tuner(refine=None, dirpath=tmp_path).run()
    other = tuner(dirpath=tmp_path, seed=1, trainer_kwargs={**QUICK, "max_epochs": 2})
    with pytest.raises(ValueError, match=r"belongs to another search.*seed: 0 there, 1 here.*max_epochs': 1"):
        other.run()
    (tmp_path / "tuner_state.json").write_text('{"version": 1')
    with pytest.raises(ValueError, match="is no file of finished cells"):
        tuner(dirpath=tmp_path).run()
    (tmp_path / "tuner_state.json").write_text('{"version": 9, "settings": {}, "cells": {}}')
    with pytest.raises(ValueError, match="is of version 9; this one reads 1"):
        tuner(dirpath=tmp_path).run()


# Slopes


@pytest.mark.parametrize(("estimator", "value"), [("ift_exact", 0.3), ("ift_cg", 0.3), ("envelope", 0.8)])
def test_slopes_are_those_of_the_closed_form(estimator: str, value: float) -> None:
    search = tuner(module_fn=Learned, slope=estimator)
    found = [search.fit.slope(task, value, estimator, {}) for task in search.tasks]
    solutions = [mean / (1 + value) for mean in MEANS]
    if estimator == "envelope":  # of the penalty times the square
        expected = [solution**2 for solution in solutions]
    else:
        expected = [-2 * (solution - 1) * solution / (1 + value) for solution in solutions]
    assert found == pytest.approx(expected, abs=1e-9)


def test_the_slope_phase_goes_on_from_the_grid() -> None:
    settings = {"utility": "neg_val_loss", "upper": UPPER, "trainer_kwargs": QUICK, "refine": None, "n_grid": 4}
    tasks = [Shrinking(mean) for mean in MEANS]
    search = TaskDistributionTuner(tasks, Learned, "decay", 0.01, 1.0, slope="ift_exact", slope_steps=40, **settings)
    result = search.run()
    assert len(result.path) == 41
    assert result.origin[result.values.index(result.best)] == "slope"
    assert result.best == pytest.approx(BEST, abs=2e-3)
    assert not result.bounds()[0].certified


def test_training_leaves_the_hyperparameter_alone() -> None:
    seen = []

    def note(trainer: Any, module: Any, task: Any) -> float:
        seen.append((module.decay, module.hypers["decay"].item()))
        return 0.5

    settings = {"utility": note, "upper": 1.0, "trainer_kwargs": QUICK, "refine": None, "n_grid": 3}
    TaskDistributionTuner(pairs(), Learned, "decay", 0.1, 1.0, **settings).run()
    assert all(given == pytest.approx(held, abs=1e-12) for given, held in seen)


def test_slopes_need_a_set(tmp_path: Any) -> None:
    with pytest.raises(ValueError, match="need a HyperparameterSet in `Shrunk` that holds 'decay'"):
        tuner(slope="ift_cg", refine=None).run()


# Report


def test_the_report_says_what_was_found(tmp_path: Any, capsys: Any) -> None:
    result = tuner(held_out=pairs([1.5])).run()
    result.report(tmp_path)
    said = capsys.readouterr().out
    assert f"best decay: {result.best:.4g}" in said
    assert "tasks needed for a gap of 0.2" in said
    assert "on 1 other tasks" in said
    lines = (tmp_path / "task_tuning.csv").read_text().splitlines()
    assert lines[0] == "task,decay,origin,utility"
    assert len(lines) == 1 + result.utilities.numel()
    assert float(lines[1].split(",")[3]) == result.utilities[0, 0].item()
    assert (tmp_path / "task_tuning.png").stat().st_size > 10_000


def test_the_picture_can_be_left_out(tmp_path: Any) -> None:
    tuner(refine=None).run().report(tmp_path, plot=False)
    assert [file.name for file in tmp_path.iterdir()] == ["task_tuning.csv"]
