"""Implicit differentiation: makes any solver of a root or fixed-point problem differentiable in its parameters."""

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from lightning_hpo.functional.bilevel.implicit_function import ImplicitFunction, attach, check_solve
from lightning_hpo.functional.bilevel.linear_solve import LinearSolve, SolveInfo, normal_cg
from lightning_hpo.functional.bilevel.transforms import black_box
from lightning_hpo.functional.bilevel.trees import Arguments, Tree, TreeLayout, leaves, tree_map

__all__ = [
    "check_solve",
    "implicit_fixed_point",
    "implicit_root",
    "root_jvp",
    "root_vjp",
]


def on_vectors(optimality: Callable[..., Tree], layout: TreeLayout, arguments: Arguments) -> Callable[..., Tensor]:
    """The optimality mapping from the vector x and the tensors of theta to a vector."""

    def flat(x: Tensor, *theta: Tensor) -> Tensor:
        value = optimality(layout.unravel(x), *arguments.merge(theta))
        return layout.ravel(value, "the value of the optimality mapping F")

    return flat


def root_vjp(
    optimality: Callable[..., Tree],
    x: Tree,
    theta: Sequence[Tree],
    cotangent: Tree,
    *,
    solve: LinearSolve = normal_cg,
    needed: Sequence[bool] | None = None,
) -> tuple[tuple[Tree | None, ...], SolveInfo]:
    r"""Product :math:`v^\top \partial x^\star(\theta)` at a root of :math:`F(x, \theta) = 0`.

    One linear solve, :math:`(\partial_1 F)^\top u = v`, is shared by all arguments; then
    :math:`v^\top \partial_i x^\star = -u^\top \partial_{\theta_i} F`. The product can be differentiated again; where
    that is not wanted, call it under :func:`torch.no_grad`, which saves the graph.

    Args:
        optimality: The mapping F, ``F(x, *theta)`` in the structure of ``x``.
        x: The root, a structure of tensors.
        theta: The arguments after x, structures of floating point tensors.
        cotangent: The vector v, in the structure of ``x``.
        solve: Linear solver; :func:`~lightning_hpo.functional.bilevel.linear_solve.cg` where
            :math:`\partial_1 F` is symmetric and positive definite.
        needed: Which arguments are wanted; all where None.

    Returns:
        The gradient in each wanted argument, None for the others, and how the solve went. Nothing is raised or warned
        where it did not converge: see :func:`check_solve`.

    Raises:
        TypeError: If a tensor of theta is not of floating point.
        ValueError: If structure or shapes do not fit.

    References:
        Blondel et al., "Efficient and Modular Implicit Differentiation", NeurIPS 2022, sec. 2.1.

    Example:
        >>> import torch
        >>> F = lambda x, theta: x**2 - theta
        >>> (gradient,), info = root_vjp(F, torch.tensor([2.0]), (torch.tensor([4.0]),), torch.tensor([1.0]))
        >>> gradient
        tensor([0.2500])
    """
    if needed is not None and len(needed) != len(theta):
        raise ValueError(f"needed must have one entry for each of {len(theta)} arguments, got {len(needed)}")
    if needed is not None and not any(needed):
        raise ValueError("no argument is needed: there is nothing to differentiate")
    layout, arguments = TreeLayout(x), Arguments(theta)
    wanted = [True] * len(theta) if needed is None else list(needed)
    spread = [want for want, part in zip(wanted, arguments.layouts, strict=True) if part for _ in part.shapes]
    point = layout.ravel(x)
    v = layout.ravel(cotangent, "the cotangent", point.dtype)
    function = ImplicitFunction(on_vectors(optimality, layout, arguments), solve)
    gradients, info = function.vjp(point, arguments.tensors, v, spread)
    merged = arguments.merge(gradients)
    return tuple(gradient if want else None for gradient, want in zip(merged, wanted, strict=True)), info


def root_jvp(
    optimality: Callable[..., Tree],
    x: Tree,
    theta: Sequence[Tree],
    tangents: Sequence[Tree | None],
    *,
    solve: LinearSolve = normal_cg,
) -> tuple[Tree, SolveInfo]:
    r"""Product :math:`\partial x^\star(\theta)\, \dot\theta` at a root of :math:`F(x, \theta) = 0`.

    One linear solve, :math:`\partial_1 F\, \dot x = -\partial_2 F\, \dot\theta`, whatever the number of arguments. As
    :func:`root_vjp` it can be differentiated again.

    Args:
        optimality: The mapping F, ``F(x, *theta)`` in the structure of ``x``.
        x: The root, a structure of tensors.
        theta: The arguments after x, structures of floating point tensors.
        tangents: For each argument its tangent, in the same structure, or None for 0.
        solve: Linear solver.

    Returns:
        The tangent of the root, and how the solve went. Nothing is raised or warned where it did not converge: see
        :func:`check_solve`.

    Raises:
        TypeError: If a tensor of theta is not of floating point.
        ValueError: If structure or shapes do not fit.

    References:
        Blondel et al., "Efficient and Modular Implicit Differentiation", NeurIPS 2022, sec. 2.1.

    Example:
        >>> import torch
        >>> F = lambda x, theta: x**2 - theta
        >>> root_jvp(F, torch.tensor([2.0]), (torch.tensor([4.0]),), (torch.tensor([1.0]),))[0]
        tensor([0.2500])
    """
    layout, arguments = TreeLayout(x), Arguments(theta)
    split = arguments.split(tangents)
    function = ImplicitFunction(on_vectors(optimality, layout, arguments), solve)
    tangent, info = function.jvp(layout.ravel(x), arguments.tensors, split)
    return layout.unravel(tangent), info


def implicit_root(
    optimality: Callable[..., Tree],
    solver: Callable[..., Any] | None = None,
    *,
    solve: LinearSolve = normal_cg,
    has_aux: bool = False,
    implicit_diff: bool = True,
    strict: bool = False,
    report: Callable[[SolveInfo], None] | None = None,
) -> Callable[..., Any]:
    r"""Makes a solver of :math:`F(x, \theta) = 0` differentiable in :math:`\theta`, whatever it does inside.

    Works with ``loss.backward()``, ``torch.autograd.grad``, ``torch.func.grad``, ``torch.func.jvp`` and compositions of
    them: derivatives of derivatives follow from the same theorem. The solver is a black box, called with plain detached
    tensors: it may train with ``backward`` or leave torch. Under :func:`torch.func.vmap`, which ``jacfwd`` uses, it
    runs once for each element. The initial point gets no gradient.

    Args:
        optimality: The mapping F, ``F(x, *theta)`` in the structure and the shapes of ``x``; of torch operations, and
            with :func:`torch.func.grad` where it needs a gradient. It need not be the one that the solver iterates.
        solver: ``solver(init, *theta)``, returns x, an approximate root. A decorator is returned where None.
        solve: Linear solver of the derivatives. The default wants nothing but an invertible :math:`\partial_1 F`;
            :func:`~lightning_hpo.functional.bilevel.linear_solve.cg` costs half where it is positive definite.
        has_aux: Whether the solver returns ``(x, aux)``; ``aux`` passes through without gradient.
        implicit_diff: If False the solver's own steps are recorded and differentiated (unrolling).
        strict: Whether a linear solve that does not converge is an error rather than a warning.
        report: Called with the :class:`~lightning_hpo.functional.bilevel.linear_system.SolveInfo` of every derivative.

    Returns:
        The function ``(init, *theta) -> x``, or ``(x, aux)``; each theta is a structure of floating point tensors, or
        None.

    Raises:
        TypeError: When called, if a tensor of theta is not of floating point.
        ValueError: When differentiated, if F returns other shapes than those of x.
        RuntimeError: When differentiated, with ``strict`` or if the linear solve gave numbers that are not finite.

    References:
        Blondel et al., "Efficient and Modular Implicit Differentiation", NeurIPS 2022.

    Example:
        >>> import torch
        >>> def newton(init, theta):
        ...     x = init
        ...     for _ in range(20):
        ...         x = x - (x**2 - theta) / (2 * x)
        ...     return x
        >>> sqrt = implicit_root(lambda x, theta: x**2 - theta, newton)
        >>> theta = torch.tensor([4.0], requires_grad=True)
        >>> sqrt(torch.ones(1), theta).backward()
        >>> theta.grad
        tensor([0.2500])
    """
    if solver is None:
        return lambda found: implicit_root(
            optimality, found, solve=solve, has_aux=has_aux, implicit_diff=implicit_diff, strict=strict, report=report
        )
    if not implicit_diff:
        return solver
    run = solver

    def check(info: SolveInfo) -> None:
        if report is not None:
            report(info)
        check_solve(info, strict, stacklevel=2)

    @functools.wraps(run, updated=())
    def differentiable(init: Tree, *theta: Tree) -> Any:
        arguments = Arguments(theta)
        starts, spec = pytree.tree_flatten(init)
        tensors = [leaf for leaf in starts if isinstance(leaf, Tensor)]
        found: list[Any] = []

        def call(*plain: Tensor) -> Tensor:
            given = iter(plain)
            start = pytree.tree_unflatten([next(given) if isinstance(leaf, Tensor) else leaf for leaf in starts], spec)
            result = run(start, *arguments.merge(list(given)))
            x, aux = result if has_aux else (result, None)
            warn_of_graph(x)
            found.append((TreeLayout(x), aux))
            return found[0][0].ravel(x, "the solution")

        vector = black_box(call, *tensors, *arguments.tensors)
        if has_aux and len(found) > 1:
            raise NotImplementedError("auxiliary outputs cannot be batched: has_aux does not go with torch.func.vmap")
        layout, aux = found[0]
        function = ImplicitFunction(on_vectors(optimality, layout, arguments), solve, check)
        solution = layout.unravel(attach(vector, function, *arguments.tensors))
        return (solution, detached(aux)) if has_aux else solution

    return differentiable


def warn_of_graph(x: Tree) -> None:
    """Warns where a solver recorded its steps although it got detached arguments."""
    if any(part.grad_fn is not None for part in leaves(x, "the solution")):
        warnings.warn(
            "the solver's output carries a graph of its own, which is cut: the derivatives are those of the implicit "
            "function (implicit_diff=False differentiates the solver's steps instead)",
            stacklevel=6,
        )


def implicit_fixed_point(
    fixed_point: Callable[..., Tree], solver: Callable[..., Any] | None = None, **settings: Any
) -> Callable[..., Any]:
    r"""Makes a solver of :math:`x = T(x, \theta)` differentiable in :math:`\theta`: roots of :math:`x - T(x, \theta)`.

    Where T is a contraction, :func:`~lightning_hpo.functional.bilevel.linear_solve.neumann` converges too.

    Args:
        fixed_point: The mapping T, ``T(x, *theta)`` in the structure and the shapes of ``x``. It need not be the one
            that the solver iterates.
        solver: As for :func:`implicit_root`.
        settings: The keywords of :func:`implicit_root`.

    Returns:
        As :func:`implicit_root`.

    References:
        Blondel et al., "Efficient and Modular Implicit Differentiation", NeurIPS 2022, eq. 3.

    Example:
        >>> import torch
        >>> halve = lambda x, theta: 0.5 * (x + theta)
        >>> solution = implicit_fixed_point(halve, lambda init, theta: theta.clone())
        >>> theta = torch.tensor([3.0], requires_grad=True)
        >>> torch.autograd.grad(solution(torch.zeros(1), theta), theta)
        (tensor([1.]),)
    """

    def residual(x: Tree, *theta: Tree) -> Tree:
        layout = TreeLayout(x)
        after = layout.parts(fixed_point(x, *theta), "the value of the fixed-point mapping T")
        return layout.rebuild([here - there for here, there in zip(layout.parts(x), after, strict=True)])

    return implicit_root(residual, solver, **settings)


def detached(tree: Any) -> Any:
    """A structure whose tensors are detached; other leaves as they are."""
    return tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, tree)
