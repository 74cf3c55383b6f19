"""Draws of conditions that follow from their number alone."""

import torch
from torch import Tensor

from lightning_hpo.functional.seeding import mix_seed

__all__ = ["sample_conditions"]

_BLOCK = 32  # draws that are stratified together


def sample_conditions(numbers: range, names: int, seed: int = 0, stratified: bool = True) -> Tensor:
    """Uniform draws by their number: the same number gives the same draw, on whichever rank and after any restart.

    Args:
        numbers: Which draws, from 0 on.
        names: How many conditions.
        seed: Decides everything.
        stratified: Whether of 32 draws in a row each lies in a different 32nd of the range (a Latin hypercube).

    Returns:
        ``(draws, names)`` in [0, 1), on the CPU.

    Raises:
        ValueError: If a number is negative.

    References:
        McKay, Beckman and Conover, "A Comparison of Three Methods for Selecting Values of Input Variables", 1979.

    Example:
        >>> draws = sample_conditions(range(32), names=1)[:, 0]
        >>> sorted((draws * 32).int().tolist()) == list(range(32))
        True
    """
    if not numbers:
        return torch.empty(0, names)
    if min(numbers) < 0:
        raise ValueError(f"draws are numbered from 0 on, got {numbers}")
    first, last = min(numbers) // _BLOCK, max(numbers) // _BLOCK
    blocks = []
    for block in range(first, last + 1):
        generator = torch.Generator().manual_seed(mix_seed(seed, block))
        inside = torch.rand(_BLOCK, names, generator=generator, dtype=torch.float64)
        if stratified:
            cells = torch.stack([torch.randperm(_BLOCK, generator=generator) for _ in range(names)], 1)
            inside = (cells + inside) / _BLOCK
        blocks.append(inside)
    found = torch.cat(blocks)[[number - first * _BLOCK for number in numbers]]
    return found.to(torch.get_default_dtype()).clamp(max=1 - 2**-24)  # rounding may not reach one
