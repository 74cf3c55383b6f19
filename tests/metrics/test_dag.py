"""Metrics of communities."""

from itertools import permutations

import pytest
import torch

from lightning_hpo import ClusteringAccuracy, SoftModularity
from lightning_hpo.functional.graphs.dag import soft_modularity


def accuracy(preds, target):
    metric = ClusteringAccuracy()
    metric.update(torch.tensor(preds), torch.tensor(target))
    return metric.compute().item()


def test_accuracy_is_that_of_the_best_naming():
    preds, target = torch.randint(4, (60,)), torch.randint(4, (60,))
    best = max((torch.tensor(names)[preds] == target).float().mean().item() for names in permutations(range(4)))
    assert accuracy(preds.tolist(), target.tolist()) == pytest.approx(best)


def test_communities_left_over_are_errors():
    assert accuracy([0, 0, 1, 2], [0, 0, 1, 1]) == pytest.approx(0.75)  # more communities than classes
    assert accuracy([0, 0, 0, 0], [0, 0, 1, 1]) == pytest.approx(0.5)  # fewer
    assert accuracy([7, 7, 3], [0, 0, 9]) == 1


def test_batches_are_put_together():
    preds, target = torch.randint(5, (40,)), torch.randint(3, (40,))
    metric = ClusteringAccuracy()
    for part in (slice(0, 7), slice(7, 40)):
        metric.update(preds[part], target[part])
    assert metric.compute().item() == pytest.approx(accuracy(preds.tolist(), target.tolist()))


@pytest.mark.parametrize("preds", [torch.tensor([0.0, 1.0]), torch.tensor([0, 1, 1]), torch.tensor([0, -1])])
def test_anything_but_whole_numbers_of_one_shape_is_refused(preds):
    with pytest.raises(ValueError, match="whole numbers from 0"):
        ClusteringAccuracy().update(preds, torch.tensor([0, 1]))


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric")
def test_nothing_seen_is_an_error_not_a_nan():
    with pytest.raises(ValueError, match="has seen no nodes"):
        ClusteringAccuracy().compute()
    with pytest.raises(ValueError, match="has seen no edges"):
        SoftModularity(2).compute()


def test_modularity_of_several_graphs_is_that_of_all_together():
    graphs = [(torch.rand(n, 3).softmax(1), torch.randint(n, (2, 5 * n))) for n in (6, 9)]
    metric = SoftModularity(3)
    for P, edges in graphs:
        metric.update(P, torch.cat([edges, edges.flip(0)], dim=1))
    joined = torch.cat([graphs[0][1], graphs[1][1] + 6], dim=1)
    expected = soft_modularity(torch.cat([P for P, _ in graphs]), torch.cat([joined, joined.flip(0)], dim=1))
    torch.testing.assert_close(metric.compute(), expected)
    with pytest.raises(ValueError, match="must have 3 columns"):
        metric.update(torch.ones(4, 2), joined)
    with pytest.raises(ValueError, match="num_communities must be a positive integer"):
        SoftModularity(0)


def test_labels_of_a_small_type_and_large_labels_are_counted():
    right = torch.arange(40) // 2
    metric = ClusteringAccuracy()
    metric.update(right.to(torch.uint8), right.to(torch.uint8))  # 400 cells
    assert metric.compute() == 1
    assert accuracy([10**9, 10**9, 3], [7, 7, 10**12]) == 1
