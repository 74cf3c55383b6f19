"""Every way to use AdaptiveBatchSize wrongly says what to change, as early as it can be known."""

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BatchSizeFinder, GradientAccumulationScheduler
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler

from lightning_hpo import AdaptiveBatchSize, InnerProductTest, LinearRamp, NormTest
from lightning_hpo.live_loader import LiveLoader, loader_problems
from lightning_hpo.testing import ResumableLoader, tiny_trainer


class Line(LightningModule):
    def __init__(self, norm=False, optimizer="SGD"):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(1, 4), nn.BatchNorm1d(4) if norm else nn.Identity(), nn.Linear(4, 1))
        self.optimizer = optimizer

    def training_step(self, batch, batch_idx):
        return self.net(batch.float().view(-1, 1)).square().mean()

    def configure_optimizers(self):
        return getattr(torch.optim, self.optimizer)(self.parameters(), lr=1e-3)


class Buckets(BatchSampler):
    pass


class Stream(IterableDataset):
    def __iter__(self):
        yield from torch.arange(40.0)


def fit(callback, module=None, train=None, *others, **arguments):
    train = DataLoader(range(40), 4, shuffle=True) if train is None else train
    trainer = tiny_trainer(callback, *others, **{"max_epochs": 1, **arguments})
    trainer.fit(module or Line(), train)
    return trainer


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"max_batch_size": 0}, "max_batch_size must be a positive integer, got 0"),
        ({"max_micro_batch_size": 2.5}, "max_micro_batch_size must be a positive integer, got 2.5"),
        ({"interval": True}, "interval must be a positive integer, got True"),
        ({"max_samples": -1}, "max_samples must be a positive integer, got -1"),
        ({"min_readings": 0}, "min_readings must be a positive integer, got 0"),
        ({"estimator": "per_sample"}, "estimator must be one of .'auto', 'micro_batch', 'ghost', 'vmap', 'difference'"),
        ({"mode": "sampler"}, "mode must be 'loader' or 'accumulate', got 'sampler'"),
        ({"growth": 1.0}, "growth must be above 1, got 1.0"),
        ({"smoothing": 1.0}, r"smoothing must lie in \[0, 1\), got 1.0"),
    ],
)
def test_wrong_values(arguments, words):
    with pytest.raises(ValueError, match=words):
        AdaptiveBatchSize(**arguments)


def test_all_wrong_values_at_once():
    with pytest.raises(ValueError, match=r"interval.*growth.*smoothing"):
        AdaptiveBatchSize(interval=0, growth=0.5, smoothing=-1)


def test_a_test_that_always_passes_is_refused():
    with pytest.raises(ValueError, match=r"(?s)eta.*debias"):
        NormTest(eta=1.0, debias=False)
    with pytest.raises(ValueError, match="eta"):
        NormTest(eta=0.0)


def test_a_largest_batch_below_the_first_one():
    with pytest.raises(MisconfigurationException, match="`max_batch_size` is 2, but training begins with batches of 4"):
        fit(AdaptiveBatchSize(max_batch_size=2))


def test_a_largest_batch_above_the_data_is_cut():
    callback = AdaptiveBatchSize(
        LinearRamp(increment=40, every=1, start=4), max_batch_size=100, max_micro_batch_size=40, growth=99.0
    )
    with pytest.warns(UserWarning, match="more than the 40 samples of an epoch, which is the limit"):
        fit(callback, max_epochs=2)
    assert callback.batch_size == 40


def test_one_micro_batch_cannot_be_compared():
    with pytest.raises(MisconfigurationException, match=r"accumulate_grad_batches.*more ranks.*'difference'"):
        fit(AdaptiveBatchSize(estimator="micro_batch"))


def test_streams_are_for_accumulation():
    train = DataLoader(Stream(), 4)
    with pytest.raises(MisconfigurationException, match="`mode='accumulate'`"):
        fit(AdaptiveBatchSize(), None, train)
    with pytest.raises(MisconfigurationException, match="set `max_batch_size`"):
        fit(AdaptiveBatchSize(mode="accumulate"), None, train)
    callback = AdaptiveBatchSize(LinearRamp(increment=8, every=1, start=4), mode="accumulate", max_batch_size=16)
    fit(callback, None, train, max_epochs=2)
    assert callback.batch_size == 16


@pytest.mark.parametrize(
    ("loader", "words"),
    [
        ({"a": DataLoader(range(4))}, "`dict`, not one torch `DataLoader`"),
        (DataLoader(range(4), batch_size=None), "no automatic batching"),
        (
            DataLoader(range(4), batch_sampler=type("Buckets", (BatchSampler,), {})(range(4), 2, False)),
            "`Buckets` draws",
        ),
        (ResumableLoader(range(4), batch_size=2), "`ResumableLoader` restores its position itself"),
        (DataLoader(range(4), batch_size=2, num_workers=1, in_order=False), "set `in_order=True`"),
    ],
)
def test_loaders_that_cannot_change(loader, words):
    (problem,) = loader_problems(loader)
    assert words in problem
    with pytest.raises(MisconfigurationException, match=words.replace("(", r"\(")):
        fit(AdaptiveBatchSize(), None, loader)


def test_optimization_by_hand():
    class ByHand(Line):
        automatic_optimization = False

    with pytest.raises(MisconfigurationException, match="`ByHand` optimizes by hand"):
        fit(AdaptiveBatchSize(), ByHand())


def test_lbfgs():
    with pytest.raises(MisconfigurationException, match="`LBFGS` runs the closure several times"):
        fit(AdaptiveBatchSize(), Line(optimizer="LBFGS"))


@pytest.mark.parametrize("estimator", ["ghost", "vmap"])
def test_batch_norm_has_no_single_samples(estimator):
    with pytest.raises(MisconfigurationException, match=r"net\.1 mix the samples of a batch"):
        fit(AdaptiveBatchSize(estimator=estimator), Line(norm=True))


def test_policies_of_single_samples_need_them():
    with pytest.raises(MisconfigurationException, match="needs gradients of single samples"):
        fit(AdaptiveBatchSize(InnerProductTest(), estimator="micro_batch"), accumulate_grad_batches=2)
    with pytest.raises(MisconfigurationException, match=r"net\.1 mix the samples"):
        fit(AdaptiveBatchSize(InnerProductTest()), Line(norm=True))


def test_what_vmap_cannot_do_is_named():
    class Branches(Line):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * batch.float().mean().item()

    with pytest.raises(RuntimeError, match=r"sample by sample.*`Branches`"):
        fit(AdaptiveBatchSize(estimator="vmap"), Branches())


@pytest.mark.parametrize("rival", [lambda: GradientAccumulationScheduler({0: 2}), BatchSizeFinder])
def test_rivals(rival):
    ours, theirs = AdaptiveBatchSize(), rival()
    with pytest.raises(MisconfigurationException, match=f"`{type(theirs).__name__}` sets the batch size or accumul"):
        ours.setup(tiny_trainer(ours, theirs), Line(), "fit")


def test_two_of_a_kind():
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `AdaptiveBatchSize`"):
        fit(AdaptiveBatchSize(), None, None, AdaptiveBatchSize())


def test_another_lightning_is_noticed():
    """The names that this depends on; each has to be there, and its absence is said."""
    seen = []

    class Probe(AdaptiveBatchSize):
        def on_train_start(self, trainer, pl_module):
            fetcher = trainer.fit_loop._data_fetcher
            seen.extend([fetcher.fetched, fetcher.length, fetcher.done, trainer.fit_loop.max_batches])
            live = LiveLoader(trainer)
            live.release()
            combined, trainer.fit_loop._combined_loader = trainer.fit_loop._combined_loader, object()
            with pytest.raises(AttributeError, match=r"this version of Lightning has no \['limits', 'flattened'\]"):
                LiveLoader(trainer)
            trainer.fit_loop._combined_loader = combined
            super().on_train_start(trainer, pl_module)

    fit(Probe())
    assert seen == [0, 10, False, 10]


def test_a_trainer_of_lightning_is_what_is_expected():
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    assert hasattr(trainer.fit_loop, "_data_fetcher")
    assert hasattr(trainer.fit_loop, "_combined_loader")
    assert hasattr(trainer.fit_loop.epoch_loop.batch_progress.current, "ready")
    assert isinstance(DataLoader(range(4), 2, shuffle=True).batch_sampler.sampler, RandomSampler)
