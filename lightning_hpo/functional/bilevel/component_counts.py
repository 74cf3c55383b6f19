r"""How many pieces do networks cut the plane of hyperparameter and weights into? Upper bounds, as logarithms.

With N connected pieces on which the utility is constant, the best utility over the weights oscillates at most 2 N times
along the hyperparameter; :func:`~lightning_hpo.functional.bilevel.guarantees.pdim_from_oscillations` takes
:math:`1 + \log_2 N`.
"""

import math
import warnings
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

from lightning_hpo.functional.arguments import is_whole

__all__ = ["log2_components_activation", "log2_components_gcn", "log_components", "log_sign_vectors"]


def log_sign_vectors(polynomials: int, degree: int, variables: int) -> float:
    r"""Natural logarithm of the number of vectors :math:`(1[p_1 > 0], \dots, 1[p_m > 0])` that polynomials take.

    At most :math:`2 (2 e m D / n)^n` of :math:`m \ge n` polynomials, and never more than :math:`2^m`.

    Args:
        polynomials: m.
        degree: D.
        variables: n.

    Returns:
        The smaller of the two bounds.

    Raises:
        ValueError: If an argument is not a positive integer; all are listed.

    References:
        Warren, "Lower bounds for approximation by nonlinear manifolds", 1968; Anthony and Bartlett, "Neural Network
        Learning: Theoretical Foundations", 1999, theorem 8.3.

    Example:
        >>> round(math.exp(log_sign_vectors(3, degree=1, variables=8)), 6)
        8.0
    """
    _require_positive(polynomials=polynomials, degree=degree, variables=variables)
    trivial = polynomials * math.log(2)
    if polynomials < variables:
        return trivial
    return min(trivial, math.log(2) + variables * math.log(2 * math.e * polynomials * degree / variables))


def log_components(polynomials: int, degree: int, variables: int) -> float:
    r"""Natural logarithm of the number of connected components between the zero sets of polynomials.

    At most :math:`(4 e m D / n)^n`, with m raised to n where there are fewer.

    Args:
        polynomials: m.
        degree: D.
        variables: n.

    Returns:
        The bound.

    Raises:
        ValueError: If an argument is not a positive integer; all are listed.

    References:
        Warren, "Lower bounds for approximation by nonlinear manifolds", 1968.

    Example:
        >>> round(math.exp(log_components(1, degree=1, variables=1)), 2)
        10.87
    """
    _require_positive(polynomials=polynomials, degree=degree, variables=variables)
    return variables * math.log(4 * math.e * max(polynomials, variables) * degree / variables)


def log2_components_activation(
    widths: Sequence[int], examples: int, breakpoints: int, degree: int, *, bias: bool = True, ties: bool = True
) -> float:
    r"""Pieces of the 0-1 utility of a network with activation :math:`\alpha o_1 + (1 - \alpha) o_2`.

    Pre-activations of layer i have degree :math:`D_1 = 1,\ D_{i+1} = \Delta D_i + 2` in the
    :math:`n_i = 1 + \text{weights up to } i` variables, and

    .. math::

        \log N = \sum_{i<L} \log S(T k_i p, D_i, n_i) + \log S(T \tbinom C2, D_L, 1 + W)
        + (1 + W) \log \frac{4 e M D_L}{1 + W}

    with S from :func:`log_sign_vectors` and M the number of all boundaries: inside one pattern of all layers before,
    the boundaries of a layer are polynomials, and a pattern of all may have many components.

    Args:
        widths: Inputs, hidden units of each layer, classes; one class means the sign of one output.
        examples: T, of the evaluation.
        breakpoints: p of both activations together, at least 0.
        degree: :math:`\Delta`, the larger of both.
        bias: Whether layers have one.
        ties: Whether the utility may be another on a boundary than beside it; it doubles M.

    Returns:
        :math:`\log_2 N`.

    Raises:
        ValueError: If an argument is out of range; all are listed.

    References:
        Balcan, Nguyen and Sharma, NeurIPS 2025 (the order; constants are from Warren's bounds).

    Example:
        >>> round(log2_components_activation([2, 3, 2], examples=10, breakpoints=1, degree=1), 1)
        169.2
    """
    named = {f"widths[{index}]": width for index, width in enumerate(widths)}
    short = [] if len(widths) >= 2 else [f"widths must name inputs and classes at least, got {list(widths)!r}"]
    if not breakpoints >= 0:
        short.append(f"breakpoints must be at least 0, got {breakpoints!r}")
    _require_positive(short, examples=examples, degree=degree, **named)
    variables, power, boundaries, logs = 1, 1, 0, 0.0
    for inputs, units in pairwise(widths[:-1]):
        variables += (inputs + bias) * units
        here = examples * units * breakpoints
        logs += log_sign_vectors(here, power, variables) if here else 0.0
        boundaries, power = boundaries + here, degree * power + 2
    variables += (widths[-2] + bias) * widths[-1]
    return _with_classes(logs, boundaries, power, variables, examples, widths[-1], ties)


def log2_components_gcn(
    nodes: int,
    features: int,
    hidden: int,
    classes: int,
    labelled: int,
    degree: int,
    *,
    normalize: Literal["row", "sym"] = "row",
    ties: bool = True,
) -> float:
    r"""Pieces of the 0-1 utility of a two-layer graph network with a polynomial kernel.

    :math:`Z = \hat A \operatorname{relu}(\hat A X W_0) W_1` with :math:`A_{uv} = (s_{uv} + \alpha)^\Delta`, 1 on the
    diagonal, rows divided by their sums. These are positive, so inequalities may be multiplied by them: units change
    sign at polynomials of degree :math:`\Delta + 1`, classes at polynomials of degree :math:`\Delta (n + 1) + 2`.

    Args:
        nodes: n.
        features: Of a node.
        hidden: Units.
        classes: Of a node.
        labelled: Nodes of the evaluation.
        degree: :math:`\Delta`, a positive integer.
        normalize: With ``"sym"`` entries are no quotients of polynomials; the count is that of rows, with a warning.
        ties: As for :func:`log2_components_activation`.

    Returns:
        :math:`\log_2 N`.

    Raises:
        ValueError: If an argument is out of range; all are listed.

    References:
        Balcan, Nguyen and Sharma, NeurIPS 2025.

    Example:
        >>> round(log2_components_gcn(nodes=20, features=4, hidden=2, classes=3, labelled=5, degree=2), 1)
        231.6
    """
    problems = [] if normalize in ("row", "sym") else [f"normalize must be 'row' or 'sym', got {normalize!r}"]
    _require_positive(
        problems, nodes=nodes, features=features, hidden=hidden, classes=classes, labelled=labelled, degree=degree
    )
    if normalize == "sym":
        warnings.warn(
            "symmetric normalization takes square roots, so this count does not certify it; use normalize='row', or "
            "grid_gap, which holds for anything",
            stacklevel=2,
        )
    variables, units = 1 + features * hidden, nodes * hidden
    logs = log_sign_vectors(units, degree + 1, variables)
    variables += hidden * classes
    return _with_classes(logs, units, degree * (nodes + 1) + 2, variables, labelled, classes, ties)


def _with_classes(
    logs: float, boundaries: int, degree: int, variables: int, examples: int, classes: int, ties: bool
) -> float:
    """Adds the boundaries between classes, then the components of each pattern; base 2."""
    between = examples * max(classes * (classes - 1) // 2, 1)
    logs += log_sign_vectors(between, degree, variables)
    return (logs + log_components((1 + ties) * (boundaries + between), degree, variables)) / math.log(2)


def _require_positive(problems: Sequence[str] = (), **values: int) -> None:
    wrong = [
        f"{name} must be a positive integer, got {value!r}" for name, value in values.items() if not is_whole(value, 1)
    ]
    if wrong or problems:
        raise ValueError("; ".join([*problems, *wrong]))
