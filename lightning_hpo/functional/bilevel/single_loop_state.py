"""Where a single-loop run stands, and how its iterations go."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_hpo.functional.bilevel.adjoint_watch import Watch
from lightning_hpo.functional.bilevel.problem import Tensors

__all__ = ["SingleLoopInfo", "SingleLoopState", "judge", "wide_zeros"]


class SingleLoopState(NamedTuple):
    """Where a run stands; ``_asdict()`` is plain types, and ``SingleLoopState(**saved)`` goes on from there.

    Attributes:
        inner: Inner parameters by name.
        outer: Outer parameters by name.
        z: Running solution of the linear system, by the names of the inner parameters.
        m: Momentum, by the names of the outer ones.
        step: Iterations so far.
        watch: What :class:`~lightning_hpo.functional.bilevel.adjoint_watch.Watch` remembers.
    """

    inner: Tensors
    outer: Tensors
    z: Tensors
    m: Tensors
    step: int = 0
    watch: tuple[int, int, float, float] = (0, 0, 0.0, 0.0)


class SingleLoopInfo(NamedTuple):
    r"""How an iteration went.

    Attributes:
        gradient_norm: Length of the hypergradient.
        z_norm: Length of the new :math:`z`.
        residual: :math:`\|\nabla^2_{yy} G z - \nabla_y F\| / \|\nabla_y F\|` at the :math:`z` that was used; the
            numerator alone where the outer gradient is 0.
        inner_steps: Inner steps that were taken.
        skipped: Whether something was not finite, so that x, z and m stayed.
        outer_loss: :math:`F` on the batch, before the step of x.
        momentum_norm: Length of the new :math:`m`.
    """

    gradient_norm: float
    z_norm: float
    residual: float
    inner_steps: int
    skipped: bool
    outer_loss: float
    momentum_norm: float


def wide_zeros(like: Mapping[str, Tensor]) -> Tensors:
    """Zeros in the shapes of some tensors, with at least 32 bits.

    Args:
        like: Tensors by name.

    Returns:
        Zeros by name.

    Example:
        >>> wide_zeros({"w": torch.ones(2, dtype=torch.bfloat16)})
        {'w': tensor([0., 0.])}
    """
    return {
        name: torch.zeros_like(value, dtype=torch.promote_types(value.dtype, torch.float32))
        for name, value in like.items()
    }


def judge(
    watch: tuple[int, int, float, float], norms: Tensor, loss: Tensor, m: Tensors, taken: int, z_lr: float
) -> tuple[Watch, SingleLoopInfo, bool]:
    r"""Looks at the numbers of an iteration, which are read to the host here, all at once.

    Args:
        watch: What is remembered of those before.
        norms: Lengths of the hypergradient, of the new z, of :math:`\nabla_y F` and of the residual; shape ``(4,)``.
        loss: The outer loss.
        m: The momentum after a step.
        taken: Inner steps that were taken.
        z_lr: Step size of z.

    Returns:
        What to remember, how it went, and whether z has grown tenfold.

    Raises:
        FloatingPointError: If this was the tenth hypergradient in a row that was not finite.

    Example:
        >>> norms = torch.tensor([3.0, 1.0, 2.0, 0.5])
        >>> _, info, grown = judge((0, 0, 0.0, 0.0), norms, torch.tensor(4.0), {"x": torch.tensor([5.0])}, 3, 0.1)
        >>> info.residual, info.momentum_norm, info.skipped, grown
        (0.25, 5.0, False, False)
    """
    length = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(value) for value in m.values()]))
    gradient, z, slope, residual, value, momentum = torch.cat([norms, torch.stack([loss, length]).to(norms)]).tolist()
    after, usable, grown = Watch(*watch).after(gradient, z, slope, z_lr)
    return after, SingleLoopInfo(gradient, z, residual / (slope or 1.0), taken, not usable, value, momentum), grown
