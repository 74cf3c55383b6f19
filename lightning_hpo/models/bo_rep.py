"""Bilevel training by steps of fixed length: a mixin, and a module that finds wrong labels."""

from collections.abc import Iterable
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_hpo.callbacks.base import added
from lightning_hpo.callbacks.bo_rep import SingleLoopHypergradient
from lightning_hpo.functional.bilevel.weight_auc import weight_auc
from lightning_hpo.hyper import HyperparameterSet, UnitInterval
from lightning_hpo.indexed_data import IndexedDataset

__all__ = ["DataHyperCleaning", "SingleLoopMixin"]


class SingleLoopMixin:
    """A LightningModule that is two losses: inner parameters follow one, outer parameters the other.

    Put it before ``LightningModule``, and define ``inner_loss(batch)`` and ``outer_loss(batch)``. Outer is what
    ``outer_parameters()`` returns, an encoder for example, and any :class:`~lightning_hpo.HyperparameterSet` that is an
    attribute. Training steps take the inner loss, validation steps log the outer one as ``val_loss``; define
    ``training_step`` or ``validation_step`` yourself where that is too little.

    Several tasks that share the outer parameters (meta-learning) are inner parameters for each, the *sum* of their
    inner losses and the *mean* of their outer ones: outer parameters then follow the mean of their hypergradients.

    Args:
        *args: Arguments of your module.
        single_loop_args: Arguments of :class:`~lightning_hpo.SingleLoopHypergradient`, by name.
        **kwargs: Arguments of your module.

    Example:
        >>> class Representation(SingleLoopMixin, LightningModule):
        ...     def __init__(self, **kwargs):
        ...         super().__init__(**kwargs)
        ...         self.encoder, self.head = nn.LSTM(3, 8, batch_first=True), nn.Linear(8, 2)
        ...     def outer_parameters(self):
        ...         return self.encoder.parameters()
        ...     def outer_loss(self, batch):
        ...         return F.cross_entropy(self.head(self.encoder(batch[0])[0].amax(1)), batch[1])
        ...     def inner_loss(self, batch):
        ...         return self.outer_loss(batch) + 1e-3 * self.head.weight.square().sum()
        >>> [callback] = Representation(single_loop_args={"lr": 0.05}).configure_callbacks()
        >>> callback.lr
        0.05
    """

    def __init__(self, *args: Any, single_loop_args: dict[str, Any] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._single_loop_args = dict(single_loop_args or {})

    def outer_parameters(self) -> Iterable[nn.Parameter]:
        """Parameters of the network that follow the outer loss; none, unless you say otherwise."""
        return ()

    def inner_loss(self, batch: Any) -> Tensor:
        """What the inner parameters minimise; a function of the outer ones."""
        raise NotImplementedError(f"define `inner_loss(batch)` on `{type(self).__name__}`: inner parameters follow it")

    def outer_loss(self, batch: Any) -> Tensor:
        """What the outer parameters minimise, on validation batches."""
        raise NotImplementedError(f"define `outer_loss(batch)` on `{type(self).__name__}`: outer parameters follow it")

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
        return added(super().configure_callbacks(), SingleLoopHypergradient(**self._single_loop_args))  # type: ignore[misc]


class DataHyperCleaning(SingleLoopMixin, LightningModule):
    r"""Learns a weight for each training example, so that a classifier does well on a few clean ones.

    The inner loss of a batch is :math:`\frac1B \sum_i \sigma(\lambda_i)\, CE_i + c \|y\|^2`, the outer one the
    cross-entropy of the validation batch, whose labels are right. Batches are ``(index, inputs, labels)``: wrap data
    sets in :class:`~lightning_hpo.data.IndexedDataset`.

    Args:
        network: The classifier.
        samples: Number of training examples.
        lr: Learning rate of the network (SGD).
        weight_decay: The factor :math:`c`; above 0, for the inner problem to have one solution.
        weight: First weight of each example, between 0 and 1.
        corrupted: True where a label is known to be wrong, shape ``(samples,)``, to see how well weights find them:
            each epoch logs the area under the ROC curve as ``weight_auc``. Nothing is learned from it.
        single_loop_args: Arguments of :class:`~lightning_hpo.SingleLoopHypergradient`, by name.

    Raises:
        ValueError: If a number is out of range; all are listed.

    References:
        Hao, Gong and Liu, ICLR 2024, section on data hyper-cleaning.

    Example:
        >>> module = DataHyperCleaning(nn.Linear(4, 2), samples=3)
        >>> module.sample_weights()
        tensor([0.5000, 0.5000, 0.5000])
    """

    def __init__(
        self,
        network: nn.Module,
        samples: int,
        lr: float = 0.1,
        weight_decay: float = 5e-4,
        weight: float = 0.5,
        corrupted: Tensor | None = None,
        single_loop_args: dict[str, Any] | None = None,
    ) -> None:
        checks = {
            f"samples must be at least 1, got {samples!r}": samples >= 1,
            f"lr must be positive, got {lr!r}": lr > 0,
            f"weight_decay must not be negative, got {weight_decay!r}": weight_decay >= 0,
            f"weight must lie between 0 and 1, got {weight!r}": 0 < weight < 1,
        }
        problems = [problem for problem, holds in checks.items() if not holds]
        if corrupted is not None and (corrupted.dtype != torch.bool or corrupted.shape != (samples,)):
            shape = tuple(corrupted.shape)
            problems.append(f"corrupted must be a boolean tensor of shape ({samples},), got {corrupted.dtype} {shape}")
        elif corrupted is not None and corrupted.all() == corrupted.any():
            problems.append("corrupted must name some examples, but not all")
        if problems:
            raise ValueError(f"`DataHyperCleaning`: {'; '.join(problems)}.")
        super().__init__(single_loop_args=single_loop_args)
        self.network, self.lr, self.weight_decay = network, lr, weight_decay
        self.hypers = HyperparameterSet(weight=UnitInterval(torch.full((samples,), weight)))
        self.register_buffer("corrupted", corrupted, persistent=False)

    def sample_weights(self) -> Tensor:
        """The weight of each training example, by its index; shape ``(samples,)``."""
        return self.hypers["weight"].detach()

    def on_train_start(self) -> None:
        """Refuses training sets with more examples than there are weights."""
        super().on_train_start()
        loader = self.trainer.train_dataloader
        examples = getattr(loader, "dataset", None)
        given = len(self.sample_weights())
        if isinstance(examples, IndexedDataset) and len(examples) > given:
            raise MisconfigurationException(
                f"`DataHyperCleaning`: the training set has {len(examples)} examples, but there are weights for "
                f"{given}; give `samples={len(examples)}`."
            )

    def inner_loss(self, batch: Any) -> Tensor:
        """Weighted cross-entropy and the penalty."""
        index, inputs, labels = _indexed(batch)
        losses = F.cross_entropy(self.network(inputs), labels, reduction="none")
        penalty = torch.stack([p.square().sum() for p in self.network.parameters()]).sum()
        return (self.hypers["weight"][index] * losses).mean() + self.weight_decay * penalty

    def outer_loss(self, batch: Any) -> Tensor:
        """Cross-entropy; an index in front is not looked at."""
        inputs, labels = batch[-2:]
        return F.cross_entropy(self.network(inputs), labels)

    def on_train_epoch_end(self) -> None:
        """Logs how well weights find what is known to be wrong."""
        if isinstance(self.corrupted, Tensor):
            self.log("weight_auc", weight_auc(self.sample_weights(), self.corrupted))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD for the network."""
        return torch.optim.SGD(self.network.parameters(), lr=self.lr)


def _indexed(batch: Any) -> Any:
    fits = isinstance(batch, (list, tuple)) and len(batch) == 3 and isinstance(batch[0], Tensor)
    if not fits or batch[0].is_floating_point() or batch[0].ndim != 1:
        raise ValueError(
            "`DataHyperCleaning` needs to know which examples a batch holds: batches must be (index, inputs, labels); "
            "wrap the training set: `DataLoader(IndexedDataset(train_set), ...)`"
        )
    return batch
