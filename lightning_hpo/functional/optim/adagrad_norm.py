"""AdaGrad with a single number for all parameters."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

__all__ = ["AdaGradNorm"]


class AdaGradNorm(Optimizer):
    r"""AdaGrad-Norm: the learning rate falls with the sum of all squared gradient norms so far.

    .. math::

        s_k = s_{k-1} + \|g_k\|^2, \qquad x_{k+1} = x_k - \frac{\eta}{\sqrt{s_k} + \epsilon} g_k

    There is one number :math:`s` for all parameters of all groups. Weight decay is that of ``torch.optim.Adagrad``: it
    adds ``weight_decay`` times the parameter to the gradient, and counts in the norm. Nothing is read to the host.
    Where a strategy shards parameters over ranks, the norm would be that of a shard: not for FSDP.

    Args:
        params: Parameters or groups of parameters; a group may have its own ``lr`` and ``weight_decay``.
        lr: Learning rate :math:`\eta`.
        eps: The :math:`\epsilon`.
        initial_accumulator: The first :math:`s_0`.
        weight_decay: L2 penalty.
        maximize: Whether to go up.

    Raises:
        ValueError: If an argument is negative, or both ``eps`` and ``initial_accumulator`` are 0; all are listed.

    References:
        Ward, Wu and Bottou, "AdaGrad Stepsizes: Sharp Convergence over Nonconvex Landscapes", 2019.

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> optimizer = AdaGradNorm([weight], lr=1.0, initial_accumulator=0.0)
        >>> weight.grad = torch.tensor([3.0, 4.0])
        >>> optimizer.step()
        >>> weight.data  # a step of length 1
        tensor([2.4000, 3.2000])
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1.0,
        eps: float = 1e-10,
        initial_accumulator: float = 1e-2,
        weight_decay: float = 0.0,
        maximize: bool = False,
    ) -> None:
        numbers = {"lr": lr, "eps": eps, "initial_accumulator": initial_accumulator, "weight_decay": weight_decay}
        problems = [f"{name} must not be negative, got {value!r}" for name, value in numbers.items() if not value >= 0]
        if eps == 0 and initial_accumulator == 0:
            problems.append("eps and initial_accumulator must not both be 0")
        if problems:
            raise ValueError(f"`AdaGradNorm`: {'; '.join(problems)}.")
        super().__init__(params, {"lr": lr, "eps": eps, "weight_decay": weight_decay, "maximize": maximize})
        wide = {torch.float64, torch.complex128} & {p.dtype for group in self.param_groups for p in group["params"]}
        first = torch.tensor(float(initial_accumulator), dtype=torch.float64 if wide else torch.float32)
        # Under a key that is no parameter, state is saved, loaded and moved as it is: never cast to a parameter's type.
        self.state["sum"] = first  # type: ignore[index]

    @property
    def accumulator(self) -> Tensor:
        """The sum of squared norms so far, a scalar; a step makes a new one."""
        return self.state["sum"]  # type: ignore[index]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Takes one step.

        Args:
            closure: Evaluates the loss and its gradients anew.

        Returns:
            What the closure returned.

        Raises:
            RuntimeError: For sparse gradients.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        parts = [(group, *_gradients(group)) for group in self.param_groups]
        if not (every := [gradient for _, _, gradients in parts for gradient in gradients]):
            return loss
        real = [torch.view_as_real(g) if g.is_complex() else g for g in every]
        norms = torch._foreach_norm(real, 2, dtype=self.accumulator.dtype)
        home = norms[0].device
        total = self.accumulator.to(home) + torch.stack([norm.to(home) for norm in norms]).square().sum()
        self.state["sum"] = total  # type: ignore[index]
        for group, parameters, gradients in parts:
            _move(parameters, gradients, -group["lr"] / (total.sqrt() + group["eps"]))
        return loss


def _gradients(group: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
    """Parameters that have a gradient, and the gradients with the group's direction and penalty."""
    parameters = [p for p in group["params"] if p.grad is not None]
    gradients = [p.grad for p in parameters]
    if any(gradient.is_sparse for gradient in gradients):
        raise RuntimeError("`AdaGradNorm` does not support sparse gradients; set `sparse=False`.")
    if group["maximize"]:
        gradients = [-gradient for gradient in gradients]
    if group["weight_decay"]:
        gradients = [g.add(p, alpha=group["weight_decay"]) for g, p in zip(gradients, parameters, strict=True)]
    return parameters, gradients


def _move(parameters: list[Tensor], gradients: list[Tensor], scale: Tensor) -> None:
    """Adds the scaled gradients, all of a device at once."""
    for device in {parameter.device for parameter in parameters}:
        pairs = [(p, g) for p, g in zip(parameters, gradients, strict=True) if p.device == device]
        moved, along = [p for p, _ in pairs], [g for _, g in pairs]
        torch._foreach_add_(moved, torch._foreach_mul(along, scale.to(device)))
