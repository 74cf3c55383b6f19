"""Training on a metric as a mixin: a door to the callback."""

from typing import Any

from lightning.pytorch import Callback

from lightning_hpo.callbacks.anyloss import MetricObjective
from lightning_hpo.callbacks.base import added

__all__ = ["MetricObjectiveMixin"]


class MetricObjectiveMixin:
    """Adds :class:`~lightning_hpo.MetricObjective` to a LightningModule; put it before the module's own class.

    Args:
        *args: Arguments of your module.
        metric: What to train on.
        metric_args: Further arguments of the callback, by name.
        **kwargs: Arguments of your module.

    Raises:
        ValueError: If an argument of the callback is out of range, when the Trainer asks for callbacks.

    Example:
        >>> from lightning_hpo.demos import TabularClassifier
        >>> class BalancedClassifier(MetricObjectiveMixin, TabularClassifier):
        ...     pass
        >>> module = BalancedClassifier(inputs=30, metric="gmean", metric_args={"mix": 0.3})
        >>> [callback] = module.configure_callbacks()
        >>> callback.metric, callback.mix
        ('gmean', 0.3)
    """

    def __init__(
        self, *args: Any, metric: str = "f1", metric_args: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self._metric_args = {"metric": metric, **(metric_args or {})}

    def configure_callbacks(self) -> list[Callback]:
        """The module's own callbacks and this one."""
        return added(super().configure_callbacks(), MetricObjective(**self._metric_args))  # type: ignore[misc]
