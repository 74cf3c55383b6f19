"""An ordinary image classifier around a timm model."""

import math
from typing import Any

import timm
import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics.classification import MulticlassAccuracy

__all__ = ["ImageClassifier", "warmup_cosine"]


def warmup_cosine(step: int, warmup_steps: int, total_steps: float) -> float:
    r"""Factor of the learning rate: linear warm-up, then half a cosine down to zero.

    .. math:: f(t) = \min\bigl(\tfrac{t + 1}{w + 1}, 1\bigr) \cdot
              \tfrac12\bigl(1 + \cos(\pi\,\tfrac{\max(t - w, 0)}{T - w})\bigr)

    Args:
        step: Optimizer steps taken so far, :math:`t`.
        warmup_steps: Length of the warm-up :math:`w`.
        total_steps: Length of training :math:`T`; infinite or negative means unknown, and then nothing decays.

    Returns:
        A factor between zero and one.

    Example:
        >>> [round(warmup_cosine(t, 2, 6), 2) for t in range(7)]
        [0.33, 0.67, 1.0, 0.85, 0.5, 0.15, 0.0]
    """
    warmup = min(1.0, (step + 1) / (warmup_steps + 1))
    if not 0 < total_steps < math.inf:
        return warmup
    done = min(1.0, max(0, step - warmup_steps) / max(1, total_steps - warmup_steps))
    return warmup * 0.5 * (1 + math.cos(math.pi * done))


class ImageClassifier(LightningModule):
    """Any timm model as a classifier, trained with AdamW and a cosine.

    The network sits at ``model``. Images of shape ``(batch, channels, height, width)`` become logits of shape
    ``(batch, num_classes)``. Logs ``train_loss``, ``val_loss``, ``val_acc``, ``test_loss`` and ``test_acc``.

    Args:
        model: Name of a timm model.
        num_classes: Number of classes.
        model_args: Further arguments of ``timm.create_model``, such as ``img_size``, ``in_chans`` or ``drop_rate``.
        lr: Highest learning rate.
        weight_decay: Decoupled weight decay of matrices; vectors (biases, norms) get none.
        label_smoothing: Share of the target spread over all classes while training.
        warmup_steps: Optimizer steps of linear warm-up.
        cosine: Whether the learning rate falls to zero over the length of training.

    Example:
        >>> import torch
        >>> small = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 16, "depth": 2, "num_heads": 2}
        >>> classifier = ImageClassifier("vit_tiny_patch16_224", model_args=small)
        >>> classifier(torch.zeros(3, 1, 8, 8)).shape
        torch.Size([3, 10])
    """

    def __init__(
        self,
        model: str = "vit_tiny_patch16_224",
        num_classes: int = 10,
        model_args: dict[str, Any] | None = None,
        lr: float = 1e-3,
        weight_decay: float = 0.05,
        label_smoothing: float = 0.0,
        warmup_steps: int = 0,
        cosine: bool = True,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model = timm.create_model(model, num_classes=num_classes, **(model_args or {}))
        self.lr = lr
        self.weight_decay = weight_decay
        self.label_smoothing = label_smoothing
        self.warmup_steps = warmup_steps
        self.cosine = cosine
        self.val_acc = MulticlassAccuracy(num_classes, average="micro")
        self.test_acc = MulticlassAccuracy(num_classes, average="micro")

    def forward(self, images: Tensor) -> Tensor:
        """Logits of a batch of images."""
        return self.model(images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy, with smoothed labels if asked for."""
        images, labels = batch
        loss = F.cross_entropy(self(images), labels, label_smoothing=self.label_smoothing)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Loss and accuracy on the held-out part of the training images."""
        self._evaluate(batch, "val", self.val_acc)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Loss and accuracy on the test images."""
        self._evaluate(batch, "test", self.test_acc)

    def _evaluate(self, batch: tuple[Tensor, Tensor], stage: str, accuracy: MulticlassAccuracy) -> None:
        images, labels = batch
        logits = self(images)
        accuracy(logits, labels)
        # Batches may differ in size; the weight makes the mean one over images.
        self.log(
            f"{stage}_loss", F.cross_entropy(logits, labels), prog_bar=True, batch_size=len(labels), sync_dist=True
        )
        self.log(f"{stage}_acc", accuracy, prog_bar=True, batch_size=len(labels))

    def predict_step(self, batch: Tensor | tuple[Tensor, Tensor] | list[Tensor], batch_idx: int) -> Tensor:
        """Probabilities of the classes."""
        images = batch if isinstance(batch, Tensor) else batch[0]
        return self(images).softmax(dim=-1)

    def configure_optimizers(self) -> Any:
        """AdamW, and a warm-up followed by a cosine, moved after every optimizer step, as far as they are asked for."""
        matrices = [p for p in self.parameters() if p.ndim > 1]
        vectors = [p for p in self.parameters() if p.ndim <= 1]
        groups = [{"params": matrices, "weight_decay": self.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=self.lr)
        if not (self.cosine or self.warmup_steps):
            return optimizer
        total = self.trainer.estimated_stepping_batches if self.cosine else math.inf
        schedule = LambdaLR(optimizer, lambda step: warmup_cosine(step, self.warmup_steps, total))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
