"""Centres by k-means++ and Lloyd's iterations."""

import pytest
import torch

from lightning_hpo.functional.graphs.k_means import k_means


def test_centres_of_clouds_far_apart_are_their_means():
    generator = torch.Generator().manual_seed(0)
    means = torch.tensor([[0.0, 0.0], [20.0, 0.0], [0.0, 20.0], [20.0, 20.0]])
    points = means.repeat_interleave(25, 0) + torch.randn(100, 2, generator=generator)
    found = k_means(points, 4, generator)
    expected = points.view(4, 25, 2).mean(1)
    nearest = torch.cdist(expected, found).argmin(1)
    assert sorted(nearest.tolist()) == [0, 1, 2, 3]
    torch.testing.assert_close(found[nearest], expected)


def test_first_centres_are_different_points_and_follow_the_generator():
    points = torch.randn(30, 3, dtype=torch.float64)
    seeds = [k_means(points, 30, torch.Generator().manual_seed(s), iterations=0) for s in (1, 1, 2)]
    assert torch.cdist(points, seeds[0]).min(1).values.max() < 1e-5  # as many centres as points: all of them
    assert torch.equal(seeds[0], seeds[1])
    assert not torch.equal(seeds[0], seeds[2])


def test_iterations_lower_the_distance():
    points = torch.rand(200, 4)
    spread = [
        torch.cdist(points, k_means(points, 6, torch.Generator().manual_seed(0), n)).min(1).values.square().sum()
        for n in (0, 1, 5, 20)
    ]
    assert spread == sorted(spread, reverse=True)


def test_points_that_are_all_the_same():
    assert torch.equal(k_means(torch.ones(5, 2), 3), torch.ones(3, 2))


@pytest.mark.parametrize("count", [0, 6])
def test_as_many_points_as_centres_are_needed(count):
    with pytest.raises(ValueError, match="count must lie between 1 and the 5 points"):
        k_means(torch.rand(5, 2), count)
    with pytest.raises(ValueError, match="points must be finite"):
        k_means(torch.tensor([[float("nan")]]), 1)
