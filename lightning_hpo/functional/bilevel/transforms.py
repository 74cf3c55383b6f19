"""Calls inside of transforms of :mod:`torch.func`: products with Jacobians, and functions that see plain tensors."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["black_box", "both_products"]


def both_products(
    function: Callable[..., Tensor], *at: Tensor
) -> tuple[Callable[[Tensor], Any], Callable[..., Tensor]]:
    r"""Products with the transposed Jacobian and with the Jacobian.

    The second uses forward mode. Where that is not to be had, for an operation without a rule or inside of
    :func:`torch.autograd.forward_ad.dual_level`, which does not nest, it transposes the first, which is linear.

    Args:
        function: From tensors to a tensor.
        at: Where to differentiate.

    Returns:
        The map :math:`q \mapsto J^\top q`, which gives a tensor for one argument and a tuple for several, and the map
        :math:`p \mapsto J p`, which takes a direction for each argument.

    Example:
        >>> pull, push = both_products(lambda x: torch.stack([x[0], x[0] * x[1]]), torch.tensor([2.0, 3.0]))
        >>> pull(torch.tensor([0.0, 1.0])), push(torch.tensor([1.0, 0.0]))
        (tensor([3., 2.]), tensor([1., 3.]))
    """
    value, pull = torch.func.vjp(function, *at)[:2]
    forward_mode = True

    def push(*directions: Tensor) -> Tensor:
        nonlocal forward_mode
        if forward_mode:
            try:
                return torch.func.jvp(function, at, directions)[1]
            except RuntimeError:  # NotImplementedError, of a missing rule, is one
                forward_mode = False
        return torch.func.vjp(pull, torch.zeros_like(value))[1](directions)[0]

    return (lambda q: pull(q)[0]) if len(at) == 1 else pull, push


class Constant(torch.autograd.Function):
    """A call that sees plain tensors, whatever transform is at work outside, and has no derivative.

    Under :func:`torch.func.vmap` it runs once for each element of the batch.
    """

    @staticmethod
    def forward(run: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        return run(*(tensor.detach() for tensor in tensors)).detach()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG004
        ctx.mark_non_differentiable(output)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], run: Any, *tensors: Tensor) -> tuple[Tensor, int]:
        results = []
        for index in range(info.batch_size):
            pairs = zip(tensors, in_dims[1:], strict=True)
            row = [part if dim is None else part.select(dim, index) for part, dim in pairs]
            results.append(Constant.apply(run, *row))
        return torch.stack(results), 0

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, ...]:  # noqa: ARG004
        return (None,) * len(ctx.needs_input_grad)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> None:  # noqa: ARG004
        return None


def black_box(run: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """Calls a function of plain tensors from inside of any transform of :mod:`torch.func`; the result is a constant.

    Args:
        run: From tensors to a tensor; it may leave torch, call ``backward`` or train.
        tensors: Its arguments.

    Returns:
        Its result.

    Example:
        >>> def root(a):
        ...     return torch.from_numpy(a.numpy() ** 0.5)
        >>> torch.func.jvp(lambda a: a * black_box(root, a), (torch.tensor([4.0]),), (torch.tensor([1.0]),))
        (tensor([8.]), tensor([2.]))
    """

    def training(*plain: Tensor) -> Tensor:
        with torch.enable_grad():
            return run(*plain)

    return Constant.apply(training, *(tensor.detach() for tensor in tensors))
