"""The parts of a module whose weights follow a condition, which all have the same one."""

from torch import Tensor, nn

from lightning_hpo import distributed
from lightning_hpo.functional.bilevel.condition_draws import sample_conditions
from lightning_hpo.functional.bilevel.condition_spec import ConditionSpec
from lightning_hpo.nn.mip_hypernetworks import Hypernetized

__all__ = ["ConditionedParts"]


class ConditionedParts:
    """The hypernetized parts of a module, and the condition that they are given.

    Args:
        module: Any module.

    Attributes:
        nets: The parts.
        spec: Their conditions: those of the first part.

    Example:
        >>> import torch
        >>> from lightning_hpo.nn.mip_hypernetworks import hypernetize
        >>> parts = ConditionedParts(nn.Sequential(hypernetize(nn.Linear(1, 1), ConditionSpec().add("x", 0.0, 2.0))))
        >>> parts.hand_over(torch.tensor([0.25]))
        >>> parts.nets[0].condition
        {'x': tensor(0.5000)}
    """

    def __init__(self, module: nn.Module) -> None:
        self.nets = [part for part in module.modules() if isinstance(part, Hypernetized)]
        self.spec = self.nets[0].spec if self.nets else ConditionSpec()

    def problems(self) -> list[str]:
        """What is wrong with them, one sentence a problem."""
        if all(net.spec == self.spec for net in self.nets):
            return []
        return ["hypernetized parts have different conditions; give them the same `ConditionSpec`."]

    def hand_over(self, gamma: Tensor | None) -> None:
        """Makes a condition the present one; None takes it back.

        Args:
            gamma: In [0, 1], ``(k)`` or ``(batch, k)``, on the device of the parts.
        """
        for net in self.nets:
            net.gamma = gamma

    def draw(self, first: int, rows: int, seed: int, stratified: bool) -> Tensor:
        """This rank's share of the next draws.

        Args:
            first: How many conditions all ranks have drawn before.
            rows: How many each rank draws now.
            seed: Decides the draws.
            stratified: As in :func:`~lightning_hpo.functional.bilevel.condition_draws.sample_conditions`.

        Returns:
            ``(rows, k)`` on the CPU.
        """
        ranks = distributed.world_size()
        numbers = range(first + distributed.rank(), first + rows * ranks, ranks)
        return self.spec.from_uniform(sample_conditions(numbers, len(self.spec.conditions), seed, stratified))

    def values(self, gamma: Tensor) -> dict[str, float]:
        """The values of one condition by name, on the host.

        Args:
            gamma: ``(k)`` on the CPU.

        Returns:
            Numbers.
        """
        return {name: value.item() for name, value in self.spec.decode(gamma).items()}

    def same(self, other: "ConditionedParts") -> bool:
        """Whether they are the very same parts."""
        return [id(net) for net in self.nets] == [id(net) for net in other.nets]
