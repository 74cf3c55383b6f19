"""What every method's callback shares: state, guards, log prefix and the step of its own optimizer."""

import ast
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.optim import Optimizer

from lightning_hpo.held_out import HeldOutBatches
from lightning_hpo.state import restored, saved
from lightning_hpo.validation_loader import validation_loader

__all__ = ["MethodCallback", "added"]


def added(own: Sequence[Callback] | Callback, callback: Callback) -> list[Callback]:
    """What a mixin's ``configure_callbacks`` returns.

    Args:
        own: What the module's own returned.
        callback: That of the mixin.

    Returns:
        All of them.

    Example:
        >>> len(added([], Callback())), len(added(Callback(), Callback()))
        (1, 2)
    """
    return [*(own if isinstance(own, Sequence) else [own]), callback]


class MethodCallback(Callback):
    """A callback that owns what it learns: nothing is added to the user's module.

    A subclass names in ``_STATE`` the attributes to save and restore (objects with ``state_dict``, tensors, containers,
    numbers, strings) and in ``_KEY`` the constructor arguments that tell two instances apart. An attribute that is
    ``None`` when a checkpoint is read is taken to be built later: :meth:`restore_pending` then fills it.

    Example:
        >>> class Counter(MethodCallback):
        ...     _STATE = ("steps",)
        ...     _KEY = ("name",)
        ...     def __init__(self, name="a"):
        ...         self.name, self.steps = name, 0
        >>> counter = Counter()
        >>> counter.state_key, counter.state_dict()
        ("Counter{'name': 'a'}", {'steps': 0})
    """

    _STATE: ClassVar[tuple[str, ...]] = ()
    _KEY: ClassVar[tuple[str, ...]] = ()
    _noted: Mapping[str, Tensor | float] | None = None  # to be logged
    _shown = False  # whether something was, since the fit began

    @property
    def state_key(self) -> str:
        """Class name and identifying arguments; later changes of those attributes do not change it."""
        if "_fixed_key" not in self.__dict__:  # the Trainer reads it when it is built
            self._fixed_key = f"{type(self).__qualname__}{ {name: getattr(self, name) for name in self._KEY}!r}"
        return self._fixed_key

    def state_dict(self) -> dict[str, Any]:
        """The attributes of ``_STATE`` as plain types, so that weights-only loading accepts the checkpoint."""
        return {name: self._saved(name) for name in self._STATE}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what :meth:`state_dict` saved; refuses names that are missing or unknown."""
        wrong = [f"`{n}` is missing" for n in self._STATE if n not in state_dict]
        wrong += [f"`{n}` is unknown" for n in state_dict if n not in self._STATE]
        self.raise_all(f"the checkpoint's state does not fit this version: {problem}" for problem in wrong)
        for name, state in state_dict.items():
            if getattr(self, name) is None and state is not None:
                self._waiting()[name] = state
            else:
                setattr(self, name, restored(getattr(self, name), state, name))

    def restore_pending(self) -> None:
        """Applies the loaded state of attributes that were ``None`` when the checkpoint was read."""
        pending = self._waiting()
        for name in list(pending):
            setattr(self, name, restored(getattr(self, name), pending.pop(name), name))

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Refuses a checkpoint that holds this method's state for other identifying arguments."""
        keys = checkpoint.get("callbacks") or {}
        claimed = {c.state_key for c in trainer.callbacks}  # type: ignore[attr-defined]
        if self._STATE and self.state_key not in keys:
            others = [k for k in keys if k.startswith(f"{type(self).__qualname__}{{") and k not in claimed]
            self.raise_all(self._key_difference(other) for other in others)

    def hyperparameters(self) -> dict[str, float | list[float]]:
        """What has been learned so far, by name, as numbers on the host."""
        return {}

    def label(self, trainer: Trainer) -> str:
        """The method's stem, with the identifying arguments where the Trainer has two callbacks of this class."""
        stem = type(self).__module__.rpartition(".")[2]
        alone = sum(type(c) is type(self) for c in trainer.callbacks) < 2  # type: ignore[attr-defined]
        return stem if alone else f"{stem}[{','.join(str(getattr(self, name)) for name in self._KEY)}]"

    def log_values(self, pl_module: LightningModule, values: Mapping[str, Tensor | float], **kwargs: Any) -> None:
        """Logs each value as ``<method>/<name>``; call it with the same names on every rank."""
        label = self.label(pl_module.trainer)
        pl_module.log_dict({f"{label}/{name}": value for name, value in values.items()}, **kwargs)

    def note_values(self, values: Mapping[str, Tensor | float]) -> None:
        """Keeps what is to be logged until the next update; see :meth:`log_noted`."""
        self._noted = values

    def log_noted(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Logs what was noted where it is seen, and at once the first time: then there is something to monitor.

        Loggers are written to every so many steps, which updates need not fall on. Call it after each optimizer step.
        """
        every, step = trainer.log_every_n_steps, trainer.global_step  # type: ignore[attr-defined]
        seen = (every > 0 and step % every == 0) or step == trainer.max_steps or trainer.is_last_batch
        if self._noted and (seen or not self._shown):
            self._shown = True
            self.log_values(pl_module, self._noted)

    def scoring_problems(self, pl_module: LightningModule, val_loss: object) -> list[str]:
        """What is missing to score a validation batch, in words."""
        scored = val_loss is not None or callable(getattr(pl_module, "outer_loss", None))
        if scored or is_overridden("validation_step", pl_module):
            return []
        return ["nothing scores a validation batch: define `validation_step`, or give `val_loss`."]

    def attach_held_out(self, trainer: Trainer, held_out: HeldOutBatches, loader: Any) -> Any:
        """Attaches the validation data of the fit, or a given loader; returns the loader. Nothing is noted yet."""
        self._noted, self._shown = None, False
        try:
            loader = validation_loader(trainer) if loader is None else loader
            held_out.attach(loader)
        except ValueError as error:
            self.raise_all([f"{str(error).rstrip('.')}."])
        return loader

    @staticmethod
    def handed_over(trainer: Trainer, pl_module: LightningModule, batches: Iterable[Any]) -> list[Any]:
        """Batches drawn outside of the loop, as the loop hands them over: in its precision and on the device."""
        convert, move = trainer.precision_plugin.convert_input, trainer.strategy.batch_to_device
        return [move(convert(batch), pl_module.device) for batch in batches]

    def release(self) -> None:
        """Gives back what was changed or held for a fit; called at its end, whatever it is, and perhaps twice."""

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Gives everything back."""
        if stage == "fit":
            self.release()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Gives everything back: neither the end of training nor teardown follows an exception."""
        self.release()

    def raise_all(self, problems: Iterable[str]) -> None:
        """Raises one :class:`MisconfigurationException` that lists every problem, if there is any."""
        if found := list(problems):
            text = found[0] if len(found) == 1 else "".join(f"\n- {problem}" for problem in found)
            raise MisconfigurationException(f"`{type(self).__name__}`: {text}")

    def require_automatic_optimization(self, pl_module: LightningModule) -> None:
        """Refuses modules that call ``backward`` and ``step`` themselves."""
        if not pl_module.automatic_optimization:
            self.raise_all([f"`{type(pl_module).__name__}` optimizes by hand; set `automatic_optimization = True`."])

    def require_hook(self, owner: object, name: str, why: str) -> Callable[..., Any]:
        """The method ``name`` of ``owner``; refuses an owner that does not define it."""
        method, inherited = getattr(owner, name, None), (LightningModule, LightningDataModule)
        if not callable(method) or any(getattr(type(owner), name, None) is getattr(b, name, owner) for b in inherited):
            self.raise_all([f"define `{name}` on `{type(owner).__name__}`: it is needed {why}."])
        return method  # type: ignore[return-value]

    @staticmethod
    def is_sharded(trainer: Trainer) -> bool:
        """Whether a rank holds only a part of each parameter."""
        return isinstance(trainer.strategy, (FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy))

    def refuse_sharded_strategy(self, trainer: Trainer) -> None:
        """Refuses strategies under which a rank holds only a part of each parameter."""
        if self.is_sharded(trainer):
            name = type(trainer.strategy).__name__
            self.raise_all([f"`{name}` shards parameters; use `strategy='ddp'` or a single device."])

    @staticmethod
    def unscale_own(trainer: Trainer, optimizer: Optimizer) -> None:
        """Divides the fp16 loss scale out of an own optimizer's gradients; call it in ``on_before_optimizer_step``."""
        if trainer.scaler is not None and _has_gradients(optimizer):
            trainer.scaler.unscale_(optimizer)

    @staticmethod
    def step_own(trainer: Trainer, optimizer: Optimizer) -> None:
        """Steps an own optimizer and clears its gradients; under fp16 a step with overflow is left out.

        Lightning updates the loss scale once, after the user's optimizer: it is never updated here.
        """
        if _has_gradients(optimizer):
            scaler = trainer.scaler
            _ = optimizer.step() if scaler is None else scaler.step(optimizer)
        optimizer.zero_grad()

    def step_own_optimizer(self, trainer: Trainer, optimizer: Optimizer) -> None:
        """:meth:`unscale_own`, then :meth:`step_own`, for when nothing is added to the gradient in between."""
        self.unscale_own(trainer, optimizer)
        self.step_own(trainer, optimizer)

    def _waiting(self) -> dict[str, Any]:
        return self.__dict__.setdefault("_pending", {})  # subclasses need not call `super().__init__`

    def _saved(self, name: str) -> Any:
        value = self._waiting().get(name) if getattr(self, name) is None else getattr(self, name)
        return saved(value, f"{type(self).__name__}.{name}")

    def _key_difference(self, other: str) -> str:
        try:
            theirs = ast.literal_eval(other.removeprefix(type(self).__qualname__))
            ours = ast.literal_eval(self.state_key.removeprefix(type(self).__qualname__))
        except (ValueError, SyntaxError):  # an argument whose repr is no literal
            return f"the checkpoint was written by `{other}`, this is `{self.state_key}`."
        differing = [n for n in {**theirs, **ours} if theirs.get(n) != ours.get(n)]
        named = " and ".join(f"`{n}={theirs.get(n)!r}` (here {ours.get(n)!r})" for n in differing)
        return f"the checkpoint was written with {named}; construct the callback with the checkpoint's value."


def _has_gradients(optimizer: Optimizer) -> bool:
    return any(p.grad is not None for group in optimizer.param_groups for p in group["params"])
