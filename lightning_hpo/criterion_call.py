"""Standing in for the loss of somebody else's module, and giving it back."""

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["CriterionCall", "criterion_problems", "ignored_target", "logits_and_target", "one_number"]

Replacement = Callable[[Callable[..., Tensor], tuple[Any, ...], dict[str, Any]], Tensor]
_MISSING = object()
_OF_TASK = {"binary": ("BCEWithLogitsLoss",), "multiclass": ("CrossEntropyLoss",), "multilabel": ("BCEWithLogitsLoss",)}
_TASKS = {"BCEWithLogitsLoss": "'binary' or 'multilabel'", "CrossEntropyLoss": "'multiclass'"}


class CriterionCall:
    """Lets a function answer the calls of a module's loss.

    A loss that is a module stays in its place, with its weights, hooks and keys; only what is run when it is called
    changes. A loss that is a function is replaced on the instance. Copies, pickles and checkpoints that hold the loss
    (as a hyperparameter, say) hold it as it was. A compiled training step leaves the replacement out of its graph.

    Args:
        owner: The module that has it.
        name: Name of the attribute; dots lead further in.
        replacement: Called with the loss as it was, positional and keyword arguments.

    Example:
        >>> net = nn.Module()
        >>> net.criterion = nn.MSELoss()
        >>> call = CriterionCall(net, "criterion", lambda loss, args, kwargs: 2 * loss(*args, **kwargs))
        >>> import torch
        >>> net.criterion(torch.ones(1), torch.zeros(1))
        tensor(2.)
        >>> call.release()
        >>> net.criterion(torch.ones(1), torch.zeros(1))
        tensor(1.)
    """

    def __init__(self, owner: nn.Module, name: str, replacement: Replacement) -> None:
        loss = _find(owner, name)
        if isinstance(loss, nn.Module):
            self.holder, self.attribute, original = loss, "forward", loss.forward
        else:
            path, _, self.attribute = name.rpartition(".")
            self.holder, original = owner.get_submodule(path), loss
        self.before = vars(self.holder).get(self.attribute, _MISSING)
        setattr(self.holder, self.attribute, _Answer(original, torch.compiler.disable(replacement)))

    def release(self) -> None:
        """Puts back what was there."""
        if self.before is _MISSING:
            delattr(self.holder, self.attribute)
        else:
            setattr(self.holder, self.attribute, self.before)


class _Answer:
    """What is called in the loss's place."""

    def __init__(self, original: Callable[..., Tensor], replacement: Replacement) -> None:
        self.original, self.replacement = original, replacement

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.replacement(self.original, args, kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return partial, (self.original,)


def _find(owner: nn.Module, name: str) -> Any:
    path, _, leaf = name.rpartition(".")
    try:
        return getattr(owner.get_submodule(path), leaf, None)
    except AttributeError:
        return None


def criterion_problems(owner: nn.Module, name: str, task: str) -> list[str]:
    """Why calls of a loss cannot be answered by a metric of the task.

    Args:
        owner: The module that should have it.
        name: Name of the attribute.
        task: ``"binary"``, ``"multiclass"`` or ``"multilabel"``.

    Returns:
        Sentences; none if all is well.

    Example:
        >>> problems = criterion_problems(nn.Linear(2, 2), "criterion", "binary")
        >>> problems[0].partition(",")[0]
        '`Linear` has no `criterion`: compute the loss as `self.criterion(logits'
    """
    loss, kind = _find(owner, name), type(owner).__name__
    if loss is None:
        like = [n for n, part in owner.named_modules() if type(part).__name__.endswith("Loss")]
        like += [n for n, part in vars(owner).items() if callable(part) and ("loss" in n or "criterion" in n)]
        hint = f" Or name another: {', '.join(f'`criterion={n!r}`' for n in like)}." if like else ""
        usual = _OF_TASK[task][0]
        return [
            f"`{kind}` has no `{name}`: compute the loss as `self.{name}(logits, targets)`, where `self.{name}` is for "
            f"example `{usual}()`.{hint}"
        ]
    if not callable(loss):
        return [f"`{name}` of `{kind}` is a `{type(loss).__name__}`; it must be called with logits and targets."]
    found, problems = type(loss).__name__, []
    if getattr(loss, "reduction", "mean") != "mean":
        problems.append(f"`{name}` has `reduction={loss.reduction!r}`; a metric of a batch is one number: use 'mean'.")
    if found == "BCELoss":
        problems.append(f"`{name}` is a `BCELoss`, which takes probabilities; use `BCEWithLogitsLoss` and logits.")
    elif found in _TASKS and found not in _OF_TASK[task]:
        problems.append(f"`{name}` is a `{found}`: that is task={_TASKS[found]}, not {task!r}.")
    return problems


def ignored_target(owner: nn.Module, name: str) -> int | None:
    """The target that a loss leaves out, as far as can be seen.

    Args:
        owner: The module that has it.
        name: Name of the attribute.

    Returns:
        ``ignore_index`` of a cross-entropy, which may be a module, a function, or a ``partial`` of that.

    Example:
        >>> net = nn.Module()
        >>> net.criterion = nn.CrossEntropyLoss(ignore_index=7)
        >>> ignored_target(net, "criterion")
        7
    """
    loss = _find(owner, name)
    if isinstance(loss, partial) and "ignore_index" in loss.keywords:
        found = loss.keywords["ignore_index"]
    else:
        loss = loss.func if isinstance(loss, partial) else loss
        found = -100 if loss is F.cross_entropy else getattr(loss, "ignore_index", None)
    return found if isinstance(found, int) else None


def logits_and_target(
    loss: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Tensor, Tensor]:
    """What a loss was called with, given by position or by the names of its first two parameters.

    Args:
        loss: What was called.
        args: Positional arguments.
        kwargs: Keyword arguments.

    Returns:
        Logits and targets.

    Raises:
        ValueError: If there is anything else.

    Example:
        >>> logits_and_target(F.cross_entropy, (1,), {"target": 2})
        (1, 2)
    """
    names: tuple[str, ...] = ("input", "target")  # torch's
    if not kwargs.keys() <= set(names):
        names = tuple(inspect.signature(loss).parameters)[:2]
    given = [*args, *(kwargs[name] for name in names[len(args) :] if name in kwargs)]
    if len(given) != 2 or len(args) + len(kwargs) != 2:
        more = "".join(f", `{name}`" for name in kwargs)
        raise ValueError(f"the criterion takes logits and targets only, got {len(args)} by position{more}")
    return given[0], given[1]


def one_number(loss: Any) -> Tensor:
    """What a loss gave, if that can be mixed with something else.

    Args:
        loss: What it gave.

    Returns:
        The same, as a scalar.

    Raises:
        ValueError: If it is not a tensor of one number.

    Example:
        >>> one_number((torch.tensor(1.0), {}))
        Traceback (most recent call last):
        ValueError: the criterion must give a tensor of one number, got a `tuple`
    """
    if isinstance(loss, Tensor) and loss.numel() == 1:
        return loss.reshape(()) if loss.ndim else loss
    got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a `{type(loss).__name__}`"
    raise ValueError(f"the criterion must give a tensor of one number, got {got}")
