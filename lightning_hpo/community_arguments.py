"""What a community detector's arguments must be."""

import math
from collections.abc import Mapping
from typing import Any

from lightning_hpo.functional.arguments import is_number, is_whole
from lightning_hpo.nn.dag import encoder_problems

__all__ = ["argument_problems"]

_WEIGHTS = ("reconstruction_weight", "modularity_weight", "sparsity_weight", "balance_weight", "weight_decay")


def argument_problems(chosen: Mapping[str, Any]) -> list[str]:
    """What is out of range.

    Args:
        chosen: Arguments of :class:`~lightning_hpo.DAGCommunityDetector`, by name.

    Returns:
        All problems, in words.

    Example:
        >>> from lightning_hpo.models.dag import DAGCommunityDetector
        >>> argument_problems(DAGCommunityDetector(4).hparams | {"mask_rate": 1.5, "gamma": 0.5})
        ['mask_rate must lie between 0 and 1, got 1.5', 'gamma must lie between 1 and inf, got 0.5']
    """
    encoder = ("in_channels", "hidden_channels", "heads", "num_layers", "dropout", "attention_dropout")
    seed, symmetrize = chosen["seed"], chosen["symmetrize"]
    found: list[str | None] = [
        *encoder_problems(**{name: chosen[name] for name in encoder}),
        *(_whole(chosen, name, least) for name, least in (("max_communities", 2), ("warmup_epochs", 0))),
        _whole(chosen, "ramp_epochs", 0),
        _between(chosen, "mask_rate", 0, 1, inclusive=False),
        _between(chosen, "replace_rate", 0, 1, inclusive=True),
        _between(chosen, "gamma", 1, math.inf, inclusive=True),
        _between(chosen, "sharpness", 0, math.inf, inclusive=False),
        _between(chosen, "lr", 0, math.inf, inclusive=False),
        _between(chosen, "average", 0, 1, inclusive=True),
        None if is_whole(seed) and seed < 2**32 else f"seed must be an integer from 0 to 2**32 - 1, got {seed!r}",
        None if isinstance(symmetrize, bool) else f"symmetrize must be true or false, got {symmetrize!r}",
        *(_between(chosen, name, 0, math.inf, inclusive=True) for name in _WEIGHTS),
    ]
    return [problem for problem in found if problem]


def _whole(chosen: Mapping[str, Any], name: str, least: int) -> str | None:
    value = chosen[name]
    return None if is_whole(value, least) else f"{name} must be an integer of at least {least}, got {value!r}"


def _between(chosen: Mapping[str, Any], name: str, low: float, high: float, inclusive: bool) -> str | None:
    value = chosen[name]
    fine = is_number(value) and (low <= value < high if inclusive else low < value < high)
    return None if fine else f"{name} must lie between {low:g} and {high:g}, got {value!r}"
