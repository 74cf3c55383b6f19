"""Rates for dropout layers that a network has already, found by their names."""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from lightning_hpo.hyper import HyperparameterSet, Interval
from lightning_hpo.nn.self_tuning_regularisers import dropout_layers, tune_dropout

__all__ = ["tune_matching_dropout"]


def tune_matching_dropout(
    network: nn.Module, patterns: Sequence[str], known: HyperparameterSet | None = None
) -> tuple[HyperparameterSet, tune_dropout]:
    """Gives dropout layers rates that can be tuned; layers whose names match one pattern share one.

    Args:
        network: The network.
        patterns: Patterns of names, as in :mod:`fnmatch`; a layer belongs to the first that it matches.
        known: Rates for the same patterns, to go on with.

    Returns:
        The rates, from 0 to 0.95, under the patterns with slashes for dots, which names of parameters cannot have; and
        what undoes it.

    Raises:
        ValueError: If no layer matches a pattern.

    Example:
        >>> net = nn.Sequential(nn.Dropout(0.2), nn.Linear(2, 2), nn.Dropout(0.5))
        >>> rates, swapped = tune_matching_dropout(net, ["0", "*"])
        >>> {name: round(rates[name].item(), 2) for name in rates}
        {'0': 0.2, '*': 0.2}
        >>> swapped.undo()
    """
    layers = dropout_layers(network)
    chosen = {pattern: [name for name in layers if fnmatchcase(name, pattern)] for pattern in patterns}
    if empty := [pattern for pattern, names in chosen.items() if not names]:
        raise ValueError(f"no dropout layer is named like {empty}; there are {layers or 'none'}")
    keys = {pattern: pattern.replace(".", "/") for pattern in patterns}
    if known is None or list(known) != list(keys.values()):
        first = {p: _rate_of(network.get_submodule(names[0])) for p, names in chosen.items()}
        known = HyperparameterSet(**{keys[p]: Interval(rate, 0.0, 0.95) for p, rate in first.items()})
    rates = known
    getters: dict[str, Any] = {}
    for pattern, names in chosen.items():
        for name in names:
            getters.setdefault(name, lambda key=keys[pattern]: rates[key])
    return rates, tune_dropout(network, getters)


def _rate_of(layer: Any) -> float:
    return min(layer.p, 0.9) or 0.05
