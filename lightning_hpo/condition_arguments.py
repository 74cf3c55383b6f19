"""What is wrong with the arguments of training under conditions, and what they stand for."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_hpo.functional.arguments import is_whole
from lightning_hpo.functional.bilevel.condition_spec import ConditionSpec
from lightning_hpo.nn.mip_hypernetworks import Hypernetized

__all__ = ["argument_problems", "choice_problems", "encoded_grid", "shared_parameters"]

_MOST = 1000  # conditions on a grid


def argument_problems(of: Any) -> list[str]:
    """What is wrong with arguments of :class:`~lightning_hpo.ConditionedTraining`, as far as is known before a fit.

    Args:
        of: What has the arguments as attributes.

    Returns:
        One phrase a problem.

    Example:
        >>> from types import SimpleNamespace
        >>> good = SimpleNamespace(sampling="uniform", grid=5, condition=None, refine_steps=0, lr=0.1, seed=0)
        >>> good.val_dataloader = good.val_loss = None
        >>> argument_problems(good)
        []
        >>> good.lr = 2
        >>> argument_problems(good)
        ['lr must be above 0 and at most 1, got 2']
    """
    listed = isinstance(of.grid, (list, tuple)) and bool(of.grid) and all(isinstance(at, Mapping) for at in of.grid)
    checks = {
        f"sampling must be 'stratified' or 'uniform', got {of.sampling!r}": of.sampling in ("stratified", "uniform"),
        f"grid must be an integer of at least 0, or a list of conditions, got {of.grid!r}": is_whole(of.grid) or listed,
        f"condition must be values by name, got {of.condition!r}": of.condition is None
        or isinstance(of.condition, Mapping),
        f"refine_steps must be an integer of at least 0, got {of.refine_steps!r}": is_whole(of.refine_steps),
        "refine_steps needs a grid to begin from": not of.refine_steps or bool(of.grid),
        f"lr must be above 0 and at most 1, got {of.lr!r}": isinstance(of.lr, (int, float)) and 0 < of.lr <= 1,
        "val_dataloader is what the choice is refined on; give refine_steps, too": of.val_dataloader is None
        or bool(of.refine_steps),
        f"val_loss must be a function or a name, got {of.val_loss!r}": of.val_loss is None
        or isinstance(of.val_loss, str)
        or callable(of.val_loss),
        "val_loss scores the grid; give one": of.val_loss is None or bool(of.grid),
        f"seed must be an integer from 0 to 2**31 - 1, got {of.seed!r}": is_whole(of.seed) and of.seed < 2**31,
    }
    return [problem for problem, holds in checks.items() if not holds]


def encoded_grid(
    spec: ConditionSpec, grid: int | Sequence[Mapping[str, float]], condition: Mapping[str, float] | None
) -> tuple[Tensor, list[str]]:
    """The conditions of a grid, and what is wrong with it and with one condition more.

    Args:
        spec: The conditions' names and ranges.
        grid: A number of values for each range, or a list of conditions.
        condition: Values by name.

    Returns:
        ``(n, k)`` on the CPU, and one sentence a problem.

    Example:
        >>> encoded_grid(ConditionSpec().add("x", 0.0, 2.0), [{"x": 0.5}, {"x": 3.0}], None)
        (tensor([]), ['in `grid`, `x` must be from 0 to 2, got 3.0.'])
    """
    rows, problems = torch.empty(0), []
    count = spec.combinations(grid) if isinstance(grid, int) else len(grid)
    if grid and count > _MOST:
        problems.append(f"the grid has {count} conditions; use fewer values each, or give a list.")
    elif grid and isinstance(grid, int):
        rows = spec.grid(grid)
    elif not isinstance(grid, int):
        found = [_encoded(spec, at, "grid", problems) for at in grid]
        rows = rows if problems else torch.stack([at for at in found if at is not None])
    if condition is not None:
        _encoded(spec, condition, "condition", problems)
    return rows, problems


def choice_problems(spec: ConditionSpec, chosen: Mapping[str, float]) -> list[str]:
    """Why a choice that was loaded cannot be used.

    Args:
        spec: The conditions' names and ranges.
        chosen: Values by name; none if nothing was chosen.

    Returns:
        One sentence, or none.

    Example:
        >>> choice_problems(ConditionSpec().add("x"), {"y": 0.5})
        ["the checkpoint chose ['y'], the module has ['x']."]
    """
    if not chosen:
        return []
    if set(chosen) != set(spec):
        return [f"the checkpoint chose {list(chosen)}, the module has {list(spec)}."]
    try:
        spec.encode(chosen)
    except ValueError as error:
        return [f"the checkpoint's choice does not fit the module: {error}."]
    return []


def shared_parameters(module: nn.Module) -> list[str]:
    """Parameters that a hypernetized part predicts, and that stand elsewhere as well, where they never change.

    Args:
        module: Any module.

    Returns:
        Their names elsewhere.

    Example:
        >>> from lightning_hpo.nn.mip_hypernetworks import hypernetize
        >>> net = nn.ModuleDict({"plain": nn.Linear(1, 1)})
        >>> net["hyper"] = hypernetize(net["plain"], 1, include=["bias"])
        >>> shared_parameters(net)
        ['plain.bias']
    """
    named = dict(module.named_modules(remove_duplicate=False))
    nets = {
        f"{name}.module." if name else "module.": net for name, net in named.items() if isinstance(net, Hypernetized)
    }
    predicted = {id(net.module.get_parameter(name)): net for net in nets.values() for name in net.hyper_network.shapes}
    return [
        name
        for name, parameter in module.named_parameters(remove_duplicate=False)
        if (net := predicted.get(id(parameter))) is not None
        and not any(name.startswith(prefix) and other is net for prefix, other in nets.items())
    ]


def _encoded(spec: ConditionSpec, values: Mapping[str, float], where: str, problems: list[str]) -> Tensor | None:
    try:
        gamma = spec.encode(values)
    except ValueError as error:
        problems.append(f"in `{where}`, {error}.")
        return None
    if gamma.ndim != 1:
        problems.append(f"in `{where}`, one number is needed for each name, got {dict(values)}.")
        return None
    return gamma
