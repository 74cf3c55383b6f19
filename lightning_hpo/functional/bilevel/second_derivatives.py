"""What cannot be differentiated twice, and how torch says so."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

__all__ = ["SecondDerivativesMissingError", "naming_the_remedy", "require_whole_graph", "second_derivatives_missing"]


class SecondDerivativesMissingError(RuntimeError):
    """Something in the network cannot be differentiated twice."""


def second_derivatives_missing(error: BaseException) -> bool:
    """Whether an error says that something cannot be differentiated twice, so that ``product="fd"`` is the remedy.

    It knows the messages for compiled functions, operators without a second derivative (fused attention, recurrent
    networks in cuDNN, ``grid_sample``) and functions marked as differentiable once.

    Args:
        error: What was raised.

    Returns:
        Whether it is that.

    Example:
        >>> second_derivatives_missing(RuntimeError("derivative for aten::_thing_backward is not implemented"))
        True
        >>> second_derivatives_missing(RuntimeError("out of memory"))
        False
    """
    if isinstance(error, SecondDerivativesMissingError):
        return True
    message = str(error).lower()
    return isinstance(error, RuntimeError) and (
        ("derivative for" in message and "is not implemented" in message)
        or "not currently support double backward" in message
        or "double backwards is not supported" in message
        or "once_differentiable" in message
    )


def require_whole_graph(gradient: Tensor) -> None:
    """Refuses a gradient through a function that is marked as differentiable once.

    Its error sits beside the way to the parameters, where ``torch.autograd.grad`` never looks: curvature would be
    silently missing. Visits each node of the graph once, on the host.

    Args:
        gradient: A gradient with a graph, or without.

    Raises:
        RuntimeError: If there is such a function, with torch's words.

    Example:
        >>> import torch
        >>> weight = torch.ones(1, requires_grad=True)
        >>> require_whole_graph(3 * weight**2)
    """
    nodes = [gradient.grad_fn]
    seen = set(nodes)
    while nodes:
        node = nodes.pop()
        if node is None:
            continue
        if node.name() == "torch::autograd::Error":
            raise RuntimeError("trying to differentiate twice a function that was marked with @once_differentiable")
        new = {following for following, _ in node.next_functions} - seen
        seen |= new
        nodes.extend(new)


@contextmanager
def naming_the_remedy() -> Iterator[None]:
    """Turns torch's errors about missing second derivatives into one that says what helps.

    Raises:
        SecondDerivativesMissingError: In place of torch's.

    Example:
        >>> with naming_the_remedy():
        ...     raise RuntimeError("derivative for aten::_thing_backward is not implemented")
        Traceback (most recent call last):
        ...
        lightning_hpo...SecondDerivativesMissingError: the training loss cannot be differentiated twice...
    """
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, SecondDerivativesMissingError) or not second_derivatives_missing(error):
            raise
        raise SecondDerivativesMissingError(
            f"the training loss cannot be differentiated twice; use product='fd', or sdpa_kernel(SDPBackend.MATH) for "
            f"attention, torch.backends.cudnn.flags(enabled=False) for recurrent networks, the module before "
            f"torch.compile: {error}"
        ) from error
