"""Puts the figures of ``benchmarks/results/*.json`` into the pages, each table below the command that made it.

    python docs/tools/results.py

A page asks for a table with a comment ``results: <name>``, where ``<name>.<section>`` is another list of the file than
its rows, optionally followed by ``| column, column``. It asks for pictures in ``docs/assets/`` with the comment
``pictures: <name>: <pattern> | <caption>``; they are shown once the benchmark of that name has written its figures.
Both are written into the Markdown itself, so that they are read without building the site.
"""

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["fill", "results_table"]

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
ASSETS = ROOT / "docs" / "assets"
MARK = re.compile(r"(<!-- results: ([\w.]+)(?: \| ([^>]*?))? -->\n).*?(<!-- end of results -->)", re.DOTALL)
PICTURES = re.compile(r"(<!-- pictures: (\w+): (\S+) \| ([^>]*?) -->\n).*?(<!-- end of pictures -->)", re.DOTALL)


def results_table(name: str, columns: str | None = None, folder: Path = RESULTS) -> str:
    """The command, the machine and the rows of one benchmark.

    Args:
        name: Stem of the JSON file, and of the script; a list other than ``rows`` follows after a dot.
        columns: Keys of the rows to show, separated by commas; all by default.
        folder: Where the file is.

    Returns:
        Markdown; a line that says so if nothing has been measured yet.
    """
    stem, _, section = name.partition(".")
    path = folder / f"{stem}.json"
    if not path.exists():
        return f"`python benchmarks/{stem}.py` has not been run yet; there are no figures.\n"
    found = json.loads(path.read_text(encoding="utf-8"))
    rows = found[section or "rows"]
    keys = (
        [key.strip() for key in columns.split(",")] if columns else list(dict.fromkeys(k for row in rows for k in row))
    )
    table = [keys, ["---:" if isinstance(rows[0].get(key), (int, float)) else "---" for key in keys]]
    table += [[_text(row.get(key)) for key in keys] for row in rows]
    lines = [
        f"| {' | '.join(cell.replace('_', ' ') if n == 0 else cell for cell in row)} |" for n, row in enumerate(table)
    ]
    return "\n".join([f"`{found['command']}`, on {_machine(found['machine'])}:", "", *lines, ""])


def fill(markdown: str) -> str:
    """The page with its tables renewed."""
    markdown = MARK.sub(lambda m: f"{m[1]}\n{results_table(m[2], m[3])}\n{m[4]}", markdown)
    return PICTURES.sub(lambda m: f"{m[1]}{_pictures(m[2], m[3], m[4])}\n{m[5]}", markdown)


def _pictures(name: str, pattern: str, caption: str) -> str:
    if not (RESULTS / f"{name}.json").exists():
        return ""
    lines = (f"\n![{caption}](../assets/{path.name})\n" for path in sorted(ASSETS.glob(pattern)))
    return "".join(lines)


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _machine(machine: Mapping[str, Any]) -> str:
    where = machine.get("gpu") or f"{machine['processor']}, {machine['threads']} threads"
    versions = [f"{name} {machine[name]}" for name in ("torch", "timm", "lightning") if name in machine]
    return ", ".join([where, *versions])


def main() -> int:
    """Renews every page that asks for results, and says which changed."""
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        old = path.read_text(encoding="utf-8")
        if (new := fill(old)) != old:
            path.write_text(new, encoding="utf-8")
            sys.stdout.write(f"renewed {path.relative_to(ROOT)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
