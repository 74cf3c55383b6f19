"""Which columns of a membership live on: a decision from sums that may be added over batches and ranks."""

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["PartitionSums", "keep_communities", "partition_sums"]


class PartitionSums(NamedTuple):
    """Sums of the hard partition, and of those that leave one column out.

    Row k is the partition in which the nodes of column k join the column they like next best; the last row is the
    partition itself.

    Args:
        inside: Listed edges within a community, shape ``(K + 1,)``.
        degree_mass: Sum of degrees in each community, shape ``(K + 1, K)``.
        sizes: Nodes in each community, shape ``(K + 1, K)``.
        ends: Number of listed edges, a scalar.
    """

    inside: Tensor
    degree_mass: Tensor
    sizes: Tensor
    ends: Tensor


def partition_sums(scores: Tensor, live: Tensor, edge_index: Tensor, degree: Tensor) -> PartitionSums:
    """Adds up the partition and its neighbours, one column left out at a time.

    Args:
        scores: Logits, shape ``(N, K)``.
        live: Columns that are alive, shape ``(K,)``; the others are never chosen.
        edge_index: Shape ``(2, E)``.
        degree: Shape ``(N,)``.

    Returns:
        The sums, in float64 and on the device of the scores. Rows of dead columns are those of the partition itself.

    Example:
        >>> scores = torch.tensor([[2.0, 1.0, 0.0], [0.0, 2.0, 1.0]])
        >>> edges = torch.tensor([[0, 1], [1, 0]])
        >>> partition_sums(scores, torch.ones(3, dtype=torch.bool), edges, torch.ones(2)).sizes
        tensor([[0., 2., 0.],
                [1., 0., 1.],
                [1., 1., 0.],
                [1., 1., 0.]], dtype=torch.float64)
    """
    columns = scores.shape[1]
    best = scores.masked_fill(~live, -torch.inf).topk(min(2, columns), dim=1).indices
    first, second = best[:, 0], best[:, -1]
    inside, degree_mass, sizes = [], [], []
    for column in range(columns + 1):  # a column at a time: K + 1 partitions at once would be K + 1 edge lists
        labels = torch.where(first == column, second, first)
        inside.append((labels[edge_index[0]] == labels[edge_index[1]]).sum())
        degree_mass.append(labels.bincount(degree.double(), minlength=columns))
        sizes.append(labels.bincount(minlength=columns))
    ends = scores.new_full((), edge_index.shape[1], dtype=torch.float64)
    return PartitionSums(torch.stack(inside).double(), torch.stack(degree_mass), torch.stack(sizes).double(), ends)


def keep_communities(
    sums: PartitionSums,
    live: Tensor,
    min_size: float,
    modularity_weight: float,
    sparsity_weight: float,
    balance_weight: float,
) -> Tensor:
    r"""Which columns live on.

    Columns with fewer than ``min_size`` nodes die, the smallest first and at most half of those alive, so that the
    others can take their nodes. If all have as many, the one dies without which the loss of the hard partition,

    .. math::

        -a\, Q + b\, \frac{\sum_k \sqrt{n_k}}{\sqrt N} + c \Big( \frac{\sqrt K}{N} \|n\|_2 - 1 \Big)

    with K the number of live columns, falls most; none, if it falls without none of them. The largest column always
    lives on.

    Args:
        sums: Of the whole graph.
        live: Columns that are alive, shape ``(K,)``.
        min_size: Nodes that a community needs.
        modularity_weight: a.
        sparsity_weight: b.
        balance_weight: c.

    Returns:
        True where a column is alive afterwards, shape ``(K,)``.

    Example:
        >>> scores = torch.tensor([[9.0, 0.0, 1.0]] * 3 + [[0.0, 9.0, 1.0]] * 2)
        >>> live, edges = torch.ones(3, dtype=torch.bool), torch.tensor([[0, 1, 3, 4], [1, 0, 4, 3]])
        >>> sums = partition_sums(scores, live, edges, torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0]))
        >>> keep_communities(sums, live, 1, 1.0, 0.03, 0.1)
        tensor([ True,  True, False])
    """
    sizes = sums.sizes[-1]
    small = live & (sizes < min_size)
    small[sizes.argmax()] = False
    if small.any():
        return live & ~_smallest(sizes, small, at_most=max(1, int(live.sum()) // 2))
    nodes, left = sizes.sum(), live.sum()
    counts = torch.cat([(left - 1).expand(len(live)), left[None]]).clamp_min(1).to(sizes.dtype)
    share = sums.degree_mass / sums.degree_mass.sum(1, keepdim=True).clamp_min(1)
    modularity = sums.inside / sums.ends.clamp_min(1) - share.square().sum(1)
    sparsity = sums.sizes.sqrt().sum(1) / nodes.sqrt()
    balance = counts.sqrt() / nodes * sums.sizes.square().sum(1).sqrt() - 1
    loss = -modularity_weight * modularity + sparsity_weight * sparsity + balance_weight * balance
    gain = loss[-1] - loss[:-1].masked_fill(~live, torch.inf)
    worst = gain.argmax()
    keep = live.clone()
    keep[worst] = ~(gain[worst] > 0) | (left == 1)
    return keep


def _smallest(sizes: Tensor, among: Tensor, at_most: int) -> Tensor:
    """True for the smallest columns of those that are asked about."""
    order = sizes.masked_fill(~among, torch.inf).argsort(stable=True)[: min(at_most, int(among.sum()))]
    return torch.zeros_like(among).index_fill(0, order, True)
