"""Bilevel training as a mixin: a door to the callback."""

from typing import Any

from lightning.pytorch import Callback
from torch import Tensor

from lightning_hpo.callbacks.base import added
from lightning_hpo.callbacks.implicit_differentiation import Hypergradient

__all__ = ["BilevelMixin"]


class BilevelMixin:
    """A LightningModule that is two losses: weights follow one, hyperparameters the other.

    Put it before ``LightningModule``, define ``inner_loss(batch)`` and ``outer_loss(batch)``, and make a
    :class:`~lightning_hpo.HyperparameterSet` an attribute that the inner loss reads. Training steps take the inner
    loss; validation steps log the outer one as ``val_loss``. Define ``training_step`` or ``validation_step`` yourself
    where that is too little.

    Args:
        *args: Arguments of your module.
        hypergradient_args: Arguments of :class:`~lightning_hpo.Hypergradient`, by name.
        **kwargs: Arguments of your module.

    Example:
        >>> import torch
        >>> from lightning.pytorch import LightningModule
        >>> from lightning_hpo import HyperparameterSet, Positive
        >>> class Ridge(BilevelMixin, LightningModule):
        ...     def __init__(self, **kwargs):
        ...         super().__init__(**kwargs)
        ...         self.linear = torch.nn.Linear(3, 1)
        ...         self.hypers = HyperparameterSet(penalty=Positive(0.1))
        ...     def outer_loss(self, batch):
        ...         return (self.linear(batch[0]) - batch[1]).square().mean()
        ...     def inner_loss(self, batch):
        ...         return self.outer_loss(batch) + self.hypers["penalty"] * self.linear.weight.square().sum()
        >>> [callback] = Ridge(hypergradient_args={"every_n_steps": 5}).configure_callbacks()
        >>> callback.every_n_steps
        5
    """

    def __init__(self, *args: Any, hypergradient_args: dict[str, Any] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._hypergradient_args = dict(hypergradient_args or {})

    def inner_loss(self, batch: Any) -> Tensor:
        """What the weights minimise; a function of the hyperparameters."""
        raise NotImplementedError(f"define `inner_loss(batch)` on `{type(self).__name__}`: the weights follow it")

    def outer_loss(self, batch: Any) -> Tensor:
        """What the hyperparameters minimise, on validation batches."""
        raise NotImplementedError(f"define `outer_loss(batch)` on `{type(self).__name__}`: hyperparameters follow it")

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The inner loss."""
        loss = self.inner_loss(batch)
        self.log("train_loss", loss)  # type: ignore[attr-defined]
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Logs the outer loss as ``val_loss``."""
        self.log("val_loss", self.outer_loss(batch), sync_dist=True)  # type: ignore[attr-defined]

    def configure_callbacks(self) -> list[Callback]:
        """The module's own callbacks and this one."""
        return added(super().configure_callbacks(), Hypergradient(**self._hypergradient_args))  # type: ignore[misc]
