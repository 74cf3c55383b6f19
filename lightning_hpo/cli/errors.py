"""One clear line out of a configuration error."""

import difflib
import inspect
import re
import sys
import traceback
from collections.abc import Iterable, Iterator
from importlib import import_module
from pathlib import Path

import lightning_hpo

__all__ = ["one_line", "raised_on_purpose", "show"]

_NOISE = (
    "Does not validate against any",
    "Subtypes:",
    "Errors:",
    "Given value",
    "Not a valid subclass",
    "Subclass types expect",
    "a class path (str)",
    "a dict with",
    "Expected a path but",
    "Expected a <class 'NoneType'>",
)
_UNKNOWN_CLASS = "Expected a dot import path string: "


def show(message: str) -> None:
    """Writes one line to the standard error stream."""
    sys.stderr.write(f"lightning-hpo: error: {' '.join(message.split())}\n")


def raised_on_purpose(error: BaseException) -> bool:
    """Whether our own code said ``raise``: then the message is for the user, and a traceback would only hide it."""
    frames = traceback.extract_tb(error.__traceback__)
    if not frames:
        return False
    ours = Path(lightning_hpo.__file__).parent
    return ours in Path(frames[-1].filename).parents and (frames[-1].line or "").startswith("raise ")


def one_line(message: str, options: Iterable[str], classes: Iterable[str]) -> str:
    """Says which key is wrong, what is wrong with it and, for a misspelt name, the nearest right one.

    Args:
        message: What the parser says, often over many lines.
        options: Keys that the command accepts.
        classes: Names of classes that may be given without their module.

    Returns:
        A single line.

    Example:
        >>> one_line("Subcommand 'fit' does not accept option 'trainer.max_stepz'", ["trainer.max_steps"], [])
        'there is no key `trainer.max_stepz`; did you mean `trainer.max_steps`?'
    """
    lines = [line.strip().removeprefix("- ") for line in message.splitlines()]
    lines = list(dict.fromkeys(line for line in lines if line and not line.startswith(_NOISE)))
    keys = [match[1] for line in lines if (match := re.match(r'Parser key "(.*)":$', line))]
    owner = next((match[1] for line in lines if (match := re.search(r"class_path '(.*)':", line))), "")
    inside = ".init_args" if owner else ""
    where = f"{keys[0]}{inside}.{'.'.join(keys[1:])}" if len(keys) > 1 else "".join(keys)
    for line in lines:
        if match := re.match(r"Option '(.*)' is not accepted", line):
            hint = _nearest(match[1], _arguments(owner))
            return f"there is no key `{where}{inside}.{match[1]}`: `{_bare(owner)}` has no argument `{match[1]}`{hint}"
        if match := re.search(r"does not accept option '(.*)'", line):
            return f"there is no key `{match[1]}`{_nearest(match[1], options)}"
        if line.startswith(_UNKNOWN_CLASS):
            name = line.removeprefix(_UNKNOWN_CLASS)
            named = [_plain_type(other) for other in lines if other.startswith("Expected a typing.Literal")]
            if named:  # a name, or a function
                nearest = _nearest(name, re.findall(r"'(\w+)'", named[0]))
                return f"`{where}` must be {named[0]}, or a function with its module, got `{name}`{nearest}"
            hint = _nearest(name, classes) or "; give its module too, as in `my_module.MyClass`"
            return f"`{where}`: there is no class `{name}`{hint}"
        if match := re.match(r"unrecognized arguments: (\S+)", line):
            name = match[1].partition("=")[0]
            return f"there is no option `{name}`{_nearest(name, [f'--{option}' for option in options])}"
        if match := re.match(r"the following arguments are required: (.*)", line):
            missing = re.sub(r"^(fit|validate|test|predict)\.", "", match[1])
            key = f"{where}{inside}.{missing}" if where else missing
            return f"`{key}` is missing: give it in the file named with `-c` or as `--{key} ...`"
    return _what_is_wrong(where, lines, message)


def _what_is_wrong(where: str, lines: list[str], message: str) -> str:
    said = [line for line in lines if not line.startswith(("Parser key", "Problem with given class_path"))]
    # A config file that is not there or is no YAML puts the key and the problem on one line.
    said = said or [re.sub(r'Parser key ".*?":', "", line) for line in lines if not line.startswith("Problem")]
    given = re.search(r"Given value: (.*)", message)
    wanted = " or ".join(dict.fromkeys(_plain_type(line) for line in said if line.startswith("Expected")))
    if wanted:
        got = re.search(r"Got value: (.*)", message) or given
        return f"`{where}` must be {wanted}, got `{got[1] if got else ''}`"
    return f"`{where}`: {'; '.join(said)}" if where else "; ".join(said)


def _plain_type(line: str) -> str:
    wanted = re.sub(r"\.? Got value: .*", "", line).removeprefix("Expected a ").removeprefix("Expected ")
    wanted = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", wanted)
    return re.sub(r"(?:typing\.)?Literal\[(.*)\]", r"one of \1", wanted)


def _bare(path: str) -> str:
    return path.rpartition(".")[2]


def _nearest(word: str, known: Iterable[str]) -> str:
    found = difflib.get_close_matches(word, sorted(set(known)), 1)
    return f"; did you mean `{found[0]}`?" if found else ""


def _arguments(path: str) -> Iterator[str]:
    """Names of the constructor's arguments of a class given by its full name."""
    module, _, name = path.rpartition(".")
    kind = getattr(import_module(module), name, None) if module else None
    for part in getattr(kind, "__mro__", ()):  # keyword arguments may be passed on to a base
        if part is not object and "__init__" in vars(part):
            yield from (name for name in inspect.signature(vars(part)["__init__"]).parameters if name != "self")
