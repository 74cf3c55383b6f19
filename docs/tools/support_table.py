"""The table "Works with" of a method's page, from ``tests/matrix.py``: what is tested is what is claimed."""

import importlib.util
import re
import sys
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

__all__ = ["fill", "support_table"]

ROOT = Path(__file__).parents[2]
MARK = re.compile(r"^<!-- support table: (\w+) -->$", re.MULTILINE)

# What each word of the matrix promises, in the order of the table.
MEANING = {
    "trains": "trains, learns and logs under its own prefix",
    "accumulation": "gradient accumulation: two micro-batches end like one batch of twice the size",
    "two ranks": "`ddp` on two ranks: both end alike, and like one process on the joined batch",
    "bf16": '`precision="bf16-mixed"`, its own state kept in 32 bits',
    "resume": "kill and resume, bit for bit, also in mid-epoch and mid-accumulation",
    "weights only": "the checkpoint loads with `weights_only=True`",
    "checkpoint independence": "your checkpoint loads without the method, and one written without it loads with it",
    "fits twice": "the same callback and module in a second `fit`",
    "teardown": "leaves your module as it was, after `fit` and after an exception",
    "command line": "`lightning-hpo fit -c examples/{stem}.yaml`",
}


@cache
def _matrix() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_matrix", ROOT / "tests" / "matrix.py")
    if spec is None or spec.loader is None:
        raise FileNotFoundError("tests/matrix.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def support_table(stem: str, cases: Iterable[Any] | None = None) -> str:
    """A Markdown table with a row a promise and a column a setting.

    Args:
        stem: The method's stem.
        cases: Entries of the matrix; those of ``tests/matrix.py`` by default.

    Returns:
        The table, with the reasons of every "no" below it.

    Raises:
        ValueError: If there is no entry for the method, or a promise that the table cannot put into words.
    """
    everything = _matrix().EVERYTHING if cases is None else frozenset(MEANING)
    mine = [case for case in (_matrix().CASES if cases is None else cases) if case.stem == stem]
    if not mine:
        raise ValueError(f"tests/matrix.py has no entry for {stem!r}")
    if unknown := sorted((everything | set().union(*(case.works_with for case in mine))) ^ set(MEANING)):
        raise ValueError(f"`MEANING` and the matrix differ in {unknown}")
    rows = [["tested", *(f"`{case.name}`" for case in mine)], ["---", *("---" for _ in mine)]]
    notes: list[str] = []
    for word, meaning in MEANING.items():
        cells = []
        for case in mine:
            if word not in case.works_with:
                notes.append(f"({len(notes) + 1}) {case.reasons[word]}")
            cells.append("yes" if word in case.works_with else f"no ({len(notes)})")
        rows.append([meaning.format(stem=stem), *cells])
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return "\n\n".join([table, *notes])


def fill(markdown: str) -> str:
    """Puts the tables into a page, where a comment ``support table: <stem>`` asks for one."""
    return MARK.sub(lambda mark: support_table(mark.group(1)), markdown)
