"""Products with the second derivatives of a lower problem, and the norm of the mixed one."""

import torch
from torch import Tensor

from lightning_hpo.functional.bilevel.lower_problem import LowerProblem
from lightning_hpo.functional.bilevel.second_derivatives import naming_the_remedy, require_whole_graph

__all__ = ["LowerDerivatives"]


class LowerDerivatives:
    r"""Products with :math:`H = \nabla^2_{xx} h` and :math:`J = \nabla^2_{x\theta} h` at one point.

    The graph of :math:`\nabla_x h` is built once and serves all products. Batched problems count as one, with x
    stacked: H is then block diagonal, and J the blocks below each other.

    Args:
        problem: The lower problem.
        x: Shape ``(m, ...)`` where batched.
        theta: Hyperparameters.

    Raises:
        ValueError: If h does not depend on x.

    Example:
        >>> problem = LowerProblem(lambda x, t: (t.exp() * x**2).sum() / 2, mu=1.0)
        >>> at = LowerDerivatives(problem, torch.tensor([1.0, 2.0]), torch.zeros(2))
        >>> at.hessian(torch.ones(2)), at.cross(torch.ones(2)), at.push_cross(torch.ones(2))
        (tensor([1., 1.]), tensor([1., 2.]), tensor([1., 2.]))
    """

    def __init__(self, problem: LowerProblem, x: Tensor, theta: Tensor) -> None:
        self.reduce = problem.reduce
        self.x, self.theta = x.detach().requires_grad_(), theta.detach().requires_grad_()
        with torch.enable_grad(), naming_the_remedy():
            value = problem.total(self.x, self.theta).sum()
            if not value.requires_grad:
                raise ValueError("the lower loss does not depend on x: is it computed from the x that it is given?")
            self.graph = torch.autograd.grad(value, self.x, create_graph=True)[0]
            require_whole_graph(self.graph)
        self._transposed: tuple[Tensor, Tensor] | None = None

    def hessian(self, p: Tensor) -> Tensor:
        """The product H p, as a vector.

        Args:
            p: As many entries as x.

        Returns:
            Shape ``(x.numel(),)``.
        """
        return self.reduce(self._pull(p, self.x).reshape(-1))

    def cross(self, q: Tensor) -> Tensor:
        r"""The product :math:`J^\top q`, in the shape of :math:`\theta`; summed over batched problems.

        Args:
            q: As many entries as x.

        Returns:
            The product.
        """
        return self.reduce(self._pull(q, self.theta))

    def push_cross(self, v: Tensor) -> Tensor:
        """The product J v, as a vector.

        Args:
            v: As many entries as theta.

        Returns:
            Shape ``(x.numel(),)``.
        """
        with torch.enable_grad(), naming_the_remedy():
            if self._transposed is None:  # J^T p is linear in p; its derivative along v is J v
                p = torch.zeros_like(self.graph, requires_grad=True)
                row = _grad(self.graph, self.theta, p, create_graph=True)
                self._transposed = p, row
            p, row = self._transposed
            return self.reduce(_grad(row, p, v.view_as(self.theta)).reshape(-1))

    def cross_norm(self, start: Tensor, iterations: int = 10) -> Tensor:
        r"""Power iteration for :math:`\|J\|`, the largest singular value, from below.

        Args:
            start: First direction, as many entries as theta; ones where it is 0.
            iterations: Products with J and its transpose.

        Returns:
            A scalar in float64.
        """
        v = start.reshape(-1)
        norm = v.new_zeros(())
        length = torch.linalg.vector_norm(v)
        v = torch.where(length > 0, v / torch.where(length > 0, length, 1.0), torch.full_like(v, len(v) ** -0.5))
        for _ in range(iterations):
            image = self.push_cross(v)
            norm = torch.maximum(norm, torch.linalg.vector_norm(image))
            v = self.cross(image).reshape(-1)
            length = torch.linalg.vector_norm(v)
            v = v / torch.where(length > 0, length, 1.0)
        return norm.double()

    def _pull(self, cotangent: Tensor, of: Tensor) -> Tensor:
        with naming_the_remedy():
            return _grad(self.graph, of, cotangent.view_as(self.graph))


def _grad(output: Tensor, of: Tensor, cotangent: Tensor, create_graph: bool = False) -> Tensor:
    """Zeros where nothing is reached; the graph can be used again."""
    if not output.requires_grad:
        return torch.zeros_like(of)
    (found,) = torch.autograd.grad(output, of, cotangent, True, create_graph, allow_unused=True)
    return torch.zeros_like(of) if found is None else found
