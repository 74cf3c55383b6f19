"""Comparing states bit for bit, and modules piece by piece."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

__all__ = ["assert_same", "module_structure"]

_PLAIN = (bool, int, float, str, type(None))


def assert_same(first: Any, second: Any, what: str, rtol: float = 0.0, atol: float = 0.0) -> None:
    """Raises if two nested states differ; with the default tolerances a single bit is enough.

    Args:
        first: Tensors, numbers and strings in any nesting of mappings and sequences.
        second: What to compare with.
        what: Named in the message.
        rtol: Relative tolerance of floating-point values.
        atol: Absolute tolerance of floating-point values.

    Raises:
        AssertionError: Naming the entries that differ and by how much.

    Example:
        >>> assert_same({"w": torch.ones(2)}, {"w": torch.ones(2)}, "weights")
        >>> assert_same({"w": [1.0]}, {"w": [1.5]}, "weights")
        Traceback (most recent call last):
        AssertionError: weights differ:
        - ['w'][0]: 1.0 != 1.5
    """
    found = list(_differences(first, second, "", rtol, atol))
    if found:
        rest = [f"... and {len(found) - 10} more"] if len(found) > 10 else []
        raise AssertionError("\n- ".join([f"{what} differ:", *found[:10], *rest]))


def _differences(first: Any, second: Any, where: str, rtol: float, atol: float) -> Iterator[str]:
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        yield from _tensor_difference(first, second, where, rtol, atol)
    elif isinstance(first, Mapping) and isinstance(second, Mapping):
        yield from (f"{where}[{key!r}] is only in the first" for key in first if key not in second)
        yield from (f"{where}[{key!r}] is only in the second" for key in second if key not in first)
        for key in first:
            if key in second:
                yield from _differences(first[key], second[key], f"{where}[{key!r}]", rtol, atol)
    elif _is_sequence(first) and _is_sequence(second):
        if len(first) != len(second):
            yield f"{where}: {len(first)} entries != {len(second)} entries"
        for index, (a, b) in enumerate(zip(first, second, strict=False)):
            yield from _differences(a, b, f"{where}[{index}]", rtol, atol)
    elif isinstance(first, float) and isinstance(second, float):
        if not torch.isclose(torch.tensor(first).double(), torch.tensor(second).double(), rtol, atol, equal_nan=True):
            yield f"{where}: {first} != {second}"
    elif type(first) is not type(second) or first != second:
        yield f"{where}: {first!r} != {second!r}"


def _is_sequence(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def _tensor_difference(first: Tensor, second: Tensor, where: str, rtol: float, atol: float) -> Iterator[str]:
    if first.shape != second.shape or first.dtype != second.dtype:
        yield f"{where}: {tuple(first.shape)} {first.dtype} != {tuple(second.shape)} {second.dtype}"
    elif not first.is_floating_point():
        if not torch.equal(first, second):
            yield f"{where}: integers differ"
    elif not torch.allclose(first, second, rtol, atol, equal_nan=True):
        largest = (first.double() - second.double()).abs().max().item()
        yield f"{where}: largest difference {largest:.3g}"


def module_structure(module: nn.Module) -> dict[str, Any]:
    """What a method must leave as it found it: everything about a module but the values of its weights.

    Args:
        module: Any module, usually a LightningModule.

    Returns:
        For every submodule its identity, class, plain attributes, functions set on the instance and number of hooks;
        for every parameter its identity, whether it wants a gradient and its number of hooks. Compare two of them with
        :func:`assert_same`.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> before = module_structure(layer)
        >>> handle = layer.register_forward_hook(lambda *args: None)
        >>> assert_same(before, module_structure(layer), "modules")
        Traceback (most recent call last):
        AssertionError: modules differ:
        - ['modules']['']['hooks']['_forward_hooks']: 0 != 1
    """
    return {
        "modules": {name: _describe_module(part) for name, part in module.named_modules()},
        "parameters": {name: _describe_tensor(part) for name, part in module.named_parameters()},
        "buffers": {name: (tuple(part.shape), str(part.dtype)) for name, part in module.named_buffers()},
    }


def _describe_module(module: nn.Module) -> dict[str, Any]:
    attributes = {name: value for name, value in vars(module).items() if not _is_private_of_lightning(module, name)}
    return {
        "identity": id(module),
        "class": type(module).__qualname__,
        "forward of the class": id(type(module).forward),
        "attributes": {name: value for name, value in attributes.items() if type(value) in _PLAIN},
        "functions on the instance": {name: repr(f) for name, f in attributes.items() if callable(f)},
        "hooks": {name: len(v) for name, v in vars(module).items() if "_hooks" in name and isinstance(v, dict)},
    }


def _is_private_of_lightning(module: nn.Module, name: str) -> bool:
    return isinstance(module, LightningModule) and name.startswith("_")  # the Trainer leaves its notes there


def _describe_tensor(parameter: Tensor) -> dict[str, Any]:
    kinds = ("_backward_hooks", "_post_accumulate_grad_hooks")
    hooks = {kind: len(getattr(parameter, kind, None) or ()) for kind in kinds}
    return {"identity": id(parameter), "requires_grad": parameter.requires_grad, "hooks": hooks}
