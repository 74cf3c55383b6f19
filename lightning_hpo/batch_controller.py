"""What an adaptive batch size knows and decides: numbers in, numbers out, no Trainer."""

import math
from typing import Any

from torch import Tensor

from lightning_hpo.functional.batching.adadagrad import GradientStatistics, Smoothed
from lightning_hpo.functional.batching.learning_rate import AdamSDE, LearningRateRule
from lightning_hpo.functional.batching.plan import next_batch_size
from lightning_hpo.functional.batching.policy import Policy
from lightning_hpo.state import saved

__all__ = ["PATIENCE", "BatchController"]

PATIENCE = 20  # readings in a row that are not finite, after which the batch size stays what it is
_RARELY = 1024  # samples in a batch above which not every step need be looked at
_MEAN = 1 - 1e-9  # a moving average with this decay is the mean so far


class BatchController:
    """Moving averages of the gradient's statistics, the batch size they ask for and the learning rate that fits it.

    Args:
        policy: What batch size the statistics ask for.
        lr_scaling: Rule by which the learning rate follows the batch.
        growth: Largest factor by which one decision changes the batch.
        smoothing: Decay of the moving averages.
        min_readings: Readings before the first change; by default as many as the moving averages remember.

    Example:
        >>> from lightning_hpo import AdaScale, NoiseScale
        >>> controller = BatchController(NoiseScale(), AdaScale(), growth=2.0, smoothing=0.0)
        >>> controller.begin(first=8, limit=1000)
        >>> controller.take_in({"trace": 100.0, "square": 20.0}, samples=8), controller.decide(batch_size=8, lr=0.1)
        (True, True)
        >>> controller.wanted, round(controller.noise_scale, 2)
        (14, 13.33)
    """

    def __init__(
        self,
        policy: Policy,
        lr_scaling: LearningRateRule,
        growth: float,
        smoothing: float,
        min_readings: int | None = None,
    ) -> None:
        self.policy, self.lr_scaling, self.growth = policy, lr_scaling, growth
        self.min_readings = min_readings or math.ceil(1 / (1 - smoothing) - 1e-9)
        self._decay = _MEAN if policy.when == "epoch" else smoothing
        self.smoothed = Smoothed(self._decay)
        self.statistics: dict[str, float] = {}  # the moving averages as they are now
        self.base = self.wanted = self.limit = 0
        self.samples = self.steps = self.skipped = self.readings = 0
        self.measured = 0  # batch size of the newest reading
        self.undecided = False  # whether there is a reading that no decision has seen
        self.lr_factor = 1.0  # of the latest step

    def begin(self, first: int, limit: int) -> None:
        """Starts, or goes on after a state was loaded.

        Args:
            first: Batch size that training begins with.
            limit: Largest batch size.
        """
        self.limit = limit
        if not self.base:
            self.base = self.wanted = first

    @property
    def needs(self) -> frozenset[str]:
        """Statistics that the policy or the rule reads."""
        return self.policy.needs | self.lr_scaling.needs

    @property
    def frozen(self) -> bool:
        """Whether readings have been useless for so long that nothing changes any more."""
        return self.skipped >= PATIENCE

    @property
    def noise_scale(self) -> float:
        """Gradient noise scale; 0 before the first reading, infinite where noise is all there is."""
        trace, square = self._trace_and_square()
        if trace <= 0:
            return 0.0
        return trace / square if square > 0 else math.inf

    def _trace_and_square(self) -> tuple[float, float]:
        return self.statistics.get("trace", 0.0), self.statistics.get("square", 0.0)

    def factor(self, batch_size: int) -> float:
        """What the learning rate of a step is multiplied by.

        Args:
            batch_size: Samples of the step.

        Returns:
            The factor, by the present statistics.
        """
        return self.lr_scaling.factor(batch_size, self.base, *self._trace_and_square())

    def due(self, interval: int | None) -> bool:
        """Whether the coming step is to be looked at.

        Args:
            interval: Steps from one look to the next; None for every step, and every tenth of large batches.
        """
        every = interval or (1 if self.wanted <= _RARELY else 10)
        return not self.frozen and self.steps % every == 0

    def take_in(self, reading: dict[str, float], samples: int, batch_size: int | None = None) -> bool:
        """Adds what a step has shown to the moving averages.

        Args:
            reading: ``trace``, ``square`` (of the batch gradient), and what the policy needs besides.
            samples: Samples that the gradient was taken over.
            batch_size: Samples of the step; the same, unless two steps were compared.

        Returns:
            Whether all numbers were finite; otherwise nothing is added.
        """
        if not all(map(math.isfinite, reading.values())):
            self.skipped += 1
            return False
        self.skipped = 0
        self.readings += 1
        self.undecided = True
        self.measured = batch_size or samples
        trace, raw = reading["trace"], reading["square"]
        values = {**reading, "square": raw - trace / samples}
        if "inner" in reading:
            values["orthogonal"] = max(trace - reading["inner"] / raw, 0.0) if raw > 0 else 0.0  # an identity
        if "coordinate" in reading:
            values["coordinate"] = min(reading["coordinate"], float(self.limit))
        self.statistics = self.smoothed.update(values)
        return True

    def decide(self, batch_size: int, lr: float) -> bool:
        """Sets :attr:`wanted` to what the policy asks for, within bounds.

        The first readings alone are mostly luck, and a batch that never shrinks would keep it: nothing changes before
        there have been :attr:`min_readings`.

        Args:
            batch_size: The present batch size.
            lr: The learning rate that the schedule sets.

        Returns:
            Whether it has changed.
        """
        if self.policy.needs and self.policy.when == "step" and self.readings < self.min_readings:
            return False
        # The tests that do not debias ask for the batch at which the noise was measured, not for the present one.
        now = {"batch_size": float(self.measured or batch_size), "lr": lr, "samples": float(self.samples)}
        asked = self.policy(GradientStatistics(**{"trace": 0.0, "square": 0.0, **self.statistics, **now}))
        least = 2 if self.policy.shrinks else self.base  # one sample has no variance
        before, least = self.wanted, min(least, self.limit)
        wanted = next_batch_size(asked, before, least, self.limit, self.growth, self.policy.shrinks)
        self.wanted = self._useful(before, wanted)
        return self.wanted != before

    def _useful(self, before: int, wanted: int) -> int:
        """A batch beyond the one at which the learning rate reaches its cap would cost steps and bring nothing."""
        cap = getattr(self.lr_scaling, "cap", math.inf)
        while wanted > before and self.factor(wanted) >= cap:
            wanted = (wanted + before) // 2
        return wanted

    def end_epoch(self) -> None:
        """Begins new averages where the policy looks at whole epochs."""
        self.smoothed = Smoothed(self._decay)
        self.undecided = False

    def step_settings(self, group: dict[str, Any], samples: int) -> dict[str, Any]:
        """What an optimizer's group is to use for one step.

        Args:
            group: The group, as the schedule has set it.
            samples: Samples of the step.

        Returns:
            Settings by name.
        """
        self.lr_factor = self.factor(samples)
        lr: float | Tensor = group["lr"] * self.lr_factor
        if not (isinstance(self.lr_scaling, AdamSDE) and "betas" in group):
            return {"lr": lr}
        betas, eps = self.lr_scaling.moments(samples / self.base, group["betas"], group["eps"])
        return {"lr": lr, "betas": betas, "eps": eps}

    def state_dict(self) -> dict[str, Any]:
        """Everything but the bounds, in plain types."""
        counts = ("base", "wanted", "samples", "steps", "skipped", "readings", "measured", "undecided")
        names = (*counts, "statistics", "smoothed")
        return {name: saved(getattr(self, name), name) for name in names}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on where the state stood.

        Args:
            state_dict: What :meth:`state_dict` returned.
        """
        for name, value in state_dict.items():
            if name == "smoothed":
                self.smoothed.load_state_dict(value)
            else:
                setattr(self, name, saved(value, name))
