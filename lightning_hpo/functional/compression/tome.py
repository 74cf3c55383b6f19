"""Token merging: which tokens are alike, and what becomes of them."""

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_hpo.functional.compression.diffrate import token_ranks

__all__ = ["bipartite_merge", "bipartite_order", "grow_sizes", "match_tokens", "merge_tokens", "merge_weighted"]

_EPS = 1e-6  # keeps the norm of a zero token away from 0/0, in half precision too


def match_tokens(metric: Tensor, destinations: int | Tensor, sources: Tensor | None = None) -> tuple[Tensor, Tensor]:
    r"""Nearest destination of every source token by cosine similarity, ties to the lowest index.

    Two layouts. With an integer, the first ``destinations`` tokens receive the rest (real slicing, sorted tokens).
    With a boolean tensor any subset may receive (the masked layout of training), and tokens that are no sources are
    matched to themselves.

    Args:
        metric: Features of the patches; prefix tokens take no part, shape ``(batch, tokens, width)``.
        destinations: Number of leading destinations, or which tokens they are, ``(batch, tokens)``.
        sources: In the masked layout, which tokens are sources, ``(batch, tokens)``.

    Returns:
        Index of the destination and similarity, shape ``(batch, sources)`` sliced and ``(batch, tokens)`` masked.

    References:
        Chen et al., "DiffRate", ICCV 2023, sec. 3.2; Bolya et al., "Token Merging", ICLR 2023.

    Example:
        >>> metric = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]]])
        >>> match_tokens(metric, 2)
        (tensor([[1]]), tensor([[0.8000]]))
    """
    with torch.no_grad():
        metric = metric.float()
        inverse = torch.linalg.vector_norm(metric, dim=-1).clamp(min=_EPS).reciprocal()
        # The norm of a source changes no comparison: destinations are divided before the products, sources at the end.
        unit = metric * inverse.unsqueeze(-1)
        if isinstance(destinations, int):
            value, index = (metric[:, destinations:] @ unit[:, :destinations].transpose(1, 2)).max(-1)
            return index, value * inverse[:, destinations:]
        barred = torch.zeros_like(inverse).masked_fill_(~destinations, -torch.inf)
        value, index = torch.baddbmm(barred.unsqueeze(1), metric, unit.transpose(1, 2)).max(-1)
        itself = torch.arange(metric.shape[1], device=metric.device)
        if sources is None:
            sources = ~destinations
        return torch.where(sources, index, itself), torch.where(sources, value * inverse, torch.ones_like(value))


def grow_sizes(size: Tensor, similarity: Tensor, clamp: bool) -> Tensor:
    """Contribution of each source to the size of its destination: its own size times its similarity.

    Args:
        size: Sizes of the sources.
        similarity: Cosine similarity to the destination, in ``[-1, 1]``.
        clamp: Whether a source counts for at least one token. Without it a source unlike its destination shrinks it
            (the rule of the official inference code, kept for comparison).

    Returns:
        What is added to the destination.

    Example:
        >>> grow_sizes(torch.tensor([1.0, 4.0]), torch.tensor([-0.5, 0.5]), clamp=True)
        tensor([1., 2.])
    """
    grown = size * similarity
    return grown.clamp(min=1.0) if clamp else grown


def merge_tokens(x: Tensor, sources: Tensor, index: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean of each destination and the sources that chose it; differentiable in both.

    Args:
        x: Destinations, shape ``(batch, tokens, width)``.
        sources: Tokens that move, shape ``(batch, moved, width)``.
        index: Destination of each source, shape ``(batch, moved)``.
        weight: 0 for sources that do not move after all, 1 for the rest (the default), shape ``(batch, moved)``.

    Returns:
        Shape of ``x``; destinations that nothing chose are unchanged.

    References:
        Chen et al., "DiffRate", ICCV 2023, sec. 3.2.

    Example:
        >>> x = torch.tensor([[[1.0], [2.0]]])
        >>> merge_tokens(x, torch.tensor([[[6.0]]]), torch.tensor([[1]])).squeeze(-1)
        tensor([[1., 4.]])
    """
    moved = x.new_ones(index.shape) if weight is None else weight.to(x.dtype)
    count = x.new_ones(x.shape[:2]).scatter_add(1, index, moved).unsqueeze(-1)
    sources = sources if weight is None else sources * moved.unsqueeze(-1)
    return x.scatter_add(1, index.unsqueeze(-1).expand_as(sources), sources).div_(count)


def merge_weighted(x: Tensor, size: Tensor, where: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of the tokens that meet in each place, weighed by their sizes.

    Args:
        x: Patch tokens, shape ``(batch, tokens, width)``.
        size: Patches that each token stands for, shape ``(batch, tokens)``.
        where: The place that each token goes to, shape ``(batch, tokens)``.

    Returns:
        Tokens and sizes; a place that nothing went to keeps its token and has size 0.

    References:
        Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023, sec. 3.

    Example:
        >>> merge_weighted(torch.tensor([[[1.0], [4.0]]]), torch.tensor([[2.0, 1.0]]), torch.tensor([[0, 0]]))
        (tensor([[[2.],
                 [4.]]]), tensor([[3., 0.]]))
    """
    total = torch.zeros_like(size).scatter_add(1, where, size)
    weighted = x * size.unsqueeze(-1).to(x.dtype)
    summed = torch.zeros_like(weighted).scatter_add(1, where.unsqueeze(-1).expand_as(x), weighted)
    merged = summed / total.clamp(min=_EPS).unsqueeze(-1).to(x.dtype)
    return torch.where(total.unsqueeze(-1) > 0, merged, x), total


def bipartite_order(metric: Tensor, alive: Tensor) -> tuple[Tensor, Tensor]:
    """Which living tokens leave last, and whom each would merge into; the masked layout of :func:`bipartite_merge`.

    Every other living token may leave, the one most similar to any of the others first; those others never do.

    Args:
        metric: Attention keys, mean over the heads, shape ``(batch, tokens, head width)``.
        alive: Which tokens are alive, boolean, shape ``(batch, tokens)``.

    Returns:
        Rank of each token, from 0 for the one that stays longest, the dead behind the living, and index of the token
        that it would merge into, both of shape ``(batch, tokens)``.

    References:
        Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023, sec. 3.

    Example:
        >>> metric = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.0, 3.0]]])
        >>> bipartite_order(metric, torch.tensor([[True, True, True]]))
        (tensor([[1, 0, 2]]), tensor([[1, 1, 1]]))
    """
    with torch.no_grad():
        odd = (alive.cumsum(1) % 2 == 0) & alive  # counted from 1: the second, the fourth ... living token
        unit = F.normalize(metric.float(), dim=-1, eps=_EPS)
        value, nearest = (unit @ unit.transpose(1, 2)).masked_fill(~odd[:, None, :], -torch.inf).max(-1)
        stays = (1 - value).masked_fill(odd, torch.inf).clamp(min=0.0)
        backwards = token_ranks(stays.flip(1), alive.flip(1))  # of tokens alike, the first one leaves first
        return backwards.flip(1), nearest


def bipartite_merge(x: Tensor, size: Tensor, metric: Tensor, kept: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Token merging as first published: alternate tokens, the most similar pairs, size-weighted mean.

    Args:
        x: Patch tokens, shape ``(batch, tokens, width)``.
        size: Patches that each token stands for, shape ``(batch, tokens)``.
        metric: Attention keys, mean over the heads, shape ``(batch, tokens, head width)``.
        kept: Tokens that remain; at most half of them can go in one step.

    Returns:
        Tokens and sizes that remain, which tokens they were, ``(batch, remaining)``, and where each token went, an
        index into the remaining ones, ``(batch, tokens)``.

    References:
        Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023, sec. 3.

    Example:
        >>> x = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.0, 3.0]]])
        >>> merged, size, survivors, where = bipartite_merge(x, torch.ones(1, 3), x, kept=2)
        >>> merged, size, survivors, where
        (tensor([[[1., 0.],
                 [0., 2.]]]), tensor([[1., 2.]]), tensor([[0, 1]]), tensor([[0, 1, 1]]))
    """
    batch, tokens, width = x.shape
    place = torch.arange(tokens, device=x.device)
    first, second = place[::2], place[1::2]
    moves = max(0, min(tokens - kept, len(second)))
    if not moves:
        everyone = place.expand(batch, -1)
        return x, size, everyone, everyone
    unit = F.normalize(metric.detach().float(), dim=-1, eps=_EPS)
    value, nearest = (unit[:, first] @ unit[:, second].transpose(1, 2)).max(-1)
    order = value.argsort(dim=-1, descending=True, stable=True)
    source = first[order[:, :moves]]
    target = second[nearest.gather(1, order[:, :moves])]

    where = place.expand(batch, -1).scatter(1, source, target)
    merged, total = merge_weighted(x, size, where)
    stays = torch.ones(batch, tokens, dtype=torch.bool, device=x.device).scatter(1, source, False)
    survivors = stays.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, : tokens - moves]
    new_index = stays.long().cumsum(1) - 1
    merged = merged.gather(1, survivors.unsqueeze(-1).expand(-1, -1, width))
    return merged, total.gather(1, survivors), survivors, new_index.gather(1, where)
