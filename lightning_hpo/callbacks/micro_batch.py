"""The largest micro-batch that fits into memory, found before training starts."""

import copy
import gc
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from itertools import islice
from typing import Any, ClassVar

import torch
from lightning.fabric.utilities.apply_func import apply_to_collection
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.compile import to_uncompiled
from lightning.pytorch.utilities.memory import is_oom_error
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.seed import isolate_rng
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, IterableDataset
from typing_extensions import override

from lightning_hpo import distributed
from lightning_hpo.callbacks.base import MethodCallback
from lightning_hpo.functional.arguments import is_whole
from lightning_hpo.functional.batching.micro_batch import largest_fitting

__all__ = ["MicroBatchFinder"]

_FAILED_ALLOCATIONS = ("out of memory", "can't allocate memory", "_STATUS_ALLOC_FAILED")
_UNKNOWN_STATE = 2.0  # what an optimizer that cannot be tried out is taken to keep: two numbers a parameter


class MicroBatchFinder(MethodCallback):
    """Finds the largest batch of one forward and backward pass that fits into this device's memory.

    When training starts, it runs your ``training_step`` and the backward pass on the first samples of the training
    set, repeated to larger and larger batches, beside memory for the gradients and for what the optimizer will keep,
    until one does not fit. On several ranks the answer is the same everywhere: what fits on all of them. Nothing of
    these trials stays: they run on a copy of the module that shares the parameters, without logging, and random
    numbers, gradients, buffers and the loader are as before. What ``training_step`` writes elsewhere (files, the
    logger's own object, parameters changed in place) it writes in the trials too.

    It only reports: :attr:`micro_batch_size` is there once ``on_train_start`` has run, for callbacks further down the
    list. A resumed run keeps the size of its checkpoint.

    Args:
        max_size: Largest size to try; by default, and at most, what a rank has of the training set.
        start: First size to try.
        margin: Share of the largest batch to keep free: a size is taken to fit if one larger by that much does.
        steps_per_trial: Forward and backward passes of each trial.
        refine: Whether to search on between the last power of two that fits and the first that does not.

    Attributes:
        micro_batch_size: The size found; None before.

    Raises:
        ValueError: If an argument is out of range; all are listed.

    Example:
        >>> from lightning_hpo.testing import TinyClassifier, TinyImages, tiny_trainer
        >>> finder = MicroBatchFinder(max_size=32)
        >>> tiny_trainer(finder, max_steps=1).fit(TinyClassifier(), TinyImages())
        >>> finder.micro_batch_size
        32
    """

    KNOB: ClassVar[str] = "largest batch that fits into memory"
    _STATE = ("micro_batch_size",)

    def __init__(
        self,
        max_size: int | None = None,
        start: int = 1,
        margin: float = 0.1,
        steps_per_trial: int = 1,
        refine: bool = False,
    ) -> None:
        super().__init__()
        checks = {
            f"start must be a positive integer, got {start!r}": is_whole(start, 1),
            f"max_size must be an integer of at least start, got {max_size!r}": max_size is None
            or (is_whole(max_size, 1) and max_size >= start),
            f"margin must be at least 0 and below 1, got {margin!r}": 0 <= margin < 1,
            f"steps_per_trial must be a positive integer, got {steps_per_trial!r}": is_whole(steps_per_trial, 1),
        }
        if problems := [problem for problem, fine in checks.items() if not fine]:
            raise ValueError(f"`MicroBatchFinder`: {'; '.join(problems)}.")
        self.max_size, self.start, self.margin = max_size, start, margin
        self.steps_per_trial, self.refine = steps_per_trial, refine
        self.micro_batch_size: int | None = None

    @override
    def hyperparameters(self) -> dict[str, float | list[float]]:
        """The size, once it is known."""
        return {} if self.micro_batch_size is None else {"micro_batch_size": float(self.micro_batch_size)}

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuses what cannot be tried out, and forgets the size of an earlier run."""
        if stage != "fit":
            return
        self.require_automatic_optimization(pl_module)
        self.refuse_sharded_strategy(trainer)
        if is_param_in_hook_signature(pl_module.training_step, "dataloader_iter", explicit=True):
            self.raise_all(["`training_step(dataloader_iter)` draws its own batches; take `batch` instead."])
        self.micro_batch_size = None  # a checkpoint is read after this

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Searches, unless a checkpoint brought the size."""
        self.restore_pending()
        if self.micro_batch_size is not None:
            return
        with isolate_rng(include_cuda=pl_module.device.type == "cuda"):
            make_batch, maximum = self._source(trainer, pl_module)
            tried: dict[int, bool] = {}

            def fits(size: int) -> bool:
                trial = int(size / (1 - self.margin) + 1e-9)
                fine = self._runs(trainer, pl_module, lambda: make_batch(trial))
                tried[size] = distributed.agree(fine, pl_module.device)
                return tried[size]

            try:
                size = largest_fitting(fits, min(self.start, maximum), maximum, refine=self.refine)
            except ValueError:
                if tried.get(1, True):
                    raise  # from the user's training step
                self.raise_all(["not even one sample fits into memory; use a smaller model or a lower precision."])
        self.micro_batch_size = size
        rank_zero_info(f"`MicroBatchFinder`: micro-batches of {size} samples fit.")

    # Samples: read from the data set, so that the loader's workers, samplers and position are left alone

    def _source(self, trainer: Trainer, pl_module: LightningModule) -> tuple[Callable[[int], Any], int]:
        """Makes batches of a size from the first samples, and the largest size worth a trial."""
        loader: Any = trainer.train_dataloader
        if isinstance(loader, (Mapping, list, tuple)):
            self.raise_all(["there are several training loaders, and which batch to size is unclear; use one."])
        length = math.inf
        if isinstance(loader, DataLoader) and (loader.batch_size is not None or loader.batch_sampler is not None):
            make_batch = self._collated(loader)
            if not isinstance(loader.dataset, IterableDataset):
                length = -(-len(loader.dataset) // trainer.world_size)  # type: ignore[arg-type]
        else:
            make_batch = _resizer(self._first_batch(loader), self.raise_all)
        maximum = min(self.max_size or math.inf, length)
        if math.isinf(maximum):
            self.raise_all(["the training set has no length, so the search has no end; set `max_size`."])
        return make_batch, int(distributed.minimum(torch.tensor(int(maximum), device=pl_module.device)).item())

    def _collated(self, loader: DataLoader[Any]) -> Callable[[int], Any]:
        """Makes batches as the loader does of the samples of its first batch."""
        data: Any = loader.dataset
        count = loader.batch_size or getattr(loader.batch_sampler, "batch_size", None) or 1
        together = getattr(data, "__getitems__", None)  # which may give something else than a list of samples
        if isinstance(data, IterableDataset):
            samples = list(islice(self._fresh(data), count))
        else:
            known = range(min(count, len(data)))
            samples = list(known) if callable(together) else [data[index] for index in known]
        if not samples:
            self.raise_all(["the training set is empty."])

        def make_batch(size: int) -> Any:
            chosen = [samples[index % len(samples)] for index in range(size)]
            whole = callable(together) and not isinstance(data, IterableDataset)
            return loader.collate_fn(together(chosen) if whole else chosen)  # type: ignore[misc]

        return make_batch

    def _first_batch(self, loader: Any) -> Any:
        """The first batch of a loader whose data set gives whole batches, or that is no ``DataLoader``."""
        if not isinstance(loader, DataLoader):
            return next(self._fresh(loader))
        data: Any = loader.dataset
        return loader.collate_fn(next(self._fresh(data)) if isinstance(data, IterableDataset) else data[0])

    def _fresh(self, source: Iterable[Any]) -> Iterator[Any]:
        iterator = iter(source)
        if iterator is source:
            name = type(source).__name__
            self.raise_all([f"`{name}` can be read only once, so a trial would use up its first samples."])
        return iterator

    # A trial

    def _runs(self, trainer: Trainer, pl_module: LightningModule, make_batch: Callable[[], Any]) -> bool:
        """Whether a trial gets through; leaves no trace."""
        kept = [(parameter, parameter.grad) for parameter in pl_module.parameters()]
        fine = True
        try:
            self._run(trainer, pl_module, make_batch)
        except (RuntimeError, MemoryError) as error:
            if not _out_of_memory(error):
                raise
            fine = False
        finally:
            for parameter, gradient in kept:
                parameter.grad = gradient
        if not fine:  # the frames of the error held on to what they had
            gc.collect()
        if pl_module.device.type == "cuda":
            torch.cuda.empty_cache()
        return fine

    def _run(self, trainer: Trainer, pl_module: LightningModule, make_batch: Callable[[], Any]) -> None:
        room = [torch.empty(_state_bytes(o), dtype=torch.uint8, device=pl_module.device) for o in trainer.optimizers]
        for parameter in pl_module.parameters():
            if parameter.requires_grad:  # while micro-batches accumulate, the gradients are there all the time
                parameter.grad = torch.zeros_like(parameter)
        twin = self._twin(trainer, pl_module)
        indexed = is_param_in_hook_signature(twin.training_step, "batch_idx", min_args=2)
        for step in range(self.steps_per_trial):
            batch = _on_device(trainer, twin, make_batch())
            with trainer.precision_plugin.train_step_context():
                output = twin.training_step(batch, step) if indexed else twin.training_step(batch)
            loss: Any = output.get("loss") if isinstance(output, Mapping) else output
            if not isinstance(loss, Tensor):
                self.raise_all([f"`{type(pl_module).__name__}.training_step` gave no loss for the first samples."])
            twin.backward(loss)
        del room

    def _twin(self, trainer: Trainer, pl_module: LightningModule) -> LightningModule:
        """A copy that shares parameters, whose logging goes nowhere."""
        shared = (*pl_module.parameters(), trainer, trainer.datamodule, trainer.strategy, *trainer.loggers)  # type: ignore[attr-defined]
        try:
            twin = copy.deepcopy(pl_module, {id(thing): thing for thing in shared if thing is not None})
        except Exception as error:
            if _out_of_memory(error):
                raise
            self.raise_all([f"`{type(pl_module).__name__}` cannot be copied for a trial: {error}"])
        with suppress(ValueError):  # it was not compiled
            twin = to_uncompiled(twin)
        twin.trainer = trainer
        for part in twin.modules():
            if isinstance(part, LightningModule):
                vars(part).update(log=_nowhere, log_dict=_nowhere)
        return twin


def _nowhere(*args: Any, **kwargs: Any) -> None:
    """Takes the place of ``log`` and ``log_dict``."""


def _on_device(trainer: Trainer, module: LightningModule, batch: Any) -> Any:
    """What Lightning does to a batch on its way to ``training_step``."""
    data = trainer.datamodule  # type: ignore[attr-defined]

    def hook(name: str) -> Callable[..., Any]:
        return getattr(data if data is not None and is_overridden(name, data) else module, name)

    batch = hook("on_before_batch_transfer")(trainer.precision_plugin.convert_input(batch), 0)
    batch = hook("transfer_batch_to_device")(batch, trainer.strategy.root_device, 0)
    return hook("on_after_batch_transfer")(batch, 0)


def _resizer(batch: Any, refuse: Callable[[list[str]], None]) -> Callable[[int], Any]:
    """Repeats or truncates the samples of a batch: every tensor whose length is that of the first one."""
    lengths: list[int] = []
    apply_to_collection(batch, Tensor, lambda leaf: lengths.extend(leaf.shape[:1]))
    if not lengths:
        refuse(["the training batch holds no tensor whose samples could be repeated."])

    def resized(size: int) -> Any:
        def pick(leaf: Tensor) -> Tensor:
            samples = leaf.shape[:1] == (lengths[0],)
            return leaf[torch.arange(size, device=leaf.device) % lengths[0]] if samples else leaf

        return apply_to_collection(batch, Tensor, pick)

    return resized


def _state_bytes(optimizer: Optimizer) -> int:
    """What an optimizer will keep from its first step on, judged by what it keeps for a small parameter."""
    if optimizer.state:
        return 0
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    probe = nn.Parameter(torch.zeros(16, 16, device=parameters[0].device if parameters else "cpu"))
    probe.grad = torch.zeros_like(probe)
    ratio = _UNKNOWN_STATE
    with suppress(Exception):  # an optimizer may want more than its settings
        small = copy.copy(optimizer)
        small.param_groups = [{**optimizer.param_groups[0], "params": [probe]}]
        small.state = defaultdict(dict)
        small.step()
        kept = [value for value in small.state[probe].values() if isinstance(value, Tensor) and value.ndim]
        ratio = sum(value.numel() for value in kept) / probe.numel()
    return int(ratio * sum(p.numel() * p.element_size() for p in parameters))


def _out_of_memory(error: BaseException) -> bool:
    known = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or is_oom_error(error)
    return known or (isinstance(error, RuntimeError) and any(text in str(error) for text in _FAILED_ALLOCATIONS))
