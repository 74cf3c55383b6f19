"""Parameters shared out over ranks: what is measured and done is that of one process."""

import os
import socket
import warnings

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.distributed.fsdp import ShardingStrategy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, TensorDataset

from lightning_hpo import AdaptiveBatchSize, InnerProductTest, MicroBatchFinder
from lightning_hpo.noise_estimators import choose_estimators
from lightning_hpo.sharded_gradients import shard_problems
from lightning_hpo.testing import tiny_trainer

SAMPLES, RANKS = 192, 2


class Net(LightningModule):
    """Two layers, one of them with fewer rows than fit ranks evenly."""

    def __init__(self, shard=False):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
        self.shard, self.sizes = shard, []

    def configure_model(self):
        if self.shard:
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch, batch_idx):
        self.sizes.append(len(batch[0]))
        return (self.net(batch[0]) - batch[1]).square().sum(1).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.02, momentum=0.9)


class Keep(Callback):
    """Notes every reading, and all that is left at the end."""

    def __init__(self, method, path):
        self.method, self.path, self.readings = method, path, []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        reading = self.method.reading.get("values")
        self.readings.append((self.method.batch_size, None if reading is None else reading.tolist()))

    def on_train_end(self, trainer, pl_module):
        weights = [p.full_tensor() if isinstance(p, DTensor) else p for p in pl_module.parameters()]
        whole = [w.detach().clone() for w in weights]
        torch.save((self.readings, whole, pl_module.sizes, trainer.global_step), self.path)


def data():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(SAMPLES, 6, generator=generator, dtype=torch.double)
    noise = torch.randn(SAMPLES, 3, generator=generator, dtype=torch.double)
    return TensorDataset(x, x[:, :3] + noise)


class Stream(IterableDataset):
    """Every rank's share of the data, in turn."""

    def __iter__(self):
        on = torch.distributed.is_initialized()
        rank, ranks = (torch.distributed.get_rank(), RANKS) if on else (0, 1)
        yield from (data()[i] for i in range(rank, SAMPLES, ranks))


def in_turn(rank, ranks):
    return {"dataset": data(), "sampler": DistributedSampler(data(), ranks, rank, shuffle=False)}


def stream(rank, ranks):
    return {"dataset": Stream()}


def train(path, micro, rank=0, ranks=1, source=in_turn, epochs=2, checkpoint=None, **arguments):
    method = AdaptiveBatchSize(smoothing=0.5, max_batch_size=64, **arguments)
    sharded = {"devices": ranks, "strategy": ModelParallelStrategy(data_parallel_size=ranks, tensor_parallel_size=1)}
    trainer = tiny_trainer(
        *(method, Keep(method, path)),
        max_epochs=epochs,
        accumulate_grad_batches=2,
        use_distributed_sampler=False,
        **(sharded if ranks > 1 else {}),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        resume = {} if checkpoint is None or not checkpoint.exists() else {"ckpt_path": checkpoint}
        trainer.fit(Net(shard=ranks > 1), DataLoader(**source(rank, ranks), batch_size=micro), **resume)
        if checkpoint is not None:
            trainer.save_checkpoint(checkpoint)


def worker(rank, port, path, micro, source, arguments):
    ours = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(RANKS), "NODE_RANK": "0"}
    os.environ.update(ours, LOCAL_RANK=str(rank), RANK=str(rank))
    torch.set_num_threads(1)
    train(path / f"{rank}.pt", micro, rank, RANKS, source, **arguments)


def on_two_ranks(path, micro, source, **arguments):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start = torch.multiprocessing.start_processes
    start(worker, (port, path, micro, source, arguments), nprocs=RANKS, start_method="fork")
    return [torch.load(path / f"{rank}.pt", weights_only=False) for rank in range(RANKS)]


@pytest.mark.parametrize(("mode", "source"), [("accumulate", in_turn), ("accumulate", stream), ("loader", in_turn)])
def test_sharded_ranks_equal_one_process_on_the_joined_batches(tmp_path, mode, source):
    torch.set_num_threads(1)
    one = tmp_path / "one.pt"
    train(one, 8, source=source, mode=mode, estimator="micro_batch", max_micro_batch_size=16)
    readings, weights, sizes, steps = torch.load(one, weights_only=False)
    ranks = on_two_ranks(tmp_path, 4, source, mode=mode, max_micro_batch_size=8)
    assert readings[-1][0] > 16  # it has grown
    assert sum(values is not None for _, values in readings) > 5
    for found, whole, seen, count in ranks:
        assert count == steps
        assert [2 * size for size in seen] == sizes
        assert [size for size, _ in found] == [size for size, _ in readings]
        for (_, values), (_, expected) in zip(found, readings, strict=True):
            assert values == (expected if expected is None else pytest.approx(expected, rel=1e-10))
        for weight, expected in zip(whole, weights, strict=True):
            torch.testing.assert_close(weight, expected, rtol=1e-11, atol=1e-12)


def test_sharded_ranks_resume_to_the_bit(tmp_path):
    whole = on_two_ranks(tmp_path, 4, in_turn, mode="accumulate")
    checkpoint = tmp_path / "checkpoint"  # a folder: every rank writes its part
    for epochs in (1, 2):
        parts = on_two_ranks(tmp_path, 4, in_turn, mode="accumulate", epochs=epochs, checkpoint=checkpoint)
        assert checkpoint.is_dir()
    for (all_readings, expected, _, steps), (readings, found, _, count) in zip(whole, parts, strict=True):
        assert 0 < len(readings) < len(all_readings)
        assert readings == all_readings[-len(readings) :]
        assert steps == count
        assert all(map(torch.equal, found, expected))


# What is refused


@pytest.mark.parametrize(("estimator", "single"), [("ghost", False), ("difference", False), ("auto", True)])
def test_single_samples_of_shards_are_refused(estimator, single):
    *_, problems = choose_estimators(estimator, Net(), single, groups=1, sharded=True)
    assert len(problems) == 2  # all at once
    assert "estimator='micro_batch'" in problems[0]
    assert "accumulate_grad_batches" in problems[1]


@pytest.mark.parametrize("strategy", [FSDPStrategy, ModelParallelStrategy])
def test_one_micro_batch_of_shards_has_nothing_to_compare(strategy):
    method = AdaptiveBatchSize()
    trainer = tiny_trainer(method, max_epochs=1)

    class Claim(Callback):  # the Trainer on one CPU goes on as it would
        def on_train_start(self, trainer, pl_module):
            method.is_sharded = lambda trainer: True

    trainer.callbacks.insert(0, Claim())
    with pytest.raises(MisconfigurationException, match="set `accumulate_grad_batches` to 2 or more"):
        trainer.fit(Net(), DataLoader(data(), 8))
    trainer.strategy.__class__ = strategy
    AdaptiveBatchSize().setup(trainer, Net(), "fit")  # not refused
    with pytest.raises(MisconfigurationException, match="shards parameters"):
        MicroBatchFinder().setup(trainer, Net(), "fit")


def test_replicas_of_shards_are_refused():
    method = AdaptiveBatchSize()
    method.is_sharded = lambda trainer: True
    trainer = tiny_trainer(method, max_epochs=1, accumulate_grad_batches=2)
    trainer.strategy.sharding_strategy = ShardingStrategy.HYBRID_SHARD
    with pytest.raises(MisconfigurationException, match="'HYBRID_SHARD'.* keeps replicas"):
        trainer.fit(Net(), DataLoader(data(), 8))


def test_deepspeed_is_refused():
    trainer = tiny_trainer(AdaptiveBatchSize(InnerProductTest()))
    trainer.strategy.__class__ = DeepSpeedStrategy
    with pytest.raises(MisconfigurationException, match="fixes accumulation"):
        trainer.callbacks[0].setup(trainer, Net(), "fit")


def test_parameters_that_ranks_share_in_part_are_refused(monkeypatch):
    monkeypatch.setattr("lightning_hpo.sharded_gradients._parts", lambda parameter: 1)
    monkeypatch.setattr("lightning_hpo.distributed.world_size", lambda: 2)
    monkeypatch.setattr("lightning_hpo.sharded_gradients.DTensor", torch.Tensor)
    (problem,) = shard_problems([torch.zeros(2)])
    assert "1 of 2 ranks" in problem
