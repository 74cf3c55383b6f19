"""AdAdaGrad and its relatives as a callback: the gradient's noise decides when the batch grows."""

import math
from typing import Any, ClassVar, Literal, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BatchSizeFinder, GradientAccumulationScheduler
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.data import extract_batch_size
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_hpo import distributed
from lightning_hpo.accumulation import AccumulationWindow
from lightning_hpo.callbacks.base import MethodCallback
from lightning_hpo.functional.batching.adadagrad import GradientStatistics, Smoothed
from lightning_hpo.functional.batching.learning_rate import AdaScale, AdamSDE, LearningRateRule
from lightning_hpo.functional.batching.plan import BatchPlan, next_batch_size, plan_for
from lightning_hpo.functional.batching.policies import NormTest, Policy
from lightning_hpo.functional.optim.sample_lr import SampleLR
from lightning_hpo.gradient_noise import GradientNoise, choose_estimators
from lightning_hpo.live_loader import AccumulatedBatches, LiveLoader, loader_problems
from lightning_hpo.scaled_step import ScaledStep

__all__ = ["AdaptiveBatchSize"]

_RARELY = 1024  # samples in a batch above which every step need not be looked at
_PATIENCE = 20  # steps without a finite gradient after which the batch size stays what it is


class AdaptiveBatchSize(MethodCallback):
    r"""Lets the noise of the gradient decide how many samples an optimizer step takes.

    Starts with the batch size of your loader and grows it while training runs, in the middle of an epoch, on any number
    of ranks: first the micro-batch that each rank holds, up to ``max_micro_batch_size``, then gradient accumulation. By
    default the batch grows to the gradient noise scale :math:`\operatorname{tr}\Sigma / \|\nabla L\|^2`, and the learning
    rate follows by the gain of AdaScale, as a factor on top of your schedule. Your loss must be a mean over the batch.

    Args:
        policy: What batch size the statistics ask for; :class:`~lightning_hpo.NormTest` and its relatives.
        estimator: How the noise is measured: ``"micro_batch"`` compares micro-batches and ranks, at next to no cost;
            ``"ghost"`` takes the norms of single-sample gradients from the layers; ``"vmap"`` differentiates single
            samples in an extra pass; ``"difference"`` compares steps in a row, which is biased. ``"auto"`` takes
            micro-batches where a step has four, and ghost norms, or else differences, where it has fewer.
        max_batch_size: Largest batch over all ranks; by default the training set.
        max_micro_batch_size: Largest batch that one rank holds at a time; by default what a
            :class:`~lightning_hpo.MicroBatchFinder` of the same Trainer has found, or else the size your loader has.
        interval: Optimizer steps between two tests; by default 1 up to batches of 1024 and 10 beyond.
        growth: Largest factor by which one test changes the batch.
        smoothing: Decay of the moving averages of both statistics; 0 for none.
        lr_scaling: Rule by which the learning rate follows the batch; :class:`~lightning_hpo.AdaScale` and its relatives.
        mode: ``"loader"`` changes the batches that the loader draws, and accumulation; ``"accumulate"`` changes
            accumulation alone, for loaders that nobody may touch.
        max_samples: Samples of a micro-batch that ``"ghost"`` and ``"vmap"`` look at; None for all.

    Raises:
        ValueError: If an argument is wrong.
        MisconfigurationException: In ``setup`` or when training starts, if the Trainer, the loader or the module rules
            the method out; says what to change.

    References:
        Lau, Liu, Kolar, "AdAdaGrad: Adaptive Batch Size Schemes for Adaptive Gradient Methods", 2024, sec. 3;
        McCandlish et al., "An Empirical Model of Large-Batch Training", 2018; Johnson et al., "AdaScale SGD", 2020.

    Example:
        >>> from lightning_hpo.demos import DigitsDataModule, ImageClassifier
        >>> small = dict(img_size=8, patch_size=2, in_chans=1, embed_dim=16, depth=1, num_heads=2)
        >>> module = ImageClassifier("vit_tiny_patch16_224", num_classes=10, model_args=small, cosine=False)
        >>> batches = AdaptiveBatchSize(max_micro_batch_size=256)
        >>> trainer = Trainer(max_steps=8, accelerator="cpu", logger=False, callbacks=[batches],
        ...     enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
        >>> trainer.fit(module, DigitsDataModule(batch_size=8))
        >>> batches.batch_size > 8
        True
    """

    KNOB: ClassVar[str] = "batch size and its schedule, with the learning rate that fits"
    _STATE = ("progress", "statistics", "smoothed", "reading", "previous_gradient", "batches")

    def __init__(
        self,
        policy: Policy | None = None,
        estimator: Literal["auto", "micro_batch", "ghost", "vmap", "difference"] = "auto",
        max_batch_size: int | None = None,
        max_micro_batch_size: int | None = None,
        interval: int | None = None,
        growth: float = 2.0,
        smoothing: float = 0.9,
        lr_scaling: LearningRateRule | None = None,
        mode: Literal["loader", "accumulate"] = "loader",
        max_samples: int | None = 64,
    ) -> None:
        super().__init__()
        self.policy: Policy = NormTest() if policy is None else policy
        self.lr_scaling: LearningRateRule = AdaScale() if lr_scaling is None else lr_scaling
        self.estimator, self.mode = estimator, mode
        self.max_batch_size, self.max_micro_batch_size = max_batch_size, max_micro_batch_size
        self.interval, self.growth, self.smoothing, self.max_samples = interval, growth, smoothing, max_samples
        if problems := self._argument_problems():
            raise ValueError(f"`AdaptiveBatchSize`: {'; '.join(problems)}.")
        self._forget()

    def _argument_problems(self) -> list[str]:
        whole = {
            name: getattr(self, name) for name in ("max_batch_size", "max_micro_batch_size", "interval", "max_samples")
        }
        problems = [f"{n} must be a positive integer, got {v!r}" for n, v in whole.items() if not _positive_or_none(v)]
        checks = {
            f"estimator must be 'auto', 'micro_batch', 'ghost', 'vmap' or 'difference', got {self.estimator!r}": (
                self.estimator in ("auto", "micro_batch", "ghost", "vmap", "difference")
            ),
            f"mode must be 'loader' or 'accumulate', got {self.mode!r}": self.mode in ("loader", "accumulate"),
            f"growth must be above 1, got {self.growth!r}": self.growth > 1,
            f"smoothing must lie in [0, 1), got {self.smoothing!r}": 0 <= self.smoothing < 1,
        }
        return problems + [problem for problem, holds in checks.items() if not holds]

    def _forget(self) -> None:
        """What training begins with."""
        counts = ("wanted", "base_batch_size", "samples", "steps", "skipped", "ranks")
        self.progress: dict[str, Any] = {**dict.fromkeys(counts, 0), "lr_factor": 1.0}
        self.statistics: dict[str, float] = {}  # the moving averages as they are now
        self.smoothed = Smoothed(1 - 1e-9 if self.policy.when == "epoch" else self.smoothing)
        self.reading: dict[str, Any] = {}  # of the last step, read when its successor is under way
        self.previous_gradient: dict[str, Any] = {}
        self.batches: dict[str, Any] = {}  # state of the loader or of the accumulation
        self._live: LiveLoader | None = None
        self._accumulated: AccumulatedBatches | None = None
        self._noise: GradientNoise | None = None
        self._scaled: ScaledStep | None = None
        self._window = AccumulationWindow()
        self._parameters: list[Tensor] = []
        self._ended = True
        self._losses: list[Tensor] = []
        self._users_accumulation: int | None = None
        self._limit = 0

    # What has been learned

    @property
    def batch_size(self) -> int:
        """Samples over all ranks that the newest plan gives an optimizer step; 0 before training."""
        plan = self._plan()
        return plan.samples(self.progress["ranks"]) if plan else 0

    @property
    def noise_scale(self) -> float:
        """Gradient noise scale by the smoothed statistics; 0 before the first, infinite where noise is all there is."""
        trace, square = self._trace_and_square()
        if trace <= 0:
            return 0.0
        return trace / square if square > 0 else math.inf

    def _trace_and_square(self) -> tuple[float, float]:
        return self.statistics.get("trace", 0.0), self.statistics.get("square", 0.0)

    @override
    def hyperparameters(self) -> dict[str, float | list[float]]:
        """Batch size, factor on the learning rate, gradient noise scale, and the samples seen so far."""
        if not self.progress["base_batch_size"]:
            return {}
        found = {"batch_size": float(self.batch_size), "lr_factor": float(self.progress["lr_factor"])}
        if 0 < self.noise_scale < math.inf:
            found["noise_scale"] = self.noise_scale
        return {**found, "samples": float(self.progress["samples"])}

    def _plan(self) -> BatchPlan | None:
        source = self._live.sampler if self._live else self._accumulated
        if source is not None:
            return source.plan
        saved = self.batches.get("next_plan") or self.batches.get("plan")
        return BatchPlan(*saved) if saved else None

    @override
    def state_dict(self) -> dict[str, Any]:
        """Batch size, statistics, and the position among the epoch's samples."""
        self._store()
        return super().state_dict()

    def _store(self) -> None:
        if source := self._live.sampler if self._live else self._accumulated:
            self.batches = source.state_dict()
        if self._noise is not None:
            self.previous_gradient = self._noise.state_dict()

    # Around training

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuses what cannot work, all of it at once."""
        if stage != "fit":
            return
        self.refuse_sharded_strategy(trainer)
        self.require_automatic_optimization(pl_module)
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        rivals = [c for c in callbacks if isinstance(c, (BatchSizeFinder, GradientAccumulationScheduler))]
        problems = [f"`{type(c).__name__}` sets the batch size or accumulation, too; remove one." for c in rivals]
        self.raise_all(problems)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes over the loader and begins to watch the gradient."""
        resumed = trainer.global_step > 0 and bool(self.batches)
        if not resumed:
            self._forget()
        if isinstance(trainer.optimizers[0], torch.optim.LBFGS):
            self.raise_all(["`LBFGS` runs the closure several times a step; use an optimizer that takes one gradient."])
        self._users_accumulation = trainer.accumulate_grad_batches
        self._parameters = [p for p in pl_module.parameters() if p.requires_grad]
        self._take_over_batches(trainer, resumed)
        self._watch(trainer, pl_module)
        self._scaled = ScaledStep(trainer.optimizers[0], self._step_settings)
        self._notice_schedulers(trainer)

    def _take_over_batches(self, trainer: Trainer, resumed: bool) -> None:
        accumulation, ranks = trainer.accumulate_grad_batches, trainer.world_size
        loader = trainer.train_dataloader
        if self.mode == "loader":
            self.raise_all(loader_problems(loader))
            self._live = LiveLoader(trainer, accumulation)
            plan = self._live.sampler.plan
            self._limit = self._live.sampler.epoch_samples * ranks
        else:
            micro = getattr(loader, "batch_size", None)
            if not micro:
                self.raise_all(["the size of the loader's batches is unknown; give a `DataLoader` with `batch_size`."])
            plan = BatchPlan(cast(int, micro), accumulation)
            self._accumulated = AccumulatedBatches(plan)
            self._limit = _whole(trainer.num_training_batches, plan.micro * ranks)
        self._set_limit(plan.samples(ranks))
        if not resumed:
            self.progress |= {"wanted": plan.samples(ranks), "base_batch_size": plan.samples(ranks)}
            if self._live:  # a checkpoint that was written without us
                self._live.sampler.skip(trainer.fit_loop.epoch_loop.batch_progress.current.ready)
        elif self._live:
            self._live.sampler.load_state_dict(_for_ranks(self.batches, self.progress["ranks"], ranks))
        elif self._accumulated:
            self._accumulated.load_state_dict(self.batches)
        moved = resumed and self.progress["ranks"] != ranks
        self.progress["ranks"] = ranks
        self._first = plan
        if moved:
            self._request(trainer)
        if self._live:
            self._live.restart(trainer.current_epoch)

    def _set_limit(self, first: int) -> None:
        if self.max_batch_size is None and not self._limit:
            self.raise_all(["the number of training samples is unknown; set `max_batch_size`."])
        if self.max_batch_size is not None and self._limit and self.max_batch_size > self._limit:
            rank_zero_warn(f"`max_batch_size` is more than the {self._limit} samples of an epoch, which is the limit.")
        self._limit = min(self.max_batch_size or self._limit, self._limit or cast(int, self.max_batch_size))
        if self._limit < first:
            self.raise_all([f"`max_batch_size` is {self._limit}, but training begins with batches of {first}."])

    def _watch(self, trainer: Trainer, pl_module: LightningModule) -> None:
        needs = self.policy.needs | self.lr_scaling.needs
        if not needs:
            return
        single = bool(needs & {"inner", "coordinate"})
        groups = self._first.accumulation * trainer.world_size
        estimators, watched, problems = choose_estimators(self.estimator, pl_module, single, groups)
        self.raise_all(problems)
        left_out = sum(p.numel() for p in self._parameters) - sum(p.numel() for p in watched.values())
        if left_out:
            rank_zero_info(
                f"`AdaptiveBatchSize` measures noise without {left_out} parameters that no layer rule covers."
            )
        coordinate = getattr(self.policy, "quantile", None) if "coordinate" in needs else None
        self._noise = GradientNoise(
            pl_module, watched, estimators, "inner" in needs, coordinate, self.max_samples
        )
        self._noise.load_state_dict(self.previous_gradient, pl_module.device)

    def _notice_schedulers(self, trainer: Trainer) -> None:
        stepping = [
            type(config.scheduler).__name__
            for config in trainer.lr_scheduler_configs
            if config.interval == "step" and not isinstance(config.scheduler, SampleLR)
        ]
        if stepping:
            rank_zero_warn(
                f"`{stepping[0]}` counts optimizer steps, of which there will be fewer as the batch grows; schedule by "
                "samples instead: `SampleCosine`, `SampleLR`."
            )

    # Every micro-batch

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Counts the batches of the epoch."""
        if self._live and self._live.stale():  # the Trainer has asked for a new loader
            self._renew(trainer)
        elif self._live:
            self._live.begin_epoch()
        self._ended = True

    def _renew(self, trainer: Trainer) -> None:
        self.raise_all(loader_problems(trainer.train_dataloader))
        before = cast(LiveLoader, self._live).sampler
        self._live = LiveLoader(trainer)
        self._live.sampler.follow(before)
        self._live.restart(trainer.current_epoch)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Sets the accumulation that the batch was drawn for."""
        if self._live:
            drawn = self._live.sampler.take()
            self._live.synchronize()
        else:
            drawn = cast(AccumulatedBatches, self._accumulated).take(extract_batch_size(batch), batch_idx)
        if self._ended:
            self._window.reset()
            self._ended = False
            trainer.accumulate_grad_batches = drawn.accumulation
            if self._noise is not None:
                self._noise.begin(drawn.accumulation * trainer.world_size if self._due() else 0)
        self._window.add(drawn.size, self._parameters)
        self._batch = batch

    def _due(self) -> bool:
        if self.progress["skipped"] >= _PATIENCE:
            return False
        every = self.interval or (1 if self.batch_size <= _RARELY else 10)
        return self.progress["steps"] % every == 0

    @override
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes what the backward pass of this micro-batch has shown."""
        if self._noise is not None and self._noise.using is not None:
            unscale: Tensor | float = trainer.accumulate_grad_batches
            if trainer.scaler is not None:
                unscale = unscale / trainer.scaler.scale(torch.ones((), device=pl_module.device))
            self._noise.after_backward(self._batch, self._window.sizes[-1], unscale)

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Makes the gradient a mean over the window's samples, reads its noise and decides on the next batch."""
        accumulation, window = trainer.accumulate_grad_batches, self._window
        full = len(window.sizes) == accumulation
        window.finish(self._parameters, accumulation)
        reading = self._noise.read(window.sizes) if self._noise and full else None
        self._decide(trainer)  # on what the step before has shown, whose numbers have long arrived
        if reading is not None:
            self.reading = {"values": reading.values, "samples": reading.samples}
        samples = window.samples * trainer.world_size
        self.progress["samples"] += samples
        self.progress["steps"] += 1
        for config in trainer.lr_scheduler_configs:
            if isinstance(config.scheduler, SampleLR):
                config.scheduler.advance(samples)
        self._log(pl_module)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Ends the window, if a step was taken, and counts the batches that are left."""
        self._batch = None
        if "loss" in self.policy.needs and isinstance(outputs, dict):
            self._losses.append(outputs["loss"] * trainer.accumulate_grad_batches)
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0 or trainer.is_last_batch:
            self._ended = True
            self._note_loss()
        if self._live:
            self._live.synchronize()

    def _note_loss(self) -> None:
        if self._losses and self.reading:
            self.reading["loss"] = distributed.mean(torch.stack(self._losses).mean())
        self._losses = []

    # Deciding

    def _decide(self, trainer: Trainer) -> None:
        reading, self.reading = self.reading, {}
        if self.policy.needs and not reading:
            return
        if reading and not self._take_in(reading):
            return
        if self.policy.when == "step":
            self._change(trainer)

    def _take_in(self, reading: dict[str, Any]) -> bool:
        """Adds a reading to the moving averages; False if it is not finite."""
        trace, square, inner, coordinate = reading["values"].tolist()
        loss = float(reading.get("loss", 0.0))
        if not all(map(math.isfinite, (trace, square, inner, loss))):
            self.progress["skipped"] += 1
            if self.progress["skipped"] == _PATIENCE:
                rank_zero_warn(
                    f"The gradient was not finite in {_PATIENCE} steps in a row, so the batch size stays {self.batch_size}."
                )
            return False
        self.progress["skipped"] = 0
        values = {"trace": trace, "square": square - trace / reading["samples"], "inner": inner, "loss": loss}
        values["orthogonal"] = max(trace - inner / square, 0.0) if square > 0 else 0.0  # an identity
        self.statistics = self.smoothed.update(values | {"coordinate": min(coordinate, float(self._limit))})
        return True

    def _change(self, trainer: Trainer) -> None:
        lr = float(trainer.optimizers[0].param_groups[0]["lr"])
        now = {"batch_size": float(self.batch_size), "lr": lr, "samples": float(self.progress["samples"])}
        asked = self.policy(GradientStatistics(**{"trace": 0.0, "square": 0.0, **self.statistics, **now}))
        base = self.progress["base_batch_size"]
        least = 2 if self.policy.shrinks else base  # one sample has no variance
        before = self.progress["wanted"]
        wanted = next_batch_size(asked, before, least, self._limit, self.growth, self.policy.shrinks)
        if wanted != before:
            self.progress["wanted"] = wanted
            self._request(trainer)

    def _request(self, trainer: Trainer) -> None:
        ranks, first = trainer.world_size, self._first
        largest = first.micro if self._accumulated else max(self._largest_micro_batch(trainer), 1)
        plan = plan_for(self.progress["wanted"], ranks, largest, first.accumulation, max_batch=self._limit)
        if self._accumulated:
            whole = plan.accumulation if plan.micro == first.micro else max(plan.accumulation // 2, first.accumulation)
            self._accumulated.request(BatchPlan(first.micro, whole))
        else:
            cast(LiveLoader, self._live).sampler.request(plan)

    def _largest_micro_batch(self, trainer: Trainer) -> int:
        if self.max_micro_batch_size is not None:
            return self.max_micro_batch_size
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        found = [size for c in callbacks if (size := getattr(c, "micro_batch_size", None))]
        return min(found) if found else self._first.micro

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Decides, where the policy looks at whole epochs."""
        if self.policy.when == "epoch":
            if self.reading:
                reading, self.reading = self.reading, {}
                self._take_in(reading)
            self._change(trainer)
            self.smoothed = Smoothed(1 - 1e-9)

    # The learning rate

    def _step_settings(self, group: dict[str, Any]) -> dict[str, Any]:
        base, samples = self.progress["base_batch_size"], self._window.samples * self.progress["ranks"]
        factor = self.lr_scaling.factor(samples, base, *self._trace_and_square())
        self.progress["lr_factor"] = factor
        settings = {"lr": group["lr"] * factor}
        if isinstance(self.lr_scaling, AdamSDE) and "betas" in group:
            betas, eps = self.lr_scaling.moments(samples / base, group["betas"], group["eps"])
            settings |= {"betas": betas, "eps": eps}
        return settings

    def _log(self, pl_module: LightningModule) -> None:
        plan = cast(BatchPlan, self._plan())
        trace, square = self._trace_and_square()
        values = {"batch_size": self.batch_size, "micro_batch_size": plan.micro, "accumulation": plan.accumulation}
        values |= {"samples": self.progress["samples"]}
        factors = {"lr_factor": self.progress["lr_factor"], "trace": trace, "square": square}
        self.log_values(pl_module, {name: float(value) for name, value in {**values, **factors}.items()})

    # The end

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gives loader, accumulation and optimizer back as they were."""
        self._release(trainer)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Gives everything back: neither the end of training nor teardown follows an exception."""
        self._release(trainer)

    def _release(self, trainer: Trainer) -> None:
        self._store()
        if self._noise is not None:
            self._noise.remove()
        if self._scaled is not None:
            self._scaled.remove()
        if self._live is not None:
            self._live.release()
        if self._users_accumulation is not None:
            trainer.accumulate_grad_batches = self._users_accumulation
        self._live = self._accumulated = self._noise = self._scaled = self._users_accumulation = None
        self._parameters = []


def _positive_or_none(value: object) -> bool:
    return value is None or (isinstance(value, int) and not isinstance(value, bool) and value > 0)


def _whole(batches: float, size: int) -> int:
    return int(batches) * size if math.isfinite(batches) else 0


def _for_ranks(state: dict[str, Any], before: int, ranks: int) -> dict[str, Any]:
    """The sampler's state for another number of ranks: samples consumed are shared out anew."""
    if before == ranks:
        return state
    samples, batches = state["taken"]
    return {**state, "taken": [-(-samples * before // ranks), batches], "ahead": []}
