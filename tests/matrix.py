"""One entry a method: it buys the method every test of `test_matrix.py`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch.utils.data import DataLoader, DistributedSampler, Subset
from torch_geometric.data import Batch

from lightning_hpo import (
    AdaptiveBatchSize,
    CommunityPruning,
    ConditionedTraining,
    ConditionSpec,
    ConvexHeadTuning,
    DAGCommunityDetector,
    Hypergradient,
    HyperparameterSet,
    MethodCallback,
    MetricObjective,
    MicroBatchFinder,
    NormTest,
    SelfTuning,
    SingleLoopHypergradient,
    TokenCompression,
    UnitInterval,
    hypernetize,
)
from lightning_hpo.demos.graph_data import planted_partition
from lightning_hpo.testing import ResumableLoader, TinyClassifier, TinyImages

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


class Conditioned(TinyClassifier):
    """Weights that follow how much labels are smoothed; the middle where nobody says."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            spec = ConditionSpec().add("smoothing", 0.0, 0.5)
            self.network = hypernetize(self.network, spec, include=("head.*", "blocks.3.mlp.*"), hidden=(8,))

    def forward(self, images):
        return self.network(images, gamma=self.network.spec.centre() if self.network.gamma is None else None)

    def training_step(self, batch, batch_idx):
        images, labels = batch
        share = 0.25 if self.network.gamma is None else self.network.condition["smoothing"]
        logs = self(images).log_softmax(1)
        right = torch.nn.functional.nll_loss(logs, labels, reduction="none")
        return ((1 - share) * right - share * logs.mean(1)).mean()


class Judged(TinyClassifier):
    """A loss that is an attribute."""

    def __init__(self):
        super().__init__()
        self.criterion = torch.nn.CrossEntropyLoss()

    def training_step(self, batch, batch_idx):
        images, labels = batch
        return self.criterion(self(images), labels)

    def validation_step(self, batch, batch_idx):
        images, labels = batch
        self.log("val_loss", self.criterion(self(images), labels), sync_dist=True)


class JudgedInPairs(TinyClassifier):
    """Two of the classes against the other two."""

    def __init__(self):
        super().__init__()
        self.loss = torch.nn.BCEWithLogitsLoss()

    def training_step(self, batch, batch_idx):
        images, labels = batch
        return self.loss(self(images)[:, 0], (labels % 2).float())


class ShortEpochs(TinyImages):
    """An epoch, and so a validation, every two steps of eight images."""

    def __init__(self, batch_size=8):
        super().__init__(batch_size)
        self.train_set = Subset(self.train_set, range(16))


class TinyDetector(DAGCommunityDetector):
    """The same weights every time."""

    def __init__(self):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            super().__init__(6, max_communities=6, hidden_channels=8, heads=2, warmup_epochs=1, ramp_epochs=2, lr=0.01)


class TinyGraphs(LightningDataModule):
    """Two batches an epoch, of small graphs with two communities each."""

    def __init__(self, batch_size=8):
        super().__init__()
        self.batch_size = batch_size
        self.graphs = [planted_partition(2, 8, attributes=6, seed=seed) for seed in range(16)]

    def train_dataloader(self):
        ranks, rank = (self.trainer.world_size, self.trainer.global_rank) if self.trainer is not None else (1, 0)
        sampler = DistributedSampler(self.graphs, num_replicas=ranks, rank=rank, seed=0)
        return ResumableLoader(self.graphs, self.batch_size, sampler=sampler, collate_fn=Batch.from_data_list)


HEAD = {"every_n_steps": 2, "steps": 2, "log_l2": 0.0, "bounds": (-2.0, 6.0), "solver": "fista"}
HEAD |= {"maid_args": {"kappa": 1e-6}}
MISSED = (
    "works, bit for bit, but from a checkpoint of the last batch before a validation, which Lightning does not repeat: "
    "training goes on as it would have, and the choice of that validation is missing until the next one"
)
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
    Case("MetricObjective", "anyloss", lambda: MetricObjective("f1", "multiclass", running=0.9), Judged),
    Case(
        "MetricObjective-batch",
        "anyloss",
        lambda: MetricObjective("gmean", criterion="loss", warmup=0.0, anneal=1.0, mix=0.9, running=None),
        JudgedInPairs,
        works_with=EVERYTHING - {"accumulation"},
        reasons={
            "accumulation": "works, with the metric of each micro-batch, which is not that of the batch; with running "
            "sums both end alike"
        },
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
    # Conditions are numbered, by batches or by examples: only the latter are the same however a batch is spread.
    # Its own tests resume bit for bit from any other step, and compare everything but the choice from this one.
    Case(
        "ConditionedTraining",
        "mip_hypernetworks",
        ConditionedTraining,
        Conditioned,
        ShortEpochs,
        works_with=EVERYTHING - {"two ranks", "accumulation", "resume"},
        reasons={
            "resume": MISSED,
            "two ranks": "works, with another condition on each rank, so that a run is not that of one process; its "
            "own tests compare what ranks draw and that they end alike",
            "accumulation": "works, with another condition for each micro-batch, so that runs differ; its own tests "
            "look at each of them",
        },
    ),
    Case(
        "ConditionedTraining-example",
        "mip_hypernetworks",
        lambda: ConditionedTraining(per_example=True),
        Conditioned,
        ShortEpochs,
        works_with=EVERYTHING - {"accumulation", "resume"},
        reasons={
            "resume": MISSED,
            "accumulation": "works, and micro-batches end like one batch in its own tests; the choice is made at "
            "validations, which the generic test takes for steps within a window",
        },
    ),
    # Its own tests compare two ranks with one process, on one graph and on parts with masks that are given.
    Case(
        "CommunityPruning",
        "dag",
        lambda: CommunityPruning(warmup=0, every=1, min_size=1),
        TinyDetector,
        TinyGraphs,
        works_with=EVERYTHING - {"two ranks", "accumulation"},
        reasons={
            "two ranks": "works; masks are drawn for each batch, so that a run on parts is not that of one process; "
            "its own tests compare both on one graph, bit for bit, and on parts with given masks",
            "accumulation": "works, but modularity is no mean over parts, so that two micro-batches are not their "
            "union; give whole graphs or larger parts",
        },
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
