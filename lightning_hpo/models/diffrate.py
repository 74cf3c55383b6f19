"""Token compression as a mixin: a door to the callback."""

from typing import Any

from lightning.pytorch import Callback

from lightning_hpo.callbacks.base import added
from lightning_hpo.callbacks.diffrate import TokenCompression

__all__ = ["TokenCompressionMixin"]


class TokenCompressionMixin:
    """Adds :class:`~lightning_hpo.TokenCompression` to a LightningModule; put it before the module's own class.

    Args:
        *args: Arguments of your module.
        compression_target: Budget: a fraction of the dense cost, multiply-accumulates or a string such as ``"2.9G"``.
        compression_args: Further arguments of the callback, by name.
        **kwargs: Arguments of your module.

    Example:
        >>> from lightning_hpo.demos import ImageClassifier
        >>> class CompressedClassifier(TokenCompressionMixin, ImageClassifier):
        ...     pass
        >>> module = CompressedClassifier("vit_tiny_patch16_224", num_classes=10, compression_target=0.6)
        >>> [type(callback).__name__ for callback in module.configure_callbacks()]
        ['TokenCompression']
    """

    def __init__(
        self,
        *args: Any,
        compression_target: float | int | str = 0.6,
        compression_args: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._compression = {"target": compression_target, **(compression_args or {})}

    def configure_callbacks(self) -> list[Callback]:
        """The module's own callbacks and this one."""
        return added(super().configure_callbacks(), TokenCompression(**self._compression))  # type: ignore[misc]
