"""Random draws that resume: one stream of its own, and a fixed start for what reads the global generator."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["Draws"]


class Draws:
    """A random stream on the CPU whose position is saved, and from which whatever else is random takes its seeds.

    Dropout reads the global generator, which no checkpoint holds. Within :meth:`fixed` the global generator starts from
    the next number of this stream, and is put back afterwards.

    Args:
        seed: Between 0 and 2³² - 1: a generator on the CPU knows no more of it.

    Raises:
        ValueError: If the seed is out of range.

    Example:
        >>> draws = Draws(0)
        >>> saved = draws.state_dict()
        >>> with draws.fixed(torch.device("cpu")):
        ...     first = torch.rand(2)
        >>> draws.load_state_dict(saved)
        >>> with draws.fixed(torch.device("cpu")):
        ...     bool((torch.rand(2) == first).all())
        True
    """

    def __init__(self, seed: int) -> None:
        if not isinstance(seed, int) or not 0 <= seed < 2**32:
            raise ValueError(f"seed must be an integer between 0 and 2**32 - 1, got {seed!r}")
        self.generator = torch.Generator().manual_seed(seed)

    @contextmanager
    def fixed(self, device: torch.device) -> Iterator[None]:
        """Starts the global generators of the CPU and of a device from the next number of the stream.

        Args:
            device: Whose generator is to be put back as well.
        """
        seed = int(torch.randint(2**31, (), generator=self.generator))
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            yield

    def state_dict(self) -> dict[str, Any]:
        """The position of the stream."""
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from a saved position."""
        self.generator.set_state(state_dict["generator"].cpu())

    def __getstate__(self) -> dict[str, Any]:  # generators cannot be copied everywhere
        return self.state_dict()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.generator = torch.Generator()
        self.load_state_dict(state)
