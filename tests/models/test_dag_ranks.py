"""Two ranks that hold one graph, and two that hold its parts."""

import pytest
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from torch_geometric.data import Batch
from torch_geometric.loader import DataLoader

from lightning_hpo import CommunityPruning, DAGCommunityDetector, distributed
from lightning_hpo.callbacks import dag as pruned
from lightning_hpo.demos.graph_data import planted_partition
from lightning_hpo.functional.graphs.k_means import k_means
from lightning_hpo.functional.graphs.masked_attributes import AttributeMask
from lightning_hpo.functional.graphs.pruning import partition_sums
from lightning_hpo.models import dag
from lightning_hpo.testing import ResumableLoader, assert_same, fit
from lightning_hpo.testing.run import Recorder, fit_two_ranks, tiny_trainer

pytestmark = pytest.mark.filterwarnings("ignore:.*still dying when training ended")

SMALL = {"max_communities": 8, "hidden_channels": 16, "heads": 2, "warmup_epochs": 2, "ramp_epochs": 2, "lr": 0.01}


def detector(**arguments):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return DAGCommunityDetector(16, **{**SMALL, **arguments})


def pruning():
    return CommunityPruning(warmup=0, every=1, min_size=5)


class OneGraph(LightningDataModule):
    """The same graph on every rank."""

    def __init__(self, batch_size):
        super().__init__()

    def train_dataloader(self):
        return DataLoader([planted_partition(3, 20)])


class Parts(LightningDataModule):
    """Two graphs without a common node: both in a batch, or one on each of two ranks."""

    def __init__(self, batch_size):
        super().__init__()
        self.batch_size = batch_size

    def train_dataloader(self):
        graphs = [planted_partition(3, 20, seed=seed) for seed in (0, 1)]
        ours = graphs if self.batch_size == 8 else [graphs[self.trainer.global_rank]]
        return torch.utils.data.DataLoader(Own(ours), sampler=Own(range(len(ours))), **JOINED)


class Own(list):
    """What each rank has of its own: Lightning shares out samplers of its kind only."""


JOINED = {"batch_size": 2, "collate_fn": Batch.from_data_list}


def test_two_ranks_with_one_graph_are_one_process():
    first, second = fit_two_ranks(pruning, detector, OneGraph, batch_size=4, max_steps=10)
    single = fit(pruning(), detector(), OneGraph(8), max_steps=10)
    assert first.losses == second.losses
    for what in ("losses", "module", "method", "knobs"):
        assert_same(getattr(first, what), getattr(single, what), what)  # bit for bit
    assert single.knobs[-1] != single.knobs[0]


def test_two_ranks_with_parts_are_one_process_with_both(monkeypatch):
    # Every node whose number in its graph is even: the same, however graphs are put together.
    def every_second(nodes, *arguments):
        none = torch.empty(0, dtype=torch.long)
        return AttributeMask(torch.arange(0, nodes, 2), none, none)

    centres = torch.randn(8, 16, generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(dag, "draw_mask", every_second)
    monkeypatch.setattr(dag, "k_means", lambda *arguments: centres)
    monkeypatch.setattr(dag.DAGCommunityDetector, "_start_readout", start)

    def still():
        return detector(dropout=0.0, attention_dropout=0.0)

    two = fit_two_ranks(pruning, still, Parts, batch_size=4, max_steps=8, use_distributed_sampler=False)
    single = fit(pruning(), still(), Parts(8), max_steps=8)
    assert two[0].losses == pytest.approx(two[1].losses)  # each has the loss of both parts
    assert two[0].losses == pytest.approx(single.losses, rel=1e-4)
    assert_same(two[0].module, two[1].module, "weights of both ranks")
    for what in ("module", "method", "knobs"):
        assert_same(getattr(two[0], what), getattr(single, what), what, rtol=1e-3, atol=1e-4)
    assert single.knobs[-1] != single.knobs[0]


def start(model, graph):
    """As ever, but the spread is a number of its own: a part's is not that of the whole."""
    model.readout.start_from(dag.k_means(), torch.tensor(30.0), 5.0)


def test_ranks_with_one_graph_take_what_rank_0_finds(monkeypatch):
    """GPUs round each in its own way; here rank 1 is far off."""

    def off(points, *arguments):
        return k_means(points, *arguments) + distributed.rank()

    def turned(scores, *arguments):
        return partition_sums(scores.roll(distributed.rank(), 1), *arguments)

    monkeypatch.setattr(dag, "k_means", off)
    monkeypatch.setattr(pruned, "partition_sums", turned)
    first, second = fit_two_ranks(pruning, detector, OneGraph, batch_size=4, max_steps=8)
    for what in ("module", "method", "knobs"):
        assert_same(getattr(first, what), getattr(second, what), what)
    assert first.method["history"][-1] < 8


class PartsInTurn(LightningDataModule):
    """Two batches an epoch on each rank, of graphs of different sizes."""

    def train_dataloader(self):
        sizes = [(20, 15), (12, 25)][self.trainer.global_rank]
        graphs = [planted_partition(3, size, seed=seed) for seed, size in enumerate(sizes)]
        return ResumableLoader(Own(graphs), sampler=Own(range(2)), **{**JOINED, "batch_size": 1})


def run(folder, ckpt_path=None, **limits):
    """Two ranks, with every step saved; the outcome of both."""
    method = CommunityPruning(warmup=0, every=2, min_size=5)
    saver = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
    strategy = DDPStrategy(start_method="fork", process_group_backend="gloo")
    trainer = tiny_trainer(
        method, Recorder(method, folder), saver, devices=2, strategy=strategy, use_distributed_sampler=False, **limits
    )
    trainer.fit(detector(), PartsInTurn(), ckpt_path=ckpt_path)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in (0, 1)]


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.parametrize("step", [3, 7])  # before the search, and between two batches of a pruning
def test_ranks_with_parts_go_on_as_they_would_have(step, tmp_path):
    whole = run(tmp_path / "first", max_steps=14)
    rest = run(tmp_path / "second", str(tmp_path / "first" / f"step={step}.ckpt"), max_steps=14)
    for once, again in zip(whole, rest, strict=True):
        assert again["losses"] == once["losses"][step:]
        for what in ("module", "method"):
            assert_same(once[what], again[what], what)
    assert whole[0]["method"]["history"]


class TwoGraphs(LightningDataModule):
    """A graph on each of two ranks, or both on one."""

    def test_dataloader(self):
        return DataLoader([planted_partition(3, 20, seed=seed) for seed in (0, 1)])


@pytest.mark.filterwarnings("ignore:Using `DistributedSampler` with the dataloaders")
def test_ranks_with_graphs_of_their_own_report_the_mean():
    strategy = DDPStrategy(start_method="fork", process_group_backend="gloo")
    (two,) = tiny_trainer(devices=2, strategy=strategy).test(detector(), TwoGraphs(), verbose=False)
    (one,) = tiny_trainer().test(detector(), TwoGraphs(), verbose=False)
    assert two == pytest.approx(one)
