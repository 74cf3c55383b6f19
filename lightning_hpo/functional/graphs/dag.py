r"""Soft communities of a graph: modularity on its edges, group sparsity of memberships, balance.

Everything that is a root or a square of sums is computed from :class:`CommunitySums`, which are sums over nodes and
edges: add them up over ranks first, and the result is that of the whole graph.
"""

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "CommunitySums",
    "balance",
    "community_sums",
    "effective_communities",
    "group_sparsity",
    "node_degree",
    "row_entropy",
    "soft_modularity",
]

_TINY = 1e-12  # inside a root: the slope of a column of zeros is zero, not infinite


class CommunitySums(NamedTuple):
    """Sums over the nodes and edges of a graph, of which every term of the loss is a function.

    Args:
        inside: Sum of P_u · P_v over all listed edges; a scalar.
        ends: Number of listed edges, 2m for an undirected graph; a scalar.
        degree_mass: Sum of d_i P_i over nodes, shape ``(K,)``.
        mass: Sum of P_i over nodes, shape ``(K,)``.
        squares: Sum of P_i² over nodes, shape ``(K,)``.
        nodes: Number of nodes; a scalar.
    """

    inside: Tensor
    ends: Tensor
    degree_mass: Tensor
    mass: Tensor
    squares: Tensor
    nodes: Tensor

    def modularity(self, degree_share: Tensor | None = None) -> Tensor:
        r"""Soft modularity; of a part without edges, what its nodes take away from that of the whole.

        .. math::

            Q = \frac{1}{2m} \sum_{(u,v)} P_u \cdot P_v - \Big\| \frac{d^\top P}{2m} \Big\|^2

        Args:
            degree_share: :math:`d^\top P / 2m` where it is known better than from these nodes; shape ``(K,)``.

        Returns:
            A scalar, at most 1.

        Example:
            >>> P = torch.eye(2).repeat_interleave(2, 0)
            >>> community_sums(P, torch.tensor([[0, 1, 2, 3], [1, 0, 3, 2]])).modularity()
            tensor(0.5000)
        """
        share = self.degree_share() if degree_share is None else degree_share
        return self.inside / self.ends.clamp_min(1) - share.square().sum()

    def degree_share(self) -> Tensor:
        r"""Each column's share of the edge ends, :math:`d^\top P / 2m`.

        Returns:
            Shape ``(K,)``; zeros where no node has an edge.

        Example:
            >>> community_sums(torch.eye(3), torch.tensor([[0, 1, 0, 2], [1, 0, 2, 0]])).degree_share()
            tensor([0.5000, 0.2500, 0.2500])
        """
        return self.degree_mass / self.degree_mass.sum().clamp_min(_TINY)

    def sparsity(self) -> Tensor:
        r"""Group sparsity, each column of P a group: :math:`\sum_k \|P_{:,k}\|_2`.

        Returns:
            A scalar between :math:`\sqrt N` and :math:`\sqrt{NK}`.

        Example:
            >>> community_sums(torch.eye(4), torch.zeros(2, 0, dtype=torch.long)).sparsity()
            tensor(4.)
        """
        return (self.squares + _TINY).sqrt().sum()

    def balance(self, communities: int | Tensor) -> Tensor:
        r"""How unequal the columns' masses are: :math:`\frac{\sqrt K}{N} \| \sum_i P_i \|_2 - 1`.

        Args:
            communities: Number K of columns that may still have mass.

        Returns:
            A scalar between 0 (all equal) and :math:`\sqrt K - 1` (all in one).

        Example:
            >>> community_sums(torch.eye(4), torch.zeros(2, 0, dtype=torch.long)).balance(4)
            tensor(0.)
        """
        root = torch.as_tensor(communities, device=self.mass.device).to(self.mass.dtype).sqrt()
        return root / self.nodes * (self.mass.square().sum() + _TINY).sqrt() - 1


def node_degree(edge_index: Tensor, num_nodes: int) -> Tensor:
    """How often each node is the first end of a listed edge.

    Args:
        edge_index: Shape ``(2, E)``.
        num_nodes: Number of nodes.

    Returns:
        Whole numbers, shape ``(num_nodes,)``.

    Example:
        >>> node_degree(torch.tensor([[0, 1], [1, 0]]), 3)
        tensor([1, 1, 0])
    """
    ones = torch.ones_like(edge_index[0])
    return edge_index.new_zeros(num_nodes).scatter_add_(0, edge_index[0], ones)


def community_sums(membership: Tensor, edge_index: Tensor, degree: Tensor | None = None) -> CommunitySums:
    """Adds up what all terms of the loss are made of, without a matrix of nodes by nodes.

    The adjacency has as its entry (i, j) how often the pair is listed. So list both directions of an undirected edge; a
    pair that is listed twice weighs twice; a loop that is listed once counts once towards the degree and the inside,
    where networkx, which reads it as both ends of an edge, counts it twice: list it twice for the same numbers.

    Args:
        membership: P, shape ``(N, K)``; each row adds up to 1. Half precision is added up in float32.
        edge_index: Shape ``(2, E)``, both directions of every edge.
        degree: Degrees in a larger graph of which these nodes are a part; otherwise counted here. Shape ``(N,)``.

    Returns:
        The sums, differentiable in ``membership``.

    Example:
        >>> sums = community_sums(torch.eye(2), torch.tensor([[0, 1], [1, 0]]))
        >>> sums.inside, sums.ends, sums.degree_mass
        (tensor(0.), tensor(2.), tensor([1., 1.]))
    """
    P = membership if membership.dtype == torch.float64 else membership.float()
    d = (node_degree(edge_index, len(P)) if degree is None else degree).to(P.dtype)
    return CommunitySums(
        inside=(P[edge_index[0]] * P[edge_index[1]]).sum(),
        ends=P.new_full((), edge_index.shape[1]),
        degree_mass=d @ P,
        mass=P.sum(0),
        squares=P.square().sum(0),
        nodes=P.new_full((), len(P)),
    )


def soft_modularity(membership: Tensor, edge_index: Tensor) -> Tensor:
    r"""Modularity of soft communities, on the edges only.

    Equals :math:`\operatorname{tr}(P^\top B P) / 2m` with Newman's :math:`B = A - d d^\top / 2m`, and the modularity of
    the partition where rows of P are one-hot.

    Args:
        membership: P, shape ``(N, K)``, rows add up to 1.
        edge_index: Shape ``(2, E)``, both directions of every edge; see :func:`community_sums` for loops and repeats.

    Returns:
        A scalar.

    Raises:
        ValueError: If shapes do not fit, an index is too large, or there are no edges.

    References:
        Newman, "Modularity and community structure in networks", PNAS 2006; Tsitsulin et al., "Graph Clustering with
        Graph Neural Networks", JMLR 2023, for the soft form.

    Example:
        >>> triangles = torch.tensor([[0, 1, 2, 3, 4, 5], [1, 2, 0, 4, 5, 3]])
        >>> edges = torch.cat([triangles, triangles.flip(0)], dim=1)
        >>> soft_modularity(torch.eye(2).repeat_interleave(3, 0), edges)
        tensor(0.5000)
    """
    problems = []
    if membership.ndim != 2 or not membership.is_floating_point():
        problems.append(f"membership must be floating point (N, K), got {tuple(membership.shape)} {membership.dtype}")
    if edge_index.ndim != 2 or edge_index.shape[0] != 2 or edge_index.is_floating_point():
        problems.append(f"edge_index must be integers (2, E), got {tuple(edge_index.shape)} {edge_index.dtype}")
    elif edge_index.shape[1] == 0:
        problems.append("there are no edges: modularity is undefined")
    elif int(edge_index.min()) < 0:
        problems.append(f"edge_index goes down to {int(edge_index.min())}")
    elif not problems and int(edge_index.max()) >= len(membership):
        problems.append(f"edge_index goes up to {int(edge_index.max())}, but there are {len(membership)} nodes")
    if problems:
        raise ValueError(f"soft_modularity: {'; '.join(problems)}")
    return community_sums(membership, edge_index).modularity()


def group_sparsity(membership: Tensor) -> Tensor:
    r"""Sum of the columns' norms, :math:`G(P) = \sum_k \|P_{:,k}\|_2`.

    Between :math:`\sqrt N`, where all rows are equal, and :math:`\sqrt{NK}`, where they are one-hot and columns are
    equally full. So it is least for memberships that say nothing: it prunes only beside other terms.

    Args:
        membership: P, shape ``(N, K)``, rows add up to 1.

    Returns:
        A scalar.

    Example:
        >>> group_sparsity(torch.eye(4)), group_sparsity(torch.full((4, 4), 0.25))
        (tensor(4.), tensor(2.))
    """
    return _of_nodes(membership).sparsity()


def effective_communities(membership: Tensor) -> Tensor:
    r"""How many communities the columns' norms amount to: :math:`G(P)^2 / N`, between 1 and K.

    It is k for k communities of equal size; never report it as the number of communities.

    Args:
        membership: P, shape ``(N, K)``, rows add up to 1.

    Returns:
        A scalar.

    Example:
        >>> effective_communities(torch.eye(4))
        tensor(4.)
    """
    return group_sparsity(membership).square() / len(membership)


def balance(membership: Tensor, communities: int | None = None) -> Tensor:
    r"""How unequal the columns' masses are: :math:`\frac{\sqrt K}{N} \| \sum_i P_i \|_2 - 1`.

    Args:
        membership: P, shape ``(N, K)``, rows add up to 1.
        communities: Number of columns that may still have mass; all by default.

    Returns:
        A scalar between 0 and :math:`\sqrt K - 1`.

    References:
        Tsitsulin et al., "Graph Clustering with Graph Neural Networks", JMLR 2023 (collapse regularisation).

    Example:
        >>> balance(torch.eye(4)), balance(torch.eye(4)[[0, 0, 0, 0]])
        (tensor(0.), tensor(1.))
    """
    return _of_nodes(membership).balance(membership.shape[1] if communities is None else communities)


def _of_nodes(membership: Tensor) -> CommunitySums:
    return community_sums(membership, torch.empty(2, 0, dtype=torch.long, device=membership.device))


def row_entropy(membership: Tensor) -> Tensor:
    r"""Mean entropy of the rows, in nats: 0 where they are one-hot, :math:`\log K` where they say nothing.

    Args:
        membership: P, shape ``(N, K)``, rows add up to 1.

    Returns:
        A scalar.

    Example:
        >>> row_entropy(torch.eye(3)), row_entropy(torch.full((3, 4), 0.25))
        (tensor(0.), tensor(1.3863))
    """
    return torch.special.entr(membership).sum(1).mean()
