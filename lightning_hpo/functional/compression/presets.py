"""Schedules that need no learning: the published ones, and constant ones of a given cost."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from importlib.resources import files
from types import MappingProxyType
from typing import Any, Literal

from lightning_hpo.functional.compression.counts import constant_drop
from lightning_hpo.functional.compression.macs import TransformerMacs
from lightning_hpo.functional.compression.schedule import TokenCompressionSchedule

__all__ = ["PUBLISHED_SCHEDULES", "PublishedSchedules", "constant_at_macs"]


class PublishedSchedules(Mapping[str, Mapping[str, TokenCompressionSchedule]]):
    """The schedules that DiffRate's authors published, by model and by target in 1e9 multiply-accumulates.

    The file is read on first use. CAFormer only merges: its schedules list as `prune` what enters each block.

    Source: DiffRate (Chen et al., ICCV 2023, arXiv 2305.17997).

    Example:
        >>> list(PUBLISHED_SCHEDULES)[:3]
        ['vit_tiny_deit', 'vit_small_deit', 'vit_base_deit']
        >>> list(PUBLISHED_SCHEDULES["vit_small_deit"])
        ['2.3', '2.5', '2.7', '2.9', '3.1']
        >>> PUBLISHED_SCHEDULES["vit_small_deit"]["2.9"].macs
        2905256448
    """

    @cached_property
    def _file(self) -> dict[str, Any]:
        source = files(__package__).joinpath("diffrate_schedules.json")
        return json.loads(source.read_text(encoding="utf-8"))

    @cached_property
    def _schedules(self) -> dict[str, Mapping[str, TokenCompressionSchedule]]:
        return {
            name: MappingProxyType({target: self._schedule(name, row) for target, row in model["schedules"].items()})
            for name, model in self._file["models"].items()
        }

    def _schedule(self, name: str, row: Mapping[str, Any]) -> TokenCompressionSchedule:
        model, entry = self._file["models"][name], self.cost(name).entry
        schedule = TokenCompressionSchedule(
            row.get("prune", entry), row["merge"], entry, model["prefix"], row["macs"], model["full_macs"]
        )
        if "prune" in row:
            return schedule
        return replace(schedule, prune=tuple(entering for entering, _, _ in schedule.running()))

    @property
    def source(self) -> str:
        """Where the schedules were published.

        Example:
            >>> "2305.17997" in PUBLISHED_SCHEDULES.source
            True
        """
        return self._file["source"]

    def cost(self, name: str) -> TransformerMacs:
        """Cost model of one of the models.

        Args:
            name: Key of the model.

        Returns:
            Its cost; the counts of its schedules are exactly their `macs`.

        Raises:
            KeyError: If there is no such model.

        Example:
            >>> schedule = PUBLISHED_SCHEDULES["caformer_s36"]["5.6"]
            >>> PUBLISHED_SCHEDULES.cost("caformer_s36").count(schedule.prune, schedule.merge) == schedule.macs
            True
        """
        if name not in self._file["models"]:
            raise KeyError(f"No published schedules for {name!r}; there are {', '.join(self._file['models'])}.")
        model = self._file["models"][name]
        if model["family"] == "caformer":
            return TransformerMacs.caformer(model["widths"], model["depths"], model["image_size"])
        pixels = 3 * model["patch_size"] ** 2
        return TransformerMacs.vit(model["width"], model["depth"], model["patches"], model["prefix"], pixels)

    def __getitem__(self, name: str) -> Mapping[str, TokenCompressionSchedule]:
        if name not in self._schedules:
            raise KeyError(f"No published schedules for {name!r}; there are {', '.join(self._schedules)}.")
        return self._schedules[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._file["models"])

    def __len__(self) -> int:
        return len(self._file["models"])

    def __repr__(self) -> str:
        return f"{type(self).__name__}({{{', '.join(f'{name!r}: {list(self[name])}' for name in self)}}})"


PUBLISHED_SCHEDULES = PublishedSchedules()


def constant_at_macs(
    cost: TransformerMacs,
    target_macs: float,
    prefix: int = 1,
    kind: Literal["merge", "prune"] = "merge",
    first: int = 0,
    halves: bool = False,
) -> TokenCompressionSchedule:
    r"""The constant schedule whose cost is nearest to a target; in every segment each block gives up the same number.

    The cost falls in steps as the (not necessarily whole) number `r` of tokens a block gives up grows. Bisection
    encloses the step at the target; the nearer of its two sides is taken.

    Args:
        cost: Cost model.
        target_macs: Multiply-accumulates of one image.
        prefix: Prefix tokens of the model.
        kind: Whether tokens are merged or pruned.
        first: First block that gives up tokens.
        halves: Whether a block can give up at most half of its patches, as where they merge in pairs (ToMe).

    Returns:
        The schedule, with its `macs` and `full_macs`.

    Raises:
        ValueError: If the target is above the full cost or below what is left when all that can go has gone, or `kind`
            or `first` is out of range.

    Example:
        >>> schedule = constant_at_macs(TransformerMacs.vit(width=384, depth=12, patches=196), 2.9e9)
        >>> schedule.merge
        (185, 174, 162, 151, 139, 127, 116, 104, 93, 81, 69, 58)
        >>> schedule.macs
        2900339712
    """
    if kind not in ("merge", "prune") or not 0 <= first < len(cost.blocks):
        raise ValueError(
            f"`kind` must be 'merge' or 'prune' and `first` 0 to {len(cost.blocks) - 1}, got {kind!r} and {first!r}."
        )

    def macs(r: float) -> int:
        left = constant_drop(r, cost.entry, prefix + 1, first, halves)[1]
        return cost.count(left, left)

    low, high = 0.0, float(max(cost.entry))  # dearest and cheapest
    if not macs(high) <= target_macs <= macs(low):
        raise ValueError(
            f"A constant schedule of this model costs {macs(high) / 1e9:.4g} G to {macs(low) / 1e9:.4g} G "
            f"multiply-accumulates, the target is {target_macs / 1e9:.4g} G."
        )
    while low < (middle := (low + high) / 2) < high:  # until no number lies between
        low, high = (middle, high) if macs(middle) >= target_macs else (low, middle)
    nearest = min(low, high, key=lambda r: abs(macs(r) - target_macs))
    entering, left = constant_drop(nearest, cost.entry, prefix + 1, first, halves)
    prune = left if kind == "prune" else entering
    return TokenCompressionSchedule(prune, left, cost.entry, prefix, cost.count(prune, left), cost.full)
