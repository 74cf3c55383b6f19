"""Short, quiet runs of the Trainer, in one process or on two ranks, and a record of what came out."""

import copy
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy

from lightning_hpo.callbacks.base import MethodCallback

__all__ = ["Killed", "Outcome", "Recorder", "fit", "fit_two_ranks", "tiny_trainer"]

MakeCallback = Callable[[], MethodCallback]
MakeModule = Callable[[], LightningModule]
MakeData = Callable[[int], LightningDataModule]


class Killed(Exception):  # noqa: N818 - what happened, not an error of anybody's
    """Raised in the middle of training, in place of a power cut."""


@dataclass
class Outcome:
    """What is left of a run: plain types and tensors only.

    Args:
        losses: Training loss of every micro-batch.
        knobs: What the method had learned when training began and after every micro-batch.
        logged: Keys of everything logged.
        global_step: Optimizer steps taken.
        first: The method's state when training began, which is what a checkpoint brought back.
        module: The module's state at the end of training.
        method: The method's state at the end of training.
        optimizers: The optimizers' states at the end of training.
    """

    losses: list[float] = field(default_factory=list)
    knobs: list[dict[str, Any]] = field(default_factory=list)
    logged: list[str] = field(default_factory=list)
    global_step: int = 0
    first: dict[str, Any] = field(default_factory=dict)
    module: dict[str, Any] = field(default_factory=dict)
    method: dict[str, Any] = field(default_factory=dict)
    optimizers: list[Any] = field(default_factory=list)


class Recorder(Callback):
    """Writes down what happens in a run, before anything is torn down.

    Args:
        method: The callback under test, or ``None``.
        folder: Where to write the outcome, one file a rank; nowhere by default.
        kill_at: Micro-batch at whose start to raise :class:`Killed`, counted from the beginning of this run.
    """

    def __init__(self, method: MethodCallback | None = None, folder: Path | None = None, kill_at: int | None = None):
        self.method = method
        self.folder = folder
        self.kill_at = kill_at
        self.outcome = Outcome()

    def _learned(self) -> dict[str, Any]:
        return {} if self.method is None else dict(self.method.hyperparameters())

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Notes the first values."""
        self.outcome.knobs.append(self._learned())
        self.outcome.first = {} if self.method is None else copy.deepcopy(self.method.state_dict())

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Pulls the plug."""
        if self.kill_at is not None and len(self.outcome.losses) == self.kill_at:
            raise Killed(f"at the start of micro-batch {self.kill_at}")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Notes the loss and the values."""
        self.outcome.losses.append(outputs["loss"].item())
        self.outcome.knobs.append(self._learned())

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Copies all states."""
        end = self.outcome
        end.global_step = trainer.global_step
        end.logged = sorted(trainer.callback_metrics)
        end.module = {name: value.detach().clone() for name, value in pl_module.state_dict().items()}
        end.optimizers = [copy.deepcopy(optimizer.state_dict()) for optimizer in trainer.optimizers]
        end.method = {} if self.method is None else copy.deepcopy(self.method.state_dict())
        if self.folder is not None:
            torch.save(asdict(end), self.folder / f"rank{trainer.global_rank}.pt")


def tiny_trainer(*callbacks: Callback, **arguments: Any) -> Trainer:
    """A Trainer on the CPU that prints nothing and writes nothing.

    Args:
        callbacks: Callbacks.
        arguments: Arguments of the Trainer, which win over the quiet ones.

    Returns:
        The Trainer.
    """
    quiet: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": any("Checkpoint" in type(callback).__name__ for callback in callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
    }
    return Trainer(callbacks=list(callbacks), **{**quiet, **arguments})


def fit(
    method: MethodCallback | None,
    module: LightningModule,
    data: LightningDataModule,
    *extra: Callback,
    kill_at: int | None = None,
    ckpt_path: str | Path | None = None,
    **trainer: Any,
) -> Outcome:
    """Trains and reports.

    Args:
        method: The callback under test, or ``None`` to train without one.
        module: The module.
        data: The data.
        extra: Further callbacks.
        kill_at: Micro-batch at which to pull the plug.
        ckpt_path: Checkpoint to resume from.
        trainer: Arguments of the Trainer.

    Returns:
        What came out, as far as the run got.

    Example:
        >>> from lightning_hpo.testing import TinyClassifier, TinyImages
        >>> outcome = fit(None, TinyClassifier(), TinyImages(), max_steps=3)
        >>> outcome.global_step, len(outcome.losses)
        (3, 3)
    """
    recorder = Recorder(method, kill_at=kill_at)
    callbacks = [recorder, *extra] if method is None else [method, recorder, *extra]
    runner = tiny_trainer(*callbacks, **trainer)
    with warnings.catch_warnings(), suppress(Killed):
        # Lightning remarks that callbacks of the checkpoint are not there, and that there are older checkpoints.
        warnings.filterwarnings("ignore", message=".*callbacks used to create the checkpoint.*")
        warnings.filterwarnings("ignore", message=".*exists and is not empty.*")
        runner.fit(module, data, ckpt_path=None if ckpt_path is None else str(ckpt_path))
    return recorder.outcome


def fit_two_ranks(
    make_callback: MakeCallback,
    make_module: MakeModule,
    make_data: MakeData,
    batch_size: int,
    **trainer: Any,
) -> list[Outcome]:
    """Trains on two ranks (two forked processes that talk through gloo) and reports what each saw.

    Args:
        make_callback: Makes the callback under test.
        make_module: Makes the module.
        make_data: Makes the data for a batch size.
        batch_size: Images a rank sees in a step.
        trainer: Arguments of the Trainer.

    Returns:
        The outcomes of rank 0 and of rank 1.
    """
    # A lost collective should fail in a minute, not in the default half hour.
    strategy = DDPStrategy(start_method="fork", process_group_backend="gloo", timeout=timedelta(seconds=60))
    with tempfile.TemporaryDirectory() as folder, _one_thread():
        method = make_callback()
        callbacks = (method, Recorder(method, folder=Path(folder)))
        runner = tiny_trainer(*callbacks, **{"devices": 2, "strategy": strategy, **trainer})
        runner.fit(make_module(), make_data(batch_size))
        return [Outcome(**torch.load(Path(folder) / f"rank{rank}.pt", weights_only=False)) for rank in (0, 1)]


@contextmanager
def _one_thread() -> Iterator[None]:
    """Keeps OpenMP out of forked processes, where a second parallel region would hang."""
    threads, variable = torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS")
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        if variable is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = variable
