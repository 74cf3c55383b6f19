"""The tuner of tasks on two ranks and in fresh processes gives, to the bit, what it gives here."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torchmetrics import MeanMetric

from lightning_hpo import MicroBatchFinder, TaskDistributionTuner
from lightning_hpo.tuners.task_state import CellFile
from tests.tuners.shrunk import MEANS, QUICK, UPPER, Learned, Shrinking

pytestmark = pytest.mark.xdist_group("tuner ranks")  # one worker starts the processes


class Measured(Learned):
    """Logs through a metric that would sum over ranks, and fails on one of them if told to."""

    fails_at: float | None = None

    def __init__(self, decay: float) -> None:
        super().__init__(decay)
        self.mean_loss = MeanMetric()
        self.start = torch.rand(())

    def prepare_data(self) -> None:
        """Lightning has all ranks wait for the first one here."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.fails_at is not None and abs(batch[0].mean().item() - self.fails_at) < 1e-6:
            raise RuntimeError("out of luck")
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        losses = (batch[0] - self.mean).square() + 0.1 * self.start
        self.mean_loss.update(losses)
        self.log("val_loss", self.mean_loss)
        return losses.mean()


def search(folder: str | None, **settings: Any) -> Any:
    chosen = {"utility": "neg_val_loss", "upper": UPPER, "n_grid": 3, "refine_steps": 2, "trainer_kwargs": QUICK}
    tasks, others = ([Shrinking(mean) for mean in means] for means in (MEANS, (1.5, 1.55, 1.7)))
    phases = {"slope": "ift_exact", "slope_steps": 3, "held_out": others, "dirpath": folder}
    return TaskDistributionTuner(tasks, Measured, "decay", 0.01, 1.0, **{**chosen, **phases, **settings})


TENSORS = ("utilities", "held_out")


def summary(result: Any) -> dict[str, Any]:
    names = ("values", "best", "utilities", "held_out", "path", "keys")
    return {name: getattr(result, name) for name in names} | {"cells": dict(result.cells)}


def run_rank(rank: int, ranks: int, folder: str) -> None:
    torch.set_num_threads(1)
    if ranks > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=ranks)
    Measured.made = 0
    seen: dict[str, Any] = {"folder": folder}
    Measured.fails_at = MEANS[1]  # that of rank 1, if there are two
    try:
        search(folder).run()
    except RuntimeError as error:
        seen["failure"] = str(error)
    seen["kept"] = [len(json.loads(file.read_text())["cells"]) for file in sorted(Path(folder).glob("tuner*.json"))]
    Measured.fails_at, Measured.made = None, 0
    tuner = search(folder)
    if ranks > 1:
        dist.barrier()
    result = tuner.run()
    result.report(f"{folder}/report{rank}", plot=False)
    seen["resumed"], seen["made"] = summary(result), Measured.made
    seen["fresh"] = summary(search(None).run())
    try:
        search(None, trainer_kwargs={**QUICK, "callbacks": [MicroBatchFinder()]})
    except ValueError as error:
        seen["refusal"] = str(error)
    torch.save(seen, f"{folder}/{rank}.pt")
    if ranks > 1:
        dist.barrier()
        dist.destroy_process_group()


def spawned(ranks: int, folder: Path) -> list[dict[str, Any]]:
    torch.multiprocessing.spawn(run_rank, args=(ranks, str(folder)), nprocs=ranks)
    return [torch.load(folder / f"{rank}.pt") for rank in range(ranks)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two ranks have seen, then what one process has."""
    return [seen for ranks in (2, 1) for seen in spawned(ranks, tmp_path_factory.mktemp(f"ranks{ranks}"))]


def test_two_ranks_one_process_and_this_one_agree_to_the_bit(runs: list[dict[str, Any]]) -> None:
    here = summary(search(None).run())
    assert len(here["values"]) == 6
    for seen in runs:
        for name in ("resumed", "fresh"):
            assert {key: seen[name][key] for key in here if key not in TENSORS} == {
                key: here[key] for key in here if key not in TENSORS
            }
            assert all(torch.equal(seen[name][key], here[key]) for key in TENSORS)


def test_a_failure_on_one_rank_ends_all(runs: list[dict[str, Any]]) -> None:
    assert [seen["failure"] for seen in runs] == [
        "a cell has failed on another rank, which says why",
        *["out of luck"] * 2,
    ]


def test_what_every_rank_had_finished_is_kept(runs: list[dict[str, Any]]) -> None:
    first, second, alone = runs
    assert alone["kept"] == [3]  # the first task, and then the second fails
    assert sum(first["kept"]) == 9  # three tasks of rank 0; rank 1 has begun with the one that fails
    cells = len(first["fresh"]["cells"])
    assert alone["made"] == cells - 3
    assert first["made"] + second["made"] == cells - 9


def test_one_file_is_left_and_the_first_rank_reports(runs: list[dict[str, Any]]) -> None:
    folder = Path(runs[0]["folder"])
    assert [file.name for file in folder.glob("tuner*")] == ["tuner_state.json"]
    assert (folder / "report0" / "task_tuning.csv").exists()
    assert not (folder / "report1").exists()


def test_callbacks_that_average_over_ranks_are_refused(runs: list[dict[str, Any]]) -> None:
    first, second, alone = runs
    assert "MicroBatchFinder would average over ranks" in first["refusal"]
    assert first["refusal"] == second["refusal"]
    assert "refusal" not in alone


def test_files_of_ranks_that_are_gone_are_read(tmp_path: Path) -> None:
    path = tmp_path / "tuner_state.json"
    CellFile(path, {"seed": 0}).record("a@0.5", 0.1)
    CellFile(path, {"seed": 0}).record("b@0.5", None)
    path.rename(tmp_path / "tuner_state.rank3.json")
    cells = CellFile(path, {"seed": 0})
    assert cells.known == {"a@0.5": 0.1, "b@0.5": None}
    cells.join({"c@0.5": 1 / 3})
    assert [file.name for file in tmp_path.iterdir()] == ["tuner_state.json"]
    assert CellFile(path, {"seed": 0}).known == {"a@0.5": 0.1, "b@0.5": None, "c@0.5": 1 / 3}
