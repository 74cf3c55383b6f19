"""One cell of a search over tasks: a module is made, trained and judged, the same way every time."""

import copy
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from torchmetrics import Metric

from lightning_hpo import distributed
from lightning_hpo.module_losses import hyperparameter_sets
from lightning_hpo.tuners.task_data import TaskData, seed_all, seed_of
from lightning_hpo.tuners.task_slope import slope

__all__ = ["TaskFit", "Utility"]

Utility = str | Callable[[Trainer, LightningModule, Any], float]
QUIET = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
    "check_val_every_n_epoch": 10**9,  # once, at the end
}


class TaskFit:
    """Trains modules for values of a hyperparameter.

    All that is random begins with a seed that follows from the task alone: weights, and once more before training the
    order of data, so that a value which takes more random numbers to build a module changes nothing else.

    Args:
        module_fn: Makes a module; it is called with the hyperparameter by name.
        hparam: The name.
        trainer_kwargs: Arguments of each Trainer; every run gets copies of callbacks and the like.
        utility: Name of a logged number, ``"neg_"`` and such a name for H less that number, or a function of Trainer,
            module and task.
        upper: H.
        seed: All other seeds follow from it.
    """

    def __init__(
        self,
        module_fn: Callable[..., LightningModule],
        hparam: str,
        trainer_kwargs: Mapping[str, Any],
        utility: Utility,
        upper: float,
        seed: int,
    ) -> None:
        self.module_fn, self.hparam, self.trainer_kwargs = module_fn, hparam, {**QUIET, **trainer_kwargs}
        self.measure, self.upper, self.seed = utility, upper, seed

    def utility(self, task: TaskData, value: float) -> float:
        """Utility of a task at a value.

        Args:
            task: The task.
            value: The value.

        Returns:
            The number, NaN if training failed in numbers.

        Raises:
            ValueError: If what is to be measured is not logged.
        """
        with self._trained(task, value) as (trainer, module):
            if callable(self.measure):
                return float(self.measure(trainer, module, task.data))
            if isinstance(task.data, LightningDataModule):
                logged = trainer.validate(module, datamodule=task.data, verbose=False)
            else:
                logged = trainer.validate(module, task.data[1], verbose=False)
        return self._read({name: number for part in logged for name, number in part.items()})

    def slope(self, task: TaskData, value: float, estimator: str, settings: Mapping[str, Any]) -> float:
        """Slope of the validation loss of a task at a value; see :func:`~lightning_hpo.tuners.task_slope.slope`.

        Args:
            task: The task.
            value: The value.
            estimator: How it is estimated.
            settings: Those of the estimator.

        Returns:
            The slope, NaN where it is not finite.
        """
        with self._trained(task, value) as (trainer, module):
            if isinstance(task.data, LightningDataModule):
                task.data.setup("validate")  # Lightning has not asked for validation data yet
                loaders: Any = trainer.train_dataloader, task.data.val_dataloader()
            else:
                loaders = task.data
            return slope(module, loaders, self.hparam, estimator, settings)

    @contextmanager
    def _trained(self, task: TaskData, value: float) -> Iterator[tuple[Trainer, LightningModule]]:
        """A module that has been trained, and seeds as they were before training."""
        with _quiet(), isolate_rng(), _prepared(task.data):
            seed = seed_of(self.seed, task.key)
            module = self._made(value, seed)
            with _prepared(module):
                yield self._fit(task, module, seed), module

    def _made(self, value: float, seed: int) -> LightningModule:
        seed_all(seed)
        module = self.module_fn(**{self.hparam: value})
        if not isinstance(module, LightningModule):
            raise TypeError(f"module_fn must return a LightningModule, got {type(module).__name__}")
        _alone(module)
        for part in hyperparameter_sets(module).values():
            if self.hparam in part.raw:
                part.raw[self.hparam].requires_grad_(False)  # it is searched for, not trained
        return module

    def _fit(self, task: TaskData, module: LightningModule, seed: int) -> Trainer:
        trainer = Trainer(**copy.deepcopy(self.trainer_kwargs), **_device(self.trainer_kwargs))
        task.rewind()
        seed_all(seed)
        if isinstance(task.data, LightningDataModule):
            trainer.fit(module, datamodule=task.data)
        else:
            trainer.fit(module, *task.data)
        if trainer.interrupted:
            raise KeyboardInterrupt
        task.rewind()
        seed_all(seed)
        return trainer

    def _read(self, logged: Mapping[str, float]) -> float:
        name = str(self.measure)
        if name in logged:
            return float(logged[name])
        lost = logged.get(name.removeprefix("neg_"), None) if name.startswith("neg_") else None
        if lost is None:
            raise ValueError(f"validation logs no {name.removeprefix('neg_')!r}, but {sorted(logged) or 'nothing'}")
        return lost if math.isnan(lost) else self.upper - min(max(lost, 0.0), self.upper)


def _device(trainer_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """One device a run: that of this process where there are several."""
    if "devices" in trainer_kwargs:
        return {}
    cuda = torch.cuda.is_available() and trainer_kwargs.get("accelerator", "auto") in ("auto", "gpu", "cuda")
    return {"devices": [torch.cuda.current_device()] if cuda and distributed.world_size() > 1 else 1}


def _alone(module: LightningModule) -> None:
    """Other ranks train on other tasks, so metrics must not be summed with theirs."""
    for part in module.modules():
        if isinstance(part, Metric):
            part.distributed_available_fn = _never


def _never() -> bool:
    return False


@contextmanager
def _prepared(owner: Any) -> Iterator[None]:
    """Hides ``prepare_data``, which has been called: Lightning would have all ranks wait there in every run."""
    base = LightningDataModule if isinstance(owner, LightningDataModule) else LightningModule
    if not isinstance(owner, base) or distributed.world_size() == 1:
        yield
        return
    if isinstance(owner, LightningModule):
        owner.prepare_data()
    owner.prepare_data = MethodType(base.prepare_data, owner)  # type: ignore[method-assign]
    try:
        yield
    finally:
        del owner.prepare_data


@contextmanager
def _quiet() -> Iterator[None]:
    """A hundred Trainers need not each say which devices there are."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(max(logger.getEffectiveLevel(), logging.WARNING))
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
