r"""A network along one hyperparameter: all breakpoints of its outputs and of its accuracy, exactly.

The network has piecewise polynomial activations mixed by :math:`\alpha`, and weights that stay or move along a line. On
the pieces of one layer the pre-activations of the next are polynomials in :math:`\alpha`; their roots cut these pieces,
and so on to the outputs. Each example has its own pieces, so all are cut at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from lightning_hpo.functional.bilevel.piecewise import (
    PiecewisePolynomial,
    count_oscillations,
    evaluate,
    multiply,
    roots_between,
)

__all__ = ["NetworkSlice", "StepFunction", "network_slice"]

Layer = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class StepFunction:
    """A function of one number that is constant between its edges.

    Args:
        edges: ``(k + 1,)``, rising, with both ends.
        values: ``(k,)``.

    Example:
        >>> step = StepFunction(torch.tensor([0.0, 0.5, 1.0]), torch.tensor([0.25, 0.75]))
        >>> step(torch.tensor([0.1, 0.9])), step.oscillations()
        (tensor([0.2500, 0.7500]), 1)
    """

    edges: Tensor
    values: Tensor

    def __call__(self, points: Tensor) -> Tensor:
        """The value at each point; an edge belongs to what follows."""
        return self.values[torch.bucketize(points.contiguous(), self.edges[1:-1].contiguous(), right=True)]

    def oscillations(self) -> int:
        """How often it crosses the threshold that it crosses most often; exact."""
        return int(count_oscillations(self.values))


@dataclass(frozen=True)
class NetworkSlice:
    """Outputs of a network as polynomials in the hyperparameter, on all pieces of all examples.

    Args:
        low: Where the slice begins.
        high: Where it ends.
        example: ``(pieces,)``: whose piece it is; pieces are sorted by example, then from ``low`` to ``high``.
        start: ``(pieces,)``: where the piece begins.
        end: ``(pieces,)``: where it ends.
        coefficients: ``(pieces, outputs, degree + 1)``, from the constant up.
    """

    low: float
    high: float
    example: Tensor
    start: Tensor
    end: Tensor
    coefficients: Tensor

    def breakpoints(self) -> Tensor:
        """Where outputs of an example go over into other polynomials, rising."""
        return self.start[self.start > self.low].unique()

    def outputs(self, points: Tensor) -> Tensor:
        """Outputs at values of the hyperparameter.

        Args:
            points: ``(k,)``.

        Returns:
            ``(k, examples, outputs)``.
        """
        span = self.high - self.low
        keys = self.example * 2 + (self.start - self.low) / span
        wanted = torch.arange(int(self.example[-1]) + 1, device=points.device) * 2 + (points[:, None] - self.low) / span
        piece = torch.searchsorted(keys, wanted.contiguous(), right=True) - 1
        return evaluate(self.coefficients[piece], points[:, None, None])

    def accuracy(self, targets: Tensor) -> StepFunction:
        """Share of examples whose target has the largest output, as a function of the hyperparameter.

        Args:
            targets: ``(examples,)``, classes.

        Returns:
            The accuracy, with all its jumps. Ties, which take up single points alone, do not count.

        Raises:
            ValueError: If there is one output alone, or targets do not fit; both are listed.
        """
        self._check_targets(targets)
        mine = targets[self.example]
        own = self.coefficients[torch.arange(len(mine), device=mine.device), mine]
        margins = own[:, None] - self.coefficients
        others = torch.arange(margins.shape[1], device=mine.device) != mine[:, None]
        cut = _cut(replace(self, coefficients=margins[others].unflatten(0, (len(mine), -1))), margins.new_zeros(1))
        right = (evaluate(cut.coefficients, cut.middle()[:, None]) > 0).all(-1).long()
        first = cut.example.diff(prepend=cut.example.new_full((1,), -1)) != 0
        change = torch.where(first, right, right.diff(prepend=right.new_zeros(1)))
        moved = (change != 0) & ~first
        edges, order = cut.start[moved].unique(return_inverse=True)
        steps = torch.zeros(len(edges) + 1, dtype=torch.long, device=edges.device)
        steps[0] = right[first].sum()
        steps.index_add_(0, order + 1, change[moved])
        ends = edges.new_tensor([self.low, self.high])
        return StepFunction(torch.cat([ends[:1], edges, ends[1:]]), steps.cumsum(0).double() / first.sum())

    def _check_targets(self, targets: Tensor) -> None:
        classes, count = self.coefficients.shape[1], int(self.example[-1]) + 1
        problems = [] if classes > 1 else ["accuracy needs at least two outputs, got 1"]
        if targets.shape != (count,) or not bool(((targets >= 0) & (targets < classes)).all()):
            problems.append(f"targets must be {count} classes from 0 to {classes - 1}, got {targets!r}")
        if problems:
            raise ValueError("; ".join(problems))

    def middle(self) -> Tensor:
        """The middle of each piece."""
        return (self.start + self.end) / 2


def network_slice(
    layers: Sequence[Layer],
    inputs: Tensor,
    first: PiecewisePolynomial,
    second: PiecewisePolynomial,
    *,
    low: float = 0.0,
    high: float = 1.0,
    direction: Sequence[Layer] | None = None,
) -> NetworkSlice:
    r"""A multilayer perceptron with activation :math:`\alpha o_1 + (1 - \alpha) o_2`, for all :math:`\alpha` at once.

    Args:
        layers: Weight ``(out, in)`` and bias ``(out,)`` of each layer, at :math:`\alpha = 0`; float64 is advised.
        inputs: ``(examples, in)``.
        first: :math:`o_1`.
        second: :math:`o_2`.
        low: The smallest :math:`\alpha`.
        high: The largest :math:`\alpha`.
        direction: What is added to each weight and bias times :math:`\alpha`; nothing where None.

    Returns:
        The outputs as piecewise polynomials.

    Raises:
        ValueError: If there is no layer, the range is empty or not finite, or shapes do not fit; all are listed.

    Example:
        >>> from lightning_hpo.functional.bilevel.piecewise import PIECEWISE
        >>> one, two = torch.tensor([[1.0]]), torch.tensor([-1.0])
        >>> found = network_slice([(one, 0 * two), (one, two)], -2 * one, PIECEWISE["relu"], PIECEWISE["abs"])
        >>> found.coefficients  # |-2| (1 - alpha) - 1
        tensor([[[ 1., -2.]]])
    """
    directions = direction if direction is not None else [None] * len(layers)
    _check(layers, inputs, low, high, directions)
    count = len(inputs)
    pieces = NetworkSlice(
        low=low,
        high=high,
        example=torch.arange(count, device=inputs.device),
        start=inputs.new_full((count,), low),
        end=inputs.new_full((count,), high),
        coefficients=inputs[:, :, None],
    )
    knots = inputs.new_tensor(sorted({*first.knots, *second.knots}))
    for index, (layer, along) in enumerate(zip(layers, directions, strict=True)):
        if index:
            pieces = _activate(_cut(pieces, knots), first, second)
        pieces = replace(pieces, coefficients=_affine(pieces.coefficients, layer, along))
    return _merge(pieces)


def _affine(coefficients: Tensor, layer: Layer, direction: Layer | None) -> Tensor:
    """Pre-activations; weights that move add one to the degree."""
    result = layer[0] @ coefficients
    result[..., 0] += layer[1]
    if direction is None:
        return result
    moved = direction[0] @ coefficients
    moved[..., 0] += direction[1]
    return pad(result, (0, 1)) + pad(moved, (1, 0))


def _cut(pieces: NetworkSlice, knots: Tensor) -> NetworkSlice:
    """Cuts pieces wherever one of their polynomials crosses a knot."""
    number, units, width = pieces.coefficients.shape
    shifted = pieces.coefficients[:, :, None].repeat(1, 1, len(knots), 1)
    shifted[..., 0] -= knots
    each = units * len(knots)
    ends = pieces.start.repeat_interleave(each), pieces.end.repeat_interleave(each)
    roots = roots_between(shifted.reshape(-1, width), *ends).view(number, -1)
    edges = torch.cat([pieces.start[:, None], roots.minimum(pieces.end[:, None]), pieces.end[:, None]], -1)
    edges = edges.sort(-1).values
    # Two roots that differ by rounding are one.
    eps = 8 * torch.finfo(edges.dtype).eps * max(abs(pieces.low), abs(pieces.high))
    parent, column = (edges.diff(dim=-1) > eps).nonzero(as_tuple=True)
    return replace(
        pieces,
        example=pieces.example[parent],
        start=edges[parent, column],
        end=edges[parent, column + 1],
        coefficients=pieces.coefficients[parent],
    )


def _activate(pieces: NetworkSlice, first: PiecewisePolynomial, second: PiecewisePolynomial) -> NetworkSlice:
    """Applies the mixture of two activations to pieces on which neither changes."""
    inner = pieces.coefficients
    at = evaluate(inner, pieces.middle()[:, None])
    one, two = _compose(first.pieces_at(at), inner), _compose(second.pieces_at(at), inner)
    room = max(one.shape[-1], two.shape[-1])
    one, two = pad(one, (0, room - one.shape[-1])), pad(two, (0, room - two.shape[-1]))
    return replace(pieces, coefficients=pad(two, (0, 1)) + pad(one - two, (1, 0)))


def _compose(outer: Tensor, inner: Tensor) -> Tensor:
    """Coefficients of one polynomial inside another."""
    *rest, result = outer[..., None].unbind(-2)
    for coefficient in reversed(rest):
        result = multiply(result, inner)
        result[..., :1] += coefficient
    return result


def _merge(pieces: NetworkSlice) -> NetworkSlice:
    """Joins neighbours with the same polynomials: what changed there does not reach the outputs."""
    same = (pieces.example.diff() == 0) & (pieces.coefficients.diff(dim=0) == 0).all(-1).all(-1)
    begins = torch.cat([same.new_ones(1), ~same])
    ends = torch.cat([~same, same.new_ones(1)])
    return replace(
        pieces,
        example=pieces.example[begins],
        start=pieces.start[begins],
        end=pieces.end[ends],
        coefficients=pieces.coefficients[begins],
    )


def _check(
    layers: Sequence[Layer], inputs: Tensor, low: float, high: float, directions: Sequence[Layer | None]
) -> None:
    problems = [] if -torch.inf < low < high < torch.inf else [f"low={low!r} and high={high!r} must be finite and rise"]
    problems += [] if layers else ["there is no layer"]
    if inputs.dim() != 2 or not len(inputs):
        problems.append(f"inputs must be (examples, in), got {tuple(inputs.shape)}")
    if len(directions) != len(layers):
        problems.append(f"direction must have one entry a layer: {len(layers)}, got {len(directions)}")
        directions = layers
    width = inputs.shape[-1]
    for index, (layer, along) in enumerate(zip(layers, directions, strict=True)):
        for weight, bias in (layer, along or layer):
            if weight.shape != (len(layer[0]), width) or bias.shape != weight.shape[:1]:
                problems.append(
                    f"layer {index}: {tuple(weight.shape)}, {tuple(bias.shape)} does not take {width} inputs"
                )
        width = len(layer[0])
    if problems:
        raise ValueError("; ".join(problems))
