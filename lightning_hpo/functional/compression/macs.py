"""Multiply-accumulates of transformers whose blocks drop or merge tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lightning_hpo.functional.compression.counts import kept_counts, running_counts, segments, store_integers

if TYPE_CHECKING:  # whole-number costs need no torch
    from torch import Tensor

__all__ = ["BlockMacs", "TransformerMacs"]


@dataclass(frozen=True)
class BlockMacs:
    r"""Cost of one block, split by what it grows with.

    With :math:`N` tokens in the attention and :math:`K` in the MLP the block costs
    :math:`N\,(\text{attention} + N\,\text{pair}) + K\,\text{mlp}`.

    Args:
        attention: Multiply-accumulates a token of the linear layers of the attention; :math:`4C^2` in a ViT.
        pair: Multiply-accumulates a pair of tokens (scores and weighted sum); :math:`2C` in a ViT.
        mlp: Multiply-accumulates a token of the MLP; :math:`8C^2` in a ViT with ratio 4.

    Raises:
        ValueError: If a cost is negative or not an integer; all of them are listed.

    Example:
        >>> BlockMacs.vit(192)
        BlockMacs(attention=147456, pair=384, mlp=294912)
    """

    attention: int
    pair: int
    mlp: int

    def __post_init__(self) -> None:
        store_integers(self, ("attention", "pair", "mlp"))

    @classmethod
    def vit(cls, width: int, mlp_ratio: float = 4) -> BlockMacs:
        r"""Cost of a standard block: :math:`4C^2`, :math:`2C` and :math:`2 r C^2`.

        Args:
            width: Channels :math:`C`.
            mlp_ratio: Hidden channels of the MLP over `width`, :math:`r`.

        Returns:
            The three costs.

        Example:
            >>> BlockMacs.vit(10, mlp_ratio=2).mlp
            400
        """
        return cls(attention=4 * width * width, pair=2 * width, mlp=2 * width * int(width * mlp_ratio))


@dataclass(frozen=True)
class TransformerMacs:
    r"""Cost of a transformer as a function of the tokens kept in each block.

    A block runs its attention on the :math:`N` tokens that reach it and its MLP on those that are left, so

    .. math::
        F = \text{fixed} + \sum_l N_{l-1}(a_l + N_{l-1} p_l) + N_l m_l, \qquad N_l = \min(N_{l-1}, P_l, M_l)

    with :math:`P_l` tokens kept after pruning and :math:`M_l` after merging. Where `entry` changes its value (a
    down-sampling of a hierarchical model) the minimum starts anew. Multiply-accumulates are counted once; norms,
    biases, activations, softmax, sorting and matching are not counted.

    Args:
        fixed: Whatever does not depend on the kept counts: stem, head, convolution stages.
        entry: Tokens entering each block when nothing is compressed.
        blocks: Cost of each block, as many as `entry` has.

    Raises:
        ValueError: If lengths disagree or a number is not a non-negative integer; all problems are listed.

    Source: step 7 of DiffRate (Chen et al., ICCV 2023, arXiv 2305.17997).

    Example:
        >>> cost = TransformerMacs.vit(width=384, depth=12, patches=196)
        >>> cost.full
        4599177216
        >>> cost.count([100] * 12, [50] * 12) < cost.full // 2
        True
    """

    fixed: int
    entry: tuple[int, ...]
    blocks: tuple[BlockMacs, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "blocks", tuple(self.blocks))
        object.__setattr__(self, "entry", kept_counts("entry", self.entry, len(self.blocks)))
        if not self.blocks:
            raise ValueError("A transformer needs at least one block.")
        store_integers(self, ("fixed",))

    @property
    def full(self) -> int:
        """Cost when nothing is compressed.

        Example:
            >>> TransformerMacs.vit(width=1280, depth=32, patches=256, patch_pixels=14 * 14 * 3).full
            167295861760
        """
        return self.count(self.entry, self.entry)

    def count(self, prune: Sequence[int], merge: Sequence[int]) -> int:
        """Exact cost of a schedule; a count above the tokens alive changes nothing.

        Args:
            prune: Tokens kept after pruning in each block, prefix tokens counted.
            merge: Tokens kept after merging in each block, likewise.

        Returns:
            Multiply-accumulates of one image.

        Raises:
            ValueError: If a sequence has the wrong length or holds something other than non-negative integers.

        Example:
            >>> cost = TransformerMacs(5, (4, 4), (BlockMacs(10, 1, 100), BlockMacs(10, 1, 100)))
            >>> cost.count(prune=[3, 3], merge=[2, 4])  # 5 + 4 (10 + 4) + 2 · 100 + 2 (10 + 2) + 2 · 100
            485
        """
        depth = len(self.blocks)
        prune, merge = kept_counts("prune", prune, depth), kept_counts("merge", merge, depth)
        total = self.fixed
        for block, (entering, _, left) in zip(self.blocks, running_counts(self.entry, prune, merge), strict=True):
            total += entering * (block.attention + entering * block.pair) + left * block.mlp
        return total

    def count_and_slope(self, prune: Tensor, merge: Tensor) -> tuple[Tensor, Tensor]:
        r"""Cost of a schedule held in tensors, and its slope in the kept counts.

        The slope is DiffRate's: the minimum hands its gradient unchanged to both kept counts of its block and nothing
        to the count of the block before, so that every block is pushed by its own MLP and by the attention that
        follows in the same segment:

        .. math:: \partial F / \partial K_l = m_l + [l+1 \text{ in the segment}]\,(a_{l+1} + 2 p_{l+1} N_l)

        which is :math:`8C^2 + [l < L-1](4C^2 + 4 N_l C)` in a ViT. Where counts decrease strictly and the two of a
        block differ, this is the true derivative in the smaller (binding) one; in the other, and wherever an earlier
        block binds, the true derivative is zero and the slope still pushes.

        Nothing is read back from the device and nothing branches on a value, so that the call compiles as one graph;
        where the blocks of a segment are alike, nothing is copied to the device either. The results carry no gradient;
        half precision is computed in float32.

        Args:
            prune: Tokens kept after pruning, shape (L,), floating point.
            merge: Tokens kept after merging, shape (L,), floating point.

        Returns:
            Cost, a scalar, and slope, shape (L,): one slope, which holds for `prune` and `merge` alike.

        Raises:
            ValueError: If a shape is not (L,) or a dtype is not floating point.

        Example:
            >>> import torch
            >>> cost = TransformerMacs(5, (4, 4), (BlockMacs(10, 1, 100), BlockMacs(10, 1, 100)))
            >>> cost.count_and_slope(torch.tensor([3.0, 3.0]), torch.tensor([2.0, 4.0]))
            (tensor(485.), tensor([114., 100.]))
        """
        import torch

        for name, kept in (("prune", prune), ("merge", merge)):
            if tuple(kept.shape) != (len(self.blocks),) or not kept.dtype.is_floating_point:
                raise ValueError(
                    f"`{name}` must be floating point of shape ({len(self.blocks)},), "
                    f"got {kept.dtype} of shape {tuple(kept.shape)}."
                )
        dtype = torch.promote_types(torch.promote_types(prune.dtype, merge.dtype), torch.float32)
        kept = torch.minimum(prune.detach().to(dtype), merge.detach().to(dtype))
        total, slopes = kept.new_full((), float(self.fixed)), []
        for start, stop in segments(self.entry):
            after = torch.cummin(kept[start:stop].clamp(max=self.entry[start]), dim=0).values
            before = torch.cat((after.new_full((1,), self.entry[start]), after[:-1]))
            attention = _per_block((b.attention for b in self.blocks[start:stop]), kept)
            pair = _per_block((b.pair for b in self.blocks[start:stop]), kept)
            mlp = _per_block((b.mlp for b in self.blocks[start:stop]), kept)
            total = total + (before * (attention + before * pair) + after * mlp).sum()
            through_attention = attention + 2 * pair * before  # what one more token entering each block costs
            slopes.append(mlp + torch.cat((through_attention[1:], after.new_zeros(1))))
        return total, torch.cat(slopes)

    @classmethod
    def vit(
        cls,
        width: int,
        depth: int,
        patches: int,
        prefix: int = 1,
        patch_pixels: int = 16 * 16 * 3,
        classes: int = 1000,
        mlp_ratio: float = 4,
    ) -> TransformerMacs:
        r"""A plain Vision Transformer.

        The fixed part is :math:`N_0 C\,\text{pixels} + C\,\text{classes}`. As in DiffRate's own count, prefix tokens
        are charged a patch embedding although they have none; without that the published integers do not come out.

        Args:
            width: Channels :math:`C`.
            depth: Blocks.
            patches: Patch tokens.
            prefix: Class, distillation and register tokens; :math:`N_0 = \text{patches} + \text{prefix}`.
            patch_pixels: Input values of one patch, colours counted.
            classes: Outputs of the classifier; 0 without one.
            mlp_ratio: Hidden channels of the MLP over `width`.

        Returns:
            The cost model.

        Example:
            >>> TransformerMacs.vit(width=192, depth=12, patches=196).full
            1253830656
        """
        tokens = patches + prefix
        fixed = tokens * width * patch_pixels + width * classes
        return cls(fixed, (tokens,) * depth, (BlockMacs.vit(width, mlp_ratio),) * depth)

    @classmethod
    def caformer(
        cls,
        widths: Sequence[int] = (64, 128, 320, 512),
        depths: Sequence[int] = (3, 12, 18, 3),
        image_size: int = 224,
        classes: int = 1000,
    ) -> TransformerMacs:
        r"""A CAFormer: two stages of separable convolutions, then attention, the only blocks that are compressed.

        A convolutional block costs :math:`12 C^2 + 2 \cdot 7^2 C` a position (expansion 2, kernel 7, MLP ratio 4).
        The stem has kernel 7 and stride 4, the down-samplings kernel 3 and stride 2. DiffRate's own count is kept: its
        classifier, :math:`8 C\,\text{classes}`, is that of a head with hidden width :math:`4C` whose first layer
        costs as much as its second, where the true one costs :math:`4C^2 + 4C\,\text{classes}`. Activations and
        residual scales are not counted, nor is copying merged tokens back to the grid.

        Args:
            widths: Channels of the four stages.
            depths: Blocks of the four stages.
            image_size: Height and width of the image, a multiple of 32.
            classes: Outputs of the classifier.

        Returns:
            The cost model; its blocks are those of the last two stages.

        Raises:
            ValueError: If there are not four stages or `image_size` is not a multiple of 32.

        Example:
            >>> TransformerMacs.caformer().full
            7972596736
        """
        if len(widths) != 4 or len(depths) != 4 or image_size <= 0 or image_size % 32:
            raise ValueError("A CAFormer has four widths, four depths and an image size that is a multiple of 32.")
        fixed = 8 * widths[-1] * classes
        entry: list[int] = []
        blocks: list[BlockMacs] = []
        for stage, (width, depth, channels) in enumerate(zip(widths, depths, (3, *widths[:3]), strict=True)):
            positions = (image_size // (4 * 2**stage)) ** 2
            fixed += positions * width * (49 if stage == 0 else 9) * channels
            if stage < 2:
                fixed += depth * positions * (12 * width * width + 2 * 49 * width)
            else:
                entry += [positions] * depth
                blocks += [BlockMacs.vit(width)] * depth
        return cls(fixed, tuple(entry), tuple(blocks))


def _per_block(costs: Iterable[int], like: Tensor) -> Tensor:
    """Costs of consecutive blocks next to `like`; equal ones (the usual case) are filled in, not copied over."""
    values = tuple(costs)
    if len(set(values)) == 1:
        return like.new_full((len(values),), float(values[0]))
    return like.new_tensor([float(value) for value in values])
