"""From learned kept counts to a schedule, and from a budget to a gradient."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_hpo.functional.compression.counts import halved_at_most, segments
from lightning_hpo.functional.compression.diffrate import (
    candidate_counts,
    initial_probabilities,
    probabilities_with_mean,
)
from lightning_hpo.functional.compression.macs import TransformerMacs
from lightning_hpo.functional.compression.presets import constant_at_macs
from lightning_hpo.functional.compression.schedule import TokenCompressionSchedule

__all__ = ["RateLayout"]


@dataclass(frozen=True)
class RateLayout:
    """Which blocks of a network have rates to learn.

    Args:
        cost: Multiply-accumulates as a function of the kept counts.
        exempt: Blocks that never compress.
        prefix: Tokens that are always kept.
        prunes: Whether tokens may be dropped; otherwise they are only merged.
        halves: Whether tokens merge in pairs, so that a block gives up at most half of its patches.

    Example:
        >>> layout = RateLayout(TransformerMacs.vit(width=8, depth=3, patches=16), (True, False, False))
        >>> layout.blocks, layout.kinds
        ((1, 2), 2)
    """

    cost: TransformerMacs
    exempt: tuple[bool, ...]
    prefix: int = 1
    prunes: bool = True
    halves: bool = False

    @property
    def blocks(self) -> tuple[int, ...]:
        """Blocks that compress, counted from 0."""
        return tuple(index for index, exempt in enumerate(self.exempt) if not exempt)

    @property
    def kinds(self) -> int:
        """Kept counts a block: after pruning and after merging, or after merging alone."""
        return 2 if self.prunes else 1

    @property
    def patches(self) -> int:
        """Patch tokens that enter the first block."""
        return self.cost.entry[0] - self.prefix

    def counts(self, kept: Tensor) -> tuple[Tensor, Tensor]:
        """Kept counts of every block, exempt blocks filled in.

        Args:
            kept: Patches kept by the compressing blocks, prefix not counted, shape ``(kinds, blocks)``.

        Returns:
            Tokens after pruning and after merging, prefix counted, each of shape ``(depth,)``.

        Example:
            >>> layout = RateLayout(TransformerMacs.vit(width=8, depth=3, patches=16), (True, False, False))
            >>> layout.counts(torch.tensor([[9.0, 6.0], [8.0, 5.0]]))
            (tensor([17., 10.,  7.]), tensor([17.,  9.,  6.]))
        """
        nothing = [kept.new_full((2,), float(tokens)) for tokens in self.cost.entry]  # fills need no copy from the host
        learned = iter((kept + self.prefix).unbind(1))
        columns = [full if exempt else next(learned) for full, exempt in zip(nothing, self.exempt, strict=True)]
        if not self.prunes:
            columns = [torch.stack([full[0], column[-1]]) for full, column in zip(nothing, columns, strict=True)]
        prune, merge = torch.stack(columns, 1)
        return prune, self._halved_at_most(merge) if self.halves else merge

    def _halved_at_most(self, merge: Tensor) -> Tensor:
        """Like :func:`~lightning_hpo.functional.compression.counts.halved_at_most`, without the host."""
        left = []
        for start, stop in segments(self.cost.entry):
            alive = merge.new_full((), float(self.cost.entry[start] - self.prefix))
            for count in merge[start:stop].unbind():
                alive = torch.minimum(alive, torch.maximum(count - self.prefix, (alive / 2).ceil()))
                left.append(alive + self.prefix)
        return torch.stack(left)

    def schedule(self, kept: Tensor) -> TokenCompressionSchedule:
        """The schedule that the kept counts amount to, running minimum taken; reads them back to the host.

        Args:
            kept: As for :meth:`counts`.

        Returns:
            The schedule with its cost.

        Raises:
            ValueError: If a count is not finite.

        Example:
            >>> layout = RateLayout(TransformerMacs.vit(width=8, depth=3, patches=16), (True, False, False))
            >>> layout.schedule(torch.tensor([[9.0, 12.0], [8.0, 5.0]])).prune
            (17, 10, 9)
        """
        if not bool(torch.isfinite(kept).all()):
            raise ValueError("The rates are not finite because the training loss was not; check loss and precision.")
        prune, merge = (counts.round().long().tolist() for counts in self.counts(kept))
        alive = TokenCompressionSchedule(tuple(prune), tuple(merge), self.cost.entry, self.prefix).running()
        return TokenCompressionSchedule(
            tuple(after for _, after, _ in alive),
            tuple(left for _, _, left in alive),
            self.cost.entry,
            self.prefix,
            macs=self.cost.count(prune, merge),
            full_macs=self.cost.full,
        )

    def start(self, budget: float, granularity: int = 1) -> Tensor:
        """Probabilities of the candidate counts to begin learning with.

        Where tokens merge in pairs, every block begins with the same number of them, as the budget allows; elsewhere as
        :func:`~lightning_hpo.functional.compression.diffrate.initial_probabilities` has it.

        Args:
            budget: Multiply-accumulates to meet.
            granularity: Step of the candidate counts.

        Returns:
            Shape ``(kinds, blocks, candidates)``.

        Example:
            >>> cost = TransformerMacs.vit(width=8, depth=3, patches=16)
            >>> layout = RateLayout(cost, (False,) * 3, prunes=False, halves=True)
            >>> layout.start(budget=0.9 * cost.full).shape
            torch.Size([1, 3, 16])
        """
        candidates = candidate_counts(self.patches, granularity)
        if not self.halves:
            return initial_probabilities(self.kinds, len(self.blocks), len(candidates))
        constant = constant_at_macs(self.cost, budget, self.prefix, "merge", halves=True)
        counts = [constant.merge[index] - self.prefix for index in self.blocks]
        return torch.stack([probabilities_with_mean(count, candidates) for count in counts])[None]

    def budget_slope(
        self, kept: Tensor, budget: float, weight: float, unit: float, multiplier: Tensor | float = 0.0
    ) -> tuple[Tensor, Tensor, Tensor]:
        r"""Cost, budget loss :math:`w e^2 + \mu e` with :math:`e = (F - T) / u`, and its slope, all on the device.

        Args:
            kept: As for :meth:`counts`.
            budget: Multiply-accumulates :math:`T` to meet.
            weight: The weight :math:`w`.
            unit: The unit :math:`u`: ``1e9`` in the paper, the dense cost for the relative loss.
            multiplier: The multiplier :math:`\mu` of the method of multipliers; the paper has none.

        Returns:
            Cost, loss, and slope of shape ``(kinds, blocks)``, equal for the kinds of a block as in the paper.

        References:
            Chen et al., "DiffRate", ICCV 2023, eq. 9; Bertsekas, "Constrained Optimization and Lagrange Multiplier
            Methods", 1982, ch. 2.

        Example:
            >>> layout = RateLayout(TransformerMacs.vit(width=8, depth=3, patches=16), (True, False, False))
            >>> kept = torch.full((2, 2), 9.0)
            >>> macs, loss, slope = layout.budget_slope(kept, budget=layout.cost.full, weight=1.0, unit=1e3)
            >>> bool((slope < 0).all())  # below the budget: keep more
            True
        """
        macs, slope = self.cost.count_and_slope(*self.counts(kept.detach()))
        excess = (macs - budget) / unit
        rows = torch.stack([slope[index] for index in self.blocks])
        loss = weight * excess.square() + multiplier * excess
        return macs, loss, ((2 * weight * excess + multiplier) / unit * rows).expand_as(kept)

    def reachable(self, granularity: int = 1) -> tuple[int, int]:
        """Cost of the shortest schedule that can be learned, and of the dense network.

        Args:
            granularity: Step of the candidate counts.

        Returns:
            Both bounds on a budget.

        Raises:
            ValueError: If ``granularity`` is not from 1 to the number of patches.

        Example:
            >>> RateLayout(TransformerMacs.vit(width=384, depth=12, patches=196), (True,) + (False,) * 11).reachable()
            (620653056, 4599177216)
        """
        fewest = self.prefix + int(candidate_counts(self.patches, granularity)[-1])
        least: Sequence[int] = [
            full if exempt else fewest for full, exempt in zip(self.cost.entry, self.exempt, strict=True)
        ]
        least = halved_at_most(least, self.cost.entry, self.prefix) if self.halves else least
        prune = least if self.prunes else self.cost.entry
        return self.cost.count(prune, least), self.cost.full
