"""Every batch holds every class, whatever the number of ranks."""

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_hpo import StratifiedSampler, distributed
from lightning_hpo.testing.tiny import ResumableLoader


def labels(*sizes, seed=0):
    ordered = torch.cat([torch.full((size,), label) for label, size in enumerate(sizes)])
    return ordered[torch.randperm(len(ordered), generator=torch.Generator().manual_seed(seed))]


def batches(sampler):
    return torch.tensor(list(sampler)).view(-1, sampler.batch_size)


@pytest.mark.parametrize("sizes", [(90, 10), (700, 200, 100), (50, 50)])
def test_an_epoch_is_every_sample_once_and_every_batch_has_its_share(sizes):
    y = labels(*sizes)
    found = batches(StratifiedSampler(y, 20))
    assert found.flatten().sort().values.tolist() == list(range(len(y)))
    for batch in found:
        for label, size in enumerate(sizes):
            due = 20 * size / len(y)
            assert abs((y[batch] == label).sum().item() - due) < 1


def test_rare_classes_come_again_and_again():
    y = labels(997, 3)
    found = batches(StratifiedSampler(y, 20, min_per_class=2))
    counts = (y[found] == 1).sum(1)
    assert found.shape == (50, 20)
    assert (counts == 2).all()
    rare = found[y[found] == 1]
    assert rare.bincount()[rare.unique()].tolist() in ([33, 33, 34], [33, 34, 33], [34, 33, 33])
    assert found[y[found] == 0].unique().numel() == 900  # the others gave way


def test_batches_are_full_and_the_rest_is_filled_up_or_left_out():
    y = labels(80, 23)
    assert batches(StratifiedSampler(y, 10)).shape == (11, 10)
    assert len(StratifiedSampler(y, 10)) == 110
    dropping = StratifiedSampler(y, 10, drop_last=True)
    assert batches(dropping).flatten().unique().numel() == len(dropping) == 100


def test_epochs_differ_and_come_again():
    sampler = StratifiedSampler(labels(90, 10), 10, seed=3)
    first = list(sampler)
    assert list(sampler) == first
    sampler.set_epoch(1)
    assert list(sampler) != first
    sampler.set_epoch(0)
    assert list(sampler) == first
    assert list(StratifiedSampler(labels(90, 10), 10, seed=4)) != first


def test_training_random_numbers_are_left_alone():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    list(StratifiedSampler(labels(90, 10), 10))
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_together_draw_the_batches_of_one_process(ranks, monkeypatch):
    y = labels(85, 7)
    whole = batches(StratifiedSampler(y, 6 * ranks, min_per_class=ranks))
    monkeypatch.setattr(distributed, "world_size", lambda: ranks)
    sampler = StratifiedSampler(y, 6, min_per_class=ranks)
    parts = []
    for rank in range(ranks):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        parts.append(batches(sampler))
        assert (y[parts[-1]] == 1).any(1).all()  # one of each for each rank
        assert len(sampler) == parts[-1].numel()
    joined = torch.cat(parts, 1)
    assert joined.sort(1).values.tolist() == whole.sort(1).values.tolist()


def test_a_loader_goes_on_in_the_middle_of_an_epoch():
    data = TensorDataset(torch.arange(40), labels(30, 10))

    def make():
        return ResumableLoader(data, batch_size=8, sampler=StratifiedSampler(data.tensors[1], 8, seed=1))

    loader = make()
    loader.sampler.set_epoch(5)
    expected = [x.tolist() for x, _ in loader]
    reader = iter(loader)
    next(reader), next(reader)
    other = make()
    other.load_state_dict(loader.state_dict())
    other.sampler.set_epoch(5)
    assert [x.tolist() for x, _ in other] == expected[2:]


def test_a_plain_loader_makes_the_batches():
    data = TensorDataset(torch.arange(40), labels(38, 2))
    loader = DataLoader(data, batch_size=8, sampler=StratifiedSampler(data.tensors[1], 8))
    assert [y.sum().item() for _, y in loader] == [1] * 5


def test_wrong_arguments_are_named_at_once():
    with pytest.raises(ValueError, match=r"batch_size must be .* got 0; min_per_class must be .* got 1.5; labels"):
        StratifiedSampler(torch.zeros(3, 2), 0, 1.5)
    with pytest.raises(ValueError, match="3 classes of at least 2 do not fit into 4 samples"):
        StratifiedSampler([0, 1, 2, 0], 4, 2)
    with pytest.raises(ValueError, match="labels must be whole numbers"):
        StratifiedSampler([0.5, 1.0], 2)
