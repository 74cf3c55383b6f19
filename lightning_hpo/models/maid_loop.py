"""The Trainer's loop of the modules that are bilevel problems: a training step is one outer iteration of MAID."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from typing_extensions import override

from lightning_hpo.functional.bilevel.maid import MAID, MAIDState
from lightning_hpo.whole_data import batch_length, whole_data

__all__ = ["MAIDLoop"]


class MAIDLoop(LightningModule, ABC):
    r"""Takes the steps, logs them, and keeps them in checkpoints; a subclass says what the problem is.

    Args:
        theta0: First hyperparameters.
    """

    maid: MAID

    def __init__(self, theta0: Tensor) -> None:
        super().__init__()
        self.automatic_optimization = False
        # A parameter, so that DistributedDataParallel accepts the module; nothing is ever backpropagated into it.
        self.theta = nn.Parameter(theta0.detach().clone())
        self.state: MAIDState | None = None

    @abstractmethod
    def read_data(self) -> list[str]:
        """Reads what the losses need from the Trainer's loaders.

        Returns:
            What is wrong with the data, a sentence each.
        """

    @abstractmethod
    def first_x(self) -> Tensor:
        """Where the first lower solve begins."""

    def publish(self, state: MAIDState) -> None:
        """Writes a state into the module's parameters.

        Args:
            state: The new one.
        """
        self.theta.copy_(state.theta)

    def read_batches(self, loader: Iterable[Any]) -> list[tuple[int, Any]]:
        """All batches of a loader's data set, this rank's share, each with its number of samples.

        Args:
            loader: The loader.

        Returns:
            Numbers and batches, on the module's device.

        Raises:
            ValueError: If the data cannot be read whole.
        """
        batches = [self.trainer.strategy.batch_to_device(batch, self.device) for batch in whole_data(loader)]
        return [(batch_length(batch), batch) for batch in batches]

    @override
    def setup(self, stage: str) -> None:
        """Refuses strategies that shard parameters."""
        if stage == "fit":
            self.state = None  # a checkpoint is read after this
            if not isinstance(self.trainer.strategy, (SingleDeviceStrategy, DDPStrategy)):
                own, name = type(self).__name__, type(self.trainer.strategy).__name__
                raise MisconfigurationException(f"`{own}` runs on one device or under DDP, not under `{name}`.")

    @override
    def on_train_start(self) -> None:
        """Reads the data and begins, or goes on."""
        if problems := self.read_data():
            raise MisconfigurationException(f"`{type(self).__name__}`: {'; '.join(problems)}.")
        if self.state is None:
            self.state = self.maid.init(self.theta, self.first_x())

    @override
    def training_step(self, batch: Any, batch_idx: int) -> None:
        """One outer iteration on all data."""
        if self.state is None:
            raise RuntimeError("training has not started")
        self.state = state = self.maid.step(self.state)
        with torch.no_grad():
            self.publish(state)
        self.optimizers().step()  # type: ignore[union-attr]  # there are no gradients: it counts the step
        self.log_dict(
            {
                "maid/lower": state.lower,
                "maid/upper": state.upper,
                "maid/gradient_norm": state.gradient_norm,
                "maid/eps": state.eps,
                "maid/delta": state.delta,
                "maid/step_size": state.step_size,
                "maid/lower_iterations": float(state.lower_iterations),
                "maid/cg_iterations": float(state.cg_iterations),
                "maid/failures": float(state.failures),
            }
        )
        if state.status != "running":
            self.trainer.should_stop = True

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        """One that never has a gradient to follow."""
        return torch.optim.SGD(self.parameters(), lr=0.0)

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds where MAID stands, in plain types."""
        checkpoint["maid"] = None if self.state is None else self.state.state_dict()

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Goes on from there.

        Raises:
            MisconfigurationException: If the checkpoint is another module's.
        """
        if "maid" not in checkpoint:
            raise MisconfigurationException(
                f"the checkpoint was not written by a `{type(self).__name__}`: it has no entry 'maid'."
            )
        saved = checkpoint["maid"]
        if saved is not None:
            moved = {k: v.to(self.theta.device) if isinstance(v, Tensor) else v for k, v in saved.items()}
            self.state = MAIDState.from_state_dict(moved)
