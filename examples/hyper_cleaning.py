"""Find wrong labels: each example has a weight that follows the loss on a few examples that are right.

`python examples/hyper_cleaning.py` takes seconds; `--quick` shows nothing but that it runs.
"""

import sys
import warnings

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_hpo import BilevelMixin, HyperparameterSet, UnitInterval


class Cleaning(BilevelMixin, LightningModule):
    """Two losses: the network's parameters follow the inner one, the weights of the examples the outer one."""

    def __init__(self, examples: int) -> None:
        super().__init__(hypergradient_args={"every_n_steps": 5, "lr": 0.3})
        self.network = nn.Linear(64, 10)
        self.hypers = HyperparameterSet(weight=UnitInterval(torch.full((examples,), 0.5)))

    def inner_loss(self, batch: list[Tensor]) -> Tensor:
        """Cross-entropy, each example with its weight."""
        index, images, labels = batch
        losses = F.cross_entropy(self.network(images), labels, reduction="none")
        return (self.hypers["weight"][index] * losses).mean() + 1e-3 * self.network.weight.square().sum()

    def outer_loss(self, batch: list[Tensor]) -> Tensor:
        """Cross-entropy on examples that are known to be right."""
        return F.cross_entropy(self.network(batch[1]), batch[2])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD with momentum."""
        return torch.optim.SGD(self.network.parameters(), lr=0.2, momentum=0.9)


seed_everything(0, verbose=False)
warnings.filterwarnings("ignore", message=".*(does not have many workers|LeafSpec|logging interval).*")
pixels, digits = load_digits(return_X_y=True)
order = torch.randperm(len(digits))
images, labels = torch.tensor(pixels / 16, dtype=torch.float32)[order], torch.tensor(digits)[order]
wrong = torch.rand(1000) < 0.4  # of the training labels
noisy = torch.where(wrong, (labels[:1000] + torch.randint(1, 10, (1000,))) % 10, labels[:1000])
train = DataLoader(TensorDataset(torch.arange(1000), images[:1000], noisy), batch_size=200, shuffle=True)
clean = DataLoader(TensorDataset(torch.arange(300), images[1000:1300], labels[1000:1300]), batch_size=300)

module = Cleaning(examples=1000)
trainer = Trainer(max_epochs=2 if "--quick" in sys.argv else 200, logger=False, enable_progress_bar=False)
trainer.fit(module, train, clean)

found = roc_auc_score(wrong, 1 - module.hypers["weight"].detach())
right = (module.network(images[1300:]).argmax(1) == labels[1300:]).float().mean()
sys.stdout.write(f"wrong labels found: AUC {found:.3f}; test accuracy {right:.1%}\n")
