"""A module's training and validation loss as pure functions of its parameters and of hyperparameters."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_hpo.functional.losses import scalar_of
from lightning_hpo.hyper import HyperparameterSet
from lightning_hpo.stateless import Recorder, call_step, muted

__all__ = ["ModuleLoss", "ModuleLosses", "NoLossError", "hyperparameter_sets", "twice_differentiable"]

_LOGGED = ("val_loss", "val/loss", "valid_loss", "validation_loss")
ModuleLoss = Callable[[Any, Any], Tensor]
PureLoss = Callable[[dict[str, Tensor], dict[str, Tensor]], Tensor]


class NoLossError(ValueError):
    """A module gives no loss to look at; the message says how to."""


def hyperparameter_sets(module: nn.Module) -> dict[str, HyperparameterSet]:
    """Sets of hyperparameters inside a module.

    Args:
        module: Any module.

    Returns:
        The sets by their names in the module.

    Example:
        >>> from lightning_hpo import Positive
        >>> net = nn.Linear(1, 1)
        >>> net.hypers = HyperparameterSet(decay=Positive(0.1))
        >>> list(hyperparameter_sets(net))
        ['hypers']
    """
    return {name: part for name, part in module.named_modules() if isinstance(part, HyperparameterSet)}


class ModuleLosses:
    """Losses of a LightningModule, or of any module with ``training_step``, as functions ``(params, hparams)``.

    Every call of one loss is the same function: buffers are copies, random numbers (dropout) begin where they stand,
    and nothing is logged; the module is not changed. The validation loss sees the module in eval mode.

    The validation loss is, in this order: what is given; the module's ``outer_loss(batch)``; what ``validation_step``
    returns, or its entry ``"loss"``; what ``validation_step`` logs as ``val_loss``. The training loss is what is given,
    the module's ``inner_loss(batch)``, or that of ``training_step``.

    Args:
        module: The module.
        sets: Sets of hyperparameters by name, inside the module or not.
        train_loss: A function ``(module, batch)``.
        val_loss: A function ``(module, batch)``, or the name under which ``validation_step`` logs the loss.
        context: Entered around every call, for autocast.
        outer: Names of parameters of the module that count as hyperparameters.

    Attributes:
        params: Trainable parameters of the module by name, without hyperparameters.
        hparams: Raw hyperparameters by name; those of several sets carry the name of theirs.
        recurrent: Whether the module has recurrent layers. cuDNN stays out of the validation loss then, because its
            recurrent layers have no gradient in eval mode.

    Raises:
        ValueError: If there is nothing to compute a loss with.

    Example:
        >>> from lightning_hpo import Positive
        >>> class Net(nn.Linear):
        ...     def training_step(self, batch, batch_idx):
        ...         return self(batch).sum() + hypers["decay"] * self.weight.square().sum()
        ...     def validation_step(self, batch, batch_idx):
        ...         return self(batch).sum()
        >>> hypers = HyperparameterSet(decay=Positive(0.5))
        >>> losses = ModuleLosses(Net(1, 1), {"": hypers})
        >>> values = {"weight": torch.tensor([[2.0]]), "bias": torch.tensor([1.0])}
        >>> losses.train([torch.tensor([[3.0]])])(values, losses.hparams)
        tensor(9., grad_fn=<MeanBackward0>)
    """

    def __init__(
        self,
        module: nn.Module,
        sets: Mapping[str, HyperparameterSet],
        train_loss: ModuleLoss | None = None,
        val_loss: ModuleLoss | str | None = None,
        context: Callable[[], AbstractContextManager[Any]] = nullcontext,
        outer: Sequence[str] = (),
    ) -> None:
        self.module, self.context = module, context
        self.recurrent = any(isinstance(part, nn.RNNBase) for part in module.modules())
        self._train_loss = train_loss or _method(module, "inner_loss") or _step(module, "training_step")
        self._val_name = val_loss if isinstance(val_loss, str) else None
        self._val_loss = None if isinstance(val_loss, str) else val_loss
        if val_loss is None:
            self._val_loss = _method(module, "outer_loss")
        if self._val_loss is None and not callable(getattr(module, "validation_step", None)):
            raise ValueError(
                f"`{type(module).__name__}` has neither `outer_loss` nor `validation_step`; give `val_loss`"
            )
        inside = hyperparameter_sets(module)
        outside = [part for part in sets.values() if all(part is not other for other in inside.values())]
        self._container = _Container(outside)
        self._full: dict[str, str] = {}  # names of hyperparameters in the container
        self.hparams: dict[str, Tensor] = {}
        for label, part in sets.items():
            home = next((f"module.{name}" for name, other in inside.items() if other is part), None)
            if home is None:
                home = f"outside.{next(i for i, other in enumerate(outside) if other is part)}"
            for name, raw in part.raw.items():
                own = f"{label}.{name}" if len(sets) > 1 and label else name
                self.hparams[own], self._full[own] = raw, f"{home}.raw.{name}"
        named = dict(module.named_parameters())
        for name in outer:
            self.hparams[name], self._full[name] = named[name], f"module.{name}"
        taken = set(self._full.values())
        self.params = {
            name: parameter
            for name, parameter in named.items()
            if parameter.requires_grad and f"module.{name}" not in taken
        }

    def train(self, batches: Sequence[Any]) -> PureLoss:
        """The training loss over some batches, each with the same weight.

        Args:
            batches: Batches on the module's device.

        Returns:
            The loss as a function of parameters and raw hyperparameters.
        """

        def loss(params: dict[str, Tensor], hparams: dict[str, Tensor]) -> Tensor:
            with torch.random.fork_rng(devices=_devices(params)), self.context():
                values = [self._call(self._train_loss, params, hparams, batch)[0] for batch in batches]
                return torch.stack([_scalar(value, "training loss") for value in values]).mean()

        return loss

    def val(self, batches: Sequence[Any]) -> PureLoss:
        """The validation loss over some batches, each with the same weight.

        Args:
            batches: Batches on the module's device.

        Returns:
            The loss as a function of parameters and raw hyperparameters.
        """

        def loss(params: dict[str, Tensor], hparams: dict[str, Tensor]) -> Tensor:
            here = torch.random.fork_rng(devices=_devices(params))
            with here, self.context(), evaluated(self.module), _without_cudnn(self.recurrent):
                values = [self._score(params, hparams, batch) for batch in batches]
                return torch.stack([_scalar(value, "validation loss") for value in values]).mean()

        return loss

    def _score(self, params: Mapping[str, Tensor], hparams: Mapping[str, Tensor], batch: Any) -> Any:
        if self._val_loss is not None:
            return self._call(self._val_loss, params, hparams, batch)[0]
        found, logged = self._call(_step(self.module, "validation_step"), params, hparams, batch)
        return self._choose(found, logged)

    def _choose(self, returned: Any, logged: Mapping[str, Any]) -> Tensor:
        if self._val_name is not None and self._val_name not in logged:
            raise NoLossError(f"`validation_step` logs no `{self._val_name}`, but {sorted(logged) or 'nothing'}")
        if self._val_name is None and returned is not None:
            return returned
        for name in _LOGGED if self._val_name is None else (self._val_name,):
            if name in logged:
                return logged[name]
        raise NoLossError(
            "`validation_step` neither returns a loss nor logs `val_loss`; return it, define `outer_loss(batch)`, or "
            f"give `val_loss`: a function of module and batch, or a name that is logged ({sorted(logged) or 'none is'})"
        )

    def _call(
        self, loss: ModuleLoss, params: Mapping[str, Tensor], hparams: Mapping[str, Tensor], batch: Any
    ) -> tuple[Any, dict[str, Any]]:
        recorder = Recorder()
        self._container.module = muted(self.module, recorder)
        buffers = {f"module.{name}": buffer.clone() for name, buffer in self.module.named_buffers()}
        values = {f"module.{name}": value for name, value in params.items()}
        values |= {self._full[name]: value for name, value in hparams.items()}
        try:
            found = torch.func.functional_call(self._container, {**buffers, **values}, (loss, batch))
        finally:
            self._container.module = nn.Module()  # the module is not ours to keep
        return (found.get("loss") if isinstance(found, Mapping) else found), recorder.logged


def twice_differentiable(loss: PureLoss, recurrent: bool = False) -> PureLoss:
    """A loss with attention, and on request recurrent layers, in a form that has a second derivative.

    Args:
        loss: A loss.
        recurrent: Whether cuDNN stays out of it, as recurrent layers need.

    Returns:
        The same loss.

    Example:
        >>> twice_differentiable(lambda params, hparams: params["w"])({"w": torch.ones(1)}, {})
        tensor([1.])
    """

    def explicit(params: dict[str, Tensor], hparams: dict[str, Tensor]) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH), _without_cudnn(recurrent):
            return loss(params, hparams)

    return explicit


@contextmanager
def evaluated(module: nn.Module) -> Iterator[None]:
    """A module in eval mode, and afterwards in whatever mode each part of it was.

    Args:
        module: The module.

    Example:
        >>> net = nn.Dropout()
        >>> with evaluated(net):
        ...     net.training
        False
        >>> net.training
        True
    """
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True


def _without_cudnn(wanted: bool) -> AbstractContextManager[Any]:
    return torch.backends.cudnn.flags(enabled=False) if wanted else nullcontext()


class _Container(nn.Module):
    """Holds the module and the sets that are not in it, so that one call replaces tensors of both."""

    def __init__(self, outside: Sequence[HyperparameterSet]) -> None:
        super().__init__()
        self.module: nn.Module = nn.Module()
        self.outside = nn.ModuleList(outside)

    def forward(self, loss: ModuleLoss, batch: Any) -> Any:
        return loss(self.module, batch)


def _method(module: nn.Module, name: str) -> ModuleLoss | None:
    """Calls a method by name, because the module that is passed is a stand-in."""
    return (lambda stand_in, batch: getattr(stand_in, name)(batch)) if callable(getattr(module, name, None)) else None


def _step(module: nn.Module, name: str) -> ModuleLoss:
    if not callable(getattr(module, name, None)):
        raise ValueError(f"`{type(module).__name__}` has no method `{name}`")
    return lambda stand_in, batch: call_step(stand_in, name, batch)


def _scalar(value: Any, name: str) -> Tensor:
    try:
        loss = scalar_of(value, f"the {name}")
    except ValueError as error:
        raise NoLossError(str(error)) from None
    return loss.float() if loss.dtype in (torch.float16, torch.bfloat16) else loss


def _devices(params: Mapping[str, Tensor]) -> list[int]:
    return sorted({p.get_device() for p in params.values() if p.is_cuda})
