"""Euclidean projections on hyperplanes, half-spaces and affine sets, in the form of the other projections."""

import torch
from torch import Tensor

from lightning_hpo.functional.bilevel.sets import require

__all__ = ["projection_affine_set", "projection_halfspace", "projection_hyperplane"]


def projection_hyperplane(x: Tensor, hyper: tuple[Tensor, float | Tensor]) -> Tensor:
    r"""On the hyperplane :math:`a^\top p = b`: :math:`x - a (a^\top x - b) / a^\top a`.

    Args:
        x: Shape ``(..., d)``.
        hyper: The normal a of shape ``(d,)``, not 0, and the number b.

    Returns:
        The shape of ``x``.

    Raises:
        ValueError: If the normal is 0.

    References:
        Parikh and Boyd, "Proximal Algorithms", 2014, sec. 6.2.2.

    Example:
        >>> projection_hyperplane(torch.tensor([2.0, 0.0]), (torch.tensor([1.0, 1.0]), 1.0))
        tensor([ 1.5000, -0.5000])
    """
    normal, level = hyper
    require(("the normal vector must not be 0", (normal != 0).any(-1)))
    return x - ((x @ normal - level) / (normal @ normal))[..., None] * normal


def projection_halfspace(x: Tensor, hyper: tuple[Tensor, float | Tensor]) -> Tensor:
    r"""On the half-space :math:`a^\top p \le b`: :math:`x - a (a^\top x - b)_+ / a^\top a`.

    Args:
        x: Shape ``(..., d)``.
        hyper: The normal a of shape ``(d,)``, not 0, and the number b.

    Returns:
        The shape of ``x``.

    Raises:
        ValueError: If the normal is 0.

    References:
        Parikh and Boyd, "Proximal Algorithms", 2014, sec. 6.2.3.

    Example:
        >>> projection_halfspace(torch.tensor([2.0, 0.0]), (torch.tensor([1.0, 1.0]), 3.0))
        tensor([2., 0.])
    """
    normal, level = hyper
    require(("the normal vector must not be 0", (normal != 0).any(-1)))
    return x - (torch.relu(x @ normal - level) / (normal @ normal))[..., None] * normal


def projection_affine_set(x: Tensor, hyper: tuple[Tensor, Tensor]) -> Tensor:
    r"""On the affine set :math:`A p = b`: :math:`x - A^\top (A A^\top)^{-1} (A x - b)`.

    Args:
        x: Shape ``(..., d)``.
        hyper: A of shape ``(m, d)`` with independent rows, and b of shape ``(m,)``.

    Returns:
        The shape of ``x``.

    Raises:
        ValueError: If the rows of A are dependent: the set is empty or a row can be left out.

    References:
        Parikh and Boyd, "Proximal Algorithms", 2014, sec. 6.2.1.

    Example:
        >>> projection_affine_set(torch.tensor([2.0, 0.0]), (torch.tensor([[1.0, 1.0]]), torch.tensor([1.0])))
        tensor([ 1.5000, -0.5000])
    """
    matrix, level = hyper
    gram = matrix @ matrix.mT
    pivots = torch.linalg.cholesky_ex(gram.detach()).L.diagonal(dim1=-2, dim2=-1)
    least = torch.finfo(x.dtype).eps ** 0.5 * pivots.amax(-1, keepdim=True)
    require(("the rows of A are dependent: the set is empty or a row can be left out", pivots > least))
    return x - torch.linalg.solve_ex(gram, (x @ matrix.mT - level)[..., None]).result[..., 0] @ matrix
