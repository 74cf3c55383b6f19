"""Tokens on their way through a compressed transformer: masked while rates are learned, sliced otherwise."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_hpo.functional.compression.diffrate import (
    KeptPlan,
    bound_dead_pull,
    kept_plan,
    straight_through_mask,
    token_ranks,
)
from lightning_hpo.functional.compression.tome import (
    bipartite_merge,
    bipartite_order,
    grow_sizes,
    match_tokens,
    merge_tokens,
    merge_weighted,
)

__all__ = ["BlockCompression", "CompressionRules", "RankedTokens", "TokenState"]

_SMALLEST_SIZE = 1e-6  # the unclamped size rule can reach zero and below, where the logarithm is no number


@dataclass(frozen=True)
class CompressionRules:
    """How tokens are ranked, matched and weighed.

    Args:
        importance: ``"class"`` ranks patches by the attention the class token pays them, ``"mean"`` by the attention
            that all tokens pay them.
        matching: What is compared to merge: ``"features"`` after attention (DiffRate), attention ``"keys"``, or
            ``"bipartite"``, the keys of alternating pairs as in ToMe, where nothing is pruned.
        clamp_sizes: Whether a merged token counts for at least one; False is the official inference rule.
    """

    importance: Literal["class", "mean"] = "class"
    matching: Literal["features", "keys", "bipartite"] = "features"
    clamp_sizes: bool = True


class RankedTokens(NamedTuple):
    """What attention tells about the patches.

    Args:
        scores: Importance, shape ``(batch, patches)``.
        keys: Attention keys, mean over the heads, shape ``(batch, patches, head width)``; None where tokens are matched
            by their features.
    """

    scores: Tensor
    keys: Tensor | None


@dataclass
class TokenState:
    """What travels from block to block besides the tokens; one object a network, reset by the first block.

    Tensors are those of the latest forward pass and are left out of copies and pickles.

    Args:
        prefix: Leading tokens that are never dropped.
        rules: How tokens are ranked, matched and weighed.
        trace: Whether to record which token each patch ended in.
        granularity: Step of the candidate counts while learning.
        probabilities: Returns the probabilities of the candidate counts, where rates are learned.
        learning: Whether passes are masked and differentiable in the rates. Not read from ``training``: a frozen
            network may well be in eval mode while its rates are learned.
    """

    prefix: int
    rules: CompressionRules
    trace: bool = False
    granularity: int = 1
    probabilities: Callable[[], Tensor] | None = None
    learning: bool = False
    size: Tensor | None = field(default=None, init=False)
    mask: Tensor | None = field(default=None, init=False)
    living: Tensor | None = field(default=None, init=False)
    positions: Tensor | None = field(default=None, init=False)
    group: Tensor | None = field(default=None, init=False)
    plan: KeptPlan | None = field(default=None, init=False)
    backward: int | None = field(default=None, init=False)

    def __getstate__(self) -> dict[str, Any]:
        """Settings without the tensors of the latest pass, which may carry a graph, and without the learner."""
        kept = ("prefix", "rules", "trace", "granularity")
        state = {name: value if name in kept else None for name, value in self.__dict__.items()}
        return {**state, "learning": False}

    def begin(self, x: Tensor, entry: int, learns: bool) -> None:
        """Starts a pass, or a segment of a hierarchical network, at its first block.

        Raises:
            ValueError: If another number of tokens arrives than the schedule was made for.
        """
        if x.shape[1] != entry:
            raise ValueError(
                f"Token compression is set up for {entry - self.prefix} patches, {x.shape[1] - self.prefix} arrived. "
                "A schedule holds for one image size; dynamic image sizes and patch dropout change the number."
            )
        self.size = self.mask = self.living = self.positions = self.plan = None
        self.backward = _running_backward()
        patches = torch.arange(entry - self.prefix, device=x.device).expand(x.shape[0], -1)
        self.group = patches if self.trace else None
        if learns and self.learning and self.probabilities is not None:
            self.plan = kept_plan(self.probabilities(), entry - self.prefix, self.granularity)

    def require_order(self) -> None:
        """Refuses to run a block again in the backward pass without the blocks before it.

        Raises:
            ValueError: If gradient checkpointing does that.
        """
        if self.backward != _running_backward():
            raise ValueError("Gradient checkpointing runs blocks twice, out of order; turn it off.")

    def log_size(self) -> Tensor | None:
        """Bias of the attention logits, shape ``(batch, tokens)``; None while every token stands for itself."""
        if self.size is None:
            return None
        return F.pad(self.size.clamp(min=_SMALLEST_SIZE).log(), (self.prefix, 0))

    def token_mask(self) -> Tensor | None:
        """The running mask with the prefix, shape ``(batch, tokens)``; None before the first compressed block."""
        return None if self.mask is None else F.pad(bound_dead_pull(self.mask), (self.prefix, 0), value=1.0)

    def rotary(self, rope: Tensor | None) -> Tensor | None:
        """The rotary table of the tokens that are left, one an image."""
        if rope is None or self.positions is None:
            return rope
        return rope[self.positions].unsqueeze(1) if rope.ndim == 2 else rope[:, self.positions].transpose(0, 1)

    # Masked: every token stays in the tensor, a mask says who lives.

    def mask_tokens(self, x: Tensor, ranked: RankedTokens, plan: KeptPlan) -> Tensor:
        """Prunes and merges by mask, differentiably in the plan; no token moves, nothing is read back to the host.

        Args:
            x: Tokens, shape ``(batch, tokens, width)``.
            ranked: Scores and keys of the patches.
            plan: What this block keeps: counts of shape ``(kinds,)``, survival ``(kinds, patches + 1)``.
        """
        mask = torch.ones_like(ranked.scores) if self.mask is None else self.mask
        living = mask.new_full((), float(mask.shape[1])) if self.living is None else self.living
        alive = mask.detach() > 0.5
        if self.rules.matching == "bipartite":
            rank, nearest = bipartite_order(_keys(ranked), alive)
            kept = torch.maximum(plan.kept[-1].detach(), (living / 2).ceil())
            x = self._merge_pairs_masked(x, nearest, alive & (rank >= kept))
        else:
            rank = token_ranks(ranked.scores, alive)
            if len(plan.kept) == 2:
                mask = mask * straight_through_mask(rank, plan.kept[0].detach(), plan.survival[0], alive, living)
                living = torch.minimum(living, plan.kept[0].detach())
                alive = alive & (rank < living)
            kept = plan.kept[-1].detach()
            receives = alive & (rank < kept)
            x = self._merge_masked(x, ranked, receives, alive & ~receives)
        self.mask = mask * straight_through_mask(rank, kept, plan.survival[-1], alive, living)
        self.living = torch.minimum(living, kept)
        return x

    def _merge_masked(self, x: Tensor, ranked: RankedTokens, receives: Tensor, moves: Tensor) -> Tensor:
        patches = x[:, self.prefix :]
        metric = patches if self.rules.matching == "features" else _keys(ranked)
        index, similarity = match_tokens(metric, receives, moves)
        size = torch.ones_like(ranked.scores) if self.size is None else self.size
        floor = size.clamp(min=1.0) if self.rules.clamp_sizes else size
        self.size = floor.scatter_add(1, index, grow_sizes(size, similarity, self.rules.clamp_sizes) * moves)
        if self.group is not None:
            self.group = index.gather(1, self.group)
        patches = merge_tokens(patches, patches, index, moves)
        return torch.cat([x[:, : self.prefix], patches], 1) if self.prefix else patches

    def _merge_pairs_masked(self, x: Tensor, nearest: Tensor, moves: Tensor) -> Tensor:
        where = torch.where(moves, nearest, torch.arange(moves.shape[1], device=x.device))
        size = torch.ones_like(moves, dtype=torch.float32) if self.size is None else self.size
        patches, total = merge_weighted(x[:, self.prefix :], size, where)
        self.size = torch.where(total > 0, total, size)
        if self.group is not None:
            self.group = where.gather(1, self.group)
        return torch.cat([x[:, : self.prefix], patches], 1) if self.prefix else patches

    # Sliced: tokens that are dropped leave the tensor.

    def slice_tokens(self, x: Tensor, ranked: RankedTokens, prune: int, merge: int) -> Tensor:
        """Keeps ``prune`` tokens and merges them down to ``merge``, prefix counted; the tensor becomes shorter."""
        if self.rules.matching == "bipartite":
            return self._slice_bipartite(x, _keys(ranked), merge)
        living = x.shape[1] - self.prefix
        kept = min(prune - self.prefix, living)
        left = min(merge - self.prefix, kept)
        order = _most_important(ranked.scores, kept)
        x = self._take_patches(x, order)
        size = None if self.size is None else self.size.gather(1, order)
        positions = order if self.positions is None else self.positions.gather(1, order)
        self._regroup_pruned(order, living)
        if left < kept:
            metric = x[:, self.prefix :] if self.rules.matching == "features" else _take(_keys(ranked), order)
            x, size = self._merge_sliced(x, size, metric, left)
        self.size, self.positions = size, positions[:, :left]
        return x

    def _merge_sliced(self, x: Tensor, size: Tensor | None, metric: Tensor, left: int) -> tuple[Tensor, Tensor]:
        index, similarity = match_tokens(metric, left)
        size = x.new_ones(metric.shape[:2], dtype=torch.float32) if size is None else size
        floor = size[:, :left].clamp(min=1.0) if self.rules.clamp_sizes else size[:, :left]
        size = floor.scatter_add(1, index, grow_sizes(size[:, left:], similarity, self.rules.clamp_sizes))
        stay = torch.arange(left, device=index.device).expand(index.shape[0], -1)
        self._regroup(torch.cat([stay, index], 1))
        staying = self.prefix + left
        return merge_tokens(x[:, :staying], x[:, staying:], index + self.prefix), size

    def _take_patches(self, x: Tensor, index: Tensor) -> Tensor:
        """The prefix and the patches ``index`` of each image, in one copy."""
        if not self.prefix:
            return _take(x, index)
        prefix = torch.arange(self.prefix, device=x.device).expand(x.shape[0], -1)
        return _take(x, torch.cat([prefix, index + self.prefix], 1))

    def _slice_bipartite(self, x: Tensor, keys: Tensor, merge: int) -> Tensor:
        patches, prefix = x[:, self.prefix :], x[:, : self.prefix]
        size = x.new_ones(patches.shape[:2], dtype=torch.float32) if self.size is None else self.size
        place = torch.arange(patches.shape[1], device=x.device).expand_as(size)
        positions = place if self.positions is None else self.positions
        patches, self.size, survivors, index = bipartite_merge(patches, size, keys, merge - self.prefix)
        self.positions = positions.gather(1, survivors)
        self._regroup(index)
        return torch.cat([prefix, patches], 1) if self.prefix else patches

    def restore_grid(self, x: Tensor) -> Tensor:
        """Copies each token to every patch it stands for, at the end of a segment in which nothing was pruned."""
        return x if self.group is None else _take(x, self.group)

    def pool_weights(self, x: Tensor, prefix_weight: float) -> Tensor | None:
        """Weight of each token in a mean over tokens, ``(batch, tokens)``; None where all weigh the same."""
        if self.size is None and self.mask is None:
            return None
        weight = x.new_ones(x.shape[0], x.shape[1] - self.prefix) if self.size is None else self.size
        weight = weight.clamp(min=_SMALLEST_SIZE)
        weight = weight if self.mask is None else weight * bound_dead_pull(self.mask)
        return F.pad(weight, (self.prefix, 0), value=prefix_weight)

    def _regroup_pruned(self, order: Tensor, living: int) -> None:
        place = torch.arange(order.shape[1], device=order.device).expand_as(order)
        self._regroup(order.new_full((order.shape[0], living), -1).scatter(1, order, place))

    def _regroup(self, index: Tensor) -> None:
        if self.group is not None:
            self.group = torch.where(self.group < 0, self.group, index.gather(1, self.group.clamp(min=0)))


@dataclass
class BlockCompression:
    """What one block knows of token compression.

    Args:
        state: Shared by the blocks of one network.
        entry: Tokens that enter the block when nothing is compressed.
        prune: Tokens kept after pruning, prefix counted.
        merge: Tokens kept after merging.
        row: Row of the plan while learning; None for blocks that never compress.
        opens: Whether the block is the first of its segment.
        learns: For the first block of a segment, whether any block of the segment compresses.
        restores: Whether the block is the last of a segment whose grid must be whole again.
    """

    state: TokenState
    entry: int
    prune: int
    merge: int
    row: int | None = None
    opens: bool = False
    learns: bool = False
    restores: bool = False


def _running_backward() -> int:
    """Number of the backward pass that is running, -1 in a forward pass."""
    return -1 if torch.compiler.is_compiling() else torch._C._current_graph_task_id()


def _keys(ranked: RankedTokens) -> Tensor:
    if ranked.keys is None:
        raise ValueError("Tokens are to be matched by their attention keys, which were not kept.")
    return ranked.keys


def _most_important(scores: Tensor, kept: int) -> Tensor:
    """Places of the ``kept`` highest scores, ties to the lowest place."""
    if torch.onnx.is_in_onnx_export():  # ONNX knows no stable sort, but its TopK resolves ties like one
        return scores.topk(kept, dim=1).indices
    return scores.argsort(dim=1, descending=True, stable=True)[:, :kept]


def _take(x: Tensor, index: Tensor) -> Tensor:
    """Tokens ``index`` of each image; rows are copied whole."""
    batch, tokens, width = x.shape
    start = torch.arange(batch, device=x.device).unsqueeze(1) * tokens
    return x.reshape(batch * tokens, width).index_select(0, (index + start).flatten()).view(*index.shape, width)
