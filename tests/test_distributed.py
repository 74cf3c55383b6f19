"""Collectives between two real processes, and the identity without a process group."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing

from lightning_hpo import distributed

pytestmark = pytest.mark.xdist_group("distributed")  # one worker starts the two processes


def run_rank(rank: int, folder: str) -> None:
    """Everything one of the two ranks does; what it saw is written to `folder`."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    seen: dict[str, Any] = {"rank": distributed.rank(), "world_size": distributed.world_size()}
    seen["on the CPU"] = distributed.device().type == "cpu"

    ours = torch.tensor([1.0, 2.0]) if rank == 0 else torch.tensor([3.0, 8.0])
    seen["mean"] = distributed.mean(ours)
    seen["sum"] = distributed.sum(ours)
    seen["integer sum"] = distributed.sum(torch.tensor([2**40 + rank]))
    seen["minimum"] = distributed.minimum(ours * torch.tensor([1, -1]))
    seen["integer minimum"] = distributed.minimum(torch.tensor(2**40 - rank))
    seen["strided"] = distributed.sum(torch.arange(6.0).view(2, 3).T)
    seen["broadcast"] = [distributed.broadcast(ours, source=source) for source in (0, 1)]
    seen["untouched"] = ours
    seen["with graph"] = distributed.mean(ours.clone().requires_grad_() * 2).requires_grad

    # The loss is a square of a sum over ranks, which each rank's parameter has a part in.
    weight = torch.tensor([2.0], requires_grad=True)
    (distributed.sum_with_gradient(weight * ours).square().sum()).backward()
    distributed.mean_gradients([weight])
    seen["gradient of a sum"] = weight.grad

    seen["gather"] = distributed.gather(ours)
    seen["gather scalar"] = distributed.gather(torch.tensor(float(rank)))
    seen["gather unequal"] = distributed.gather(torch.full((rank * 2 + 1, 2), rank + 1))
    seen["gather empty"] = distributed.gather(torch.full((rank, 2), 5.0))
    seen["agree"] = [distributed.agree(v) for v in (True, False, rank == 0)]

    # Rank 1 has no gradient for `b`, nobody has one for `c`; types are mixed.
    a, b, c = (torch.zeros(shape, requires_grad=True) for shape in ((2, 3), (2,), (1,)))
    d = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    (a.sum() * (rank + 1)).backward()
    (d.sum() * (1.0 + rank / 3)).backward()
    if rank == 0:
        (b * torch.tensor([2.0, 4.0])).sum().backward()
    before = a.grad
    distributed.mean_gradients([a, b, d, c])
    seen["gradients"] = [p.grad for p in (a, b, c, d)]
    seen["same object"] = a.grad is before  # the optimizer and DDP buckets may hold it
    try:
        distributed.mean(torch.tensor([1, 2]))
    except ValueError as error:
        seen["refusal"] = str(error)
    torch.save(seen, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = str(tmp_path_factory.mktemp("ranks"))
    torch.multiprocessing.spawn(run_rank, args=(folder,), nprocs=2)
    return [torch.load(Path(folder) / f"{rank}.pt") for rank in range(2)]


def test_both_ranks_see_the_same(ranks: list[dict[str, Any]]) -> None:
    first, second = ({k: v for k, v in r.items() if k not in ("rank", "untouched", "same object")} for r in ranks)
    assert first.pop("refusal") == second.pop("refusal")
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_ranks_are_counted(ranks: list[dict[str, Any]]) -> None:
    assert [r["rank"] for r in ranks] == [0, 1]
    assert {r["world_size"] for r in ranks} == {2}
    assert all(r["on the CPU"] for r in ranks)  # gloo sends from there


def test_mean_and_sum(ranks: list[dict[str, Any]]) -> None:
    assert ranks[1]["mean"].tolist() == [2.0, 5.0]
    assert ranks[1]["sum"].tolist() == [4.0, 10.0]
    assert ranks[0]["integer sum"].tolist() == [2**41 + 1]
    assert torch.equal(ranks[0]["strided"], 2 * torch.arange(6.0).view(2, 3).T)
    assert not ranks[0]["with graph"]


def test_the_gradient_of_a_sum_is_that_of_one_process(ranks: list[dict[str, Any]]) -> None:
    weight = torch.tensor([2.0], requires_grad=True)
    (weight * torch.tensor([1.0 + 3.0, 2.0 + 8.0])).square().sum().backward()
    assert torch.equal(ranks[0]["gradient of a sum"], weight.grad)


def test_minimum_is_taken_entry_by_entry(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0]["minimum"].tolist() == [1.0, -8.0]
    assert ranks[1]["integer minimum"].item() == 2**40 - 1


def test_arguments_are_never_changed(ranks: list[dict[str, Any]]) -> None:
    assert [r["untouched"].tolist() for r in ranks] == [[1.0, 2.0], [3.0, 8.0]]


def test_integer_means_are_refused(ranks: list[dict[str, Any]]) -> None:
    assert "torch.int64 would be truncated" in ranks[0]["refusal"]


def test_broadcast_takes_the_values_of_its_source(ranks: list[dict[str, Any]]) -> None:
    assert [values.tolist() for values in ranks[0]["broadcast"]] == [[1.0, 2.0], [3.0, 8.0]]


def test_gather_stacks_equal_and_joins_unequal_shapes(ranks: list[dict[str, Any]]) -> None:
    assert ranks[1]["gather"].tolist() == [[1.0, 2.0], [3.0, 8.0]]
    assert ranks[1]["gather scalar"].tolist() == [0.0, 1.0]
    assert ranks[1]["gather unequal"].tolist() == [[1, 1], [2, 2], [2, 2], [2, 2]]
    assert ranks[1]["gather empty"].tolist() == [[5.0, 5.0]]


def test_agree_needs_everybody(ranks: list[dict[str, Any]]) -> None:
    assert [r["agree"] for r in ranks] == [[True, False, False]] * 2


def test_missing_gradients_count_as_zero(ranks: list[dict[str, Any]]) -> None:
    for seen in ranks:
        a, b, c, d = seen["gradients"]
        assert torch.equal(a, torch.full((2, 3), 1.5))
        assert b.tolist() == [1.0, 2.0]
        assert c.tolist() == [0.0]
        torch.testing.assert_close(d, torch.full((2,), 7 / 6, dtype=torch.float64), rtol=1e-15, atol=0)
        assert seen["same object"]


def test_without_a_process_group_everything_is_a_copy() -> None:
    assert "RANK" not in os.environ
    values = torch.tensor([1.0, 2.0])
    for collective in (distributed.mean, distributed.sum, distributed.minimum, distributed.broadcast):
        copy = collective(values)
        assert torch.equal(copy, values)
        copy.zero_()
    gathered = distributed.gather(values)
    assert gathered.tolist() == [[1.0, 2.0]]
    gathered.zero_()
    assert values.tolist() == [1.0, 2.0]
    assert (distributed.rank(), distributed.world_size()) == (0, 1)
    with pytest.raises(ValueError, match="truncated"):
        distributed.mean(torch.tensor(1))
    with pytest.raises(ValueError, match="one of the 1 ranks, got 1"):
        distributed.broadcast(values, source=1)
