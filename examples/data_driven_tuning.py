"""Tune the width of a graph's kernel once on past tasks, and use it on new ones.

A task is a graph of 200 handwritten digits, 30 of them labelled; edges are similarities of their pixels.
`python examples/data_driven_tuning.py` takes a minute; `--quick` shows nothing but that it runs.
"""

import sys
import warnings
from typing import Any

import torch
from lightning.pytorch import LightningModule
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_hpo import TaskDistributionTuner
from lightning_hpo.nn.kernel_adjacency import KernelAdjacency

LABELLED = 30


class GraphNetwork(LightningModule):
    """Two layers, each a mean over similar digits; how similar they must be is what is tuned."""

    def __init__(self, sigma: float) -> None:
        super().__init__()
        self.adjacency = KernelAdjacency("rbf", sigma)
        self.first, self.second = nn.Linear(64, 16, bias=False), nn.Linear(16, 10, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of all digits."""
        neighbours = self.adjacency(x)
        return neighbours @ self.second(torch.relu(neighbours @ self.first(x)))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy where labels are given."""
        return F.cross_entropy(self(batch[0])[:LABELLED], batch[1][:LABELLED])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Accuracy where they are not."""
        right = self(batch[0])[LABELLED:].argmax(1) == batch[1][LABELLED:]
        self.log("val_accuracy", right.double().mean())

    def configure_optimizers(self) -> Any:
        """Adam with weight decay."""
        return torch.optim.Adam(self.parameters(), lr=0.02, weight_decay=5e-4)


def graph(seed: int) -> tuple[DataLoader[Any], DataLoader[Any]]:
    """A task: one batch, all digits of the graph."""
    pixels, digits = load_digits(return_X_y=True)
    chosen = torch.randperm(len(digits), generator=torch.Generator().manual_seed(seed))[:200]
    data = TensorDataset(torch.tensor(pixels / 16, dtype=torch.float32)[chosen], torch.tensor(digits)[chosen])
    return DataLoader(data, batch_size=200), DataLoader(data, batch_size=200)


quick = "--quick" in sys.argv
warnings.filterwarnings("ignore", message=".*(does not have many workers|LeafSpec|makes all nodes alike).*")
past, fresh = range(2 if quick else 8), range(100, 102 if quick else 108)
tuner = TaskDistributionTuner(
    [graph(seed) for seed in past],
    GraphNetwork,
    "sigma",
    low=0.3,
    high=5.0,
    log=True,
    n_grid=3 if quick else 9,
    refine_steps=1 if quick else 4,
    held_out=[graph(seed) for seed in fresh],
    trainer_kwargs={"max_epochs": 2 if quick else 100, "accelerator": "cpu"},
)
result = tuner.run()
result.report("task_tuning")
sys.stdout.write(f"sigma for new graphs: {result.best:.2f}\n")
