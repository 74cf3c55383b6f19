"""Hyperparameters that differ between examples: drawn around the present ones, by a scale that may be learned."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_hpo import distributed
from lightning_hpo.functional.bilevel.best_response import (
    Encoding,
    encode,
    encoded_size,
    encoding_direction,
    entropy,
    perturbed,
)
from lightning_hpo.functional.seeding import mix_seed
from lightning_hpo.hyper import HyperparameterSet, Integer, Interval, Simplex

__all__ = ["Noise", "Perturbation"]

_FLAT = 6.9  # the logit of one thousandth: beyond it a sigmoid has hardly a slope


class Perturbation(nn.Module):
    r"""The scales by which hyperparameters of some sets are perturbed, and what follows from a perturbation.

    All raw values together are one vector :math:`\lambda` of n numbers; the only parameter is ``scale``, :math:`s`.
    The sets are not a part of it, so they may be anybody's.

    Args:
        sets: Sets by name; their domains must act on each number alone.
        scale: Standard deviation :math:`\operatorname{softplus}(s)` in units of the raw values, one for all or by the
            name of a hyperparameter.
        per_batch: Names of hyperparameters that are the same for a whole batch.
        encoding: What the hyper-network sees of them.

    Raises:
        ValueError: If there is nothing to perturb, a domain mixes numbers, a scale is not positive, or a name is
            unknown; all are listed.

    Example:
        >>> from lightning_hpo import UnitInterval
        >>> hypers = HyperparameterSet(drop=UnitInterval(0.5))
        >>> perturbation = Perturbation({"": hypers}, scale=1.0)
        >>> rows = perturbation.rows(torch.tensor([[-1.0], [1.0]]))
        >>> perturbation.values(rows)[""]["drop"]
        tensor([0.2689, 0.7311])
    """

    def __init__(
        self,
        sets: Mapping[str, HyperparameterSet],
        scale: float | Mapping[str, float] = 1.0,
        per_batch: Iterable[str] = (),
        encoding: Encoding = "cos_sin",
    ) -> None:
        super().__init__()
        self.encoding, self.per_batch = encoding, set(per_batch)
        self._sets = (dict(sets),)  # in a tuple: the sets must not become a part of this
        problems: list[str] = []
        wide: list[float] = []
        self.columns: dict[tuple[str, str], slice] = {}
        for label, part in sets.items():
            for name, domain in part.domains.items():
                if isinstance(domain, Simplex):
                    problems.append(f"`{name}` is a {type(domain).__name__}, whose numbers depend on each other")
                given = scale.get(name, 1.0) if isinstance(scale, Mapping) else scale
                if not 0 < given < float("inf"):
                    problems.append(f"the scale of `{name}` must be positive, got {given!r}")
                size = part.raw[name].numel()
                self.columns[label, name] = slice(len(wide), len(wide) + size)
                wide += [given] * size
        known = {name for _, name in self.columns}
        named = self.per_batch | (set(scale) if isinstance(scale, Mapping) else set())
        problems += [f"there is no hyperparameter `{name}`, but {sorted(known)}" for name in sorted(named - known)]
        problems += [] if wide else ["there is no hyperparameter to perturb"]
        if problems:
            raise ValueError("; ".join(problems))
        encoded_size(1, encoding)  # refuses what it does not know
        width = torch.tensor(wide)
        self.scale = nn.Parameter(width + torch.log(-torch.expm1(-width)))
        self.register_buffer("centre", self.raw().detach().clone() if encoding == "cos_sin" else torch.zeros(len(self)))

    @property
    def sets(self) -> dict[str, HyperparameterSet]:
        """The sets by name."""
        return self._sets[0]

    centre: Tensor

    def __len__(self) -> int:
        return self.scale.numel()

    @property
    def inputs(self) -> int:
        """How many inputs the hyper-network has."""
        return encoded_size(len(self), self.encoding)

    def raw_parameters(self) -> list[nn.Parameter]:
        """Raw values of all sets, in order."""
        return [self.sets[label].raw[name] for label, name in self.columns]

    def raw(self) -> Tensor:
        """All raw values, ``(n)``, differentiable in them."""
        return torch.cat([raw.flatten() for raw in self.raw_parameters()])

    def rows(self, noise: Tensor) -> Tensor:
        """Raw values for each example.

        Args:
            noise: Standard normal, ``(batch, n)``; what is the same for a batch takes that of the first row.

        Returns:
            ``(batch, n)``, differentiable in raw values and scales.
        """
        return perturbed(self.raw(), self.scale, self.shared(noise))

    def shared(self, noise: Tensor) -> Tensor:
        """Noise in which what is the same for a batch has the first row's everywhere."""
        if not self.per_batch:
            return noise
        noise = noise.clone()
        for (_, name), columns in self.columns.items():
            if name in self.per_batch:
                noise[:, columns] = noise[:1, columns]
        return noise

    def values(self, rows: Tensor) -> dict[str, dict[str, Tensor]]:
        """Values in their domains, without a gradient.

        Args:
            rows: Raw values, ``(batch, n)``.

        Returns:
            By set and name: ``(batch, ...)``, or one value where it is the same for a batch.
        """
        found: dict[str, dict[str, Tensor]] = {label: {} for label in self.sets}
        for (label, name), columns in self.columns.items():
            part = self.sets[label]
            value = part.domains[name].value(rows.detach()[:, columns].reshape(-1, *part.raw[name].shape))
            found[label][name] = value[0] if name in self.per_batch else value
        return found

    def encoded(self, rows: Tensor) -> Tensor:
        """What the hyper-network sees of raw values ``(..., n)``; angles are 45 degrees at the first ones."""
        return encode(rows - self.centre, self.encoding)

    def difference(self, rows: Tensor) -> Tensor:
        """The encoding of raw values, less that of the present ones, which does not follow them."""
        return self.encoded(rows) - self.encoded(self.raw().detach())

    def direction(self, rows: Tensor) -> Tensor:
        """The encoding's derivative from the present raw values towards others ``(batch, n)``; without a gradient."""
        raw = self.raw().detach()
        return encoding_direction(raw - self.centre, rows.detach() - raw, self.encoding)

    def entropy(self) -> Tensor:
        """Entropy of the perturbation."""
        return entropy(self.scale)

    def scales(self) -> dict[str, Tensor]:
        """Standard deviations by name; the mean where a hyperparameter is several numbers."""
        width = F.softplus(self.scale.detach())
        several = len(self.sets) > 1
        return {
            f"{label}.{name}" if several else name: width[columns].mean()
            for (label, name), columns in self.columns.items()
        }

    @torch.no_grad()
    def confine(self, before: Tensor, most: float) -> None:
        """Limits how far raw values have moved, and how far they are from where a domain has a slope.

        Args:
            before: Raw values before the step, ``(n)``.
            most: Largest change of a raw value.
        """
        for ((label, name), columns), raw in zip(self.columns.items(), self.raw_parameters(), strict=True):
            old = before[columns].view_as(raw)
            raw.copy_(old + (raw - old).clamp(-most, most))
            if isinstance(self.sets[label].domains[name], (Interval, Integer)):
                limit = old.abs().clamp_min(_FLAT)  # whoever is farther out may stay or come back
                raw.copy_(raw.clamp(-limit, limit))

    def get_extra_state(self) -> Any:
        """Names, so that scales are not read for others."""
        return [name for _, name in self.columns]

    def set_extra_state(self, state: Any) -> None:
        """Refuses scales of other hyperparameters."""
        if list(state) != self.get_extra_state():
            raise ValueError(f"the checkpoint has scales of {list(state)}, the module has {self.get_extra_state()}")


class Noise:
    """Standard normal noise that is the same however a batch is spread over ranks and micro-batches.

    Rows are numbered by examples: with two ranks the first one takes every second. They are drawn on the CPU.

    Args:
        size: Numbers a row.
        seed: Decides everything.

    Example:
        >>> whole, parts = Noise(2), Noise(2)
        >>> whole.begin(5)
        >>> parts.begin(5)
        >>> torch.equal(whole.rows(4), torch.cat([parts.rows(2), parts.rows(2)]))
        True
    """

    def __init__(self, size: int, seed: int = 0) -> None:
        self.size, self.seed = size, seed
        self._generator = torch.Generator()

    def begin(self, step: int) -> None:
        """Begins the noise of a step.

        Args:
            step: Its number, on which alone the noise depends.
        """
        self._generator.manual_seed(mix_seed(self.seed, step))

    def rows(self, batch: int, device: torch.device | str = "cpu") -> Tensor:
        """The next rows of this step.

        Args:
            batch: How many this rank needs.
            device: Where.

        Returns:
            ``(batch, size)``.
        """
        ranks = distributed.world_size()
        # Uniform numbers do not depend on how many are asked for at a time; normal ones would.
        uniform = torch.rand(batch * ranks, self.size, generator=self._generator, dtype=torch.float64)
        own = uniform[distributed.rank() :: ranks].clamp(1e-12, 1 - 1e-12)
        return torch.special.ndtri(own).float().to(device, non_blocking=True)
