"""A run that was killed on some ranks goes on with others: same batch, no sample lost, none seen twice."""

import itertools
import warnings

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_hpo import AdaptiveBatchSize
from lightning_hpo.testing import tiny_trainer

SAMPLES, STEPS = 240, 12


class Watched(LightningModule):
    """Linear regression that writes down which samples it sees."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.seen = nn.Linear(4, 2).double(), []

    def training_step(self, batch, batch_idx):
        x, y, index = batch
        self.seen.append(index.tolist())
        return (self.linear(x) - y).square().sum(1).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01, momentum=0.9)


class Note(Callback):
    """What a rank has seen, and the batch sizes of its steps."""

    def __init__(self, method, folder):
        self.method, self.folder, self.sizes = method, folder, []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.sizes.append(self.method.batch_size)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == trainer.max_steps:
            trainer.save_checkpoint(self.folder / "stopped.ckpt")

    def on_train_end(self, trainer, pl_module):
        found = list(itertools.chain(*pl_module.seen)), self.sizes, self.method.hyperparameters()
        torch.save(found, self.folder / f"{trainer.global_rank}.pt")


class InTurn(DistributedSampler):
    """The samples in their order, dealt out to however many ranks there are."""

    def __init__(self, data):
        self.data = data
        super().__init__(data, 1, 0, shuffle=False)

    def __iter__(self):
        on = torch.distributed.is_initialized()
        rank, ranks = (torch.distributed.get_rank(), torch.distributed.get_world_size()) if on else (0, 1)
        return iter(range(rank, SAMPLES, ranks))

    def __len__(self):
        return SAMPLES // (torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1)


def fit(folder, ranks, workers, checkpoint=None, **limits):
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(SAMPLES, 4, generator=generator, dtype=torch.double)
    y = x[:, :2] + torch.randn(SAMPLES, 2, generator=generator, dtype=torch.double)
    data = TensorDataset(x, y, torch.arange(SAMPLES))
    method = AdaptiveBatchSize(max_batch_size=48, max_micro_batch_size=8, smoothing=0.5)
    strategy = DDPStrategy(start_method="fork", process_group_backend="gloo") if ranks > 1 else "auto"
    many = {"devices": ranks, "strategy": strategy, "use_distributed_sampler": False}
    trainer = tiny_trainer(method, Note(method, folder), **many, **limits)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loader = DataLoader(data, 8 // ranks, sampler=InTurn(data), num_workers=workers)
        trainer.fit(Watched(), loader, ckpt_path=checkpoint)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(ranks)]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (2, 3)])
def test_goes_on_with_another_number_of_ranks(tmp_path, before, after, workers):
    torch.set_num_threads(1)
    first = fit(tmp_path / "first", before, workers, max_steps=STEPS)
    done = list(itertools.chain(*(seen for seen, *_ in first)))
    size = first[0][1][-1]
    assert len(set(done)) == len(done) < SAMPLES
    assert size > 8
    second = fit(tmp_path / "second", after, workers, max_epochs=1, checkpoint=tmp_path / "first" / "stopped.ckpt")
    rest = list(itertools.chain(*(seen for seen, *_ in second)))
    assert len(set(done + rest)) == len(done + rest)
    assert len(done + rest) == SAMPLES - (-len(done)) % after  # what cannot be shared out evenly is left out
    assert abs(second[0][1][0] - size) < after * 8  # no more than rounding to whole micro-batches
    assert all(found[1:] == second[0][1:] for found in second)
