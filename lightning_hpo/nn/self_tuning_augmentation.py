"""Augmentation of image tensors with a strength for each example; torchvision's takes one for a whole batch.

All are the identity in eval mode, and draw on the images' device. Images are ``(batch, channels, height, width)``.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_hpo.nn.self_tuning_regularisers import strength
from lightning_hpo.nn.setting import Setting, setting_problems

__all__ = ["TunedAffine", "TunedColorJitter", "TunedCutout", "affine", "cutout", "shift_hue"]


class TunedCutout(nn.Module):
    """Blackens squares at random places, as many and as large as each example's hyperparameters say.

    Args:
        length: Side in pixels; fractions are cut off.
        holes: How many; fractions are cut off.
        max_holes: More are never asked for.

    Raises:
        ValueError: If a number is out of range.

    References:
        DeVries and Taylor, "Improved Regularization of Convolutional Neural Networks with Cutout", 2017.

    Example:
        >>> images = TunedCutout(length=2, holes=lambda: torch.tensor([0.0, 1.9]))(torch.ones(2, 1, 8, 8))
        >>> int((images[0] == 0).sum()), int((images[1] == 0).sum()) in (1, 2, 4)
        (0, True)
    """

    def __init__(self, length: Setting, holes: Setting = 1.0, max_holes: int = 4) -> None:
        super().__init__()
        problems = setting_problems("length", length, lambda n: n >= 0, "be at least 0")
        problems += setting_problems("holes", holes, lambda n: (n >= 0) & (n <= max_holes), f"be from 0 to {max_holes}")
        problems += [] if max_holes >= 1 else [f"max_holes must be at least 1, got {max_holes!r}"]
        if problems:
            raise ValueError("; ".join(problems))
        self.length, self.holes, self.max_holes = length, holes, max_holes

    def forward(self, images: Tensor) -> Tensor:
        """The same shape."""
        if not self.training:
            return images
        size = images.new_tensor(images.shape[-2:], dtype=torch.float32)
        centres = (torch.rand(images.shape[0], self.max_holes, 2, device=images.device) * size).floor()
        flat = images.new_empty(images.shape[0], dtype=torch.float32)
        length, holes = (strength(s, flat).expand(images.shape[0]) for s in (self.length, self.holes))
        return cutout(images, centres, length, holes)


def cutout(images: Tensor, centres: Tensor, length: Tensor, holes: Tensor) -> Tensor:
    """Images with black squares.

    Args:
        images: ``(batch, channels, height, width)``.
        centres: Row and column of each square's middle, ``(batch, squares, 2)``.
        length: Side of an example's squares, ``(batch)``.
        holes: How many of them count, ``(batch)``.

    Returns:
        The same shape.

    Example:
        >>> image = torch.ones(1, 1, 3, 4)
        >>> cutout(image, torch.tensor([[[1.0, 1.0]]]), torch.tensor([2.0]), torch.tensor([1.0]))[0, 0]
        tensor([[0., 0., 1., 1.],
                [0., 0., 1., 1.],
                [1., 1., 1., 1.]])
    """
    side = length.floor()[:, None]
    asked = torch.arange(centres.shape[1], device=images.device) < holes.floor()[:, None]
    inside = []
    for dim in (0, 1):
        start = centres[..., dim] - (side / 2).floor()
        pixel = torch.arange(images.shape[2 + dim], device=images.device)
        inside.append((pixel >= start[..., None]) & (pixel < (start + side)[..., None]))
    hole = inside[0][..., :, None] & inside[1][..., None, :] & asked[..., None, None]
    return images * ~hole.any(1, keepdim=True)


class TunedColorJitter(nn.Module):
    """Changes brightness, contrast, saturation and hue, in this order, each by as much as an example's strength says.

    Factors are drawn from U(max(0, 1 - a), 1 + a), shifts of the hue from U(-a, a), as torchvision's ``ColorJitter``
    does, which takes one strength for a batch. Images must lie in [0, 1]: put it before whatever normalises them.

    Args:
        brightness: Strength, at least 0.
        contrast: Strength, at least 0.
        saturation: Strength, at least 0; colour images only.
        hue: Strength, from 0 to a half; colour images only.

    Raises:
        ValueError: If a strength is out of range.

    Example:
        >>> jitter = TunedColorJitter(brightness=lambda: torch.tensor([0.0, 0.5]))
        >>> images = torch.full((2, 3, 4, 4), 0.5)
        >>> torch.equal(jitter(images)[0], images[0])
        True
    """

    def __init__(
        self, brightness: Setting = 0.0, contrast: Setting = 0.0, saturation: Setting = 0.0, hue: Setting = 0.0
    ) -> None:
        super().__init__()
        named = {"brightness": brightness, "contrast": contrast, "saturation": saturation}
        problems = [p for n, s in named.items() for p in setting_problems(n, s, lambda a: a >= 0, "be at least 0")]
        problems += setting_problems("hue", hue, lambda a: (a >= 0) & (a <= 0.5), "be from 0 to 0.5")
        if problems:
            raise ValueError("; ".join(problems))
        self.brightness, self.contrast, self.saturation, self.hue = brightness, contrast, saturation, hue

    def forward(self, images: Tensor) -> Tensor:
        """The same shape."""
        if not self.training:
            return images
        if not _is_zero(self.brightness):
            images = (images * self._factor(self.brightness, images)).clamp(0, 1)
        if not _is_zero(self.contrast):
            mean = _grey(images).mean((1, 2, 3), keepdim=True)
            images = torch.lerp(mean, images, self._factor(self.contrast, images)).clamp(0, 1)
        if not _is_zero(self.saturation):
            images = torch.lerp(_grey(images), images, self._factor(self.saturation, images)).clamp(0, 1)
        if not _is_zero(self.hue):
            most = strength(self.hue, images).clamp(0, 0.5)
            images = shift_hue(images, most * (2 * _uniform(images) - 1))
        return images

    @staticmethod
    def _factor(setting: Setting, images: Tensor) -> Tensor:
        most = strength(setting, images).clamp_min(0)
        low = (1 - most).clamp_min(0)
        return low + (1 + most - low) * _uniform(images)


def shift_hue(images: Tensor, shift: Tensor) -> Tensor:
    """Colour images with other hues.

    Args:
        images: ``(batch, 3, height, width)`` in [0, 1].
        shift: Part of a full turn, ``(batch, 1, 1, 1)``.

    Returns:
        The same shape.

    Raises:
        ValueError: If images have not three channels.

    Example:
        >>> red = torch.tensor([1.0, 0.0, 0.0]).view(1, 3, 1, 1)
        >>> shift_hue(red, torch.full((1, 1, 1, 1), 1 / 3)).flatten()  # green
        tensor([0., 1., 0.])
    """
    if images.shape[1] != 3:
        raise ValueError(f"hues need three channels, got {images.shape[1]}")
    red, green, blue = images.unbind(1)
    value, least = images.amax(1), images.amin(1)
    spread = value - least
    some = torch.where(spread > 0, spread, torch.ones_like(spread))
    hue = torch.where(
        value == red,
        (green - blue) / some,
        torch.where(value == green, 2 + (blue - red) / some, 4 + (red - green) / some),
    )
    turned = (hue / 6 + shift[:, 0]) * 6
    parts = []
    for offset in (5, 3, 1):
        k = (offset + turned).remainder(6)
        parts.append(value - spread * torch.minimum(k, 4 - k).clamp(0, 1))
    return torch.stack(parts, 1)


class TunedAffine(nn.Module):
    """Turns, shifts, scales and shears each image, by as much as its strengths say; bilinear, black outside.

    Args:
        degrees: Angles are drawn from U(-a, a).
        translate: Shifts, as part of width and height, from U(-a, a).
        scale: Factors from U(1 - a, 1 + a), a below 1.
        shear: Angles, in degrees, from U(-a, a), along the width.

    Raises:
        ValueError: If a strength is out of range.

    Example:
        >>> turn = TunedAffine(degrees=lambda: torch.tensor([0.0, 45.0]))
        >>> images = torch.rand(2, 1, 6, 6)
        >>> torch.allclose(turn(images)[0], images[0], atol=1e-5)
        True
    """

    def __init__(
        self, degrees: Setting = 0.0, translate: Setting = 0.0, scale: Setting = 0.0, shear: Setting = 0.0
    ) -> None:
        super().__init__()
        problems = setting_problems("degrees", degrees, lambda a: (a >= 0) & (a <= 180), "be from 0 to 180")
        problems += setting_problems("translate", translate, lambda a: (a >= 0) & (a <= 1), "be from 0 to 1")
        problems += setting_problems("scale", scale, lambda a: (a >= 0) & (a < 1), "be at least 0 and below 1")
        problems += setting_problems("shear", shear, lambda a: (a >= 0) & (a < 90), "be at least 0 and below 90")
        if problems:
            raise ValueError("; ".join(problems))
        self.degrees, self.translate, self.scale, self.shear = degrees, translate, scale, shear

    def forward(self, images: Tensor) -> Tensor:
        """The same shape."""
        if not self.training:
            return images
        flat = images.new_empty(images.shape[0], dtype=torch.float32)

        def drawn(setting: Setting) -> Tensor:
            return strength(setting, flat) * (2 * torch.rand_like(flat) - 1)

        size = images.new_tensor(images.shape[-2:], dtype=torch.float32).flip(0)  # width, height
        shift = torch.stack([drawn(self.translate), drawn(self.translate)], 1) * size
        return affine(images, drawn(self.degrees), shift, 1 + drawn(self.scale), drawn(self.shear))


def affine(images: Tensor, degrees: Tensor, shift: Tensor, scale: Tensor, shear: Tensor) -> Tensor:
    """Images turned about their middle, shifted, scaled and sheared, with the conventions of torchvision's ``affine``.

    Args:
        images: ``(batch, channels, height, width)``.
        degrees: Angles, clockwise, ``(batch)``.
        shift: Pixels to the right and down, ``(batch, 2)``.
        scale: Factors, ``(batch)``.
        shear: Angles in degrees, ``(batch)``.

    Returns:
        The same shape.

    Example:
        >>> image, zero = torch.tensor([[[[1.0, 0.0], [0.0, 0.0]]]]), torch.zeros(1)
        >>> affine(image, zero + 90, torch.zeros(1, 2), zero + 1, zero)[0, 0].round(decimals=3).abs()
        tensor([[0., 1.],
                [0., 0.]])
    """
    angle, slant = degrees.deg2rad(), shear.deg2rad().tan()
    cos, sin = angle.cos(), angle.sin()
    rows = [torch.stack([cos, -cos * slant - sin], 1), torch.stack([sin, cos - sin * slant], 1)]
    inverse = torch.linalg.inv(scale[:, None, None] * torch.stack(rows, 1))
    # Where each pixel comes from, in units in which the image spans -1 to 1.
    half = shift.new_tensor([images.shape[-1] / 2, images.shape[-2] / 2])
    turned = inverse * half / half[:, None]
    moved = -(inverse @ shift[..., None])[..., 0] / half
    grid = F.affine_grid(torch.cat([turned, moved[..., None]], 2), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid.to(images.dtype), align_corners=False)


def _grey(images: Tensor) -> Tensor:
    if images.shape[1] == 1:
        return images
    if images.shape[1] != 3:
        raise ValueError(f"contrast and saturation need one channel or three, got {images.shape[1]}")
    weights = images.new_tensor([0.2989, 0.587, 0.114]).view(1, 3, 1, 1)
    return (images * weights).sum(1, keepdim=True)


def _uniform(images: Tensor) -> Tensor:
    return torch.rand(images.shape[0], 1, 1, 1, device=images.device, dtype=images.dtype)


def _is_zero(setting: Setting) -> bool:
    return isinstance(setting, (int, float)) and not setting
