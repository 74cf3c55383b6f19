"""``lightning-hpo methods``: what there is, read from the source of the classes themselves."""

import ast
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import lightning_hpo

__all__ = ["Method", "find_methods", "run"]

_PACKAGE = Path(lightning_hpo.__file__).parent
_BASE = "MethodCallback"


@dataclass(frozen=True)
class Method:
    """A method and its doors.

    Args:
        name: The callback.
        stem: Name of its file, after the method in the literature.
        knob: What need not be set by hand any more.
        doors: How to use it: a pair of a kind and a name.
    """

    name: str
    stem: str
    knob: str
    doors: tuple[tuple[str, str], ...]


def find_methods(package: Path = _PACKAGE) -> list[Method]:
    """Every subclass of ``MethodCallback`` in ``callbacks/``, in alphabetical order.

    The files are parsed, not imported, so nothing heavy is loaded. The knob is the class attribute ``KNOB``, else the
    first line of the docstring.

    Args:
        package: Folder of the package.

    Returns:
        The methods.

    Example:
        >>> [method.knob for method in find_methods() if method.name == "TokenCompression"] != []
        True
    """
    methods = []
    for path in sorted((package / "callbacks").glob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and _BASE in {ast.unparse(base).split(".")[-1] for base in node.bases}:
                doors = tuple(_doors(package, node.name, path.stem))
                methods.append(Method(node.name, path.stem, _knob(node), doors))
    return sorted(methods, key=lambda method: method.name)


def _knob(node: ast.ClassDef) -> str:
    for statement in node.body:
        targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
        value = getattr(statement, "value", None)
        if any(isinstance(t, ast.Name) and t.id == "KNOB" for t in targets) and value is not None:
            return str(ast.literal_eval(value))
    return (ast.get_docstring(node) or "").partition("\n")[0].strip()


def _doors(package: Path, name: str, stem: str) -> Iterator[tuple[str, str]]:
    public = [known for known, home in vars(lightning_hpo)["_HOME"].items() if home.rpartition(".")[2] == stem]
    yield "callback", _qualified(name)
    for mixin in sorted(_classes(package / "models" / f"{stem}.py")):
        yield ("mixin" if mixin.endswith("Mixin") else "module"), _qualified(mixin)
    yield "command line", f"lightning-hpo fit ... --trainer.callbacks+={name}"
    if (package.parent / "examples" / f"{stem}.yaml").exists():  # there is none beside an installed wheel
        yield "YAML", f"examples/{stem}.yaml"
    for function in sorted(known for known in public if known[0].islower()):
        yield "function", _qualified(function)
    yield "docs", f"docs/methods/{stem}.md"


def _qualified(name: str) -> str:
    return f"lightning_hpo.{name}"


def _classes(path: Path) -> list[str]:
    if not path.exists():
        return []
    body = ast.parse(path.read_text(encoding="utf-8")).body
    return [node.name for node in body if isinstance(node, ast.ClassDef) and not node.name.startswith("_")]


def run(arguments: Sequence[str]) -> int:
    """Prints the methods as a table; returns the exit status."""
    if arguments:
        usage = "usage: lightning-hpo methods - lists every method and the knob it removes\n"
        if arguments[0] in ("-h", "--help"):
            sys.stdout.write(usage)
            return 0
        sys.stderr.write(f"lightning-hpo: error: `methods` takes no argument, got `{arguments[0]}`; {usage}")
        return 2
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title="Methods", show_lines=True)
    for heading in ("method", "the knob it removes", "where to find it"):
        table.add_column(heading, overflow="fold")
    for method in find_methods():
        doors = "\n".join(f"{kind}: {name}" for kind, name in method.doors)
        table.add_row(Text(f"{method.name}\n({method.stem})"), Text(method.knob), Text(doors))
    console = Console(file=sys.stdout)
    if not console.is_terminal:
        console.width = 140  # a pipe has no width; eighty columns would break names
    console.print(table)
    return 0
