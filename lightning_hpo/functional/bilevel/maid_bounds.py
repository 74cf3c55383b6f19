r"""Bounds that inexact solutions leave valid: on the hypergradient, on the outer loss, on its decrease.

All work on numbers or float64 tensors, one entry a lower problem, and know nothing of how a problem is solved.
"""

import torch
from torch import Tensor

__all__ = ["decrease_gap", "hypergradient_error_bound", "value_bounds"]


def hypergradient_error_bound(
    error: Tensor,
    residual: Tensor,
    *,
    mu: Tensor,
    cross_norm: Tensor,
    upper_gradient: Tensor,
    upper_smoothness: Tensor | float,
    inverse_lipschitz: Tensor | float,
    cross_lipschitz: Tensor | float,
) -> Tensor:
    r"""A-posteriori bound on the error of an inexact hypergradient.

    .. math::

        \omega = c\, e + \frac{\|J\|}{\mu} \delta + \frac{L_J L_g}{\mu} e^2, \qquad
        c = \frac{L_g \|J\|}{\mu} + L_{H^{-1}} \|\nabla g\| \|J\| + \frac{L_J \|\nabla g\|}{\mu}

    Everything is taken at the inexact solution, so that the bound can be computed.

    Args:
        error: :math:`e \ge \|\tilde x - \hat x\|`.
        residual: :math:`\delta \ge \|H q - \nabla g\|`.
        mu: Modulus of strong convexity.
        cross_norm: :math:`\|J\|`, the largest singular value of :math:`\nabla^2_{x\theta} h`.
        upper_gradient: :math:`\|\nabla g\|`.
        upper_smoothness: Lipschitz constant :math:`L_g` of :math:`\nabla g`.
        inverse_lipschitz: Lipschitz constant in x of :math:`H^{-1}`; at most :math:`L_H / \mu^2`.
        cross_lipschitz: Lipschitz constant in x of J.

    Returns:
        The bound :math:`\omega`, of the shape of ``error``.

    References:
        Salehi et al., SIAM J. Math. Data Sci. 7(3), 2025, theorem 2.1; Ehrhardt and Roberts, "Analyzing inexact
        hypergradients for bilevel learning", IMA J. Appl. Math. 2024.

    Example:
        >>> one = torch.ones(1)
        >>> hypergradient_error_bound(0.1 * one, 0.2 * one, mu=2 * one, cross_norm=4 * one, upper_gradient=one,
        ...                           upper_smoothness=3.0, inverse_lipschitz=0.0, cross_lipschitz=0.0)
        tensor([1.])
    """
    slope = upper_smoothness * cross_norm / mu + inverse_lipschitz * upper_gradient * cross_norm
    slope = slope + cross_lipschitz * upper_gradient / mu
    return slope * error + cross_norm / mu * residual + cross_lipschitz * upper_smoothness / mu * error.square()


def value_bounds(
    value: Tensor, gradient: Tensor, error: Tensor, smoothness: Tensor | float, convex: bool = False
) -> tuple[Tensor, Tensor]:
    r"""Between which values the outer loss lies at the exact solution.

    .. math::

        U_{low} = g - \|\nabla g\| e - \tfrac{L_g}{2} e^2 \;\le\; g(\hat x) \;\le\;
        g + \|\nabla g\| e + \tfrac{L_g}{2} e^2 = U_{up}

    Args:
        value: :math:`g(\tilde x)`.
        gradient: :math:`\|\nabla g(\tilde x)\|`.
        error: The error achieved, :math:`e \ge \|\tilde x - \hat x\|`.
        smoothness: :math:`L_g`.
        convex: Whether g is convex, so that the last term of the lower bound is not needed.

    Returns:
        Lower and upper bound.

    References:
        Salehi et al., SIAM J. Math. Data Sci. 7(3), 2025, lemma 3.5.

    Example:
        >>> value_bounds(torch.tensor(1.0), torch.tensor(2.0), torch.tensor(0.1), 10.0)
        (tensor(0.7500), tensor(1.2500))
    """
    first, second = gradient * error, smoothness / 2 * error.square()
    return value - first - (torch.zeros_like(second) if convex else second), value + first + second


def decrease_gap(upper_after: float, lower_before: float, decrease: float) -> float:
    r"""Inexact sufficient decrease: :math:`\psi = U_{up}(\theta_+) - U_{low}(\theta) + \mathrm{decrease}`.

    Where it is not positive, the true outer loss falls by at least ``decrease``, here
    :math:`\lambda \langle z, \theta - \theta_+ \rangle`, which is :math:`\lambda \alpha \|z\|^2` without bounds on
    :math:`\theta`.

    Args:
        upper_after: Upper bound on the loss after the step.
        lower_before: Lower bound on the loss before it.
        decrease: What the loss must fall by.

    Returns:
        The gap; infinity where a bound is not a number.

    References:
        Salehi et al., SIAM J. Math. Data Sci. 7(3), 2025, lemma 3.5.

    Example:
        >>> round(decrease_gap(1.0, 1.5, 0.2), 3), decrease_gap(float("nan"), 1.5, 0.2)
        (-0.3, inf)
    """
    gap = upper_after - lower_before + decrease
    return gap if gap == gap else float("inf")
