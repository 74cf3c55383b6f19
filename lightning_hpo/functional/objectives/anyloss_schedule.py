"""When a metric takes over from a cross-entropy, and how steep its soft decisions are."""

from typing import NamedTuple

__all__ = ["Blend", "blend_at"]


class Blend(NamedTuple):
    """How a step's loss is made.

    Args:
        mix: Weight of the metric; that of the cross-entropy is the rest.
        amplification: Steepness of the soft decisions.
    """

    mix: float
    amplification: float


def blend_at(
    done: float, warmup: float = 0.2, anneal: float = 1.0, mix: float = 0.5, start: float = 2.0, end: float = 10.0
) -> Blend:
    r"""The cross-entropy alone first, then both, while the amplification rises geometrically.

    .. math:: L = L_0 (L_1 / L_0)^u, \qquad u = \frac{t - w}{e - w} \text{ within 0 and 1}

    Args:
        done: Share :math:`t` of training that is over.
        warmup: Share :math:`w` that is the cross-entropy's alone.
        anneal: Share :math:`e` at which the amplification has reached its end.
        mix: Weight of the metric after the warm-up.
        start: First amplification :math:`L_0`.
        end: Last amplification :math:`L_1`.

    Returns:
        The blend of the coming step.

    Example:
        >>> blend_at(0.1), blend_at(0.6), blend_at(1.0)
        (Blend(mix=0.0, amplification=2.0), Blend(mix=0.5, amplification=4.47...), Blend(mix=0.5, amplification=10.0))
    """
    way = 1.0 if done >= anneal else max(0.0, done - warmup) / (anneal - warmup)
    amplification = end if way == 1 else start * (end / start) ** way
    return Blend(mix if done >= warmup else 0.0, amplification)
