"""The pages say what is true: code runs, links lead somewhere, tables are those of the tests and the benchmarks."""

import importlib.util
import re
import sys
from pathlib import Path

import lightning.pytorch
import numpy as np
import pytest
import timm
import yaml
from PIL import Image

import lightning_hpo
from lightning_hpo.cli.methods import find_methods
from lightning_hpo.testing import run  # noqa: F401 - must know the Trainer before it is replaced
from lightning_hpo.tuners import task_fit  # noqa: F401 - this one, too

ROOT = Path(lightning_hpo.__file__).parents[1]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted(
    (ROOT / "docs").rglob("*.md")
)
HEADINGS = [
    "What it does",
    "Use it",
    "Settings",
    "Cost",
    "Works with",
    "Results",
    "Limits",
    "Differences from the paper's code",
    "Checkpoint",
    "Reference",
]
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


def tool(name):
    spec = importlib.util.spec_from_file_location(f"docs_tool_{name}", ROOT / "docs" / "tools" / f"{name}.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def blocks(page, language):
    """Fenced blocks of a language, indentation removed."""
    fences = re.finditer(rf"^([ ]*)```{language}\n(.*?)^\1```$", page.read_text(), re.MULTILINE | re.DOTALL)
    return [re.sub(rf"^{fence[1]}", "", fence[2], flags=re.MULTILINE) for fence in fences]


# Code


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """Runs of two steps, weights from nowhere, and some photographs in the folder that the pages name."""
    monkeypatch.chdir(tmp_path)
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *a, **kw: create(*a, **{**kw, "pretrained": False}))

    class Trainer(lightning.pytorch.Trainer):
        def __init__(self, **arguments):
            hurried = {"max_epochs": None, "max_steps": 2, "limit_val_batches": 1, "limit_test_batches": 1}
            quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
            here = {"accelerator": "cpu", "enable_checkpointing": False}
            super().__init__(**{**arguments, **hurried, **quiet, **here})

    monkeypatch.setattr(lightning.pytorch, "Trainer", Trainer)
    for part, count in (("train", 6), ("test", 2)):
        for label in ("cat", "dog"):
            folder = tmp_path / "photos" / part / label
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = np.random.default_rng(number).integers(0, 256, (40, 48, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.relative_to(ROOT).as_posix()
)
def test_python_blocks_run_from_top_to_bottom(page, quick, capsys):
    names = {"__name__": page.stem.replace("-", "_")}
    for number, block in enumerate(blocks(page, "python")):
        exec(compile(block, f"{page.name}, block {number}", "exec"), names)
    for name in [name for name in names if name.startswith("test_")]:
        names[name]()


@every_page
def test_yaml_blocks_are_yaml(page):
    for block in blocks(page, "yaml"):
        if "--8<--" not in block:
            assert isinstance(yaml.safe_load(block), dict)


@every_page
def test_commands_exist(page):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    text = page.read_text()
    assert set(re.findall(r"(?:`|\$ )make ([a-z-]+)", text)) <= targets
    for script in re.findall(r"python ((?:docs|examples)/\S+?\.py)", text):
        assert (ROOT / script).exists()
    for example in re.findall(r"examples/\w+\.\w+", text):
        assert (ROOT / example).exists()


# Links and headings


@every_page
def test_links_lead_to_files(page):
    text = re.sub(r"```.*?```|`[^`]*`", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        if not target.startswith("http") and path:
            found = (page.parent / path).resolve()
            found = found if found.exists() else ROOT / "docs" / path  # pages at the top are shown inside docs/
            assert found.exists(), f"{page.name} links to {target}"
            if not anchor:
                continue
            slugs = [re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings(found)]
            assert anchor in slugs, f"{page.name} links to {target}, which has {slugs}"


def headings(page, level="#+"):
    included = re.fullmatch(r'--8<-- "(\S+)"\s*', page.read_text())
    text = re.sub(r"```.*?```", "", (ROOT / included[1] if included else page).read_text(), flags=re.DOTALL)
    return re.findall(rf"^{level} (.+)$", text, re.MULTILINE)


@pytest.mark.parametrize("method", find_methods(), ids=lambda method: method.stem)
def test_every_method_has_its_page_with_every_heading(method):
    page = ROOT / "docs" / "methods" / f"{method.stem}.md"
    assert headings(page, "##") == HEADINGS
    text = page.read_text()
    assert f"<!-- support table: {method.stem} -->" in text
    assert method.name in text
    for listing in (ROOT / "README.md", ROOT / "docs" / "methods" / "index.md"):
        assert f"{method.stem}.md" in listing.read_text()
        assert method.knob in listing.read_text()


def test_settings_on_the_page_are_those_of_the_constructor():
    import inspect

    text = (ROOT / "docs" / "methods" / "diffrate.md").read_text().partition("## Settings")[2].partition("## Cost")[0]
    rows = [row.split("|")[1:-1] for row in text.splitlines() if row.startswith("| `")]
    named = [name for row in rows for name in re.findall(r"`(\w+)`", row[0])]
    parameters = inspect.signature(lightning_hpo.TokenCompression).parameters
    assert sorted(named) == sorted(parameters)
    for name, column in ((row[0], row[3]) for row in rows):
        for key in re.findall(r"`(\w+)`", name):
            default = parameters[key].default
            if default not in (None, inspect.Parameter.empty):
                assert str(default) in column, f"{key} is {default!r} by default, the page says {column}"


def test_every_module_is_in_the_reference():
    documented = set(
        re.findall(r"^::: ([\w.]+)", "\n".join(p.read_text() for p in (ROOT / "docs/api").glob("*.md")), re.M)
    )
    package = ROOT / "lightning_hpo"
    modules = [p.relative_to(ROOT).with_suffix("") for p in package.rglob("*.py") if p.name != "__init__.py"]
    missing = {".".join(m.parts) for m in modules if m.parts[1] != "cli"} - documented
    assert not missing


def test_the_changelog_begins_with_what_is_unreleased():
    text = (ROOT / "CHANGELOG.md").read_text()
    assert headings(ROOT / "CHANGELOG.md", "##")[0] == "Unreleased"
    entries = [line for line in text.partition("## Unreleased")[2].partition("\n## ")[0].splitlines() if line.strip()]
    assert all(line.startswith(("### ", "- ")) for line in entries), "one line a change"


# Generated parts


class Entry:
    def __init__(self, stem, name, works_with, reasons):
        self.stem, self.name, self.works_with, self.reasons = stem, name, frozenset(works_with), reasons


def test_the_support_table_says_what_the_matrix_says():
    table = tool("support_table")
    everything = set(table.MEANING)
    cases = [
        Entry("other", "Other", everything, {}),
        Entry("mine", "Mine", everything, {}),
        Entry("mine", "Mine-odd", everything - {"bf16"}, {"bf16": "its sums overflow in bf16"}),
    ]
    found = table.support_table("mine", cases).splitlines()
    assert found[0] == "| tested | `Mine` | `Mine-odd` |"
    (row,) = (line for line in found if "bf16-mixed" in line)
    assert row.endswith("| yes | no (1) |")
    assert found[-1] == "(1) its sums overflow in bf16"
    assert sum(line.endswith("| yes | yes |") for line in found) == len(everything) - 1
    with pytest.raises(ValueError, match="no entry for 'nobody'"):
        table.support_table("nobody", cases)
    with pytest.raises(ValueError, match="flies"):
        table.support_table("mine", [Entry("mine", "Mine", everything | {"flies"}, {})])


def test_the_support_table_knows_every_word_of_the_matrix():
    table = tool("support_table")
    assert "| yes" in table.fill("<!-- support table: diffrate -->")
    assert table.fill("nothing to fill") == "nothing to fill"


def test_results_stand_below_their_command(tmp_path):
    results = tool("results")
    machine = '{"processor": "a processor", "threads": 2, "gpu": null, "torch": "2.9"}'
    rows = '[{"kind": "ours", "images_a_second": 1234, "ratio": 1.23456}, {"kind": "theirs", "ratio": null}]'
    (tmp_path / "speed.json").write_text(f'{{"command": "python speed.py", "machine": {machine}, "rows": {rows}}}')
    assert results.results_table("speed", "kind, images_a_second, ratio", tmp_path).splitlines() == [
        "`python speed.py`, on a processor, 2 threads, torch 2.9:",
        "",
        "| kind | images a second | ratio |",
        "| --- | ---: | ---: |",
        "| ours | 1,234 | 1.235 |",
        "| theirs |  |  |",
    ]
    assert "has not been run yet" in results.results_table("absent.summary", folder=tmp_path)


def test_pictures_are_shown_where_there_are_any(tmp_path, monkeypatch):
    results = tool("results")
    monkeypatch.setattr(results, "ASSETS", tmp_path)
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    page = "<!-- pictures: speed: rates_*.png | Rates -->\n<!-- end of pictures -->"
    assert "![" not in results.fill(page)
    for name in ("rates_b", "rates_a", "other"):
        (tmp_path / f"{name}.png").touch()
    assert "![" not in results.fill(page), "the benchmark is still running"
    (tmp_path / "speed.json").touch()
    found = results.fill(page)
    assert re.findall(r"!\[Rates\]\((.*)\)", found) == ["../assets/rates_a.png", "../assets/rates_b.png"]
    assert results.fill(found) == found


@every_page
def test_figures_are_those_of_the_benchmarks(page):
    text = page.read_text()
    assert tool("results").fill(text) == text, "run `python docs/tools/results.py`"


def test_formulas_become_mathml():
    pytest.importorskip("latex2mathml")
    markdown = pytest.importorskip("markdown")
    formulas = tool("formulas")
    text = "A square :math:`x_i^2`.\n\n.. math:: a\n          + b\n\nAfter."
    page = markdown.markdown(text, extensions=[formulas.FormulaExtension()])
    assert "<msubsup>" in page
    assert '<math xmlns="http://www.w3.org/1998/Math/MathML" display="block">' in page
    assert page.endswith("<p>After.</p>")
    assert "math::" not in page


def test_every_formula_of_the_package_can_be_drawn():
    pytest.importorskip("latex2mathml")
    formulas = tool("formulas")
    sources = [path.read_text() for path in (ROOT / "lightning_hpo").rglob("*.py")]
    found = [latex for source in sources for latex in re.findall(r":math:`([^`]+)`", source)]
    assert len(found) > 20
    assert [latex for latex in found if "<code>" in formulas.to_html(latex)] == []


def test_formulas_without_a_converter_are_shown_as_code(monkeypatch):
    pytest.importorskip("markdown")
    formulas = tool("formulas")
    monkeypatch.setattr(formulas, "convert", None)
    assert formulas.to_html("a < b") == "<code>a &lt; b</code>"
