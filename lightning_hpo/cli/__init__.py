"""The command ``lightning-hpo``.

Only what a command needs is imported: ``methods``, ``--help`` and ``--version`` answer without loading torch.
"""

import sys
from collections.abc import Sequence
from importlib import import_module

__all__ = ["main"]

_HELP = """usage: lightning-hpo [-h] [--version] {fit,validate,test,predict,methods} ...

Hyperparameters that learn themselves inside an ordinary Lightning Trainer.

commands:
  fit       train            lightning-hpo fit -c examples/diffrate.yaml
  validate  score on the validation data of a configuration
  test      score on the test data of a configuration
  predict   predict for the prediction data of a configuration
  methods   list every method, the knob it removes and where to find it

Classes are named in full or, if they are Lightning's, torch's or ours, by their bare name (`model: ImageClassifier`).
`lightning-hpo fit --help` lists every option, `lightning-hpo fit --model.help ImageClassifier` those of a class.
"""
_COMMANDS = ("fit", "validate", "test", "predict")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; the console script ``lightning-hpo`` calls it.

    Args:
        arguments: What follows the name of the command; taken from the command line by default.

    Returns:
        The exit status: 0, or 2 for a wrong command, key or value.

    Example:
        >>> main(["--version"])
        lightning-hpo 0...
        0
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    first = words[0] if words else "--help"
    if first in ("-h", "--help"):
        sys.stdout.write(_HELP)
        return 0
    if first == "--version":
        sys.stdout.write(f"lightning-hpo {import_module('lightning_hpo').__version__}\n")
        return 0
    if first == "methods":
        return int(import_module("lightning_hpo.cli.methods").run(words[1:]))
    # `--print_config`, `-c FILE fit` and the like are for Lightning's command line to understand or refuse.
    if not first.startswith("-") and first not in _COMMANDS:
        nearest = import_module("difflib").get_close_matches(first, [*_COMMANDS, "methods"], 1)
        hint = f"; did you mean `{nearest[0]}`?" if nearest else "; see `lightning-hpo --help`"
        sys.stderr.write(f"lightning-hpo: error: there is no command `{first}`{hint}\n")
        return 2
    return int(import_module("lightning_hpo.cli.trainer").run(words))
