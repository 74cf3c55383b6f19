"""An image classifier whose weights follow how much labels are smoothed: all strengths in one training run."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_hpo.demos.image_classifier import ImageClassifier
from lightning_hpo.functional.bilevel.condition_spec import ConditionSpec
from lightning_hpo.nn.mip_hypernetworks import hypernetize

__all__ = ["ConditionedClassifier"]


class ConditionedClassifier(ImageClassifier):
    """A timm model hypernetized, with the label smoothing as its condition; train it with ``ConditionedTraining``.

    Args:
        include: Patterns of names of the parameters that follow the condition.
        hidden: Hidden sizes of the hyper-network.
        label_smoothing: The largest one; the condition goes from zero to it.
        kwargs: Further arguments of :class:`~lightning_hpo.demos.image_classifier.ImageClassifier`.

    Example:
        >>> small = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 16, "depth": 2, "num_heads": 2}
        >>> classifier = ConditionedClassifier(include=["head.*"], model_args=small)
        >>> classifier.model(torch.zeros(3, 1, 8, 8), gamma=torch.tensor([0.5])).shape
        torch.Size([3, 10])
    """

    def __init__(
        self,
        include: Sequence[str] = ("*",),
        hidden: Sequence[int] = (16, 128),
        label_smoothing: float = 0.5,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        spec = ConditionSpec().add("label_smoothing", 0.0, label_smoothing)
        self.model: Any = hypernetize(self.model, spec, include, hidden=hidden)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy with labels smoothed as the condition says."""
        images, labels = batch
        logs, share = self(images).log_softmax(1), self.model.condition["label_smoothing"]
        loss = ((share - 1) * logs.gather(1, labels[:, None])[:, 0] - share * logs.mean(1)).mean()
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW; weight decay of what does not depend on the condition alone."""
        return torch.optim.AdamW(self.model.parameter_groups(self.weight_decay), lr=self.lr)
