"""One hyperparameter tuned over many tasks, each cell a short run of a Trainer."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule

from lightning_hpo import distributed
from lightning_hpo.callbacks.base import MethodCallback
from lightning_hpo.functional.bilevel.data_driven_tuning import Refine, grid_between, tune_over_tasks
from lightning_hpo.tuners.task_data import Task, TaskData, task_data
from lightning_hpo.tuners.task_fit import TaskFit, Utility
from lightning_hpo.tuners.task_report import TaskDistributionResult
from lightning_hpo.tuners.task_slope import SLOPES
from lightning_hpo.tuners.task_state import CellFile

__all__ = ["TaskDistributionTuner"]

ACCURACIES = ("val_accuracy", "val_acc")
STATE = "tuner_state.json"


class TaskDistributionTuner:
    r"""Tunes a hyperparameter on past tasks, for tasks to come, and says how many past tasks are enough.

    Every task is trained on with every value of a grid, then with values around the best; what is returned is the value
    of the largest mean utility, :math:`\hat\alpha = \arg\max_\alpha \frac1m \sum_i u_\alpha(x_i)`, with all utilities
    and the bounds that follow. Seeds and the order of data follow from the task alone, so that values are compared with
    the same random numbers.

    Inside a process group, which you start, each rank takes the tasks whose number is its own modulo the number of
    ranks; make the tuner and run it on all of them. The answer does not depend on their number.

    Args:
        tasks: At least 2 data modules or pairs of training and validation loaders, drawn independently.
        module_fn: Makes a module; it is called with the hyperparameter by name, so a class will do.
        hparam: The name.
        low: Smallest value.
        high: Largest value.
        log: Whether the grid is even in the logarithm.
        n_grid: Values of the grid.
        refine: ``"golden"`` or ``"bisect"``, as for
            :func:`~lightning_hpo.functional.bilevel.data_driven_tuning.tune_over_tasks`; the grid alone where None.
        refine_steps: Values of the golden section, or rounds of bisection.
        slope: How to estimate slopes of the validation loss for a last phase, one of
            :data:`~lightning_hpo.tuners.task_slope.SLOPES`; no such phase where None. The module must hold the
            hyperparameter in a :class:`~lightning_hpo.HyperparameterSet`, which is kept from training.
        slope_steps: Its steps.
        slope_args: Settings of the estimator.
        utility: Name of a number that validation logs, ``"neg_"`` and such a name for H less that number, clipped to
            0 and H, or a function of Trainer, module and task. NaN means that a cell has failed.
        upper: H; 1 for accuracies.
        trainer_kwargs: Arguments of every Trainer, on one device. Validation runs once, after training, unless
            ``check_val_every_n_epoch`` says otherwise.
        held_out: Other tasks, to judge the best value by.
        dirpath: Folder of ``tuner_state.json``, where finished cells are kept; a search that finds it goes on from
            there. Nothing is kept where None.
        keys: Names of the tasks, in place of those made from their data.
        held_out_keys: Likewise.
        seed: All seeds follow from it.

    Raises:
        ValueError: If an argument is wrong; all are listed.
        TypeError: If a task is neither a data module nor a pair.

    References:
        Balcan, Nguyen and Sharma, "Sample complexity of data-driven tuning of model hyperparameters in neural networks
        with structured parameter-dependent dual function", NeurIPS 2025.

    Example:
        >>> from torch.utils.data import DataLoader
        >>> class Shrunk(LightningModule):
        ...     def __init__(self, decay):
        ...         super().__init__()
        ...         self.decay, self.mean = decay, torch.nn.Parameter(torch.zeros(()))
        ...     def training_step(self, batch, batch_idx):
        ...         return (batch - self.mean).square().mean() + self.decay * self.mean.square()
        ...     def validation_step(self, batch, batch_idx):
        ...         self.log("val_loss", (batch - self.mean).square().mean())
        ...     def configure_optimizers(self):
        ...         return torch.optim.SGD(self.parameters(), lr=0.5 / (1 + self.decay))
        >>> tasks = [(DataLoader(torch.tensor([high])), DataLoader(torch.tensor([1.0]))) for high in (1.4, 1.5, 1.6)]
        >>> tuner = TaskDistributionTuner(
        ...     tasks, Shrunk, "decay", 0.0, 1.0, n_grid=5, refine=None, utility="neg_val_loss", upper=1.0,
        ...     trainer_kwargs={"max_epochs": 1, "accelerator": "cpu"},
        ... )
        >>> result = tuner.run()
        >>> result.best, result.tasks_needed(eps=0.1)
        (0.5, 265)
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        module_fn: Callable[..., LightningModule],
        hparam: str,
        low: float,
        high: float,
        *,
        log: bool = False,
        n_grid: int = 9,
        refine: Refine | None = "golden",
        refine_steps: int = 4,
        slope: str | None = None,
        slope_steps: int = 20,
        slope_args: Mapping[str, Any] | None = None,
        utility: Utility = "val_accuracy",
        upper: float | None = None,
        trainer_kwargs: Mapping[str, Any] | None = None,
        held_out: Sequence[Task] = (),
        dirpath: str | Path | None = None,
        keys: Sequence[str] | None = None,
        held_out_keys: Sequence[str] | None = None,
        seed: int = 0,
    ) -> None:
        trainer_kwargs = dict(trainer_kwargs or {})
        problems = [] if len(tasks) > 1 else [f"at least 2 tasks are needed, got {len(tasks)}"]
        problems += _trainer_problems(trainer_kwargs)
        if slope is not None and slope not in SLOPES:
            problems.append(f"slope must be one of {', '.join(SLOPES)}, or None, got {slope!r}")
        if upper is None and utility not in ACCURACIES:
            problems.append(f"upper, the largest utility there can be, must be given with utility={utility!r}")
        try:
            self.grid = grid_between(low, high, n_grid, log=log)
        except ValueError as error:
            problems.append(str(error))
        if problems:
            raise ValueError("; ".join(problems))
        self.tasks, self.held_out = task_data(tasks, keys), task_data(held_out, held_out_keys)
        unnamed = [task.key for task in (*self.tasks, *self.held_out) if not task.named]
        if unnamed and (dirpath is not None or held_out):
            raise ValueError(
                f"what is in {', '.join(unnamed)} cannot be read, so that finished cells may belong to other tasks and "
                "tasks may be held out that were tuned on: give keys and held_out_keys"
            )
        self.upper = 1.0 if upper is None else upper
        self.fit = TaskFit(module_fn, hparam, trainer_kwargs, utility, self.upper, seed)
        self.slope, self.slope_args = slope, dict(slope_args or {})
        self.dirpath = None if dirpath is None else Path(dirpath)
        self.hparam, self.log = hparam, log
        self._search: dict[str, Any] = {
            "log": log,
            "refine": refine,
            "refine_steps": refine_steps,
            "slope_steps": slope_steps,
            "upper": self.upper,
        }
        self._file = CellFile(None, {})

    def run(self) -> TaskDistributionResult:
        """Searches, on all ranks alike.

        Returns:
            The best value and what is known of all others.

        Raises:
            ValueError: If a utility is out of range, more than a fifth of the cells failed, a task is both tuned on and
                held out, or finished cells belong to another search.
        """
        self._file = CellFile(None if self.dirpath is None else self.dirpath / STATE, self.settings())
        tuning = tune_over_tasks(
            self.tasks,
            self._utility,
            self.grid,
            slope=None if self.slope is None else self._slope,
            held_out=self.held_out,
            keys=[task.key for task in self.tasks],
            held_out_keys=[task.key for task in self.held_out],
            run=_spread,
            **self._search,
        )
        self._file.join(tuning.cells or {})
        return TaskDistributionResult.of(tuning, self.hparam, self.log, [task.key for task in self.tasks])

    def settings(self) -> dict[str, Any]:
        """What a cell depends on besides its task and value, in plain types.

        Returns:
            The settings by name. Of functions and objects only names are known.
        """
        return {
            "module_fn": _plain(self.fit.module_fn),
            "hparam": self.hparam,
            "trainer_kwargs": _plain(self.fit.trainer_kwargs),
            "utility": _plain(self.fit.measure),
            "upper": self.upper,
            "seed": self.fit.seed,
            "slope": [self.slope, _plain(self.slope_args)],
        }

    def _utility(self, task: TaskData, value: float) -> float:
        return self._cell(f"{task.key}@{value!r}", lambda: self.fit.utility(task, value))

    def _slope(self, task: TaskData, value: float) -> float:
        return self._cell(
            f"slope {task.key}@{value!r}", lambda: self.fit.slope(task, value, str(self.slope), self.slope_args)
        )

    def _cell(self, name: str, evaluate: Callable[[], float]) -> float:
        """A number that the file knew when the search began, or a new one."""
        if name in self._file.known:
            known = self._file.known[name]
            return math.nan if known is None else known
        found = evaluate()
        self._file.record(name, None if math.isnan(found) else found)
        return found


def _spread(function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[float]:
    """Runs a function of pairs of task and value where the task belongs; every rank gets all answers."""
    ranks, items = distributed.world_size(), list(items)
    if ranks == 1:
        yield from map(function, items)  # one by one, so that what is finished is kept
        return
    mine = torch.zeros(len(items), dtype=torch.float64, device=distributed.device())
    error: Exception | None = None
    try:
        for index, (task, value) in enumerate(items):
            if task.place % ranks == distributed.rank():
                mine[index] = function((task, value))
    except Exception as raised:
        error = raised
    if not distributed.agree(error is None, mine.device):  # nobody waits for one that has failed
        raise error or RuntimeError("a cell has failed on another rank, which says why")
    answers = distributed.gather(mine).tolist()
    yield from (answers[task.place % ranks][index] for index, (task, _) in enumerate(items))


def _trainer_problems(trainer_kwargs: Mapping[str, Any]) -> list[str]:
    devices = trainer_kwargs.get("devices", 1)
    single = devices in (1, "1") or (isinstance(devices, list | tuple) and len(devices) == 1)
    problems = [] if single else [f"each task is trained on one device, got devices={devices!r}"]
    if trainer_kwargs.get("num_nodes", 1) != 1:
        problems.append(f"each task is trained on one node, got num_nodes={trainer_kwargs['num_nodes']!r}")
    if trainer_kwargs.get("strategy", "auto") not in ("auto", "single_device"):
        problems.append(f"tasks are spread over ranks, not batches, got strategy={trainer_kwargs['strategy']!r}")
    callbacks = trainer_kwargs.get("callbacks") or []
    for callback in callbacks if isinstance(callbacks, list | tuple) else [callbacks]:
        if isinstance(callback, MethodCallback) and distributed.world_size() > 1:
            problems.append(f"{type(callback).__name__} would average over ranks, which train on other tasks")
    return problems


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, Mapping):
        return {str(name): _plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if hasattr(value, "func") and hasattr(value, "keywords"):  # functools.partial
        return [_plain(value.func), _plain(value.args), _plain(value.keywords)]
    kind = value if hasattr(value, "__qualname__") else type(value)
    return f"{kind.__module__}.{kind.__qualname__}"
