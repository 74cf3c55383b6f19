r"""Cone programs :math:`\min_x c^\top x` with :math:`E x + s = d`, :math:`s \in K`: their self-dual embedding."""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

__all__ = [
    "conic_point",
    "conic_residual",
    "conic_solution",
    "projection_dual_cone",
    "projection_second_order_cone",
]

Cone = tuple[Literal["zero", "nonnegative", "second_order"], int]
Program = tuple[Tensor, Tensor, Tensor]


def projection_second_order_cone(x: Tensor) -> Tensor:
    r"""Projection on :math:`\{(t, u): \|u\| \le t\}`, which is its own dual.

    Args:
        x: Shape ``(n,)``; t comes first.

    Returns:
        The shape of ``x``.

    References:
        Parikh and Boyd, "Proximal Algorithms", 2014, sec. 6.3.2.

    Example:
        >>> projection_second_order_cone(torch.tensor([0.0, 3.0, 4.0]))
        tensor([2.5000, 1.5000, 2.0000])
    """
    t, u = x[0], x[1:]
    square = u.square().sum()
    length = torch.where(square > 0, square, torch.ones_like(square)).sqrt() * (square > 0)  # no NaN at u = 0
    safe = torch.where(square > 0, length, torch.ones_like(length))
    outside = (t + length) / 2 * torch.cat([torch.ones_like(x[:1]), u / safe])
    return torch.where(length <= t, x, torch.where(length <= -t, torch.zeros_like(x), outside))


def projection_dual_cone(x: Tensor, cones: Sequence[Cone]) -> Tensor:
    r"""Projection on the dual :math:`K^*` of a product of cones.

    The dual of ``"zero"``, which K holds for equalities, is the whole space; the others are their own duals.

    Args:
        x: Shape ``(m,)``.
        cones: Kind and size of each, in order: ``"zero"``, ``"nonnegative"`` or ``"second_order"``.

    Returns:
        The shape of ``x``.

    Raises:
        ValueError: If the sizes do not sum to m, or a kind is not known.

    Example:
        >>> projection_dual_cone(torch.tensor([-1.0, -1.0, 2.0]), [("zero", 1), ("nonnegative", 2)])
        tensor([-1.,  0.,  2.])
    """
    rules = {"zero": lambda part: part, "nonnegative": torch.relu, "second_order": projection_second_order_cone}
    unknown = sorted({kind for kind, _ in cones} - set(rules))
    if unknown or sum(size for _, size in cones) != len(x):
        raise ValueError(f"cones must be of kinds {sorted(rules)} and of {len(x)} entries together, got {list(cones)}")
    parts = x.split([size for _, size in cones])
    return torch.cat([rules[kind](part) for (kind, _), part in zip(cones, parts, strict=True)])


def conic_residual(project_dual: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Program], Tensor]:
    r"""Root mapping of a cone program: the residual map of its homogeneous self-dual embedding.

    .. math::
        F(z) = ((M - I) \Pi + I) z, \quad M = \begin{bmatrix} 0 & E^\top & c \\ -E & 0 & d \\ -c^\top & -d^\top & 0
        \end{bmatrix}

    with the projection :math:`\Pi` on :math:`R^p \times K^* \times R_+`. With z every multiple of it is a root, so the
    system of the derivative is singular along z, a direction that :func:`conic_solution` does not see: it wants a
    least-squares solver, :func:`~lightning_hpo.functional.bilevel.linear_solve.normal_cg`.

    Args:
        project_dual: Projection on :math:`K^*`, as :func:`projection_dual_cone` with its cones bound.

    Returns:
        ``F(z, (E, c, d))`` for z of shape ``(p + m + 1,)``, with E of shape ``(m, p)``.

    References:
        Busseti, Moursi and Boyd, "Solution Refinement at Regular Points of Conic Problems", 2019; Agrawal et al.,
        "Differentiating Through a Cone Program", 2019.

    Example:
        >>> program = (torch.tensor([[-1.0]]), torch.tensor([1.0]), torch.tensor([-2.0]))  # the least x above 2
        >>> z = conic_point(torch.tensor([2.0]), torch.tensor([1.0]), torch.tensor([0.0]))
        >>> conic_residual(torch.relu)(z, program).abs().max()
        tensor(0.)
    """

    def mapping(z: Tensor, program: Program) -> Tensor:
        E, c, d = program
        x, dual = z[: len(c)], project_dual(z[len(c) : -1])
        scale = torch.relu(z[-1:])
        product = torch.cat([E.mT @ dual + c * scale, -E @ x + d * scale, -(c @ x + d @ dual)[None]])
        return product - torch.cat([x, dual, scale]) + z

    return mapping


def conic_point(x: Tensor, y: Tensor, s: Tensor) -> Tensor:
    r"""The root :math:`z = (x, y - s, 1)` of :func:`conic_residual` at a solution.

    Args:
        x: Primal solution, shape ``(p,)``.
        y: Dual solution, shape ``(m,)``.
        s: Slacks :math:`d - E x`, shape ``(m,)``.

    Returns:
        Shape ``(p + m + 1,)``.

    Example:
        >>> conic_point(torch.tensor([2.0]), torch.tensor([1.0]), torch.tensor([0.0]))
        tensor([2., 1., 1.])
    """
    return torch.cat([x, y - s, torch.ones_like(x[:1])])


def conic_solution(z: Tensor, size: int, project_dual: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Primal and dual solutions and the slacks of a root of :func:`conic_residual`; it undoes :func:`conic_point`.

    Args:
        z: The root.
        size: The number p of primal variables.
        project_dual: As for :func:`conic_residual`.

    Returns:
        The triple x, y, s.

    Example:
        >>> conic_solution(torch.tensor([4.0, 2.0, 2.0]), 1, torch.relu)
        (tensor([2.]), tensor([1.]), tensor([0.]))
    """
    dual = project_dual(z[size:-1])
    return z[:size] / z[-1], dual / z[-1], (dual - z[size:-1]) / z[-1]
