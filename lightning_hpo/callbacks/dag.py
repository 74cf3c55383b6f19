"""How many communities there are: columns of a membership die while a detector is trained."""

import math
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from lightning_hpo import distributed
from lightning_hpo.callbacks.base import MethodCallback
from lightning_hpo.functional.arguments import is_number, is_whole
from lightning_hpo.functional.graphs.dag import CommunitySums, community_sums, node_degree
from lightning_hpo.functional.graphs.pruning import PartitionSums, keep_communities, partition_sums

__all__ = ["CommunityPruning"]

_BLURRED = 0.9  # of the entropy of memberships that say nothing


class CommunityPruning(MethodCallback):
    r"""Lets communities die, so that training ends with as many as the graph has (DAG).

    At the end of every so many epochs the graph is looked at without masks. Columns that fewer than ``min_size`` nodes
    like best die, at most half of those alive; if there is none, the one dies without which the loss of the hard
    partition falls most, if it falls. The nodes then belong to the column that they like next best. None ever comes
    back. Numbers are added up over batches and ranks before the decision, or rank 0's are taken where ranks hold the
    same graph, so that all make the same.

    It logs ``n_communities`` (columns with a node), ``k_eff`` (see
    :func:`~lightning_hpo.functional.graphs.dag.effective_communities`), ``modularity`` and ``row_entropy``.

    Args:
        warmup: Epochs of the search without pruning; they come after the module's own warm-up.
        every: Epochs from there to the first pruning, and from one to the next.
        min_size: Nodes that a community needs; by default 10, or 0.3 % of the nodes if that is more.

    Raises:
        ValueError: If an argument is out of range; all are listed.
        MisconfigurationException: If the module is no :class:`~lightning_hpo.DAGCommunityDetector`.

    References:
        Liu et al., "DAG: Deep Adaptive and Generative K-Free Community Detection on Attributed Graphs", KDD 2024. That
        communities are found by group sparsity is the paper's; the rule that takes them away is this project's.

    Example:
        >>> CommunityPruning(warmup=100, every=10).hyperparameters()
        {}
    """

    KNOB: ClassVar[str] = "number of communities in a graph"
    _STATE = ("found", "history", "sums", "whole")

    def __init__(self, warmup: int = 50, every: int = 5, min_size: float | None = None) -> None:
        super().__init__()
        problems = [
            f"{name} must be an integer of at least {least}, got {value!r}"
            for name, value, least in (("warmup", warmup, 0), ("every", every, 1))
            if not is_whole(value, least)
        ]
        if min_size is not None and not (is_number(min_size) and 0 < min_size < math.inf):
            problems.append(f"min_size must be positive, got {min_size!r}")
        if problems:
            raise ValueError(f"`CommunityPruning`: {'; '.join(problems)}.")
        self.warmup, self.every, self.min_size = warmup, every, min_size
        self.found: dict[str, float] = {}  # of the last pruning
        self.history: list[int] = []  # communities at each pruning
        self.sums: list[Tensor] = []  # of the batches of this epoch so far, where it ends in a pruning
        self.whole = 0  # nodes of the graph, where these batches are parts of it

    @override
    def hyperparameters(self) -> dict[str, float | list[float]]:
        return {name: self.found[name] for name in ("n_communities", "k_eff") if name in self.found}

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not all(hasattr(pl_module, name) for name in ("readout", "clean_scores", "joint_epochs")):
            self.raise_all([f"it prunes a `DAGCommunityDetector`, not a `{type(pl_module).__name__}`."])
        if stage == "fit":  # a checkpoint is read after this
            self.found, self.history, self.sums = {}, [], []

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        model: Any = pl_module
        before, last = model.hparams["warmup_epochs"], _last_epoch(trainer)
        if not model.is_joint and last < before + self.warmup + self.every:
            rank_zero_warn(
                f"`CommunityPruning`: nothing is pruned in {last:g} epochs: {before} of reconstruction, {self.warmup} "
                f"of the search and {self.every} more come before; train longer, or lower `warmup_epochs`, `warmup` "
                "and `every`."
            )
        if not self.found:  # nothing was resumed
            self.found = {"n_communities": float(model.readout.live.sum()), "k_eff": float(model.readout.live.sum())}

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if len(self.history) > 1 and self.history[-1] < self.history[-2]:
            rank_zero_warn(
                f"`CommunityPruning`: communities were still dying when training ended; their number went "
                f"{self.history}. Train longer, or lower `every`."
            )

    def _due(self, model: Any) -> bool:
        """Whether the present epoch ends in a pruning; asked after a batch of it."""
        epoch = math.ceil(model.joint_epochs)
        return epoch > self.warmup and (epoch - self.warmup) % self.every == 0

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        model: Any = pl_module
        if self._due(model):
            self._add(model, batch)
            if trainer.is_last_batch:  # here, so that a checkpoint of this batch knows what was decided
                self._prune(model)
                self.log_values(pl_module, self.found, batch_size=1)

    @torch.no_grad()
    def _add(self, model: Any, batch: Any) -> None:
        graph = model.prepare(batch)
        scores, live = model.clean_scores(graph), model.readout.live
        degree = node_degree(graph.edge_index, len(graph.x)) if graph.degree is None else graph.degree
        membership = scores.double().softmax(1)
        soft = community_sums(membership, graph.edge_index, degree)
        entropy = torch.special.entr(membership).sum()
        hard = partition_sums(scores, live, graph.edge_index, degree)
        # Each batch at once, so that the sums of one rank, which a checkpoint holds, are those of all.
        together = distributed.sum if model.is_sharded else distributed.broadcast
        parts = distributed.in_one_message(together, [*hard, *soft, entropy])
        self.sums = (
            [old.to(new.device) + new for old, new in zip(self.sums, parts, strict=True)] if self.sums else parts
        )
        self.whole = graph.nodes or 0

    def _prune(self, model: Any) -> None:
        hard, soft, entropy = PartitionSums(*self.sums[:4]), CommunitySums(*self.sums[4:-1]), self.sums[-1]
        live, chosen = model.readout.live.clone(), model.hparams
        nodes = self.whole or float(soft.nodes)
        least = max(10.0, 0.003 * nodes) if self.min_size is None else self.min_size
        keep = keep_communities(
            hard,
            live,
            least * float(soft.nodes) / nodes,  # parts may overlap: then more nodes are seen than there are
            chosen["modularity_weight"],
            chosen["sparsity_weight"],
            chosen["balance_weight"],
        )
        columns = int(live.sum())
        model.readout.prune(keep)
        self.sums = []
        sizes = hard.sizes[-1] if torch.equal(keep, live) else self._after(hard, live, keep)
        self.found = {
            "n_communities": float((sizes > 0).sum()),
            "k_eff": float(soft.sparsity().square() / soft.nodes),
            "modularity": float(soft.modularity()),
            "row_entropy": float(entropy / soft.nodes),
        }
        self.history.append(int(self.found["n_communities"]))
        self._warn(columns)

    @staticmethod
    def _after(hard: PartitionSums, live: Tensor, keep: Tensor) -> Tensor:
        """Sizes after the decision, where they are known: after one column has died, and otherwise of those left."""
        dead = (live & ~keep).nonzero().flatten()
        return hard.sizes[dead[0]] if len(dead) == 1 else hard.sizes[-1] * keep

    def _warn(self, columns: int) -> None:
        if columns > 1 and self.found["row_entropy"] > _BLURRED * math.log(columns):
            rank_zero_warn("`CommunityPruning`: assignments are blurring, lower `sparsity_weight`.")
        if self.history[-1] == 1 and (len(self.history) == 1 or self.history[-2] > 1):
            rank_zero_warn(
                f"`CommunityPruning`: one community is left; their number went {self.history}. Raise `balance_weight`, "
                "or lower `sparsity_weight` or `modularity_weight`."
            )


def _last_epoch(trainer: Trainer) -> float:
    """How many epochs training lasts at most; -1 stands for no limit."""
    of_steps = trainer.max_steps * trainer.accumulate_grad_batches / trainer.num_training_batches
    return min((limit for limit in (trainer.max_epochs, of_steps) if limit is not None and limit > 0), default=math.inf)
