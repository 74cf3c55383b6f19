"""Held-out batches: every sample once an epoch, the same over ranks, and going on where a state stood."""

from collections import Counter
from itertools import chain

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset, WeightedRandomSampler

from lightning_hpo import distributed
from lightning_hpo.held_out import HeldOutBatches


def numbers(samples=10, batch_size=2, **more):
    return DataLoader(TensorDataset(torch.arange(samples)), batch_size=batch_size, **more)


def drawn(batches, count):
    return [next(batches)[0].tolist() for _ in range(count)]


def attached(loader, seed=0):
    batches = HeldOutBatches(seed)
    batches.attach(loader)
    return batches


@pytest.mark.parametrize("workers", [0, 2])
def test_every_sample_once_an_epoch_in_a_new_order(workers):
    batches = attached(numbers(num_workers=workers))
    epochs = [drawn(batches, 5) for _ in range(3)]
    assert all(sorted(chain(*epoch)) == list(range(10)) for epoch in epochs)
    assert len({tuple(map(tuple, epoch)) for epoch in epochs}) == 3
    assert drawn(attached(numbers(), seed=1), 5) != epochs[0]


def test_the_last_short_batch_is_left_out():
    batches = attached(numbers(samples=7, batch_size=3))
    assert [len(batch) for batch in drawn(batches, 6)] == [3] * 6
    assert batches.state_dict() == {"epoch": 2, "position": 6}
    assert [len(batch) for batch in drawn(attached(numbers(samples=2, batch_size=3)), 2)] == [2, 2]


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_ranks_together_draw_what_one_process_draws(ranks, monkeypatch):
    alone = drawn(attached(numbers(samples=25, batch_size=2 * ranks)), 9)
    monkeypatch.setattr(distributed, "world_size", lambda: ranks)
    parts = []
    for rank in range(ranks):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        parts.append(drawn(attached(numbers(samples=25)), 9))
    for joined, *of_ranks in zip(alone, *parts, strict=True):
        assert all(len(batch) == 2 for batch in of_ranks)
        assert Counter(joined) == Counter(chain(*of_ranks))
    with pytest.raises(ValueError, match="1 held-out samples are not one for each"):
        attached(numbers(samples=1))


def test_a_position_holds_for_other_batches_and_ranks(monkeypatch):
    whole = attached(numbers(samples=24, batch_size=4))
    drawn(whole, 3)
    state, rest = whole.state_dict(), drawn(whole, 3)
    small = attached(numbers(samples=24, batch_size=2))
    small.load_state_dict(state)
    assert list(chain(*drawn(small, 6))) == list(chain(*rest))
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    second = attached(numbers(samples=24, batch_size=2))
    second.load_state_dict(state)
    assert drawn(second, 3) == [batch[1::2] for batch in rest]


class Stream(IterableDataset):
    def __iter__(self):
        return iter(torch.arange(10))


def weighted():
    generator = torch.Generator().manual_seed(3)
    return numbers(sampler=WeightedRandomSampler(torch.ones(10), 10, generator=generator))


LOADERS = {
    "plain": numbers,
    "workers": lambda: numbers(num_workers=2),
    "stream": lambda: DataLoader(Stream(), batch_size=2, collate_fn=lambda rows: [torch.stack(rows)]),
    "list": lambda: [[torch.tensor([index])] for index in range(4)],
}


@pytest.mark.parametrize("name", LOADERS)
@pytest.mark.parametrize("before", [0, 3, 5, 7])
def test_a_loaded_position_goes_on_with_the_next_batch(name, before):
    whole = attached(LOADERS[name]())
    drawn(whole, before)
    state, rest = whole.state_dict(), drawn(whole, 8)
    resumed = HeldOutBatches()
    resumed.load_state_dict(state)
    resumed.attach(LOADERS[name]())
    assert drawn(resumed, 8) == rest
    late = attached(LOADERS[name]())
    drawn(late, 1)
    late.load_state_dict(state)
    assert drawn(late, 8) == rest


class Augmented(TensorDataset):
    def __getitem__(self, index):
        return (super().__getitem__(index)[0] + torch.rand(()),)


@pytest.mark.parametrize("sampler", [False, True])
def test_random_numbers_follow_from_the_position_and_training_keeps_its_own(sampler):
    def loader():
        order = {"sampler": WeightedRandomSampler(torch.ones(10), 10)} if sampler else {}
        return DataLoader(Augmented(torch.arange(10.0)), batch_size=2, **order)

    torch.manual_seed(7)
    before = torch.get_rng_state()
    whole = attached(loader())
    drawn(whole, 7)
    state, rest = whole.state_dict(), drawn(whole, 4)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(8)
    resumed = attached(loader())
    resumed.load_state_dict(state)
    assert drawn(resumed, 4) == rest


def test_augmentations_follow_the_seed_and_the_epoch():
    data = Augmented(torch.zeros(4))
    numbers = [v for seed in range(3) for batch in drawn(attached(DataLoader(data, 2), seed), 6) for v in batch]
    assert len(set(numbers)) == len(numbers) == 36


def test_a_stream_is_shared_out_over_the_ranks(monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    assert drawn(attached(LOADERS["stream"]()), 4) == [[2, 3], [6, 7], [2, 3], [6, 7]]
    with pytest.raises(ValueError, match="no batch for each rank"):
        drawn(attached([[torch.zeros(1)]]), 1)


def test_a_sampler_of_the_users_own_is_kept():
    assert drawn(attached(weighted()), 5) == [batch[0].tolist() for batch in weighted()]


def test_wrong_use():
    with pytest.raises(RuntimeError, match="attach a loader first"):
        next(HeldOutBatches())
    with pytest.raises(ValueError, match="can be read only once"):
        drawn(attached(iter([[torch.zeros(1)]])), 2)
    assert iter(batches := HeldOutBatches()) is batches
