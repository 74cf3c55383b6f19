"""Differentiable token counts: how many tokens a block keeps, and which ones."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = [
    "KeptPlan",
    "bound_dead_pull",
    "candidate_counts",
    "initial_probabilities",
    "kept_plan",
    "kept_tokens",
    "probabilities_with_mean",
    "straight_through_mask",
    "survival_probability",
    "token_ranks",
]

# An expected count within this distance above an integer counts as that integer: sums in float32 differ by about
# 1e-5 between devices, and the ceiling would turn that noise into a whole token.
_CEIL_TOLERANCE = 1e-3
# On handwritten digits a bound of 1 makes all blocks alike, one of 1000 stalls above tight budgets; 10 to 100 do well.
_DEAD_PULL = 10.0
_STEEPEST = 2.0  # logit from one count to the next: steeper distributions hardly move their mean, nor learn
_PRUNE_LOGIT = 6.0  # of the largest count when pruning begins; the smallest has its negative


def candidate_counts(patches: int, granularity: int = 1, device: torch.device | str | None = None) -> Tensor:
    """Patch counts a block may keep: ``patches, patches - granularity, ...``, all positive.

    Args:
        patches: Patch tokens that enter the network, prefix tokens not counted.
        granularity: Difference of neighbouring candidates, ``1 <= granularity <= patches``.
        device: Where the result lives.

    Returns:
        Integers, descending, of shape ``(ceil(patches / granularity),)``.

    Raises:
        ValueError: If ``granularity`` is outside its range.

    Example:
        >>> candidate_counts(10, 4)
        tensor([10,  6,  2])
    """
    if not 1 <= granularity <= patches:
        raise ValueError(f"granularity must lie between 1 and the number of patches ({patches}), got {granularity}.")
    return torch.arange(patches, 0, -granularity, device=device)


def survival_probability(probabilities: Tensor, patches: int, granularity: int = 1) -> Tensor:
    r"""Probability that the token at each sorted position is kept.

    With candidates :math:`c_i` and their probabilities :math:`p_i`, position :math:`t` survives when the count
    reaches it: :math:`\pi_t = \sum_{i: c_i + 1 > t} p_i`. Position 0 is the class token, so :math:`\pi_0 = 1`.
    One cumulative sum and one lookup, whatever the number of patches.

    Args:
        probabilities: Probabilities of :func:`candidate_counts`, shape ``(..., candidates)``.
        patches: Patch tokens that enter the network.
        granularity: Difference of neighbouring candidates.

    Returns:
        Probabilities for positions ``0 .. patches``, shape ``(..., patches + 1)``, non-increasing.

    References:
        Chen et al., "DiffRate: Differentiable Compression Rate for Efficient Vision Transformers", ICCV 2023, sec. 3.3.

    Example:
        >>> survival_probability(torch.tensor([0.25, 0.25, 0.5]), patches=3)
        tensor([1.0000, 1.0000, 0.5000, 0.2500])
    """
    position = torch.arange(patches + 1, device=probabilities.device)
    last_reaching = ((patches - position) // granularity).clamp(max=probabilities.shape[-1] - 1)
    return probabilities.cumsum(-1).index_select(-1, last_reaching)


def kept_tokens(probabilities: Tensor, candidates: Tensor, prefix: int = 1) -> Tensor:
    r"""Number of kept tokens, :math:`K = \lceil \sum_i c_i p_i \rceil` plus the prefix, with identity gradient.

    Args:
        probabilities: Probabilities of the candidates, shape ``(..., candidates)``.
        candidates: Patch counts from :func:`candidate_counts`, shape ``(candidates,)``.
        prefix: Class, distillation and register tokens, which are always kept and counted here.

    Returns:
        Whole numbers in floating point, shape ``(...)``; the gradient is that of the expectation.

    References:
        Chen et al., "DiffRate", ICCV 2023, sec. 3.3.

    Example:
        >>> candidates = candidate_counts(196)
        >>> kept_tokens(torch.full((196,), 1 / 196), candidates)
        tensor(100.)
    """
    expected = (probabilities * candidates.to(probabilities.dtype)).sum(-1)
    whole = (expected.detach() - _CEIL_TOLERANCE).ceil()
    return whole + (expected - expected.detach()) + prefix


def initial_probabilities(kinds: int, blocks: int, candidates: int) -> Tensor:
    """Probabilities to begin learning with: merging keeps about half of the patches, pruning nearly all of them.

    The paper begins with equal probabilities for both. Then pruning, which comes first in a block, does all the work at
    the beginning, and what it drops merging would often have kept: accuracy suffers. From here on the gradient moves
    tokens from one to the other as it sees fit.

    Args:
        kinds: 2 for counts after pruning and after merging, 1 for counts after merging alone.
        blocks: Blocks that compress.
        candidates: Candidate counts of each.

    Returns:
        Probabilities of the candidates, the largest count first, shape ``(kinds, blocks, candidates)``.

    Example:
        >>> start = initial_probabilities(kinds=2, blocks=1, candidates=16)
        >>> kept_tokens(start, candidate_counts(16), prefix=0)
        tensor([[16.],
                [ 9.]])
    """
    merge = torch.full((candidates,), 1 / candidates)
    prune = torch.linspace(_PRUNE_LOGIT, -_PRUNE_LOGIT, candidates).softmax(0)
    rows = torch.stack([prune, merge])[2 - kinds :]
    return rows[:, None, :].expand(kinds, blocks, candidates).clone()


def probabilities_with_mean(count: float, candidates: Tensor) -> Tensor:
    r"""The flattest probabilities whose expected count rounds up to ``count``.

    Of all distributions with a given mean the one of largest entropy, :math:`p_i \propto e^{\lambda c_i}`. The mean is
    half a token below the count, away from both integers, and inside the range of the candidates.

    Args:
        count: Patches to keep.
        candidates: Patch counts from :func:`candidate_counts`, shape ``(candidates,)``.

    Returns:
        Positive probabilities, shape of ``candidates``.

    Example:
        >>> candidates = candidate_counts(49)
        >>> kept_tokens(probabilities_with_mean(43, candidates), candidates, prefix=0)
        tensor(43.)
    """
    values = candidates.double()
    low, high = -_STEEPEST, _STEEPEST
    for _ in range(60):  # bisection to the last bit
        slope = (low + high) / 2
        below = ((slope * values).softmax(0) * values).sum() < count - 0.5
        low, high = (slope, high) if below else (low, slope)
    return (slope * values).softmax(0).float().clamp(min=torch.finfo(torch.float32).tiny)


class KeptPlan(NamedTuple):
    """What every compressible block keeps in one forward pass.

    Args:
        kept: Patches to keep, prefix not counted, shape ``(kinds, blocks)``.
        survival: Survival probability of each sorted position, shape ``(kinds, blocks, patches + 1)``.
    """

    kept: Tensor
    survival: Tensor


def kept_plan(probabilities: Tensor, patches: int, granularity: int = 1) -> KeptPlan:
    """Kept counts and survival probabilities of all blocks at once.

    Args:
        probabilities: Probabilities of the candidates, shape ``(kinds, blocks, candidates)``.
        patches: Patch tokens that enter the network.
        granularity: Difference of neighbouring candidates.

    Returns:
        The plan; both parts are differentiable in the probabilities.

    Example:
        >>> kept_plan(torch.full((2, 3, 16), 1 / 16), patches=16).kept
        tensor([[9., 9., 9.],
                [9., 9., 9.]])
    """
    candidates = candidate_counts(patches, granularity, probabilities.device)
    return KeptPlan(
        kept_tokens(probabilities, candidates, prefix=0), survival_probability(probabilities, patches, granularity)
    )


def straight_through_mask(rank: Tensor, kept: Tensor, survival: Tensor, alive: Tensor, living: Tensor) -> Tensor:
    r"""Factor that kills the patches beyond the kept count, differentiable in the survival probabilities.

    The value is 1 for ranks below the kept count and 0 beyond; the gradient is that of the survival probability of
    the rank. Tokens dead on entry get the constant 1: their product with the running mask stays 0 while the gradient
    still reaches the blocks that killed them. Nothing is differentiated where the count does not bind.

    Args:
        rank: Position of each patch in the order of importance, from 0, shape ``(batch, patches)``.
        kept: Patches to keep, prefix not counted, 0-dimensional.
        survival: Result of :func:`survival_probability`, shape ``(patches + 1,)``.
        alive: Which patches are alive on entry, boolean, shape ``(batch, patches)``.
        living: How many patches are alive on entry, 0-dimensional.

    Returns:
        Factor for the running mask, shape ``(batch, patches)``.

    Example:
        >>> rank, alive = torch.tensor([[2, 0, 1]]), torch.tensor([[True, True, True]])
        >>> survival = torch.tensor([1.0, 1.0, 0.5, 0.25], requires_grad=True)
        >>> factor = straight_through_mask(rank, torch.tensor(2), survival, alive, torch.tensor(3))
        >>> factor.detach()
        tensor([[0., 1., 1.]])
        >>> torch.autograd.grad(factor[0, 0], survival)
        (tensor([0., 0., 0., 1.]),)
    """
    binds = kept < living
    soft = survival[1:].expand(rank.shape[0], -1).gather(1, rank)
    hard = (rank < kept).to(soft.dtype)
    factor = hard + (soft - soft.detach()) * binds
    return torch.where(alive, factor, torch.ones_like(factor))


class _BoundedPull(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mask: Tensor) -> Tensor:
        ctx.save_for_backward(mask)
        return mask.view_as(mask)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (mask,), (grad,) = ctx.saved_tensors, grads
        strongest = _DEAD_PULL * (grad.abs() * (mask > 0.5)).amax(-1, keepdim=True)
        return torch.where(mask > 0.5, grad, grad.clamp(-strongest, strongest))


def bound_dead_pull(mask: Tensor) -> Tensor:
    """The mask itself; backwards, a dead token pulls at most ten times as hard as the living one that pulls hardest.

    The slope of attention in a dead token's mask is its attention relative to that of all living tokens together. Where
    it would dominate, the slope is thousands of times what bringing the token back would really do, and single images
    would drown all others in an adaptive optimizer. What bounds it is taken from the same image.

    Args:
        mask: 1 for living tokens, 0 for dead ones, shape ``(batch, tokens)``.

    Returns:
        The mask, unchanged.

    Example:
        >>> mask = torch.tensor([[1.0, 1.0, 0.0]], requires_grad=True)
        >>> (bound_dead_pull(mask) * torch.tensor([0.5, -2.0, 1000.0])).sum().backward()
        >>> mask.grad
        tensor([[ 0.5000, -2.0000, 20.0000]])
    """
    bounded: Tensor = _BoundedPull.apply(mask)
    return bounded


def token_ranks(scores: Tensor, alive: Tensor) -> Tensor:
    """Position of each patch when patches are sorted by descending score, the dead behind the living.

    Ties go to the lower index, so that training and inference agree on the order.

    Args:
        scores: Importance of each patch, not negative, shape ``(batch, patches)``.
        alive: Boolean, shape ``(batch, patches)``.

    Returns:
        Integers from 0, shape ``(batch, patches)``.

    Example:
        >>> token_ranks(torch.tensor([[0.2, 0.9, 0.5]]), torch.tensor([[True, False, True]]))
        tensor([[1, 2, 0]])
    """
    order = scores.masked_fill(~alive, -1.0).argsort(dim=1, descending=True, stable=True)
    position = torch.arange(scores.shape[1], device=scores.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, position)
