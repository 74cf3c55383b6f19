"""The graphs of a fit: checked once, and mended where they need it."""

from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn

from lightning_hpo import distributed
from lightning_hpo.graph_data import Graph, graph_of, graph_problems, is_clean, ranks_differ, undirected

__all__ = ["CheckedGraphs"]


class CheckedGraphs:
    """Takes the batches of a fit apart. Those of its first epoch are checked, and tell whether later ones need mending.

    Args:
        in_channels: Number of attributes that there should be.
        max_communities: Number of communities that there may be.
        symmetrize: Whether to add missing directions of edges, after a warning; otherwise they are an error.

    Example:
        >>> from torch_geometric.data import Data
        >>> graphs = CheckedGraphs(2, 2, symmetrize=True)
        >>> graphs.take(Data(x=torch.eye(2).double(), edge_index=torch.tensor([[0, 1], [1, 0]])), torch.float32).x.dtype
        torch.float32
    """

    sharded = False  # whether ranks hold different parts; known from the first batch on

    def __init__(self, in_channels: int, max_communities: int, symmetrize: bool) -> None:
        self.in_channels, self.max_communities, self.symmetrize = in_channels, max_communities, symmetrize
        self.begin()

    def begin(self) -> None:
        """Forgets what was found out in an earlier fit."""
        self._first_batch = self._first_epoch = self._clean = True
        self._said: set[str] = set()

    def end_epoch(self) -> None:
        """Takes all graphs to be known."""
        self._first_epoch = False

    def take(self, batch: Any, dtype: torch.dtype) -> Graph:
        """A batch of the fit, with both directions of every edge, each once, and no loops.

        Args:
            batch: A graph.
            dtype: Of attributes.

        Returns:
            Its tensors.

        Raises:
            TypeError: If the batch is no graph.
            ValueError: If the graph is of no use; all reasons are given.
        """
        graph = graph_of(batch, dtype)
        if self._first_epoch:
            self._refuse(graph_problems(graph, self.in_channels, 0 if graph.is_part else self.max_communities))
            if batch.get("edge_weight") is not None:
                self._warn("weights of edges, `edge_weight`, are not used.")
            if batch.get("n_id") is not None and not graph.is_part:
                self._warn("parts of a graph are taken for whole ones; apply `GraphDegree()` to it first.")
            # A loader of parts lists the edges that it has drawn, in whatever direction.
            self._clean = self._clean and (graph.is_part or self._is_clean(graph))
        if self._first_batch:
            self.sharded = distributed.world_size() > 1 and (graph.is_part or ranks_differ(graph))
            self._first_batch = False
        return graph if self._clean else graph._replace(edge_index=undirected(graph.edge_index, len(graph.x)))

    def whole(self, data: Any, dtype: torch.dtype) -> Graph:
        """Any graph, whatever was found out about others; with edges like those of :meth:`take`.

        Args:
            data: A graph.
            dtype: In which attributes must be finite.

        Returns:
            Its tensors, with attributes as they are.

        Raises:
            TypeError: If this is no graph.
            ValueError: If the graph is of no use; all reasons are given.
        """
        graph = graph_of(data)
        self._refuse(graph_problems(graph_of(data, dtype), self.in_channels, 0))
        if not graph.is_part:
            self._is_clean(graph)
        return Graph(graph.x, undirected(graph.edge_index, len(graph.x)), None, None)

    def _is_clean(self, graph: Graph) -> bool:
        both_ways, once = is_clean(graph.edge_index, len(graph.x))
        if not both_ways and not self.symmetrize:
            self._refuse(["edges are directed; give both directions, or `symmetrize=True`"])
        if not both_ways:
            self._warn(
                "edges are directed; missing directions are added in every step. Apply "
                "`torch_geometric.transforms.ToUndirected()` once to save the time."
            )
        return both_ways and once

    def _refuse(self, problems: list[str]) -> None:
        if problems:
            raise ValueError(f"`DAGCommunityDetector`: {'; '.join(problems)}.")

    def _warn(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            rank_zero_warn(f"`DAGCommunityDetector`: {text}")
