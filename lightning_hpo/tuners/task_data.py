"""Tasks of a distribution as Lightning holds them: what is in their data, and the same randomness every time."""

import hashlib
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Generator, Tensor
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_hpo import distributed
from lightning_hpo.functional.bilevel.task_keys import task_key

__all__ = ["Task", "TaskData", "seed_all", "seed_of", "task_data"]

Task = LightningDataModule | tuple[Any, Any]
SAMPLES = 512  # of a data set that is no `TensorDataset`, evenly spaced


@dataclass(frozen=True, eq=False)
class TaskData:
    """A task and what must be known to train on it again.

    Args:
        place: Its number in the list.
        key: Its name.
        data: A data module, or what a Trainer takes for training and for validation.
        named: Whether the name says what is in the data.
        generators: Those of its loaders, each with its first state.
    """

    place: int
    key: str
    data: Task
    named: bool
    generators: tuple[tuple[Generator, Tensor], ...]

    def rewind(self) -> None:
        """Takes the generators of its loaders back, so that batches come in the same order again."""
        for generator, state in self.generators:
            generator.set_state(state)


def task_data(tasks: Sequence[Task], keys: Sequence[str] | None = None) -> list[TaskData]:
    """Names tasks by what is in them; a collective where there are several ranks.

    A ``TensorDataset`` is read as a whole, of other data sets 512 samples. Data modules prepare their data and are set
    up for it, unless names are given.

    Args:
        tasks: Data modules, or pairs of loaders.
        keys: Names instead.

    Returns:
        The tasks; one whose contents cannot be read is named by its place.

    Raises:
        ValueError: If there is not one name a task.
        TypeError: If something is no task.

    Example:
        >>> loader = DataLoader(TensorDataset(torch.zeros(2)))
        >>> [task] = task_data([(loader, loader)])
        >>> len(task.key), task.named
        (16, True)
    """
    if keys is not None and len(keys) != len(tasks):
        raise ValueError(f"there must be one key a task: {len(tasks)}, got {len(keys)}")
    wrong = [
        f"task {place} must be a LightningDataModule or a pair of loaders, got {type(task).__name__}"
        for place, task in enumerate(tasks)
        if not isinstance(task, LightningDataModule) and not (isinstance(task, tuple) and len(task) == 2)
    ]
    if wrong:
        raise TypeError("; ".join(wrong))
    if distributed.rank() == 0:  # others wait, so that nothing is downloaded twice
        _prepare(tasks)
    distributed.agree(True, distributed.device())
    if distributed.rank() > 0:
        _prepare(tasks)  # for those of another machine
    found = []
    for place, task in enumerate(tasks):
        key = keys[place] if keys is not None else _key(task)
        loaders = task if isinstance(task, tuple) else ()
        states = tuple((generator, generator.get_state()) for generator in _generators(loaders))
        found.append(TaskData(place, key or f"task {place}", task, key is not None, states))
    return found


def seed_of(seed: int, key: str) -> int:
    """A seed for a task, wherever in a list it stands.

    Args:
        seed: That of the search.
        key: The task's name.

    Returns:
        32 bits.

    Example:
        >>> seed_of(0, "a") == seed_of(0, "a") != seed_of(1, "a")
        True
    """
    return int.from_bytes(hashlib.sha256(f"{seed} {key}".encode()).digest()[:4], "big")


def seed_all(seed: int) -> None:
    """Seeds Python, NumPy and torch, and leaves the environment alone, which processes to come would read.

    Args:
        seed: 32 bits.

    Example:
        >>> seed_all(7)
        >>> first = torch.rand(1)
        >>> seed_all(7)
        >>> torch.equal(torch.rand(1), first)
        True
    """
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - data sets of others draw from it
    torch.manual_seed(seed)


def _prepare(tasks: Sequence[Task]) -> None:
    for task in tasks:
        if isinstance(task, LightningDataModule):
            task.prepare_data()


def _key(task: Task) -> str | None:
    with isolate_rng():
        seed_all(0)  # samples may be augmented at random
        if isinstance(task, tuple):
            return task_key([_contents(part) for part in task]) if _readable(task) else None
        task.setup("fit")
        pair = (task.train_dataloader(), task.val_dataloader())
        found = task_key([_contents(part) for part in pair]) if _readable(pair) else None
        task.teardown("fit")
        return found


def _readable(loaders: Any) -> bool:
    if isinstance(loaders, list | tuple):
        return all(map(_readable, loaders))
    data = getattr(loaders, "dataset", None)
    return isinstance(loaders, DataLoader) and not isinstance(data, IterableDataset) and hasattr(data, "__len__")


def _contents(loaders: Any) -> Any:
    if isinstance(loaders, list | tuple):
        return [_contents(loader) for loader in loaders]
    data = loaders.dataset
    if isinstance(data, TensorDataset):
        return list(data.tensors)
    places = np.unique(np.linspace(0, len(data) - 1, min(len(data), SAMPLES)).astype(int)).tolist()
    return [len(data), *(_plain(data[place]) for place in places)]


def _plain(value: Any) -> Any:
    """Arrays, pictures and graphs as what `task_key` can read."""
    if isinstance(value, Tensor | str | bytes | bool | int | float) or value is None:
        return value
    if callable(getattr(value, "to_dict", None)):
        value = value.to_dict()
    if isinstance(value, Mapping):
        return {name: _plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return torch.as_tensor(np.array(value)) if hasattr(value, "__array__") else value


def _generators(loaders: Any) -> Iterator[Generator]:
    if isinstance(loaders, list | tuple):
        for loader in loaders:
            yield from _generators(loader)
    elif isinstance(loaders, DataLoader):
        holders = [loaders, loaders.sampler, getattr(loaders.batch_sampler, "sampler", None)]
        found = [getattr(holder, "generator", None) for holder in holders]
        yield from {id(generator): generator for generator in found if isinstance(generator, Generator)}.values()
