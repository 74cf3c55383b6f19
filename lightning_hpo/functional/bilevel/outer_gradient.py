"""One hypergradient of a single-loop method: one step on the linear system, or a Neumann series."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lightning_hpo.functional.bilevel.linear_system import norm
from lightning_hpo.functional.bilevel.neumann import neumann
from lightning_hpo.functional.bilevel.problem import (
    Loss,
    Partial,
    Point,
    Problem,
    Tensors,
    UnreachedError,
    require_reached,
    scalar,
    wide_dtype,
)
from lightning_hpo.functional.bilevel.products import Product, Products, products
from lightning_hpo.functional.bilevel.trees import TreeLayout

__all__ = ["OuterGradient", "Solver", "largest_curvature", "outer_gradient"]

Solver = Literal["step", "neumann"]


class OuterGradient(NamedTuple):
    r"""A hypergradient and what belongs to the next one.

    Attributes:
        gradients: :math:`h` by the names of the outer parameters, with at least 32 bits.
        z: Estimate of :math:`[\nabla^2_{yy} g]^{-1} \nabla_y f` by the names of the inner ones, with at least 32 bits.
        norms: Lengths of :math:`h`, of the new :math:`z`, of :math:`\nabla_y F`, and of the residual
            :math:`\nabla^2_{yy} G z - \nabla_y F` at the :math:`z` that was used; shape ``(4,)``, on the device.
        loss: The outer loss before the step, a scalar on the device.
    """

    gradients: Tensors
    z: Tensors
    norms: Tensor
    loss: Tensor


def outer_gradient(
    problem: Problem,
    inner: Mapping[str, Tensor],
    outer: Mapping[str, Tensor],
    z: Mapping[str, Tensor] | None = None,
    *,
    z_lr: float,
    solver: Solver = "step",
    neumann_steps: int = 5,
    product: Product = "exact",
) -> OuterGradient:
    r"""The hypergradient with a running solution of the linear system.

    .. math::

        h = \nabla_x F - \nabla^2_{xy} G\, z, \qquad z \leftarrow z - \nu (\nabla^2_{yy} G\, z - \nabla_y F)

    The hypergradient uses the old :math:`z`, so one pass through the graph of :math:`\nabla_y G` gives both products.
    With ``solver="neumann"`` nothing runs along: :math:`z = \nu \sum_{j \le Q} (I - \nu \nabla^2_{yy} G)^j \nabla_y F`
    anew in each call, and it is the :math:`z` that is used. All is averaged over ranks before it is used, in one
    message (one more for the outer gradient and for each product with ``"neumann"``).

    Args:
        problem: :math:`G` as ``train_loss``, :math:`F` as ``val_loss``, each of its own batch.
        inner: Inner parameters :math:`y`.
        outer: Outer parameters :math:`x`.
        z: The running solution; zeros where None.
        z_lr: Step size :math:`\nu`; it must stay below :math:`2 / \lambda_{\max}` of :math:`\nabla^2_{yy} G`.
        solver: ``"step"`` or ``"neumann"``.
        neumann_steps: Products of the series, :math:`Q`.
        product: ``"exact"`` differentiates twice, ``"fd"`` takes differences of gradients.

    Returns:
        The hypergradient, the next :math:`z` and four lengths.

    Raises:
        ValueError: If the outer loss depends on nothing, no mixed derivative of the inner loss is there, or an outer
            parameter is reached by neither loss.
        SecondDerivativesMissingError: If the inner loss cannot be differentiated twice; it names the remedies.

    References:
        Hao, Gong and Liu, "Bilevel Optimization under Unbounded Smoothness", ICLR 2024, alg. 1; for the series Ji, Yang
        and Liang, "Bilevel Optimization: Convergence Analysis and Enhanced Design", ICML 2021.

    Example:
        >>> inner_loss = lambda y, x: ((y["y"] - x["x"]) ** 2).sum() / 2
        >>> problem = Problem(inner_loss, lambda y, x: ((y["y"] - 1) ** 2).sum() / 2)
        >>> y, x = {"y": torch.tensor([3.0])}, {"x": torch.tensor([3.0])}
        >>> first = outer_gradient(problem, y, x, z_lr=0.5)
        >>> outer_gradient(problem, y, x, first.z, z_lr=0.5).gradients, first.z  # z goes to y - 1, and h to z
        ({'x': tensor([1.])}, {'y': tensor([1.])})
    """
    point = Point(inner, outer)
    loss, slope, direct, scored = _slopes(problem.val_loss, point)
    operator = products(problem, point, product)
    if solver == "neumann":
        right = problem.reduce(slope)
        used, _ = neumann(lambda p: problem.reduce(operator.push(p)), right, maxiter=neumann_steps, alpha=z_lr)
    else:
        used = torch.zeros_like(slope) if z is None else point.vector(z)
    curved, mixed = operator.pull_back(used, last=True)
    curved, slope, flat, loss = _averaged(problem, point, (curved, slope, loss), (direct, mixed), scored)
    residual = curved - slope
    after = used - z_lr * residual if solver == "step" else used
    norms = torch.stack([norm(flat).to(after.dtype), norm(after), norm(slope), norm(residual)])
    return OuterGradient(_split(point.hparams, flat), _split(point.params, after), norms, loss)


def largest_curvature(
    problem: Problem,
    inner: Mapping[str, Tensor],
    outer: Mapping[str, Tensor],
    *,
    iterations: int = 20,
    product: Product = "exact",
) -> Tensor:
    r"""The largest :math:`|\lambda|` of :math:`\nabla^2_{yy} G`, from below, by power iteration.

    Args:
        problem: The problem.
        inner: Inner parameters.
        outer: Outer parameters.
        iterations: Products to take.
        product: As for :func:`outer_gradient`.

    Returns:
        A scalar.

    Example:
        >>> problem = Problem(lambda y, x: (x["x"] * y["y"] ** 2).sum(), lambda y, x: y["y"].sum())
        >>> largest_curvature(problem, {"y": torch.ones(2)}, {"x": torch.tensor([1.0, 4.0])})
        tensor(8.)
    """
    point = Point(inner, outer)
    operator: Products = products(problem, point, product)
    like = point.vector(point.params).detach()
    generator = torch.Generator().manual_seed(0)  # the same start on every rank
    vector = torch.randn(like.numel(), generator=generator, dtype=like.dtype).to(like.device)
    length = norm(vector)
    for _ in range(iterations):
        vector = problem.reduce(operator.push(vector / length.clamp(min=torch.finfo(like.dtype).tiny)))
        length = norm(vector)
    return length


def _slopes(loss: Loss, point: Point) -> tuple[Tensor, Tensor, Partial, bool]:
    """The outer loss, its gradients, and whether the inner parameters reach it."""
    with torch.enable_grad():
        value = scalar(loss(point.params, point.hparams), "outer loss")
    found = torch.autograd.grad(value, [*point.params.values(), *point.hparams.values()], allow_unused=True)
    first, rest = found[: len(point.params)], found[len(point.params) :]
    reached = any(part is not None for part in first)
    return (
        value.detach().reshape(1),
        point.vector(dict(zip(point.params, first, strict=True))),
        dict(zip(point.hparams, rest, strict=True)),
        reached,
    )


def _averaged(
    problem: Problem, point: Point, own: tuple[Tensor, Tensor, Tensor], parts: tuple[Partial, Partial], scored: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Product, slope, hypergradient and loss, averaged in one message; flags say what is reached on which rank."""
    (curved, slope, loss), (direct, mixed) = own, parts
    layout = TreeLayout(point.hparams)
    sums, reached = {}, []
    for name, value in point.hparams.items():
        first, second = direct[name], mixed[name]
        total = torch.zeros_like(value) if first is None else first
        sums[name] = total if second is None else total - second
        reached.append(first is not None or second is not None)
    flags = [scored, any(part is not None for part in mixed.values()), *reached]
    flat = layout.ravel(sums, dtype=wide_dtype(point.hparams)).detach()
    dtype = torch.promote_types(flat.dtype, curved.dtype)
    pieces = [curved.detach(), slope.detach(), flat, loss, flat.new_tensor([float(flag) for flag in flags])]
    message = problem.reduce(torch.cat([piece.to(dtype) for piece in pieces]))
    curved, slope, flat, loss, found = message.split([piece.numel() for piece in pieces])
    if not all(flags):
        _judge(list(point.hparams), found.tolist())
    return curved.to(point.dtype), slope.to(point.dtype), flat, loss[0]


def _judge(names: Sequence[str], flags: Sequence[float]) -> None:
    """Says what no rank reaches."""
    scored, crossed, *reached = flags
    if not crossed:
        raise UnreachedError(
            "cross derivative is zero: the gradient of the inner loss in the inner parameters does not depend on the "
            f"outer ones, {list(names)}"
        )
    require_reached([name for name, flag in zip(names, reached, strict=True) if not flag])
    if not scored:
        warnings.warn(
            "the outer loss does not depend on the inner parameters: there is nothing to differentiate implicitly",
            stacklevel=4,
        )


def _split(like: Mapping[str, Tensor], vector: Tensor) -> Tensors:
    """A vector as named tensors, in its own dtype."""
    parts = vector.split([value.numel() for value in like.values()])
    return {name: part.view(value.shape) for (name, value), part in zip(like.items(), parts, strict=True)}
