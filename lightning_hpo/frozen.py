"""Weights that stay what they are for a while, exactly, under any Trainer."""

from collections.abc import Iterable

from torch import nn

__all__ = ["FrozenModule"]

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class FrozenModule:
    """Freezes a module until :meth:`restore`: no weight gradients, no running statistics.

    One parameter, the anchor, goes on requiring a gradient, which :meth:`drop_gradient` throws away before each step:
    DistributedDataParallel and the gradient scaler refuse to work without any.

    Args:
        module: What is frozen.
        anchor: A parameter of it that every training step uses, best the last and smallest one.
        before: Requirements of parameters that another :class:`FrozenModule` has changed already.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
        >>> frozen = FrozenModule(net, anchor=net[1].bias)
        >>> [parameter.requires_grad for parameter in net.parameters()]
        [False, False, False, True]
        >>> frozen.restore()
        >>> all(parameter.requires_grad for parameter in net.parameters())
        True
    """

    def __init__(
        self, module: nn.Module, anchor: nn.Parameter, before: Iterable[tuple[nn.Parameter, bool]] = ()
    ) -> None:
        self.module, self.anchor = module, anchor
        self.required: list[tuple[nn.Parameter, bool]] = []
        self._norms: list[nn.Module] = []
        known = dict(before)
        for parameter in module.parameters():
            wanted = parameter is anchor
            if parameter.requires_grad != wanted:
                self.required.append((parameter, known.get(parameter, parameter.requires_grad)))
                parameter.requires_grad_(wanted)

    def hold_statistics(self) -> None:
        """Stops the running statistics of batch norms, which are weights, too; call it when training starts."""
        norms = [norm for norm in self.module.modules() if isinstance(norm, _BATCH_NORMS) and norm.training]
        self._norms += [norm.eval() for norm in norms]

    def drop_gradient(self) -> None:
        """Throws the anchor's gradient away; call it before every optimizer step."""
        self.anchor.grad = None

    def restore(self) -> None:
        """Gives every parameter and batch norm back what it had."""
        for parameter, required in self.required:
            parameter.requires_grad_(required)
        for norm in self._norms:
            norm.train()
        self.required, self._norms = [], []
