"""How many tokens each block of a transformer keeps."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from importlib import import_module
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lightning_hpo.functional.compression.counts import constant_drop, running_counts, schedule_problems, whole_number

if TYPE_CHECKING:
    from lightning_hpo.functional.compression.presets import PUBLISHED_SCHEDULES, constant_at_macs

__all__ = ["PUBLISHED_SCHEDULES", "TokenCompressionSchedule", "constant_at_macs"]

_FORMAT_VERSION = 1
_RULES = {
    "importance": ("class", "mean"),
    "matching": ("features", "keys", "bipartite"),
    "size_rule": ("clamped", "unclamped"),
}


def __getattr__(name: str) -> Any:
    if name in ("PUBLISHED_SCHEDULES", "constant_at_macs"):  # made of schedules, hence a module further down
        return getattr(import_module("lightning_hpo.functional.compression.presets"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@dataclass(frozen=True)
class TokenCompressionSchedule:
    r"""Tokens kept in each block, after pruning and after merging.

    Blocks are counted from 0, prefix tokens (class, distillation, registers) are counted among the tokens. A block may
    list more tokens than reach it; the running minimum :meth:`running` is what happens.

    Args:
        prune: Tokens kept after pruning in each block.
        merge: Tokens kept after merging in each block.
        entry: Tokens entering each block when nothing is compressed. Where it changes its value (a down-sampling of a
            hierarchical model) the kept counts start anew.
        prefix: Prefix tokens, which are never dropped; 0 without a class token.
        macs: Multiply-accumulates of one image under this schedule, where known.
        full_macs: Multiply-accumulates of the uncompressed model, where known.
        importance: How patches are to be ranked, where that is not the default; see ``apply_token_compression``.
        matching: How they are to be matched, likewise.
        size_rule: What a merged token counts for, likewise.

    Raises:
        ValueError: If lengths disagree, an entry is not an integer, exceeds what enters the block or leaves fewer than
            `prefix` + 1 tokens, or a rule is unknown; all problems are listed, naming the block.

    Source: DiffRate (Chen et al., ICCV 2023, arXiv 2305.17997).

    Example:
        >>> schedule = TokenCompressionSchedule(prune=[17, 12, 9], merge=[17, 10, 7], entry=[17, 17, 17])
        >>> schedule.patches, schedule.running()
        (16, ((17, 17, 17), (17, 12, 10), (10, 9, 7)))
    """

    prune: tuple[int, ...]
    merge: tuple[int, ...]
    entry: tuple[int, ...]
    prefix: int = 1
    macs: int | None = None
    full_macs: int | None = None
    importance: Literal["class", "mean"] | None = None
    matching: Literal["features", "keys", "bipartite"] | None = None
    size_rule: Literal["clamped", "unclamped"] | None = None

    def __post_init__(self) -> None:
        lists = {name: getattr(self, name) for name in ("prune", "merge", "entry")}
        problems = [
            f"`{name}` must be a sequence of integers, got {values!r}"
            for name, values in lists.items()
            if not hasattr(values, "__iter__") or isinstance(values, (str, bytes, Mapping))
        ]
        if not problems:
            lists = {name: tuple(values) for name, values in lists.items()}
            problems += schedule_problems(**lists, prefix=self.prefix)
        for name in ("macs", "full_macs"):
            value = getattr(self, name)
            if value is not None and (whole_number(value) or 0) <= 0:
                problems.append(f"`{name}` must be a positive integer, got {value!r}")
        problems += [
            f"`{name}` must be one of {allowed} or None, got {getattr(self, name)!r}"
            for name, allowed in _RULES.items()
            if getattr(self, name) not in (None, *allowed)
        ]
        if problems:
            raise ValueError(f"Invalid token compression schedule: {'; '.join(problems)}.")
        for name, values in lists.items():
            object.__setattr__(self, name, tuple(int(value) for value in values))
        for name in ("prefix", "macs", "full_macs"):
            object.__setattr__(self, name, whole_number(getattr(self, name)))

    @property
    def patches(self) -> int:
        """Patch tokens entering the first block.

        Example:
            >>> TokenCompressionSchedule.constant(r=0, depth=2, tokens=197).patches
            196
        """
        return self.entry[0] - self.prefix

    def running(self) -> tuple[tuple[int, int, int], ...]:
        """Tokens really alive: the running minimum of the listed counts, anew in every segment of `entry`.

        Returns:
            For every block the tokens that enter it, those left after pruning and those left after merging.

        Example:
            >>> TokenCompressionSchedule(prune=[5, 7], merge=[4, 3], entry=[9, 9]).running()
            ((9, 5, 4), (4, 4, 3))
        """
        return running_counts(self.entry, self.prune, self.merge)

    def nonmonotone(self) -> tuple[int, ...]:
        """Blocks that list more tokens than are alive at that point.

        A count equal to `entry` does not make a block one of them: it says that the block compresses nothing, which is
        how blocks exempt from compression are written.

        Returns:
            Their indices, counted from 0.

        Example:
            >>> TokenCompressionSchedule(prune=[5, 7, 9], merge=[4, 3, 9], entry=[9, 9, 9]).nonmonotone()
            (1,)
        """
        rows = zip(self.entry, self.prune, self.merge, self.running(), strict=True)
        return tuple(
            block
            for block, (entry, prune, merge, (entering, pruned, _)) in enumerate(rows)
            if entering < prune < entry or pruned < merge < entry
        )

    def validate(self, entry: Sequence[int], prefix: int = 1) -> None:
        """Checks that the schedule fits a model, and warns where it lists more tokens than are alive.

        Args:
            entry: Tokens entering each block of the model when nothing is compressed.
            prefix: Prefix tokens of the model.

        Raises:
            ValueError: If depth, patches or prefix tokens differ; all differences are listed.

        Example:
            >>> TokenCompressionSchedule.constant(r=8, depth=12, tokens=197).validate(entry=[257] * 12)
            Traceback (most recent call last):
            ValueError: The schedule does not fit the model: schedule is for 196 patches, model has 256.
        """
        problems = []
        if len(entry) != len(self.entry):
            problems.append(f"schedule has {len(self.entry)} blocks, model has {len(entry)}")
        if prefix != self.prefix:
            problems.append(f"schedule is for {self.prefix} prefix tokens, model has {prefix}")
        patches = [(mine - self.prefix, theirs - prefix) for mine, theirs in zip(self.entry, entry, strict=False)]
        for mine, theirs in dict.fromkeys(pair for pair in patches if pair[0] != pair[1]):
            blocks = [block for block, pair in enumerate(patches) if pair == (mine, theirs)]
            where = "" if len(blocks) == len(patches) else f" in {_name(blocks)}"
            problems.append(f"schedule is for {mine} patches, model has {theirs}{where}")
        if problems:
            raise ValueError(f"The schedule does not fit the model: {'; '.join(problems)}.")
        if blocks := list(self.nonmonotone()):
            used = ", ".join("{1}/{2}".format(*self.running()[block]) for block in blocks)
            warnings.warn(
                f"The schedule lists more tokens than are alive in {_name(blocks)} (counted from 0); the running "
                f"minimum is used instead, after pruning/after merging: {used}.",
                UserWarning,
                stacklevel=2,
            )

    def to_dict(self) -> dict[str, Any]:
        """The schedule as plain types, with the version of the format.

        Returns:
            What :meth:`from_dict` reads.

        Example:
            >>> TokenCompressionSchedule([5], [4], [9]).to_dict()["format_version"]
            1
        """
        told = {name: value for name, value in asdict(self).items() if name not in _RULES or value is not None}
        values = {name: list(value) if isinstance(value, tuple) else value for name, value in told.items()}
        return {"format_version": _FORMAT_VERSION, **values}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TokenCompressionSchedule:
        """Reads what :meth:`to_dict` wrote.

        Args:
            data: The fields and `format_version`; all but `prune`, `merge` and `entry` may be left out.

        Returns:
            The schedule.

        Raises:
            ValueError: If the version is another one, a key is unknown or missing, or the schedule is invalid.

        Example:
            >>> schedule = TokenCompressionSchedule([5], [4], [9], macs=100)
            >>> TokenCompressionSchedule.from_dict(schedule.to_dict()) == schedule
            True
        """
        if not isinstance(data, Mapping):
            raise ValueError(f"A token compression schedule is a mapping, got {type(data).__name__}.")
        version = data.get("format_version")
        if whole_number(version) != _FORMAT_VERSION:
            raise ValueError(f"`format_version` is {version!r}, this version of the package reads {_FORMAT_VERSION}.")
        names = [field.name for field in fields(cls)]
        problems = [f"unknown key {key!r}" for key in data if key != "format_version" and key not in names]
        problems += [f"missing key {key!r}" for key in ("prune", "merge", "entry") if key not in data]
        if problems:
            raise ValueError(f"Not a token compression schedule: {', '.join(problems)}; known keys: {names}.")
        return cls(**{name: data[name] for name in names if name in data})

    def to_json(self, path: str | Path) -> None:
        """Writes the schedule to a file, one line a field.

        Args:
            path: The file; an existing one is replaced.

        Example:
            >>> import tempfile
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     TokenCompressionSchedule([5], [4], [9]).to_json(f"{folder}/schedule.json")
            ...     TokenCompressionSchedule.from_json(f"{folder}/schedule.json").merge
            (4,)
        """
        lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in self.to_dict().items())
        Path(path).write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")

    @classmethod
    def from_json(cls, path: str | Path) -> TokenCompressionSchedule:
        """Reads a file that :meth:`to_json` wrote.

        Args:
            path: The file.

        Returns:
            The schedule.

        Raises:
            ValueError: If the file is not JSON or not a valid schedule; the message names the file.

        Example:
            See :meth:`to_json`.
        """
        try:
            return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
        except ValueError as error:  # of which both a syntax error and an undecodable byte are kinds
            raise ValueError(f"{path}: {error}") from error

    @classmethod
    def constant(
        cls,
        r: float,
        depth: int,
        tokens: int,
        prefix: int = 1,
        kind: Literal["merge", "prune"] = "merge",
        first: int = 0,
    ) -> TokenCompressionSchedule:
        r"""Every block gives up `r` tokens, as in ToMe: :math:`\max(\text{prefix}+1, N_0 - r(l+1))` stay in block l.

        Unlike in ToMe a block may lose more than half of its tokens, because any number of tokens may merge into one.

        Args:
            r: Tokens fewer a block; the total so far is rounded where it is not whole.
            depth: Blocks.
            tokens: Tokens :math:`N_0` entering the first block, prefix tokens counted.
            prefix: Prefix tokens.
            kind: Whether tokens are merged or pruned.
            first: First block that gives up tokens; DiffRate itself starts at 1.

        Returns:
            The schedule.

        Raises:
            ValueError: If `r` is negative or not a finite number, or another argument is out of range; all are listed.

        Example:
            >>> TokenCompressionSchedule.constant(r=4, depth=3, tokens=17).merge
            (13, 9, 5)
            >>> TokenCompressionSchedule.constant(r=2.5, depth=3, tokens=17, kind="prune", first=1).prune
            (17, 14, 12)
        """
        problems = schedule_problems((tokens,), prefix)
        if isinstance(r, bool) or not isinstance(r, Real) or not math.isfinite(r) or r < 0:
            problems.append(f"`r` must be a finite number of at least 0, got {r!r}")
        blocks, start = whole_number(depth) or 0, whole_number(first)
        if blocks <= 0:
            problems.append(f"`depth` must be a positive integer, got {depth!r}")
        elif start is None or not 0 <= start < blocks:
            problems.append(f"`first` must be a block, 0 to {blocks - 1}, got {first!r}")
        if kind not in ("merge", "prune"):
            problems.append(f"`kind` must be 'merge' or 'prune', got {kind!r}")
        if problems:
            raise ValueError(f"No such constant schedule: {'; '.join(problems)}.")
        entry = (int(tokens),) * blocks
        entering, left = constant_drop(float(r), entry, prefix + 1, first)
        return cls(left if kind == "prune" else entering, left, entry, prefix)


def _name(blocks: Sequence[int]) -> str:
    return f"block{'s' if len(blocks) > 1 else ''} {', '.join(map(str, blocks))}"
