"""AdAdaGrad and its relatives as a callback: the gradient's noise decides when the batch grows."""

import math
from typing import Any, ClassVar, Literal, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BatchSizeFinder, GradientAccumulationScheduler
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_hpo import distributed
from lightning_hpo.accumulation import AccumulationWindow
from lightning_hpo.batch_controller import PATIENCE, BatchController
from lightning_hpo.batch_source import AccumulatedBatches, BatchSource, LoaderBatches, source_problems
from lightning_hpo.callbacks.base import MethodCallback
from lightning_hpo.functional.arguments import is_whole
from lightning_hpo.functional.batching.learning_rate import AdaScale, LearningRateRule, default_rule
from lightning_hpo.functional.batching.plan import BatchPlan
from lightning_hpo.functional.batching.policies import NormTest, Policy
from lightning_hpo.functional.optim.sample_lr import SampleLR
from lightning_hpo.gradient_noise import GradientNoise
from lightning_hpo.noise_estimators import choose_estimators
from lightning_hpo.scaled_step import ScaledStep
from lightning_hpo.sharded_gradients import shard_problems

__all__ = ["AdaptiveBatchSize"]

_WHOLE_SHARDS = ("FULL_SHARD", "SHARD_GRAD_OP")  # of FSDP: no two ranks hold the same part of a gradient
_FEWEST_STEPS = 16  # of an epoch, where the user names no largest batch


class AdaptiveBatchSize(MethodCallback):
    r"""Lets the noise of the gradient decide how many samples an optimizer step takes.

    Starts with the batch size of your loader and grows it while training runs, in the middle of an epoch, on any number
    of ranks: first the micro-batch that each rank holds, up to ``max_micro_batch_size``, then gradient accumulation.
    By default the batch grows to the gradient noise scale :math:`\operatorname{tr}\Sigma / \|\nabla L\|^2`, and the
    learning rate follows by the gain of AdaScale, as a factor on top of your schedule. Your loss must be a mean over
    the batch.

    Args:
        policy: What batch size the statistics ask for; :class:`~lightning_hpo.NormTest` and its relatives.
        estimator: How the noise is measured: ``"micro_batch"`` compares micro-batches and ranks, at next to no cost;
            ``"ghost"`` takes the norms of single-sample gradients from the layers; ``"vmap"`` does so, too, and
            differentiates single samples in an extra pass for parameters that no layer rule covers;
            ``"difference"`` compares steps in a row, which is biased. ``"auto"`` takes micro-batches where a step has
            four, and ghost norms, or else differences, where it has fewer.
        max_batch_size: Largest batch over all ranks; by default a sixteenth of the training set, so that an epoch keeps
            a number of steps.
        max_micro_batch_size: Largest batch that one rank holds at a time; by default what a
            :class:`~lightning_hpo.MicroBatchFinder` of the same Trainer has found, or else the size your loader has.
        interval: Optimizer steps between two tests; by default 1 up to batches of 1024 and 10 beyond.
        growth: Largest factor by which one test changes the batch.
        smoothing: Decay of the moving averages of both statistics; 0 for none.
        lr_scaling: Rule by which the learning rate follows the batch; by default :class:`~lightning_hpo.AdaScale`, and
            :class:`~lightning_hpo.SqrtScaling` for Adagrad.
        mode: ``"loader"`` changes the batches that the loader draws, and accumulation; ``"accumulate"`` changes
            accumulation alone, for loaders that nobody may touch.
        max_samples: Samples of a micro-batch that ``"ghost"`` and ``"vmap"`` look at; None for all.
        min_readings: Readings of the noise before the batch first changes; by default as many as the moving averages
            remember, 1 / (1 - smoothing). The first ones are mostly luck.

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
        >>> trainer = Trainer(max_steps=30, accelerator="cpu", logger=False, callbacks=[batches],
        ...     enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
        >>> trainer.fit(module, DigitsDataModule(batch_size=8))
        >>> batches.batch_size > 8
        True
    """

    KNOB: ClassVar[str] = "batch size and its schedule, with the learning rate that fits"
    _STATE = ("controller", "ranks", "reading", "previous_gradient", "batches")

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
        max_samples: int | None = 32,
        min_readings: int | None = None,
    ) -> None:
        super().__init__()
        self.policy: Policy = NormTest() if policy is None else policy
        self.lr_scaling = lr_scaling
        self.estimator, self.mode = estimator, mode
        self.max_batch_size, self.max_micro_batch_size = max_batch_size, max_micro_batch_size
        self.interval, self.growth, self.smoothing, self.max_samples = interval, growth, smoothing, max_samples
        self.min_readings = min_readings
        if problems := self._argument_problems():
            raise ValueError(f"`AdaptiveBatchSize`: {'; '.join(problems)}.")
        self._forget()

    def _argument_problems(self) -> list[str]:
        whole = ("max_batch_size", "max_micro_batch_size", "interval", "max_samples", "min_readings")
        values = {name: getattr(self, name) for name in whole}
        problems = [f"{n} must be a positive integer, got {v!r}" for n, v in values.items() if not _positive_or_none(v)]
        estimators = ("auto", "micro_batch", "ghost", "vmap", "difference")
        checks = {
            f"estimator must be one of {estimators}, got {self.estimator!r}": self.estimator in estimators,
            f"mode must be 'loader' or 'accumulate', got {self.mode!r}": self.mode in ("loader", "accumulate"),
            f"growth must be above 1, got {self.growth!r}": self.growth > 1,
            f"smoothing must lie in [0, 1), got {self.smoothing!r}": 0 <= self.smoothing < 1,
        }
        return problems + [problem for problem, holds in checks.items() if not holds]

    def _forget(self) -> None:
        """What training begins with."""
        rule = self.lr_scaling or AdaScale()  # until the optimizer is known
        self.controller = BatchController(self.policy, rule, self.growth, self.smoothing, self.min_readings)
        self.ranks = 0
        self.reading: dict[str, Any] = {}  # of the last step, read when its successor is under way
        self._arrival: torch.cuda.Event | None = None  # of the reading on the host
        self.previous_gradient: dict[str, Any] = {}
        self.batches: dict[str, Any] = {}  # state of the loader or of the accumulation
        self._source: BatchSource | None = None
        self._noise: GradientNoise | None = None
        self._scaled: ScaledStep | None = None
        self._window = AccumulationWindow()
        self._window_ended, self._totals = True, (0, 0)
        self._parameters: list[Tensor] = []
        self._batch: Any = None
        self._losses: list[Tensor] = []
        self._users_accumulation: int | None = None
        self._groups_in_batch = 1  # gradients that a batch of all ranks shows

    # What has been learned

    @property
    def batch_size(self) -> int:
        """Samples over all ranks that the newest plan gives an optimizer step; 0 before training."""
        plan = self._plan()
        return plan.samples(self.ranks) if plan else 0

    @property
    def noise_scale(self) -> float:
        """Gradient noise scale; 0 before it was measured, infinite where the gradient drowns in noise."""
        return self.controller.noise_scale

    @override
    def hyperparameters(self) -> dict[str, float | list[float]]:
        """Batch size, factor on the learning rate, gradient noise scale, and the samples seen so far."""
        known = self.controller
        if not known.base:
            return {}
        found = {"batch_size": float(self.batch_size), "lr_factor": known.factor(self.batch_size)}
        if 0 < known.noise_scale < math.inf:
            found["noise_scale"] = known.noise_scale
        return {**found, "samples": float(known.samples)}

    @property
    def _batches_from(self) -> BatchSource:
        return cast(BatchSource, self._source)  # while training runs

    def _plan(self) -> BatchPlan | None:
        if self._source is not None:
            return self._source.plan
        kept = self.batches.get("next_plan") or self.batches.get("plan")
        return BatchPlan(*kept) if kept else None

    @override
    def state_dict(self) -> dict[str, Any]:
        """Batch size, statistics, and the position among the epoch's samples."""
        self._store()
        return super().state_dict()

    def _store(self) -> None:
        self._await_reading()
        if self._source is not None:
            self.batches = self._source.state_dict()
        if self._noise is not None:
            self.previous_gradient = self._noise.state_dict()

    # Around training

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuses what cannot work, all of it at once."""
        if stage != "fit":
            return
        if trainer.global_step == 0:  # a checkpoint is read after this
            self._forget()
        if isinstance(trainer.strategy, DeepSpeedStrategy):
            self.raise_all(["`DeepSpeedStrategy` fixes accumulation when training begins; use another strategy."])
        self.require_automatic_optimization(pl_module)
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        rivals = [c for c in callbacks if isinstance(c, (BatchSizeFinder, GradientAccumulationScheduler))]
        problems = [f"`{type(c).__name__}` sets the batch size or accumulation, too; remove one." for c in rivals]
        if is_param_in_hook_signature(pl_module.training_step, "dataloader_iter", explicit=True):
            problems.append("`training_step(dataloader_iter)` draws its own batches; take `batch` instead.")
        self.raise_all(problems)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes over the loader and begins to watch the gradient."""
        resumed = trainer.global_step > 0 and bool(self.batches)
        if not resumed:
            self._forget()
        if not trainer.optimizers:
            self.raise_all(["there is no optimizer; return one from `configure_optimizers`."])
        optimizer = trainer.optimizers[0]
        if isinstance(optimizer, torch.optim.LBFGS):
            self.raise_all(["`LBFGS` runs the closure several times a step; use an optimizer that takes one gradient."])
        self.controller.lr_scaling = self.lr_scaling or default_rule(optimizer)
        self._users_accumulation = trainer.accumulate_grad_batches
        self._parameters = [p for p in pl_module.parameters() if p.requires_grad]
        self._begin_window()
        self._window_ended = True
        self._take_over_batches(trainer, resumed)
        self._watch(trainer, pl_module)
        self._scaled = ScaledStep(optimizer, self._step_settings)
        self._notice_schedulers(trainer)

    def _take_over_batches(self, trainer: Trainer, resumed: bool) -> None:
        self.raise_all(source_problems(trainer, self.mode))
        source = self._source = LoaderBatches(trainer) if self.mode == "loader" else AccumulatedBatches(trainer)
        ranks, before = trainer.world_size, self.ranks
        first = source.first.samples(ranks)
        self.controller.begin(first, self._limit(first, source.epoch_samples))
        self.ranks = ranks
        source.load_state_dict(self.batches if resumed else None, before)
        if resumed and before != ranks:
            self._request(trainer)
        if resumed and source.is_over():
            self._end_epoch(trainer)  # the checkpoint may have been written before it could decide
        source.begin()

    def _limit(self, first: int, epoch: int) -> int:
        wanted = self.max_batch_size
        if wanted is None and not epoch:
            self.raise_all(["the number of training samples is unknown; set `max_batch_size`."])
        if wanted is not None and 0 < epoch < wanted:
            rank_zero_warn(f"`max_batch_size` is more than the {epoch} samples of an epoch, which is the limit.")
        limit = min(wanted or max(first, epoch // _FEWEST_STEPS), max(first, epoch) if epoch else math.inf)
        if limit < first:
            self.raise_all([f"`max_batch_size` is {limit}, but training begins with batches of {first}."])
        return int(limit)

    def _watch(self, trainer: Trainer, pl_module: LightningModule) -> None:
        needs = self.controller.needs
        if not needs:
            return
        sharded, single = self.is_sharded(trainer), bool(needs & {"inner", "coordinate"})
        self._groups_in_batch = 1 if sharded else trainer.world_size
        groups = self._batches_from.first.accumulation * self._groups_in_batch
        estimators, watched, problems = choose_estimators(self.estimator, pl_module, single, groups, sharded)
        self.raise_all(problems + (self._shard_problems(trainer) if sharded else []))
        if left_out := sum(p.numel() for p in self._parameters) - sum(p.numel() for p in watched.values()):
            rank_zero_info(f"`AdaptiveBatchSize` measures noise without {left_out} parameters that no rule covers.")
        self._noise = GradientNoise(
            pl_module,
            watched,
            estimators,
            inner="inner" in needs,
            coordinate=getattr(self.policy, "quantile", 0.9) if "coordinate" in needs else None,
            max_samples=self.max_samples,
            sharded=sharded,
            strict=self.estimator != "auto" or bool(needs & {"inner", "coordinate"}),
        )
        self._noise.load_state_dict(self.previous_gradient, pl_module.device)

    def _shard_problems(self, trainer: Trainer) -> list[str]:
        kind = getattr(getattr(trainer.strategy, "sharding_strategy", None), "name", _WHOLE_SHARDS[0])
        if kind not in _WHOLE_SHARDS:
            return [f"`sharding_strategy={kind!r}` keeps replicas of shards; use one of {_WHOLE_SHARDS}."]
        return shard_problems(self._parameters)

    def _notice_schedulers(self, trainer: Trainer) -> None:
        for config in trainer.lr_scheduler_configs:
            if config.interval == "step" and not isinstance(config.scheduler, SampleLR):
                rank_zero_warn(
                    f"`{type(config.scheduler).__name__}` counts optimizer steps, of which there will be fewer as the "
                    "batch grows; schedule by samples instead: `SampleCosine`, `SampleLR`."
                )

    # Every micro-batch

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Counts the batches of the epoch."""
        self._window_ended = True
        self.raise_all(source_problems(trainer, self.mode))  # the Trainer may have asked for a new loader
        self._batches_from.begin_epoch()

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Sets the accumulation that the batch was drawn for."""
        drawn = self._batches_from.take(batch, batch_idx)
        if self._window_ended:
            self._begin_window()
            trainer.accumulate_grad_batches = drawn.accumulation
            if self._noise is not None:
                due = self.controller.due(self.interval)
                self._noise.begin(drawn.accumulation * self._groups_in_batch if due else 0)
        self._window.add(drawn.size, self._parameters)
        self._batch = batch

    @override
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Forgets what the training step itself has differentiated."""
        if self._noise is not None:
            self._noise.before_backward()

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
        last, samples = self._window_totals(pl_module.device)
        window.finish(self._parameters, accumulation, last, samples)
        full = len(window.sizes) == accumulation
        reading = self._noise.read(window.sizes, samples) if self._noise and full else None
        self._decide(trainer)  # on what the step before has shown, whose numbers have long arrived
        if reading is not None:
            self.reading = {"samples": reading.samples, "batch_size": samples}
            self._send("values", reading.values)
        self.controller.samples += samples
        self.controller.steps += 1
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
            self._window_ended = True
            if self._losses and self.reading:
                self._send("loss", distributed.mean(torch.stack(self._losses).mean()))
            self._losses = []
        self._batches_from.end_batch()

    def _begin_window(self) -> None:
        self._window.reset()
        self._window_ended, self._totals = False, (0, 0)
        self._losses, self._batch = [], None

    def _window_totals(self, device: torch.device | str) -> tuple[int, int]:
        """Samples of the window's last micro-batch, and of all of them, over all ranks.

        Ranks that draw from streams need not have the same numbers, but must all go on with the same ones.
        """
        if not self._totals[1]:
            last, samples = self._window.sizes[-1], self._window.samples
            if self._batches_from.alike or self.ranks == 1:
                self._totals = (last * self.ranks, samples * self.ranks)
            else:
                last, samples = distributed.sum(torch.tensor([last, samples], device=device)).tolist()
                self._totals = (last, samples)
        return self._totals

    # Deciding

    def _send(self, name: str, value: Tensor) -> None:
        """Starts the way of a reading to the host; a copy that is waited for would wait for the whole queue."""
        self.reading[name] = value.to("cpu", non_blocking=True)
        if value.is_cuda:
            self._arrival = torch.cuda.Event()
            self._arrival.record(torch.cuda.current_stream(value.device))

    def _await_reading(self) -> None:
        if self._arrival is not None:
            self._arrival.synchronize()
            self._arrival = None

    def _decide(self, trainer: Trainer) -> None:
        if self.policy.needs and not self.reading:
            return
        if self._take_in() and self.policy.when == "step":
            self._change(trainer)

    def _take_in(self) -> bool:
        """Hands the last reading to the controller; True unless it was useless."""
        self._await_reading()
        reading, self.reading = self.reading, {}
        if not reading:
            return True
        names = ("trace", "square", "inner", "coordinate")
        values = dict(zip(names, reading["values"].tolist(), strict=True))
        if "loss" in reading:
            values["loss"] = float(reading["loss"])
        fine = self.controller.take_in(values, reading["samples"], reading["batch_size"])
        if self.controller.skipped == PATIENCE:
            rank_zero_warn(
                f"The gradient was not finite in {PATIENCE} steps in a row, so the batch size stays {self.batch_size}."
            )
        return fine

    def _change(self, trainer: Trainer) -> None:
        if self.controller.decide(self.batch_size, float(trainer.optimizers[0].param_groups[0]["lr"])):
            self._request(trainer)

    def _request(self, trainer: Trainer) -> None:
        """Asks loader or accumulation for the batch size wanted."""
        self._batches_from.request(self.controller.wanted, self._largest_micro_batch(trainer), self.controller.limit)

    def _largest_micro_batch(self, trainer: Trainer) -> int:
        if self.max_micro_batch_size is not None:
            return self.max_micro_batch_size
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        found = [size for c in callbacks if (size := getattr(c, "micro_batch_size", None))]
        return min(found) if found else self._batches_from.first.micro

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Decides, where the policy looks at whole epochs."""
        self._end_epoch(trainer)

    def _end_epoch(self, trainer: Trainer) -> None:
        if self.policy.when == "epoch":
            self._take_in()
            if self.controller.undecided:
                self._change(trainer)
            self.controller.end_epoch()

    def _step_settings(self, group: dict[str, Any]) -> dict[str, Any]:
        return self.controller.step_settings(group, self._window_totals(group["params"][0].device)[1])

    def _log(self, pl_module: LightningModule) -> None:
        plan, known = cast(BatchPlan, self._plan()), self.controller
        values = {"batch_size": self.batch_size, "micro_batch_size": plan.micro, "accumulation": plan.accumulation}
        noise = {name: known.statistics.get(name, 0.0) for name in ("trace", "square")}
        rest = {"samples": known.samples, "lr_factor": known.lr_factor}
        self.log_values(pl_module, {name: float(value) for name, value in {**values, **noise, **rest}.items()})

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
        for owned in (self._noise, self._scaled):
            if owned is not None:
                owned.remove()
        if self._source is not None:
            self._source.release()
        if self._users_accumulation is not None:
            trainer.accumulate_grad_batches = self._users_accumulation
        self._source = self._noise = self._scaled = self._users_accumulation = None
        self._parameters = []


def _positive_or_none(value: object) -> bool:
    return value is None or is_whole(value, 1)
