"""Layer rules against autograd, one sample at a time, in float64."""

from collections.abc import Callable

import pytest
import torch
from timm.layers import GroupNormAct, LayerNorm2d
from timm.models.vision_transformer import LayerScale
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_hpo.functional.batching import per_sample, per_sample_conv
from lightning_hpo.functional.batching.per_sample import Factors, OuterFactors
from lightning_hpo.functional.batching.per_sample_conv import ConvFactors, ConvGeometry
from lightning_hpo.functional.batching.per_sample_rules import layer_factors, missing_rule, parameter_rules

# torch says once a process that it pads by copying, in whichever test comes first.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")

N = 5
DOUBLE = {"dtype": torch.float64}


def numbers(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(N, *shape, **DOUBLE)


def words(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randint(0, 6, (N, *shape))  # few, so that samples repeat them


LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "linear": (lambda: nn.Linear(4, 3), numbers(4)),
    "linear, multiplied out": (lambda: nn.Linear(4, 3), numbers(7, 4)),
    "linear, pairs": (lambda: nn.Linear(9, 8), numbers(3, 9)),
    "linear, 4 dimensions": (lambda: nn.Linear(4, 3), numbers(2, 3, 4)),
    "linear, no bias": (lambda: nn.Linear(4, 3, bias=False), numbers(2, 4)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1, dilation=2, groups=2), numbers(4, 13)),
    "conv1d, slides": (lambda: nn.Conv1d(16, 6, 3, padding=1, dilation=2), numbers(16, 9)),
    "conv1d, one place": (lambda: nn.Conv1d(16, 6, 3), numbers(16, 3)),
    "conv2d": (lambda: nn.Conv2d(3, 4, 3), numbers(3, 7, 6)),
    "conv2d, slides": (lambda: nn.Conv2d(6, 4, 3, stride=(1, 2), padding=(1, 2), dilation=(2, 1)), numbers(6, 9, 8)),
    "conv2d, slides in pairs": (lambda: nn.Conv2d(16, 20, 3, padding=1), numbers(16, 3, 2)),
    "conv2d, slides in groups": (lambda: nn.Conv2d(32, 4, 3, groups=2, bias=False), numbers(32, 5, 4)),
    "conv2d, strides": (lambda: nn.Conv2d(16, 20, (3, 2), stride=(2, 1)), numbers(16, 7, 5)),
    "conv2d, depthwise": (lambda: nn.Conv2d(4, 8, 3, padding="same", groups=4), numbers(4, 5, 6)),
    "conv2d, same, even": (lambda: nn.Conv2d(2, 3, (4, 3), padding="same", dilation=(1, 2)), numbers(2, 6, 7)),
    "conv2d, circular": (lambda: nn.Conv2d(2, 3, 3, padding=(1, 2), padding_mode="circular"), numbers(2, 5, 6)),
    "conv2d, reflect": (lambda: nn.Conv2d(2, 3, 3, padding=2, stride=2, padding_mode="reflect"), numbers(2, 5, 6)),
    "conv2d, valid": (lambda: nn.Conv2d(2, 3, 3, padding="valid"), numbers(2, 5, 6)),
    "conv3d": (lambda: nn.Conv3d(2, 4, (2, 3, 1), stride=(1, 2, 1), padding=1, groups=2), numbers(2, 4, 5, 3)),
    "conv3d, replicate": (lambda: nn.Conv3d(4, 3, 2, padding=1, padding_mode="replicate"), numbers(4, 3, 3, 2)),
    "conv3d, slides": (lambda: nn.Conv3d(4, 3, 2, dilation=(2, 1, 1)), numbers(4, 5, 3, 3)),
    "embedding": (lambda: nn.Embedding(6, 3), words(8)),
    "embedding, padding": (lambda: nn.Embedding(6, 3, padding_idx=2), words(8)),
    "embedding, one word": (lambda: nn.Embedding(6, 3), words()),
    "embedding, 3 dimensions": (lambda: nn.Embedding(6, 3), words(2, 4)),
    "layer norm": (lambda: nn.LayerNorm(4), numbers(4)),
    "layer norm, two dimensions": (lambda: nn.LayerNorm((3, 4), eps=0.1), numbers(2, 3, 4)),
    "layer norm, no bias": (lambda: nn.LayerNorm(4, bias=False), numbers(3, 4)),
    "layer norm, channels first": (lambda: LayerNorm2d(4), numbers(4, 3, 4)),
    "rms norm": (lambda: nn.RMSNorm(4, eps=0.1), numbers(3, 4)),
    "rms norm, default epsilon": (lambda: nn.RMSNorm((3, 4)), numbers(2, 3, 4)),
    "group norm": (lambda: nn.GroupNorm(2, 4, eps=0.1), numbers(4, 3, 2)),
    "group norm, no places": (lambda: nn.GroupNorm(2, 4), numbers(4)),
    "instance norm": (lambda: nn.InstanceNorm1d(4, affine=True), numbers(4, 5)),
    "instance norm, running": (lambda: running(4), numbers(4, 3, 2)),
    "layer scale": (lambda: LayerScale(4, init_values=0.5), numbers(3, 4)),
}  # fmt: skip


class Watched(TorchFunctionMode):
    """Notes the shapes of all tensors that are made."""

    def __init__(self) -> None:
        self.shapes: list[torch.Size] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.shapes.append(result.shape)
        return result


def running(channels: int) -> nn.Module:
    layer = nn.InstanceNorm2d(channels, affine=True, track_running_stats=True)
    layer(torch.randn(8, channels, 3, 2))
    return layer.eval()


def twin(layer: nn.Module, inputs: Tensor, outputs: Tensor) -> dict[str, Tensor]:
    """Gradients of the samples, one after the other."""
    rows = []
    for i in range(N):
        result = layer(inputs[i : i + 1])
        rows.append(torch.autograd.grad((result * outputs[i : i + 1]).sum(), list(layer.parameters())))
    names = [name for name, _ in layer.named_parameters()]
    return {name: torch.stack(row) for name, row in zip(names, zip(*rows, strict=True), strict=True)}


def agree(factors: Factors, rows: Tensor, rtol: float = 1e-10) -> None:
    """All four statistics against the gradients themselves."""
    same = {"rtol": rtol, "atol": rtol * rows.double().norm(dim=0).max().item() ** 2}
    gradient, weights = torch.randn_like(rows[0]), torch.randn(len(rows), **DOUBLE)
    flat = rows.flatten(1)
    assert factors.shape == rows.shape[1:]
    torch.testing.assert_close(factors.squared_norms(), flat.square().sum(1), **same)
    torch.testing.assert_close(factors.inner_products(gradient), flat @ gradient.flatten(), **same)
    torch.testing.assert_close(factors.second_moments(), rows.square().sum(0), **same)
    torch.testing.assert_close(factors.weighted_sum(weights), torch.tensordot(weights.to(rows), rows, 1), **same)


def made(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    make_layer, make_inputs = LAYERS[name]
    layer, inputs = make_layer().double(), make_inputs()
    for parameter in layer.parameters():  # a scale of 1 and a bias of 0 would hide what a rule makes of them
        nn.init.normal_(parameter)
    return layer, inputs, torch.randn_like(layer(inputs))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("bytes_at_a_time", [1, 2**22], ids=["one by one", "together"])
@pytest.mark.parametrize("name", LAYERS)
def test_statistics_are_those_of_single_samples(name, bytes_at_a_time, monkeypatch):
    monkeypatch.setattr(per_sample, "_CHUNK_BYTES_CPU", bytes_at_a_time)
    layer, inputs, outputs = made(name)
    found, rows = layer_factors(layer, inputs, outputs), twin(layer, inputs, outputs)
    assert found.keys() == rows.keys()
    for parameter, factors in found.items():
        agree(factors, rows[parameter])


@pytest.mark.parametrize("name", LAYERS)
def test_calls_of_one_layer_add_up_before_the_norm(name):
    layer, inputs, outputs = made(name)
    _, others, gradients = made(name)
    calls = [layer_factors(layer, inputs, outputs), layer_factors(layer, others, gradients)]
    first, second = twin(layer, inputs, outputs), twin(layer, others, gradients)
    for parameter in first:
        factors = [call[parameter] for call in calls]
        agree(type(factors[0]).joined(factors), first[parameter] + second[parameter])


def test_calls_of_different_lengths_add_up():
    layer = nn.Conv1d(2, 3, 2).double()
    pairs = [(torch.randn(N, 2, length, **DOUBLE), torch.randn(N, 3, length - 1, **DOUBLE)) for length in (4, 7)]
    rows = sum(twin(layer, *pair)["weight"] for pair in pairs)
    agree(ConvFactors.joined([ConvFactors([pair], ConvGeometry.of(layer)) for pair in pairs]), rows)


@pytest.mark.parametrize("name", LAYERS)
def test_only_the_parameters_asked_for_are_looked_at(name):
    layer, inputs, outputs = made(name)
    rows = twin(layer, inputs, outputs)
    for parameter in rows:
        found = layer_factors(layer, inputs, outputs, names=(parameter,))
        assert list(found) == [parameter]
        torch.testing.assert_close(found[parameter].squared_norms(), rows[parameter].flatten(1).square().sum(1))


@pytest.mark.parametrize("name", [name for name in LAYERS if name != "layer norm, channels first"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_single(name, dtype):
    layer, inputs, outputs = made(name)
    rounded = inputs if inputs.dtype == torch.int64 else inputs.to(dtype)
    found = layer_factors(layer, rounded, (60 * outputs).to(dtype))  # squares would not fit into float16
    exact = twin(layer, rounded.double() if rounded.is_floating_point() else rounded, (60 * outputs).to(dtype).double())
    for parameter, factors in found.items():
        agree(factors, exact[parameter].float(), rtol=1e-4)


def test_both_forms_of_the_norm_are_used_and_equal():
    a, b = torch.randn(N, 6, 30, **DOUBLE), torch.randn(N, 6, 20, **DOUBLE)
    with Watched() as few_made:
        few = OuterFactors(a, b).squared_norms()
    with Watched() as many_made:
        many = OuterFactors(a.repeat(1, 9, 1), b.repeat(1, 9, 1)).squared_norms()
    assert (N, 6, 6) in few_made.shapes
    assert (N, 20, 30) not in few_made.shapes
    assert (N, 20, 30) in many_made.shapes
    assert (N, 54, 54) not in many_made.shapes
    torch.testing.assert_close(many, 81 * few)


def test_a_norm_is_never_negative():
    a = torch.ones(4, 8, 64)
    b = torch.randn(4, 8, 64)
    b[:, 1::2] = -b[:, ::2]  # gradients cancel; rounding does not
    norms = OuterFactors(a + 1e-4 * torch.randn(4, 1, 64), b).squared_norms()
    assert (norms >= 0).all()


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("name", LAYERS)
def test_no_samples_are_no_norms(name):
    layer, inputs, outputs = made(name)
    for factors in layer_factors(layer, inputs[:0], outputs[:0]).values():
        assert factors.squared_norms().shape == (0,)
        assert not factors.second_moments().any()
        assert not factors.weighted_sum(torch.zeros(0)).any()


@pytest.mark.parametrize("name", [name for name in LAYERS if name.startswith("conv")])
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
def test_large_convolutions_use_the_kernel_of_torch(name, monkeypatch):
    layer, inputs, outputs = made(name)
    factors = layer_factors(layer.float(), inputs.float(), outputs.float())["weight"]
    columns = factors.squared_norms()
    monkeypatch.setattr(per_sample_conv, "_LARGE", 0)
    torch.testing.assert_close(factors.squared_norms(), columns)


@pytest.mark.parametrize("bytes_at_a_time", [1, 2**22], ids=["one by one", "together"])
@pytest.mark.parametrize("calls", [1, 2])
@pytest.mark.parametrize("name", [name for name in LAYERS if name.startswith("conv")])
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
def test_convolutions_of_all_samples_at_once_are_those_of_single_samples(name, calls, bytes_at_a_time, monkeypatch):
    layer, inputs, outputs = made(name)
    rows = calls * twin(layer, inputs, outputs)["weight"].float()
    monkeypatch.setattr(per_sample, "_CHUNK_BYTES_CPU", bytes_at_a_time)
    for name, limit in {"_MANY_PLACES": 0, "_MANY_CHANNELS": 1, "_FAR": 10**6}.items():
        monkeypatch.setattr(per_sample_conv, name, limit)
    factors = layer_factors(layer.float(), inputs.float(), outputs.float())["weight"]
    factors = type(factors).joined([factors] * calls)
    assert factors._convolves() == (layer.weight[0, 0].numel() > 1)
    agree(factors, rows, rtol=1e-4)


@pytest.mark.parametrize(
    ("layer", "size", "convolves"),
    [
        (nn.Conv2d(32, 64, 3), 13, True),
        (nn.Conv2d(32, 64, 1), 13, False),  # no columns to be made
        (nn.Conv2d(64, 64, 3), 5, False),  # few places
        (nn.Conv2d(3, 64, 3), 13, False),  # few channels
        (nn.Conv2d(256, 256, 3, padding=1), 14, False),  # pairs of places multiply much less
        (nn.Conv2d(3, 64, 7, stride=2), 128, True),  # large
    ],
)
def test_which_convolutions_are_worth_it(layer, size, convolves):
    x = torch.ones(2, layer.in_channels, size, size)
    factors = layer_factors(layer, x, layer(x).detach())["weight"]
    assert factors._convolves() == convolves
    doubled = layer_factors(layer.double(), x.double(), layer(x.double()).detach())["weight"]
    assert not doubled._convolves()


def test_memory_does_not_grow_with_the_batch(monkeypatch):
    monkeypatch.setattr(per_sample, "_CHUNK_BYTES_CPU", 2**16)
    inputs, outputs = torch.randn(200, 8, 12, 12), torch.randn(200, 8, 10, 10)
    with Watched() as made:
        layer_factors(nn.Conv2d(8, 8, 3), inputs, outputs)["weight"].squared_norms()
    assert max(shape.numel() for shape in made.shapes) <= inputs.numel()  # all columns would be six times as many


REFUSED = {
    "no rule": (nn.Bilinear(2, 2, 2), "weight", "`Bilinear`, which has no rule"),
    "transposed": (nn.ConvTranspose1d(1, 1, 1), "weight", "`ConvTranspose1d`, which has no rule"),
    "bag": (nn.EmbeddingBag(2, 2), "weight", "`EmbeddingBag`, which has no rule"),
    "batch norm": (nn.BatchNorm1d(2), "weight", "`BatchNorm1d`, which has no rule"),
    "frequency": (nn.Embedding(2, 2, scale_grad_by_freq=True), "weight", "`scale_grad_by_freq`"),
    "activation inside": (GroupNormAct(4, 2), "weight", "`GroupNormAct` has a `forward` of its own"),
    "foreign parameter": (torch.nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)), "gain", "`weight` and `bias`"),
    "in place": (LayerScale(4, inplace=True), "gamma", "overwrites its input"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_rule_is_named_with_the_reason(name):
    layer, parameter, reason = REFUSED[name]
    assert reason in missing_rule(layer, parameter)
    with pytest.raises(ValueError, match=f"no per-sample gradients of `{type(layer).__name__}`: `{parameter}`: "):
        layer_factors(layer, torch.ones(2, 2), torch.ones(2, 2), (parameter,))


@pytest.mark.parametrize("layer", [nn.Linear(2, 2), nn.Conv1d(2, 2, 1)])
def test_inputs_without_samples_are_refused(layer):
    with pytest.raises(ValueError, match=r"inputs need .* samples"):
        layer_factors(layer, torch.ones(2, 2)[: layer.weight.ndim - 1].squeeze(), torch.ones(2))


def test_attention_reads_a_layer_without_calling_it():
    rules = {name: why for name, _, _, why in parameter_rules(nn.MultiheadAttention(4, 2))}
    assert "without calling" in rules["out_proj.weight"]
    assert all(rules.values())
