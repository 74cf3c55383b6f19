"""Per-sample gradient statistics of any loss, by differentiating a few samples at a time."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_flatten, tree_unflatten

__all__ = ["PerSampleStatistics", "per_sample_statistics"]

Loss = Callable[[dict[str, Tensor], Any], Tensor]


@dataclass(frozen=True)
class PerSampleStatistics:
    r"""What is kept of the gradients :math:`g_1, \dots, g_n` of single samples; all on the device, float32 at least.

    Args:
        squared_norms: :math:`\|g_i\|^2`, shape ``(n,)``.
        gradient_sum: :math:`\sum_i g_i` by the name of the parameter, if asked for.
        inner_products: :math:`\langle g_i, g \rangle`, shape ``(n,)``, if a gradient ``g`` was given.
        second_moments: :math:`\sum_i g_i^2` of every coordinate by the name of the parameter, if asked for.
    """

    squared_norms: Tensor
    gradient_sum: dict[str, Tensor] | None = field(default=None, repr=False)
    inner_products: Tensor | None = None
    second_moments: dict[str, Tensor] | None = field(default=None, repr=False)


def per_sample_statistics(
    loss: Loss,
    params: Mapping[str, Tensor],
    batch: Any,
    chunk_size: int = 16,
    gradients: Mapping[str, Tensor] | None = None,
    moments: bool = False,
    max_samples: int | None = None,
    sums: bool = True,
) -> PerSampleStatistics:
    """Differentiates the loss for each sample as a batch of one, and keeps sums.

    Args:
        loss: Maps parameters and a batch to a scalar, as :func:`lightning_hpo.stateless.loss_of` makes it.
        params: Parameters by name; the gradients are taken with respect to all of them.
        batch: Tensors whose first dimension counts samples, in any nest of lists, tuples and dicts. What is no tensor,
            or has no dimension, is handed to every sample.
        chunk_size: Samples that are differentiated at a time; no more gradients than this are ever held.
        gradients: A gradient to take inner products with; a name that is missing counts as zero.
        moments: Whether to sum the squares of every coordinate.
        max_samples: Only look at the first so many samples.
        sums: Whether to sum the gradients; it takes one more pass over them.

    Returns:
        The statistics.

    Raises:
        ValueError: If ``chunk_size`` or ``max_samples`` is below 1, or the batch has no samples that can be told apart.
        RuntimeError: If the loss cannot be differentiated sample by sample; says where and what to do.

    Example:
        >>> def loss(params, batch):
        ...     return (params["w"] * batch).sum()
        >>> found = per_sample_statistics(loss, {"w": torch.zeros(2)}, torch.tensor([[3.0, 4.0], [1.0, 0.0]]))
        >>> found.squared_norms, found.gradient_sum
        (tensor([25.,  1.]), {'w': tensor([4., 4.])})
    """
    limits = {"chunk_size": chunk_size, "max_samples": max_samples}
    if wrong := [f"{name} must be at least 1, got {n}" for name, n in limits.items() if n is not None and n < 1]:
        raise ValueError("; ".join(wrong))
    leaves, places, spec = _samples(batch)
    samples = min(leaves[places[0]].shape[0], max_samples or leaves[places[0]].shape[0])

    def sample_loss(parameters: dict[str, Tensor], sample: list[Tensor]) -> Tensor:
        whole = list(leaves)
        for place, tensor in zip(places, sample, strict=True):
            whole[place] = tensor.unsqueeze(0)
        return loss(parameters, tree_unflatten(whole, spec))

    differentiate = torch.func.vmap(torch.func.grad(sample_loss), in_dims=(None, 0), randomness="different")
    parameters = {name: value.detach() for name, value in params.items()}
    kept = _Sums(gradients, moments, sums)
    for start in range(0, samples, chunk_size):
        part = slice(start, min(start + chunk_size, samples))
        try:
            with _vmappable_attention(leaves[places[0]].device):
                chunk = differentiate(parameters, [leaves[place][part] for place in places])
        except (RuntimeError, ValueError) as error:  # BatchNorm raises ValueError for a batch of one
            raise RuntimeError(_explained(error)) from error
        kept.add(chunk)
        del chunk  # or two chunks would be there at once
    return kept.statistics()


class _Sums:
    """Adds up chunks of gradients."""

    def __init__(self, gradients: Mapping[str, Tensor] | None, moments: bool, sums: bool) -> None:
        self.gradients, self.moments, self.sums = gradients, moments, sums
        self.norms: list[Tensor] = []
        self.inner: list[Tensor] = []
        self.total: dict[str, Tensor] = {}
        self.squares: dict[str, Tensor] = {}

    @torch.no_grad()
    def add(self, chunk: dict[str, Tensor]) -> None:
        rows = {name: (g.float() if g.dtype.itemsize < 4 else g).flatten(1) for name, g in chunk.items()}
        self.norms.append(torch.stack([torch.linalg.vector_norm(g, dim=1) for g in rows.values()]).square().sum(0))
        if self.gradients is not None:
            given = {name: g.detach().flatten() for name, g in self.gradients.items() if name in rows}
            products = [rows[name] @ g.to(rows[name].dtype) for name, g in given.items()]
            self.inner.append(torch.stack(products or [torch.zeros_like(self.norms[-1])]).sum(0))
        for name, g in rows.items():
            if self.sums:
                _add(self.total, name, (g.new_ones(len(g)) @ g).view(chunk[name].shape[1:]))  # faster than g.sum(0)
            if self.moments:
                _add(self.squares, name, g.square().sum(0).view(chunk[name].shape[1:]))

    def statistics(self) -> PerSampleStatistics:
        return PerSampleStatistics(
            torch.cat(self.norms),
            self.total if self.sums else None,
            torch.cat(self.inner) if self.gradients is not None else None,
            self.squares if self.moments else None,
        )


def _vmappable_attention(device: torch.device) -> AbstractContextManager[Any]:
    """On the CPU, vmap takes fused attention apart sample by sample, and warns; the plain formula is as fast."""
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext()


def _add(sums: dict[str, Tensor], name: str, value: Tensor) -> None:
    sums[name] = sums[name].add_(value) if name in sums else value


def _samples(batch: Any) -> tuple[list[Any], list[int], Any]:
    """The leaves of a batch, which of them have samples, and its structure."""
    leaves, spec = tree_flatten(batch)
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.ndim > 0]
    sizes = sorted({leaves[place].shape[0] for place in places})
    if not places:
        kinds = ", ".join(sorted({f"`{type(leaf).__name__}`" for leaf in leaves})) or "nothing"
        raise ValueError(f"the batch has no tensors with samples, only {kinds}; lists, tuples and dicts are opened")
    if len(sizes) > 1 or sizes[0] == 0:
        raise ValueError(f"the tensors of the batch must agree on their first dimension, the samples; it is {sizes}")
    return leaves, places, spec


def _explained(error: Exception) -> str:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    where = _place(error.__traceback__)
    return (
        f"the loss cannot be differentiated sample by sample{where}: {reason} Each sample is a batch of one under "
        "`torch.func.vmap`: layers that mix samples, `.item()`, branches on values and writing into tensors from "
        "outside are not possible there. Change that part, or estimate from layer rules or from micro-batches instead."
    )


def _place(trace: TracebackType | None) -> str:
    """The innermost module that was running, with its path from the outermost one."""
    running: list[nn.Module] = []
    for module in _modules(trace):
        if not running or running[-1] is not module:
            running.append(module)
    if not running:
        return ""
    names = {id(module): name for root in reversed(running) for name, module in root.named_modules()}
    name, kind = names.get(id(running[-1]), ""), type(running[-1]).__name__
    return f" in `{name}` (`{kind}`)" if name else f" in `{kind}`"


def _modules(trace: TracebackType | None) -> Iterator[nn.Module]:
    while trace is not None:
        owner = trace.tb_frame.f_locals.get("self")
        if isinstance(owner, nn.Module):
            yield owner
        trace = trace.tb_next
