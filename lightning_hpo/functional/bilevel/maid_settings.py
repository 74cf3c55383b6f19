"""What MAID refuses to begin with, and how accuracies that are laid down beforehand shrink."""

import math
from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lightning_hpo.functional.bilevel.maid_problem import BilevelProblem

__all__ = ["Accuracy", "argument_problems", "start_problems", "tightening"]

Accuracy = Literal["adaptive", "fixed", "geometric", "quadratic", "cubic"]


def tightening(accuracy: str, iteration: int, nu_bar: float) -> float:
    r"""The factor of both accuracies from outer iteration k to the next.

    Args:
        accuracy: The rule.
        iteration: :math:`k`, from 0.
        nu_bar: Growth of the adaptive rule after success.

    Returns:
        The factor.

    References:
        Pedregosa, "Hyperparameter Optimization with Approximate Gradient", ICML 2016, sec. 4.

    Example:
        >>> [tightening(rule, 0, 1.05) for rule in ("adaptive", "fixed", "geometric", "quadratic", "cubic")]
        [1.05, 1.0, 0.9, 0.25, 0.125]
    """
    power = {"quadratic": 2, "cubic": 3}.get(accuracy)
    if power is not None:
        return ((iteration + 1) / (iteration + 2)) ** power
    return {"adaptive": nu_bar, "fixed": 1.0, "geometric": 0.9}[accuracy]


def argument_problems(given: Mapping[str, Any]) -> list[str]:
    """What is wrong with arguments of :class:`~lightning_hpo.functional.bilevel.maid.MAID`.

    Args:
        given: The arguments by name.

    Returns:
        A sentence for each.
    """
    g, problems = given, []
    if g["accuracy"] not in get_args(Accuracy):
        problems.append(f"accuracy must be one of {get_args(Accuracy)}, got {g['accuracy']!r}")
    for name in ("eps0", "delta0", "alpha0"):
        if g[name] is not None and not 0 < g[name] < math.inf:
            problems.append(f"{name} must be positive, got {g[name]!r}")
    for name in ("rho", "nu", "eta", "lam", "kappa"):
        if g[name] is not None and not 0 < g[name] < 1:
            problems.append(f"{name} must be between 0 and 1, got {g[name]!r}")
    for name in ("rho_bar", "nu_bar"):
        if g[name] is not None and not 1 < g[name] < math.inf:
            problems.append(f"{name} must be above 1, got {g[name]!r}")
    for name in ("max_backtracks", "lower_maxiter", "cg_maxiter"):
        if g[name] < 1:
            problems.append(f"{name} must be at least 1, got {g[name]!r}")
    if not 0 <= g["tolerance"] < math.inf:
        problems.append(f"tolerance must be at least 0, got {g['tolerance']!r}")
    if g["check_descent"] and g["lam"] >= g["eta"]:
        problems.append(f"lam must be below eta for check_descent, got {g['lam']!r} and {g['eta']!r}")
    adaptive = [name for name in ("nu", "nu_bar") if g[name] is not None] + ["check_descent"] * g["check_descent"]
    if g["accuracy"] != "adaptive" and adaptive:
        problems.append(f"accuracy={g['accuracy']!r} leaves nothing to adapt: drop {', '.join(adaptive)}")
    if g["accuracy"] == "fixed" and (g["eps0"] is None or g["delta0"] is None):
        problems.append("accuracy='fixed' needs eps0 and delta0")
    return problems


def start_problems(
    problem: BilevelProblem,
    theta: Tensor,
    x: Tensor,
    bounds: tuple[Tensor | float | None, Tensor | float | None] | None,
    allow_low_precision: bool,
) -> list[str]:
    """What is wrong with a start.

    Args:
        problem: The problem.
        theta: First hyperparameters.
        x: First solutions.
        bounds: On theta.
        allow_low_precision: Whether 16 bits will do.

    Returns:
        A sentence for each.
    """
    problems = [
        f"{name} must be a floating point tensor that is not empty, got {value.dtype} of shape {tuple(value.shape)}"
        for name, value in (("theta", theta), ("x", x))
        if not value.is_floating_point() or not value.numel()
    ]
    if problems:
        return problems
    if torch.finfo(x.dtype).eps > 1e-6 and not allow_low_precision:
        problems.append(f"{x.dtype} cannot show small errors: use float32 or float64, or allow_low_precision=True")
    problems += [f"{n} is not finite" for n, v in (("theta", theta), ("x", x)) if not bool(torch.isfinite(v).all())]
    if bounds is not None:
        low, high = (fallback if b is None else b for b, fallback in zip(bounds, (-math.inf, math.inf), strict=True))
        low, high = (torch.as_tensor(b, dtype=theta.dtype, device=theta.device) for b in (low, high))
        if not bool((low < high).all()):
            problems.append("bounds must be ordered, lowest below highest")
        elif not bool(((low <= theta) & (theta <= high)).all()):
            problems.append("theta begins outside of its bounds")
    if problem.lower.prox is not None and problem.lower.penalty is None:
        problems.append("a lower problem that is known by its prox in part has no hypergradient: give its `penalty`")
    if problems:
        return problems
    return _stochastic(problem, theta, x)


def _stochastic(problem: BilevelProblem, theta: Tensor, x: Tensor) -> list[str]:
    """Two calls of a loss must give the same, up to the order of sums on a GPU."""
    pairs = {
        "lower": (problem.lower.gradient(x, theta), problem.lower.gradient(x, theta)),
        "upper": (problem.upper_at(x).gradient, problem.upper_at(x).gradient),
    }
    slack = 100 * torch.finfo(x.dtype).eps
    return [
        f"the {name} loss gives another gradient when it is called again: fix the batch, and turn dropout off"
        for name, (first, second) in pairs.items()
        if bool(torch.linalg.vector_norm(first - second) > slack * torch.linalg.vector_norm(first))
    ] + [
        f"the {name} loss is not finite at the start"
        for name, (first, _) in pairs.items()
        if not bool(torch.isfinite(first).all())
    ]
