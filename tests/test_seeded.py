"""A random stream of one's own."""

import copy
import pickle

import pytest
import torch

from lightning_hpo.seeded import Draws


def draw(draws):
    with draws.fixed(torch.device("cpu")):
        return torch.rand(3)


def test_each_start_is_another_and_the_same_seed_gives_the_same():
    first, second = Draws(1), Draws(1)
    found = [draw(first) for _ in range(3)]
    assert not torch.equal(found[0], found[1])
    torch.rand(5)  # what others draw does not matter
    assert all(torch.equal(draw(second), values) for values in found)


def test_the_global_generator_is_put_back():
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    draw(Draws(0))
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda draws: pickle.loads(pickle.dumps(draws))])
def test_copies_go_on_where_it_stands(copied):
    draws = Draws(2)
    draw(draws)
    other = copied(draws)
    assert torch.equal(draw(draws), draw(other))


@pytest.mark.parametrize("seed", [-1, 2**32, 1.5])
def test_seeds_beyond_what_a_generator_knows(seed):
    with pytest.raises(ValueError, match="seed must be an integer between 0 and"):
        Draws(seed)
