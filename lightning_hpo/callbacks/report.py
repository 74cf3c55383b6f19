"""A table, a CSV file and a picture of everything that the callbacks of a run have learned."""

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import rich
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CometLogger, Logger, MLFlowLogger
from lightning.pytorch.utilities import rank_zero_warn
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator
from rich.table import Table
from rich.text import Text
from typing_extensions import override

from lightning_hpo.callbacks.base import MethodCallback

__all__ = ["HyperparameterReport"]

_LEGEND_LINES = 6  # more than this and a colour bar says which line is which


class HyperparameterReport(Callback):
    """Reports what every method of this package has learned, at the end of ``fit`` and after Ctrl-C.

    Prints a table with the first and the last value of each hyperparameter, writes their whole course to
    ``hyperparameters.csv`` (a row a step, a column a number) and draws it in ``hyperparameters.png`` (a panel a
    hyperparameter). Loggers get the same numbers as metrics while training runs, and the picture if they take pictures.
    A resumed run continues the course.

    Args:
        dirpath: Local folder for the files; the logger's folder, or else the Trainer's root folder, if left out.
        every_n_steps: Optimizer steps between two entries of the course; the Trainer's ``log_every_n_steps`` if left
            out. There is always one at the start, at the end of each epoch and at the end.
        plot: Whether to draw the picture.

    Raises:
        ValueError: If ``every_n_steps`` is below 1.

    Example:
        >>> report = HyperparameterReport(every_n_steps=10)
        >>> report.records
        []
    """

    def __init__(self, dirpath: str | Path | None = None, every_n_steps: int | None = None, plot: bool = True) -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise ValueError(f"every_n_steps must be at least 1, got {every_n_steps}")
        self.dirpath = dirpath
        self.every_n_steps = every_n_steps
        self.plot = plot
        self.records: list[dict[str, Any]] = []  # {"step": int, "epoch": int, "values": {knob: number or list}}
        self._folder = Path()
        self._training = False

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._training = False
        # On every rank: the Trainer broadcasts its folder.
        self._folder = Path(self.dirpath or trainer.log_dir or trainer.default_root_dir)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._training = True
        # A resumed run goes on where the checkpoint was written; a new one (step 0) forgets the run before it.
        self.records = [record for record in self.records if record["step"] < trainer.global_step]
        self._record(trainer)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        every = self.every_n_steps or max(trainer.log_every_n_steps, 1)  # type: ignore[attr-defined]
        # Not a remainder: with several optimizers the step count jumps over multiples.
        if trainer.global_step // every > self.records[-1]["step"] // every:
            self._record(trainer)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._record(trainer)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._training:  # a fit that had nothing left to do never starts
            self._record(trainer)
            self._report(trainer)
        self._training = False

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if not self._training:
            return
        self._training = False
        try:
            self._record(trainer)
        except Exception as error:  # whatever broke training may have broken a method; report what there is
            rank_zero_warn(f"`HyperparameterReport` could not read the last values: {error!r}")
        self._report(trainer)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"records": list(self.records)} if self.records else {}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.records = list(state_dict["records"])

    def _record(self, trainer: Trainer) -> None:
        methods = [c for c in trainer.callbacks if isinstance(c, MethodCallback)]  # type: ignore[attr-defined]
        values = {f"{m.label(trainer)}/{name}": v for m in methods for name, v in m.hyperparameters().items()}
        record = {"step": trainer.global_step, "epoch": trainer.current_epoch, "values": values}
        if self.records and self.records[-1]["step"] == record["step"]:
            if self.records[-1]["values"] == values:
                return
            self.records.pop()
        self.records.append(record)
        if values and trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.log_metrics(dict(_columns(values)), step=trainer.global_step)

    def _report(self, trainer: Trainer) -> None:
        if not trainer.is_global_zero:
            return
        if not any(record["values"] for record in self.records):
            rank_zero_warn("`HyperparameterReport` has nothing to report: no callback learned a hyperparameter.")
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        _write_csv(self._folder / "hyperparameters.csv", self.records)
        rich.print(_table(self.records))
        if self.plot:
            figure = _draw(self.records)
            figure.savefig(self._folder / "hyperparameters.png")
            for logger in trainer.loggers:
                _send_picture(logger, figure, step=trainer.global_step)
        rich.get_console().print(f"Course of training in {self._folder}", soft_wrap=True, highlight=False, markup=False)


def _columns(values: dict[str, float | list[float]]) -> Iterator[tuple[str, float]]:
    """Column names and numbers; an entry of a list gets its index, padded so that names sort."""
    for knob, value in values.items():
        if isinstance(value, list):
            width = len(str(len(value) - 1))
            yield from ((f"{knob}/{i:0{width}}", entry) for i, entry in enumerate(value))
        else:
            yield knob, value


def _courses(records: list[dict[str, Any]]) -> dict[str, tuple[list[int], list[Any]]]:
    """For each knob its steps and values, since a knob may appear after the start."""
    courses: dict[str, tuple[list[int], list[Any]]] = {}
    for record in records:
        for knob, value in record["values"].items():
            steps, values = courses.setdefault(knob, ([], []))
            steps.append(record["step"])
            values.append(value)
    return courses


def _write_csv(path: Path, records: list[dict[str, Any]]) -> None:
    rows = [{"step": r["step"], "epoch": r["epoch"], **dict(_columns(r["values"]))} for r in records]
    names = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)


def _table(records: list[dict[str, Any]]) -> Table:
    table = Table(title=f"Learned hyperparameters (step {records[-1]['step']})")
    for name in ("hyperparameter", "first", "last"):
        table.add_column(name, overflow="fold")
    for knob, (_, values) in _courses(records).items():
        table.add_row(Text(knob), _text(values[0]), _text(values[-1]))
    return table


def _text(value: float | list[float]) -> str:
    return " ".join(map(_text, value)) if isinstance(value, list) else f"{value:.4g}"


def _draw(records: list[dict[str, Any]]) -> Figure:
    """One panel a knob, at most three in a row."""
    courses = _courses(records)
    columns = 2 if len(courses) == 4 else min(len(courses), 3)
    rows = -(-len(courses) // columns)
    figure = Figure(
        figsize=(4.6 * columns, 3.2 * rows), dpi=120, layout=ConstrainedLayoutEngine(h_pad=0.12, w_pad=0.12)
    )
    FigureCanvasAgg(figure)  # never a window, whatever the user's backend
    for i, (knob, (steps, values)) in enumerate(courses.items()):
        axes = figure.add_subplot(rows, columns, i + 1)
        _draw_panel(axes, steps, [value if isinstance(value, list) else [value] for value in values])
        axes.set_title(knob, fontsize=10)
    return figure


def _draw_panel(axes: Axes, steps: list[int], values: list[list[float]]) -> None:
    """One line an entry: named if they are few, else coloured from the first entry to the last."""
    count = max(map(len, values))
    shades = ListedColormap(colormaps["viridis"](np.linspace(0, 0.92, count)))  # the last yellow is too pale
    style: dict[str, Any] = {"linewidth": 1.6, "marker": "o" if len(steps) < 20 else None, "markersize": 3}
    for entry in range(count):
        course = [row[entry] if entry < len(row) else np.nan for row in values]
        color = "tab:blue" if count == 1 else shades(entry)
        axes.plot(steps, course, color=color, label=str(entry), **style)
    axes.set_xlabel("optimizer step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if 1 < count <= _LEGEND_LINES:
        axes.legend(
            title="entry", fontsize=8, title_fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5)
        )
    elif count > _LEGEND_LINES:
        bar = ScalarMappable(BoundaryNorm(np.arange(count + 1) - 0.5, count), shades)
        ticks = np.arange(0, count, -(-count // 8))
        axes.figure.colorbar(bar, ax=axes, label="entry", ticks=ticks, pad=0.02).minorticks_off()


def _send_picture(logger: Logger, figure: Figure, step: int) -> None:
    """Hands the picture to a logger that takes pictures, each in its own way; the others keep their metrics."""
    key = "hyperparameters"
    experiment: Any = getattr(logger, "experiment", None)
    if hasattr(logger, "log_image"):
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        logger.log_image(key=key, images=[np.asarray(canvas.buffer_rgba())[..., :3].copy()], step=step)
    elif hasattr(experiment, "add_figure"):
        experiment.add_figure(key, figure, global_step=step)
    elif isinstance(logger, MLFlowLogger):
        experiment.log_figure(logger.run_id, figure, f"{key}.png")
    elif isinstance(logger, CometLogger):
        experiment.log_figure(figure_name=key, figure=figure, step=step)
