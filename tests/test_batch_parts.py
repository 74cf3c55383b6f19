"""Parts of a batch: each example in one of them, also where the batch comes in micro-batches."""

import pytest
import torch

from lightning_hpo.batch_parts import part_of


def test_every_kind_of_example_is_cut():
    x, y = torch.arange(8.0).view(4, 2), torch.arange(4)
    assert [part_of((x, [y]), 2, turn)[0][1][0].tolist() for turn in range(3)] == [[0, 1], [2, 3], [0, 1]]
    assert part_of((x, {"length": 4}), 2, 1)[0][0].tolist() == [[4, 5], [6, 7]]
    assert part_of((x, ["a", "b", "c", "d"]), 2, 1)[0][1] == ["c", "d"]


def test_a_batch_is_cut_only_where_it_is_known_what_its_examples_are():
    x, y = torch.arange(8.0).view(4, 2), torch.arange(4)
    for uncut in ((x[:3], y[:3]), (x, {"graph": object()})):  # too small; nobody knows what is in it
        for of in (1, 2):
            if of == 1 or uncut[0] is x:
                batch, share = part_of(uncut, 2, 1, place=0, of=of)
                assert batch is uncut
                assert share == 1 / of


@pytest.mark.parametrize("parts", [2, 3, 4])
@pytest.mark.parametrize("of", [1, 2, 3, 5])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 8])
def test_parts_of_micro_batches_are_the_batch(size, of, parts):
    if size * of < 2 * parts:
        return  # not cut
    seen = []
    for turn in range(parts):
        found = [part_of(torch.arange(size) + size * i, parts, turn, i, of) for i in range(of)]
        shares = sum(share for _, share in found)
        assert shares == pytest.approx(1.0) or all(part is None for part, _ in found)
        own = [part for part, _ in found if part is not None]
        assert all(len(part) > 1 for part in own) or size == 1  # or batch norm would refuse it
        seen += [number for part in own for number in part.tolist()]
    assert seen == list(range(size * of))  # each in one part, in order


def test_a_part_is_whole_micro_batches_where_it_can_be():
    shares = [part_of(torch.arange(4), 2, 1, place, 4)[1] for place in range(4)]
    assert shares == [0.0, 0.0, 0.5, 0.5]
