"""The validation loader of a running fit, however far away its first validation is."""

from contextlib import suppress
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException

__all__ = ["validation_loader"]


def validation_loader(trainer: Trainer) -> Any:
    """The one validation loader of a fit.

    Args:
        trainer: A Trainer whose fit has begun.

    Returns:
        The loader.

    Raises:
        ValueError: If there is none or there are several; it says to give ``val_dataloader``.

    Example:
        >>> validation_loader(Trainer(accelerator="cpu", logger=False, enable_checkpointing=False))
        Traceback (most recent call last):
        ValueError: there are no validation data; give the fit a validation loader, or `val_dataloader`
    """
    if trainer.val_dataloaders is None:  # the first validation may be epochs away
        with suppress(MisconfigurationException, AttributeError):  # there is no loader at all, or no fit
            trainer.fit_loop.epoch_loop.val_loop.setup_data()
    loaders: Any = trainer.val_dataloaders
    loaders = list(loaders.values()) if isinstance(loaders, dict) else loaders
    found = loaders if isinstance(loaders, (list, tuple)) else [] if loaders is None else [loaders]
    if not found:
        why = "" if trainer.limit_val_batches else " (`limit_val_batches` is 0)"
        raise ValueError(f"there are no validation data{why}; give the fit a validation loader, or `val_dataloader`")
    if len(found) > 1:
        raise ValueError(f"there are {len(found)} validation loaders; give one as `val_dataloader`")
    return found[0]
