"""The Trainer's loop of the modules that are bilevel problems: a training step is one outer iteration of MAID."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils import _pytree as pytree
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
            Numbers and batches, in the Trainer's precision and on the module's device.

        Raises:
            ValueError: If the data cannot be read whole.
        """
        convert, move = self.trainer.precision_plugin.convert_input, self.trainer.strategy.batch_to_device
        batches = [move(convert(batch), self.device) for batch in whole_data(loader)]
        return [(batch_length(batch), batch) for batch in batches]

    @override
    def setup(self, stage: str) -> None:
        """Refuses strategies that shard parameters, and precisions in which an error cannot be certified."""
        problems = self._precision_problems()
        if stage == "fit":
            self.state = None  # a checkpoint is read after this
            if not isinstance(self.trainer.strategy, (SingleDeviceStrategy, DDPStrategy)):
                name = type(self.trainer.strategy).__name__
                problems.append(f"it runs on one device or under DDP, not under `{name}`")
        if problems:
            raise MisconfigurationException(f"`{type(self).__name__}`: {'; '.join(problems)}.")

    def _precision_problems(self) -> list[str]:
        """What speaks against the Trainer's precision: autocast rounds within losses, whatever the type of x is."""
        precision, allowed = str(self.trainer.precision), self.maid.allow_low_precision
        if precision in ("32-true", "64-true") or (allowed and precision in ("16-true", "bf16-true")):
            return []
        flag = ", or `allow_low_precision=True`" if precision in ("16-true", "bf16-true") else ""
        return [f"errors cannot be certified under precision='{precision}': give '32-true' or '64-true'{flag}"]

    @override
    def on_train_start(self) -> None:
        """Reads the data and begins, or goes on."""
        if problems := self.read_data():
            raise MisconfigurationException(f"`{type(self).__name__}`: {'; '.join(problems)}.")
        self.state = self.maid.init(self.theta, self.first_x()) if self.state is None else self._here(self.state)

    def _here(self, state: MAIDState) -> MAIDState:
        """A checkpoint's state on this device and in this precision; errors are in float64 always."""
        here, names = self.theta.detach(), ("theta", "x", "q", "previous")
        parts = {name: getattr(state, name) for name in names}
        return replace(
            state,
            error=state.error.to(here.device),
            **pytree.tree_map_only(Tensor, lambda part: part.to(here), parts),
        )

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
            self.state = MAIDState.from_state_dict(saved)
