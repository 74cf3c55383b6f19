"""Where a run of MAID stands, in plain types."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from torch import Tensor

__all__ = ["MAIDState"]


@dataclass(frozen=True)
class MAIDState:
    r"""Everything that the next step depends on; a step makes a new one.

    Attributes:
        theta: Hyperparameters.
        x: Solutions of the lower problems at theta; shape ``(m, ...)`` where batched.
        q: The adjoint of the last hypergradient, like x; None before the first.
        error: What :math:`\|x_i - \hat x_i\|` is at most, shape ``(m,)``.
        eps: Accuracy :math:`\varepsilon` that lower solves are asked for.
        delta: Residual :math:`\delta` that the adjoint is asked for.
        alpha: First step size of the next line search; None before the first hypergradient.
        upper: Upper bound :math:`U_{up}` on :math:`f(\theta)`.
        lower: Lower bound :math:`U_{low}` on :math:`f(\theta)`.
        gradient_norm: :math:`\|z\|` of the last hypergradient; with bounds, of its projection.
        omega: The bound on its error, where it was formed.
        step_size: That of the last accepted step; 0 where none was accepted.
        status: ``"running"``, ``"stationary"`` (hypergradient and error bound are within the
            tolerance, or the former at the finest accuracy), ``"accuracy_floor"`` (no
            step can be certified at the finest accuracy that is allowed: convergence as far as it goes).
        iteration: Outer iterations.
        lower_iterations: Gradients of the lower losses that were taken, beyond the first of each solve.
        cg_iterations: Iterations of conjugate gradients.
        trials: Lower solves of line searches.
        failures: Line searches that accepted no step.
        reference: Of the non-monotone search, :math:`C`; None before the first step.
        reference_weight: Of the non-monotone search, :math:`Q`.
        previous: theta and z of the step before, for Barzilai-Borwein steps; None before the first.
        scale: The lower gradient's size at the beginning, from which the finest accuracy follows.
        estimates: Running maxima of Lipschitz constants that are not given.

    Example:
        >>> import torch
        >>> state = MAIDState(torch.zeros(2), torch.ones(3), error=torch.zeros(1), eps=0.1, delta=0.1)
        >>> again = MAIDState.from_state_dict(state.state_dict())
        >>> again.x, again.status, again.work
        (tensor([1., 1., 1.]), 'running', 0)
    """

    theta: Tensor
    x: Tensor
    error: Tensor
    eps: float
    delta: float
    q: Tensor | None = None
    alpha: float | None = None
    upper: float = float("inf")
    lower: float = float("-inf")
    gradient_norm: float = float("inf")
    omega: float | None = None
    step_size: float = 0.0
    status: str = "running"
    iteration: int = 0
    lower_iterations: int = 0
    cg_iterations: int = 0
    trials: int = 0
    failures: int = 0
    reference: float | None = None
    reference_weight: float = 1.0
    previous: tuple[Tensor, Tensor] | None = None
    scale: float = 0.0
    estimates: dict[str, float] = field(default_factory=dict)

    @property
    def work(self) -> int:
        """Lower iterations and those of conjugate gradients together."""
        return self.lower_iterations + self.cg_iterations

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers, strings and containers of these; the tensors are copies."""
        return {part.name: _copy(getattr(self, part.name)) for part in fields(self)}

    @classmethod
    def from_state_dict(cls, state_dict: Mapping[str, Any]) -> "MAIDState":
        """The state that :meth:`state_dict` was taken of, bit for bit.

        Args:
            state_dict: What it returned.

        Returns:
            The state.

        Raises:
            ValueError: If names are missing or unknown.
        """
        names = {part.name for part in fields(cls)}
        wrong = [f"`{n}` is missing" for n in sorted(names - set(state_dict))]
        wrong += [f"`{n}` is unknown" for n in sorted(set(state_dict) - names)]
        if wrong:
            raise ValueError(f"the state does not fit this version: {'; '.join(wrong)}")
        return cls(**{name: _copy(value) for name, value in state_dict.items()})


def _copy(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, (tuple, list)):
        return tuple(_copy(item) for item in value)
    return dict(value) if isinstance(value, Mapping) else value
