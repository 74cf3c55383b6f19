r"""Products with the second derivatives of an inner problem: exact, by finite differences, and Gauss-Newton.

With the optimality condition :math:`F(w, \theta) = 0` and :math:`A = \partial_w F`, estimators need :math:`A^\top p`,
sometimes :math:`A p`, and :math:`(\partial_\theta F)^\top p` for vectors p. None of the matrices is formed, and the
parameters are never written to.
"""

from typing import Literal, Protocol

import torch
from torch import Tensor

from lightning_hpo.functional.bilevel.linear_system import norm
from lightning_hpo.functional.bilevel.problem import Loss, Partial, Point, Problem, scalar
from lightning_hpo.functional.bilevel.second_derivatives import naming_the_remedy, require_whole_graph

__all__ = [
    "Product",
    "Products",
    "central_difference",
    "products",
]

Product = Literal["exact", "fd", "gauss_newton"]


class Products(Protocol):
    """Products with the second derivatives at one point, of this rank's part of the batch."""

    @property
    def residual(self) -> Tensor:
        """F at the point, as a vector without a graph."""
        ...

    def push(self, p: Tensor) -> Tensor:
        """The vector A p."""
        ...

    def pull_back(
        self, p: Tensor, *, params: bool = True, hparams: bool = True, last: bool = False
    ) -> tuple[Tensor, Partial]:
        """The vector of products of the transpose of A with p, and by name those of the mixed derivatives with p.

        With ``last=True`` memory is given back on the way, and no product may follow.
        """
        ...


def products(problem: Problem, point: Point, product: Product = "exact", *, loss: Loss | None = None) -> Products:
    r"""Products with :math:`\partial_w F` and :math:`\partial_\theta F` at a point.

    ``"exact"`` differentiates twice; the graph of the first derivative is built once and serves all products. ``"fd"``
    uses first derivatives alone, at :math:`w \pm h p / \|p\|` with :math:`h = \sqrt{\epsilon} (1 + \|w\|)` for the
    machine precision :math:`\epsilon` of the parameters: two gradients a product. ``"gauss_newton"`` replaces
    :math:`\nabla^2_{ww} L` by :math:`\tilde J^\top \nabla^2 \ell \tilde J` with the Jacobian of :math:`(z, w)` to
    :math:`w`, which is positive semidefinite; mixed derivatives stay exact.

    Args:
        problem: The problem.
        point: Where.
        product: Which kind.
        loss: The training loss, where it is not the problem's.

    Returns:
        The products.

    Raises:
        ValueError: If the kind is unknown, or the problem lacks what it needs.

    References:
        Pearlmutter, "Fast Exact Multiplication by the Hessian", 1994; Schraudolph, "Fast Curvature Matrix-Vector
        Products for Second-Order Gradient Descent", 2002.

    Example:
        >>> cubes = Problem(lambda w, h: h["a"] * (w["w"] ** 3).sum(), lambda w, h: w["w"].sum())
        >>> point = Point({"w": torch.tensor([1.0, 2.0])}, {"a": torch.tensor(0.5)})
        >>> products(cubes, point).pull_back(torch.ones(2))  # 6 a w and 3 w^2
        (tensor([3., 6.]), {'a': tensor(15.)})
    """
    if product == "exact":
        return _Exact(problem, point, loss)
    if product == "fd":
        if problem.residual is not None:
            raise ValueError(
                "product='fd' differentiates the gradient of the training loss; `residual` needs product='exact'"
            )
        return _FiniteDifference(point, loss or problem.train_loss)
    if product == "gauss_newton":
        return _GaussNewton(problem, point, loss)
    raise ValueError(f"product must be 'exact', 'fd' or 'gauss_newton', got {product!r}")


def central_difference(
    loss: Loss, point: Point, direction: Tensor, step: Tensor | float, *, params: bool = True, hparams: bool = True
) -> tuple[Tensor, Partial]:
    r"""The slope of a loss's gradients along a direction of the parameters, from two gradients.

    .. math::

        \frac{\nabla L(w + h d, \theta) - \nabla L(w - h d, \theta)}{2 h}

    Args:
        loss: :math:`L(w, \theta)`.
        point: Where; its parameters are copied, not moved.
        direction: :math:`d`, a vector.
        step: :math:`h`, positive.
        params: Whether the gradient of the parameters is wanted; zeros otherwise.
        hparams: Whether the gradients of the hyperparameters are wanted.

    Returns:
        :math:`\approx \nabla^2_{ww} L\, d` as a vector, and by name :math:`(\partial_\theta \nabla_w L)^\top d`.

    Example:
        >>> point = Point({"w": torch.tensor([1.0, 2.0])}, {"a": torch.tensor(0.5)})
        >>> central_difference(lambda w, h: h["a"] * (w["w"] ** 2).sum(), point, torch.ones(2), 0.5)
        (tensor([1., 1.]), {'a': tensor(6.)})
    """
    middle = point.vector(point.params).detach()

    def gradient(weights: Tensor) -> tuple[Tensor, Partial]:
        return Point(point.unravel(weights), point.hparams).gradient(loss, "train_loss", params=params, hparams=hparams)

    (above, above_h), (below, below_h) = gradient(middle + step * direction), gradient(middle - step * direction)
    slopes: dict[str, Tensor | None] = {}
    for name, upper in above_h.items():
        lower = below_h[name]
        slopes[name] = None if upper is None or lower is None else (upper - lower) / (2 * step)
    return (above - below) / (2 * step) if params else above, slopes


class _Exact:
    """One graph of F; products differentiate it."""

    def __init__(self, problem: Problem, point: Point, loss: Loss | None) -> None:
        self.point, self.symmetric = point, problem.residual is None
        with torch.enable_grad(), naming_the_remedy():
            if problem.residual is None:
                value = scalar((loss or problem.train_loss)(point.params, point.hparams), "train_loss")
                grads = torch.autograd.grad(value, list(point.params.values()), create_graph=True, allow_unused=True)
                self.graph = point.vector(dict(zip(point.params, grads, strict=True)))
            else:
                found = problem.residual(point.params, point.hparams)
                self.graph = point.layout.ravel(found, "residual(params, hparams)", point.dtype)
            require_whole_graph(self.graph)
        self._linear: tuple[Tensor, Tensor] | None = None

    @property
    def residual(self) -> Tensor:
        return self.graph.detach()

    def push(self, p: Tensor) -> Tensor:
        if self.symmetric:
            return self.pull_back(p, hparams=False)[0]
        # A^T q is linear in q, and its transpose is A: differentiating twice backward needs no forward mode.
        with torch.enable_grad(), naming_the_remedy():
            if self._linear is None:
                q = torch.zeros_like(self.graph, requires_grad=True)
                inputs = list(self.point.params.values())
                rows = torch.autograd.grad(self.graph, inputs, q, create_graph=True, allow_unused=True)
                self._linear = q, self.point.vector(dict(zip(self.point.params, rows, strict=True)))
            q, transposed = self._linear
            return torch.autograd.grad(transposed, q, p, retain_graph=True)[0]

    def pull_back(
        self, p: Tensor, *, params: bool = True, hparams: bool = True, last: bool = False
    ) -> tuple[Tensor, Partial]:
        with naming_the_remedy():
            return self.point.pull_back(self.graph, p, params=params, hparams=hparams, keep=not last)


class _FiniteDifference:
    """First derivatives alone, at two copies of the parameters."""

    def __init__(self, point: Point, loss: Loss) -> None:
        self.point, self.loss = point, loss
        coarsest = max(torch.finfo(value.dtype).eps for value in point.params.values())
        self.step = coarsest**0.5 * (1 + norm(point.vector(point.params).detach()))

    @property
    def residual(self) -> Tensor:
        return self.point.gradient(self.loss, "train_loss", hparams=False)[0]

    def push(self, p: Tensor) -> Tensor:
        return self.pull_back(p, hparams=False)[0]

    def pull_back(
        self,
        p: Tensor,
        *,
        params: bool = True,
        hparams: bool = True,
        last: bool = False,
    ) -> tuple[Tensor, Partial]:
        length = norm(p)
        unit = p / torch.where(length > 0, length, 1)
        vector, slopes = central_difference(self.loss, self.point, unit, self.step, params=params, hparams=hparams)
        return length * vector, {name: None if slope is None else length * slope for name, slope in slopes.items()}


class _GaussNewton:
    """The network linearised, the loss on its outputs (and on the parameters themselves) differentiated twice."""

    def __init__(self, problem: Problem, point: Point, loss: Loss | None) -> None:
        if problem.outputs is None or problem.output_loss is None:
            raise ValueError("product='gauss_newton' needs `outputs` and `output_loss` in the problem")
        if loss is not None:
            raise ValueError("product='gauss_newton' knows the problem's own training loss alone")
        self.point, self.exact = point, _Exact(problem, point, None)
        inputs = list(point.params.values())
        with torch.enable_grad(), naming_the_remedy():
            self.outputs = problem.outputs(point.params, point.hparams)
            self.q = torch.zeros_like(self.outputs, requires_grad=True)
            self.rows = _grad(self.outputs, inputs, self.q, create_graph=True)
            hparams = {name: value.detach() for name, value in point.hparams.items()}
            self.at = [value.detach().requires_grad_() for value in (self.outputs, *inputs)]
            copies = dict(zip(point.params, self.at[1:], strict=True))
            value = scalar(problem.output_loss(self.at[0], copies, hparams), "output_loss")
            self.slopes = _grad(value, self.at, None, create_graph=True)

    @property
    def residual(self) -> Tensor:
        return self.exact.residual

    def push(self, p: Tensor) -> Tensor:
        parts = list(self.point.unravel(p).values())
        with naming_the_remedy():
            (moved,) = _grad(self.rows, [self.q], parts)  # J p
            curved = _grad(self.slopes, self.at, [moved, *parts])
            pulled = _grad(self.outputs, list(self.point.params.values()), curved[0])
        both = [first + second for first, second in zip(pulled, curved[1:], strict=True)]
        return self.point.vector(dict(zip(self.point.params, both, strict=True)))

    def pull_back(
        self, p: Tensor, *, params: bool = True, hparams: bool = True, last: bool = False
    ) -> tuple[Tensor, Partial]:
        vector = self.push(p) if params else torch.zeros_like(p)
        return vector, self.exact.pull_back(p, params=False, hparams=hparams, last=last)[1]


def _grad(
    outputs: Tensor | list[Tensor],
    inputs: list[Tensor],
    cotangents: Tensor | list[Tensor] | None,
    create_graph: bool = False,
) -> list[Tensor]:
    """Zeros where nothing is reached, and a graph that can be used again."""
    outputs = [outputs] if isinstance(outputs, Tensor) else outputs
    cotangents = [cotangents] if isinstance(cotangents, Tensor) else cotangents
    live = [index for index, output in enumerate(outputs) if output.requires_grad]
    if not live:
        return [torch.zeros_like(value) for value in inputs]
    given = None if cotangents is None else [cotangents[index] for index in live]
    found = torch.autograd.grad(
        [outputs[index] for index in live], inputs, given, True, create_graph, allow_unused=True
    )
    return [torch.zeros_like(value) if part is None else part for value, part in zip(inputs, found, strict=True)]
