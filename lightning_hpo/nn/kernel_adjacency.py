"""Graphs made from similarities: edge weights that depend on a number which may be learned."""

import warnings
from collections.abc import Callable, Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_hpo.functional.arguments import is_whole
from lightning_hpo.nn.setting import Setting, current, setting_problems

__all__ = ["Edges", "KernelAdjacency", "second_singular_value"]

Edges = tuple[Tensor, Tensor]
Kind = Literal["polynomial", "rbf", "threshold", "exponential"]

SMOOTH = 0.1  # second singular value; networks of 200 digits only guess below it
CHUNK = 2**18  # numbers at a time where neighbours are searched
KERNELS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "polynomial": (lambda a: a >= 0, "be at least 0"),
    "threshold": (lambda a: (a >= 0) & (a < 1), "be at least 0 and below 1"),
    "rbf": (lambda a: a > 0, "be positive"),
    "exponential": (lambda a: a > 0, "be positive"),
}


class KernelAdjacency(nn.Module):
    r"""A normalized adjacency matrix :math:`\hat A` from the nodes' features, differentiable in features and parameter.

    With the similarity :math:`s_{uv} \in [0, 1]` or the distance :math:`d_{uv}` of two nodes and the parameter
    :math:`\alpha`, for :math:`u \ne v`,

    .. math::

        A_{uv} = (s_{uv} + \alpha)^\Delta \;\text{(polynomial)},\quad (s_{uv} - \alpha)_+^\Delta
        \;\text{(threshold)},\quad e^{-d_{uv}^2 / \alpha^2} \;\text{(rbf)},\quad e^{-d_{uv} / \alpha}
        \;\text{(exponential)}

    and :math:`A_{uu} = 1`, so that no row is empty. :math:`\hat A = D^{-1} A` with rows or
    :math:`D^{-1/2} A D^{-1/2}`. It is computed in at least float32, under autocast too. In evaluation mode a graph that
    makes all nodes alike is reported.

    Args:
        kind: The kernel.
        param: :math:`\alpha`: a number, a tensor, or a function that returns one, such as ``lambda: hypers["sigma"]``,
            which is asked in every forward pass. A ``Parameter`` is registered here and learned like a weight.
        degree: :math:`\Delta` of ``"polynomial"`` and ``"threshold"``.
        normalize: ``"row"``, or ``"sym"``, for which :mod:`~lightning_hpo.functional.bilevel.component_counts` has no
            certificate.
        neighbors: Keep edges to so many most similar nodes, in both directions, and return them as a list; all, and a
            matrix, where None.
        similarity: ``"cosine"``, ``"shifted_cosine"``, :math:`(1 + \cos) / 2`, or ``"given"`` where the input is the
            matrix of similarities; ``"rbf"`` and ``"exponential"`` take distances of features and do not read it.
        check: Whether to look at each pass if similarities lie between 0 and 1, for which the device must be asked.

    Raises:
        ValueError: If an argument is out of range; all are listed.

    References:
        Balcan, Nguyen and Sharma, "Sample complexity of data-driven tuning of model hyperparameters in neural networks
        with structured parameter-dependent dual function", NeurIPS 2025.

    Example:
        >>> similarity = torch.tensor([[1.0, 0.5], [0.5, 1.0]])
        >>> KernelAdjacency("polynomial", 0.5, degree=2, similarity="given")(similarity)
        tensor([[0.5000, 0.5000],
                [0.5000, 0.5000]])
    """

    def __init__(
        self,
        kind: Kind,
        param: Setting,
        *,
        degree: int = 1,
        normalize: Literal["row", "sym"] = "row",
        neighbors: int | None = None,
        similarity: Literal["cosine", "shifted_cosine", "given"] = "cosine",
        check: bool = True,
    ) -> None:
        super().__init__()
        distances = kind in ("rbf", "exponential")
        checks = {
            f"kind must be one of {', '.join(KERNELS)}, got {kind!r}": kind in KERNELS,
            f"degree must be a positive integer, got {degree!r}": is_whole(degree, 1),
            f"normalize must be 'row' or 'sym', got {normalize!r}": normalize in ("row", "sym"),
            f"neighbors must be a positive integer or None, got {neighbors!r}": neighbors is None
            or is_whole(neighbors, 1),
            f"similarity must be 'cosine', 'shifted_cosine' or 'given', got {similarity!r}": similarity
            in ("cosine", "shifted_cosine", "given"),
            f"{kind!r} is a function of distances of features, so similarity cannot be 'given'": not (
                distances and similarity == "given"
            ),
            f"{kind!r} has no degree, got {degree!r}": not (distances and degree != 1),
        }
        problems = [text for text, holds in checks.items() if not holds]
        problems += setting_problems("param", param, *KERNELS.get(kind, (torch.isfinite, "be finite")))
        if problems:
            raise ValueError("; ".join(problems))
        self.kind, self.param, self.degree, self.normalize = kind, param, degree, normalize
        self.neighbors, self.similarity, self.check = neighbors, similarity, check

    def forward(self, nodes: Tensor, edge_index: Tensor | None = None) -> Tensor | Edges:
        """The normalized adjacency.

        Args:
            nodes: ``(n, features)``, or the ``(n, n)`` similarities.
            edge_index: What :meth:`edges` returned, to search for neighbours once only.

        Returns:
            ``(n, n)``, or with ``neighbors`` or ``edge_index`` a pair ``edge_index, edge_weight`` with rows source and
            target, for torch-geometric layers with ``normalize=False``; loops are in it.

        Raises:
            ValueError: If the shape is wrong, or similarities lie outside 0 to 1.
        """
        if nodes.dim() != 2 or (self.similarity == "given" and nodes.shape[0] != nodes.shape[1]):
            raise ValueError(f"nodes must be (n, features), or (n, n) similarities if given; got {tuple(nodes.shape)}")
        with torch.autocast(nodes.device.type, enabled=False):
            nodes = self._prepare(nodes)
            if edge_index is None and self.neighbors is None:
                result: Tensor | Edges = self._dense(nodes)
            else:
                result = self._sparse(nodes, self.edges(nodes) if edge_index is None else edge_index)
        if not self.training:
            _warn_if_smooth(result, len(nodes))
        return result

    @torch.no_grad()
    def edges(self, nodes: Tensor, extra: Tensor | None = None) -> Tensor:
        """Edges to the most similar nodes, in both directions, and a loop at each node.

        Args:
            nodes: As for :meth:`forward`.
            extra: ``(2, edges)``, others to add.

        Returns:
            ``(2, edges)``: source and target, each pair once.
        """
        nodes, number = self._prepare(nodes), len(nodes)
        loops = torch.arange(number, device=nodes.device) * (number + 1)
        codes = [loops] if extra is None else [loops, extra[1] * number + extra[0]]
        if self.neighbors is not None:
            for rows in torch.arange(number, device=nodes.device).split(max(1, CHUNK // number)):
                closeness = self._closeness(nodes, rows)
                closeness[torch.arange(len(rows), device=nodes.device), rows] = -torch.inf
                best = closeness.topk(min(self.neighbors, number - 1), dim=-1).indices
                codes += [(rows[:, None] * number + best).flatten(), (best * number + rows[:, None]).flatten()]
        both = torch.cat(codes).unique()
        return torch.stack([both % number, both // number])

    def _prepare(self, nodes: Tensor) -> Tensor:
        """Wide enough, and of length 1 where cosines are asked for."""
        nodes = nodes.float() if nodes.dtype in (torch.float16, torch.bfloat16) else nodes
        cosine = self.kind in ("polynomial", "threshold") and self.similarity != "given"
        return F.normalize(nodes, dim=-1) if cosine else nodes

    def _closeness(self, nodes: Tensor, rows: Tensor) -> Tensor:
        """Similarities, or negative squared distances, of some nodes to all."""
        if self.similarity == "given" and self.kind in ("polynomial", "threshold"):
            return nodes[rows]
        products = nodes[rows] @ nodes.T
        if self.kind in ("polynomial", "threshold"):
            return (1 + products) / 2 if self.similarity == "shifted_cosine" else products
        squares = nodes.square().sum(-1)
        return (2 * products - squares[rows, None] - squares).clamp_max(0)

    def _closeness_of(self, nodes: Tensor, edge_index: Tensor) -> Tensor:
        """The same of single pairs, a few at a time: features of all edges together would outweigh the matrix."""
        if self.similarity == "given" and self.kind in ("polynomial", "threshold"):
            return nodes[edge_index[1], edge_index[0]]
        return torch.cat(list(self._pairs(nodes, edge_index)))

    def _pairs(self, nodes: Tensor, edge_index: Tensor) -> Iterator[Tensor]:
        for source, target in edge_index.split(max(1, CHUNK // nodes.shape[1]), dim=1):
            if self.kind in ("rbf", "exponential"):
                yield -(nodes[target] - nodes[source]).square().sum(-1)
            else:
                products = (nodes[target] * nodes[source]).sum(-1)
                yield (1 + products) / 2 if self.similarity == "shifted_cosine" else products

    def _kernel(self, closeness: Tensor, loops: Tensor) -> Tensor:
        """Weights; 1 where the mask of loops says so."""
        param = current(self.param)
        param = param.to(closeness) if isinstance(param, Tensor) else param
        if self.kind == "rbf":
            weights = torch.exp(closeness / param**2)
        elif self.kind == "exponential":
            # Equal nodes have no derivative of the distance; theirs is taken as 0.
            apart = torch.where(closeness < 0, -closeness, 1.0).sqrt()
            weights = torch.exp(-torch.where(closeness < 0, apart, 0.0) / param)
        else:
            if self.check:
                _require_similarities(closeness)
            shifted = closeness + param if self.kind == "polynomial" else torch.relu(closeness - param)
            weights = shifted.clamp_min(0) ** self.degree
        return torch.where(loops, 1.0, weights)

    def _dense(self, nodes: Tensor) -> Tensor:
        everyone = torch.arange(len(nodes), device=nodes.device)
        weights = self._kernel(self._closeness(nodes, everyone), everyone[:, None] == everyone)
        sums = weights.sum(-1)
        if self.normalize == "row":
            return weights / sums[:, None]
        return weights * sums.rsqrt()[:, None] * sums.rsqrt()

    def _sparse(self, nodes: Tensor, edge_index: Tensor) -> Edges:
        source, target = edge_index
        weights = self._kernel(self._closeness_of(nodes, edge_index), source == target)
        sums = weights.new_zeros(len(nodes)).index_add(0, target, weights)
        if self.normalize == "row":
            return edge_index, weights / sums[target]
        return edge_index, weights * sums.rsqrt()[target] * sums.rsqrt()[source]

    def extra_repr(self) -> str:
        """The settings."""
        param = type(self.param).__name__ if callable(self.param) or isinstance(self.param, Tensor) else self.param
        return f"{self.kind}, param={param}, degree={self.degree}, {self.normalize}, neighbors={self.neighbors}"


@torch.no_grad()
def second_singular_value(adjacency: Tensor | Edges, number: int, steps: int = 30) -> Tensor:
    """The second largest singular value, by subspace iteration: what differs between nodes is multiplied by at most it.

    Args:
        adjacency: ``(n, n)``, or edges and weights.
        number: n.
        steps: Iterations; what is missing makes the answer too small.

    Returns:
        A scalar; 0 of a single node.

    Example:
        >>> round(second_singular_value(torch.diag(torch.tensor([3.0, 2.0, 1.0])), 3).item(), 4)
        2.0
    """
    if number < 2:
        return torch.tensor(0.0)
    if isinstance(adjacency, Tensor):
        matrix = adjacency
    else:
        (source, target), weights = adjacency
        matrix = torch.sparse_coo_tensor(
            torch.stack([target, source]), weights, (number, number), check_invariants=False
        )
    places = torch.arange(1, number + 1, dtype=matrix.dtype, device=matrix.device)
    start = torch.cos(places[:, None] * places[: min(4, number)] * 0.7)  # no random numbers are drawn
    basis = torch.linalg.qr(start).Q
    for _ in range(steps):
        basis = torch.linalg.qr(matrix.t() @ (matrix @ basis)).Q
    return torch.linalg.svdvals(matrix @ basis)[1]


def _warn_if_smooth(adjacency: Tensor | Edges, number: int) -> None:
    if number > 1 and second_singular_value(adjacency, number) < SMOOTH:
        warnings.warn(
            f"the graph makes all nodes alike: the second singular value of its matrix is below {SMOOTH}. Lower the "
            "parameter of a polynomial or rbf kernel, or raise its degree",
            stacklevel=3,
        )


def _require_similarities(closeness: Tensor) -> None:
    low, high = closeness.detach().aminmax()
    if not bool((low >= -1e-6) & (high <= 1 + 1e-6)):
        raise ValueError(
            f"similarities must lie between 0 and 1, got {low.item():.3g} to {high.item():.3g}; for cosines that may "
            "be negative use similarity='shifted_cosine', which is (1 + cos) / 2"
        )
