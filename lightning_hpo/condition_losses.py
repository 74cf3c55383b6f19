"""The validation loss of a module with hypernetized parts as a function of their condition; no Trainer needed."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_hpo import distributed
from lightning_hpo.module_losses import ModuleLosses, NoLossError
from lightning_hpo.nn.mip_hypernetworks import Hypernetized
from lightning_hpo.whole_data import batch_length

__all__ = ["ConditionLosses", "lowest", "mean_losses"]


class ConditionLosses:
    """Losses at conditions, and steps along their gradient, with all weights fixed.

    The present condition of the parts is whatever was asked for last.

    Args:
        losses: The module's losses.
        nets: Its hypernetized parts, all with the same conditions.

    Example:
        >>> from torch import nn
        >>> from lightning_hpo.nn.mip_hypernetworks import hypernetize
        >>> class Net(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.net = hypernetize(nn.Linear(1, 1), 1)
        ...     def training_step(self, batch):
        ...         return self.net(batch).sum() * 0 + (self.net.condition["gamma_0"] - 0.3) ** 2
        ...     validation_step = training_step
        >>> module = Net()
        >>> losses = ConditionLosses(ModuleLosses(module, {}), [module.net])
        >>> losses.sums(torch.tensor([[0.3], [0.8]]), [torch.ones(2, 1), torch.ones(4, 1)])
        tensor([0.0000, 1.5000, 6.0000])
        >>> gamma = losses.refined(torch.tensor([0.5]), torch.tensor([True]), [torch.ones(2, 1)] * 100, 100, lr=0.05)
        >>> round(gamma.item(), 2)
        0.3
    """

    def __init__(self, losses: ModuleLosses, nets: Sequence[Hypernetized]) -> None:
        self.losses, self.nets = losses, nets

    def at(self, gamma: Tensor, batch: Any) -> Tensor:
        """The validation loss of a batch, differentiable in the condition.

        Args:
            gamma: ``(k)``.
            batch: On the module's device.

        Returns:
            A scalar.
        """
        for net in self.nets:
            net.gamma = gamma
        return self.losses.val([batch])({**self.losses.params}, {})

    @torch.no_grad()
    def sums(self, gammas: Tensor, batches: Iterable[Any]) -> Tensor:
        """Losses times examples at some conditions, and examples, summed over this rank's batches.

        Args:
            gammas: ``(n, k)``.
            batches: On the module's device.

        Returns:
            ``(n + 1)``, in 32 bits.

        Raises:
            ValueError: If a batch has no length.
        """
        found = torch.zeros(len(gammas) + 1, device=gammas.device)
        for batch in batches:
            weight = batch_length(batch)
            losses = torch.stack([self.at(gamma, batch) for gamma in gammas]).float()
            found += weight * torch.cat([losses, torch.ones_like(losses[:1])])
        return found

    def refined(self, gamma: Tensor, free: Tensor, batches: Iterable[Any], steps: int, lr: float) -> Tensor:
        """Steps of Adam on a condition, one a batch, with a learning rate that falls linearly to zero.

        Args:
            gamma: Where to begin, ``(k)``.
            free: Which of the numbers may move, ``(k)``.
            batches: On the module's device, as many on every rank; those of all ranks make one step.
            steps: How many there are.
            lr: First learning rate.

        Returns:
            The condition in the end, ``(k)``, within [0, 1]; nan if a gradient was not finite.

        Raises:
            NoLossError: If the loss has no gradient in the condition.
        """
        gamma = gamma.detach().clone().requires_grad_()
        optimizer, finite = torch.optim.Adam([gamma], lr), torch.tensor(True, device=gamma.device)
        for step, batch in enumerate(batches):
            with torch.enable_grad():
                loss = self.at(gamma, batch)
                slope = torch.autograd.grad(loss, gamma, allow_unused=True)[0] if loss.requires_grad else None
            if slope is None:
                raise NoLossError("the validation loss has no gradient in the condition: is it detached?")
            slope = distributed.mean(slope)
            finite &= slope.isfinite().all()
            gamma.grad = slope.nan_to_num(0.0, 0.0, 0.0) * free
            optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
            optimizer.step()
            gamma.data.clamp_(0, 1)
        return gamma.detach().where(finite, torch.nan)

    def improved(
        self, gamma: Tensor, free: Tensor, draw: Callable[[int], Iterable[Any]], steps: int, lr: float, size: int
    ) -> Tensor:
        """What :meth:`refined` comes to where that has the lower loss, and where it began otherwise.

        Args:
            gamma: Where to begin, ``(k)``.
            free: Which of the numbers may move, ``(k)``.
            draw: Gives so many batches, as many on every rank.
            steps: How many steps there are, each on a batch.
            lr: First learning rate.
            size: On how many further batches both are compared.

        Returns:
            The better condition, ``(k)``.

        Raises:
            NoLossError: If the loss has no gradient in the condition, or none that is finite.
        """
        found = self.refined(gamma, free, draw(steps), steps, lr)
        if not bool(torch.isfinite(found).all()):
            raise NoLossError("a gradient in the condition was not finite")
        first, last = mean_losses(self.sums(torch.stack([gamma, found]), draw(size)))
        return found if last < first else gamma


def mean_losses(sums: Tensor) -> list[float]:
    """Means over all examples of all ranks, on the host.

    Args:
        sums: What :meth:`ConditionLosses.sums` gave on this rank.

    Returns:
        One loss a condition; nan where there was no example.

    Example:
        >>> mean_losses(torch.tensor([3.0, 6.0, 2.0]))
        [1.5, 3.0]
    """
    *totals, examples = distributed.sum(sums).tolist()
    return [total / examples if examples else math.nan for total in totals]


def lowest(losses: Sequence[float]) -> int | None:
    """Where the lowest of finite losses is.

    Args:
        losses: Any numbers.

    Returns:
        Its index; None if no loss is finite.

    Example:
        >>> lowest([2.0, 1.0, float("nan")]), lowest([float("inf")])
        (1, None)
    """
    finite = [index for index, loss in enumerate(losses) if math.isfinite(loss)]
    return min(finite, key=losses.__getitem__) if finite else None
