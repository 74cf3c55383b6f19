"""Who may import whom, read from the syntax trees.

The rules are those of `docs/architecture.md` with one point relaxed: files in `nn/` and `callbacks/` may import timm,
because a heavy package is imported in the file of the method that needs it, and TokenCompression's are there; files
in `nn/` may import torch-geometric for the same reason.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

import lightning_hpo

PACKAGE = Path(lightning_hpo.__file__).parent
FILES = sorted(path.relative_to(PACKAGE.parent).as_posix() for path in PACKAGE.rglob("*.py"))
ANYTHING = None

TORCH = {"torch", "typing_extensions"}
LIGHTNING = TORCH | {"lightning", "numpy", "rich", "matplotlib", "torchmetrics", "timm"}
L0 = ("functional", "nn")
L1 = (
    *("frozen", "hyper", "state", "stateless", "single_samples", "module_losses", "distributed"),
    *("condition_arguments", "condition_losses", "conditioned_parts"),
    *("data", "held_out", "live_loader", "batch_source", "accumulation", "gradients"),
    *("gradient_noise", "noise_estimators", "sharded_gradients"),
    *("scaled_step", "batch_controller", "tuned_optimizer", "outer_parameters", "validation_loader", "indexed_data"),
    *("module_hypergradient", "raw_hyperparameters", "hypergradient_arguments"),
    *("whole_data", "perturbation", "batch_parts", "response_training"),
    *("self_tuning_arguments", "response_optimizer", "matching_dropout"),
    *("losses", "criterion_call", "stratified_sampler"),
    *("graph_data", "checked_graphs", "metrics", "seeded", "community_arguments", "community_result"),
)

# Folder or file: packages of others it may import, and which parts of ours.
RULES: dict[str, tuple[set[str] | None, tuple[str, ...] | None]] = {
    "functional": (TORCH, L0),
    "condition_arguments": (TORCH, L0),
    "conditioned_parts": (TORCH, (*L0, "distributed")),
    "nn": (TORCH | {"timm", "torch_geometric"}, L0),
    "condition_losses": (TORCH, (*L0, "distributed", "module_losses", "whole_data")),
    "frozen": (TORCH, L0),
    "hyper": (TORCH, L0),
    "state": (TORCH, L0),
    "stateless": (TORCH, L0),
    "single_samples": (TORCH, (*L0, "stateless")),
    "distributed": (TORCH, L0),
    "data": (TORCH, L0),
    "held_out": (TORCH, (*L0, "distributed")),
    "module_losses": (TORCH, (*L0, "hyper", "stateless")),
    "hypergradient_arguments": (TORCH, (*L0, "tuned_optimizer")),
    "module_hypergradient": (
        TORCH,
        (*L0, "distributed", "hypergradient_arguments", "module_losses", "tuned_optimizer"),
    ),
    "raw_hyperparameters": (TORCH, (*L0, "distributed", "hyper", "module_losses")),
    "live_loader": (TORCH | {"lightning"}, (*L0, "data")),
    "batch_source": (TORCH | {"lightning"}, (*L0, "data", "live_loader")),
    "accumulation": (TORCH, L0),
    "gradients": (TORCH, L0),
    "noise_estimators": (TORCH, (*L0, "stateless")),
    "sharded_gradients": (TORCH, (*L0, "distributed", "gradients")),
    "gradient_noise": (
        TORCH,
        (*L0, "distributed", "gradients", "noise_estimators", "sharded_gradients", "single_samples", "stateless"),
    ),
    "scaled_step": (TORCH, L0),
    "batch_controller": (TORCH, (*L0, "state")),
    "tuned_optimizer": (TORCH, (*L0, "hyper")),
    "outer_parameters": (TORCH, (*L0, "hyper", "module_losses", "raw_hyperparameters")),
    "indexed_data": (TORCH, L0),
    "validation_loader": (TORCH | {"lightning"}, L0),
    "whole_data": (TORCH, (*L0, "distributed")),
    "perturbation": (TORCH, (*L0, "distributed", "hyper")),
    "batch_parts": (TORCH, ()),
    "response_training": (TORCH, (*L0, "batch_parts", "distributed", "module_losses", "perturbation")),
    "self_tuning_arguments": (TORCH, L0),
    "response_optimizer": (TORCH | {"lightning"}, L0),
    "matching_dropout": (TORCH, (*L0, "hyper")),
    "losses": (TORCH | {"torchmetrics"}, (*L0, "distributed", "criterion_call", "losses")),
    "criterion_call": (TORCH, L0),
    "stratified_sampler": (TORCH, (*L0, "distributed")),
    "graph_data": (TORCH | {"torch_geometric"}, (*L0, "distributed")),
    "checked_graphs": (TORCH | {"lightning"}, (*L0, "distributed", "graph_data")),
    "community_arguments": (TORCH, L0),
    "community_result": (TORCH, (*L0, "graph_data")),
    "metrics": (TORCH | {"scipy", "torchmetrics"}, L0),
    "seeded": (TORCH, L0),
    "callbacks": (LIGHTNING, (*L0, *L1, "callbacks.base", "callbacks.report")),
    "models": (LIGHTNING, (*L0, *L1, "callbacks", "models.maid_loop")),
    "tuners": (LIGHTNING, (*L0, *L1, "callbacks.base", "tuners")),
    "demos": (ANYTHING, (*L0, *L1, "callbacks", "models", "demos")),
    "cli": (ANYTHING, ANYTHING),
    "testing": (ANYTHING, ANYTHING),
}
MAY_USE_PRIVATE_LIGHTNING = {"lightning_hpo/callbacks/base.py", "lightning_hpo/live_loader.py"}
OF_LIGHTNING = {"trainer", "pl_module", "strategy", "fit_loop", "datamodule", "lightning_module", "precision_plugin"}


def imports(tree: ast.AST, module: str) -> Iterator[str]:
    """Every dotted name that is imported, wherever the statement stands; `from a import b` gives `a.b`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = ".".join(module.split(".")[: -node.level]) if node.level else ""
            base = ".".join(filter(None, (above, node.module)))
            yield from (f"{base}.{alias.name}" for alias in node.names)


def eager(tree: ast.Module) -> ast.Module:
    """What runs when the module is imported."""
    lazy = (ast.FunctionDef, ast.AsyncFunctionDef)
    skipped = [
        n for n in tree.body if isinstance(n, lazy) or (isinstance(n, ast.If) and "TYPE_CHECKING" in ast.dump(n.test))
    ]
    return ast.Module([node for node in tree.body if node not in skipped], [])


def layer_problems(path: str, source: str) -> list[str]:
    """What `path` imports although its layer may not."""
    module = path.removesuffix(".py").replace("/", ".")
    tree = ast.parse(source)
    if path.endswith("__init__.py"):  # costs nothing, or importing any one method would cost them all
        return [n for n in imports(eager(tree), module) if n.split(".")[0] not in sys.stdlib_module_names]
    others, ours = RULES[module.split(".")[1]]
    problems = []
    for name in imports(tree, module):
        top, _, rest = name.partition(".")
        if top == "lightning_hpo":
            allowed = ours is ANYTHING or any(f"{rest}.".startswith(f"{part}.") for part in ours)
        else:
            allowed = others is ANYTHING or top in sys.stdlib_module_names or top in others
        if not allowed:
            problems.append(name)
    return problems


def private_names(source: str) -> list[str]:
    """Names of Lightning with a leading underscore, imported or reached through an object of its."""
    tree = ast.parse(source)
    found = [n for n in imports(tree, "") if n.startswith("lightning.") and any(p[0] == "_" for p in n.split("."))]
    for node in ast.walk(tree):
        name: str | None = None
        if isinstance(node, ast.Attribute):
            owner, name = node.value, node.attr
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "setattr", "hasattr"):
            owner = node.args[0]
            name = node.args[1].value if isinstance(node.args[1], ast.Constant) else None
        if name and name.startswith("_") and not name.endswith("__"):
            owners = {n.id if isinstance(n, ast.Name) else getattr(n, "attr", "") for n in ast.walk(owner)}
            if owners & OF_LIGHTNING:
                found.append(ast.unparse(node))
    return found


@pytest.mark.parametrize("path", FILES)
def test_imports_follow_the_layers(path: str) -> None:
    assert layer_problems(path, (PACKAGE.parent / path).read_text()) == []


@pytest.mark.parametrize("path", FILES)
def test_private_names_of_lightning_stay_in_two_files(path: str) -> None:
    if path not in MAY_USE_PRIVATE_LIGHTNING:
        assert private_names((PACKAGE.parent / path).read_text()) == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("functional/compression/x.py", "import lightning"),
        ("functional/compression/x.py", "def f():\n    from timm.layers import Mlp"),
        ("functional/compression/x.py", "from lightning_hpo.hyper import Positive"),
        ("nn/x.py", "from lightning_hpo.callbacks import base"),
        ("nn/x.py", "import sklearn"),
        ("functional/graphs/x.py", "import torch_geometric"),
        ("callbacks/x.py", "import torch_geometric"),
        ("metrics/x.py", "from lightning_hpo.callbacks import dag"),
        ("hyper.py", "from lightning_hpo import callbacks"),
        ("distributed.py", "from lightning.pytorch import Trainer"),
        ("callbacks/x.py", "from lightning_hpo.callbacks.diffrate import TokenCompression"),
        ("callbacks/x.py", "from .diffrate import TokenCompression"),
        ("callbacks/x.py", "from lightning_hpo.models.diffrate import TokenCompressionMixin"),
        ("callbacks/x.py", "if TYPE_CHECKING:\n    from lightning_hpo import testing"),
        ("models/x.py", "import lightning_hpo.cli"),
        ("nn/__init__.py", "import torch"),
        ("nn/__init__.py", "from lightning_hpo.nn.diffrate import apply_token_compression"),
    ],
)
def test_the_layer_check_finds_trespassers(path: str, source: str) -> None:
    assert len(layer_problems(f"lightning_hpo/{path}", source)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("callbacks/x.py", "from lightning_hpo.callbacks.base import MethodCallback\nimport timm, os"),
        ("models/x.py", "from lightning_hpo.callbacks.x import X"),
        ("nn/__init__.py", "if TYPE_CHECKING:\n    import torch\nimport os"),
        ("cli/__init__.py", "def main():\n    from lightning_hpo.cli.run import main"),
    ],
)
def test_the_layer_check_lets_neighbours_in(path: str, source: str) -> None:
    assert layer_problems(f"lightning_hpo/{path}", source) == []


@pytest.mark.parametrize(
    "source",
    [
        "from lightning.pytorch.trainer.call import _call_callback_hooks",
        "import lightning.pytorch._graveyard",
        "self.trainer.fit_loop._data_source.instance",
        "trainer.strategy._lightning_optimizers",
        "getattr(trainer, '_checkpoint_connector')",
    ],
)
def test_the_private_check_finds_trespassers(source: str) -> None:
    assert private_names(source)
    assert private_names("self._own, trainer.__class__, trainer.fit_loop.epoch_loop") == []


def test_importing_the_package_costs_nothing() -> None:
    code = """
import sys, lightning_hpo
from lightning_hpo import callbacks, demos, functional, metrics, models, nn, testing, tuners
from lightning_hpo.functional import compression
heavy = {"torch", "lightning", "timm", "numpy", "matplotlib", "sklearn", "scipy", "torch_geometric"}
print(*{name.split(".")[0] for name in sys.modules} & heavy)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == ""


def test_every_public_name_is_there_and_listed_once() -> None:
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    seen_by_mypy = {name.removeprefix("lightning_hpo.") for name in imports(block, "")}
    assert seen_by_mypy == {f"{home}.{name}" for name, home in lightning_hpo._HOME.items()}
    assert sorted(lightning_hpo._HOME) == sorted(lightning_hpo.__all__)
    assert set(lightning_hpo.__all__) <= set(dir(lightning_hpo))
    for name, home in lightning_hpo._HOME.items():
        assert getattr(lightning_hpo, name) is getattr(import_module(f"lightning_hpo.{home}"), name)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'lightning_hpo' has no attribute 'TokenCompresion'"):
        lightning_hpo.TokenCompresion  # noqa: B018
