"""Bilevel problems in which every sample is a lower problem of its own, as a LightningModule."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils import _pytree as pytree
from typing_extensions import override

from lightning_hpo import distributed
from lightning_hpo.functional.bilevel.lower_problem import Constant, LowerProblem, LowerSolver
from lightning_hpo.functional.bilevel.lower_solvers import fista
from lightning_hpo.functional.bilevel.maid import MAID, BilevelProblem
from lightning_hpo.models.maid_loop import MAIDLoop
from lightning_hpo.whole_data import batch_length

__all__ = ["PerSampleMAIDModule"]

_OF_SAMPLES = ("x", "q", "error")  # what a rank has of its own in MAID's state


class PerSampleMAIDModule(MAIDLoop):
    r"""Minimises the mean of :math:`g_i(\hat x_i(\theta))` with :math:`\hat x_i(\theta) = \arg\min_x h_i(x, \theta)`.

    Every training sample i is a lower problem: an image to denoise, a task, a fold; what is learned is what they
    share. The training set is read into memory when training starts, and every ``training_step`` is one outer iteration
    of MAID on all of it. Validation, test and prediction solve the lower problems of their batches at the present
    :math:`\theta`. On several ranks each owns its share of the samples.

    Args:
        lower_loss: ``(x, theta, batch)`` to one value a sample.
        upper_loss: ``(x, batch)`` to one value a sample.
        x0: A batch to first lower variables, one row a sample.
        theta0: First hyperparameters.
        mu: Modulus of strong convexity of every h: a number or a function of theta.
        smoothness: Lipschitz constant of the lower gradients, alike; ``solver=lbfgs`` goes without.
        upper_smoothness: That of the upper gradients; estimated where None.
        convex_upper: Whether all g are convex.
        solver: Solves the lower problems.
        accuracy: Of solutions outside of training: how far they may be from the exact ones, relative to ``x0``.
        problem_args: Further arguments of :class:`~lightning_hpo.functional.bilevel.maid_problem.BilevelProblem`.
        **maid_args: Settings of :class:`~lightning_hpo.functional.bilevel.maid.MAID`.

    Raises:
        ValueError: If an argument is wrong.
        MisconfigurationException: If data are missing, the strategy shards parameters, or the precision is too low.

    References:
        Salehi, Mukherjee, Roberts, Ehrhardt, "An adaptively inexact first-order method for bilevel optimization with
        application to hyperparameter learning", SIAM J. Math. Data Sci. 7(3), 2025, sec. 4.

    Example:
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> from lightning_hpo.testing import tiny_trainer
        >>> pairs = TensorDataset(torch.tensor([[2.0], [4.0]]), torch.tensor([[1.0], [2.0]]))  # observed, true
        >>> module = PerSampleMAIDModule(
        ...     lambda x, theta, batch: ((x - batch[0]) ** 2 + theta.exp() * x**2).sum(1) / 2,
        ...     lambda x, batch: ((x - batch[1]) ** 2).sum(1) / 2,
        ...     x0=lambda batch: batch[0], theta0=torch.tensor(-2.0), mu=lambda theta: 1 + theta.exp(),
        ...     smoothness=lambda theta: 1 + theta.exp(), upper_smoothness=1.0, convex_upper=True)
        >>> tiny_trainer(max_epochs=30).fit(module, *[DataLoader(pairs, batch_size=2)] * 2)
        >>> module.solve([torch.tensor([[6.0]])])  # halves what it gets
        tensor([[3.]])
    """

    def __init__(
        self,
        lower_loss: Callable[[Tensor, Tensor, Any], Tensor],
        upper_loss: Callable[[Tensor, Any], Tensor],
        x0: Callable[[Any], Tensor],
        theta0: Tensor,
        *,
        mu: Constant,
        smoothness: Constant | None = None,
        upper_smoothness: float | None = None,
        convex_upper: bool = False,
        solver: LowerSolver = fista,
        accuracy: float = 1e-4,
        problem_args: dict[str, Any] | None = None,
        **maid_args: Any,
    ) -> None:
        super().__init__(theta0)
        if not 0 < accuracy < 1:
            raise ValueError(f"accuracy must be between 0 and 1, got {accuracy!r}")
        self.lower_loss, self.upper_loss, self.x0 = lower_loss, upper_loss, x0
        self.mu, self.smoothness, self.solver, self.accuracy = mu, smoothness, solver, accuracy
        self._batches: list[tuple[int, Any]] = []
        lower = LowerProblem(self._lower, mu, smoothness, batched=True)
        known = {"reduce": distributed.mean} | (problem_args or {})
        self.maid = MAID(
            BilevelProblem(lower, self._upper, upper_smoothness, convex_upper, **known), solver=solver, **maid_args
        )

    def _lower(self, x: Tensor, theta: Tensor) -> Tensor:
        return torch.cat([self.lower_loss(rows, theta, batch) for rows, batch in self._parts(x)])

    def _upper(self, x: Tensor) -> Tensor:
        return torch.cat([self.upper_loss(rows, batch) for rows, batch in self._parts(x)])

    def _parts(self, x: Tensor) -> Iterator[tuple[Tensor, Any]]:
        rows = x.split([length for length, _ in self._batches])
        return zip(rows, (batch for _, batch in self._batches), strict=True)

    @override
    def read_data(self) -> list[str]:
        """Reads the training data.

        Returns:
            What is wrong with them.
        """
        try:
            loader: Any = self.trainer.train_dataloader
            self._batches = self.read_batches(loader)
        except ValueError as error:
            return [f"training data: {error}"]
        samples = sum(length for length, _ in self._batches)
        if self.state is not None and len(self.state.x) != samples:
            return [f"training data: {samples} samples on this rank, the checkpoint has {len(self.state.x)}"]
        return []

    @override
    def first_x(self) -> Tensor:
        """``x0`` of all training samples."""
        return torch.cat([self.x0(batch) for _, batch in self._batches])

    # Solutions of other samples

    def solve(self, batch: Any) -> Tensor:
        r"""The solutions :math:`\hat x_i(\theta)` of a batch at the present :math:`\theta`.

        Args:
            batch: As the losses take it; ``upper_loss`` is not called.

        Returns:
            One row a sample, without a graph.

        Raises:
            RuntimeError: If the lower problems are not solved.
        """
        with torch.inference_mode(False):  # which does without the gradients that a solve is made of
            batch = pytree.tree_map_only(Tensor, torch.clone, batch)
            problem = LowerProblem(
                lambda x, theta: self.lower_loss(x, theta, batch), self.mu, self.smoothness, batched=True
            )
            x, theta = self.x0(batch), self.theta.detach()
            tol = self.accuracy * problem.norms(x).clamp(min=1.0).min().item()
            solution = self.solver(problem, theta, x, tol)
        if solution.status != "converged":
            raise RuntimeError(f"the lower problems were not solved to {tol:.1e}: {solution.status}")
        return solution.x

    @override
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """The mean upper loss of the batch's solutions, as ``val_loss``."""
        self._judge("val_loss", batch)

    @override
    def test_step(self, batch: Any, batch_idx: int) -> None:
        """The mean upper loss of the batch's solutions, as ``test_loss``."""
        self._judge("test_loss", batch)

    def _judge(self, name: str, batch: Any) -> None:
        loss = self.upper_loss(self.solve(batch), batch).mean()
        self.log(name, loss, sync_dist=True, batch_size=batch_length(batch))

    @override
    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The solutions of the batch."""
        return self.solve(batch)

    # Checkpoints hold all ranks' samples, in the order of the data set

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds where MAID stands on all ranks."""
        super().on_save_checkpoint(checkpoint)
        saved = checkpoint["maid"]
        if saved is not None:
            of_samples = {name: saved[name] for name in _OF_SAMPLES if saved[name] is not None}
            saved |= {name: distributed.gather(rows).transpose(0, 1).flatten(0, 1) for name, rows in of_samples.items()}

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Goes on from there with this rank's share.

        Raises:
            MisconfigurationException: If the checkpoint is another module's.
        """
        saved = checkpoint.get("maid")
        if saved is not None:
            ranks, rank = distributed.world_size(), distributed.rank()
            if len(saved["x"]) % ranks:
                raise MisconfigurationException(f"{len(saved['x'])} samples cannot be shared out over {ranks} ranks.")
            share = {name: saved[name][rank::ranks] for name in _OF_SAMPLES if saved[name] is not None}
            checkpoint = {**checkpoint, "maid": saved | share}
        super().on_load_checkpoint(checkpoint)
