"""What can be said of communities without labels."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_hpo.functional.graphs.dag import node_degree, soft_modularity

__all__ = ["LabelFreeCommunityReport", "label_free_report"]


@dataclass(frozen=True)
class LabelFreeCommunityReport:
    """How communities fit the edges and the attributes of a graph; a summary of this project, not of a paper.

    Args:
        n_communities: Number of communities with a node.
        sizes: Nodes of each, the largest first.
        modularity: That of the partition.
        coverage: Share of edges that lie inside of a community.
        conductance: Share of a community's edge ends that leave it, or of the rest's if that is smaller; the mean over
            communities with an edge that are not the whole graph.
        cosine_inside: Mean cosine of attributes over pairs of nodes of one community.
        cosine_outside: The same over pairs of nodes of different communities.
    """

    n_communities: int
    sizes: tuple[int, ...]
    modularity: float
    coverage: float
    conductance: float
    cosine_inside: float
    cosine_outside: float

    @property
    def structure_attribute_score(self) -> float:
        """Harmonic mean of the modularity and of how much more alike attributes are inside, both cut to [0, 1].

        A score of this project; it is not the one that the paper proposes, whose formula we have not seen.
        """
        structure = min(max(self.modularity, 0.0), 1.0)
        attributes = min(max(self.cosine_inside - self.cosine_outside, 0.0), 1.0)
        return 2 * structure * attributes / (structure + attributes) if structure + attributes else 0.0

    def __str__(self) -> str:
        """A line a figure."""
        figures = {
            "communities": str(self.n_communities),
            "sizes": ", ".join(map(str, self.sizes)),
            "modularity": f"{self.modularity:.3f}",
            "edges inside": f"{self.coverage:.3f}",
            "mean conductance": f"{self.conductance:.3f}",
            "attribute cosine inside, outside": f"{self.cosine_inside:.3f}, {self.cosine_outside:.3f}",
            "structure and attributes": f"{self.structure_attribute_score:.3f}",
        }
        return "\n".join(f"{name}: {value}" for name, value in figures.items())


def label_free_report(labels: Tensor, edge_index: Tensor, attributes: Tensor) -> LabelFreeCommunityReport:
    r"""Modularity, coverage, conductance and attribute cosines of a partition.

    Mean cosines take all pairs, without forming them: with unit rows u the sum over ordered pairs of a community is
    :math:`\|\sum_i u_i\|^2 - \sum_i \|u_i\|^2`. Nodes without attributes have cosine 0 with all others.

    Args:
        labels: Community of each node, shape ``(N,)``; any whole numbers from 0.
        edge_index: Shape ``(2, E)``, both directions of every edge.
        attributes: Shape ``(N, F)``.

    Returns:
        The report.

    Raises:
        ValueError: If lengths or edges do not fit, attributes are not finite, or there are no edges.

    Example:
        >>> edges = torch.tensor([[0, 1, 2, 3], [1, 0, 3, 2]])
        >>> report = label_free_report(torch.tensor([0, 0, 5, 5]), edges, torch.eye(2)[[0, 0, 1, 1]])
        >>> report.n_communities, report.modularity, report.cosine_inside, report.conductance
        (2, 0.5, 1.0, 0.0)
    """
    if labels.ndim != 1 or attributes.ndim != 2 or len(labels) != len(attributes) or labels.is_floating_point():
        raise ValueError(
            f"labels must be whole numbers (N,) and attributes (N, F) with the same N, got {tuple(labels.shape)} "
            f"{labels.dtype} and {tuple(attributes.shape)}"
        )
    if not attributes.isfinite().all():
        raise ValueError("attributes must be finite")
    found, community = labels.unique(return_inverse=True)
    member = F.one_hot(community, len(found)).double()
    modularity = soft_modularity(member, edge_index).item()  # asks about edges, too
    sizes = member.sum(0)
    degree = node_degree(edge_index, len(labels)).double()
    volume = degree @ member
    crossing = community[edge_index[0]] != community[edge_index[1]]
    leaving = crossing.double() @ member[edge_index[0]]
    smaller = torch.minimum(volume, volume.sum() - volume)
    bounded = smaller > 0
    conductance = (leaving[bounded] / smaller[bounded]).mean() if bounded.any() else volume.new_zeros(())
    inside, outside = _mean_cosines(F.normalize(attributes.double(), dim=1), member, sizes)
    return LabelFreeCommunityReport(
        n_communities=len(found),
        sizes=tuple(int(size) for size in sizes.sort(descending=True).values),
        modularity=modularity,
        coverage=1 - crossing.double().mean().item(),
        conductance=conductance.item(),
        cosine_inside=inside,
        cosine_outside=outside,
    )


def _mean_cosines(rows: Tensor, member: Tensor, sizes: Tensor) -> tuple[float, float]:
    own = rows.square().sum()
    within = (member.T @ rows).square().sum() - own
    across = rows.sum(0).square().sum() - own - within
    pairs_within = (sizes * (sizes - 1)).sum()
    pairs_across = len(rows) * (len(rows) - 1) - pairs_within
    return (within / pairs_within.clamp_min(1)).item(), (across / pairs_across.clamp_min(1)).item()
