"""One entry a method: it buys the method every test of `test_matrix.py`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch.utils.data import DataLoader

from lightning_hpo import (
    AdaptiveBatchSize,
    ConvexHeadTuning,
    Hypergradient,
    HyperparameterSet,
    MethodCallback,
    MicroBatchFinder,
    NormTest,
    SelfTuning,
    SingleLoopHypergradient,
    TokenCompression,
    UnitInterval,
)
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
        compare: What is the same for one process, two ranks and two micro-batches.
        works_with: What holds.
        reasons: Why the rest does not hold.
    """

    name: str
    stem: str
    callback: Callable[[], MethodCallback]
    module: Callable[[], LightningModule] = TinyClassifier
    data: Callable[[int], LightningDataModule] = TinyImages
    compare: tuple[str, ...] = ("method", "module", "knobs")
    works_with: frozenset[str] = EVERYTHING
    reasons: Mapping[str, str] = field(default_factory=dict)


class Unscheduled(TinyClassifier):
    """No schedule that counts steps."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


class PlainImages(TinyImages):
    """A loader of torch's own class: the callback restores its position."""

    def train_dataloader(self):
        return DataLoader(self.train_set, self.batch_size, sampler=super().train_dataloader().sampler)


class Smoothed(TinyClassifier):
    """A loss with a hyperparameter: how much labels are smoothed."""

    def __init__(self):
        super().__init__()
        self.hypers = HyperparameterSet(smoothing=UnitInterval(0.3))

    def training_step(self, batch, batch_idx):
        images, labels = batch
        logits = self(images)
        share = self.hypers["smoothing"]
        right = torch.nn.functional.cross_entropy(logits, labels)
        return (1 - share) * right - share * logits.log_softmax(1).mean()


class SmoothedEach(Smoothed):
    """A loss with a hyperparameter that may differ between examples."""

    def training_step(self, batch, batch_idx):
        images, labels = batch
        logits = self(images)
        share = self.hypers["smoothing"]
        right = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
        return ((1 - share) * right - share * logits.log_softmax(1).mean(1)).mean()


HEAD = {"every_n_steps": 2, "steps": 2, "log_l2": 0.0, "bounds": (-2.0, 6.0), "solver": "fista"}
HEAD |= {"maid_args": {"kappa": 1e-6}}
ONCE = "it searches once, before training, and nothing moves afterwards; its own tests look at this"


# A large step size: in ten steps the kept counts, which are whole numbers, must move.
CASES = [
    Case("TokenCompression", "diffrate", lambda: TokenCompression(target=0.6, lr=0.3)),
    Case("TokenCompression-joint", "diffrate", lambda: TokenCompression(target=0.6, lr=0.3, freeze=False)),
    Case(
        "Hypergradient-decay",
        "implicit_differentiation",
        lambda: Hypergradient(tune=("weight_decay",), every_n_steps=2, lr=0.3),
    ),
    Case(
        "Hypergradient-lr",
        "implicit_differentiation",
        lambda: Hypergradient(tune=("lr", "momentum"), every_n_steps=3, lr=0.1),
    ),
    Case(
        "Hypergradient-loss",
        "implicit_differentiation",
        lambda: Hypergradient(every_n_steps=2, lr=0.3),
        Smoothed,
    ),
    Case(
        "SingleLoop-network",
        "bo_rep",
        lambda: SingleLoopHypergradient(outer=("network.blocks.0",), refine_steps=0, lr=0.05, z_lr=0.1),
    ),
    Case(
        "SingleLoop-loss",
        "bo_rep",
        lambda: SingleLoopHypergradient(every_n_steps=1, refine_steps=0, lr=10.0, z_lr=0.1, normalize=False),
        Smoothed,
    ),
    Case(
        "SelfTuning-delta",
        "self_tuning_networks",
        lambda: SelfTuning(warmup_steps=0, train_steps=2, lr=0.05),
        SmoothedEach,
    ),
    Case(
        "SelfTuning-stn",
        "self_tuning_networks",
        lambda: SelfTuning(mode="stn", warmup_steps=0, train_steps=1, lr=0.05),
        SmoothedEach,
    ),
    Case("TokenCompression-pairs", "diffrate", lambda: TokenCompression(target=0.7, lr=0.3, matching="bipartite")),
    # Batches double up to the cap, so that one process, two ranks and two micro-batches lay out the same batches.
    Case(
        "AdaptiveBatchSize",
        "adadagrad",
        lambda: AdaptiveBatchSize(
            NormTest(eta=0.1), "ghost", max_batch_size=32, max_micro_batch_size=64, smoothing=0.0, max_samples=None
        ),
        Unscheduled,
        PlainImages,
        compare=("module", "knobs"),  # the state says how a batch is laid out on ranks and micro-batches
        works_with=EVERYTHING - {"accumulation"},
        reasons={
            "accumulation": "works, but micro-batches are laid out anew as the batch grows, so that runs differ; its "
            "own tests compare every step's gradient with that of the samples of its window"
        },
    ),
    Case(
        "MicroBatchFinder",
        "micro_batch",
        lambda: MicroBatchFinder(max_size=16),
        works_with=frozenset({"weights only", "checkpoint independence", "command line", "teardown"}),
        reasons=dict.fromkeys(("trains", "resume", "two ranks", "fits twice", "accumulation", "bf16"), ONCE),
    ),
    # Every second step, so that ten steps hold some; at epoch ends in its own tests. FISTA, because L-BFGS turns the
    # rounding of sums into differences as large as the accuracy that is asked for; bounds away from what it would take
    # long to solve. The state counts iterations, of which rounding may make one more or less.
    Case(
        "ConvexHeadTuning",
        "maid",
        lambda: ConvexHeadTuning(**HEAD),
        compare=("module", "knobs"),
    ),
    Case(
        "ConvexHeadTuning-coefficient",
        "maid",
        lambda: ConvexHeadTuning("network.head", "coefficient", **HEAD),
        compare=("module", "knobs"),
    ),
]
