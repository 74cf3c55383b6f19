"""The optimizer of a network's response to hyperparameters: like the user's, beside it."""

import inspect
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

__all__ = ["clip_as_user", "optimizer_like", "zero_if_useless"]


def optimizer_like(theirs: Optimizer, named: Iterable[tuple[str, nn.Parameter]]) -> Optimizer:
    """A second optimizer of the same kind, with the settings of the first one's first group.

    Args:
        theirs: The optimizer to be like.
        named: Parameters of a response; what is named ``gate`` is not decayed, since that would be decay of the
            response, whatever the hyperparameters.

    Returns:
        The optimizer.

    Raises:
        TypeError: If its class wants more than its settings.
        ValueError: If it refuses them.

    Example:
        >>> from lightning_hpo.nn.self_tuning_layers import LayerResponse
        >>> response = LayerResponse(torch.zeros(3, 2), None, inputs=4, fan_in=2)
        >>> theirs = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5, weight_decay=0.1)
        >>> ours = optimizer_like(theirs, response.named_parameters())
        >>> [(group["lr"], group["weight_decay"]) for group in ours.param_groups]
        [(0.5, 0.1), (0.5, 0.0)]
    """
    kind: Any = type(theirs)
    accepted = inspect.signature(kind).parameters
    first = theirs.param_groups[0]
    settings = {name: first.get(name, value) for name, value in theirs.defaults.items() if name in accepted}
    gates: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in named:
        (gates if name.endswith("gate") else rest).append(parameter)
    undecayed = {"weight_decay": 0.0} if "weight_decay" in settings else {}
    return kind([{"params": rest}, {"params": gates, **undecayed}], **settings)


def clip_as_user(trainer: Trainer, parameters: Sequence[Tensor]) -> None:
    """Clips gradients as the trainer clips those of the user's optimizer.

    Args:
        trainer: Its ``gradient_clip_val`` and ``gradient_clip_algorithm`` decide.
        parameters: Those whose gradients are clipped.

    Example:
        >>> from lightning_hpo.testing import tiny_trainer
        >>> weight = torch.zeros(2, requires_grad=True)
        >>> weight.grad = torch.tensor([3.0, 4.0])
        >>> clip_as_user(tiny_trainer(gradient_clip_val=1.0), [weight])
        >>> weight.grad
        tensor([0.6000, 0.8000])
    """
    if (most := trainer.gradient_clip_val) is not None:
        clip = nn.utils.clip_grad_value_ if trainer.gradient_clip_algorithm == "value" else nn.utils.clip_grad_norm_
        clip(parameters, most)


def zero_if_useless(parameters: Iterable[Tensor]) -> Tensor:
    """Sets all gradients to 0 if one of them is not finite.

    A linearised prediction may leave what a loss accepts (a logarithm, say) where the user's own does not.

    Args:
        parameters: At least one of them with a gradient.

    Returns:
        Whether it was so: a boolean scalar on their device, which nothing has waited for.

    Example:
        >>> weight = torch.zeros(2, requires_grad=True)
        >>> weight.grad = torch.tensor([1.0, float("nan")])
        >>> zero_if_useless([weight]), weight.grad
        (tensor(True), tensor([0., 0.]))
    """
    grads = [p.grad for p in parameters if p.grad is not None]
    useful = torch.stack([grad.isfinite().all() for grad in grads]).all()
    for grad in grads:
        grad.copy_(torch.where(useful, grad, torch.zeros_like(grad)))
    return ~useful
