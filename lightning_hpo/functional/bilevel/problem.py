"""A bilevel problem, and what every estimator of its hypergradient begins and ends with."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_hpo.functional.bilevel.linear_system import SolveInfo
from lightning_hpo.functional.bilevel.trees import TreeLayout
from lightning_hpo.functional.losses import scalar_of

__all__ = [
    "HypergradientResult",
    "Loss",
    "Partial",
    "Point",
    "Problem",
    "Residual",
    "Tensors",
    "UnreachedError",
    "hypergradient",
    "identity",
    "require_reached",
    "scalar",
    "wide_dtype",
]

Tensors = dict[str, Tensor]
Loss = Callable[[Tensors, Tensors], Tensor]
Residual = Callable[[Tensors, Tensors], Tensors]
Partial = Mapping[str, Tensor | None]


def identity(vector: Tensor) -> Tensor:
    """The mean over one rank.

    Args:
        vector: Any tensor.

    Returns:
        The same tensor.

    Example:
        >>> identity(torch.ones(1))
        tensor([1.])
    """
    return vector


@dataclass(frozen=True)
class Problem:
    r"""Hyperparameters :math:`\theta` and parameters :math:`w` that answer to them.

    .. math::

        \min_\theta L_{val}(w^*(\theta), \theta), \qquad F(w^*(\theta), \theta) = 0, \qquad F = \nabla_w L_{tr}

    All functions are pure functions of two dicts of tensors, and always the same: one batch, and dropout off or with
    the same random numbers in every call.

    Args:
        train_loss: :math:`L_{tr}(w, \theta)`, a scalar.
        val_loss: :math:`L_{val}(w, \theta)`, a scalar.
        reduce: Mean over ranks of one flat vector. With it, ranks that each hold a part of the batches get the answer
            of one process that holds all, if the parts are of equal size.
        residual: :math:`F(w, \theta)` in the structure of the parameters, where it is not the gradient of the training
            loss. Its mean over ranks is used, so it must be affine in what differs between them.
        outputs: The network's outputs :math:`z(w, \theta)`, a tensor; needed for Gauss-Newton products alone.
        output_loss: :math:`\ell(z, w, \theta)` with :math:`L_{tr}(w, \theta) = \ell(z(w, \theta), w, \theta)`, convex
            in :math:`(z, w)`; needed for Gauss-Newton products alone.

    Raises:
        ValueError: If only one of ``outputs`` and ``output_loss`` is given, or both together with ``residual``.

    Example:
        >>> problem = Problem(
        ...     train_loss=lambda w, h: ((w["w"] - 3) ** 2 + h["decay"] * w["w"] ** 2).sum(),
        ...     val_loss=lambda w, h: ((w["w"] - 2) ** 2).sum(),
        ... )
        >>> problem.val_loss({"w": torch.tensor([1.0])}, {"decay": torch.tensor(0.1)})
        tensor(1.)
    """

    train_loss: Loss
    val_loss: Loss
    reduce: Callable[[Tensor], Tensor] = identity
    residual: Residual | None = None
    outputs: Loss | None = None
    output_loss: Callable[[Tensor, Tensors, Tensors], Tensor] | None = None

    def __post_init__(self) -> None:
        if (self.outputs is None) != (self.output_loss is None):
            raise ValueError("outputs and output_loss belong together: give both or neither")
        if self.outputs is not None and self.residual is not None:
            raise ValueError("outputs describe the training loss, but residual replaces its gradient: give only one")


class HypergradientResult(NamedTuple):
    """A hypergradient.

    Attributes:
        gradients: By the names of the hyperparameters, in their shapes and dtypes.
        info: How the linear solve went, where there was one.
        state: What the next call may be given, of plain types: dicts, lists, numbers and tensors.
    """

    gradients: Tensors
    info: SolveInfo | None
    state: dict[str, Any]


class Point:
    """Parameters and hyperparameters to differentiate at: leaves of a new graph on the memory of the caller's tensors.

    Args:
        params: Parameters by name; they are read, never written.
        hparams: Hyperparameters by name.

    Raises:
        TypeError: If something is not a floating point tensor; all are listed.
        ValueError: If there are no parameters or no hyperparameters.

    Example:
        >>> point = Point({"w": torch.ones(2)}, {"decay": torch.tensor(0.1)})
        >>> point.vector({"w": torch.tensor([3.0, 4.0])})
        tensor([3., 4.])
    """

    def __init__(self, params: Mapping[str, Tensor], hparams: Mapping[str, Tensor]) -> None:
        missing = [kind for kind, given in (("params", params), ("hparams", hparams)) if not given]
        if missing:
            raise ValueError(f"{' and '.join(missing)} must not be empty")
        wrong = [
            f"'{name}' is {value.dtype if isinstance(value, Tensor) else type(value).__name__}"
            for name, value in [*params.items(), *hparams.items()]
            if not (isinstance(value, Tensor) and value.is_floating_point())
        ]
        if wrong:
            raise TypeError(f"params and hparams must be floating point tensors: {', '.join(wrong)}")
        self.params = {name: value.detach().requires_grad_() for name, value in params.items()}
        self.hparams = {name: value.detach().requires_grad_() for name, value in hparams.items()}
        self.layout = TreeLayout(self.params)
        self.dtype = wide_dtype(self.params)

    def vector(self, params: Mapping[str, Tensor | None]) -> Tensor:
        """A structure like the parameters as one vector in at least float32; zeros for what is None."""
        filled = {
            name: torch.zeros_like(like) if params[name] is None else params[name] for name, like in self.params.items()
        }
        return self.layout.ravel(filled, dtype=self.dtype)

    def unravel(self, vector: Tensor) -> Tensors:
        """A vector as parameters, in their dtypes."""
        return self.layout.unravel(vector)

    def pull_back(
        self,
        outputs: Tensor,
        cotangent: Tensor | None = None,
        *,
        params: bool = True,
        hparams: bool = True,
        keep: bool = False,
        required: str = "",
    ) -> tuple[Tensor, Partial]:
        """The product of a cotangent with the Jacobian of outputs: a vector for the parameters, and hyperparameters.

        Args:
            outputs: A scalar or a vector with a graph down to this point.
            cotangent: Of its shape; 1 where None.
            params: Whether the parameters are wanted; otherwise they get zeros.
            hparams: Whether the hyperparameters are wanted; otherwise they get None.
            keep: Whether the graph is used again.
            required: What to call the outputs in an error if no parameter reaches them; no error where empty.

        Returns:
            The vector, and by name the parts for the hyperparameters, None where they do not reach the outputs.

        Raises:
            ValueError: If parameters are wanted and required, and none reaches the outputs.
        """
        inputs = [*(self.params.values() if params else ()), *(self.hparams.values() if hparams else ())]
        found: tuple[Tensor | None, ...] = (None,) * len(inputs)
        if inputs and outputs.requires_grad:
            found = torch.autograd.grad(outputs, inputs, cotangent, retain_graph=keep, allow_unused=True)
        first, rest = found[: len(found) - len(self.hparams) * hparams], found[len(self.params) * params :]
        if required and params and all(part is None for part in first):
            raise ValueError(f"{required} does not depend on params: is it computed from the dict that it is given?")
        by_hyper = dict(zip(self.hparams, rest, strict=True)) if hparams else dict.fromkeys(self.hparams)
        if not params:
            return torch.zeros((), dtype=self.dtype, device=outputs.device).expand(self.layout.size), by_hyper
        return self.vector(dict(zip(self.params, first, strict=True))), by_hyper

    def gradient(self, loss: Loss, name: str, *, params: bool = True, hparams: bool = True) -> tuple[Tensor, Partial]:
        """Gradients of a loss at this point: a vector for the parameters, and by name for the hyperparameters.

        Args:
            loss: The loss.
            name: What to call it in an error.
            params: As for :meth:`pull_back`.
            hparams: As for :meth:`pull_back`.

        Returns:
            As for :meth:`pull_back`.

        Raises:
            ValueError: If the loss is not a scalar, or does not depend on the parameters.
        """
        with torch.enable_grad():
            value = scalar(loss(self.params, self.hparams), name)
        return self.pull_back(value, params=params, hparams=hparams, required=name)


def hypergradient(
    problem: Problem,
    point: Point,
    *parts: Partial,
    info: SolveInfo | None = None,
    state: dict[str, Any] | None = None,
) -> HypergradientResult:
    """Adds parts of a hypergradient and averages the sum over ranks, in one message.

    Args:
        problem: The problem.
        point: Where the parts were taken.
        parts: By the names of the hyperparameters, None where one is not reached.
        info: How the linear solve went.
        state: What to hand to the next call.

    Returns:
        The hypergradient.

    Raises:
        ValueError: If a hyperparameter is reached by no part on any rank.
    """
    names = list(point.hparams)
    given = {name: [part[name] for part in parts] for name in names}
    found = {name: [value for value in values if value is not None] for name, values in given.items()}
    layout, dtype = TreeLayout(point.hparams), wide_dtype(point.hparams)
    sums = {name: sum(found[name], torch.zeros_like(value)) for name, value in point.hparams.items()}
    flat = layout.ravel(sums, dtype=dtype).detach()
    # One flag a name travels along, so that ranks agree on what is reached; it is read only where one is missing.
    reached = problem.reduce(torch.cat([flat, *(flat.new_full((1,), float(bool(found[name]))) for name in names)]))
    if not all(found.values()):
        flags = dict(zip(names, reached[layout.size :].tolist(), strict=True))
        require_reached([name for name in names if not flags[name]])
    return HypergradientResult(layout.unravel(reached[: layout.size]), info, state or {})


class UnreachedError(ValueError):
    """Neither loss depends on a hyperparameter, so that its hypergradient is zero for no reason."""


def require_reached(missing: list[str]) -> None:
    """Refuses hyperparameters that neither loss depends on.

    Args:
        missing: Their names.

    Raises:
        UnreachedError: If there is one.
    """
    if missing:
        raise UnreachedError(
            "; ".join(f"zero hypergradient: '{name}' is not reached by either loss" for name in missing)
        )


def scalar(value: Tensor, name: str) -> Tensor:
    """Refuses what is not a scalar with a graph.

    Args:
        value: A loss.
        name: What to call it.

    Returns:
        The value.

    Raises:
        ValueError: If it is no scalar tensor, or has no graph.
    """
    value = scalar_of(value, name)
    if not value.requires_grad:
        raise ValueError(f"{name} depends on neither params nor hparams: is it computed from the dicts it is given?")
    return value


def wide_dtype(tensors: Mapping[str, Tensor]) -> torch.dtype:
    """The dtype that holds all tensors, at least float32.

    Args:
        tensors: Tensors by name.

    Returns:
        The dtype.

    Example:
        >>> wide_dtype({"w": torch.zeros(1, dtype=torch.bfloat16)})
        torch.float32
    """
    dtype = torch.float32
    for tensor in tensors.values():
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype
