"""Reads the docstrings as they are written here: ``Example:`` is a section, ``:class:`` and its like are links."""

import re
from typing import Any

import griffe

__all__ = ["Docstrings"]

_ROLE = re.compile(r":(?:attr|class|data|exc|func|meth|mod):`(~?)([\w.]+)`")
_EXAMPLE = re.compile(r"^(\s*)Example:\s*$", re.MULTILINE)


class Docstrings(griffe.Extension):
    """Rewrites docstrings before they are parsed, and gives named tuples the constructor that Python gives them."""

    def on_class(self, *, cls: griffe.Class, **kwargs: Any) -> None:
        """The ``Args`` of a named tuple are its fields."""
        if not any(str(base).split(".")[-1] == "NamedTuple" for base in cls.bases):
            return
        itself = griffe.Parameter("self", kind=griffe.ParameterKind.positional_or_keyword)
        fields = [
            griffe.Parameter(
                name, annotation=field.annotation, kind=griffe.ParameterKind.positional_or_keyword, default=field.value
            )
            for name, field in cls.attributes.items()
        ]
        cls.set_member("__init__", griffe.Function("__init__", parameters=griffe.Parameters(itself, *fields)))

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Turns roles into links that are code where nothing is documented under the name."""
        if obj.docstring is None:
            return
        text = _EXAMPLE.sub(r"\1Examples:", obj.docstring.value)
        obj.docstring.value = _ROLE.sub(lambda role: _link(obj, role.group(2), bool(role.group(1))), text)


def _link(obj: griffe.Object, name: str, short: bool) -> str:
    shown = name.rpartition(".")[2] if short else name
    return f'<autoref identifier="{_path(obj, name)}" optional>`{shown}`</autoref>'


def _path(obj: griffe.Object, name: str) -> str:
    """Where the object is defined: names exported at the top are documented there."""
    try:
        if name.startswith(f"{obj.package.name}."):
            member = obj.package[name.partition(".")[2]]
            return member.target_path if member.is_alias else member.path
        scope: griffe.Object | None = obj
        while scope is not None:  # a method's docstring may name its neighbours
            if name.split(".")[0] in scope.members:
                member = scope[name]
                return member.target_path if member.is_alias else member.path
            scope = scope.parent
    except (KeyError, griffe.NameResolutionError, griffe.AliasResolutionError):
        pass
    return name
