"""The sampler alone: nothing lost, nothing drawn twice, resumed to the index, whatever the plans."""

import random

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler, WeightedRandomSampler

from lightning_hpo.data import AdaptiveBatchSampler
from lightning_hpo.functional.batching.plan import BatchPlan


def random_plan(source):
    return BatchPlan(source.randint(1, 9), 2 ** source.randint(0, 3))


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("seed", range(20))
def test_every_index_once_while_plans_change(seed, drop_last):
    source = random.Random(seed)
    size = source.randint(1, 200)
    sampler = AdaptiveBatchSampler(RandomSampler(range(size)), source.randint(1, 9), drop_last)
    for _ in range(3):
        seen, batches = [], 0
        for batch in sampler:
            assert sampler.take().size == len(batch)
            seen, batches = seen + batch, batches + 1
            if source.random() < 0.2:
                sampler.request(random_plan(source))
            announced = len(sampler)  # must be right at any time, if no further plan comes
        assert len(set(seen)) == len(seen)
        assert len(seen) == size if not drop_last else size - len(seen) < 9
        assert not batches or announced == batches


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("drop_last", [False, True])
def test_length_is_what_comes(seed, drop_last):
    source = random.Random(seed)
    sampler = AdaptiveBatchSampler(range(source.randint(1, 99)), source.randint(1, 9), drop_last)
    batches = iter(sampler)
    for _ in range(source.randint(0, 5)):
        next(batches, None)
    sampler.request(random_plan(source))
    drawn = len(sampler.drawn)
    promised = len(sampler)
    assert promised == drawn + len(list(batches))


def test_plans_take_effect_on_multiples_of_both_accumulations():
    sampler = AdaptiveBatchSampler(range(1000), 2)
    source, plans = random.Random(0), []
    for index, _ in enumerate(sampler):
        drawn = sampler.take()
        plans.append(drawn.accumulation)
        if index and plans[index] != plans[index - 1]:
            assert index % plans[index] == 0
            assert index % plans[index - 1] == 0
        if source.random() < 0.3:
            sampler.request(BatchPlan(source.randint(1, 4), 2 ** source.randint(0, 3)))
    assert len(set(plans)) == 4


def test_a_window_has_one_micro_batch_size():
    sampler = AdaptiveBatchSampler(range(100), 2)
    batches = iter(sampler)
    sampler.request(BatchPlan(3, 4))
    next(batches)
    sampler.request(BatchPlan(5, 1))
    sizes = [len(next(batches)) for _ in range(5)]
    assert sizes == [3, 3, 3, 5, 5]  # a window of four threes, begun before the request


@pytest.mark.parametrize("ahead", [0, 3])
@pytest.mark.parametrize("stop", [0, 1, 5, 9])
@pytest.mark.parametrize(
    "make",
    [
        lambda n: RandomSampler(range(n)),
        lambda n: RandomSampler(range(n), generator=torch.Generator().manual_seed(3)),
        lambda n: RandomSampler(range(n), replacement=True),
        lambda n: WeightedRandomSampler([1.0 + i for i in range(n)], n),
        lambda n: SequentialSampler(range(n)),
    ],
    ids=["shuffled", "own generator", "replacement", "weighted", "in order"],
)
def test_resumes_to_the_index(make, stop, ahead):
    def consume(sampler, batches, count):
        """Draws `ahead` batches more than are taken, as workers do."""
        found = []
        while len(found) < count:
            while len(queue) <= ahead and (batch := next(batches, None)):
                queue.append(batch)
            if not queue:
                break
            found.append(queue.pop(0))
            taken = sampler.take()
            assert taken.size == len(found[-1])
            if sampler.batches_taken == 4:
                sampler.request(BatchPlan(5, 2))
        return found

    torch.manual_seed(7)
    queue = []
    whole = AdaptiveBatchSampler(make(60), 3)
    list(whole)  # an epoch before
    batches = iter(whole)
    consume(whole, batches, stop)
    state = whole.state_dict()
    torch.manual_seed(11)
    expected = consume(whole, batches, 99)
    expected += list(whole)  # the epoch after
    queue.clear()
    again = AdaptiveBatchSampler(make(60), 3)
    again.load_state_dict(state)
    assert again.batches_taken == stop
    outside = torch.get_rng_state()
    batches = iter(again)
    found = consume(again, batches, 99)
    assert torch.equal(torch.get_rng_state(), outside)  # the user's random numbers are the user's
    assert found + list(again) == expected


def test_epochs_and_runs_are_shuffled_anew():
    first, second = (AdaptiveBatchSampler(RandomSampler(range(50)), 5) for _ in range(2))
    orders = [tuple(map(tuple, sampler)) for sampler in (first, first, second)]
    assert len(set(orders)) == 3


def test_a_checkpoint_of_a_longer_epoch_is_refused():
    sampler = AdaptiveBatchSampler(range(20), 4)
    for _ in zip(range(4), sampler, strict=False):
        sampler.take()
    other = AdaptiveBatchSampler(range(10), 4)
    other.load_state_dict(sampler.state_dict())
    with pytest.raises(RuntimeError, match=r"16 samples into an epoch of 10\."):
        next(iter(other))


def test_adopts_the_sampler_of_a_loader_and_gives_it_back():
    loader = DataLoader(range(20), batch_size=4)
    plain = loader.batch_sampler
    vars(plain)["__pl_saved_args"] = ()  # as a loader has that was made in a hook
    before = dict(vars(plain))
    adopted = AdaptiveBatchSampler.adopt(plain)
    assert adopted is plain
    batches = iter(loader)
    next(batches)
    adopted.request(BatchPlan(8, 1))
    assert [len(batch) for batch in batches] == [8, 8]
    adopted.release()
    assert type(plain) is BatchSampler
    # Lightning may be recording changes: its patch of all samplers outlives an error in a hook that makes a loader.
    left = {name: value for name, value in vars(plain).items() if name != "__pl_attrs_record"}
    assert left == before
    assert [len(batch) for batch in loader] == [4] * 5


def test_other_batch_samplers_are_not_adopted():
    class Buckets(BatchSampler):
        pass

    with pytest.raises(TypeError, match="`Buckets` draws batches by a rule of its own"):
        AdaptiveBatchSampler.adopt(Buckets(range(4), 2, False))


def test_a_stranger_who_iterates_is_noticed():
    sampler = AdaptiveBatchSampler(range(4), 2)
    with pytest.raises(RuntimeError, match="more batches arrived than the sampler has drawn"):
        sampler.take()


def test_lightning_can_build_it_anew_around_another_sampler():
    sampler = AdaptiveBatchSampler(range(8), 2)
    again = type(sampler)(range(4), batch_size=sampler.batch_size, drop_last=sampler.drop_last)
    assert list(again) == [[0, 1], [2, 3]]
