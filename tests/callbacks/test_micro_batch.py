"""What is found, on one rank and on two; that trials leave no trace; and what is refused."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_hpo.callbacks import micro_batch
from lightning_hpo.callbacks.base import MethodCallback
from lightning_hpo.callbacks.micro_batch import MicroBatchFinder
from lightning_hpo.testing import TinyClassifier, TinyImages, fit, fit_two_ranks, tiny_trainer

MESSAGES = {
    "cuda": lambda: torch.cuda.OutOfMemoryError("no more"),
    "driver": lambda: RuntimeError("CUDA error: out of memory"),
    "cpu": lambda: RuntimeError(
        "[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory: 9 bytes"
    ),
    "cublas": lambda: RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "host": MemoryError,
}


class Limited(LightningModule):
    """Runs out of memory above a size; batch norm, dropout, a list and a log would show what a trial leaves behind."""

    def __init__(self, limit: int = 10**9, kind: str = "cuda") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.network = torch.nn.Sequential(
            torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Dropout(0.5), torch.nn.Linear(4, 1)
        )
        self.limit, self.kind = limit, kind
        self.sizes: list[int] = []  # of this object; trials run on a copy
        self.seen: list[torch.Tensor] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        inputs = batch[0]
        SIZES.append(len(inputs))
        self.sizes.append(len(inputs))
        loss = self.network(inputs).square().mean() if len(inputs) > 1 else self.network[0](inputs).square().mean()
        self.log("loss", loss)
        self.log_dict({"again": loss})
        if len(inputs) > self.limit:
            raise MESSAGES[self.kind]()
        return {"loss": loss, "more": 1}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.01)


SIZES: list[int] = []


@pytest.fixture(autouse=True)
def _nothing_tried() -> None:
    SIZES.clear()


def loader(samples: int = 64, **arguments: Any) -> DataLoader:
    return DataLoader(TensorDataset(torch.arange(3.0 * samples).view(samples, 3)), **{"batch_size": 4, **arguments})


def found(module: LightningModule, data: Any, **arguments: Any) -> int | None:
    finder = MicroBatchFinder(**{"margin": 0.0, **arguments})
    tiny_trainer(finder, max_steps=1, limit_train_batches=1).fit(module, data)
    return finder.micro_batch_size


# What is found


@pytest.mark.parametrize(("limit", "expected"), [(1, 1), (2, 2), (5, 4), (32, 32), (33, 32), (1000, 64)])
def test_the_largest_power_of_two_that_fits(limit: int, expected: int) -> None:
    size = found(Limited(limit), loader(batch_size=1))
    assert size == expected
    tried = SIZES[:-1]  # the last one is training
    assert tried == [2**i for i in range(len(tried))]


@pytest.mark.parametrize("kind", list(MESSAGES))
def test_every_kind_of_failed_allocation_is_known(kind: str) -> None:
    assert found(Limited(20, kind), loader(), refine=True) == 20


def test_the_training_set_and_the_argument_bound_the_search() -> None:
    assert found(Limited(), loader(samples=50)) == 50
    assert found(Limited(), loader(samples=50), max_size=24, start=5) == 24
    assert found(Limited(), loader(samples=5), start=16, max_size=32) == 5
    assert max(SIZES) == 50


def test_a_margin_stays_free() -> None:
    assert found(Limited(100), loader(samples=500), refine=True, margin=0.2) == 80
    assert max(size for size in SIZES if size <= 100) == 100
    assert found(Limited(64), loader(samples=500), margin=0.1) == 32
    assert found(Limited(1), loader(samples=500, batch_size=1), margin=0.4) == 1  # one sample cannot leave anything


def test_trials_may_take_several_steps() -> None:
    found(Limited(4), loader(samples=8, batch_size=2), steps_per_trial=3)
    assert SIZES == [1, 1, 1, 2, 2, 2, 4, 4, 4, 8, 2]  # the failure ends a trial


def test_two_ranks_agree_on_the_smaller_size() -> None:
    outcomes = fit_two_ranks(make_finder, make_limited, make_data, batch_size=4, max_steps=1)
    assert [outcome.method for outcome in outcomes] == [{"micro_batch_size": 8}] * 2
    assert [outcome.knobs[0] for outcome in outcomes] == [{"micro_batch_size": 8.0}] * 2
    first, second = (outcome.module for outcome in outcomes)
    torch.testing.assert_close(first["network.0.weight"], second["network.0.weight"], rtol=0, atol=0)


class Idle(MethodCallback):
    """Does nothing."""


def test_two_ranks_train_the_same_with_and_without() -> None:
    runs = [fit_two_ranks(make, TinyClassifier, TinyImages, batch_size=4, max_steps=4) for make in (make_finder, Idle)]
    for found_by, plain in zip(*runs, strict=True):
        assert found_by.losses == plain.losses
        for name, value in plain.module.items():
            assert torch.equal(found_by.module[name], value), name


class ByRank(Limited):
    def setup(self, stage: str) -> None:
        self.limit = (40, 9)[self.trainer.global_rank]


class Numbers(LightningDataModule):
    def __init__(self, batch_size: int) -> None:
        super().__init__()
        self.batch_size = batch_size

    def train_dataloader(self) -> DataLoader:
        return loader(batch_size=self.batch_size)


def make_finder() -> MicroBatchFinder:
    return MicroBatchFinder(margin=0.0)


def make_limited() -> LightningModule:
    return ByRank()


def make_data(batch_size: int) -> LightningDataModule:
    return Numbers(batch_size)


# Where batches come from


class Pairs(torch.utils.data.Dataset):
    """Samples with a string, collated by hand: what no tensor indexing could repeat."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> tuple[torch.Tensor, str]:
        return torch.full((3,), float(index)), f"sample {index}"


class Text(Limited):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        inputs, names = batch
        assert names == [f"sample {int(row[0])}" for row in inputs]
        return super().training_step([inputs], batch_idx)


def collate(samples: list[tuple[torch.Tensor, str]]) -> tuple[torch.Tensor, list[str]]:
    return torch.stack([s[0] for s in samples]), [s[1] for s in samples]


def test_samples_go_through_the_loaders_collation() -> None:
    assert found(Text(), DataLoader(Pairs(), batch_size=4, collate_fn=collate)) == 10


class Stream(IterableDataset):
    def __iter__(self):
        yield from torch.arange(12.0).view(4, 3).unsqueeze(1)


class Whole(IterableDataset):
    def __iter__(self):
        yield [torch.arange(6.0).view(2, 3), torch.tensor(7.0), torch.arange(5)]


class Once(IterableDataset):
    def __iter__(self):
        return self

    def __next__(self):
        return torch.ones(3)


class Batches:
    """A loader of somebody's own."""

    def __iter__(self):
        return iter([[torch.randn(4, 3)], [torch.randn(4, 3)]])

    def __len__(self):
        return 2


class Fetcher(TensorDataset):
    """Gives several samples at once, as some data sets prefer."""

    def __getitems__(self, indices: list[int]) -> list[Any]:
        return [(self.tensors[0][indices][i],) for i in range(len(indices))]


class Checked(Limited):
    """Expects the rest of the batch as it was."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        inputs, number, other = batch
        assert number.item() == 7
        assert other.tolist() == [0, 1, 2, 3, 4]
        assert torch.equal(inputs, torch.arange(6.0).view(2, 3)[torch.arange(len(inputs)) % 2])
        return super().training_step(batch, batch_idx)


@pytest.mark.filterwarnings("ignore:Trying to infer the `batch_size`")
def test_every_source_of_batches() -> None:
    data = TensorDataset(torch.randn(6, 3))
    assert found(Limited(), DataLoader(Stream(), batch_size=2), max_size=16) == 16
    assert found(Checked(), DataLoader(Whole(), batch_size=None), max_size=16) == 16
    assert found(Limited(), DataLoader(Fetcher(torch.randn(6, 3)), batch_size=2)) == 6
    assert found(Limited(), Batches(), max_size=16) == 16
    batches = torch.utils.data.BatchSampler(torch.utils.data.SequentialSampler(data), 2, False)
    assert found(Limited(), DataLoader(data, batch_sampler=batches)) == 6
    whole = DataLoader(TensorDataset(torch.randn(6, 2, 3)), batch_size=None)
    assert found(Limited(), whole, max_size=8) == 8


class Moving(Limited):
    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return [batch[0] + 1000]

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        assert batch[0].min() >= 1000
        return super().training_step(batch, batch_idx)


class Shifted(Numbers):
    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return [batch[0] + 1000]


class Receiving(Limited):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        assert batch[0].min() >= 1000
        assert batch[0].dtype == self.network[0].weight.dtype
        return super().training_step(batch, batch_idx)


def test_batches_take_the_way_to_the_device() -> None:
    assert found(Moving(), loader(samples=8)) == 8
    finder = MicroBatchFinder()
    tiny_trainer(finder, max_steps=1, precision="64-true").fit(Receiving(), Shifted(4))
    assert finder.micro_batch_size == 64


def test_a_step_without_an_index() -> None:
    class Plain(Limited):
        def training_step(self, batch: Any) -> Any:
            return super().training_step(batch, 0)["loss"]

    assert found(Plain(9), loader()) == 8


# No trace


def states() -> list[Any]:
    return [torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()]  # noqa: NPY002


class Watched(MicroBatchFinder):
    """Compares everything before and after."""

    def on_train_start(self, trainer: Any, pl_module: LightningModule) -> None:
        kept = torch.ones(4)
        pl_module.network[0].bias.grad = kept
        pl_module.network[2].eval()
        before = {name: value.clone() for name, value in pl_module.state_dict().items()}
        seen, modes = states(), [module.training for module in pl_module.modules()]
        names = set(vars(pl_module))
        super().on_train_start(trainer, pl_module)
        assert states() == seen
        for name, value in pl_module.state_dict().items():
            assert torch.equal(value, before[name]), name
        assert [module.training for module in pl_module.modules()] == modes
        assert pl_module.network[0].bias.grad is kept
        assert kept.tolist() == [1] * 4
        assert [p.grad is None for p in pl_module.parameters()].count(False) == 1
        assert pl_module.sizes == []
        assert set(vars(pl_module)) == names
        assert trainer.callback_metrics == {}
        assert all(not optimizer.state for optimizer in trainer.optimizers)
        self.checked = True


class Noisy(Limited):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        random.random(), np.random.rand()  # noqa: NPY002
        return super().training_step(batch, batch_idx)


@pytest.mark.filterwarnings("ignore:Found 1 module")
def test_trials_leave_no_trace() -> None:
    finder = Watched()
    finder.checked = False
    tiny_trainer(finder, max_steps=1).fit(Noisy(20), loader(shuffle=True))
    assert finder.checked
    assert len(SIZES) > 3


def test_training_is_the_same_with_and_without() -> None:
    with_finder = fit(MicroBatchFinder(), TinyClassifier(), TinyImages(), max_epochs=2)
    without = fit(None, TinyClassifier(), TinyImages(), max_epochs=2)
    assert with_finder.losses == without.losses
    assert with_finder.logged == without.logged
    for name, value in without.module.items():
        assert torch.equal(with_finder.module[name], value)


def test_random_order_and_dropout_are_the_same_with_and_without() -> None:
    ends = []
    for callbacks in ([], [MicroBatchFinder()]):
        torch.manual_seed(3)
        module = Limited(30)
        torch.manual_seed(4)
        tiny_trainer(*callbacks, max_epochs=1).fit(module, loader(shuffle=True, num_workers=0))
        ends.append(module.state_dict())
    for name, value in ends[0].items():
        assert torch.equal(ends[1][name], value), name


@pytest.mark.filterwarnings("ignore:.*The .grad attribute of a Tensor that is not a leaf")
def test_a_compiled_module_is_tried_as_it_is() -> None:
    module = torch.compile(Limited(9), backend="eager")
    finder = MicroBatchFinder(margin=0.0)
    tiny_trainer(finder, max_steps=1).fit(module, loader())
    assert finder.micro_batch_size == 8
    assert module.sizes == [4]


# State


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
def test_a_resumed_run_keeps_its_size_and_a_new_one_searches(tmp_path: Path) -> None:
    finder = MicroBatchFinder(margin=0.0)
    trainer = tiny_trainer(finder, max_steps=1)
    trainer.fit(Limited(9), loader())
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    saved = torch.load(tmp_path / "end.ckpt", weights_only=True)["callbacks"]["MicroBatchFinder{}"]
    assert saved == {"micro_batch_size": 8}

    for resumed in (finder, MicroBatchFinder()):
        SIZES.clear()
        tiny_trainer(resumed, max_steps=2).fit(Limited(30), loader(), ckpt_path=tmp_path / "end.ckpt")
        assert SIZES == [4]
        assert resumed.micro_batch_size == 8
        assert resumed.hyperparameters() == {"micro_batch_size": 8.0}

    tiny_trainer(finder, max_steps=1).fit(Limited(30), loader())
    assert finder.micro_batch_size == 16
    assert MicroBatchFinder().hyperparameters() == {}


def test_validation_alone_searches_nothing() -> None:
    finder = MicroBatchFinder()
    tiny_trainer(finder).validate(TinyClassifier(), TinyImages(), verbose=False)
    assert finder.micro_batch_size is None


# Room for the optimizer


@pytest.mark.parametrize(
    ("make", "copies"),
    [
        (lambda p: torch.optim.SGD(p, lr=0.1), 0),
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), 1),
        (lambda p: torch.optim.Adam(p), 2),
        (lambda p: torch.optim.AdamW(p, amsgrad=True), 3),
        (lambda p: torch.optim.Adagrad(p), 0),  # it has its state from the beginning
    ],
)
def test_room_is_kept_for_what_the_optimizer_will_keep(make: Any, copies: int) -> None:
    parameters = [torch.nn.Parameter(torch.zeros(30, 10)), torch.nn.Parameter(torch.zeros(7))]
    frozen = torch.nn.Parameter(torch.zeros(100), requires_grad=False)
    optimizer = make([*parameters, frozen])
    before = [p.clone() for p in parameters]
    assert micro_batch._state_bytes(optimizer) == copies * 307 * 4
    assert copies == 0 or not optimizer.state
    assert all(torch.equal(p, b) for p, b in zip(parameters, before, strict=True))
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    kept = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor) and v.ndim]
    if copies:  # as foretold
        assert sum(v.numel() * v.element_size() for v in kept) == copies * 307 * 4
    if optimizer.state:
        assert micro_batch._state_bytes(optimizer) == 0


def test_an_optimizer_that_cannot_be_tried_is_taken_for_adam() -> None:
    class Odd(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            raise KeyError("needs its own caller")

    assert micro_batch._state_bytes(Odd([torch.nn.Parameter(torch.zeros(10))], lr=0.1)) == 2 * 40


# What is refused


def refused(match: str, module: LightningModule, data: Any, **arguments: Any) -> None:
    with pytest.raises(MisconfigurationException, match=match):
        found(module, data, **arguments)


def test_what_cannot_be_searched_says_what_to_change() -> None:
    refused("not even one sample fits into memory", Limited(0), loader())
    refused("no length, so the search has no end; set `max_size`", Limited(), DataLoader(Stream(), batch_size=2))
    refused("`Once` can be read only once", Limited(), DataLoader(Once(), batch_size=2), max_size=4)
    refused("several training loaders", Limited(), CombinedLoader([loader(), loader()]))


def test_a_step_without_a_loss_is_refused() -> None:
    class Lossless(Limited):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return None

    refused("`Lossless.training_step` gave no loss", Lossless(), loader())


@pytest.mark.filterwarnings("ignore:You are using the `dataloader_iter` step flavor")
def test_a_step_that_draws_its_own_batches_is_refused() -> None:
    class Drawing(Limited):
        def training_step(self, dataloader_iter: Any) -> Any:
            return None

    refused("draws its own batches", Drawing(), loader())


def test_manual_optimization_is_refused() -> None:
    module = Limited()
    module.automatic_optimization = False
    refused("automatic_optimization = True", module, loader())


def test_a_module_that_cannot_be_copied_is_refused() -> None:
    module = Limited()
    module.stream = (number for number in range(3))
    refused("`Limited` cannot be copied for a trial: cannot pickle 'generator' object", module, loader())


@pytest.mark.parametrize("error", [RuntimeError("shapes cannot be multiplied"), ValueError("bad label"), KeyError("x")])
def test_errors_of_the_users_own_are_passed_on(error: Exception) -> None:
    class Broken(Limited):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            raise error

    with pytest.raises(type(error)) as caught:
        found(Broken(), loader())
    assert caught.value is error


@pytest.mark.parametrize(
    ("arguments", "problems"),
    [
        ({"max_size": 0}, ["max_size must be an integer of at least start, got 0"]),
        ({"max_size": 4, "start": 8}, ["max_size must be an integer of at least start, got 4"]),
        (
            {"start": 0, "margin": 1.0, "steps_per_trial": 1.5},
            ["start must be a positive integer", "margin must be at least 0 and below 1", "steps_per_trial must be"],
        ),
    ],
)
def test_wrong_arguments_are_listed(arguments: dict[str, Any], problems: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        MicroBatchFinder(**arguments)
    assert all(problem in str(error.value) for problem in problems)


@pytest.mark.gpu
def test_on_a_gpu_what_is_found_trains_and_twice_of_it_does_not() -> None:
    class Wide(Limited):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return (
                (batch[0][:, :1] * torch.ones(1, 2**26, device=self.device) * self.network[0].bias[0]).square().mean()
            )

    data = loader(samples=10**5, batch_size=4)
    finder = MicroBatchFinder(margin=0.0)
    before = torch.cuda.memory_allocated()
    trainer = tiny_trainer(finder, max_steps=1, accelerator="gpu")
    trainer.fit(Wide(), data)
    size = finder.micro_batch_size
    assert size
    assert torch.cuda.memory_allocated() < before + 2**20
    tiny_trainer(max_steps=1, accelerator="gpu").fit(Wide(), loader(samples=10**5, batch_size=size))
    with pytest.raises(torch.OutOfMemoryError):
        tiny_trainer(max_steps=1, accelerator="gpu").fit(Wide(), loader(samples=10**5, batch_size=2 * size))
