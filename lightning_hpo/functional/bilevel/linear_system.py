"""What the linear solvers share: their interface, their report and the scaling of the right-hand side."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

__all__ = ["LinearSolve", "Matvec", "SolveInfo", "System", "norm", "scale", "stop_at"]

Matvec = Callable[[Tensor], Tensor]


class SolveInfo(NamedTuple):
    r"""How a linear solve went; tensors without dimensions, so that nothing is read back to the host.

    Attributes:
        iterations: Iterations that changed the answer.
        residual: :math:`\|A x - b\| / \|b\|`, as the solver tracks it; 0 for :math:`b = 0`.
        converged: Whether the residual is within the tolerance; with ``tol=0``, a fixed number of iterations, whether
            it is below 1, that of :math:`x = 0`.
        negative_curvature: Whether :math:`p^\top A p \le 0` up to rounding was met, so that A is not positive definite.
    """

    iterations: Tensor
    residual: Tensor
    converged: Tensor
    negative_curvature: Tensor


class LinearSolve(Protocol):
    """Solves A x = b for a linear map that is known by its products; vectors are 1-D tensors of one dtype.

    Further settings of a solver are bound with :func:`functools.partial`.
    """

    def __call__(
        self,
        matvec: Matvec,
        b: Tensor,
        *,
        rmatvec: Matvec | None = ...,
        init: Tensor | None = ...,
        ridge: float = ...,
        tol: float = ...,
        maxiter: int = ...,
    ) -> tuple[Tensor, SolveInfo]:
        """The solution and how the solve went."""
        ...


def norm(vector: Tensor) -> Tensor:
    r"""Euclidean norm that neither underflows nor overflows in the squares.

    Args:
        vector: Shape ``(d,)``.

    Returns:
        A scalar.

    Example:
        >>> norm(torch.tensor([3e-30, 4e-30]))
        tensor(5.0000e-30)
    """
    low, high = torch.aminmax(vector)
    largest = torch.maximum(high, -low)
    return largest * torch.linalg.vector_norm(vector / torch.where(largest > 0, largest, torch.ones_like(largest)))


def stop_at(tol: float, dtype: torch.dtype) -> float:
    """Relative residual at which iterating stops: the tolerance, but not far below the rounding of the dtype.

    Args:
        tol: The tolerance asked for.
        dtype: Of the vectors.

    Returns:
        The larger of the tolerance and a hundredth of the machine precision.

    Example:
        >>> stop_at(1e-5, torch.float32)
        1e-05
    """
    return max(tol, 1e-2 * torch.finfo(dtype).eps)


@dataclass(frozen=True)
class System:
    r"""A linear system scaled to a right-hand side of unit length.

    Attributes:
        apply: The map :math:`p \mapsto A p + \mathrm{ridge}\, p`, detached.
        b: :math:`b / \|b\|`, or 0.
        length: :math:`\|b\|`.
        x: The first iterate, scaled alike.
        r: Its residual :math:`b - A x`.
        tol: The tolerance asked for.
    """

    apply: Matvec
    b: Tensor
    length: Tensor
    x: Tensor
    r: Tensor
    tol: float

    def finish(
        self, x: Tensor, residual: Tensor, iterations: Tensor, negative_curvature: Tensor | None = None
    ) -> tuple[Tensor, SolveInfo]:
        """The answer in the scale of the caller, and the report.

        Args:
            x: Scaled solution.
            residual: Its relative residual.
            iterations: How many were taken.
            negative_curvature: The flag; False where None.

        Returns:
            What a solver returns.
        """
        bound = max(self.tol, stop_at(self.tol, self.b.dtype)) if self.tol > 0 else 1.0
        flag = torch.zeros_like(residual, dtype=torch.bool) if negative_curvature is None else negative_curvature
        within = residual <= bound if self.tol > 0 else (residual < bound) | (self.length == 0)
        return x * self.length, SolveInfo(iterations, residual, within & ~flag, flag)


def checked(matvec: Matvec, name: str, size: int | None) -> Matvec:
    """A product that is detached and whose shape is checked.

    Args:
        matvec: The product.
        name: What to call it in an error.
        size: Length that its results must have, where it is known.

    Returns:
        The checked product.
    """

    def product(vector: Tensor) -> Tensor:
        result = matvec(vector)
        if result.dim() != 1 or (size is not None and len(result) != size):
            expected = "one-dimensional" if size is None else f"of shape ({size},)"
            raise ValueError(f"{name} must return a vector {expected}, got shape {tuple(result.shape)}")
        return result.detach()

    return product


def check_settings(b: Tensor, ridge: float, tol: float, maxiter: int) -> None:
    """Refuses wrong arguments of a solver, all at once.

    Args:
        b: Right-hand side.
        ridge: Shift of the diagonal.
        tol: Relative tolerance.
        maxiter: Largest number of iterations.

    Raises:
        TypeError: If ``b`` is not a floating tensor.
        ValueError: If an argument is out of range.
    """
    if not (isinstance(b, Tensor) and b.is_floating_point()):
        raise TypeError(f"b must be a floating point tensor, got {getattr(b, 'dtype', type(b).__name__)}")
    checks = {
        f"b must be a vector that is not empty, got shape {tuple(b.shape)}": b.dim() == 1 and b.numel() > 0,
        f"ridge must be at least 0, got {ridge!r}": ridge >= 0,
        f"tol must be at least 0, got {tol!r}": tol >= 0,
        f"maxiter must be at least 1, got {maxiter!r}": maxiter >= 1,
    }
    problems = [message for message, good in checks.items() if not good]
    if problems:
        raise ValueError("; ".join(problems))


def scale(
    matvec: Matvec, b: Tensor, *, init: Tensor | None, ridge: float, tol: float, maxiter: int, size: int | None = None
) -> System:
    r"""Checks a system and scales it to :math:`\|b\| = 1`; tiny right-hand sides would underflow in inner products.

    Args:
        matvec: The map :math:`p \mapsto A p`.
        b: Right-hand side, shape ``(m,)``.
        init: First iterate; 0 where None.
        ridge: Added to the diagonal.
        tol: Relative tolerance.
        maxiter: Largest number of iterations.
        size: Length of the solution; that of ``b`` where None.

    Returns:
        The scaled system.

    Raises:
        TypeError: If ``b`` is not a floating tensor.
        ValueError: If an argument is out of range or shapes do not fit.
    """
    check_settings(b, ridge, tol, maxiter)
    size = len(b) if size is None else size
    if init is not None and tuple(init.shape) != (size,):
        raise ValueError(f"init must have shape ({size},), got {tuple(init.shape)}")
    product = checked(matvec, "matvec", len(b))

    def apply(vector: Tensor) -> Tensor:
        return product(vector) + ridge * vector if ridge else product(vector)

    b = b.detach()
    length = norm(b)
    shrink = torch.where(length > 0, length, torch.ones_like(length))
    unit = b / shrink
    if init is None:
        return System(apply, unit, length, b.new_zeros(size), unit, tol)
    x = torch.where(length > 0, init.detach() / shrink, torch.zeros_like(init))
    return System(apply, unit, length, x, unit - apply(x), tol)
