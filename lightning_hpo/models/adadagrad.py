"""Adaptive batch sizes as a mixin: a door to the callback."""

from typing import Any

from lightning.pytorch import Callback

from lightning_hpo.callbacks.adadagrad import AdaptiveBatchSize
from lightning_hpo.callbacks.base import added
from lightning_hpo.functional.batching.policies import NormTest
from lightning_hpo.functional.batching.policy import Policy

__all__ = ["AdaptiveBatchSizeMixin"]


class AdaptiveBatchSizeMixin:
    """Adds :class:`~lightning_hpo.AdaptiveBatchSize` to a LightningModule; put it before the module's own class.

    Override :meth:`batch_size_policy` where the policy depends on the module.

    Args:
        *args: Arguments of your module.
        batch_size_args: Arguments of the callback, by name.
        **kwargs: Arguments of your module.

    Example:
        >>> from lightning_hpo.demos import ImageClassifier
        >>> class Classifier(AdaptiveBatchSizeMixin, ImageClassifier):
        ...     def batch_size_policy(self):
        ...         return NormTest(eta=0.5, debias=False)
        >>> module = Classifier("vit_tiny_patch16_224", batch_size_args={"max_batch_size": 1024})
        >>> [callback] = module.configure_callbacks()
        >>> callback.policy, callback.max_batch_size
        (NormTest(eta=0.5, debias=False), 1024)
    """

    def __init__(self, *args: Any, batch_size_args: dict[str, Any] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._batch_size_args = dict(batch_size_args or {})

    def batch_size_policy(self) -> Policy:
        """What batch size the statistics of the gradient ask for."""
        return NormTest()

    def configure_callbacks(self) -> list[Callback]:
        """The module's own callbacks and this one."""
        arguments = {"policy": self.batch_size_policy(), **self._batch_size_args}
        return added(super().configure_callbacks(), AdaptiveBatchSize(**arguments))  # type: ignore[misc]
