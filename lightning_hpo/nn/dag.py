"""Masked attributes of a graph's nodes, reconstructed, and which community each node belongs to."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch_geometric.nn import GATConv

from lightning_hpo.functional.arguments import is_number, is_whole
from lightning_hpo.functional.graphs.dag import group_sparsity
from lightning_hpo.functional.graphs.masked_attributes import AttributeMask

__all__ = ["AffiliationReadout", "GroupSparsity", "MaskedAttributeAutoencoder", "encoder_problems"]


def encoder_problems(
    in_channels: Any, hidden_channels: Any, heads: Any, num_layers: Any, dropout: Any, attention_dropout: Any
) -> list[str]:
    """What is wrong with the sizes of an encoder.

    Args:
        in_channels: Number of attributes.
        hidden_channels: Width of the codes.
        heads: Attention heads.
        num_layers: Layers.
        dropout: Of attributes and codes.
        attention_dropout: Of attention weights.

    Returns:
        All problems, in words.

    Example:
        >>> encoder_problems(4, 30, 4, 2, 0.2, 1.5)  # doctest: +NORMALIZE_WHITESPACE
        ['hidden_channels must be a multiple of heads, got 30 and 4',
         'attention_dropout must be at least 0 and below 1, got 1.5']
    """
    sizes = {"in_channels": in_channels, "hidden_channels": hidden_channels, "heads": heads, "num_layers": num_layers}
    problems = [
        f"{name} must be a positive integer, got {value!r}" for name, value in sizes.items() if not is_whole(value, 1)
    ]
    if not problems and hidden_channels % heads:
        problems.append(f"hidden_channels must be a multiple of heads, got {hidden_channels} and {heads}")
    rates = {"dropout": dropout, "attention_dropout": attention_dropout}
    return problems + [
        f"{name} must be at least 0 and below 1, got {rate!r}"
        for name, rate in rates.items()
        if not (is_number(rate) and 0 <= rate < 1)
    ]


class MaskedAttributeAutoencoder(nn.Module):
    """Graph attention that reconstructs the attributes of masked nodes from their neighbours' (GraphMAE's backbone).

    The encoder sees the token, or another node's attributes, in place of a masked node's own. Before the decoder, the
    masked nodes' codes are set to zero once more, so that a node is reconstructed from others alone.

    Args:
        in_channels: Number of attributes.
        hidden_channels: Width of a code; a multiple of ``heads``.
        heads: Attention heads of each layer of the encoder.
        num_layers: Layers of the encoder.
        dropout: Of attributes and codes on their way into a layer.
        attention_dropout: Of attention weights.

    Raises:
        ValueError: If a number is out of range; all are listed.

    References:
        Hou et al., "GraphMAE: Self-Supervised Masked Graph Autoencoders", KDD 2022; Veličković et al., "Graph Attention
        Networks", ICLR 2018, for the layer, which is torch-geometric's.

    Example:
        >>> autoencoder = MaskedAttributeAutoencoder(5, hidden_channels=8, heads=2)
        >>> edges = torch.tensor([[0, 1], [1, 0]])
        >>> codes = autoencoder(torch.rand(3, 5), edges)
        >>> codes.shape, autoencoder.decode(codes, edges, torch.tensor([2])).shape
        (torch.Size([3, 8]), torch.Size([3, 5]))
    """

    def __init__(
        self,
        in_channels: int,
        hidden_channels: int = 256,
        heads: int = 4,
        num_layers: int = 2,
        dropout: float = 0.2,
        attention_dropout: float = 0.1,
    ) -> None:
        problems = encoder_problems(in_channels, hidden_channels, heads, num_layers, dropout, attention_dropout)
        if problems:
            raise ValueError(f"`MaskedAttributeAutoencoder`: {'; '.join(problems)}.")
        super().__init__()
        self.dropout = dropout
        widths = [in_channels] + [hidden_channels] * num_layers
        self.encoder = nn.ModuleList(
            GATConv(width, hidden_channels // heads, heads, dropout=attention_dropout) for width in widths[:-1]
        )
        self.activations = nn.ModuleList(nn.PReLU() for _ in range(num_layers))
        self.norm = nn.LayerNorm(hidden_channels, elementwise_affine=False)
        self.token = nn.Parameter(torch.zeros(1, in_channels))
        self.to_decoder = nn.Linear(hidden_channels, hidden_channels, bias=False)
        self.decoder = GATConv(hidden_channels, in_channels, dropout=attention_dropout)

    def corrupt(self, x: Tensor, mask: AttributeMask) -> Tensor:
        """Attributes as the encoder sees them in training.

        Args:
            x: Shape ``(N, F)``; not changed.
            mask: Which nodes hide theirs.

        Returns:
            Shape ``(N, F)``.
        """
        shown = x.index_put((mask.tokens,), self.token.to(x.dtype))
        return shown.index_put((mask.replaced,), x[mask.sources])

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        """Codes, each of mean 0 and variance 1.

        Args:
            x: Shape ``(N, in_channels)``.
            edge_index: Shape ``(2, E)``.

        Returns:
            Shape ``(N, hidden_channels)``.
        """
        for convolve, activate in zip(self.encoder, self.activations, strict=True):
            x = activate(convolve(F.dropout(x, self.dropout, self.training), edge_index))
        return self.norm(x)

    def decode(self, codes: Tensor, edge_index: Tensor, masked: Tensor) -> Tensor:
        """Attributes of all nodes from the codes of those that are not masked.

        Args:
            codes: Shape ``(N, hidden_channels)``.
            edge_index: Shape ``(2, E)``.
            masked: Masked nodes, shape ``(M,)``.

        Returns:
            Shape ``(N, in_channels)``.
        """
        return self.decoder(self.hide(codes, masked), edge_index)

    def hide(self, codes: Tensor, masked: Tensor) -> Tensor:
        """What the decoder sees: the codes, mapped, and zeros at masked nodes.

        Args:
            codes: Shape ``(N, hidden_channels)``.
            masked: Masked nodes, shape ``(M,)``.

        Returns:
            Shape ``(N, hidden_channels)``.
        """
        return self.to_decoder(codes).index_fill(0, masked, 0.0)


class AffiliationReadout(nn.Module):
    r"""Soft communities, :math:`P = \operatorname{softmax}(H W^\top + b)` over the columns that are alive.

    Args:
        in_channels: Width of a code.
        max_communities: Number of columns.

    Example:
        >>> readout = AffiliationReadout(8, max_communities=4)
        >>> readout.prune(torch.tensor([True, True, False, True]))
        >>> readout(torch.rand(3, 8))[:, 2], int(readout.live.sum())
        (tensor([0., 0., 0.], grad_fn=<SelectBackward0>), 3)
    """

    live: Tensor

    def __init__(self, in_channels: int, max_communities: int) -> None:
        super().__init__()
        self.head = nn.Linear(in_channels, max_communities)
        self.register_buffer("live", torch.ones(max_communities, dtype=torch.bool))

    def scores(self, codes: Tensor) -> Tensor:
        """Logits, minus infinity in columns that are dead.

        Args:
            codes: Shape ``(N, in_channels)``.

        Returns:
            Shape ``(N, max_communities)``, in float32 at least.
        """
        logits = self.head(codes)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return logits.masked_fill(~self.live, -torch.inf)

    def forward(self, codes: Tensor) -> Tensor:
        """Memberships; each row adds up to 1.

        Args:
            codes: Shape ``(N, in_channels)``.

        Returns:
            Shape ``(N, max_communities)``.
        """
        return self.scores(codes).softmax(1)

    @torch.no_grad()
    def prune(self, keep: Tensor) -> None:
        """Lets columns die; none ever comes back.

        Args:
            keep: True where a column may live on, shape ``(max_communities,)``.

        Raises:
            ValueError: If none would be left.
        """
        left = self.live & keep.to(self.live.device)
        if not left.any():
            raise ValueError("no community would be left")
        self.live.copy_(left)

    @torch.no_grad()
    def start_from(self, centres: Tensor, spread: Tensor, sharpness: float) -> None:
        r"""Makes memberships those of a mixture of equal Gaussians: :math:`P_{ik} \propto e^{-s \|h_i - c_k\|^2 / v}`.

        Args:
            centres: Shape ``(max_communities, in_channels)``.
            spread: v, the mean squared distance of codes to their nearest centre; a scalar.
            sharpness: s.
        """
        scale = sharpness / spread.clamp_min(1e-12)
        self.head.weight.copy_(2 * scale * centres)
        self.head.bias.copy_(-scale * centres.square().sum(1))


class GroupSparsity(nn.Module):
    r"""The penalty :math:`w \big( \sum_k \|P_{:,k}\|_2 / \sqrt N - 1 \big)`, ramped up linearly.

    It is :math:`w (\sqrt{K_{eff}} - 1)` with the effective number of communities: 0 for one of them, whatever the
    number of columns.

    Args:
        weight: w; where it is large, memberships blur instead of columns emptying.
        ramp: Steps over which it grows from 0; 0 for all of it at once.

    Raises:
        ValueError: If a number is negative.

    Example:
        >>> GroupSparsity(weight=0.5)(torch.eye(4))
        tensor(0.5000)
        >>> GroupSparsity(weight=0.5, ramp=10)(torch.eye(4), step=5)
        tensor(0.2500)
    """

    def __init__(self, weight: float = 0.1, ramp: int = 0) -> None:
        if not (is_number(weight) and is_number(ramp) and weight >= 0 and ramp >= 0):
            raise ValueError(f"`GroupSparsity`: weight and ramp must be at least 0, got {weight!r} and {ramp!r}")
        super().__init__()
        self.weight, self.ramp = weight, ramp

    def strength(self, step: float) -> float:
        """The weight at a step.

        Args:
            step: Steps since the ramp began.

        Returns:
            Between 0 and the weight.
        """
        return self.weight * (min(max(step / self.ramp, 0.0), 1.0) if self.ramp else 1.0)

    def forward(self, membership: Tensor, step: float = float("inf")) -> Tensor:
        """The penalty.

        Args:
            membership: P, shape ``(N, K)``, rows add up to 1.
            step: Steps since the ramp began; after its end by default.

        Returns:
            A scalar.
        """
        return self.strength(step) * (group_sparsity(membership) / len(membership) ** 0.5 - 1)
