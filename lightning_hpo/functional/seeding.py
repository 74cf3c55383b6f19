"""Seeds for generators that must follow from several numbers."""

__all__ = ["mix_seed"]

_MASK = 2**64 - 1


def mix_seed(*numbers: int) -> int:
    """A seed of 32 bits that depends on all numbers and on their order.

    A generator on the CPU looks at the low 32 bits of its seed and at nothing else, so that numbers packed side by side
    into a larger one are lost.

    Args:
        numbers: A seed, an epoch, a step: whatever the draws shall depend on. Integers.

    Returns:
        From 0 to ``2**32 - 1``; the numbers are spread over it as if at random.

    References:
        Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators", 2014 (the finalizer of SplitMix).

    Example:
        >>> mix_seed(0, 1) != mix_seed(1, 0) != mix_seed(1, 1)
        True
        >>> mix_seed(3, 7) == mix_seed(3, 7) < 2**32
        True
    """
    state = len(numbers)
    for number in numbers:
        state = (state + (number & _MASK) + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state >> 32
