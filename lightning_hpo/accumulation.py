"""Windows of micro-batches whose gradient is the mean over their samples, whatever their number and sizes."""

from collections.abc import Iterable

import torch
from torch import Tensor

__all__ = ["AccumulationWindow"]


class AccumulationWindow:
    r"""The micro-batches of one optimizer step, and the correction that makes their gradient a mean over samples.

    Lightning divides each loss by the planned number :math:`K` of micro-batches, so that a window sums up
    :math:`\sum_j g_j / K`. With sizes :math:`n_j` the gradient of the whole batch is
    :math:`\sum_j n_j g_j / \sum_j n_j`. The two differ where a window is short, as the last one of an epoch, or its
    micro-batches are not equal. Before a micro-batch of another size the gradient so far is brought to its unit; at
    the end the sum becomes a mean. Where sizes are equal and the window is full no gradient is touched.

    Example:
        >>> weight = torch.zeros(1, requires_grad=True)
        >>> window = AccumulationWindow()
        >>> for samples in ([1.0, 1.0], [4.0]):  # of 4 planned
        ...     window.add(len(samples), [weight])
        ...     (weight * torch.tensor(samples)).mean().div(4).backward()
        >>> window.finish([weight], accumulation=4)
        >>> weight.grad, window.samples
        (tensor([2.]), 3)
    """

    def __init__(self) -> None:
        self.sizes: list[int] = []

    @property
    def samples(self) -> int:
        """Samples of the micro-batches so far."""
        return sum(self.sizes)

    def reset(self) -> None:
        """Begins a new window."""
        self.sizes = []

    def add(self, size: int, parameters: Iterable[Tensor]) -> None:
        """Notes a micro-batch that is about to be differentiated.

        Args:
            size: Its samples.
            parameters: What holds the gradient so far.
        """
        if self.sizes and self.sizes[-1] != size:
            _scale_gradients(parameters, self.sizes[-1] / size)
        self.sizes.append(size)

    def finish(
        self, parameters: Iterable[Tensor], accumulation: int, last: float | None = None, samples: float | None = None
    ) -> None:
        """Turns what has been accumulated into the gradient of the mean loss over all samples.

        Args:
            parameters: What holds the gradient.
            accumulation: Micro-batches by which each loss was divided.
            last: Samples of the last micro-batch, where ranks differ those of all ranks; this rank's by default.
            samples: Samples of the window, likewise. The gradient is then that of the ranks' mean losses.
        """
        last, samples = last or self.sizes[-1], samples or self.samples
        if last * accumulation != samples:
            _scale_gradients(parameters, last * accumulation / samples)


@torch.no_grad()
def _scale_gradients(parameters: Iterable[Tensor], factor: float) -> None:
    gradients = [p.grad for p in parameters if p.grad is not None]
    if gradients:
        torch._foreach_mul_(gradients, factor)
