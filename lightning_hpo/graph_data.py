"""Graphs of torch-geometric: checked, with both directions of every edge, and parts that know the whole."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch_geometric.data import Data
from torch_geometric.transforms import BaseTransform
from torch_geometric.utils import coalesce, degree, is_undirected, remove_self_loops, to_undirected

from lightning_hpo import distributed

__all__ = [
    "Graph",
    "GraphDegree",
    "graph_of",
    "graph_problems",
    "is_clean",
    "ranks_differ",
    "undirected",
]

_ADVICE = "take them from the structure with `torch_geometric.transforms.LocalDegreeProfile()`"


class Graph(NamedTuple):
    """What a step needs of a batch.

    Args:
        x: Attributes, shape ``(N, F)``.
        edge_index: Shape ``(2, E)``.
        degree: Degrees in the whole graph, shape ``(N,)``, where this is a part of it.
        nodes: Nodes of the whole graph, where this is a part of it.
    """

    x: Tensor
    edge_index: Tensor
    degree: Tensor | None
    nodes: int | None

    @property
    def is_part(self) -> bool:
        """Whether this is a part of a larger graph."""
        return self.degree is not None


class GraphDegree(BaseTransform):
    """Lets every part that a loader takes out of a graph know the whole: degrees, and the number of nodes.

    Apply it to the graph before giving it to ``NeighborLoader``, ``ClusterLoader``, ``RandomNodeLoader`` or another
    loader of torch-geometric that cuts a graph into parts. Adds ``graph_degree`` (of nodes) and ``graph_nodes``.

    Raises:
        ValueError: If the graph has no edges, or they are not both directions of each, once.

    Example:
        >>> data = GraphDegree()(Data(x=torch.eye(3), edge_index=torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]])))
        >>> data.graph_degree, data.graph_nodes
        (tensor([1., 2., 1.]), 3)
    """

    def forward(self, data: Data) -> Data:
        """Adds what parts need.

        Args:
            data: The whole graph, with both directions of every edge, each once, and no loops.

        Returns:
            The same object.
        """
        if problems := _edge_problems(data.edge_index, data.num_nodes):
            raise ValueError(f"`GraphDegree`: {'; '.join(problems)}.")
        if not all(is_clean(data.edge_index, data.num_nodes)):  # nobody can tell from a part
            raise ValueError(
                "`GraphDegree`: edges are directed, repeated or loops; apply `RemoveSelfLoops()` and `ToUndirected()` "
                "of `torch_geometric.transforms` first."
            )
        data.graph_degree = degree(data.edge_index[0], data.num_nodes)
        data.graph_nodes = data.num_nodes
        return data


def graph_of(batch: Any, dtype: torch.dtype | None = None) -> Graph:
    """What a step needs of a batch, as it is.

    Args:
        batch: A ``torch_geometric.data.Data``, or a ``Batch`` of them; of parts, those of one graph.
        dtype: Of attributes that are floating-point numbers; their own by default.

    Returns:
        Its tensors; nothing is checked.

    Raises:
        TypeError: If the batch is no graph.

    Example:
        >>> graph_of(Data(x=torch.eye(2), edge_index=torch.tensor([[0, 1], [1, 0]]))).is_part
        False
    """
    if not isinstance(batch, Data):
        raise TypeError(
            f"a batch must be a `torch_geometric.data.Data`, got `{type(batch).__name__}`: use "
            "`torch_geometric.loader.DataLoader([data])`, or a loader that samples nodes"
        )
    x, nodes = batch.x, batch.get("graph_nodes")
    x = x.to(dtype) if dtype is not None and isinstance(x, Tensor) and x.is_floating_point() else x
    nodes = None if nodes is None else int(torch.as_tensor(nodes).flatten()[0])
    return Graph(x, batch.edge_index, batch.get("graph_degree"), nodes)


def graph_problems(graph: Graph, in_channels: int, max_communities: int) -> list[str]:
    """What is wrong with a graph, in words.

    Args:
        graph: The graph.
        in_channels: Number of attributes that there should be.
        max_communities: Number of communities that there may be.

    Returns:
        All problems.

    Example:
        >>> graph_problems(Graph(torch.eye(2), torch.tensor([[0], [5]]), None, None), 2, 2)
        ['edge_index goes up to 5, but there are 2 nodes']
    """
    x, edges = graph.x, graph.edge_index
    if x is None:
        return [f"there are no attributes `x`; {_ADVICE}"]
    if not isinstance(x, Tensor) or x.layout != torch.strided or x.ndim != 2 or not x.is_floating_point():
        found = f"{tuple(x.shape)} {x.dtype} {x.layout}" if isinstance(x, Tensor) else type(x).__name__
        return [f"attributes `x` must be a dense floating-point matrix (nodes, attributes), got {found}"]
    problems = _edge_problems(edges, len(x), graph.is_part)
    if max_communities > len(x):
        problems.append(f"max_communities must be at most the number of nodes N = {len(x)}, got {max_communities}")
    if x.shape[1] != in_channels:
        problems.append(f"in_channels is {in_channels}, but nodes have {x.shape[1]} attributes")
    if bad := int((~x.isfinite()).any(1).sum()):
        problems.append(f"attributes are not finite in {bad} of {len(x)} nodes; mend them, or {_ADVICE}")
    elif not x.any() and not graph.is_part:
        problems.append(f"attributes are all zero in all {len(x)} nodes; {_ADVICE}")
    return problems


def _edge_problems(edges: Any, nodes: int, is_part: bool = False) -> list[str]:
    if edges is None:
        return ["there is no `edge_index`"]
    if not isinstance(edges, Tensor) or edges.ndim != 2 or edges.shape[0] != 2 or edges.is_floating_point():
        found = f"{tuple(edges.shape)} {edges.dtype}" if isinstance(edges, Tensor) else type(edges).__name__
        return [f"edge_index must be whole numbers of shape (2, edges), got {found}"]
    if bool((edges[0] == edges[1]).all()):  # none at all, or loops
        return [] if is_part else ["the graph has no edges (m = 0): modularity is undefined"]
    if int(edges.max()) >= nodes:
        return [f"edge_index goes up to {int(edges.max())}, but there are {nodes} nodes"]
    return [f"edge_index goes down to {int(edges.min())}"] if int(edges.min()) < 0 else []


def is_clean(edge_index: Tensor, num_nodes: int) -> tuple[bool, bool]:
    """Whether both directions of every edge are listed, and whether each is listed once and none is a loop.

    Args:
        edge_index: Shape ``(2, E)``.
        num_nodes: Number of nodes.

    Returns:
        Both answers.

    Example:
        >>> is_clean(torch.tensor([[0, 0], [1, 1]]), 2)
        (False, False)
    """
    without_loops, _ = remove_self_loops(edge_index)
    once = coalesce(without_loops, num_nodes=num_nodes)
    return bool(is_undirected(once, num_nodes=num_nodes)), once.shape == edge_index.shape


def undirected(edge_index: Tensor, num_nodes: int) -> Tensor:
    """Both directions of every edge, each once, and no loops.

    Args:
        edge_index: Shape ``(2, E)``.
        num_nodes: Number of nodes.

    Returns:
        Sorted, shape ``(2, E')``.

    Example:
        >>> undirected(torch.tensor([[0, 0, 1], [1, 1, 1]]), 2)
        tensor([[0, 1],
                [1, 0]])
    """
    without_loops, _ = remove_self_loops(edge_index)
    return to_undirected(without_loops, num_nodes=num_nodes)


def ranks_differ(graph: Graph) -> bool:
    """Whether ranks hold different graphs, told from their size and sums; the same answer everywhere.

    Args:
        graph: This rank's graph.

    Returns:
        False without other ranks.

    Example:
        >>> ranks_differ(Graph(torch.eye(2), torch.tensor([[0, 1], [1, 0]]), None, None))
        False
    """
    facts = [graph.edge_index.double().sum(), graph.x.double().sum(), graph.x.new_tensor(len(graph.x)).double()]
    everywhere = distributed.gather(torch.stack(facts))
    return bool((everywhere != everywhere[0]).any())
