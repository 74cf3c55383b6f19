"""Which parameters of a fit follow the validation loss: parts of the network, and hyperparameters."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lightning_hpo.hyper import HyperparameterSet
from lightning_hpo.module_losses import hyperparameter_sets
from lightning_hpo.raw_hyperparameters import HiddenParameters, numbers

__all__ = ["OuterParameters"]


class OuterParameters:
    """The outer parameters of a module, and hyperparameters beside it.

    Args:
        module: The module. Sets of hyperparameters inside of it are outer, and so is what its ``outer_parameters()``
            returns, where it has this method and ``names`` is empty.
        names: Names of parameters of the module or of parts of it; frozen ones among them are left alone.
        hypers: A set that is not in the module.

    Attributes:
        sets: Sets of hyperparameters by name.
        parts: Parameters of the network by name.
        problems: What is wrong, in words.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
        >>> outer = OuterParameters(net, ["0"])
        >>> list(outer.parts), outer.problems
        (['0.weight', '0.bias'], [])
        >>> outer.hide()
        >>> [parameter.requires_grad for parameter in net.parameters()]
        [False, False, True, True]
        >>> outer.release()
    """

    def __init__(self, module: nn.Module, names: Sequence[str] = (), hypers: HyperparameterSet | None = None) -> None:
        self.sets: dict[str, HyperparameterSet] = dict(hyperparameter_sets(module))
        if hypers is not None and all(hypers is not part for part in self.sets.values()):
            self.sets["hypers" if "hypers" not in self.sets else "given"] = hypers
        raws = {id(raw) for part in self.sets.values() for raw in part.parameters()}
        named = {name: p for name, p in module.named_parameters() if id(p) not in raws}
        self.problems = [
            f"`outer` names '{wanted}', but the module has no such parameter or part."
            for wanted in names
            if not any(_is_in(name, wanted) for name in named)
        ]
        chosen = [name for name in named if any(_is_in(name, wanted) for wanted in names)]
        given = getattr(module, "outer_parameters", None)
        if not names and callable(given):
            chosen = self._returned(type(module).__name__, [id(p) for p in given()], named, raws)
        self.parts = {name: named[name] for name in chosen if named[name].requires_grad}
        if chosen and not self.parts:
            self.problems.append(f"all outer parameters are frozen: {chosen}; set `requires_grad`.")
        if not self.problems and not (self.sets or chosen):
            self.problems.append(
                "nothing is outer: name parts of the network (`outer=('encoder',)`), define `outer_parameters()`, or "
                "give the module a `HyperparameterSet` that its training step reads."
            )
        if not any(p.requires_grad for name, p in named.items() if name not in self.parts):
            self.problems.append("every parameter is outer, and nothing is left to be inner; name fewer.")
        self._hidden = HiddenParameters()

    def _returned(
        self, owner: str, wanted: Sequence[int], named: Mapping[str, nn.Parameter], raws: set[int]
    ) -> list[str]:
        """Names of what ``outer_parameters()`` returned."""
        names = {id(parameter): name for name, parameter in named.items()}
        if any(key not in names and key not in raws for key in wanted):
            self.problems.append(f"`outer_parameters()` of `{owner}` returns tensors that are not parameters of it.")
        return [names[key] for key in wanted if key in names]

    def groups(self) -> list[list[nn.Parameter]]:
        """The network's part, and each set; none of them empty."""
        groups = [list(self.parts.values()), *(list(part.parameters()) for part in self.sets.values())]
        return [group for group in groups if group]

    def hide(self) -> None:
        """Takes them out of training's gradient: DDP must not wait for it, and no optimizer must step them."""
        self._hidden.hide(parameter for group in self.groups() for parameter in group)

    def release(self) -> None:
        """Undoes :meth:`hide`."""
        self._hidden.show()

    def numbers(self) -> dict[str, float | list[float]]:
        """Values of hyperparameters by name, and lengths of the network's tensors; on the host."""
        return numbers(self.sets) | {name: part.detach().float().norm().item() for name, part in self.parts.items()}

    def summary(self) -> dict[str, Tensor]:
        """Mean values of hyperparameters by name, and lengths of the network's tensors; on the device, for logging."""
        means = {
            f"{label}.{name}" if len(self.sets) > 1 else name: value.detach().float().mean()
            for label, part in self.sets.items()
            for name, value in part.values().items()
        }
        return means | {name: torch.linalg.vector_norm(part.detach().float()) for name, part in self.parts.items()}


def _is_in(name: str, part: str) -> bool:
    return name == part or name.startswith(f"{part}.")
