"""Optimality conditions: what holds at the solution of an optimization problem.

Each function turns the parts of a problem into a root mapping ``F(x, *theta)``, for
:func:`~lightning_hpo.functional.bilevel.implicit_differentiation.implicit_root`, or a fixed-point mapping
``T(x, *theta)``, for :func:`~lightning_hpo.functional.bilevel.implicit_differentiation.implicit_fixed_point`. The
mapping describes the solution, not the solver: any that fits the problem may be used, and the step size cancels in the
derivative, so it is 1 unless given.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_hpo.functional.bilevel.dense_solve import lu
from lightning_hpo.functional.bilevel.implicit_differentiation import implicit_root
from lightning_hpo.functional.bilevel.linear_system import LinearSolve
from lightning_hpo.functional.bilevel.transforms import both_products
from lightning_hpo.functional.bilevel.trees import Tree, TreeLayout, tree_map

__all__ = [
    "block_proximal_gradient",
    "gradient_step",
    "mirror_descent",
    "newton",
    "projected_gradient",
    "proximal_gradient",
    "sgd_step",
    "stationary",
]

Mapping = Callable[..., Any]  # (x, *theta) to a structure like x


def stationary(objective: Callable[..., Tensor]) -> Mapping:
    r"""Root mapping of an unconstrained minimum: :math:`F(x, \theta) = \nabla_1 f(x, \theta)`.

    Args:
        objective: ``f(x, *theta)``, a scalar.

    Returns:
        ``F(x, *theta)``.

    References:
        Blondel et al., "Efficient and Modular Implicit Differentiation", NeurIPS 2022, table 1.

    Example:
        >>> stationary(lambda x, theta: (x - theta).pow(2).sum() / 2)(torch.tensor([3.0]), torch.tensor([1.0]))
        tensor([2.])
    """
    return torch.func.grad(objective)


def gradient_step(objective: Callable[..., Tensor], step: float = 1.0) -> Mapping:
    r"""Fixed-point mapping of an unconstrained minimum: :math:`T = x - \eta \nabla_1 f(x, \theta)`.

    Args:
        objective: ``f(x, *theta)``, a scalar.
        step: The step size :math:`\eta`; it matters to iterative linear solvers alone.

    Returns:
        ``T(x, *theta)``.

    References:
        Blondel et al., "Efficient and Modular Implicit Differentiation", NeurIPS 2022, table 1.

    Example:
        >>> gradient_step(lambda x, theta: (x - theta).pow(2).sum() / 2)(torch.tensor([3.0]), torch.tensor([1.0]))
        tensor([1.])
    """
    slope = torch.func.grad(objective)

    def mapping(x: Tree, *theta: Tree) -> Tree:
        return tree_map(lambda here, down: here - step * down, x, slope(x, *theta))

    return mapping


def sgd_step(loss: Callable[..., Tensor], lr: float = 1.0, weight_decay: float | Tensor | None = None) -> Mapping:
    r"""Fixed-point mapping of gradient descent with weight decay: :math:`T = w - \eta (\nabla_1 L + \lambda w)`.

    What the optimizer does by itself is part of the condition: without the decay the derivative would be wrong. Coupled
    and decoupled decay have the same solution.

    Args:
        loss: ``L(w, *theta)``, a scalar, without the decay.
        lr: The step size :math:`\eta`; it matters to iterative linear solvers alone.
        weight_decay: A fixed :math:`\lambda`; where None it is the first argument after ``w`` and is differentiated.

    Returns:
        ``T(w, *theta)``, or ``T(w, weight_decay, *theta)``; the decay is a scalar or a structure like ``w``.

    References:
        Loshchilov and Hutter, "Decoupled Weight Decay Regularization", ICLR 2019.

    Example:
        >>> step = sgd_step(lambda w, theta: (w * theta).sum(), lr=0.1)
        >>> step(torch.tensor([2.0]), torch.tensor(0.5), torch.tensor([3.0]))  # 2 - 0.1 * (3 + 1)
        tensor([1.6000])
    """
    slope = torch.func.grad(loss)

    def decayed(w: Tree, decay: Tree, *theta: Tree) -> Tree:
        if isinstance(decay, (int, float, Tensor)):
            return tree_map(lambda here, down: here - lr * (down + decay * here), w, slope(w, *theta))
        return tree_map(lambda here, down, rate: here - lr * (down + rate * here), w, slope(w, *theta), decay)

    return decayed if weight_decay is None else lambda w, *theta: decayed(w, weight_decay, *theta)


def proximal_gradient(
    objective: Callable[..., Tensor], prox: Callable[[Tree, Tree, float], Tree], step: float = 1.0
) -> Mapping:
    r"""Fixed-point mapping of :math:`\min_x f + g`: :math:`T = \mathrm{prox}_{\eta g}(x - \eta \nabla_1 f(x, \theta))`.

    Args:
        objective: The smooth part ``f(x, *theta)``, a scalar.
        prox: ``prox(y, hyper, scaling)``, one of :mod:`~lightning_hpo.functional.bilevel.proximal`.
        step: The step size :math:`\eta`.

    Returns:
        ``T(x, hyper, *theta)``.

    References:
        Blondel et al., "Efficient and Modular Implicit Differentiation", NeurIPS 2022, table 1.

    Example:
        >>> from lightning_hpo.functional.bilevel.proximal import prox_lasso
        >>> lasso = proximal_gradient(lambda x, y: (x - y).pow(2).sum() / 2, prox_lasso)
        >>> lasso(torch.zeros(2), torch.tensor(1.0), torch.tensor([3.0, 0.5]))
        tensor([2., 0.])
    """
    descend = gradient_step(objective, step)
    return lambda x, hyper, *theta: prox(descend(x, *theta), hyper, step)


def projected_gradient(
    objective: Callable[..., Tensor], projection: Callable[[Tree, Tree], Tree], step: float = 1.0
) -> Mapping:
    r"""Fixed-point mapping of :math:`\min_{x \in C(h)} f(x, \theta)`: :math:`T = \mathrm{proj}_C(x - \eta\nabla_1 f)`.

    Args:
        objective: ``f(x, *theta)``, a scalar.
        projection: ``projection(y, hyper)``, one of :mod:`~lightning_hpo.functional.bilevel.projections`.
        step: The step size :math:`\eta`.

    Returns:
        ``T(x, hyper, *theta)``; ``hyper`` is None where the set has none.

    References:
        Blondel et al., "Efficient and Modular Implicit Differentiation", NeurIPS 2022, table 1.

    Example:
        >>> from lightning_hpo.functional.bilevel.projections import projection_non_negative
        >>> positive = projected_gradient(lambda x, y: (x - y).pow(2).sum() / 2, projection_non_negative)
        >>> positive(torch.zeros(2), None, torch.tensor([3.0, -0.5]))
        tensor([3., 0.])
    """
    descend = gradient_step(objective, step)
    return lambda x, hyper, *theta: projection(descend(x, *theta), hyper)


def mirror_descent(
    objective: Callable[..., Tensor],
    projection: Callable[[Tree, Tree], Tree],
    mirror: Callable[[Tensor], Tensor] = torch.log,
    step: float = 1.0,
) -> Mapping:
    r"""Fixed-point mapping of mirror descent: :math:`T = \mathrm{proj}^\varphi_C(\nabla\varphi(x) - \eta \nabla_1 f)`.

    Args:
        objective: ``f(x, *theta)``, a scalar.
        projection: ``projection(y, hyper)`` from the dual space to the set, as
            :func:`~lightning_hpo.functional.bilevel.projections.projection_kl_simplex`.
        mirror: The map :math:`\nabla\varphi`; the logarithm for the Kullback-Leibler divergence, whose solutions must
            be positive.
        step: The step size :math:`\eta`.

    Returns:
        ``T(x, hyper, *theta)``.

    References:
        Blondel et al., "Efficient and Modular Implicit Differentiation", NeurIPS 2022, table 1.

    Example:
        >>> from lightning_hpo.functional.bilevel.projections import projection_kl_simplex
        >>> descent = mirror_descent(lambda x, cost: x @ cost, projection_kl_simplex)
        >>> descent(torch.tensor([0.5, 0.5]), None, torch.tensor([1.0, 0.0]))
        tensor([0.2689, 0.7311])
    """
    slope = torch.func.grad(objective)

    def mapping(x: Tree, hyper: Tree, *theta: Tree) -> Tree:
        return projection(tree_map(lambda here, down: mirror(here) - step * down, x, slope(x, *theta)), hyper)

    return mapping


def block_proximal_gradient(
    objective: Callable[..., Tensor],
    prox: Callable[[Tensor, Tree, Any], Tensor],
    steps: float | Tensor = 1.0,
    hyper_per_block: bool = False,
) -> Mapping:
    r"""Fixed-point mapping of block coordinate methods for :math:`\min_x f + \sum_j g_j(x_j)`.

    .. math:: T_j = \mathrm{prox}_{\eta_j g_j}(x_j - \eta_j [\nabla_1 f(x, \theta)]_j)

    All blocks move at once (the Jacobi form): its fixed points are those of coordinate descent. A block is a row of x,
    a single number where x is a vector.

    Args:
        objective: The smooth part ``f(x, *theta)``, a scalar.
        prox: ``prox(row, hyper, scaling)`` of one block; it is mapped over the rows with :func:`torch.func.vmap`.
        steps: Step sizes :math:`\eta_j`, one for all or of shape ``(blocks,)``.
        hyper_per_block: Whether the tensors of ``hyper`` have one row a block.

    Returns:
        ``T(x, hyper, *theta)`` for a tensor x.

    References:
        Blondel et al., "Efficient and Modular Implicit Differentiation", NeurIPS 2022, table 1.

    Example:
        >>> from lightning_hpo.functional.bilevel.proximal import prox_lasso
        >>> lasso = block_proximal_gradient(lambda x, y: (x - y).pow(2).sum() / 2, prox_lasso, torch.tensor([1.0, 0.5]))
        >>> lasso(torch.zeros(2), torch.tensor(1.0), torch.tensor([3.0, 4.0]))
        tensor([2.0000, 1.5000])
    """
    slope = torch.func.grad(objective)

    def mapping(x: Tensor, hyper: Tree, *theta: Tree) -> Tensor:
        scaling = torch.as_tensor(steps, dtype=x.dtype, device=x.device).expand(len(x))
        moved = x - scaling.view(-1, *[1] * (x.dim() - 1)) * slope(x, *theta)
        over = 0 if hyper_per_block else None
        if hyper is None:
            return torch.func.vmap(lambda row, size: prox(row, None, size))(moved, scaling)
        return torch.func.vmap(prox, in_dims=(0, over, 0))(moved, hyper, scaling)

    return mapping


def newton(mapping: Mapping, step: float = 1.0, solve: LinearSolve = lu) -> Mapping:
    r"""Fixed-point mapping of Newton's method for a root of G: :math:`T = x - \eta [\partial_1 G]^{-1} G(x, \theta)`.

    Args:
        mapping: ``G(x, *theta)`` in the structure of x; the gradient for a minimum.
        step: The step size :math:`\eta`.
        solve: Linear solver of the Newton step.

    Returns:
        ``T(x, *theta)``.

    References:
        Blondel et al., "Efficient and Modular Implicit Differentiation", NeurIPS 2022, table 1.

    Example:
        >>> newton(lambda x, theta: x**2 - theta)(torch.tensor([3.0]), torch.tensor([4.0]))  # 3 - 5 / 6
        tensor([2.1667])
    """

    def stepped(x: Tree, *theta: Tree) -> Tree:
        layout = TreeLayout(x)

        def flat(point: Tensor, *rest: Tree) -> Tensor:
            return layout.ravel(mapping(layout.unravel(point), *rest), "the value of the mapping G")

        def residual(move: Tensor, point: Tensor, *rest: Tree) -> Tensor:
            value = flat(point, *rest)
            return both_products(lambda p: flat(p, *rest), point)[1](move) - value

        def solver(_: Tensor, point: Tensor, *rest: Tree) -> Tensor:
            pull, push = both_products(lambda p: flat(p, *rest), point)
            return solve(push, flat(point, *rest), rmatvec=pull)[0]

        point = layout.ravel(x)
        move = implicit_root(residual, solver, solve=solve)(point, point, *theta)
        return layout.unravel(point - step * move)

    return stepped
