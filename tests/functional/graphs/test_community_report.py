"""What is said of communities without labels."""

import networkx
import pytest
import torch
from networkx.algorithms import community, cuts

from lightning_hpo.functional.graphs.community_report import label_free_report


@pytest.mark.parametrize("most_in_one", [False, True])  # then conductance looks at the rest
def test_figures_are_networkxs(most_in_one):
    graph = networkx.karate_club_graph()
    parts = community.louvain_communities(graph, weight=None, seed=0)
    parts = [{*parts[0], *parts[1], *parts[2]}, *parts[3:]] if most_in_one else parts
    labels = torch.empty(34, dtype=torch.long)
    for k, part in enumerate(parts):
        labels[list(part)] = 3 * k  # numbers need not follow each other
    pairs = torch.tensor(list(graph.edges)).T
    x = torch.rand(34, 5)
    report = label_free_report(labels, torch.cat([pairs, pairs.flip(0)], dim=1), x)
    assert report.n_communities == len(parts)
    assert list(report.sizes) == sorted(map(len, parts), reverse=True)
    assert report.modularity == pytest.approx(community.modularity(graph, parts, weight=None))
    assert report.coverage == pytest.approx(community.partition_quality(graph, parts)[0])
    expected = sum(cuts.conductance(graph, part) for part in parts) / len(parts)
    assert report.conductance == pytest.approx(expected)
    cosine = torch.nn.functional.cosine_similarity(x[:, None].double(), x[None].double(), dim=2)
    same = labels[:, None] == labels[None]
    others = ~torch.eye(34, dtype=torch.bool)
    assert report.cosine_inside == pytest.approx(cosine[same & others].mean().item())
    assert report.cosine_outside == pytest.approx(cosine[~same].mean().item())
    gap = report.cosine_inside - report.cosine_outside
    gap = min(max(gap, 0), 1)
    assert report.structure_attribute_score == pytest.approx(2 * gap * report.modularity / (gap + report.modularity))
    assert f"modularity: {report.modularity:.3f}" in str(report)


def test_one_community():
    edges = torch.tensor([[0, 1], [1, 0]])
    report = label_free_report(torch.zeros(2, dtype=torch.long), edges, torch.eye(2))
    assert (report.modularity, report.coverage, report.conductance) == (0, 1, 0)
    assert report.structure_attribute_score == 0


def test_shapes_are_named():
    with pytest.raises(ValueError, match=r"with the same N, got \(3,\)"):
        label_free_report(torch.zeros(3, dtype=torch.long), torch.zeros(2, 1, dtype=torch.long), torch.eye(2))
    labels = torch.zeros(2, dtype=torch.long)
    with pytest.raises(ValueError, match="edge_index goes up to 5, but there are 2 nodes"):
        label_free_report(labels, torch.tensor([[0], [5]]), torch.eye(2))
    with pytest.raises(ValueError, match="attributes must be finite"):
        label_free_report(labels, torch.tensor([[0, 1], [1, 0]]), torch.full((2, 2), float("nan")))
