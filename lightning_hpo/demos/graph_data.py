"""One graph a data module: made up, or citations between papers."""

from pathlib import Path
from typing import Literal

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch_geometric.data import Data
from torch_geometric.datasets import Planetoid
from torch_geometric.loader import DataLoader
from torch_geometric.transforms import Compose, NormalizeFeatures, SVDFeatureReduction
from torch_geometric.utils import stochastic_blockmodel_graph

__all__ = ["CitationDataModule", "PlantedPartitionDataModule", "planted_partition"]


def planted_partition(
    communities: int = 4,
    size: int = 50,
    p_in: float = 0.3,
    p_out: float = 0.02,
    attributes: int = 16,
    noise: float = 1.0,
    seed: int = 0,
) -> Data:
    """A graph of equal communities, whose nodes have attributes around a centre of their own.

    Args:
        communities: How many.
        size: Nodes of each.
        p_in: Probability of an edge inside.
        p_out: Probability of an edge between.
        attributes: Number of attributes; centres are drawn from a standard Gaussian.
        noise: Standard deviation around the centres.
        seed: Of the draws.

    Returns:
        ``x``, ``edge_index`` and the communities ``y``.

    Example:
        >>> planted_partition(3, size=10)
        Data(x=[30, 16], edge_index=[2, ...], y=[30])
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        y = torch.arange(communities).repeat_interleave(size)
        edges: Tensor = stochastic_blockmodel_graph(
            [size] * communities, torch.full((communities,) * 2, float(p_out)).fill_diagonal_(p_in)
        )
        x = torch.randn(communities, attributes)[y] + noise * torch.randn(len(y), attributes)
    return Data(x=x, edge_index=edges, y=y)


class _OneGraph(LightningDataModule):
    """The same graph for training, test and prediction: communities need no held-out part."""

    data: Data

    def train_dataloader(self) -> DataLoader:
        """The graph, a batch an epoch."""
        return DataLoader([self.data])

    def test_dataloader(self) -> DataLoader:
        """The same, with its labels."""
        return DataLoader([self.data])

    def predict_dataloader(self) -> DataLoader:
        """The same."""
        return DataLoader([self.data])


class PlantedPartitionDataModule(_OneGraph):
    """A graph that is made up; see :func:`planted_partition`.

    Args:
        communities: How many.
        size: Nodes of each.
        p_in: Probability of an edge inside.
        p_out: Probability of an edge between.
        attributes: Number of attributes.
        seed: Of the draws.

    Example:
        >>> PlantedPartitionDataModule(3, size=10).data.num_nodes
        30
    """

    def __init__(
        self,
        communities: int = 4,
        size: int = 50,
        p_in: float = 0.3,
        p_out: float = 0.02,
        attributes: int = 16,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.data = planted_partition(communities, size, p_in, p_out, attributes, seed=seed)


class CitationDataModule(_OneGraph):
    """Papers, the words in them and who cites whom: torch-geometric's Planetoid.

    Args:
        root: Folder of ``Cora/raw`` and the like; torch-geometric writes ``Cora/processed`` beside it, and downloads
            what is not there.
        name: Which of the three.
        components: Words are counted as shares of a paper, and reduced to this many components by a singular value
            decomposition, which a step costs a fraction of; 0 leaves them as they are.

    Raises:
        ValueError: If ``components`` is negative.
    """

    def __init__(self, root: str | Path, name: Literal["Cora", "CiteSeer", "PubMed"] = "Cora", components: int = 256):
        super().__init__()
        if components < 0:
            raise ValueError(f"components must be at least 0, got {components}")
        self.root, self.name, self.components = Path(root), name, components

    def prepare_data(self) -> None:
        """Processes the files, once on a machine."""
        Planetoid(str(self.root), self.name)

    def setup(self, stage: str = "fit") -> None:
        """Reads the graph."""
        reduce = [SVDFeatureReduction(self.components)] if self.components else []
        self.data = Compose([NormalizeFeatures(), *reduce])(Planetoid(str(self.root), self.name)[0])
