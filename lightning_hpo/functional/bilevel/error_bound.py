"""How exact a derivative is at an approximate solution."""

from torch import Tensor

__all__ = ["jacobian_error_bound"]


def jacobian_error_bound(
    solution_error: float | Tensor, alpha: float, beta: float, gamma: float, radius: float
) -> float | Tensor:
    r"""How far the Jacobian at an approximate root may be from that at the root.

    If :math:`\|A v\| \ge \alpha \|v\|`, A is :math:`\gamma`- and B is :math:`\beta`-Lipschitz in x and
    :math:`\|B\| \le R`, then :math:`\|J(\hat x) - J(x^\star)\| \le (\beta / \alpha + \gamma R / \alpha^2)
    \|\hat x - x^\star\|`.

    Args:
        solution_error: :math:`\|\hat x - x^\star\|`; for a gradient of an :math:`\alpha`-strongly convex function at
            most :math:`\|F(\hat x, \theta)\| / \alpha`.
        alpha: Smallest singular value of A, positive.
        beta: Lipschitz constant of B, at least 0.
        gamma: Lipschitz constant of A, at least 0.
        radius: The bound R on B, at least 0.

    Returns:
        The bound.

    Raises:
        ValueError: If a constant is out of range; all are listed.

    References:
        Blondel et al., "Efficient and Modular Implicit Differentiation", NeurIPS 2022, thm. 1.

    Example:
        >>> jacobian_error_bound(0.01, alpha=2.0, beta=1.0, gamma=4.0, radius=3.0)
        0.035
    """
    problems = [] if alpha > 0 else [f"alpha must be positive, got {alpha!r}"]
    others = {"beta": beta, "gamma": gamma, "radius": radius}
    problems += [f"{name} must be at least 0, got {value!r}" for name, value in others.items() if not value >= 0]
    if problems:
        raise ValueError("; ".join(problems))
    return (beta / alpha + gamma * radius / alpha**2) * solution_error
