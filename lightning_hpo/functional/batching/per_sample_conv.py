"""Per-sample gradients of convolution kernels, of any number of dimensions."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from lightning_hpo.functional.batching.per_sample import Factors, accumulated, chunks, dots, rows, squares
from lightning_hpo.functional.batching.per_sample import working_precision as working

__all__ = ["ConvFactors", "ConvGeometry"]

_CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_KERNEL_ALONE = [False, True, False]  # of the gradients of input, kernel and bias
_LARGE = 10**7  # multiplications for one sample
_WORTH_SLIDING = 16  # fewer rows than this make for slow matrix products
_MANY_PLACES = 64  # with fewer, writing the gradients takes oneDNN longer than multiplying them out
_MANY_CHANNELS = 6  # of a group's inputs, or oneDNN is no faster than products of columns
_FAR = 1.7  # by which oneDNN is faster at multiplying


@dataclass(frozen=True)
class ConvGeometry:
    """How a convolution moves over its input.

    Args:
        shape: Shape of the kernel, ``(outputs, inputs / groups, *size)``.
        stride: Steps, one for each dimension.
        dilation: Distances between the points of the kernel.
        padding: What :func:`torch.nn.functional.pad` takes: before and after, last dimension first.
        mode: What is padded with: ``zeros``, ``reflect``, ``replicate`` or ``circular``.
        groups: Number of groups of channels.

    Example:
        >>> ConvGeometry.of(nn.Conv2d(4, 6, 3, padding="same", groups=2)).padding
        (1, 1, 1, 1)
    """

    shape: torch.Size
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[int, ...]
    mode: str
    groups: int

    @classmethod
    def of(cls, layer: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> Self:
        """The geometry of a layer.

        Args:
            layer: A convolution that is not transposed.

        Returns:
            Its geometry; string paddings resolved.

        Example:
            >>> ConvGeometry.of(nn.Conv1d(1, 1, 4, padding="same")).padding
            (1, 2)
        """
        if isinstance(layer.padding, str):
            same = layer.padding == "same"
            reach = [d * (k - 1) * same for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
            sides = [(total // 2, total - total // 2) for total in reach]
        else:
            sides = [(width, width) for width in layer.padding]
        padding = tuple(width for pair in reversed(sides) for width in pair)
        return cls(layer.weight.shape, layer.stride, layer.dilation, padding, layer.padding_mode, layer.groups)

    def padded(self, inputs: Tensor) -> Tensor:
        """Inputs with what the convolution puts around them."""
        if not any(self.padding):
            return inputs
        return F.pad(inputs, self.padding, mode="constant" if self.mode == "zeros" else self.mode)

    @property
    def slides(self) -> bool:
        """Whether the points of the kernel along the first dimension share columns."""
        return self.stride[0] == 1 and self.shape[2] > 1 and self.shape[1] * math.prod(self.shape[3:]) >= _WORTH_SLIDING

    def columns(self, inputs: Tensor, places: Sequence[int]) -> tuple[Tensor, list[slice]]:
        """What the kernel sees at every place.

        A kernel that takes single steps along the first dimension sees with each of its points there what it has seen
        with the one before, some places on: so one layout of columns serves all of them.

        Args:
            inputs: Padded inputs, shape ``(n, channels, *size)``.
            places: Numbers of places, one for each dimension.

        Returns:
            Columns of shape ``(n * groups, rows, length)``, and the part of the length that belongs to each point of
            the kernel along the first dimension; one part, where the rows hold all points.

        Example:
            >>> geometry = ConvGeometry.of(nn.Conv1d(16, 1, 2))
            >>> columns, parts = geometry.columns(torch.ones(1, 16, 4), (3,))
            >>> columns.shape, parts
            (torch.Size([1, 16, 4]), [slice(0, 3, None), slice(1, 4, None)])
        """
        inputs = inputs.contiguous()
        of_sample, of_channel, *of_size = inputs.stride()
        between = [step * distance for step, distance in zip(of_size, self.dilation, strict=True)]
        onwards = [step * stride for step, stride in zip(of_size, self.stride, strict=True)]
        kernel, where, starts = list(self.shape[2:]), list(places), [0]
        if self.slides:
            starts = [point * self.dilation[0] * math.prod(where[1:]) for point in range(kernel[0])]
            kernel, between, where[0] = kernel[1:], between[1:], inputs.shape[2]
        steps = (of_sample, of_channel, *between, *onwards)
        view = inputs.as_strided((*inputs.shape[:2], *kernel, *where), steps)
        columns = view.reshape(inputs.shape[0] * self.groups, self.shape[1] * math.prod(kernel), math.prod(where))
        return columns, [slice(start, start + math.prod(places)) for start in starts]

    def convolved(self, inputs: Tensor, kernel: Tensor) -> Tensor:
        """The convolution of padded inputs with a kernel."""
        return _CONVOLUTIONS[len(self.stride)](inputs, kernel, None, self.stride, 0, self.dilation, self.groups)

    def kernel_gradient(self, inputs: Tensor, outputs: Tensor) -> Tensor:
        """The gradient of the kernel, summed over samples, from inputs and gradients of the outputs."""
        nothing = [0] * len(self.stride)
        before, after = self.padding[-2::-2], self.padding[::-2]  # first dimension first
        padding = before if self.mode == "zeros" and before == after else nothing
        inputs = inputs if any(padding) else self.padded(inputs)
        kernel = inputs.new_empty(1).expand(self.shape)  # only its shape is looked at
        moves = (self.stride, padding, self.dilation, False, nothing, self.groups)
        return torch.ops.aten.convolution_backward(outputs, inputs, kernel, None, *moves, _KERNEL_ALONE)[1]

    def kernel_gradients(self, inputs: Tensor, outputs: Tensor) -> Tensor:
        """The gradients of the kernel for each sample: a convolution of one sample that has the samples as its groups.

        Args:
            inputs: Shape ``(n, channels, *size)``.
            outputs: Gradients of the outputs, shape ``(n, outputs, *places)``.

        Returns:
            Shape ``(n, *shape)``.

        Example:
            >>> geometry = ConvGeometry.of(nn.Conv1d(1, 1, 2))
            >>> inputs, outputs = torch.tensor([[[3.0, 4.0]], [[5.0, 6.0]]]), torch.tensor([[[1.0]], [[2.0]]])
            >>> geometry.kernel_gradients(inputs, outputs).flatten(1)
            tensor([[ 3.,  4.],
                    [10., 12.]])
        """
        samples, (kernels, *kernel) = len(inputs), self.shape
        together = replace(self, shape=torch.Size((samples * kernels, *kernel)), groups=samples * self.groups)
        gradients = together.kernel_gradient(inputs.flatten(0, 1)[None], outputs.flatten(0, 1)[None])
        return gradients.view(samples, *self.shape)


class ConvFactors(Factors):
    """Gradients of a convolution kernel.

    Args:
        calls: Inputs ``(n, channels, *size)`` and gradients of the outputs ``(n, outputs, *places)`` of every call.
        geometry: How the convolution moves.

    Example:
        >>> call = torch.tensor([[[3.0, 4.0, 5.0]]]), torch.tensor([[[1.0, 0.0]]])
        >>> factors = ConvFactors([call], ConvGeometry.of(nn.Conv1d(1, 1, 2)))
        >>> factors.weighted_sum(torch.ones(1)), factors.squared_norms()
        (tensor([[[3., 4.]]]), tensor([25.]))
    """

    def __init__(self, calls: Sequence[tuple[Tensor, Tensor]], geometry: ConvGeometry) -> None:
        super().__init__(geometry.shape)
        self.calls, self.geometry = tuple(calls), geometry

    @override
    def squared_norms(self) -> Tensor:
        if self._convolves():
            return rows(squares(gradients) for gradients in self._gradients())
        of_groups = rows(_squared_norms(calls) for calls in self._columns())
        return of_groups.view(-1, self.geometry.groups).sum(1) if self.geometry.groups > 1 else of_groups

    @override
    def inner_products(self, gradient: Tensor) -> Tensor:
        return accumulated(
            rows(
                dots(self.geometry.convolved(self.geometry.padded(x), gradient.to(x.dtype)), b)
                for _, x, b in self._chunks(*call)
            )
            for call in self.calls
        )

    @override
    def second_moments(self) -> Tensor:
        if self._convolves():
            return accumulated(gradients.square_().sum(0) for gradients in self._gradients())
        outputs, inputs, *_ = self.shape

        def parts() -> Iterator[Tensor]:
            for calls in self._columns():
                points = [g.reshape(-1, outputs, inputs, g.shape[2] // inputs) for g in _gradients(calls)]
                yield torch.stack([point.square_().sum(0) for point in points], 2)

        return accumulated(parts()).reshape(self.shape)

    @override
    def weighted_sum(self, weights: Tensor) -> Tensor:
        def parts() -> Iterator[Tensor]:
            for call in self.calls:
                for part, x, b in self._chunks(*call):
                    c = weights[part].to(b.dtype).view(-1, *[1] * (b.ndim - 1))
                    yield self.geometry.kernel_gradient(x, b * c)

        return accumulated(parts())

    @override
    @classmethod
    def joined(cls, calls: Sequence[Self]) -> Self:
        return cls([pair for call in calls for pair in call.calls], calls[0].geometry)

    def _convolves(self) -> bool:
        """Whether convolutions of torch give the gradients faster than products of columns do; only on the CPU."""
        first, _ = self.calls[0]
        if first.device.type != "cpu" or working(first[:0]).dtype != torch.float32 or not len(first):
            return False
        places, outputs, d = self._places(), self.shape[0] // self.geometry.groups, self.shape[1:].numel()
        return self._grouped() or (places * (outputs + d) > outputs * d and places * self.shape.numel() > _LARGE)

    def _grouped(self) -> bool:
        """Whether oneDNN is at hand, and good at these shapes."""
        here = torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)
        fits = self.shape[1] >= _MANY_CHANNELS and self.shape[2:].numel() > 1 and self._places() > _MANY_PLACES
        return here and fits and (len(self.calls) > 1 or not self._pairs_are_far_cheaper())

    def _pairs_are_far_cheaper(self) -> bool:
        """Whether products of pairs of places multiply so much less that slower products are worth it."""
        geometry, (_, b), d = self.geometry, self.calls[0], self.shape[1:].numel()
        points, first, *others = geometry.shape[2] if geometry.slides else 1, *b.shape[2:]
        length = (first + (points - 1) * geometry.dilation[0]) * math.prod(others)
        return _FAR * _pairs(length, d // points, first * math.prod(others), self.shape[0] // geometry.groups) < (
            self._places() * self.shape[0] // geometry.groups * d
        )

    def _places(self) -> int:
        return sum(b.shape[2:].numel() for _, b in self.calls)

    def _gradients(self) -> Iterator[Tensor]:
        """Gradients of a few samples at a time, as many as fit; of single samples, if they are large."""
        first, _ = self.calls[0]
        held = sum(x.shape[1:].numel() + b.shape[1:].numel() for x, b in self.calls) + self.shape.numel()
        for part in chunks(first, held) if self._grouped() else (slice(i, i + 1) for i in range(len(first))):
            yield accumulated(self.geometry.kernel_gradients(working(x[part]), working(b[part])) for x, b in self.calls)

    def _columns(self) -> Iterator[list["_Columns"]]:
        """All calls of a few samples at a time, as many as fit with all that is made of them."""
        geometry, (first, _), places = self.geometry, self.calls[0], self._places()
        points = geometry.shape[2] if geometry.slides else 1
        columns = places * (geometry.groups * geometry.shape[1:].numel() // points + geometry.shape[0])
        for part in chunks(first, columns + geometry.shape.numel() // points):
            calls = []
            for x, b in self.calls:
                seen, parts = geometry.columns(geometry.padded(working(x[part])), b.shape[2:])
                channels, size = geometry.shape[0] // geometry.groups, math.prod(b.shape[2:])
                gradients = working(b[part]).reshape(len(seen), channels, size)
                calls.append(_Columns(seen, parts, gradients))
            yield calls

    def _chunks(self, x: Tensor, b: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
        for part in chunks(x, 2 * (x.shape[1:].numel() + b.shape[1:].numel())):
            yield part, working(x[part]), working(b[part])


class _Columns(NamedTuple):
    """One call with groups as further samples: what the kernel sees, its parts, and the gradients of the outputs."""

    inputs: Tensor
    parts: list[slice]
    outputs: Tensor

    def pairs_are_cheaper(self) -> bool:
        (seen, length), (outputs, places) = self.inputs.shape[1:], self.outputs.shape[1:]
        return _pairs(length, seen, places, outputs) < len(self.parts) * places * seen * outputs


def _pairs(length: int, seen: int, places: int, outputs: int) -> int:
    """Multiplications for the products of all pairs of columns and of all pairs of places."""
    return length**2 * seen + places**2 * outputs


def _squared_norms(calls: list[_Columns]) -> Tensor:
    """As for outer products: gradients multiplied out, or products of pairs of places, whichever multiplies less."""
    first = calls[0]
    if len(calls) > 1 or not first.pairs_are_cheaper():
        return accumulated(squares(gradients) for gradients in _gradients(calls))
    shared = first.inputs.mT @ first.inputs
    pairs = reduce(torch.add, (shared[:, part, part] for part in first.parts))
    return dots(pairs, first.outputs.mT @ first.outputs).clamp_min_(0.0)


def _gradients(calls: list[_Columns]) -> Iterator[Tensor]:
    """Gradients of every group of every sample, for one point of the kernel along the first dimension at a time."""
    for points in zip(*(call.parts for call in calls), strict=True):
        yield accumulated(
            _product(call.outputs, call.inputs[:, :, point]) for call, point in zip(calls, points, strict=True)
        )


def _product(outputs: Tensor, inputs: Tensor) -> Tensor:
    """Products over places; matrix products with few columns are slower than those with few rows."""
    narrow = inputs.shape[1] < _WORTH_SLIDING and inputs.shape[1] < outputs.shape[1]
    return (inputs @ outputs.mT).mT.contiguous() if narrow else outputs @ inputs.mT
