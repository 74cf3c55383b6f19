"""Optimizer settings that hold for one step: a multiple of the learning rate on top of any schedule."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

__all__ = ["ScaledStep"]


class ScaledStep:
    """Changes settings of an optimizer's groups when a step begins, and puts them back when it ends.

    Between steps the optimizer holds what the user and the scheduler set, so that a scheduler that multiplies the
    learning rate never compounds ours, and checkpoints hold the user's.

    Args:
        optimizer: Any torch optimizer.
        settings: Given a group, the settings to use in this step, by name.

    Example:
        >>> import torch
        >>> weight = torch.ones(1, requires_grad=True)
        >>> optimizer = torch.optim.SGD([weight], lr=0.1)
        >>> scaled = ScaledStep(optimizer, lambda group: {"lr": 2 * group["lr"]})
        >>> weight.sum().backward()
        >>> optimizer.step()
        >>> weight.item(), optimizer.param_groups[0]["lr"]
        (0.800000011920929, 0.1)
        >>> scaled.remove()
    """

    def __init__(self, optimizer: Optimizer, settings: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        self._optimizer, self._settings = optimizer, settings
        self._before: list[dict[str, Any]] = []
        self._handles: list[RemovableHandle] = [
            optimizer.register_step_pre_hook(lambda *_: self._begin()),
            optimizer.register_step_post_hook(lambda *_: self.restore()),
        ]

    def _begin(self) -> None:
        self.restore()  # of a step that was interrupted
        for group in self._optimizer.param_groups:
            changed = self._settings(group)
            self._before.append({name: _copy(group[name]) for name in changed})
            _assign(group, changed)

    def restore(self) -> None:
        """Puts the settings back, if a step was interrupted; otherwise there is nothing to do."""
        for group, before in zip(self._optimizer.param_groups, self._before, strict=False):
            _assign(group, before)
        self._before = []

    def remove(self) -> None:
        """Puts the settings back and lets go of the optimizer."""
        self.restore()
        for handle in self._handles:
            handle.remove()
        self._handles = []


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _assign(group: dict[str, Any], settings: dict[str, Any]) -> None:
    for name, value in settings.items():
        if isinstance(group[name], Tensor):  # capturable and compiled optimizers hold on to the tensor
            group[name].copy_(value if isinstance(value, Tensor) else group[name].new_tensor(value))
        else:
            group[name] = value
