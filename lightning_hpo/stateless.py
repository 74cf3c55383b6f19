"""A module's loss as a function of its parameters, and what single samples contribute to its gradient."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_hpo.functional.batching.vmap_statistics import PerSampleStatistics, per_sample_statistics
from lightning_hpo.functional.losses import scalar_of
from lightning_hpo.nn.per_sample import PerSampleGradients

__all__ = [
    "PerSampleGradients",
    "PerSampleStatistics",
    "Recorder",
    "batch_mixing_layers",
    "call_step",
    "loss_of",
    "muted",
    "per_sample_statistics",
]


def batch_mixing_layers(module: nn.Module) -> list[str]:
    """Layers that make the loss of one sample depend on the others, as the module is now: in train mode or not.

    Args:
        module: Any module.

    Returns:
        Names of batch norms, with those of other ranks and those derived from them, that use the batch's statistics.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        >>> batch_mixing_layers(net), batch_mixing_layers(net.eval())
        (['1'], [])
    """
    norms = [(name, norm) for name, norm in module.named_modules() if isinstance(norm, nn.modules.batchnorm._BatchNorm)]
    return [name for name, norm in norms if norm.training or norm.running_mean is None]


def loss_of(module: nn.Module, method: str = "training_step") -> Callable[..., Tensor]:
    """The loss as a function of the parameters, through :func:`torch.func.functional_call`.

    The method runs on a shallow copy whose ``log``, ``log_dict`` and ``print`` do nothing and whose own metrics of
    torchmetrics count nothing; the user's module keeps its attributes, hooks and metrics.

    Args:
        module: The user's module.
        method: Its method that takes a batch and returns a loss, or a mapping with one under ``"loss"``.

    Returns:
        A function ``(params, batch, *args)`` that returns a scalar. Names that ``params`` lacks keep their values. A
        second argument that has no default is 0 unless given.

    Raises:
        ValueError: If the module has no such method.

    Example:
        >>> class Net(nn.Linear):
        ...     def training_step(self, batch, batch_idx):
        ...         self.log("batch_idx", batch_idx)
        ...         return self(batch).sum()
        >>> loss = loss_of(Net(1, 1))
        >>> loss({"weight": torch.tensor([[2.0]]), "bias": torch.tensor([1.0])}, torch.tensor([[3.0]]))
        tensor(7.)
    """
    if not callable(getattr(module, method, None)):
        raise ValueError(f"`{type(module).__name__}` has no method `{method}`")
    step = _Step(muted(module), method)
    filling = (0,) if _takes_index(getattr(module, method)) else ()

    def loss(params: Mapping[str, Tensor], batch: Any, *args: Any) -> Tensor:
        inside = {f"module.{name}": value for name, value in params.items()}
        found = torch.func.functional_call(step, inside, (batch, *(args or filling)))
        return scalar_of(found["loss"] if isinstance(found, Mapping) else found, f"the loss of `{method}`")

    return loss


class _Step(nn.Module):
    """`functional_call` calls `forward`; this one calls another method."""

    def __init__(self, module: nn.Module, method: str) -> None:
        super().__init__()
        self.module, self.method = module, method

    def forward(self, *args: Any) -> Any:
        return getattr(self.module, self.method)(*args)


class _Deaf(nn.Module):
    """Stands where a metric was: a metric would keep tensors of a pass that is over."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return torch.zeros(())

    update = compute = reset = forward


class Recorder:
    """Takes the place of a module's logging and keeps what is logged, gradients and all.

    Attributes:
        logged: What was logged, by name.

    Example:
        >>> recorder = Recorder()
        >>> recorder.log("val_loss", torch.tensor(1.0), prog_bar=True)
        >>> recorder.logged
        {'val_loss': tensor(1.)}
    """

    def __init__(self) -> None:
        self.logged: dict[str, Any] = {}

    def log(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        """Keeps one value."""
        self.logged[name] = value

    def log_dict(self, dictionary: Mapping[str, Any], *args: Any, **kwargs: Any) -> None:
        """Keeps several values."""
        self.logged.update(dictionary)


def muted(module: nn.Module, recorder: Recorder | None = None) -> nn.Module:
    """A shallow copy of a module that logs and prints nothing and whose metrics of torchmetrics count nothing.

    Args:
        module: The user's module.
        recorder: What keeps that which would be logged; nothing does where None.

    Returns:
        A module with the same parameters, buffers, children and attributes.

    Example:
        >>> net = nn.Linear(1, 1)
        >>> muted(net).weight is net.weight
        True
    """
    copy = object.__new__(type(module))
    copy.__dict__.update(module.__dict__)
    copy.__dict__.update(dict.fromkeys(("log", "log_dict", "print"), _nothing))
    if recorder is not None:
        copy.__dict__.update({"log": recorder.log, "log_dict": recorder.log_dict})
    copy.__dict__["_modules"] = {name: _deafened(child) for name, child in module._modules.items()}
    return copy


def _deafened(module: nn.Module | None) -> nn.Module | None:
    """A module in whose place metrics count nothing: itself where there is none in it."""
    if module is None or not any(map(_is_metric, module.modules())):
        return module
    if _is_metric(module):
        return _Deaf()
    copy: nn.Module = object.__new__(type(module))
    copy.__dict__.update(module.__dict__)
    copy.__dict__["_modules"] = {name: _deafened(child) for name, child in module._modules.items()}
    return copy


def call_step(module: nn.Module, method: str, batch: Any) -> Any:
    """Calls ``training_step`` or its like; a second argument, whatever its name, is 0.

    Args:
        module: The module.
        method: Name of the method.
        batch: What it is given.

    Returns:
        What it returns.

    Example:
        >>> class Net(nn.Linear):
        ...     def training_step(self, batch, batch_idx):
        ...         return batch + batch_idx
        >>> call_step(Net(1, 1), "training_step", 5)
        5
    """
    step = getattr(module, method)
    return step(batch, 0) if _takes_index(step) else step(batch)


def _takes_index(step: Callable[..., Any]) -> bool:
    """Whether a step wants the number of the batch, under whatever name."""
    second = list(inspect.signature(step).parameters.values())[1:2]
    return any(p.kind is p.POSITIONAL_OR_KEYWORD and (p.name == "batch_idx" or p.default is p.empty) for p in second)


def _is_metric(module: nn.Module | None) -> bool:
    return any(kind.__module__.startswith("torchmetrics.") for kind in type(module).__mro__)


def _nothing(*args: Any, **kwargs: Any) -> None:
    pass
