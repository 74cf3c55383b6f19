"""Which factors the parameters of a layer have, from the layer's inputs and the gradients of its outputs."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_hpo.functional.batching.per_sample import Factors, LookupFactors, OuterFactors, PlainFactors, chunks
from lightning_hpo.functional.batching.per_sample import working_precision as working
from lightning_hpo.functional.batching.per_sample_conv import ConvFactors, ConvGeometry

__all__ = ["LAYERS", "layer_factors", "layer_rule", "missing_rule", "parameter_rules"]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
LAYERS = (
    *(nn.Linear, *_CONVOLUTIONS, nn.Embedding, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm),
    *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
)
_SAME_AS_TORCH = ("timm.layers.norm", "timm.layers.linear")  # subclasses that change how, not what, they compute


def missing_rule(layer: nn.Module, name: str) -> str | None:
    """Why the per-sample gradients of a parameter cannot be read off its layer.

    Args:
        layer: The module that owns the parameter.
        name: The name of the parameter in this module.

    Returns:
        The reason, or ``None`` if there is a rule.

    Example:
        >>> missing_rule(nn.Linear(2, 2), "weight"), missing_rule(nn.Bilinear(2, 2, 2), "weight")
        (None, 'it belongs to `Bilinear`, which has no rule')
    """
    kind = f"`{type(layer).__name__}`"
    if _is_layer_scale(layer):
        return "it overwrites its input (`inplace=True`)" if getattr(layer, "inplace", False) else None
    base = _base(layer)
    if base is None:
        return f"it belongs to {kind}, which has no rule"
    if type(layer).forward is not base.forward and type(layer).__module__ not in _SAME_AS_TORCH:
        return f"{kind} has a `forward` of its own, so the rule of `{base.__name__}` may not hold"
    if name not in ("weight", "bias"):
        return f"the rule of `{base.__name__}` knows `weight` and `bias` alone"
    if isinstance(layer, nn.Embedding) and layer.scale_grad_by_freq:
        return "`scale_grad_by_freq` makes a sample's gradient depend on the others"
    return None


def parameter_rules(module: nn.Module, frozen: bool = False) -> Iterator[tuple[str, nn.Module, str, str | None]]:
    """Looks for the rule of every parameter of a module.

    Args:
        module: Any module.
        frozen: Whether to look at parameters that do not require a gradient, too.

    Yields:
        Name of the parameter, layer that owns it, its name there, and why there is no rule, or ``None``.

    Example:
        >>> net = nn.ModuleList([nn.Embedding(5, 2), nn.Linear(2, 5)])
        >>> net[1].weight = net[0].weight
        >>> {name: why for name, _, _, why in parameter_rules(net)}
        {'0.weight': 'it is one tensor with `1.weight`', '1.bias': None}
    """
    owners: dict[int, list[tuple[str, nn.Module, str]]] = {}
    unseen: set[nn.Module] = set()
    for path, owner in module.named_modules():
        if isinstance(owner, nn.MultiheadAttention):
            unseen.add(owner.out_proj)
        for own_name, parameter in owner._parameters.items():
            if parameter is not None and (frozen or parameter.requires_grad):
                place = (f"{path}.{own_name}" if path else own_name, owner, own_name)
                owners.setdefault(id(parameter), []).append(place)
    for (name, owner, own_name), *others in owners.values():
        why = missing_rule(owner, own_name)
        if owner in unseen:
            why = "`MultiheadAttention` uses it without calling its layer"
        if others:
            why = f"it is one tensor with {', '.join(f'`{other}`' for other, _, _ in others)}"
        yield name, owner, own_name, why


def layer_factors(
    layer: nn.Module, inputs: Tensor, outputs: Tensor, names: tuple[str, ...] | None = None
) -> dict[str, Factors]:
    """Factors of the per-sample gradients of a layer's parameters.

    Args:
        layer: A layer of one of the kinds in :data:`LAYERS`, or timm's ``LayerScale``.
        inputs: What the layer was called with, samples first.
        outputs: The gradient of the loss with respect to what it returned.
        names: Parameters to look at; all of the layer's own by default.

    Returns:
        Factors by the name of the parameter.

    Raises:
        ValueError: If there is no rule for one of the names, or the inputs have no dimension of samples.

    Example:
        >>> inputs, outputs = torch.tensor([[1.0, 2.0], [0.0, 3.0]]), torch.tensor([[2.0], [1.0]])
        >>> factors = layer_factors(nn.Linear(2, 1), inputs, outputs)
        >>> {name: of.squared_norms() for name, of in factors.items()}
        {'weight': tensor([20.,  9.]), 'bias': tensor([4., 1.])}
    """
    if names is None:
        names = tuple(name for name, _ in layer.named_parameters(recurse=False))
    problems = [f"`{name}`: {why}" for name in names if (why := missing_rule(layer, name)) is not None]
    if inputs.ndim < 2 and not isinstance(layer, nn.Embedding):
        problems.append(f"inputs need a dimension of samples before that of features, got shape {tuple(inputs.shape)}")
    if isinstance(layer, _CONVOLUTIONS) and inputs.ndim != layer.weight.ndim:
        problems.append(f"inputs need {layer.weight.ndim} dimensions, samples first, got shape {tuple(inputs.shape)}")
    if problems:
        raise ValueError(f"no per-sample gradients of `{type(layer).__name__}`: " + "; ".join(problems))
    return layer_rule(layer)(layer, inputs, outputs, names)


def layer_rule(layer: nn.Module) -> Callable[[Any, Tensor, Tensor, tuple[str, ...]], dict[str, Factors]]:
    """What :func:`layer_factors` calls once it has checked its arguments.

    Args:
        layer: A layer with a rule: see :func:`missing_rule`.

    Returns:
        A function of layer, inputs, output gradients and names.

    Example:
        >>> layer_rule(nn.Linear(1, 1)) is layer_rule(nn.Linear(2, 2))
        True
    """
    if isinstance(layer, nn.Linear):
        return _linear
    if isinstance(layer, nn.Embedding):
        return _embedding
    return _conv if isinstance(layer, _CONVOLUTIONS) else _scale


def _base(layer: nn.Module) -> type[nn.Module] | None:
    return next((kind for kind in LAYERS if isinstance(layer, kind)), None)


def _is_layer_scale(layer: nn.Module) -> bool:
    """The elementwise product with a vector of timm, known by its looks so that timm need not be there."""
    return type(layer).__name__ == "LayerScale" and [name for name, _ in layer.named_parameters()] == ["gamma"]


def _linear(_: nn.Linear, inputs: Tensor, outputs: Tensor, names: tuple[str, ...]) -> dict[str, Factors]:
    a, b = _positions(inputs), _positions(outputs)
    found: dict[str, Factors] = {"weight": OuterFactors(a, b)} if "weight" in names else {}
    return found | ({"bias": PlainFactors(_summed(b, 1))} if "bias" in names else {})


def _conv(layer: nn.Conv2d, inputs: Tensor, outputs: Tensor, names: tuple[str, ...]) -> dict[str, Factors]:
    geometry = ConvGeometry.of(layer)
    found: dict[str, Factors] = {"weight": ConvFactors([(inputs, outputs)], geometry)} if "weight" in names else {}
    return found | ({"bias": PlainFactors(_summed(outputs.flatten(2), 2))} if "bias" in names else {})


def _embedding(layer: nn.Embedding, inputs: Tensor, outputs: Tensor, names: tuple[str, ...]) -> dict[str, Factors]:
    indices, b = _positions(inputs.unsqueeze(-1)).squeeze(-1), _positions(outputs)
    if layer.padding_idx is not None:
        b = b.masked_fill((indices == layer.padding_idx).unsqueeze(-1), 0.0)
    return {"weight": LookupFactors(indices, b, layer.num_embeddings)} if names else {}


def _scale(layer: nn.Module, inputs: Tensor, outputs: Tensor, names: tuple[str, ...]) -> dict[str, Factors]:
    """A product with a vector and a sum with another, after a normalisation or after nothing."""
    (parameter,) = {getattr(layer, name).shape for name in names}
    first = 1 if _channels_first(layer) else inputs.ndim - len(parameter)  # where the parameter's dimensions begin
    others = [i for i in range(1, inputs.ndim) if not first <= i < first + len(parameter)]
    weights, biases = [], []
    for part in chunks(inputs, 3 * inputs.shape[1:].numel()):
        b = working(outputs[part])
        if set(names) & {"weight", "gamma"}:
            weights.append(_total(_normalized(layer, working(inputs[part])) * b, others))
        if "bias" in names:
            biases.append(_total(b, others))
    found = {name: torch.cat(weights) for name in names if name != "bias"}
    found |= {"bias": torch.cat(biases)} if biases else {}
    return {name: PlainFactors(values) for name, values in found.items()}


def _channels_first(layer: nn.Module) -> bool:
    by_name = isinstance(layer, nn.LayerNorm) and "2d" in type(layer).__name__  # timm's norm of NCHW images
    return by_name or not (isinstance(layer, (nn.LayerNorm, nn.RMSNorm)) or _is_layer_scale(layer))


def _normalized(layer: nn.Module, x: Tensor) -> Tensor:
    if isinstance(layer, nn.LayerNorm):
        if _channels_first(layer):
            return F.layer_norm(x.movedim(1, -1), layer.normalized_shape, eps=layer.eps).movedim(-1, 1)
        return F.layer_norm(x, layer.normalized_shape, eps=layer.eps)
    if isinstance(layer, nn.RMSNorm):
        return F.rms_norm(x, layer.normalized_shape, eps=layer.eps)
    if isinstance(layer, nn.GroupNorm):
        return F.group_norm(x, layer.num_groups, eps=layer.eps)
    if isinstance(layer, (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)):
        of_inputs = layer.training or not layer.track_running_stats
        stored = (None, None) if of_inputs else (layer.running_mean, layer.running_var)
        return F.instance_norm(x, *stored, use_input_stats=of_inputs, eps=layer.eps)
    return x


def _positions(tensor: Tensor) -> Tensor:
    """Shape ``(n, ..., d)`` as ``(n, t, d)``."""
    return tensor.unsqueeze(1) if tensor.ndim == 2 else tensor.flatten(1, -2)


def _summed(tensor: Tensor, dim: int) -> Tensor:
    """Sum in float32 at least, without a copy in float32 first."""
    dtype = torch.float32 if tensor.dtype.itemsize < 4 else tensor.dtype
    return tensor.squeeze(dim).to(dtype) if tensor.shape[dim] == 1 else tensor.sum(dim, dtype=dtype)


def _total(tensor: Tensor, dims: list[int]) -> Tensor:
    return tensor.sum(dims) if dims else tensor
