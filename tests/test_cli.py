import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import yaml

import lightning_hpo
from lightning_hpo.cli import main
from lightning_hpo.cli.methods import find_methods

ROOT = Path(lightning_hpo.__file__).parent.parent


@pytest.fixture
def config(tmp_path):
    """Writes a small configuration with changes; returns its path."""

    def write(**changes) -> str:
        small = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 8, "depth": 1, "num_heads": 1}
        content = {
            "seed_everything": 0,
            "model": {"class_path": "ImageClassifier", "init_args": {"model_args": small}},
            "data": {"class_path": "DigitsDataModule", "init_args": {"limit": 64}},
            "optimizer": {"class_path": "SGD", "init_args": {"lr": 0.1}},
            "trainer": {
                "max_steps": 1,
                "accelerator": "cpu",
                "logger": {"class_path": "CSVLogger", "init_args": {"save_dir": str(tmp_path), "version": "same"}},
                "enable_progress_bar": False,
                "enable_model_summary": False,
            },
        }
        for path, value in changes.items():
            *parents, last = path.split("__")
            place = content
            for parent in parents:
                place = place.setdefault(parent, {})
            place[last] = value
        file = tmp_path / "config.yaml"
        file.write_text(yaml.safe_dump(content))
        return str(file)

    return write


@pytest.mark.filterwarnings("ignore:.*`ImageClassifier.configure_optimizers` will be overridden")
@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
def test_every_command_of_the_trainer_runs_from_a_file_with_bare_names(command, config):
    assert main([command, "-c", config()]) == 0


@pytest.mark.filterwarnings("ignore:.*`ImageClassifier.configure_optimizers` will be overridden")
@pytest.mark.filterwarnings("ignore:Experiment logs directory .* exists", "ignore:Checkpoint directory .* exists")
def test_run_twice_into_the_same_folder_overwrites_the_saved_configuration(config, tmp_path):
    assert main(["fit", "-c", config()]) == 0
    assert main(["fit", "-c", config(data__init_args__batch_size=17)]) == 0
    saved = yaml.safe_load((tmp_path / "lightning_logs" / "same" / "config.yaml").read_text())
    assert saved["data"]["init_args"]["batch_size"] == 17
    assert saved["optimizer"]["class_path"] == "torch.optim.SGD"


def test_optimizer_of_the_module_is_used_where_none_is_named(config):
    path = config()
    content = yaml.safe_load(Path(path).read_text())
    del content["optimizer"]
    Path(path).write_text(yaml.safe_dump(content))
    assert main(["fit", "-c", path]) == 0


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {"model__init_args__lrr": 1},
            "there is no key `model.init_args.lrr`: `ImageClassifier` has no argument `lrr`; did you mean `lr`?",
        ),
        (
            {"model__class_path": "ImageClasifier"},
            "`model`: there is no class `ImageClasifier`; did you mean `ImageClassifier`?",
        ),
        ({"model__init_args__lr": "fast"}, "`model.init_args.lr` must be float, got `fast`"),
        ({"model__class_path": "nowhere.Net"}, "`model`: No module named 'nowhere'"),
        ({"trainer__max_stepz": 1}, "there is no key `trainer.max_stepz`; did you mean `trainer.max_steps`?"),
        ({"trainer__max_steps": "two"}, "`trainer.max_steps` must be int, got `two`"),
        ({"data__init_args__shift": -1}, "`shift` is a number of pixels, got -1"),
        ({"optimizer__class_path": "Adamm"}, "`optimizer`: there is no class `Adamm`; did you mean `Adam`?"),
        (
            {"trainer__callbacks": [{"class_path": "HyperparameterReport", "init_args": {"plots": False}}]},
            "there is no key `trainer.callbacks.init_args.plots`: `HyperparameterReport` has no argument `plots`; "
            "did you mean `plot`?",
        ),
        (
            {"trainer__callbacks": ["HyperparameterReporter"]},
            "`trainer.callbacks`: there is no class `HyperparameterReporter`; did you mean `HyperparameterReport`?",
        ),
        (
            {"trainer__callbacks": ["EarlyStopping"]},
            "`trainer.callbacks.init_args.monitor` is missing: give it in the file named with `-c` or as "
            "`--trainer.callbacks.init_args.monitor ...`",
        ),
        (
            {"trainer__callbacks": [{"class_path": "MetricObjective", "init_args": {"metric": "gmeann"}}]},
            "`trainer.callbacks.init_args.metric` must be one of 'accuracy', 'balanced_accuracy', 'f1', 'fbeta', "
            "'gmean', 'jaccard', 'kappa', 'mcc', 'precision', 'recall', 'specificity', 'youden', or a function with "
            "its module, got `gmeann`; did you mean `gmean`?",
        ),
        ({"trainer__precision": "17"}, "`trainer.precision` must be one of 64, 32, 16 or one of "),
    ],
)
def test_wrong_key_or_value_ends_in_one_line(changes, line, config, capfd):
    assert main(["fit", "-c", config(**changes)]) == 2
    said = [text for text in capfd.readouterr().err.splitlines() if not text.startswith(("INFO", "Seed set"))]
    assert len(said) == 1
    assert said[0].startswith(f"lightning-hpo: error: {line}")
    if not line.endswith(" "):
        assert said[0] == f"lightning-hpo: error: {line}"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["fit"], "`model` is missing: give it in the file named with `-c` or as `--model ...`"),
        (["fit", "-c", "absent.yaml"], "File does not exist: '"),
        (["fitt"], "there is no command `fitt`; did you mean `fit`?"),
        (["zzz"], "there is no command `zzz`; see `lightning-hpo --help`"),
        (["fit", "--modle=3"], "there is no option `--modle`; did you mean `--model`?"),
        (["methods", "all"], "`methods` takes no argument, got `all`; usage: lightning-hpo methods"),
    ],
)
def test_wrong_words_end_in_one_line(words, line, capfd):
    assert main(words) == 2
    (said,) = capfd.readouterr().err.splitlines()
    assert said.startswith(f"lightning-hpo: error: {line}")


def test_unreadable_yaml_ends_in_one_line(tmp_path, capfd):
    (tmp_path / "broken.yaml").write_text("model: [}")
    assert main(["fit", "-c", str(tmp_path / "broken.yaml")]) == 2
    (said,) = capfd.readouterr().err.splitlines()
    assert "Problems parsing config" in said


@pytest.mark.filterwarnings("ignore:.*`ImageClassifier.configure_optimizers` will be overridden")
def test_data_that_is_not_there_ends_in_one_line(config, tmp_path, capfd):
    path = config(data={"class_path": "MNISTDataModule", "init_args": {"root": str(tmp_path)}})
    assert main(["fit", "-c", path]) == 2
    assert "lightning-hpo: error: MNIST not found: looked for" in capfd.readouterr().err


def test_an_error_nobody_intended_keeps_its_traceback(config, tmp_path, monkeypatch):
    (tmp_path / "broken_module.py").write_text(
        textwrap.dedent(
            """
            from lightning.pytorch.demos.boring_classes import BoringModel

            class Broken(BoringModel):
                def training_step(self, batch, batch_idx):
                    return {}["loss"]
            """
        )
    )
    monkeypatch.setattr(sys, "path", list(sys.path))  # the current folder is searched, as `python -m` does
    path = config(model={"class_path": "broken_module.Broken"}, data=None, optimizer=None)
    with pytest.raises(KeyError, match="loss"):
        main(["fit", "-c", path])


def test_methods_lists_every_method_with_knob_and_doors(capsys):
    assert main(["methods"]) == 0
    table = capsys.readouterr().out
    (method,) = [method for method in find_methods() if method.name == "TokenCompression"]
    assert method.stem == "diffrate"
    doors = dict.fromkeys(kind for kind, _ in method.doors)
    assert list(doors) == ["callback", "mixin", "command line", "YAML", "function", "docs"]
    assert ("function", "lightning_hpo.apply_token_compression") in method.doors
    assert ("mixin", "lightning_hpo.TokenCompressionMixin") in method.doors
    for _, name in method.doors:
        assert name.split()[-1] in table
    assert method.knob.split()[0] in table


def test_methods_are_read_from_the_classes(tmp_path):
    (tmp_path / "callbacks").mkdir()
    (tmp_path / "models").mkdir()
    (tmp_path / "callbacks" / "base.py").write_text("class MethodCallback: pass\nclass Helper: pass\n")
    (tmp_path / "callbacks" / "new.py").write_text(
        "class NewMethod(MethodCallback):\n    KNOB: ClassVar[str] = 'the knob'\n"
        "class Another(base.MethodCallback):\n    '''First line.\n\n    More.\n    '''\n"
    )
    (tmp_path / "models" / "new.py").write_text("class NewMixin: pass\nclass NewModule: pass\n")
    another, new = find_methods(tmp_path)
    assert (another.name, another.knob) == ("Another", "First line.")
    assert (new.name, new.stem, new.knob) == ("NewMethod", "new", "the knob")
    assert ("mixin", "lightning_hpo.NewMixin") in new.doors
    assert ("module", "lightning_hpo.NewModule") in new.doors


def test_every_public_method_is_listed():
    """The files are parsed; what importing finds must be the same."""
    import pkgutil
    from importlib import import_module

    from lightning_hpo import callbacks
    from lightning_hpo.callbacks.base import MethodCallback

    for module in pkgutil.iter_modules(callbacks.__path__):
        import_module(f"lightning_hpo.callbacks.{module.name}")
    ours = {c.__name__ for c in MethodCallback.__subclasses__() if c.__module__.startswith("lightning_hpo.callbacks.")}
    assert {method.name for method in find_methods()} == ours


@pytest.mark.parametrize("words", [[], ["-h"], ["--help"]])
def test_help(words, capsys):
    assert main(words) == 0
    said = capsys.readouterr().out
    assert all(word in said for word in ("fit", "validate", "test", "predict", "methods"))


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"lightning-hpo {lightning_hpo.__version__}\n"


@pytest.mark.parametrize("word", ["--help", "--version", "methods"])
def test_quick_commands_load_neither_torch_nor_lightning(word):
    program = (
        "import sys; from lightning_hpo.cli import main; status = main(sys.argv[1:]); "
        "assert not {'torch', 'lightning'} & sys.modules.keys(); sys.exit(status)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    subprocess.run([sys.executable, "-c", program, word], check=True, capture_output=True, env=environment)
