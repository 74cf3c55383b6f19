"""DiffRate as a callback: learns how many tokens each block of a Vision Transformer keeps."""

import math
from dataclasses import replace
from typing import Any, ClassVar, Literal, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_hpo import distributed
from lightning_hpo.callbacks.base import MethodCallback
from lightning_hpo.frozen import FrozenModule
from lightning_hpo.functional.arguments import is_whole
from lightning_hpo.functional.compression.budget import parse_budget
from lightning_hpo.functional.compression.diffrate import candidate_counts, kept_tokens
from lightning_hpo.functional.compression.rates import RateLayout
from lightning_hpo.functional.compression.schedule import TokenCompressionSchedule
from lightning_hpo.hyper import HyperparameterSet, Simplex
from lightning_hpo.nn.diffrate import attach, remove_token_compression, set_schedule
from lightning_hpo.nn.timm_models import Anatomy, describe, find_networks
from lightning_hpo.nn.token_state import TokenState

__all__ = ["TokenCompression"]

_WEIGHT = {"relative": 30.0, "absolute": 5.0}
_MULTIPLIER_REACH = 0.02  # excess beyond which the multiplier grows no faster, so that it does not overshoot
_MULTIPLIER_RATE = 0.05  # share of the quadratic term's slope that the multiplier takes over in each step


class TokenCompression(MethodCallback):
    r"""Learns, by gradient descent, how many tokens each block of a Vision Transformer keeps within a budget.

    Finds the timm network in your module. While it trains, every compressible block prunes and merges tokens by a
    mask that is differentiable in the rates; validation, test and prediction really shorten the sequences. The rates
    minimise your loss plus :math:`w e^2 + \mu e`, where :math:`e = F / F_{full} - \tau` is the distance of the
    multiply-accumulates from the budget and the multiplier :math:`\mu` grows until the budget is met, whatever the
    scale of your loss. The callback owns the rates and their optimizer (AdamW without weight decay, cosine): your
    module gains no parameter and no checkpoint key, and is what it was once training ends. Then take :attr:`schedule`
    and :func:`~lightning_hpo.apply_token_compression`.

    Args:
        target: Budget of one image: a fraction of the dense cost (``0.6``), multiply-accumulates (``2.9e9``) or a
            string (``"2.9G"``).
        module: Name of the network inside your module (``"backbone.vit"``), if there are several.
        freeze: Keeps every weight as it is and learns rates only; False trains both.
        granularity: Step of the candidate counts.
        lr: First learning rate of the rates.
        min_lr: Last learning rate of the rates.
        macs_loss: ``"relative"``, as above, or ``"absolute"``, the paper's :math:`w ((F - T) / 10^9)^2` without a
            multiplier, whose weight suits networks of a few G only.
        macs_weight: The weight :math:`w`; 30 for the relative loss, 5 (the paper's) for the absolute one.
        importance: ``"class"`` or ``"mean"``; see :func:`~lightning_hpo.apply_token_compression`.
        matching: What decides which tokens merge: ``"features"`` after attention (DiffRate), attention ``"keys"``, or
            ``"bipartite"``: tokens merge in pairs of similar keys as in ToMe, in the first block too, nothing is
            pruned, and learning begins with the same number in every block. It has lost least on small images.
        size_rule: ``"clamped"`` or ``"unclamped"``.
        total_steps: Length of the cosine in optimizer steps; by default that of the training.
        image_size: Height and width of the images, for CAFormer at a size other than that of its weights.

    Raises:
        ValueError: If an argument is wrong, or the budget cannot be met by the network found.
        TypeError, NotImplementedError: In ``setup``, if there is no network that can be compressed.

    References:
        Chen et al., "DiffRate: Differentiable Compression Rate for Efficient Vision Transformers", ICCV 2023.

    Example:
        >>> from lightning_hpo.demos import DigitsDataModule, ImageClassifier
        >>> from lightning.pytorch import Trainer
        >>> small = dict(img_size=8, patch_size=2, in_chans=1, embed_dim=16, depth=3, num_heads=2)
        >>> module = ImageClassifier("vit_tiny_patch16_224", num_classes=10, model_args=small)
        >>> compression = TokenCompression(target=0.7)
        >>> trainer = Trainer(max_steps=2, accelerator="cpu", logger=False, callbacks=[compression],
        ...     enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
        >>> trainer.fit(module, DigitsDataModule())
        >>> compression.schedule.patches
        16
    """

    KNOB: ClassVar[str] = "number of tokens that each block of a Vision Transformer prunes and merges"
    _STATE = ("hypers", "optimizer", "step", "multiplier")
    _KEY = ("module",)

    def __init__(
        self,
        target: float | int | str,
        module: str | None = None,
        freeze: bool = True,
        granularity: int = 1,
        lr: float = 0.01,
        min_lr: float = 0.001,
        macs_loss: Literal["relative", "absolute"] = "relative",
        macs_weight: float | None = None,
        importance: Literal["class", "mean"] | None = None,
        matching: Literal["features", "keys", "bipartite"] = "features",
        size_rule: Literal["clamped", "unclamped"] = "clamped",
        total_steps: int | None = None,
        image_size: int | None = None,
    ) -> None:
        super().__init__()
        self.target = target
        self.fraction, self.macs = parse_budget(target)
        self.module, self.freeze, self.granularity = module, freeze, granularity
        self.lr, self.min_lr, self.total_steps, self.image_size = lr, min_lr, total_steps, image_size
        self.macs_loss = macs_loss
        self.macs_weight = _WEIGHT.get(self.macs_loss, 0.0) if macs_weight is None else macs_weight
        self.importance, self.matching, self.size_rule = importance, matching, size_rule
        if problems := self._argument_problems():
            raise ValueError(f"`TokenCompression`: {'; '.join(problems)}.")
        self.hypers: HyperparameterSet | None = None
        self.optimizer: Optimizer | None = None
        self.step = 0
        self.multiplier = torch.zeros(())
        self._anatomy: Anatomy | None = None  # while attached
        self._layout: RateLayout | None = None  # once the network is known
        self._tokens: TokenState | None = None  # while attached
        self._frozen: FrozenModule | None = None
        self._loaded: dict[str, Any] | None = None  # the schedule of a loaded state
        self._horizon = math.inf

    def _argument_problems(self) -> list[str]:
        checks = {
            f"granularity must be a positive integer, got {self.granularity!r}": is_whole(self.granularity, 1),
            f"lr must be positive, got {self.lr!r}": self.lr > 0,
            f"min_lr must lie between 0 and lr, got {self.min_lr!r}": 0 <= self.min_lr <= self.lr,
            f"macs_weight must be positive, got {self.macs_weight!r}": self.macs_weight > 0,
            f"macs_loss must be 'relative' or 'absolute', got {self.macs_loss!r}": self.macs_loss in _WEIGHT,
            f"total_steps must be a positive integer, got {self.total_steps!r}": self.total_steps is None
            or is_whole(self.total_steps, 1),
            f"importance must be 'class' or 'mean', got {self.importance!r}": self.importance
            in (None, "class", "mean"),
            f"matching must be 'features', 'keys' or 'bipartite', got {self.matching!r}": self.matching
            in ("features", "keys", "bipartite"),
            f"size_rule must be 'clamped' or 'unclamped', got {self.size_rule!r}": self.size_rule
            in ("clamped", "unclamped"),
        }
        return [problem for problem, holds in checks.items() if not holds]

    # What has been learned

    @property
    def schedule(self) -> TokenCompressionSchedule:
        """Tokens that each block keeps, as learned so far; reads them back to the host.

        Raises:
            RuntimeError: Before ``fit``, if no state was loaded.
            ValueError: If the rates are not finite, because the loss was not.
        """
        if self._layout is None:
            if self._loaded is None:
                raise RuntimeError("There is no schedule yet: `trainer.fit(module)` learns it.")
            return TokenCompressionSchedule.from_dict(self._loaded)
        rules: dict[str, Any] = {"importance": self.importance, "matching": self.matching, "size_rule": self.size_rule}
        return replace(self._layout.schedule(self._kept().detach()), **rules)

    @override
    def hyperparameters(self) -> dict[str, float | list[float]]:
        """Kept tokens of each compressing block, and their cost in units of the dense one."""
        if self._layout is None:
            return {}
        schedule, blocks = self.schedule, self._layout.blocks
        found: dict[str, float | list[float]] = {"macs_ratio": (schedule.macs or 0) / (schedule.full_macs or 1)}
        if self._layout.prunes:
            found["tokens_after_pruning"] = [float(schedule.prune[index]) for index in blocks]
        found["tokens_after_merging"] = [float(schedule.merge[index]) for index in blocks]
        return found

    @override
    def state_dict(self) -> dict[str, Any]:
        """The rates, their optimizer, the step, and the schedule for whoever reads the file."""
        schedule = self._loaded if self._layout is None else self.schedule.to_dict()
        return {**super().state_dict(), "schedule": schedule}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the rates; the schedule follows from them."""
        try:
            super().load_state_dict({name: value for name, value in state_dict.items() if name != "schedule"})
        except RuntimeError as error:  # from `torch.nn.Module`, which names the shapes
            self.raise_all(
                [f"the checkpoint's rates are for another granularity, matching, depth or image size: {error}"]
            )
        self._loaded = state_dict.get("schedule")

    # Around training

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Finds the network, checks the budget against it, and opens its blocks."""
        self.refuse_sharded_strategy(trainer)
        anatomy = describe(self._find(pl_module), self.image_size)
        anatomy = anatomy.merging_pairs() if self.matching == "bipartite" else anatomy
        self._prepare_rates(anatomy.layout)
        if stage == "fit":
            self.require_automatic_optimization(pl_module)
            self._refuse_patch_dropout(anatomy.model)
            self._optimize_anew()
        rules = (self.importance, self.matching, self.size_rule)
        self._tokens = attach(anatomy, *rules, granularity=self.granularity, probabilities=self._probabilities)
        self._anatomy = anatomy
        if stage == "fit" and self.freeze:
            self._frozen = self._freeze(trainer, pl_module, anatomy)

    def _find(self, pl_module: LightningModule) -> nn.Module:
        networks = find_networks(pl_module)
        if self.module is not None:
            try:
                return pl_module.get_submodule(self.module)
            except AttributeError:
                raise ValueError(
                    f"module={self.module!r} is not in `{type(pl_module).__name__}`; networks found: "
                    f"{sorted(networks) or 'none'}."
                ) from None
        if len(networks) > 1:
            self.raise_all([f"there are several networks, {sorted(networks)}; name one with `module`."])
        if not networks and is_overridden("configure_model", pl_module):
            self.raise_all(["no network was found; build it in `__init__` instead of `configure_model`."])
        return next(iter(networks.values()), pl_module)

    def _prepare_rates(self, layout: RateLayout) -> None:
        if not layout.blocks:
            raise ValueError("Every block is exempt from compression, so there is no rate to learn.")
        least, full = layout.reachable(self.granularity)
        budget = self._budget(full)
        if not least <= budget < full:
            raise ValueError(
                f"target {self.target!r} is {budget / 1e9:.4g} G; this network can be brought from "
                f"{full / 1e9:.4g} G down to {least / 1e9:.4g} G."
            )
        start = layout.start(budget, self.granularity)
        if self.hypers is None:
            self.hypers = HyperparameterSet(kept=Simplex(start))
        elif self.hypers["kept"].shape != start.shape:
            self.raise_all(["the rates were learned for another depth, image size or matching; use a new callback."])
        self.optimizer = self.optimizer or self._new_optimizer()
        self._layout = layout
        self.restore_pending()

    def _new_optimizer(self) -> Optimizer:
        return torch.optim.AdamW(cast(HyperparameterSet, self.hypers).parameters(), lr=self.lr, weight_decay=0.0)

    def _optimize_anew(self) -> None:
        self.optimizer = self._new_optimizer()
        self.step = 0
        self.multiplier = torch.zeros(())

    def _refuse_patch_dropout(self, network: nn.Module) -> None:
        dropout = getattr(network, "patch_drop", None)
        if getattr(dropout, "prob", 0.0) > 0:
            raise ValueError("Patch dropout changes the number of tokens from step to step; set `patch_drop_rate=0`.")

    def _freeze(self, trainer: Trainer, pl_module: LightningModule, anatomy: Anatomy) -> FrozenModule:
        anchor = list(anatomy.blocks[-1].parameters())[-1]
        others = [c._frozen for c in trainer.callbacks if isinstance(c, TokenCompression)]  # type: ignore[attr-defined]
        return FrozenModule(pl_module, anchor, [pair for other in others if other for pair in other.required])

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Moves the rates to the device and makes all ranks start from the same ones."""
        hypers, optimizer = self._learner()
        hypers.to(pl_module.device)
        self.multiplier = self.multiplier.to(pl_module.device)
        optimizer.load_state_dict(optimizer.state_dict())  # takes restored moments to where the rates are now
        for raw in hypers.parameters():
            raw.data.copy_(distributed.broadcast(raw.data))

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Fixes the length of the cosine, now that the loaders are known."""
        if any(getattr(module, "grad_checkpointing", False) for module in pl_module.modules()):
            raise ValueError("Gradient checkpointing runs blocks twice, out of order; turn it off.")
        self._learn(True)
        if self._frozen:
            self._frozen.hold_statistics()
        steps = self.total_steps or trainer.estimated_stepping_batches
        self._horizon = steps if steps > 0 else math.inf
        if math.isinf(self._horizon):
            rank_zero_warn(
                f"The length of training is unknown, so the rates keep the learning rate {self.lr}; set `total_steps`."
            )

    @override
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Refuses a loss that no rate can change."""
        if not loss.requires_grad:
            self.raise_all(["the loss has no gradient; do not run the network under `torch.no_grad()`."])

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Adds the budget's gradient, which depends on no batch, and steps the rates."""
        hypers, own = self._learner()
        if self._frozen:
            self._frozen.drop_gradient()
        if self.step == 0 and len(cast(RateLayout, self._layout).blocks) > 1 and hypers.raw["kept"].grad is None:
            rank_zero_warn(
                "Your loss does not depend on the rates, so the budget alone moves them: the training step does not "
                "run the network, or runs it under `torch.no_grad()`."
            )
        for raw in hypers.parameters():
            raw.grad = torch.zeros_like(raw) if raw.grad is None else raw.grad
        distributed.mean_gradients(hypers.parameters())  # before unscaling: ranks must agree on an overflow
        self.unscale_own(trainer, own)
        values = self._add_budget_gradient()
        for group in own.param_groups:
            group["lr"] = self._learning_rate()
        self.step_own(trainer, own)
        self.step += 1
        if trainer.global_step % max(trainer.log_every_n_steps, 1) == 0:  # type: ignore[attr-defined]
            values |= self._block_counts()
        self.log_values(pl_module, values)

    def _add_budget_gradient(self) -> dict[str, Tensor | float]:
        layout, kept = cast(RateLayout, self._layout), self._kept()
        full = float(layout.cost.full)
        budget, relative = self._budget(full), self.macs_loss == "relative"
        unit = full if relative else 1e9
        macs, loss, slope = layout.budget_slope(kept, budget, self.macs_weight, unit, self.multiplier)
        kept.backward(slope)
        if relative:
            excess = ((macs - budget) / unit).clamp(-_MULTIPLIER_REACH, _MULTIPLIER_REACH)
            self.multiplier = self.multiplier + 2 * _MULTIPLIER_RATE * self.macs_weight * excess
        return {"macs_ratio": macs / full, "macs_loss": loss, "multiplier": self.multiplier}

    def _block_counts(self) -> dict[str, Tensor | float]:
        layout = cast(RateLayout, self._layout)
        prune, merge = layout.counts(self._kept().detach())
        kinds = {"pruned_to": prune, "merged_to": merge} if layout.prunes else {"merged_to": merge}
        return {f"{kind}/block_{index}": counts[index] for kind, counts in kinds.items() for index in layout.blocks}

    def _learning_rate(self) -> float:
        progress = min(self.step / self._horizon, 1.0)
        return self.min_lr + (self.lr - self.min_lr) * (1 + math.cos(math.pi * progress)) / 2

    # Around evaluation

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Shortens the sequences as learned so far."""
        self._learn(False)
        if self.step == 0 and trainer.state.fn != "fit":
            rank_zero_warn("No rates have been learned or loaded, so `TokenCompression` leaves the network dense.")
        elif self._anatomy is not None:
            set_schedule(self._anatomy, self.schedule)

    on_test_start = on_predict_start = on_validation_start

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Goes back to learning, if validation was a part of training."""
        self._learn(trainer.state.fn == "fit" and not trainer.sanity_checking)

    def _learn(self, learning: bool) -> None:
        if self._tokens is not None:
            self._tokens.learning = learning

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Gives the network back as it was."""
        self._detach()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Gives the network back as it was: no teardown follows an exception."""
        self._detach()

    def _detach(self) -> None:
        if self._anatomy is not None:
            remove_token_compression(self._anatomy.model)
        if self._frozen:
            self._frozen.restore()
        self._anatomy = self._tokens = self._frozen = None

    # The rates

    def _learner(self) -> tuple[HyperparameterSet, Optimizer]:
        return cast(HyperparameterSet, self.hypers), cast(Optimizer, self.optimizer)

    def _probabilities(self) -> Tensor:
        return self._learner()[0]["kept"]

    def _kept(self) -> Tensor:
        probabilities = self._probabilities()
        patches = cast(RateLayout, self._layout).patches
        return kept_tokens(probabilities, candidate_counts(patches, self.granularity, probabilities.device), prefix=0)

    def _budget(self, full: float) -> float:
        return self.fraction * full if self.fraction is not None else cast(float, self.macs)
