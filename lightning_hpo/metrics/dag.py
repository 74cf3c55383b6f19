"""Metrics of communities: modularity of soft ones, accuracy under the best assignment to classes."""

from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torchmetrics import Metric

from lightning_hpo.functional.arguments import is_whole
from lightning_hpo.functional.graphs.dag import CommunitySums, community_sums

__all__ = ["ClusteringAccuracy", "SoftModularity"]


class SoftModularity(Metric):
    r"""Modularity of soft communities over all batches and ranks.

    Its states are sums over nodes and edges, so that batches without common nodes (several graphs, parts of one whose
    edges all lie within a part) give the modularity of all of them together.

    Args:
        num_communities: Number of columns of the membership.
        **kwargs: Arguments of ``torchmetrics.Metric``.

    Example:
        >>> metric = SoftModularity(2)
        >>> metric.update(torch.eye(2).repeat_interleave(2, 0), torch.tensor([[0, 1, 2, 3], [1, 0, 3, 2]]))
        >>> metric.compute()
        tensor(0.5000)
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    inside: Tensor
    ends: Tensor
    degree_mass: Tensor

    def __init__(self, num_communities: int, **kwargs: Any) -> None:
        if not is_whole(num_communities, 1):
            raise ValueError(f"num_communities must be a positive integer, got {num_communities!r}")
        super().__init__(**kwargs)
        self.add_state("inside", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("ends", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("degree_mass", torch.zeros(num_communities), dist_reduce_fx="sum")

    def update(self, membership: Tensor, edge_index: Tensor) -> None:
        """Adds a batch.

        Args:
            membership: Shape ``(N, K)``; rows add up to 1.
            edge_index: Shape ``(2, E)``, both directions of every edge.

        Raises:
            ValueError: If the membership has another number of columns.
        """
        columns = len(self.degree_mass)
        if membership.ndim != 2 or membership.shape[1] != columns:
            raise ValueError(f"membership must have {columns} columns, got {tuple(membership.shape)}")
        sums = community_sums(membership.detach(), edge_index)
        self.inside = self.inside + sums.inside
        self.ends = self.ends + sums.ends
        self.degree_mass = self.degree_mass + sums.degree_mass

    def compute(self) -> Tensor:
        """The modularity; NaN is never returned.

        Raises:
            ValueError: If no edge has been seen.
        """
        if self.ends == 0:
            raise ValueError("`SoftModularity` has seen no edges: modularity is undefined")
        nothing = torch.zeros_like(self.degree_mass)
        return CommunitySums(self.inside, self.ends, self.degree_mass, nothing, nothing, self.ends).modularity()


class ClusteringAccuracy(Metric):
    """Share of nodes that are right when each community stands for at most one class, as well as it can.

    The assignment is rectangular: with more communities than classes, those left over count as errors.

    Args:
        **kwargs: Arguments of ``torchmetrics.Metric``.

    References:
        Kuhn, "The Hungarian method for the assignment problem", 1955; solved by ``scipy.optimize``.

    Example:
        >>> metric = ClusteringAccuracy()
        >>> metric.update(torch.tensor([1, 1, 0, 2]), torch.tensor([0, 0, 1, 1]))
        >>> metric.compute()
        tensor(0.7500)
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    preds: list[Tensor]
    target: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("preds", [], dist_reduce_fx="cat")
        self.add_state("target", [], dist_reduce_fx="cat")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Adds a batch.

        Args:
            preds: Communities, whole numbers from 0, shape ``(N,)``.
            target: Classes, whole numbers from 0, shape ``(N,)``.

        Raises:
            ValueError: If shapes differ or these are no whole numbers from 0.
        """
        wrong = [t for t in (preds, target) if t.ndim != 1 or t.is_floating_point() or (t.numel() and t.min() < 0)]
        if wrong or preds.shape != target.shape:
            raise ValueError(
                f"preds and target must be whole numbers from 0 of one shape (N,), got {tuple(preds.shape)} "
                f"{preds.dtype} and {tuple(target.shape)} {target.dtype}"
            )
        self.preds.append(preds.detach())
        self.target.append(target.detach())

    def compute(self) -> Tensor:
        """The share.

        Raises:
            ValueError: If no node has been seen.
        """
        preds, target = (_whole(parts) for parts in (self.preds, self.target))
        if not len(preds):
            raise ValueError("`ClusteringAccuracy` has seen no nodes")
        # Numbered anew: labels may be large, and of a type that cannot hold the number of a cell.
        (found, preds), (classes, target) = (t.unique(return_inverse=True) for t in (preds, target))
        cells = (preds * len(classes) + target).bincount(minlength=len(found) * len(classes))
        counts = cells.view(-1, len(classes)).cpu().numpy()
        rows, matched = linear_sum_assignment(counts, maximize=True)
        return torch.tensor(counts[rows, matched].sum() / len(preds), dtype=torch.float32, device=preds.device)


def _whole(parts: list[Tensor] | Tensor) -> Tensor:
    """All of a list state; between ranks torchmetrics has joined it already."""
    if isinstance(parts, Tensor):
        return parts
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.long)
