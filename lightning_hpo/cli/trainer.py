"""``lightning-hpo fit|validate|test|predict``: Lightning's command line, where our classes go by their bare names."""

import os
import pkgutil
import sys
import warnings
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_hpo.cli.errors import one_line, raised_on_purpose, show

__all__ = ["HPOCommandLine", "run"]

_NAMEABLE: tuple[type, ...] = (
    LightningModule,
    LightningDataModule,
    Callback,
    Logger,
    torch.optim.Optimizer,
    torch.optim.lr_scheduler.LRScheduler,
)


def _import_nameable_classes() -> None:
    """Imports our callbacks, models and demos: only imported classes can be given by their bare name."""
    for folder in ("callbacks", "models", "demos"):
        package = import_module(f"lightning_hpo.{folder}")
        for module in pkgutil.iter_modules(package.__path__):
            import_module(f"lightning_hpo.{folder}.{module.name}")


def _subclasses(kind: type) -> Iterator[type]:
    child: type
    for child in kind.__subclasses__():
        yield child
        yield from _subclasses(child)


def _nameable() -> list[str]:
    return [child.__name__ for kind in _NAMEABLE for child in _subclasses(kind)]


class _Parser(LightningArgumentParser):
    """Ends in one line instead of two screens."""

    subcommand_parsers: ClassVar[dict[str, LightningArgumentParser]] = {}

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:  # the parser of a class's arguments: whoever called it says the rest
            super().error(message, ex)
        parsers = [self, *self.subcommand_parsers.values()]
        options = [action.dest for parser in parsers for action in parser._actions]
        show(one_line(message, options, _nameable()))
        raise SystemExit(2)


class HPOCommandLine(LightningCLI):
    """LightningCLI in subclass mode: model and data are named in the configuration.

    The configuration of a run is written into its log folder, over an older one if there is one.

    Args:
        words: The command line.
    """

    def __init__(self, words: Sequence[str]) -> None:
        self.words = list(words)
        super().__init__(
            parser_class=_Parser,
            parser_kwargs={"prog": "lightning-hpo"},
            save_config_kwargs={"overwrite": True},
            args=self.words,
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parses the words, whatever ``sys.argv`` holds."""
        _Parser.subcommand_parsers = {name: self._parser(name) for name in self.subcommands()}
        self.config = parser.parse_args(self.words)

    def instantiate_classes(self) -> None:
        """Builds the objects; a value that a constructor refuses ends in one line."""
        try:
            super().instantiate_classes()
        except (ValueError, TypeError, MisconfigurationException) as error:
            show(one_line(str(error), [], _nameable()))
            raise SystemExit(2) from error


def run(words: Sequence[str]) -> int:
    """Runs a command of the Trainer.

    Args:
        words: The command and its options.

    Returns:
        The exit status: 0, or 2 for a wrong key or value. Errors that are nobody's intention keep their traceback.
    """
    # What Lightning calls in its parser is Lightning's to renew, not the user's.
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    warnings.filterwarnings("ignore", message=".*LeafSpec.*is deprecated.*")
    here = str(Path.cwd())
    if here not in sys.path:  # so that a user's own `my_module.MyClass` is found
        sys.path.insert(0, here)
    _import_nameable_classes()
    try:
        HPOCommandLine(words)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except Exception as error:
        if not raised_on_purpose(error) and not isinstance(error, MisconfigurationException):
            raise
        show(str(error))
        return 2
    return 0
