r"""Proximal operators :math:`\mathrm{prox}_{s g}(x) = \arg\min_p \tfrac12 \|p - x\|^2 + s\, g(p, h)`.

All have the form ``prox(x, hyper, scaling)``, are differentiable in ``x`` and ``hyper`` in both modes and under
:func:`torch.func.vmap`, and give no NaN at 0. Their derivative at a kink is one of the two one-sided ones.
"""

import torch
from torch import Tensor

__all__ = [
    "prox_elastic_net",
    "prox_group_lasso",
    "prox_lasso",
    "prox_non_negative_lasso",
    "prox_non_negative_ridge",
    "prox_none",
    "prox_ridge",
]


def prox_none(x: Tensor, hyper: None = None, scaling: float | Tensor = 1.0) -> Tensor:  # noqa: ARG001
    """The operator of :math:`g = 0`: the identity.

    Args:
        x: Any shape.
        hyper: Not used.
        scaling: Not used.

    Returns:
        ``x``.

    Example:
        >>> prox_none(torch.tensor([1.0]))
        tensor([1.])
    """
    return x


def prox_lasso(x: Tensor, hyper: float | Tensor, scaling: float | Tensor = 1.0) -> Tensor:
    r"""Soft threshold, for :math:`g(p) = \lambda \|p\|_1`: :math:`\mathrm{sign}(x) (|x| - s\lambda)_+`.

    Args:
        x: Any shape.
        hyper: The weight :math:`\lambda \ge 0`, of a shape that broadcasts with ``x``.
        scaling: The factor s.

    Returns:
        The shape of ``x``.

    References:
        Parikh and Boyd, "Proximal Algorithms", 2014, sec. 6.5.2.

    Example:
        >>> prox_lasso(torch.tensor([3.0, -0.5, -2.0]), 1.0)
        tensor([ 2., -0., -1.])
    """
    return torch.sign(x) * torch.relu(x.abs() - scaling * hyper)


def prox_non_negative_lasso(x: Tensor, hyper: float | Tensor, scaling: float | Tensor = 1.0) -> Tensor:
    r"""For :math:`g(p) = \lambda \sum_i p_i` with :math:`p \ge 0`: :math:`(x - s\lambda)_+`.

    Args:
        x: Any shape.
        hyper: The weight :math:`\lambda`, of a shape that broadcasts with ``x``.
        scaling: The factor s.

    Returns:
        The shape of ``x``.

    References:
        Parikh and Boyd, "Proximal Algorithms", 2014, sec. 6.5.2.

    Example:
        >>> prox_non_negative_lasso(torch.tensor([3.0, -2.0]), 1.0)
        tensor([2., 0.])
    """
    return torch.relu(x - scaling * hyper)


def prox_elastic_net(x: Tensor, hyper: tuple[float | Tensor, float | Tensor], scaling: float | Tensor = 1.0) -> Tensor:
    r"""For :math:`g(p) = \lambda (\|p\|_1 + \tfrac{\gamma}{2} \|p\|^2)`.

    It is the soft threshold of :math:`s\lambda`, divided by :math:`1 + s\lambda\gamma`.

    Args:
        x: Any shape.
        hyper: The pair :math:`(\lambda, \gamma)`, each of a shape that broadcasts with ``x``.
        scaling: The factor s.

    Returns:
        The shape of ``x``.

    References:
        Parikh and Boyd, "Proximal Algorithms", 2014, sec. 6.5.3.

    Example:
        >>> prox_elastic_net(torch.tensor([3.0, -0.5]), (1.0, 3.0))
        tensor([0.5000, -0.0000])
    """
    lasso, ridge = hyper
    return prox_lasso(x, lasso, scaling) / (1 + scaling * lasso * ridge)


def prox_group_lasso(x: Tensor, hyper: float | Tensor, scaling: float | Tensor = 1.0) -> Tensor:
    r"""For :math:`g(p) = \lambda \|p\|_2`, one group: :math:`(1 - s\lambda / \|x\|)_+ \, x`.

    Map it over several groups with :func:`torch.func.vmap`.

    Args:
        x: One group, any shape.
        hyper: The weight :math:`\lambda \ge 0`, a number.
        scaling: The factor s.

    Returns:
        The shape of ``x``; its derivative at :math:`x = 0` is 0.

    References:
        Parikh and Boyd, "Proximal Algorithms", 2014, sec. 6.5.4.

    Example:
        >>> prox_group_lasso(torch.tensor([3.0, 4.0]), 1.0), prox_group_lasso(torch.zeros(2), 1.0)
        (tensor([2.4000, 3.2000]), tensor([0., 0.]))
    """
    square = x.square().sum()
    inside = square > 0
    length = torch.where(inside, square, torch.ones_like(square)).sqrt()  # the root has no derivative at 0
    return torch.where(inside, torch.relu(1 - scaling * hyper / length) * x, torch.zeros_like(x))


def prox_ridge(x: Tensor, hyper: float | Tensor, scaling: float | Tensor = 1.0) -> Tensor:
    r"""For :math:`g(p) = \tfrac{\lambda}{2} \|p\|^2`: :math:`x / (1 + s\lambda)`.

    Args:
        x: Any shape.
        hyper: The weight :math:`\lambda \ge 0`, of a shape that broadcasts with ``x``.
        scaling: The factor s.

    Returns:
        The shape of ``x``.

    References:
        Parikh and Boyd, "Proximal Algorithms", 2014, sec. 6.1.1.

    Example:
        >>> prox_ridge(torch.tensor([3.0]), 2.0)
        tensor([1.])
    """
    return x / (1 + scaling * hyper)


def prox_non_negative_ridge(x: Tensor, hyper: float | Tensor, scaling: float | Tensor = 1.0) -> Tensor:
    r"""For :math:`g(p) = \tfrac{\lambda}{2} \|p\|^2` with :math:`p \ge 0`: :math:`x_+ / (1 + s\lambda)`.

    Args:
        x: Any shape.
        hyper: The weight :math:`\lambda \ge 0`, of a shape that broadcasts with ``x``.
        scaling: The factor s.

    Returns:
        The shape of ``x``.

    References:
        Parikh and Boyd, "Proximal Algorithms", 2014, sec. 6.1.1.

    Example:
        >>> prox_non_negative_ridge(torch.tensor([3.0, -3.0]), 2.0)
        tensor([1., 0.])
    """
    return torch.relu(x) / (1 + scaling * hyper)
