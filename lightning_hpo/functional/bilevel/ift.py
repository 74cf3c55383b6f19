"""Hypergradients by the implicit function theorem, with one function for each way to solve the linear system."""

import warnings
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_hpo.functional.bilevel.dense_solve import lu
from lightning_hpo.functional.bilevel.linear_solve import (
    LinearSolve,
    SolveInfo,
    bicgstab,
    cg,
    gmres,
    neumann,
    normal_cg,
)
from lightning_hpo.functional.bilevel.problem import HypergradientResult, Partial, Point, Problem, hypergradient
from lightning_hpo.functional.bilevel.products import Product, products

__all__ = ["ift", "ift_bicgstab", "ift_cg", "ift_exact", "ift_gmres", "ift_neumann", "ift_normal_cg"]


def ift(
    problem: Problem,
    params: Mapping[str, Tensor],
    hparams: Mapping[str, Tensor],
    state: Mapping[str, Any] | None = None,
    *,
    solve: LinearSolve,
    product: Product = "exact",
    warm_start: bool = True,
    strict: bool | None = False,
    **settings: Any,
) -> HypergradientResult:
    r"""Hypergradient through the solution of the inner problem.

    .. math::

        \frac{dL}{d\theta} = \partial_\theta L_{val} - (\partial_\theta F)^\top u, \qquad
        (\partial_w F)^\top u = \partial_w L_{val}

    with :math:`F = \nabla_w L_{tr}`, whose derivative is the symmetric Hessian, or the problem's ``residual``. The
    error is of first order in the distance of the parameters from the solution and in the residual of the solve. Where
    a solver stops at negative curvature before its first iteration, :math:`u = \partial_w L_{val}`.

    Args:
        problem: The problem.
        params: Parameters close to the solution.
        hparams: Hyperparameters.
        state: That of the result before; ``"u"`` is where the solver begins.
        solve: The linear solver.
        product: ``"exact"``, ``"fd"`` or ``"gauss_newton"``; see
            :func:`~lightning_hpo.functional.bilevel.products.products`.
        warm_start: Whether to begin where the last solve ended.
        strict: Whether a solve that did not converge is an error; a warning where False, nothing where None.
        settings: Those of the solver: ``tol``, ``maxiter``, ``ridge``.

    Returns:
        The hypergradient, how the solve went, and ``{"u": u}``.

    Raises:
        ValueError: If a hyperparameter is reached by neither loss.
        RuntimeError: With ``strict``, if the solve did not converge.

    References:
        Pedregosa, "Hyperparameter Optimization with Approximate Gradient", ICML 2016; Lorraine, Vicol and Duvenaud,
        "Optimizing Millions of Hyperparameters by Implicit Differentiation", AISTATS 2020.

    Example:
        >>> import torch
        >>> problem = Problem(
        ...     train_loss=lambda w, h: ((w["w"] - 3) ** 2 + h["decay"] * w["w"] ** 2).sum(),
        ...     val_loss=lambda w, h: ((w["w"] - 2) ** 2).sum(),
        ... )
        >>> ift(problem, {"w": torch.tensor([2.5])}, {"decay": torch.tensor(0.2)}, solve=cg).gradients
        {'decay': tensor(-2.0833)}
    """
    point = Point(params, hparams)
    v, direct = point.gradient(problem.val_loss, "val_loss")
    v = problem.reduce(v)
    second = products(problem, point, product)
    init = state.get("u") if state and warm_start else None
    single = solve is cg and settings.get("maxiter") == 1 and init is None
    seen: list[tuple[Tensor, Partial]] = []  # the only direction, and the mixed product with it

    def matvec(p: Tensor) -> Tensor:
        image, mixed = second.pull_back(p, hparams=single, last=single)
        if single:
            seen.append((p, mixed))
        return problem.reduce(image)

    u, info = solve(matvec, v, rmatvec=lambda p: problem.reduce(second.push(p)), init=init, **settings)
    # Where the very first direction has negative curvature there is no solution to look for: u = v, as in t1t2.
    u = torch.where(info.negative_curvature & (info.iterations == 0), v, u)
    _check(info, strict)
    mixed = _multiple(u, *seen[0]) if seen else second.pull_back(u, params=False, last=True)[1]
    indirect = {name: None if part is None else -part for name, part in mixed.items()}
    return hypergradient(problem, point, direct, indirect, info=info, state={"u": u})


def ift_cg(
    problem: Problem,
    params: Mapping[str, Tensor],
    hparams: Mapping[str, Tensor],
    state: Mapping[str, Any] | None = None,
    *,
    tol: float = 1e-5,
    maxiter: int = 50,
    **settings: Any,
) -> HypergradientResult:
    """:func:`ift` by conjugate gradients: for a symmetric positive definite Hessian.

    Args:
        problem: The problem, without a ``residual`` whose derivative is not symmetric.
        params: Parameters close to the solution.
        hparams: Hyperparameters.
        state: That of the result before.
        tol: Relative tolerance; 0 for exactly ``maxiter`` products and no stop of the device.
        maxiter: Largest number of products.
        settings: ``ridge``, ``product``, ``warm_start``, ``strict``.

    Returns:
        As for :func:`ift`.

    Example:
        >>> import torch
        >>> problem = Problem(lambda w, h: ((w["w"] - h["goal"]) ** 2).sum(), lambda w, h: (w["w"] ** 2).sum())
        >>> ift_cg(problem, {"w": torch.tensor([3.0])}, {"goal": torch.tensor(3.0)}).gradients
        {'goal': tensor(6.)}
    """
    return ift(problem, params, hparams, state, solve=cg, tol=tol, maxiter=maxiter, **settings)


def ift_normal_cg(
    problem: Problem,
    params: Mapping[str, Tensor],
    hparams: Mapping[str, Tensor],
    state: Mapping[str, Any] | None = None,
    *,
    tol: float = 1e-5,
    maxiter: int = 50,
    **settings: Any,
) -> HypergradientResult:
    """:func:`ift` by conjugate gradients on the normal equations: for every invertible derivative of F.

    Args:
        problem: The problem.
        params: Parameters close to the solution.
        hparams: Hyperparameters.
        state: That of the result before.
        tol: Relative tolerance; 0 for exactly ``maxiter`` iterations of two products.
        maxiter: Largest number of iterations.
        settings: ``ridge``, ``product``, ``warm_start``, ``strict``.

    Returns:
        As for :func:`ift`.

    Example:
        >>> import torch
        >>> saddle = Problem(lambda w, h: ((w["w"] - h["goal"]) ** 2 * torch.tensor([1.0, -1.0])).sum(),
        ...                  lambda w, h: (w["w"] ** 2).sum())
        >>> ift_normal_cg(saddle, {"w": torch.tensor([3.0, 3.0])}, {"goal": torch.tensor(3.0)}).gradients
        {'goal': tensor(12.)}
    """
    return ift(problem, params, hparams, state, solve=normal_cg, tol=tol, maxiter=maxiter, **settings)


def ift_gmres(
    problem: Problem,
    params: Mapping[str, Tensor],
    hparams: Mapping[str, Tensor],
    state: Mapping[str, Any] | None = None,
    *,
    tol: float = 1e-5,
    maxiter: int = 50,
    **settings: Any,
) -> HypergradientResult:
    """:func:`ift` by restarted GMRES: for any invertible derivative of F, one product an iteration, more memory.

    Args:
        problem: The problem.
        params: Parameters close to the solution.
        hparams: Hyperparameters.
        state: That of the result before.
        tol: Relative tolerance.
        maxiter: Largest number of products.
        settings: ``ridge``, ``product``, ``warm_start``, ``strict``, and those of
            :func:`~lightning_hpo.functional.bilevel.krylov.gmres`.

    Returns:
        As for :func:`ift`.

    Example:
        >>> import torch
        >>> problem = Problem(lambda w, h: ((w["w"] - h["goal"]) ** 2).sum(), lambda w, h: (w["w"] ** 2).sum())
        >>> ift_gmres(problem, {"w": torch.tensor([3.0])}, {"goal": torch.tensor(3.0)}).gradients
        {'goal': tensor(6.)}
    """
    return ift(problem, params, hparams, state, solve=gmres, tol=tol, maxiter=maxiter, **settings)


def ift_bicgstab(
    problem: Problem,
    params: Mapping[str, Tensor],
    hparams: Mapping[str, Tensor],
    state: Mapping[str, Any] | None = None,
    *,
    tol: float = 1e-5,
    maxiter: int = 50,
    **settings: Any,
) -> HypergradientResult:
    """:func:`ift` by stabilised biconjugate gradients: for any invertible derivative of F, two products an iteration.

    Args:
        problem: The problem.
        params: Parameters close to the solution.
        hparams: Hyperparameters.
        state: That of the result before.
        tol: Relative tolerance.
        maxiter: Largest number of iterations.
        settings: ``ridge``, ``product``, ``warm_start``, ``strict``.

    Returns:
        As for :func:`ift`.

    Example:
        >>> import torch
        >>> problem = Problem(lambda w, h: ((w["w"] - h["goal"]) ** 2).sum(), lambda w, h: (w["w"] ** 2).sum())
        >>> ift_bicgstab(problem, {"w": torch.tensor([3.0])}, {"goal": torch.tensor(3.0)}).gradients
        {'goal': tensor(6.)}
    """
    return ift(problem, params, hparams, state, solve=bicgstab, tol=tol, maxiter=maxiter, **settings)


def ift_neumann(
    problem: Problem,
    params: Mapping[str, Tensor],
    hparams: Mapping[str, Tensor],
    state: Mapping[str, Any] | None = None,
    *,
    steps: int = 10,
    alpha: float = 1.0,
    warm_start: bool = False,
    **settings: Any,
) -> HypergradientResult:
    r""":func:`ift` by a truncated Neumann series, :math:`u = \alpha \sum_{j=0}^{K} (I - \alpha A)^j v`.

    It looks K + 1 inner steps of size :math:`\alpha` back, bears products that vary from call to call, and never stops
    the device. It diverges where :math:`\alpha` is above :math:`2 / \lambda_{max}`, as the residual in ``info`` shows.

    Args:
        problem: The problem.
        params: Parameters close to the solution.
        hparams: Hyperparameters.
        state: That of the result before.
        steps: The number of products K.
        alpha: The factor :math:`\alpha`: the learning rate of the inner problem is a safe choice.
        warm_start: Whether to begin where the last solve ended; off, since the series is then no longer truncated.
        settings: ``ridge``, ``product``, ``strict``.

    Returns:
        As for :func:`ift`.

    Example:
        >>> import torch
        >>> problem = Problem(lambda w, h: ((w["w"] - h["goal"]) ** 2).sum(), lambda w, h: (w["w"] ** 2).sum())
        >>> ift_neumann(problem, {"w": torch.tensor([3.0])}, {"goal": torch.tensor(3.0)}, steps=2, alpha=0.25).gradients
        {'goal': tensor(5.2500)}
    """
    settings = {"strict": None, "warm_start": warm_start, "tol": 0.0, "maxiter": steps} | settings
    return ift(problem, params, hparams, state, solve=partial(neumann, alpha=alpha), **settings)


def ift_exact(
    problem: Problem,
    params: Mapping[str, Tensor],
    hparams: Mapping[str, Tensor],
    state: Mapping[str, Any] | None = None,
    **settings: Any,
) -> HypergradientResult:
    """:func:`ift` with the matrix formed and factorised: the measure for the others, for small models.

    Args:
        problem: The problem.
        params: Parameters close to the solution.
        hparams: Hyperparameters.
        state: Not needed.
        settings: ``limit``, the largest number of parameters; ``ridge``, ``product``.

    Returns:
        As for :func:`ift`.

    Raises:
        ValueError: If there are too many parameters, or the matrix is singular.

    Example:
        >>> import torch
        >>> problem = Problem(lambda w, h: ((w["w"] - h["goal"]) ** 2).sum(), lambda w, h: (w["w"] ** 2).sum())
        >>> ift_exact(problem, {"w": torch.tensor([3.0])}, {"goal": torch.tensor(3.0)}).gradients
        {'goal': tensor(6.)}
    """
    return ift(problem, params, hparams, state, solve=lu, warm_start=False, strict=None, **settings)


def _multiple(u: Tensor, p: Tensor, mixed: Partial) -> Partial:
    """The mixed product with u, a multiple of p, from that with p."""
    square = p @ p
    factor = (u @ p) / torch.where(square > 0, square, torch.ones_like(square))
    return {name: None if part is None else (factor * part).to(part.dtype) for name, part in mixed.items()}


def _check(info: SolveInfo, strict: bool | None) -> None:
    if strict is None or bool(info.converged):
        return
    remedy = (
        "the Hessian has negative curvature: use ift_normal_cg, product='gauss_newton' or a ridge"
        if info.negative_curvature
        else "raise maxiter or tol, or add a ridge"
    )
    message = f"the linear solve did not converge (residual {float(info.residual):.1e}): {remedy}"
    if strict:
        raise RuntimeError(message)
    warnings.warn(message, stacklevel=4)
