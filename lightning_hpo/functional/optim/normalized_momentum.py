"""Momentum with steps of fixed length."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

__all__ = ["Normalize", "NormalizedMomentum", "step_factors"]

Normalize = Literal["global", "per_group", False]


def step_factors(groups: Sequence[Sequence[Tensor]], normalize: Normalize, min_norm: float) -> list[Tensor]:
    r"""What each group of momenta is multiplied by to get a step of length 1: :math:`1 / \max(\|m\|, m_0)`.

    Args:
        groups: Momenta by groups.
        normalize: ``"global"`` for one norm of all groups, ``"per_group"`` for one each, False for factors of 1.
        min_norm: The :math:`m_0`, positive: shorter momenta give shorter steps.

    Returns:
        A scalar for each group, on the device of its first tensor.

    Example:
        >>> groups = [[torch.tensor([3.0])], [torch.tensor([4.0])]]
        >>> step_factors(groups, "global", 1e-10), step_factors(groups, "per_group", 1e-10)
        ([tensor(0.2000), tensor(0.2000)], [tensor(0.3333), tensor(0.2500)])
    """
    wide = max((m.dtype for group in groups for m in group), key=lambda kind: torch.finfo(kind).bits)
    homes = [group[0].device for group in groups]
    if normalize is False:
        return [torch.ones((), dtype=wide, device=home) for home in homes]

    def length(parts: Sequence[Tensor], home: torch.device) -> Tensor:
        return torch.linalg.vector_norm(torch.stack([part.to(home, wide) for part in parts]))

    norms = [length(torch._foreach_norm(list(group)), home) for group, home in zip(groups, homes, strict=True)]
    if normalize == "global":
        total = length(norms, homes[0])
        norms = [total.to(home) for home in homes]
    return [1 / norm.clamp(min=min_norm) for norm in norms]


class NormalizedMomentum(Optimizer):
    r"""Steps of length :math:`\eta` along a moving average of gradients, however long those are.

    .. math::

        m_k = \beta m_{k-1} + (1 - \beta) g_k, \qquad x_{k+1} = x_k - \eta \frac{m_k}{\max(\|m_k\|, m_0)}

    The norm is over all parameters of all groups, or of each group by itself, so multiplying the loss by a constant
    changes nothing. A constant learning rate never gets closer than about :math:`\eta`: let a schedule lower it.
    Momenta have at least 32 bits. Nothing is read to the host.

    Args:
        params: Parameters or groups of parameters; a group may have its own ``lr`` and ``momentum``.
        lr: Length of a step, :math:`\eta`.
        momentum: Weight of the past, :math:`\beta`.
        normalize: ``"global"``: one norm; ``"per_group"``: one a group, for groups of different scales; False: none,
            which is SGD along the average.
        min_norm: The :math:`m_0`: where the momentum is shorter, so is the step.
        maximize: Whether to go up.

    Raises:
        ValueError: If an argument is out of range; all are listed.

    References:
        Hao, Gong and Liu, "Bilevel Optimization under Unbounded Smoothness", ICLR 2024, alg. 1; Cutkosky and Mehta,
        "Momentum Improves Normalized SGD", ICML 2020.

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> optimizer = NormalizedMomentum([weight], lr=1.0)
        >>> weight.grad = torch.tensor([300.0, 400.0])
        >>> optimizer.step()
        >>> weight.data  # a step of length 1
        tensor([2.4000, 3.2000])
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 0.01,
        momentum: float = 0.9,
        normalize: Normalize = "global",
        min_norm: float = 1e-10,
        maximize: bool = False,
    ) -> None:
        problems = momentum_problems(lr, momentum, normalize, min_norm)
        if problems:
            raise ValueError(f"`NormalizedMomentum`: {'; '.join(problems)}.")
        self.normalize, self.min_norm = normalize, min_norm
        super().__init__(params, {"lr": lr, "momentum": momentum, "maximize": maximize})

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
        moved = [(group, [p for p in group["params"] if p.grad is not None]) for group in self.param_groups]
        moved = [(group, parameters) for group, parameters in moved if parameters]
        if not moved:
            return loss
        momenta = [[self._momentum(p, group) for p in parameters] for group, parameters in moved]
        factors = step_factors(momenta, self.normalize, self.min_norm)
        for (group, parameters), average, factor in zip(moved, momenta, factors, strict=True):
            for parameter, m in zip(parameters, average, strict=True):
                parameter.sub_((group["lr"] * factor.to(m.device) * m).to(parameter.dtype))
        return loss

    def _momentum(self, parameter: Tensor, group: dict[str, Any]) -> Tensor:
        """The moving average with the present gradient in it."""
        gradient = parameter.grad
        if gradient is None or gradient.is_sparse:
            raise RuntimeError("`NormalizedMomentum` does not support sparse gradients; set `sparse=False`.")
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            wide = torch.promote_types(parameter.dtype, torch.float32)
            state["momentum_buffer"] = torch.zeros_like(parameter, dtype=wide, memory_format=torch.preserve_format)
        m: Tensor = state["momentum_buffer"]
        sign = -1.0 if group["maximize"] else 1.0
        m.mul_(group["momentum"]).add_(gradient.to(m.dtype), alpha=sign * (1 - group["momentum"]))
        return m


def momentum_problems(lr: float | Tensor, momentum: float, normalize: object, min_norm: float) -> list[str]:
    """What is wrong with the settings, in words.

    Args:
        lr: Length of a step.
        momentum: Weight of the past.
        normalize: What the norm is over.
        min_norm: Shortest momentum that gives a whole step.

    Returns:
        A sentence for each problem.

    Example:
        >>> momentum_problems(0.1, 1.0, "global", 1e-10)
        ['momentum must be in [0, 1), got 1.0']
    """
    checks = {
        f"lr must be positive, got {lr!r}": bool(0 < lr < float("inf")),
        f"momentum must be in [0, 1), got {momentum!r}": 0 <= momentum < 1,
        f"normalize must be 'global', 'per_group' or False, got {normalize!r}": normalize in ("global", "per_group")
        or normalize is False,
        f"min_norm must be positive, got {min_norm!r}": 0 < min_norm < float("inf"),
    }
    return [problem for problem, holds in checks.items() if not holds]
