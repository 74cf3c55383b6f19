"""The report of a real, small fit whose toy method learns a scalar and a list."""

import csv
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CometLogger, CSVLogger, Logger, MLFlowLogger, TensorBoardLogger
from matplotlib.image import imread
from torch.utils.data import DataLoader, TensorDataset

from lightning_hpo.callbacks import report as report_module
from lightning_hpo.callbacks.base import MethodCallback
from lightning_hpo.callbacks.report import HyperparameterReport

STEPS = 6  # batches an epoch


class Line(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        return self.layer(batch[0]).pow(2).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(torch.ones(2 * STEPS, 1)), batch_size=2)


class Toy(MethodCallback):
    """'Learns' one number and a list by counting steps."""

    _STATE = ("steps",)
    _KEY = ("name",)

    def __init__(self, name: str = "a", entries: int = 3) -> None:
        self.name, self.entries, self.steps = name, entries, 0

    def on_train_batch_end(self, *args: Any) -> None:
        self.steps += 1

    def on_train_end(self, *args: Any) -> None:
        self.steps += 100  # what a method settles at the end is what the report must show last

    def hyperparameters(self) -> dict[str, float | list[float]]:
        return {"rate": 0.5 + self.steps, "kept": [10.0 * i + self.steps for i in range(self.entries)]}


class StopAt(Callback):
    def __init__(self, step: int, error: BaseException) -> None:
        self.step, self.error = step, error

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            raise self.error


def fit(*callbacks: Callback, ckpt_path: str | None = None, logger: Any = False, **settings: Any) -> Trainer:
    trainer = Trainer(
        **{"max_epochs": 2, "accelerator": "cpu", "log_every_n_steps": 2, **settings},
        callbacks=list(callbacks),
        logger=logger,
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Line(), ckpt_path=ckpt_path)
    return trainer


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "hyperparameters.csv").open() as file:
        return list(csv.DictReader(file))


def test_csv_holds_the_whole_course(tmp_path: Path) -> None:
    fit(Toy(), HyperparameterReport(tmp_path))
    table = rows(tmp_path)
    assert list(table[0]) == [
        "step",
        "epoch",
        *(f"test_report/{name}" for name in ("rate", "kept/0", "kept/1", "kept/2")),
    ]
    assert [int(row["step"]) for row in table] == [0, 2, 4, 6, 8, 10, 12]
    assert [float(row["test_report/rate"]) for row in table] == [0.5, 2.5, 4.5, 6.5, 8.5, 10.5, 112.5]
    assert [float(row["test_report/kept/2"]) for row in table] == [20, 22, 24, 26, 28, 30, 132]
    assert [int(row["epoch"]) for row in table[:3]] == [0, 0, 0]


def test_table_shows_first_and_last_of_every_knob(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(Toy(), HyperparameterReport(tmp_path))
    printed = capsys.readouterr().out
    assert "step 12" in printed
    assert re.search(r"test_report/rate +│ 0.5 +│ 112.5 ", printed)
    assert re.search(r"test_report/kept +│ 0 10 20 +│ 112 122 132 ", printed)
    assert str(tmp_path) in printed


def test_png_has_a_panel_for_each_knob(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures, draw = [], report_module._draw
    monkeypatch.setattr(report_module, "_draw", lambda records: figures.append(draw(records)) or figures[-1])
    fit(Toy(entries=12), HyperparameterReport(tmp_path))
    image = imread(tmp_path / "hyperparameters.png")
    assert image.shape[0] > 300
    assert image.shape[1] > 900
    assert image[..., :3].std() > 0.05  # something is drawn
    panels = {axes.get_title(): axes for axes in figures[0].axes if axes.get_title()}
    assert list(panels) == ["test_report/rate", "test_report/kept"]
    assert [len(axes.lines) for axes in panels.values()] == [1, 12]
    assert {axes.get_xlabel() for axes in panels.values()} == {"optimizer step"}
    np.testing.assert_allclose(panels["test_report/kept"].lines[11].get_ydata()[:2], [110, 112])
    assert len(figures[0].axes) == 3  # twelve lines are told apart by a colour bar, not a legend
    assert panels["test_report/kept"].get_legend() is None


def test_few_lines_get_a_legend(tmp_path: Path) -> None:
    record = {"step": 0, "epoch": 0, "values": {"a": [1.0, 2.0], "b": 1.0}}
    axes = report_module._draw([record]).axes
    assert [text.get_text() for text in axes[0].get_legend().get_texts()] == ["0", "1"]
    assert axes[1].get_legend() is None


def test_plot_can_be_left_out(tmp_path: Path) -> None:
    fit(Toy(), HyperparameterReport(tmp_path, plot=False))
    assert [file.name for file in tmp_path.iterdir()] == ["hyperparameters.csv"]


def test_interval_counts_optimizer_steps_and_not_batches(tmp_path: Path) -> None:
    fit(Toy(), HyperparameterReport(tmp_path, every_n_steps=2), accumulate_grad_batches=2, max_epochs=2)
    assert [int(row["step"]) for row in rows(tmp_path)] == [0, 2, 3, 4, 6]  # 3: end of the first epoch


def test_two_instances_of_one_class_have_panels_of_their_own(tmp_path: Path) -> None:
    fit(Toy("a"), Toy("b", entries=1), HyperparameterReport(tmp_path))
    assert {"test_report[a]/rate", "test_report[b]/kept/0"} <= set(rows(tmp_path)[0])


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("broken")])
def test_an_interrupted_run_still_reports(tmp_path: Path, error: BaseException) -> None:
    # Lightning turns Ctrl-C into an orderly exit; any other error comes out as it is.
    with pytest.raises(SystemExit if isinstance(error, KeyboardInterrupt) else RuntimeError):
        fit(Toy(), HyperparameterReport(tmp_path), StopAt(5, error))
    assert [float(row["test_report/rate"]) for row in rows(tmp_path)] == [0.5, 2.5, 4.5, 5.5]
    assert imread(tmp_path / "hyperparameters.png").size


def test_a_method_that_broke_does_not_hide_the_error(tmp_path: Path) -> None:
    class Breaks(Toy):
        def hyperparameters(self) -> dict[str, float | list[float]]:
            if self.steps == 5:
                raise ZeroDivisionError
            return super().hyperparameters()

    with pytest.warns(UserWarning, match="could not read the last values"), pytest.raises(RuntimeError, match="broken"):
        fit(Breaks(), HyperparameterReport(tmp_path), StopAt(5, RuntimeError("broken")))
    assert [int(row["step"]) for row in rows(tmp_path)] == [0, 2, 4]


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists")
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
def test_a_resumed_run_continues_the_course(tmp_path: Path) -> None:
    fit(Toy(), HyperparameterReport(tmp_path / "whole"), max_epochs=3)

    def saver() -> ModelCheckpoint:
        return ModelCheckpoint(tmp_path / "saved", filename="at", every_n_train_steps=8, save_top_k=-1)

    with pytest.raises(RuntimeError):
        fit(Toy(), HyperparameterReport(tmp_path / "first"), saver(), StopAt(9, RuntimeError("killed")))
    fit(
        Toy(),
        HyperparameterReport(tmp_path / "second"),
        saver(),
        ckpt_path=str(tmp_path / "saved" / "at.ckpt"),
        max_epochs=3,
    )
    assert rows(tmp_path / "second") == rows(tmp_path / "whole")


def test_a_second_fit_of_the_same_callbacks_starts_anew(tmp_path: Path) -> None:
    toy, report = Toy(), HyperparameterReport(tmp_path)
    fit(toy, report)
    fit(toy, report)
    assert [float(row["test_report/rate"]) for row in rows(tmp_path)][:2] == [112.5, 114.5]
    assert [int(row["step"]) for row in rows(tmp_path)] == [0, 2, 4, 6, 8, 10, 12]


def test_files_go_to_the_logger_or_the_root(tmp_path: Path) -> None:
    fit(Toy(), HyperparameterReport(), default_root_dir=tmp_path / "root")
    assert (tmp_path / "root" / "hyperparameters.png").exists()
    fit(Toy(), HyperparameterReport(), logger=CSVLogger(tmp_path / "logs", name="run"))
    assert (tmp_path / "logs" / "run" / "version_0" / "hyperparameters.png").exists()


def test_csv_logger_receives_the_numbers(tmp_path: Path) -> None:
    fit(Toy(), HyperparameterReport(), logger=CSVLogger(tmp_path, name="run"))
    with (tmp_path / "run" / "version_0" / "metrics.csv").open() as file:
        logged = {int(row["step"]): float(row["test_report/kept/1"]) for row in csv.DictReader(file)}
    assert logged == {0: 10, 2: 12, 4: 14, 6: 16, 8: 18, 10: 20, 12: 122}


def test_tensorboard_receives_numbers_and_picture(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    fit(Toy(), HyperparameterReport(), logger=TensorBoardLogger(tmp_path, name="run"))
    events = accumulator.EventAccumulator(str(tmp_path / "run" / "version_0")).Reload()
    assert [event.value for event in events.Scalars("test_report/rate")][:2] == [0.5, 2.5]
    (picture,) = events.Images("hyperparameters")
    assert (picture.step, picture.width > 900) == (12, True)


class Gallery(Logger):
    """A logger that takes pictures the way Weights & Biases does."""

    name, version = "gallery", 0

    def __init__(self) -> None:
        super().__init__()
        self.pictures: list[Any] = []
        self.metrics: list[Any] = []

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None: ...

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.metrics.append((step, metrics))

    def log_image(self, key: str, images: list[Any], step: int | None = None) -> None:
        self.pictures.append((key, images[0], step))


def test_a_logger_with_log_image_receives_an_array(tmp_path: Path) -> None:
    gallery = Gallery()
    fit(Toy(), HyperparameterReport(tmp_path), logger=gallery)
    ((key, image, step),) = gallery.pictures
    assert (key, step, image.dtype, image.shape[2]) == ("hyperparameters", 12, np.uint8, 3)
    saved = imread(tmp_path / "hyperparameters.png")
    np.testing.assert_allclose(image / 255, saved[..., :3], atol=1 / 255)


class Recorder:
    """Stands for the client of a tracking service."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def log_figure(self, *args: Any, **kwargs: Any) -> None:
        self.calls.append((*args, kwargs))


def test_mlflow_and_comet_receive_the_figure() -> None:
    class MLflow(MLFlowLogger):
        experiment, run_id = Recorder(), "run"

        def __init__(self) -> None: ...

    class Comet(CometLogger):
        experiment = Recorder()

        def __init__(self) -> None: ...

    figure = report_module._draw([{"step": 0, "epoch": 0, "values": {"a": 1.0}}])
    report_module._send_picture(MLflow(), figure, step=7)
    report_module._send_picture(Comet(), figure, step=7)
    assert MLflow.experiment.calls == [("run", figure, "hyperparameters.png", {})]
    assert Comet.experiment.calls == [({"figure_name": "hyperparameters", "figure": figure, "step": 7},)]


def test_an_error_before_training_writes_nothing(tmp_path: Path) -> None:
    class Fails(Callback):
        def on_fit_start(self, *args: Any) -> None:
            raise RuntimeError("early")

    report = HyperparameterReport(tmp_path)
    report.load_state_dict({"records": [{"step": 3, "epoch": 0, "values": {"a": 1.0}}]})
    with pytest.raises(RuntimeError, match="early"):
        fit(Toy(), report, Fails())
    assert list(tmp_path.iterdir()) == []


def test_only_rank_zero_writes_and_logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gallery, report, toy = Gallery(), HyperparameterReport(tmp_path), Toy()
    trainer = fit(toy, report, logger=gallery)
    assert gallery.metrics[0] == (0, {"test_report/rate": 0.5, **{f"test_report/kept/{i}": 10.0 * i for i in range(3)}})
    gallery.pictures.clear()
    gallery.metrics.clear()
    for file in tmp_path.iterdir():
        file.unlink()
    monkeypatch.setattr(type(trainer.strategy), "is_global_zero", property(lambda strategy: False))
    report.on_train_start(trainer, trainer.lightning_module)
    report.on_fit_end(trainer, trainer.lightning_module)
    assert (list(tmp_path.iterdir()), gallery.pictures, gallery.metrics) == ([], [], [])
    assert report.records  # but every rank keeps the course, so that all have it after a resume


def test_two_processes_write_one_report(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    class Writes(HyperparameterReport):
        def _report(self, trainer: Trainer) -> None:
            super()._report(trainer)
            (tmp_path / f"rank{trainer.global_rank}").write_text(str(len(self.records)))

    fit(Toy(), Writes(tmp_path / "out"), strategy="ddp_fork", devices=2)
    assert {file.name: file.read_text() for file in tmp_path.glob("rank*")} == {"rank0": "5", "rank1": "5"}
    assert [int(row["step"]) for row in rows(tmp_path / "out")] == [0, 2, 3, 4, 6]
    assert capfd.readouterr().out.count("Learned hyperparameters") == 1


def test_nothing_learned_is_said(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="nothing to report: no callback learned"):
        fit(HyperparameterReport(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_state_is_plain(tmp_path: Path) -> None:
    report = HyperparameterReport(tmp_path)
    assert report.state_dict() == {}
    fit(Toy(), report)
    assert json.loads(json.dumps(report.state_dict())) == report.state_dict()


def test_interval_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="every_n_steps must be at least 1, got 0"):
        HyperparameterReport(every_n_steps=0)
