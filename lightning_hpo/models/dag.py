"""Communities of an attributed graph, and how many there are: a LightningModule."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torchmetrics.functional.clustering import adjusted_rand_score, normalized_mutual_info_score
from typing_extensions import override

from lightning_hpo import distributed
from lightning_hpo.callbacks.dag import CommunityPruning
from lightning_hpo.checked_graphs import CheckedGraphs
from lightning_hpo.community_arguments import argument_problems
from lightning_hpo.community_result import CommunityResult, community_result
from lightning_hpo.functional.graphs.dag import CommunitySums, community_sums
from lightning_hpo.functional.graphs.k_means import k_means
from lightning_hpo.functional.graphs.masked_attributes import AttributeMask, draw_mask, scaled_cosine_errors
from lightning_hpo.functional.seeding import mix_seed
from lightning_hpo.graph_data import Graph
from lightning_hpo.metrics.dag import ClusteringAccuracy
from lightning_hpo.nn.dag import AffiliationReadout, GroupSparsity, MaskedAttributeAutoencoder
from lightning_hpo.seeded import Draws

__all__ = ["DAGCommunityDetector"]


class DAGCommunityDetector(LightningModule):
    r"""Finds the communities of an attributed graph without being told their number.

    A graph attention network learns to reconstruct the attributes of masked nodes; a readout gives each node a soft
    community; together they minimise

    .. math::

        w_r L_{rec} - a\, Q(P) + b\, r(t) \Big( \frac{\sum_k \|P_{:,k}\|_2}{\sqrt N} - 1 \Big)
        + c \Big( \frac{\sqrt K}{N} \| \textstyle\sum_i P_i \|_2 - 1 \Big)

    the error of reconstruction, soft modularity, group sparsity and balance, with K the number of columns alive and a
    ramp r. Reconstruction alone comes first; the readout then starts from centres of the codes.
    :class:`~lightning_hpo.CommunityPruning` takes columns away, and is there by itself unless the Trainer has one.

    The masked attributes, the readout and the search by group sparsity are the paper's; the form of the readout and of
    its loss, and all numbers, are this project's, because the paper's formulas were not available.

    A batch is a ``torch_geometric.data.Data``: the whole graph (``DataLoader([data])`` of torch-geometric, a step an
    epoch), or a part of it from a loader that samples nodes, of a graph that went through
    :class:`~lightning_hpo.graph_data.GraphDegree`. Parts are counted in all of the graph: :math:`d^\top P` is averaged
    over batches.

    On several ranks that hold the same graph, all do the same. Where they hold different parts, sums over nodes and
    edges are added up over ranks before roots and squares are taken, so that the loss is that of all parts together.

    Args:
        in_channels: Number of attributes.
        max_communities: Upper bound of the number of communities.
        hidden_channels: Width of the codes.
        heads: Attention heads.
        num_layers: Layers of the encoder.
        dropout: Of attributes and codes.
        attention_dropout: Of attention weights.
        mask_rate: Share of nodes that are masked in a step.
        replace_rate: Share of these that show another node's attributes.
        gamma: Power of the cosine error.
        reconstruction_weight: :math:`w_r`.
        modularity_weight: a.
        sparsity_weight: b.
        balance_weight: c.
        warmup_epochs: Epochs of reconstruction alone.
        ramp_epochs: Epochs over which sparsity grows to its weight after that.
        sharpness: How hard the first communities are; 0 would be no communities at all.
        lr: Learning rate of Adam.
        weight_decay: Weight decay of Adam.
        average: How much of the average of :math:`d^\top P` over batches is old; for parts of a graph.
        symmetrize: Whether to add missing directions of edges, after a warning; otherwise they are an error.
        seed: Of everything that is drawn in training; between 0 and 2³² - 1, of which a generator knows no more.

    Raises:
        ValueError: If an argument is out of range (all are listed), or, with the first batch, the graph is of no use.

    References:
        Liu et al., "DAG: Deep Adaptive and Generative K-Free Community Detection on Attributed Graphs", KDD 2024,
        arXiv 2502.14294.

    Example:
        >>> from torch_geometric.data import Data
        >>> edges = torch.tensor([[0, 1, 2, 3], [1, 0, 3, 2]])
        >>> data = Data(x=torch.eye(2).repeat_interleave(2, 0), edge_index=edges)
        >>> model = DAGCommunityDetector(2, max_communities=3, hidden_channels=8, heads=2)
        >>> model.predict_communities(data).labels.shape
        torch.Size([4])
    """

    def __init__(
        self,
        in_channels: int,
        max_communities: int = 32,
        hidden_channels: int = 256,
        heads: int = 4,
        num_layers: int = 2,
        dropout: float = 0.2,
        attention_dropout: float = 0.1,
        mask_rate: float = 0.5,
        replace_rate: float = 0.05,
        gamma: float = 3.0,
        reconstruction_weight: float = 1.0,
        modularity_weight: float = 1.0,
        sparsity_weight: float = 0.1,
        balance_weight: float = 0.1,
        warmup_epochs: int = 100,
        ramp_epochs: int = 50,
        sharpness: float = 5.0,
        lr: float = 1e-3,
        weight_decay: float = 2e-4,
        average: float = 0.9,
        symmetrize: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        if problems := argument_problems(self.hparams):
            raise ValueError(f"`DAGCommunityDetector`: {'; '.join(problems)}.")
        self.autoencoder = MaskedAttributeAutoencoder(
            in_channels, hidden_channels, heads, num_layers, dropout, attention_dropout
        )
        self.readout = AffiliationReadout(hidden_channels, max_communities)
        self.sparsity = GroupSparsity(sparsity_weight, ramp_epochs)
        self.degree_share: Tensor
        self.register_buffer("degree_share", torch.zeros(max_communities))
        self._draws = Draws(seed)
        self._joint_epochs = 0.0
        self._graphs = CheckedGraphs(in_channels, max_communities, symmetrize)

    # What a fit is made of

    @override
    def on_fit_start(self) -> None:
        """Forgets what was found out about the graphs of an earlier fit."""
        self._graphs.begin()

    @override
    def on_train_epoch_end(self) -> None:
        """Takes all graphs to be known."""
        self._graphs.end_epoch()

    @override
    def on_train_start(self) -> None:
        """Refuses loaders without a length: schedules here count epochs."""
        if self.trainer.num_training_batches == float("inf"):
            raise MisconfigurationException(
                "`DAGCommunityDetector` counts epochs, but the training loader has no length; give it one, or set "
                "`limit_train_batches` to a number of batches."
            )

    @property
    def is_joint(self) -> bool:
        """Whether communities are sought already; before, only attributes are reconstructed."""
        return self._joint_epochs > 0 or self.current_epoch >= self.hparams["warmup_epochs"]

    @property
    def joint_epochs(self) -> float:
        """Epochs for which communities have been sought, this one in part."""
        return self._joint_epochs

    @property
    def is_sharded(self) -> bool:
        """Whether ranks hold different parts; known from the first batch on."""
        return self._graphs.sharded

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The loss on a graph, or on a part of it."""
        graph = self.prepare(batch)
        if self.is_joint and not self._joint_epochs:
            self._start_readout(graph)
        mask = draw_mask(len(graph.x), self.hparams["mask_rate"], self.hparams["replace_rate"], self._mask_generator())
        mask = AttributeMask(*(nodes.to(self.device) for nodes in mask))
        with self._draws.fixed(self.device):
            terms = self._terms(graph, mask)
        loss = self._loss(*terms, is_part=graph.is_part)
        if self.is_joint:  # an epoch that was cut short by an earlier fit begins anew
            self._joint_epochs = self._joint_epochs // 1 + (batch_idx + 1) / self.trainer.num_training_batches
        return loss

    def _mask_generator(self) -> torch.Generator:
        """For parts of a rank's own a generator of its own, so that all streams advance alike and one is saved."""
        stream = self._draws.generator
        if not self.is_sharded:
            return stream
        drawn = int(torch.randint(2**31, (), generator=stream))
        return torch.Generator().manual_seed(mix_seed(drawn, distributed.rank()))

    def _terms(self, graph: Graph, mask: AttributeMask) -> tuple[CommunitySums, Tensor, Tensor]:
        """Sums of all terms, over all ranks."""
        codes = self.autoencoder(self.autoencoder.corrupt(graph.x, mask), graph.edge_index)
        found = self.autoencoder.decode(codes, graph.edge_index, mask.masked)
        with torch.autocast(self.device.type, enabled=False):
            membership = self.readout(codes.to(self.readout.head.weight.dtype))
            sums = community_sums(membership, graph.edge_index, graph.degree)
            error, rows = scaled_cosine_errors(found[mask.masked], graph.x[mask.masked], self.hparams["gamma"])
            return self._everywhere(sums, error, rows)

    def _everywhere(self, sums: CommunitySums, error: Tensor, rows: Tensor) -> tuple[CommunitySums, Tensor, Tensor]:
        """The same sums over the parts of all ranks, in one message."""
        if not self.is_sharded:
            return sums, error, rows
        parts = [*sums, error.to(sums.mass.dtype), rows.to(sums.mass.dtype)]
        *total, error, rows = distributed.in_one_message(distributed.sum_with_gradient, parts)
        return CommunitySums(*total), error, rows

    def _loss(self, sums: CommunitySums, error: Tensor, rows: Tensor, is_part: bool) -> Tensor:
        chosen = self.hparams
        reconstruction = error / rows.clamp_min(1)
        if not self.is_joint:
            # DistributedDataParallel wants every parameter in the loss.
            alone: Tensor = chosen["reconstruction_weight"] * reconstruction + 0.0 * sums.mass.sum()
            self.log_dict({"dag/reconstruction": reconstruction, "dag/loss": alone}, batch_size=1)
            return alone
        modularity = sums.modularity(self._averaged_share(sums) if is_part else None)
        sparsity = sums.sparsity() / sums.nodes.sqrt() - 1
        balance = sums.balance(self.readout.live.sum())
        weight = self.sparsity.strength(self.joint_epochs)
        loss: Tensor = (
            chosen["reconstruction_weight"] * reconstruction
            - chosen["modularity_weight"] * modularity
            + weight * sparsity
            + chosen["balance_weight"] * balance
        )
        terms = {"reconstruction": reconstruction, "soft_modularity": modularity, "sparsity": sparsity}
        self.log_dict({f"dag/{n}": v for n, v in {**terms, "balance": balance, "loss": loss}.items()}, batch_size=1)
        return loss

    def _averaged_share(self, sums: CommunitySums) -> Tensor:
        """Averages :math:`d^T P / 2m` over batches; its value is the average, its gradient that of this batch."""
        share = sums.degree_share()
        with torch.no_grad():
            old = self.degree_share * self.readout.live
            mixed = self.hparams["average"] * old / old.sum().clamp_min(1e-12) + (1 - self.hparams["average"]) * share
            self.degree_share.copy_(torch.where(old.sum() > 0, mixed, share))
        return share + (self.degree_share - share).detach()

    @torch.no_grad()
    def _start_readout(self, graph: Graph) -> None:
        """Centres of the codes become the first communities; rank 0's: on GPUs even those of one graph may differ."""
        codes, columns = self.codes(graph), self.hparams["max_communities"]
        codes = codes if codes.dtype == torch.float64 else codes.float()
        if len(codes) < columns:
            raise ValueError(
                f"`DAGCommunityDetector`: the readout starts from centres of a batch's codes, and a batch of "
                f"{len(codes)} nodes has not {columns}; take larger batches, or a smaller `max_communities`."
            )
        centres = k_means(codes, columns, self._draws.generator)
        spread = torch.cdist(codes, centres).square().min(1).values.mean()
        centres, spread = distributed.broadcast(centres), distributed.broadcast(spread)
        self.readout.start_from(centres, spread, self.hparams["sharpness"])
        for optimizer in self.trainer.optimizers:  # it has seen nothing but zeros for these
            for parameter in self.readout.parameters():
                optimizer.state.pop(parameter, None)

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(self.parameters(), lr=self.hparams["lr"], weight_decay=self.hparams["weight_decay"])

    @override
    def configure_callbacks(self) -> list[Callback]:
        """Pruning, unless the Trainer has one."""
        there = self.trainer.callbacks  # type: ignore[attr-defined]
        return [] if any(isinstance(callback, CommunityPruning) for callback in there) else [CommunityPruning()]

    # Graphs

    def prepare(self, batch: Any) -> Graph:
        """Takes a batch apart; those of the first epoch of a fit are checked.

        Args:
            batch: A graph.

        Returns:
            Its tensors, in the module's precision.

        Raises:
            TypeError: If the batch is no graph.
            ValueError: If the graph is of no use; all reasons are given.
        """
        return self._graphs.take(batch, self.autoencoder.token.dtype)

    @torch.no_grad()
    def codes(self, graph: Graph) -> Tensor:
        """Codes of a graph that hides nothing.

        Args:
            graph: The graph.

        Returns:
            Shape ``(N, hidden_channels)``.
        """
        was = self.autoencoder.training
        self.autoencoder.eval()
        try:
            return self.autoencoder(graph.x, graph.edge_index).to(self.readout.head.weight.dtype)
        finally:
            self.autoencoder.train(was)

    @torch.no_grad()
    def clean_scores(self, graph: Graph) -> Tensor:
        """Logits of a graph that hides nothing; minus infinity in dead columns.

        Args:
            graph: The graph.

        Returns:
            Shape ``(N, max_communities)``.
        """
        with torch.autocast(self.device.type, enabled=False):
            return self.readout.scores(self.codes(graph))

    def predict_communities(self, data: Any) -> CommunityResult:
        """Communities of a graph, the largest first.

        Args:
            data: The whole graph.

        Returns:
            Labels, their number and memberships, on the device of the graph.

        Raises:
            ValueError: If the graph is of no use.
        """
        graph = self._graphs.whole(data, self.autoencoder.token.dtype)
        return community_result(self._scores(graph), graph)

    def _scores(self, graph: Graph) -> Tensor:
        here = graph._replace(x=graph.x.to(self.autoencoder.token), edge_index=graph.edge_index.to(self.device))
        return self.clean_scores(here)

    @override
    def forward(self, data: Any) -> Tensor:
        """Soft communities of a graph that hides nothing, shape ``(N, max_communities)``."""
        return self._scores(self._graphs.whole(data, self.autoencoder.token.dtype)).softmax(1)

    @override
    def predict_step(self, batch: Any, batch_idx: int) -> CommunityResult:
        """Communities of a graph."""
        return self.predict_communities(batch)

    @override
    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Logs accuracy, NMI and ARI against the labels ``y`` of a graph; they are looked at nowhere else.

        Of several graphs, on several ranks, too, the means are logged.
        """
        result = self.predict_communities(batch)
        if batch.get("y") is None:
            raise ValueError("`DAGCommunityDetector`: there are no labels `y` to test against.")
        target = batch.y.view(-1)
        accuracy = ClusteringAccuracy(sync_on_compute=False).to(target.device)  # another rank has another graph
        accuracy.update(result.labels, target)
        values: dict[str, Tensor | float] = {
            "test_accuracy": accuracy.compute(),
            "test_nmi": normalized_mutual_info_score(result.labels, target),
            "test_ari": adjusted_rand_score(result.labels, target),
            "test_communities": float(result.n_communities),
        }
        self.log_dict(values, batch_size=1, sync_dist=True)

    # Checkpoints

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds what is drawn next, and how far the ramp is."""
        checkpoint["dag"] = {"draws": self._draws.state_dict(), "joint_epochs": self._joint_epochs}

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Goes on from there; a checkpoint of weights alone leaves the draws as they are."""
        if saved := checkpoint.get("dag"):
            self._draws.load_state_dict(saved["draws"])
            self._joint_epochs = saved["joint_epochs"]
