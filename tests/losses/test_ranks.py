"""Two ranks with half a batch each are one process with the whole batch."""

import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lightning_hpo import AnyLoss, SoftConfusionMatrix, distributed

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
METRICS = [("f1", "binary"), ("gmean", "binary"), ("f1", "multiclass"), ("mcc", "multiclass"), ("mcc", "multilabel")]
STEPS = 3


def data(task):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(STEPS, 20, 6, generator=generator)
    if task == "multiclass":
        return x, torch.randint(3, (STEPS, 20), generator=generator)
    shape = (STEPS, 20, 3) if task == "multilabel" else (STEPS, 20)
    y = (torch.rand(shape, generator=generator) < 0.2).long()
    y[:, :10] = 0 if task == "binary" else y[:, :10]  # one rank has no positives at all
    return x, y


def network(task):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 1 if task == "binary" else 3), nn.Flatten(0) if task == "binary" else nn.Identity()
    )


def train(model, x, y, metric, task, running):
    criterion = AnyLoss(metric, task, running=running, amplification=5.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    losses = []
    for features, targets in zip(x, y, strict=True):
        optimizer.zero_grad()
        loss = criterion(model(features), targets)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, [p.detach().clone() for p in model.parameters()]


def work(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    out = {}
    for metric, task in METRICS:
        x, y = data(task)
        half = slice(10 * rank, 10 * rank + 10)
        for running in (None, 0.8):
            model = DistributedDataParallel(network(task))
            out[metric, task, running] = train(model, x[:, half], y[:, half], metric, task, running)
        counts = SoftConfusionMatrix(task, None if task == "binary" else 3)
        for step in range(STEPS):
            counts.update(network(task)(x[step, half]).detach(), y[step, half])
        out[metric, task, "score"] = (counts.compute(), counts.score(metric))
    share = torch.tensor([1.0 + rank, 2.0], requires_grad=True)
    total = distributed.sum_with_gradient(share)
    total.square().sum().backward()
    out["sum"] = (total.detach(), share.grad)
    if rank == 0:  # in evaluation nobody is waited for
        out["alone"] = AnyLoss("f1").eval()(torch.tensor([1.0, -1.0]), torch.tensor([1, 1]))
        out["apart"] = AnyLoss("f1", sync=False)(torch.tensor([1.0, -1.0]), torch.tensor([1, 1]))
    torch.save(out, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks():
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(work, (folder,), nprocs=2, start_method="fork")
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in (0, 1)]


@pytest.mark.parametrize("running", [None, 0.8])
@pytest.mark.parametrize(("metric", "task"), METRICS)
def test_two_ranks_are_one(ranks, metric, task, running):
    first, second = (rank[metric, task, running] for rank in ranks)
    assert first[0] == second[0]
    x, y = data(task)
    losses, weights = train(network(task), x, y, metric, task, running)
    assert first[0] == pytest.approx(losses, abs=1e-6)
    for found, expected in zip(first[1], weights, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("metric", "task"), METRICS)
def test_counts_of_two_ranks_are_those_of_one(ranks, metric, task):
    x, y = data(task)
    counts = SoftConfusionMatrix(task, None if task == "binary" else 3)
    for step in range(STEPS):
        counts.update(network(task)(x[step]).detach(), y[step])
    for rank in ranks:
        torch.testing.assert_close(rank[metric, task, "score"][0], counts.compute())
        torch.testing.assert_close(rank[metric, task, "score"][1], counts.score(metric))


def test_the_gradient_of_a_sum_over_ranks(ranks):
    for total, gradient in (rank["sum"] for rank in ranks):
        assert total.tolist() == [3.0, 4.0]
        assert gradient.tolist() == [12.0, 16.0]  # 2 * total, times the ranks that will be averaged over


def test_evaluation_and_unsynchronised_losses_are_of_the_own_batch(ranks):
    expected = AnyLoss("f1")(torch.tensor([1.0, -1.0]), torch.tensor([1, 1]))
    torch.testing.assert_close(ranks[0]["alone"], expected)
    torch.testing.assert_close(ranks[0]["apart"], expected)
