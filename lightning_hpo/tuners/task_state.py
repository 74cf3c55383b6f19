"""A file of finished cells, so that a search that was interrupted goes on where it was."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_hpo import distributed

__all__ = ["CellFile"]

VERSION = 1


class CellFile:
    """Utilities by the names of their cells in a JSON file that is replaced as a whole after each cell.

    Several ranks write files of their own beside it, which are joined at the end. Making it and joining are
    collectives.

    Args:
        path: The file; nothing is kept where None.
        settings: What utilities depend on besides task and value, as plain types.

    Raises:
        ValueError: If the file is not one of these, or its settings are others; all that differ are listed.

    Example:
        >>> cells = CellFile(None, {})
        >>> cells.record("a@0.5", 1.0)
        >>> cells.known
        {}
    """

    def __init__(self, path: Path | None, settings: Mapping[str, Any]) -> None:
        self.path, self.settings = path, json.loads(json.dumps(settings))
        self.known: dict[str, float | None] = {}
        if path is not None:
            for file in [path, *self._others(path)]:
                self.known |= self._read(file)
        distributed.agree(True, distributed.device())  # nobody writes before all have read
        self._own = dict(self.known)
        self._rank = distributed.rank()

    def record(self, name: str, utility: float | None) -> None:
        """Keeps a cell.

        Args:
            name: Of the cell.
            utility: None where it failed.
        """
        if self.path is not None:
            self._own.setdefault(name, utility)
            self._write(self._file(self.path), self._own)

    def join(self, cells: Mapping[str, float | None]) -> None:
        """Writes the one file that is left when a search has ended.

        Args:
            cells: Those of all ranks.
        """
        if self.path is not None and self._rank == 0:
            self._write(self.path, {**self._own, **cells})
        distributed.agree(True, distributed.device())
        if self.path is not None:
            for file in self._others(self.path):
                file.unlink(missing_ok=True)

    def _file(self, path: Path) -> Path:
        return path if self._rank == 0 else path.with_name(f"{path.stem}.rank{self._rank}{path.suffix}")

    def _others(self, path: Path) -> list[Path]:
        return sorted(path.parent.glob(f"{path.stem}.rank*{path.suffix}"))

    def _write(self, path: Path, cells: Mapping[str, float | None]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"version": VERSION, "settings": self.settings, "cells": cells}, indent=1)
        part = path.with_name(f"{path.name}.part")
        part.write_text(text, encoding="utf-8")
        part.replace(path)  # a reader sees the old file or the new one

    def _read(self, path: Path) -> dict[str, float | None]:
        if not path.exists():
            return {}
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            version, settings, cells = found["version"], found["settings"], dict(found["cells"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is no file of finished cells: {error!r}") from error
        if version != VERSION:
            raise ValueError(f"{path} is of version {version!r}; this one reads {VERSION}")
        differ = [
            f"{name}: {settings.get(name)!r} there, {self.settings.get(name)!r} here"
            for name in sorted({*settings, *self.settings})
            if settings.get(name) != self.settings.get(name)
        ]
        if differ:
            raise ValueError(f"{path} belongs to another search, use another folder; {'; '.join(differ)}")
        return cells
