"""Standing in for the loss of somebody else's module, and giving it back."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

__all__ = ["CriterionCall", "criterion_problems", "logits_and_target"]

Replacement = Callable[[Callable[..., Tensor], tuple[Any, ...], dict[str, Any]], Tensor]
_MISSING = object()
_OF_TASK = {"binary": ("BCEWithLogitsLoss",), "multiclass": ("CrossEntropyLoss",), "multilabel": ("BCEWithLogitsLoss",)}
_TASKS = {"BCEWithLogitsLoss": "'binary' or 'multilabel'", "CrossEntropyLoss": "'multiclass'"}


class CriterionCall:
    """Lets a function answer the calls of a module's loss.

    A loss that is a module stays in its place, with its weights, hooks and keys; only what is run when it is called
    changes. A loss that is a function is replaced on the instance.

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

        def answer(*args: Any, **kwargs: Any) -> Tensor:
            return replacement(original, args, kwargs)

        setattr(self.holder, self.attribute, answer)

    def release(self) -> None:
        """Puts back what was there."""
        if self.before is _MISSING:
            delattr(self.holder, self.attribute)
        else:
            setattr(self.holder, self.attribute, self.before)


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


def logits_and_target(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """What a loss was called with, given as torch's losses name them or by position.

    Args:
        args: Positional arguments.
        kwargs: Keyword arguments.

    Returns:
        Logits and targets.

    Raises:
        ValueError: If there is anything else.

    Example:
        >>> logits_and_target((1, 2), {}) == logits_and_target((1,), {"target": 2})
        True
    """
    given = dict(zip(("input", "target"), args, strict=False)) | dict(kwargs)
    if len(args) > 2 or given.keys() != {"input", "target"}:
        raise ValueError(f"the criterion takes logits and targets only, got {len(args)} and {sorted(kwargs)}")
    return given["input"], given["target"]
