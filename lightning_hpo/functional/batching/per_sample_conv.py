"""Per-sample gradients of convolution kernels, of any number of dimensions."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from lightning_hpo.functional.batching.per_sample import Factors, OuterFactors, accumulated, chunks, dots
from lightning_hpo.functional.batching.per_sample import working_precision as working

__all__ = ["ConvFactors", "ConvGeometry"]

_CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


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
            reach = [d * (k - 1) * (layer.padding == "same") for d, k in zip(layer.dilation, layer.kernel_size)]  # noqa: B905
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

    def patches(self, inputs: Tensor, places: Sequence[int]) -> Tensor:
        """What the kernel sees at every place.

        Args:
            inputs: Padded inputs, shape ``(n, channels, *size)``.
            places: Numbers of places, one for each dimension.

        Returns:
            Shape ``(n * groups, inputs / groups * points of the kernel, places)``.
        """
        inputs = inputs.contiguous()
        n, channels, *_ = inputs.shape
        of_sample, of_channel, *of_size = inputs.stride()
        kernel = self.shape[2:]
        along = [step * distance for step, distance in zip(of_size, self.dilation, strict=True)]
        across = [step * stride for step, stride in zip(of_size, self.stride, strict=True)]
        view = inputs.as_strided((n, channels, *kernel, *places), (of_sample, of_channel, *along, *across))
        return view.reshape(n * self.groups, self.shape[1:].numel(), -1)

    def convolved(self, inputs: Tensor, kernel: Tensor) -> Tensor:
        """The convolution of padded inputs with a kernel."""
        convolution = _CONVOLUTIONS[len(self.stride)]
        return convolution(inputs, kernel, None, self.stride, 0, self.dilation, self.groups)

    def kernel_gradient(self, inputs: Tensor, outputs: Tensor) -> Tensor:
        """The gradient of a kernel, summed over samples, from padded inputs."""
        nothing = [0] * len(self.stride)
        weight = inputs.new_empty(1).expand(self.shape)  # only its shape is looked at
        return torch.ops.aten.convolution_backward(
            outputs, inputs, weight, None, self.stride, nothing, self.dilation, False, nothing, self.groups, _KERNEL
        )[1]


_KERNEL = [False, True, False]  # of the gradients of input, kernel and bias, only the kernel's


class ConvFactors(Factors):
    """Gradients of a convolution kernel.

    Args:
        calls: Inputs ``(n, channels, *size)`` and gradients of the outputs ``(n, outputs, *places)`` of every call.
        geometry: How the convolution moves.

    Example:
        >>> layer = nn.Conv1d(1, 1, 2)
        >>> call = torch.tensor([[[1.0, 2.0, 3.0]]]), torch.tensor([[[1.0, 1.0]]])
        >>> factors = ConvFactors([call], ConvGeometry.of(layer))
        >>> factors.weighted_sum(torch.ones(1)), factors.squared_norms()
        (tensor([[[3., 5.]]]), tensor([34.]))
    """

    def __init__(self, calls: Sequence[tuple[Tensor, Tensor]], geometry: ConvGeometry) -> None:
        super().__init__(geometry.shape)
        self.calls, self.geometry = tuple(calls), geometry

    @override
    def squared_norms(self) -> Tensor:
        groups = self.geometry.groups
        return torch.cat([outer.squared_norms().view(-1, groups).sum(1) for outer in self._outers()])

    @override
    def inner_products(self, gradient: Tensor) -> Tensor:
        return accumulated(
            torch.cat([dots(self.geometry.convolved(x, gradient.to(x.dtype)), b) for _, x, b in self._chunks(*call)])
            for call in self.calls
        )

    @override
    def second_moments(self) -> Tensor:
        shape = (-1, *self.shape)
        return accumulated((o.outputs.mT @ o.inputs).view(shape).square_().sum(0) for o in self._outers())

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

    def _outers(self) -> Iterator[OuterFactors]:
        """The same gradients as outer products over places, for a few samples at a time, groups as further samples."""
        geometry, (first, _) = self.geometry, self.calls[0]
        places = sum(b.shape[2:].numel() for _, b in self.calls)
        points = geometry.groups * geometry.shape[1:].numel()
        for part in chunks(first, places * (points + geometry.shape[0]) + geometry.shape.numel()):
            inputs, outputs = [], []
            for x, b in self.calls:
                gradient = working(b[part])
                inputs.append(geometry.patches(geometry.padded(working(x[part])), b.shape[2:]).mT)
                outputs.append(gradient.reshape(inputs[-1].shape[0], geometry.shape[0] // geometry.groups, -1).mT)
            yield OuterFactors(_together(inputs), _together(outputs))

    def _chunks(self, x: Tensor, b: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
        for part in chunks(x, 2 * (x.shape[1:].numel() + b.shape[1:].numel())):
            yield part, self.geometry.padded(working(x[part])), working(b[part])


def _together(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)
