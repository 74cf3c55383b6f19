r"""Piecewise polynomials of one variable: activations, roots between two points, and how often a utility oscillates."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "PIECEWISE",
    "PiecewisePolynomial",
    "count_oscillations",
    "evaluate",
    "multiply",
    "piecewise_activation",
    "roots_between",
]


@dataclass(frozen=True)
class PiecewisePolynomial:
    """A function of one number that is a polynomial between each two knots.

    Args:
        knots: Where pieces meet, rising; a knot belongs to the piece on its right.
        coefficients: Of each piece, from the constant up.

    Raises:
        ValueError: If there is not one piece more than knots, or knots do not rise; both are listed.

    Example:
        >>> relu = PiecewisePolynomial((0.0,), ((0.0,), (0.0, 1.0)))
        >>> relu(torch.tensor([-1.0, 2.0])), relu.degree
        (tensor([0., 2.]), 1)
    """

    knots: tuple[float, ...]
    coefficients: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        problems = []
        if len(self.coefficients) != len(self.knots) + 1 or not all(self.coefficients):
            problems.append(f"{len(self.knots)} knots need {len(self.knots) + 1} pieces, got {self.coefficients!r}")
        if list(self.knots) != sorted(set(self.knots)):
            problems.append(f"knots must rise, got {self.knots!r}")
        if problems:
            raise ValueError("; ".join(problems))

    @property
    def degree(self) -> int:
        """The highest of all pieces."""
        return max(map(len, self.coefficients)) - 1

    def pieces_at(self, points: Tensor) -> Tensor:
        """Coefficients of the piece that each point lies in.

        Args:
            points: Any shape.

        Returns:
            The shape of ``points`` and ``degree + 1``.
        """
        width = self.degree + 1
        rows = [[*row, *[0.0] * (width - len(row))] for row in self.coefficients]
        knots = torch.tensor(self.knots, dtype=points.dtype, device=points.device)
        table = torch.tensor(rows, dtype=points.dtype, device=points.device)
        return table[torch.bucketize(points.contiguous(), knots, right=True)]

    def __call__(self, points: Tensor) -> Tensor:
        """The value at each point."""
        return evaluate(self.pieces_at(points), points)


_LINE = ((0.0, 1.0),)
PIECEWISE = {
    "identity": PiecewisePolynomial((), _LINE),
    "relu": PiecewisePolynomial((0.0,), ((0.0,), *_LINE)),
    "leaky_relu": PiecewisePolynomial((0.0,), ((0.0, 0.01), *_LINE)),
    "abs": PiecewisePolynomial((0.0,), ((0.0, -1.0), *_LINE)),
    "square": PiecewisePolynomial((), ((0.0, 0.0, 1.0),)),
    "hardtanh": PiecewisePolynomial((-1.0, 1.0), ((-1.0,), *_LINE, (1.0,))),
    "relu6": PiecewisePolynomial((0.0, 6.0), ((0.0,), *_LINE, (6.0,))),
    "hardsigmoid": PiecewisePolynomial((-3.0, 3.0), ((0.0,), (0.5, 1 / 6), (1.0,))),
    "hardswish": PiecewisePolynomial((-3.0, 3.0), ((0.0,), (0.0, 0.5, 1 / 6), *_LINE)),
}


def piecewise_activation(name: str) -> PiecewisePolynomial:
    """An activation as a piecewise polynomial, which is what a certificate for all values of a mixture needs.

    Args:
        name: One of ``PIECEWISE``.

    Returns:
        The activation.

    Raises:
        ValueError: If it is none of them; the message says which bounds hold all the same.

    Example:
        >>> len(piecewise_activation("hardtanh").knots), piecewise_activation("square").degree
        (2, 2)
    """
    if name not in PIECEWISE:
        raise ValueError(
            f"{name!r} is not known as a piecewise polynomial, so its pieces cannot be counted. Known: "
            f"{', '.join(PIECEWISE)}. For any activation `grid_gap` holds, and `empirical_gap` where oscillations are "
            "counted exactly"
        )
    return PIECEWISE[name]


def evaluate(coefficients: Tensor, points: Tensor) -> Tensor:
    """Values of polynomials, by Horner's rule.

    Args:
        coefficients: ``(..., degree + 1)``, from the constant up.
        points: Broadcastable with the leading dimensions.

    Returns:
        The values.

    Example:
        >>> evaluate(torch.tensor([1.0, 0.0, 2.0]), torch.tensor([0.0, 3.0]))
        tensor([ 1., 19.])
    """
    value = torch.zeros_like(points)
    for coefficient in reversed(coefficients.unbind(-1)):
        value = value * points + coefficient
    return value


def multiply(first: Tensor, second: Tensor) -> Tensor:
    """Products of polynomials.

    Args:
        first: ``(..., a + 1)``, from the constant up.
        second: ``(..., b + 1)``, with the same leading dimensions or some that broadcast.

    Returns:
        ``(..., a + b + 1)``.

    Example:
        >>> multiply(torch.tensor([1.0, 1.0]), torch.tensor([-1.0, 1.0]))
        tensor([-1.,  0.,  1.])
    """
    if first.shape[-1] > second.shape[-1]:
        first, second = second, first
    room = first.shape[-1] - 1
    terms = [
        torch.nn.functional.pad(factor[..., None] * second, (power, room - power))
        for power, factor in enumerate(first.unbind(-1))
    ]
    return torch.stack(terms).sum(0)


def roots_between(coefficients: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Where polynomials change sign between two points, to the last digit or so.

    Between two roots of its derivative a polynomial is monotone, so every change of sign there is found by bisection;
    the roots of the derivative are found in the same way. Points that a polynomial touches without crossing zero are no
    change and may or may not be returned.

    Args:
        coefficients: ``(n, degree + 1)``, from the constant up; leading zeros do no harm.
        low: ``(n,)``.
        high: ``(n,)``, above ``low``.

    Returns:
        ``(n, degree)``, rising, filled with infinity.

    Example:
        >>> square = torch.tensor([[-1.0, 0.0, 1.0]], dtype=torch.float64)
        >>> roots_between(square, torch.tensor([0.5]).double(), torch.tensor([2.0]).double()).round(decimals=9)
        tensor([[1., inf]], dtype=torch.float64)
    """
    degree = coefficients.shape[-1] - 1
    if degree < 1:
        return coefficients.new_empty(len(coefficients), 0)
    slopes = coefficients[:, 1:] * torch.arange(1, degree + 1, dtype=coefficients.dtype, device=coefficients.device)
    turns = roots_between(slopes, low, high).minimum(high[:, None])
    edges = torch.cat([low[:, None], turns, high[:, None]], -1)
    positive = evaluate(coefficients[:, None], edges) >= 0
    row, column = (positive[:, 1:] != positive[:, :-1]).nonzero(as_tuple=True)
    roots = coefficients.new_full((len(coefficients), degree), torch.inf)
    left, right, sign = edges[row, column], edges[row, column + 1], positive[row, column]
    roots[row, column] = _bisect(coefficients[row], left, right, sign)
    return roots.sort(-1).values


def count_oscillations(values: Tensor | Sequence[float]) -> Tensor:
    r"""How often :math:`1[u \ge t]` changes along a sequence, at the threshold where it changes most.

    A threshold lies between two neighbours where one is below and the other is not, so thresholds are counted all at
    once from sorted minima and maxima. Of a utility sampled at some points it is a lower bound of what the utility does
    between them; of the values of a step function it is exact.

    Args:
        values: ``(..., points)``, finite.

    Returns:
        Whole numbers, of the leading shape.

    Raises:
        ValueError: If a value is not finite, or there is none.

    Example:
        >>> count_oscillations([0.0, 1.0, 0.0, 2.0, 2.0]), count_oscillations([1.0, 2.0, 3.0])
        (tensor(3), tensor(1))
    """
    values = torch.as_tensor(values, dtype=torch.float64)
    if values.dim() == 0 or values.shape[-1] == 0 or not bool(values.isfinite().all()):
        raise ValueError(f"values must be at least one and finite (leave failed points out), got {values!r}")
    pairs = torch.stack([values[..., :-1], values[..., 1:]])
    below, reached = pairs.amin(0).sort(-1).values, pairs.amax(0).sort(-1).values
    changes = torch.searchsorted(below, values.contiguous()) - torch.searchsorted(reached, values.contiguous())
    return changes.amax(-1)


def _bisect(coefficients: Tensor, left: Tensor, right: Tensor, left_positive: Tensor) -> Tensor:
    for _ in range(64 if coefficients.dtype == torch.float64 else 32):
        middle = (left + right) / 2
        stays = (evaluate(coefficients, middle) >= 0) == left_positive
        left, right = torch.where(stays, middle, left), torch.where(stays, right, middle)
    return right
