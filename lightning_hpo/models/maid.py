"""Bilevel problems that are the model: a LightningModule whose training steps are those of MAID."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_hpo import distributed
from lightning_hpo.functional.bilevel.lower_problem import Constant, LowerProblem, LowerSolver
from lightning_hpo.functional.bilevel.lower_solvers import fista
from lightning_hpo.functional.bilevel.maid import MAID, BilevelProblem, MAIDState
from lightning_hpo.models.maid_loop import MAIDLoop
from lightning_hpo.whole_data import batch_length

__all__ = ["MAIDModule"]


class MAIDModule(MAIDLoop):
    r"""Solves :math:`\min_\theta g(\hat x(\theta))` with :math:`\hat x(\theta) = \arg\min_x h(x, \theta)` on data.

    h is the mean of ``lower_loss`` over the whole training set and g that of ``upper_loss`` over the whole validation
    set; both are read into memory when training starts. Every ``training_step`` is one outer iteration of MAID on all
    of them, whatever its batch is: give the training loader one batch, and an epoch is one iteration. ``x`` and
    ``theta`` are parameters of the module; a checkpoint holds all that a run needs to go on bit for bit. On several
    ranks each holds its share of the data. Training stops where MAID does.

    Args:
        lower_loss: ``(x, theta, batch)`` to a scalar, the mean over the samples of the batch, with its regulariser.
        upper_loss: ``(x, batch)`` to a scalar, the mean over the samples of the batch.
        x0: First lower variables.
        theta0: First hyperparameters.
        mu: Modulus of strong convexity of h: a number or a function of theta.
        smoothness: Lipschitz constant of the lower gradient, alike; ``solver=lbfgs`` goes without.
        upper_smoothness: That of the upper gradient; estimated where None.
        convex_upper: Whether g is convex.
        solver: Solves the lower problem.
        problem_args: Further arguments of :class:`~lightning_hpo.functional.bilevel.maid_problem.BilevelProblem`.
        **maid_args: Settings of :class:`~lightning_hpo.functional.bilevel.maid.MAID`.

    Raises:
        ValueError: If an argument is wrong.
        MisconfigurationException: If data are missing, the strategy shards parameters, or the precision is too low.

    References:
        Salehi, Mukherjee, Roberts, Ehrhardt, "An adaptively inexact first-order method for bilevel optimization with
        application to hyperparameter learning", SIAM J. Math. Data Sci. 7(3), 2025.

    Example:
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> from lightning_hpo.testing import tiny_trainer
        >>> train, val = (DataLoader(TensorDataset(torch.tensor(v)), 4) for v in ([0.0, 4.0], [1.0, 1.0]))
        >>> module = MAIDModule(
        ...     lambda x, theta, batch: ((x - batch[0]) ** 2).mean() / 2 + theta.exp() * x**2 / 2,
        ...     lambda x, batch: ((x - batch[0]) ** 2).mean() / 2,
        ...     x0=torch.zeros(()), theta0=torch.tensor(-2.0), mu=lambda theta: 1 + theta.exp(),
        ...     smoothness=lambda theta: 1 + theta.exp(), upper_smoothness=1.0)
        >>> tiny_trainer(max_epochs=30).fit(module, train, val)
        >>> module.x  # 2 / (1 + exp(theta)) with theta = 0
        Parameter containing:
        tensor(1..., requires_grad=True)
    """

    def __init__(
        self,
        lower_loss: Callable[[Tensor, Tensor, Any], Tensor],
        upper_loss: Callable[[Tensor, Any], Tensor],
        x0: Tensor,
        theta0: Tensor,
        *,
        mu: Constant,
        smoothness: Constant | None = None,
        upper_smoothness: float | None = None,
        convex_upper: bool = False,
        solver: LowerSolver = fista,
        problem_args: dict[str, Any] | None = None,
        **maid_args: Any,
    ) -> None:
        super().__init__(theta0)
        self.lower_loss, self.upper_loss = lower_loss, upper_loss
        self.x = nn.Parameter(x0.detach().clone())
        self._batches: dict[str, list[tuple[float, Any]]] = {}
        lower = LowerProblem(self._lower, mu, smoothness, reduce=distributed.mean)
        problem = BilevelProblem(lower, self._upper, upper_smoothness, convex_upper, **(problem_args or {}))
        self.maid = MAID(problem, solver=solver, **maid_args)

    def _lower(self, x: Tensor, theta: Tensor) -> Tensor:
        return torch.stack([share * self.lower_loss(x, theta, batch) for share, batch in self._batches["train"]]).sum()

    def _upper(self, x: Tensor) -> Tensor:
        return torch.stack([share * self.upper_loss(x, batch) for share, batch in self._batches["val"]]).sum()

    @override
    def read_data(self) -> list[str]:
        """Reads training and validation data.

        Returns:
            What is wrong with them.
        """
        if self.trainer.val_dataloaders is None:
            self.trainer.fit_loop.epoch_loop.val_loop.setup_data()
        loaders: dict[str, Any] = {"train": self.trainer.train_dataloader, "val": self.trainer.val_dataloaders}
        problems = []
        for kind, loader in loaders.items():
            single = loader[0] if isinstance(loader, list) and len(loader) == 1 else loader
            try:
                batches = self.read_batches(single)
                whole = sum(length for length, _ in batches)
                self._batches[kind] = [(length / whole, batch) for length, batch in batches]
            except ValueError as error:
                problems.append(f"{kind} data: {error}")
        return problems

    @override
    def first_x(self) -> Tensor:
        """The parameter ``x``."""
        return self.x

    @override
    def publish(self, state: MAIDState) -> None:
        """Writes theta and x into the parameters.

        Args:
            state: The new one.
        """
        super().publish(state)
        self.x.copy_(state.x)

    @override
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """The upper loss of the batch at the present x, as ``val_loss``."""
        self.log("val_loss", self.upper_loss(self.x, batch), sync_dist=True, batch_size=batch_length(batch))
