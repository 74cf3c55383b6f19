"""What finds communities beside ours: Louvain, Leiden where installed, and k-means, which is told their number."""

import time
from collections.abc import Callable, Iterator
from statistics import mean
from typing import Any

import networkx
import torch
from sklearn.cluster import KMeans
from torch import Tensor
from torch.nn import functional as F
from torch_geometric.data import Data
from torch_geometric.transforms import SIGN, AddSelfLoops
from torch_geometric.utils import to_networkx
from torchmetrics.functional.clustering import adjusted_rand_score, normalized_mutual_info_score

from lightning_hpo import ClusteringAccuracy
from lightning_hpo.functional.graphs.community_report import label_free_report

__all__ = ["clustering_scores", "peer_rows"]

HOPS = 8


def clustering_scores(labels: Tensor, data: Data) -> dict[str, float]:
    """Accuracy, NMI and ARI against the labels, modularity, and how many there are."""
    accuracy = ClusteringAccuracy()
    accuracy.update(labels, data.y)
    report = label_free_report(labels, data.edge_index, data.x)
    return {
        "communities": float(report.n_communities),
        "acc": float(accuracy.compute()),
        "nmi": float(normalized_mutual_info_score(labels, data.y)),
        "ari": float(adjusted_rand_score(labels, data.y)),
        "modularity": report.modularity,
    }


def louvain(data: Data, seed: int) -> Tensor:
    """Of networkx; edges alone."""
    graph = to_networkx(data, to_undirected=True)
    return _labels(networkx.community.louvain_communities(graph, seed=seed), data)


def leiden(data: Data, seed: int) -> Tensor:
    """Of leidenalg, by modularity; edges alone."""
    import igraph  # an extra, `communities`
    import leidenalg

    one_way = data.edge_index[:, data.edge_index[0] < data.edge_index[1]]
    graph = igraph.Graph(n=data.num_nodes, edges=one_way.T.tolist())
    return _labels(leidenalg.find_partition(graph, leidenalg.ModularityVertexPartition, seed=seed), data)


def k_means(data: Data, seed: int) -> Tensor:
    """On attributes alone, told the number of classes."""
    found = KMeans(int(data.y.max()) + 1, n_init=10, random_state=seed).fit_predict(data.x.numpy())
    return torch.as_tensor(found, dtype=torch.long)


def smoothed_k_means(data: Data, seed: int) -> Tensor:
    """On directions of attributes smoothed over the neighbourhood, told the number of classes."""
    smooth = SIGN(HOPS)(AddSelfLoops()(data.clone()))[f"x{HOPS}"]
    return k_means(Data(x=F.normalize(smooth, dim=1), y=data.y), seed)


PEERS: dict[str, Callable[[Data, int], Tensor]] = {
    "Louvain": louvain,
    "Leiden": leiden,
    "k-means, K given": k_means,
    f"k-means on {HOPS}-hop attributes, K given": smoothed_k_means,
}


def peer_rows(data: Data, quick: bool) -> Iterator[dict[str, Any]]:
    """Means over three seeds."""
    for name, method in PEERS.items():
        seeds = range(1 if quick else 3)
        begun = time.process_time()
        try:
            scores = [clustering_scores(method(data, seed), data) for seed in seeds]
        except ImportError:
            continue
        seconds = (time.process_time() - begun) / len(seeds)
        found = sorted({int(score["communities"]) for score in scores})
        accuracies = [score["acc"] for score in scores]
        yield {
            "method": name,
            "seeds": len(seeds),
            "communities": str(found[0]) if len(found) == 1 else f"{found[0]} to {found[-1]}",
            **{k: round(mean(score[k] for score in scores), 4) for k in ("acc", "nmi", "ari", "modularity")},
            "range": f"{min(accuracies):.3f} to {max(accuracies):.3f}",
            "seconds": round(seconds, 2),
        }


def _labels(parts: Any, data: Data) -> Tensor:
    labels = torch.empty(data.num_nodes, dtype=torch.long)
    for number, part in enumerate(parts):
        labels[torch.as_tensor(list(part))] = number
    return labels
