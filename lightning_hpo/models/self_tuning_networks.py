"""Self-tuning networks as a mixin: a door to the callback."""

from typing import Any

from lightning.pytorch import Callback

from lightning_hpo.callbacks.base import added
from lightning_hpo.callbacks.self_tuning_networks import SelfTuning

__all__ = ["SelfTuningMixin"]


class SelfTuningMixin:
    """A LightningModule whose regularisation tunes itself.

    Put it before ``LightningModule`` and make a :class:`~lightning_hpo.HyperparameterSet` an attribute that the
    training step reads, or name dropout layers.

    Args:
        *args: Arguments of your module.
        self_tuning_args: Arguments of :class:`~lightning_hpo.SelfTuning`, by name.
        **kwargs: Arguments of your module.

    Example:
        >>> import torch
        >>> from lightning.pytorch import LightningModule
        >>> class Net(SelfTuningMixin, LightningModule):
        ...     def __init__(self, **kwargs):
        ...         super().__init__(**kwargs)
        ...         self.net = torch.nn.Sequential(torch.nn.Dropout(0.1), torch.nn.Linear(3, 1))
        >>> [callback] = Net(self_tuning_args={"dropout": ["net.0"], "train_steps": 2}).configure_callbacks()
        >>> callback.train_steps
        2
    """

    def __init__(self, *args: Any, self_tuning_args: dict[str, Any] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._self_tuning_args = dict(self_tuning_args or {})

    def configure_callbacks(self) -> list[Callback]:
        """The module's own callbacks and this one."""
        return added(super().configure_callbacks(), SelfTuning(**self._self_tuning_args))  # type: ignore[misc]
