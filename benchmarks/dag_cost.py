"""What modularity and its gradient cost on edges, and in torch-geometric's dense `DMoNPooling`."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from common import alternate, peak_memory
from torch import Tensor
from torch_geometric.nn import DMoNPooling
from torch_geometric.utils import stochastic_blockmodel_graph, to_dense_adj

from lightning_hpo.functional.graphs.dag import community_sums
from lightning_hpo.nn.dag import AffiliationReadout

__all__ = ["cost_rows"]

WIDTH, COLUMNS = 64, 32


def cost_rows(quick: bool) -> list[dict[str, Any]]:
    """Memory with the adjacency, and time of a pass there and back."""
    sizes = {"400 nodes": (400, 4)} if quick else {"2,700 nodes": (2700, 4), "20,000 nodes": (20_000, 10)}
    return [row for name, (nodes, degree) in sizes.items() for row in _rows(name, nodes, degree, quick)]


def _rows(name: str, nodes: int, degree: int, quick: bool) -> Iterator[dict[str, Any]]:
    torch.manual_seed(0)
    blocks = 10
    p_in, p_out = 0.8 * degree * blocks / nodes, 0.2 * degree * blocks / nodes / (blocks - 1)
    edges = stochastic_blockmodel_graph(
        [nodes // blocks] * blocks, torch.full((blocks, blocks), p_out).fill_diagonal_(p_in)
    )
    x = torch.randn(nodes, WIDTH)
    readout, dense = AffiliationReadout(WIDTH, COLUMNS), DMoNPooling(WIDTH, COLUMNS)
    adjacency = to_dense_adj(edges, max_num_nodes=nodes)
    ways: dict[str, tuple[Callable[[], Any], Tensor]] = {
        "DMoNPooling, dense": (lambda: _dense_step(dense, x, adjacency), adjacency),
        "on edges": (lambda: _sparse_step(readout, x, edges), edges),
    }
    timings = alternate({way: step for way, (step, _) in ways.items()}, rounds=1 if quick else 3)
    first: float | None = None
    for way, (step, kept) in ways.items():
        megabytes = (peak_memory(step) + kept.nbytes) / 2**20
        first = megabytes if first is None else first
        yield {
            "graph": f"{name}, {edges.shape[1] // 2:,} edges",
            "way": way,
            "mb": round(megabytes, 2),
            "memory": round(megabytes / first, 4),
            "ms": round(1e3 * timings[way].median, 2),
            "time": round(timings[way].ratio, 4),
        }


def _dense_step(pooling: DMoNPooling, x: Tensor, adjacency: Tensor) -> None:
    _, _, _, spectral, _, cluster = pooling(x, adjacency)
    (spectral + 0.1 * cluster).backward()


def _sparse_step(readout: AffiliationReadout, x: Tensor, edges: Tensor) -> None:
    sums = community_sums(readout(x), edges)
    (-sums.modularity() + 0.1 * sums.balance(COLUMNS)).backward()
