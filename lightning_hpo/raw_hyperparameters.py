"""Raw hyperparameters while a module is trained: out of training's gradient, stepped by an optimizer of their own."""

from collections.abc import Iterable, Mapping

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_hpo import distributed
from lightning_hpo.hyper import HyperparameterSet
from lightning_hpo.module_losses import hyperparameter_sets

__all__ = ["HiddenParameters", "named_sets", "numbers", "share", "step_raw"]


def named_sets(module: nn.Module, given: HyperparameterSet | None = None) -> dict[str, HyperparameterSet]:
    """The sets inside a module and one that is given, under short names.

    Args:
        module: The module.
        given: Another set, or one that is inside.

    Returns:
        The sets by the last part of their names, or by the whole where two end alike.

    Example:
        >>> from lightning_hpo import Positive
        >>> net = nn.Sequential(nn.Linear(1, 1))
        >>> net[0].penalty = HyperparameterSet(decay=Positive(0.1))
        >>> list(named_sets(net, HyperparameterSet(other=Positive(0.1))))
        ['penalty', 'hypers']
    """
    inside = hyperparameter_sets(module)
    short = {name.rpartition(".")[2]: part for name, part in inside.items()}
    found = short if len(short) == len(inside) else inside
    if given is not None and all(given is not part for part in inside.values()):
        found = {**found, "hypers" if "hypers" not in found else "given": given}
    return found


def numbers(sets: Mapping[str, HyperparameterSet]) -> dict[str, float | list[float]]:
    """The values of several sets by name, on the host.

    Args:
        sets: Sets by name.

    Returns:
        Numbers, or lists of them; with several sets each name begins with that of its set.

    Example:
        >>> from lightning_hpo import Positive
        >>> numbers({"loss": HyperparameterSet(decay=Positive(0.5))})
        {'decay': 0.5}
    """
    return {
        f"{label}.{name}" if len(sets) > 1 else name: value
        for label, part in sets.items()
        for name, value in part.numbers().items()
    }


class HiddenParameters:
    """Takes parameters out of training's gradient for a while.

    DDP must not wait for gradients that training does not compute, and no optimizer of the user's must step these.

    Example:
        >>> from lightning_hpo import Positive
        >>> hypers = HyperparameterSet(decay=Positive(0.5))
        >>> raws = HiddenParameters()
        >>> raws.hide(hypers.parameters())
        >>> hypers.raw["decay"].requires_grad
        False
        >>> raws.show()
        >>> hypers.raw["decay"].requires_grad
        True
    """

    def __init__(self) -> None:
        self._hidden: list[nn.Parameter] = []  # those that required a gradient

    def hide(self, parameters: Iterable[nn.Parameter]) -> None:
        """Takes parameters out of training's gradient, until :meth:`show`."""
        self._hidden += [raw for raw in parameters if raw.requires_grad]
        for raw in self._hidden:
            raw.requires_grad_(False)

    def show(self) -> None:
        """Gives them back as they were."""
        for raw in self._hidden:
            raw.requires_grad_(True)
        self._hidden = []


def share(sets: Mapping[str, HyperparameterSet]) -> None:
    """Gives every rank the values of the first one.

    Args:
        sets: Sets by name.
    """
    for part in sets.values():
        for raw in part.parameters():
            raw.data.copy_(distributed.broadcast(raw.data))


def step_raw(
    optimizer: Optimizer,
    raws: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor],
    norm: float,
    max_norm: float | None = None,
) -> None:
    """One step of an optimizer of raw hyperparameters, by gradients that were computed elsewhere.

    Args:
        optimizer: Their optimizer.
        raws: The raw hyperparameters by name.
        gradients: Their gradients.
        norm: The norm of all gradients.
        max_norm: Longer gradients are scaled down to this.

    Example:
        >>> import torch
        >>> raw = torch.ones(1)
        >>> step_raw(torch.optim.SGD([raw], lr=0.5), {"decay": raw}, {"decay": 4 * torch.ones(1)}, 4.0, max_norm=1.0)
        >>> raw
        tensor([0.5000])
    """
    shrink = min(1.0, max_norm / norm) if max_norm is not None and norm > 0 else 1.0
    for name, raw in raws.items():
        raw.grad = gradients[name].to(raw.dtype) * shrink
    optimizer.step()
    optimizer.zero_grad()
