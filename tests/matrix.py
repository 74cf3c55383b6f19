"""One entry a method: it buys the method every test of `test_matrix.py`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from lightning.pytorch import LightningDataModule, LightningModule

from lightning_hpo import MethodCallback, TokenCompression
from lightning_hpo.testing import TinyClassifier, TinyImages

EVERYTHING = frozenset(
    {
        "trains",
        "resume",  # bit for bit, after a kill at an arbitrary step
        "two ranks",  # like one process on the joined batch
        "fits twice",
        "weights only",  # the checkpoint loads where classes are refused
        "checkpoint independence",  # without us, and the other way round
        "command line",
        "teardown",
        "accumulation",
        "bf16",
    }
)


@dataclass(frozen=True)
class Case:
    """A method in one setting.

    Args:
        name: Name of the setting.
        stem: Name of the method's files; `examples/<stem>.yaml` is run for the command line.
        callback: Makes the callback.
        module: Makes the module.
        data: Makes the data for a batch size.
        works_with: What holds.
        reasons: Why the rest does not hold.
    """

    name: str
    stem: str
    callback: Callable[[], MethodCallback]
    module: Callable[[], LightningModule] = TinyClassifier
    data: Callable[[int], LightningDataModule] = TinyImages
    works_with: frozenset[str] = EVERYTHING
    reasons: Mapping[str, str] = field(default_factory=dict)


# A large step size: in ten steps the kept counts, which are whole numbers, must move.
CASES = [
    Case("TokenCompression", "diffrate", lambda: TokenCompression(target=0.6, lr=0.3)),
    Case("TokenCompression-joint", "diffrate", lambda: TokenCompression(target=0.6, lr=0.3, freeze=False)),
]
