"""Tiny modules, tiny data and checks, so that you can test your own LightningModule with a method.

Example:
    >>> from lightning_hpo.testing import TinyClassifier, TinyImages, tiny_trainer
    >>> trainer = tiny_trainer(max_steps=2)
    >>> trainer.fit(TinyClassifier(), TinyImages(batch_size=8))
    >>> trainer.global_step
    2
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_hpo.testing.checkpoints import (
        check_checkpoint_independent,
        check_resume,
        check_weights_only,
        kill_and_resume,
    )
    from lightning_hpo.testing.checks import (
        check_accumulation,
        check_bf16,
        check_fits_twice,
        check_teardown,
        check_trains,
        check_two_ranks,
    )
    from lightning_hpo.testing.compare import assert_same, module_structure
    from lightning_hpo.testing.run import Killed, Outcome, Recorder, fit, fit_two_ranks, tiny_trainer
    from lightning_hpo.testing.tiny import ResumableLoader, TinyClassifier, TinyImages

_HOME = {
    "Killed": "run",
    "Outcome": "run",
    "Recorder": "run",
    "ResumableLoader": "tiny",
    "TinyClassifier": "tiny",
    "TinyImages": "tiny",
    "assert_same": "compare",
    "check_accumulation": "checks",
    "check_bf16": "checks",
    "check_checkpoint_independent": "checkpoints",
    "check_fits_twice": "checks",
    "check_resume": "checkpoints",
    "check_teardown": "checks",
    "check_trains": "checks",
    "check_two_ranks": "checks",
    "check_weights_only": "checkpoints",
    "fit": "run",
    "fit_two_ranks": "run",
    "kill_and_resume": "checkpoints",
    "module_structure": "compare",
    "tiny_trainer": "run",
}

__all__ = [
    "Killed",
    "Outcome",
    "Recorder",
    "ResumableLoader",
    "TinyClassifier",
    "TinyImages",
    "assert_same",
    "check_accumulation",
    "check_bf16",
    "check_checkpoint_independent",
    "check_fits_twice",
    "check_resume",
    "check_teardown",
    "check_trains",
    "check_two_ranks",
    "check_weights_only",
    "fit",
    "fit_two_ranks",
    "kill_and_resume",
    "module_structure",
    "tiny_trainer",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
