"""The implicit function theorem on vectors: both products with the Jacobian of a root, and its place in autograd."""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_hpo.functional.bilevel.linear_system import LinearSolve, SolveInfo
from lightning_hpo.functional.bilevel.transforms import Constant, both_products

__all__ = ["ImplicitFunction", "attach", "check_solve"]


def check_solve(info: SolveInfo, strict: bool = False, stacklevel: int = 1) -> None:
    """Warns of a linear solve that did not converge, with its residual; reads the report back to the host.

    Args:
        info: Report of the solver.
        strict: Whether to raise instead.
        stacklevel: Of the warning, counted from the caller.

    Raises:
        RuntimeError: If the residual is not finite, or with ``strict`` if the solve did not converge.

    Example:
        >>> from lightning_hpo.functional.bilevel.conjugate_gradient import cg
        >>> _, info = cg(lambda p: torch.tensor([1.0, 100.0]) * p, torch.ones(2), maxiter=1)
        >>> check_solve(info, strict=True)
        Traceback (most recent call last):
        RuntimeError: a linear solve did not converge: relative residual 9.8e-01 after 1 ...
    """
    iterations, residual, converged, negative = torch.stack([entry.double() for entry in info]).tolist()
    if converged:
        return
    met = ", stopped by negative curvature (the system is not positive definite)" if negative else ""
    message = (
        f"a linear solve did not converge: relative residual {residual:.1e} after {iterations:.0f} "
        f"iterations{met}; a singular or badly conditioned system needs a ridge or solve=normal_cg, otherwise raise "
        "maxiter or tol"
    )
    if strict or not math.isfinite(residual):
        raise RuntimeError(message)
    warnings.warn(message, stacklevel=stacklevel + 1)


@dataclass(frozen=True)
class ImplicitFunction:
    r"""The function :math:`x^\star(\theta)` given by :math:`F(x^\star(\theta), \theta) = 0`, near one root.

    With :math:`A = \partial_1 F` and :math:`B = \partial_2 F` at the root its Jacobian is :math:`J = -A^{-1} B`.
    Neither matrix is formed. (The literature writes :math:`A = -\partial_1 F`; with this sign A is positive definite
    for the gradient of a convex function, as conjugate gradients want it.)

    Attributes:
        optimality: F, from the vector x and the tensors of theta to a vector of the size of x.
        solve: Linear solver.
        check: Called with the report of every solve that autograd asks for.
    """

    optimality: Callable[..., Tensor]
    solve: LinearSolve
    check: Callable[[SolveInfo], None] = check_solve

    def solve_linear(self, x: Tensor, theta: Sequence[Tensor], b: Tensor, transposed: bool) -> tuple[Tensor, SolveInfo]:
        """Solves A u = b or, transposed, its adjoint; a constant for autograd.

        Args:
            x: The root.
            theta: The tensors of theta.
            b: Right-hand side.
            transposed: Which of both.

        Returns:
            The solution, and how the solve went.
        """
        infos: list[SolveInfo] = []

        def run(b: Tensor, x: Tensor, *theta: Tensor) -> Tensor:
            pull, push = both_products(lambda point: self.optimality(point, *theta), x)
            work = torch.promote_types(x.dtype, torch.float32)  # short types are too coarse for inner products
            matvec, rmatvec = (pull, push) if transposed else (push, pull)
            solution, info = self.solve(
                lambda p: matvec(p.to(x.dtype)).to(work), b.to(work), rmatvec=lambda q: rmatvec(q.to(x.dtype)).to(work)
            )
            infos.append(info)
            return solution.to(b.dtype)

        solution = Constant.apply(run, *(part.detach() for part in (b, x, *theta))).detach()
        return solution, infos[0] if len(infos) == 1 else max(infos, key=lambda info: float(info.residual))

    def adjoint(self, x: Tensor, theta: Sequence[Tensor], v: Tensor) -> tuple[Tensor, SolveInfo]:
        r"""The solution of :math:`A^\top u = v`, differentiable in everything by the same theorem.

        Args:
            x: The root.
            theta: The tensors of theta.
            v: Cotangent.

        Returns:
            The vector u, and how the solve went.
        """

        def residual(u: Tensor, v: Tensor, x: Tensor, *theta: Tensor) -> Tensor:
            return torch.func.vjp(lambda point: self.optimality(point, *theta), x)[1](u)[0] - v

        u, info = self.solve_linear(x, theta, v, transposed=True)
        return (attach(u, replace(self, optimality=residual), v, x, *theta) if torch.is_grad_enabled() else u), info

    def vjp(
        self, x: Tensor, theta: Sequence[Tensor], v: Tensor, needed: Sequence[bool]
    ) -> tuple[list[Tensor | None], SolveInfo]:
        r"""The product :math:`v^\top J = -u^\top B` with :math:`A^\top u = v`: one solve for all arguments.

        Args:
            x: The root.
            theta: The tensors of theta.
            v: Cotangent, of the size of x.
            needed: Which tensors of theta are wanted.

        Returns:
            The gradient in each wanted tensor, None for the others, and how the solve went.
        """
        wanted = [i for i, need in enumerate(needed) if need]
        u, info = self.adjoint(x, theta, v)

        def in_theta(*chosen: Tensor) -> Tensor:
            merged = list(theta)
            for index, part in zip(wanted, chosen, strict=True):
                merged[index] = part
            return self.optimality(x, *merged)

        gradients = torch.func.vjp(in_theta, *(theta[i] for i in wanted))[1](-u)
        found = dict(zip(wanted, gradients, strict=True))
        return [found.get(i) for i in range(len(theta))], info

    def jvp(self, x: Tensor, theta: Sequence[Tensor], tangents: Sequence[Tensor | None]) -> tuple[Tensor, SolveInfo]:
        r"""The product :math:`J \dot\theta`, from :math:`A \dot x = -B \dot\theta`: one solve.

        Args:
            x: The root.
            theta: The tensors of theta.
            tangents: One for each tensor; None for 0.

        Returns:
            The tangent of x, and how the solve went.
        """
        full = [
            torch.zeros_like(part) if tangent is None else tangent
            for part, tangent in zip(theta, tangents, strict=True)
        ]

        def residual(dx: Tensor, x: Tensor, *rest: Tensor) -> Tensor:
            theta, full = rest[: len(rest) // 2], rest[len(rest) // 2 :]
            return both_products(self.optimality, x, *theta)[1](dx, *full)

        b = residual(torch.zeros_like(x), x, *theta, *full)
        dx, info = self.solve_linear(x, theta, -b, transposed=False)
        return (
            attach(dx, replace(self, optimality=residual), x, *theta, *full) if torch.is_grad_enabled() else dx
        ), info


class Attach(torch.autograd.Function):
    """Identity on a root that a solver found, with the derivatives of the implicit function."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, function: ImplicitFunction, *theta: Tensor) -> Tensor:  # noqa: ARG004
        return x.view_as(x)  # never the same object: autograd would take it for its input

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.function, *theta = inputs
        ctx.save_for_backward(output, *theta)  # the output, for it depends on theta when differentiated once more
        ctx.save_for_forward(output, *theta)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        x, *theta = ctx.saved_tensors
        gradients, info = ctx.function.vjp(x, theta, gradient, ctx.needs_input_grad[2:])
        ctx.function.check(info)
        return None, None, *gradients

    @staticmethod
    def jvp(ctx: Any, x_tangent: Any, function_tangent: Any, *tangents: Tensor | None) -> Tensor:  # noqa: ARG004
        x, *theta = ctx.saved_tensors
        tangent, info = ctx.function.jvp(x, theta, tangents)
        ctx.function.check(info)
        return tangent


def attach(x: Tensor, function: ImplicitFunction, *theta: Tensor) -> Tensor:
    """A root with the derivatives of the implicit function, in reverse and in forward mode, of any order.

    Args:
        x: The root, a vector; its own history is cut.
        function: What defines it.
        theta: The tensors that it depends on.

    Returns:
        The root.

    Example:
        >>> from lightning_hpo.functional.bilevel.conjugate_gradient import cg
        >>> theta = torch.tensor([4.0], requires_grad=True)
        >>> root = attach(torch.tensor([2.0]), ImplicitFunction(lambda x, t: x**2 - t, cg), theta)
        >>> torch.autograd.grad(root, theta)  # of the square root: 1 / 4
        (tensor([0.2500]),)
    """
    return Attach.apply(x.detach(), function, *theta)
