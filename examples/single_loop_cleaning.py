"""Find wrong labels in one loop: weights of examples take steps of fixed length while a recurrent network is trained.

`python examples/single_loop_cleaning.py` takes half a minute; `--quick` shows nothing but that it runs. The length of a
step falls along a cosine: a constant one leaves the noise of its last steps in the weights.
"""

import sys
import warnings

import torch
from lightning.pytorch import Trainer, seed_everything
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader, TensorDataset

from lightning_hpo import DataHyperCleaning, IndexedDataset


class RowReader(nn.Module):
    """Reads the eight rows of an image one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.RNN(8, 64, batch_first=True), nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of shape ``(batch, 10)``."""
        return self.head(self.rnn(images.view(-1, 8, 8))[0].amax(1))


seed_everything(0, verbose=False)
warnings.filterwarnings("ignore", message=".*(does not have many workers|LeafSpec|logging interval).*")
steps = 60 if "--quick" in sys.argv else 2000  # optimizer steps; every other one is followed by an outer step
pixels, digits = load_digits(return_X_y=True)
order = torch.randperm(len(digits))
images, labels = torch.tensor(pixels / 16, dtype=torch.float32)[order], torch.tensor(digits)[order]
wrong = torch.rand(900) < 0.4  # of the training labels
noisy = torch.where(wrong, (labels[:900] + torch.randint(1, 10, (900,))) % 10, labels[:900])
train = DataLoader(IndexedDataset(TensorDataset(images[:900], noisy)), batch_size=100, shuffle=True)
clean = DataLoader(TensorDataset(images[900:1200], labels[900:1200]), batch_size=100)

module = DataHyperCleaning(
    RowReader(),
    samples=900,
    lr=0.2,
    corrupted=wrong,  # for the figure at the end alone
    single_loop_args={
        "lr": 1.0,
        "z_lr": 0.02,
        "refine_steps": 20 if "--quick" in sys.argv else 200,
        "scheduler": lambda optimizer: CosineAnnealingLR(optimizer, steps // 2),
    },
)
trainer = Trainer(max_steps=steps, logger=False, enable_progress_bar=False, enable_checkpointing=False)
trainer.fit(module, train, clean)

right = (module.network(images[1200:]).argmax(1) == labels[1200:]).float().mean()
found = float(trainer.callback_metrics["weight_auc"])
sys.stdout.write(f"wrong labels found: AUC {found:.3f}; test accuracy {right:.1%}\n")
