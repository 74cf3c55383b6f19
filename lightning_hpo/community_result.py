"""Communities of a graph, as they are handed out."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_hpo.functional.graphs.community_report import LabelFreeCommunityReport, label_free_report
from lightning_hpo.graph_data import Graph

__all__ = ["CommunityResult", "community_result"]


@dataclass  # Lightning moves what `predict` returns, which a frozen one does not allow
class CommunityResult:
    """Communities of a graph.

    Args:
        labels: Community of each node, 0 the largest; shape ``(N,)``.
        n_communities: Number of communities with a node.
        membership: Soft communities, a column for each of those found; rows add up to at most 1. Shape ``(N, K)``.
        graph: The graph that they are of.
    """

    labels: Tensor
    n_communities: int
    membership: Tensor
    graph: Graph

    def report(self) -> LabelFreeCommunityReport:
        """How they fit edges and attributes; no labels needed."""
        return label_free_report(self.labels, self.graph.edge_index, self.graph.x)


def community_result(scores: Tensor, graph: Graph) -> CommunityResult:
    """The communities that nodes like best, the largest first.

    Args:
        scores: Logits, shape ``(N, K_max)``.
        graph: The graph; results are on its device.

    Returns:
        The result.

    Example:
        >>> graph = Graph(torch.eye(3), torch.tensor([[0, 1], [1, 0]]), None, None)
        >>> community_result(torch.tensor([[0.0, 9.0, 1.0], [0.0, 1.0, 9.0], [1.0, 2.0, 8.0]]), graph).labels
        tensor([1, 0, 0])
    """
    best = scores.argmax(1)
    sizes = best.bincount(minlength=scores.shape[1])
    found = sizes.argsort(descending=True, stable=True)[: int((sizes > 0).sum())]
    place = torch.empty_like(sizes).index_put_((found,), torch.arange(len(found), device=found.device))
    home = graph.x.device
    return CommunityResult(place[best].to(home), len(found), scores.softmax(1)[:, found].to(home), graph)
