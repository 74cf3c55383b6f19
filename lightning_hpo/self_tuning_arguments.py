"""What is wrong with the arguments of self-tuning networks."""

import math
from collections.abc import Mapping
from typing import Any

from lightning_hpo.functional.arguments import is_number, is_whole

__all__ = ["argument_problems"]


def argument_problems(of: Any) -> list[str]:
    """What is wrong with arguments of :class:`~lightning_hpo.SelfTuning`, as far as it can be known before a fit.

    Args:
        of: What has the arguments as attributes.

    Returns:
        One phrase a problem.

    Example:
        >>> from types import SimpleNamespace
        >>> names = ("train_steps", "valid_steps", "response_every", "response_parts", "lr", "max_change", "scale")
        >>> good = SimpleNamespace(mode="stn", encoding="identity", warmup_steps=0, entropy_weight=0, seed=0)
        >>> vars(good).update(dict.fromkeys(names, 1))
        >>> argument_problems(good)
        []
        >>> good.lr = -1
        >>> argument_problems(good)
        ['lr must be positive, got -1']
    """
    checks = {
        f"mode must be 'delta' or 'stn', got {of.mode!r}": of.mode in ("delta", "stn"),
        f"encoding must be 'cos_sin' or 'identity', got {of.encoding!r}": of.encoding in ("cos_sin", "identity"),
        f"train_steps must be a positive integer, got {of.train_steps!r}": is_whole(of.train_steps, 1),
        f"valid_steps must be a positive integer, got {of.valid_steps!r}": is_whole(of.valid_steps, 1),
        f"warmup_steps must be an integer of at least 0, got {of.warmup_steps!r}": is_whole(of.warmup_steps, 0),
        f"response_every must be a positive integer, got {of.response_every!r}": is_whole(of.response_every, 1),
        f"response_parts must be a positive integer, got {of.response_parts!r}": is_whole(of.response_parts, 1),
        f"response_every={of.response_every} is for mode='delta'": of.mode == "delta" or of.response_every == 1,
        f"lr must be positive, got {of.lr!r}": _positive(of.lr),
        f"max_change must be positive, got {of.max_change!r}": _positive(of.max_change, math.inf),
        f"entropy_weight must be at least 0, got {of.entropy_weight!r}": of.entropy_weight == 0
        or _positive(of.entropy_weight),
        f"seed must be an integer of at least 0, got {of.seed!r}": is_whole(of.seed, 0),
    }
    widths = of.scale.values() if isinstance(of.scale, Mapping) else [of.scale]
    checks[f"scale must be positive, got {of.scale!r}"] = all(map(_positive, widths))
    return [problem for problem, holds in checks.items() if not holds]


def _positive(value: Any, most: float = math.nextafter(math.inf, 0)) -> bool:
    return is_number(value) and 0 < value <= most
