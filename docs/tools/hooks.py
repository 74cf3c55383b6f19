"""What MkDocs calls while it builds: formulas, and the generated tables."""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from formulas import FormulaExtension
from support_table import fill


def on_config(config: Any) -> Any:
    """Formulas work in pages and in docstrings alike."""
    config.markdown_extensions.append(FormulaExtension())
    return config


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Fills in the support tables."""
    return fill(markdown)
