"""Per-sample gradients of one parameter, kept as the factors that they are made of instead of as batch x parameter.

A layer's gradient is a sum over positions of products of its inputs and the gradients of its outputs. Norms, inner
products, second moments and weighted sums of the samples' gradients follow from these factors, some samples at a time.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from functools import reduce
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

__all__ = [
    *("Factors", "LookupFactors", "OuterFactors", "PlainFactors"),
    *("accumulated", "chunks", "dots", "rows", "squares", "working_precision"),
]

_CHUNK_BYTES = 2**26
_CHUNK_BYTES_CPU = 2**22  # about what caches hold


class Factors(ABC):
    r"""Gradients :math:`g_1, \dots, g_n` of one parameter, one for each sample.

    Nothing of the size ``n`` x parameter is ever held: what does not follow from the factors alone is done with a few
    samples at a time. All sums are taken in float32 at least.

    Args:
        shape: Shape of the parameter.
    """

    def __init__(self, shape: Sequence[int]) -> None:
        self.shape = torch.Size(shape)

    @abstractmethod
    def squared_norms(self) -> Tensor:
        r"""Squared norms :math:`\|g_i\|^2`, shape ``(n,)``."""

    @abstractmethod
    def inner_products(self, gradient: Tensor) -> Tensor:
        r"""Inner products :math:`\langle g_i, g \rangle` with a gradient ``g`` of the parameter, shape ``(n,)``."""

    @abstractmethod
    def second_moments(self) -> Tensor:
        r"""Sum of squares :math:`\sum_i g_i^2` of every coordinate, in the shape of the parameter."""

    @abstractmethod
    def weighted_sum(self, weights: Tensor) -> Tensor:
        r"""Sum :math:`\sum_i c_i g_i` with ``weights`` ``c`` of shape ``(n,)``, in the shape of the parameter."""

    @classmethod
    @abstractmethod
    def joined(cls, calls: Sequence[Self]) -> Self:
        """The sums of the gradients from several calls of one layer, sample by sample."""


class PlainFactors(Factors):
    """Gradients of a small parameter as they are: of a bias, or of the scale of a norm layer.

    Args:
        values: Gradients of shape ``(n, *shape)``, float32 or float64.

    Example:
        >>> factors = PlainFactors(torch.tensor([[3.0, 4.0], [1.0, 0.0]]))
        >>> factors.squared_norms(), factors.second_moments()
        (tensor([25.,  1.]), tensor([10., 16.]))
    """

    def __init__(self, values: Tensor) -> None:
        super().__init__(values.shape[1:])
        self.values = values

    @override
    def squared_norms(self) -> Tensor:
        return squares(self.values)

    @override
    def inner_products(self, gradient: Tensor) -> Tensor:
        return self.values.flatten(1) @ gradient.to(self.values.dtype).flatten()

    @override
    def second_moments(self) -> Tensor:
        return self.values.square().sum(0)

    @override
    def weighted_sum(self, weights: Tensor) -> Tensor:
        return torch.tensordot(weights.to(self.values.dtype), self.values, 1)

    @override
    @classmethod
    def joined(cls, calls: Sequence[Self]) -> Self:
        return cls(torch.stack([call.values for call in calls]).sum(0))


class OuterFactors(Factors):
    r"""Gradients that are sums of outer products over positions, :math:`g_i = \sum_t b_{it} a_{it}^\top`.

    With one position :math:`\|g_i\|^2 = \|a_i\|^2 \|b_i\|^2`. With more, either the gradients are multiplied out, or
    :math:`\|g_i\|^2 = \sum_{t,s} (a_{it} \cdot a_{is})(b_{it} \cdot b_{is})` is used, whichever multiplies less.

    Args:
        inputs: Inputs ``a`` of shape ``(n, t, d)``, where ``t`` counts positions.
        outputs: Gradients ``b`` of the outputs, shape ``(n, t, p)``.

    References:
        Goodfellow, "Efficient Per-Example Gradient Computations", 2015; Li et al., "Large Language Models Can Be Strong
        Differentially Private Learners", ICLR 2022.

    Example:
        >>> factors = OuterFactors(torch.tensor([[[1.0, 2.0]], [[0.0, 3.0]]]), torch.tensor([[[2.0]], [[1.0]]]))
        >>> factors.squared_norms(), factors.inner_products(torch.tensor([[1.0, 1.0]]))
        (tensor([20.,  9.]), tensor([6., 3.]))
    """

    def __init__(self, inputs: Tensor, outputs: Tensor) -> None:
        super().__init__((outputs.shape[-1], inputs.shape[-1]))
        self.inputs, self.outputs = inputs, outputs

    @override
    def squared_norms(self) -> Tensor:
        positions, (p, d) = self.inputs.shape[1], self.shape
        if positions == 1:
            a, b = working_precision(self.inputs), working_precision(self.outputs)
            return squares(a) * squares(b)
        if positions * (d + p) < d * p:
            pairs = self._chunks(2 * positions**2)
            # Rounding may push a sum of squares in this form below zero.
            return rows(dots(a @ a.mT, b @ b.mT) for _, a, b in pairs).clamp_min_(0.0)
        return rows(squares(gradients) for gradients in self._gradients())

    @override
    def inner_products(self, gradient: Tensor) -> Tensor:
        parts = self._chunks(self.outputs.shape[1:].numel())
        return rows(dots(a @ gradient.to(a.dtype).mT, b) for _, a, b in parts)

    @override
    def second_moments(self) -> Tensor:
        if self.inputs.shape[1] == 1:
            a, b = working_precision(self.inputs)[:, 0], working_precision(self.outputs)[:, 0]
            return b.square().mT @ a.square()
        return accumulated(gradients.square_().sum(0) for gradients in self._gradients())

    @override
    def weighted_sum(self, weights: Tensor) -> Tensor:
        return accumulated(
            (b * weights[part, None, None].to(b.dtype)).flatten(0, 1).mT @ a.flatten(0, 1)
            for part, a, b in self._chunks(self.outputs.shape[1:].numel())
        )

    @override
    @classmethod
    def joined(cls, calls: Sequence[Self]) -> Self:
        return cls(torch.cat([call.inputs for call in calls], 1), torch.cat([call.outputs for call in calls], 1))

    def _gradients(self) -> Iterator[Tensor]:
        for _, a, b in self._chunks(self.shape.numel()):
            yield b.mT @ a

    def _chunks(self, result: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Runs of samples, so many that their factors and ``result`` numbers each fit."""
        for part in chunks(self.inputs, result + self.inputs.shape[1:].numel() + self.outputs.shape[1:].numel()):
            yield part, working_precision(self.inputs[part]), working_precision(self.outputs[part])


class LookupFactors(Factors):
    """Gradients of a table of which every position looks up one row.

    Args:
        indices: Rows looked up, shape ``(n, t)``.
        outputs: Gradients of the rows, shape ``(n, t, d)``; zero where a row is not to learn.
        rows: Number of rows of the table.

    Example:
        >>> factors = LookupFactors(torch.tensor([[0, 2, 2]]), torch.tensor([[[1.0], [2.0], [3.0]]]), rows=4)
        >>> factors.squared_norms(), factors.second_moments().T
        (tensor([26.]), tensor([[ 1.,  0., 25.,  0.]]))
    """

    def __init__(self, indices: Tensor, outputs: Tensor, rows: int) -> None:
        super().__init__((rows, outputs.shape[-1]))
        self.indices, self.outputs = indices, outputs

    @override
    def squared_norms(self) -> Tensor:
        return rows(squares(sums) for _, sums in self._row_sums())

    @override
    def inner_products(self, gradient: Tensor) -> Tensor:
        table = working_precision(gradient)
        return rows(dots(F.embedding(self.indices[part], table), b) for part, b in self._chunks())

    @override
    def second_moments(self) -> Tensor:
        total = self._table()
        for indices, sums in self._row_sums():
            total.index_add_(0, indices.flatten(), sums.square_().flatten(0, 1))
        return total

    @override
    def weighted_sum(self, weights: Tensor) -> Tensor:
        total = self._table()
        for part, b in self._chunks():
            total.index_add_(0, self.indices[part].flatten(), (b * weights[part, None, None].to(b.dtype)).flatten(0, 1))
        return total

    @override
    @classmethod
    def joined(cls, calls: Sequence[Self]) -> Self:
        indices, outputs = torch.cat([call.indices for call in calls], 1), torch.cat([c.outputs for c in calls], 1)
        return cls(indices, outputs, calls[0].shape[0])

    def _row_sums(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Sum of the gradients of every row that a sample looks up, at one of its positions; zero at the others.

        Sorting brings equal rows together without asking the device how many there are.
        """
        for part, b in self._chunks():
            indices, order = self.indices[part].sort(-1)
            starts = F.pad(indices[:, 1:] != indices[:, :-1], (1, 0))
            place = starts.cumsum(-1)  # of each row among the sample's distinct rows
            sums = torch.zeros_like(b).scatter_add_(1, _wide(place, b), b.gather(1, _wide(order, b)))
            yield torch.zeros_like(indices).scatter_(1, place, indices), sums

    def _chunks(self) -> Iterator[tuple[slice, Tensor]]:
        for part in chunks(self.outputs, 6 * self.outputs.shape[1:].numel()):
            yield part, working_precision(self.outputs[part])

    def _table(self) -> Tensor:
        return torch.zeros(self.shape, dtype=working_precision(self.outputs[:0]).dtype, device=self.outputs.device)


def chunks(tensor: Tensor, numbers: int) -> Iterator[slice]:
    """Cuts the samples of a tensor into runs that take a fixed amount of memory, or are single samples.

    Args:
        tensor: One row for each sample.
        numbers: How many numbers one sample takes.

    Yields:
        Slices of the first dimension.

    Example:
        >>> list(chunks(torch.zeros(5), 2**19))
        [slice(0, 2, None), slice(2, 4, None), slice(4, 6, None)]
    """
    size = max(4, tensor.dtype.itemsize) * max(1, numbers)
    count = max(1, (_CHUNK_BYTES_CPU if tensor.device.type == "cpu" else _CHUNK_BYTES) // size)
    yield from (slice(start, start + count) for start in range(0, max(1, tensor.shape[0]), count))


def dots(left: Tensor, right: Tensor) -> Tensor:
    """Inner products of rows.

    Args:
        left: Shape ``(n, ...)``.
        right: The same shape.

    Returns:
        Shape ``(n,)``.

    Example:
        >>> dots(torch.ones(2, 3), torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 1.0]]))
        tensor([6., 1.])
    """
    return torch.linalg.vecdot(left.flatten(1), right.flatten(1))


def squares(values: Tensor) -> Tensor:
    """Squared norms of rows.

    Args:
        values: Shape ``(n, ...)``.

    Returns:
        Shape ``(n,)``.

    Example:
        >>> squares(torch.tensor([[[3.0, 4.0]], [[0.0, 1.0]]]))
        tensor([25.,  1.])
    """
    return torch.linalg.vector_norm(values.flatten(1), dim=1).square()  # one pass, nothing written in between


def rows(parts: Iterable[Tensor]) -> Tensor:
    """Results for some samples at a time, together."""
    found = list(parts)
    return found[0] if len(found) == 1 else torch.cat(found)


def accumulated(parts: Iterable[Tensor]) -> Tensor:
    """Sum of tensors that are made one after the other."""
    return reduce(Tensor.add_, parts)


def working_precision(tensor: Tensor) -> Tensor:
    """The tensor in float32 at least.

    Args:
        tensor: Floating point.

    Returns:
        The same tensor if it is in float32 or float64, else a copy in float32.

    Example:
        >>> working_precision(torch.ones(1, dtype=torch.bfloat16)).dtype
        torch.float32
    """
    return tensor.float() if tensor.dtype.itemsize < 4 else tensor


def _wide(indices: Tensor, values: Tensor) -> Tensor:
    return indices.unsqueeze(-1).expand_as(values)
