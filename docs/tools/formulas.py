r"""Formulas in Markdown, written as in docstrings: the role ``:math:`` and the directive ``.. math::``.

They become MathML, which browsers draw by themselves: no script, no font and no network are needed. Where the converter
is not installed, or does not know a command, the source of the formula is shown as code.
"""

import html
import re
from collections.abc import Callable
from typing import Any
from xml.etree.ElementTree import Element

from markdown import Extension, Markdown
from markdown.inlinepatterns import InlineProcessor
from markdown.preprocessors import Preprocessor

convert: Callable[..., str] | None
try:
    from latex2mathml.converter import convert
except ModuleNotFoundError:
    convert = None

__all__ = ["FormulaExtension", "to_html"]

_DIRECTIVE = re.compile(r"^(\s*)\.\. math::\s*(.*)$")


def to_html(latex: str, display: bool = False) -> str:
    """The formula as MathML, or as code where that cannot be."""
    latex = " ".join(latex.split())
    if convert is not None:
        try:
            found = convert(latex, display="block" if display else "inline")
            return f'<div class="formula">{found}</div>' if display else found
        except Exception:  # whatever the converter stumbled on, the source stays readable
            pass
    code = html.escape(latex)
    return f"<pre><code>{code}</code></pre>" if display else f"<code>{code}</code>"


class _Role(InlineProcessor):
    def handleMatch(self, m: re.Match[str], data: str) -> tuple[Element | str, int, int]:  # noqa: N802
        return self.md.htmlStash.store(to_html(m.group(1))), m.start(0), m.end(0)


class _Directive(Preprocessor):
    def run(self, lines: list[str]) -> list[str]:
        out: list[str] = []
        rest = iter([*lines, ""])
        for line in rest:
            start = _DIRECTIVE.match(line)
            if start is None:
                out.append(line)
                continue
            formula = [start.group(2)]
            for following in rest:
                if following.strip():
                    formula.append(following)
                elif any(map(str.strip, formula)):
                    break
            out += ["", start.group(1) + self.md.htmlStash.store(to_html(" ".join(formula), display=True)), ""]
        return out[:-1] if out and not out[-1] else out


class FormulaExtension(Extension):
    """Adds the role and the directive to Markdown."""

    def extendMarkdown(self, md: Markdown) -> None:  # noqa: N802 - Markdown's name
        """Registers both; code is already out of the way of the directive, and not yet of the role."""
        md.preprocessors.register(_Directive(md), "formula_directive", 24)
        md.inlinePatterns.register(_Role(r":math:`([^`]+)`", md), "formula_role", 195)


def makeExtension(**settings: Any) -> FormulaExtension:  # noqa: N802 - Markdown's name
    """What Markdown calls when the extension is given by name."""
    return FormulaExtension(**settings)
