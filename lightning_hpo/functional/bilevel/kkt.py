"""Karush-Kuhn-Tucker conditions as a root mapping."""

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_hpo.functional.bilevel.trees import Tree

__all__ = ["kkt"]


def kkt(
    objective: Callable[..., Tensor],
    equality: Callable[..., Tensor] | None = None,
    inequality: Callable[..., Tensor] | None = None,
) -> Callable[..., tuple[Tree, ...]]:
    r"""Root mapping of the Karush-Kuhn-Tucker conditions of :math:`\min_z f` with :math:`h(z) = 0`, :math:`g(z) \le 0`.

    .. math::
        F = [\nabla_1 f + (\partial_1 h)^\top \nu + (\partial_1 g)^\top \lambda ;\; h(z, \theta) ;\;
        \lambda \circ g(z, \theta)]

    The signs :math:`g \le 0` and :math:`\lambda \ge 0` hold at the solution and are not part of the mapping. Where a
    constraint is active with :math:`\lambda = 0` the system is singular.

    Args:
        objective: ``f(z, *theta)``, a scalar.
        equality: ``h(z, *theta)``, a tensor.
        inequality: ``g(z, *theta)``, a tensor.

    Returns:
        ``F(x, *theta)`` for x a tuple of z, then :math:`\nu` if there are equalities, then :math:`\lambda` if there are
        inequalities, of the shapes of the constraints.

    Raises:
        ValueError: If there is no constraint: that is :func:`stationary`. When called, if x has not so many parts.

    References:
        Blondel et al., "Efficient and Modular Implicit Differentiation", NeurIPS 2022, eq. 6.

    Example:
        >>> F = kkt(lambda z, theta: (z - theta).pow(2).sum() / 2, inequality=lambda z, theta: -z)
        >>> F((torch.tensor([1.0]), torch.tensor([2.0])), torch.tensor([-3.0]))  # 1 + 3 - 2 and 2 * -1
        (tensor([2.]), tensor([-2.]))
    """
    constraints = [constraint for constraint in (equality, inequality) if constraint is not None]
    if not constraints:
        raise ValueError("kkt needs equality or inequality constraints; without any use stationary")

    def mapping(x: tuple[Tree, ...], *theta: Tree) -> tuple[Tree, ...]:
        if len(x) != 1 + len(constraints):
            raise ValueError(
                f"x must hold the primal variable and {len(constraints)} multipliers, got a tuple of {len(x)}"
            )
        z, *multipliers = x

        def lagrangian(z: Tree) -> Tensor:
            pairs = zip(multipliers, constraints, strict=True)
            return objective(z, *theta) + sum((dual * constraint(z, *theta)).sum() for dual, constraint in pairs)

        rows = [constraint(z, *theta) for constraint in constraints]
        if inequality is not None:
            rows[-1] = multipliers[-1] * rows[-1]
        return torch.func.grad(lagrangian)(z), *rows

    return mapping
