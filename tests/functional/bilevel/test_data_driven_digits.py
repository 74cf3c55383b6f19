"""One width of a kernel, tuned over graphs of handwritten digits, serves graphs that it has not seen."""

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from lightning_hpo.functional.bilevel.data_driven_tuning import tune_over_tasks
from lightning_hpo.nn.kernel_adjacency import KernelAdjacency

pytestmark = pytest.mark.slow

SIGMAS = [0.3, 0.5, 0.7, 0.9, 1.2, 1.6, 2.2, 3.0, 5.0]
LABELLED = 30


def accuracy(seed: int, adjacency: KernelAdjacency | None) -> float:
    """A graph network of 200 digits, 30 of them labelled, on the others."""
    found = load_digits()
    chosen = torch.randperm(len(found.data), generator=torch.Generator().manual_seed(seed))[:200]
    x, y = torch.tensor(found.data).float()[chosen] / 16, torch.tensor(found.target)[chosen]
    a = torch.eye(200) if adjacency is None else adjacency(x)
    torch.manual_seed(seed)
    weights = [nn.init.xavier_uniform_(torch.empty(shape)).requires_grad_() for shape in ((64, 16), (16, 10))]
    optimizer = torch.optim.Adam(weights, lr=0.02, weight_decay=5e-4)
    smoothed = a @ x

    def logits() -> Tensor:
        return a @ torch.relu(smoothed @ weights[0]) @ weights[1]

    for _ in range(100):
        optimizer.zero_grad()
        F.cross_entropy(logits()[:LABELLED], y[:LABELLED]).backward()
        optimizer.step()
    return (logits()[LABELLED:].argmax(1) == y[LABELLED:]).double().mean().item()


def test_the_width_of_an_rbf_kernel() -> None:
    fresh = range(100, 112)
    tuning = tune_over_tasks(
        range(12), lambda seed, sigma: accuracy(seed, KernelAdjacency("rbf", sigma)), SIGMAS, log=True, held_out=fresh
    )
    assert 1.0 <= tuning.best <= 1.35
    assert tuning.held_out.mean() >= 0.75
    assert tuning.held_out.mean() >= sum(accuracy(seed, None) for seed in fresh) / 12 + 0.03
    assert tuning.leave_one_out().mean() >= 0.74
    assert tuning.means[-1] < 0.2  # too wide a kernel makes all nodes alike
