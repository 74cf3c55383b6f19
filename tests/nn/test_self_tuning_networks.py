"""Self-tuning layers against weights that are written out, and conversion of whole networks, there and back."""

import copy

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from lightning_hpo.nn.self_tuning_layers import attached
from lightning_hpo.nn.self_tuning_lstm import WeightDropLSTM
from lightning_hpo.nn.self_tuning_networks import convert

B, N = 4, 3


class Recurrent(nn.Module):
    """Keeps the outputs of an LSTM alone."""

    def __init__(self, lstm):
        super().__init__()
        self.lstm = lstm

    def forward(self, x):
        return self.lstm(x)[0]


LAYERS = {
    "linear": (lambda: nn.Linear(5, 6), (B, 5)),
    "tokens": (lambda: nn.Linear(5, 6), (B, 7, 5)),
    "no bias": (lambda: nn.Linear(5, 6, bias=False), (B, 5)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, groups=2, padding=1), (B, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1, padding_mode="circular"), (B, 4, 8, 8)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2, bias=False), (B, 2, 4, 4, 4)),
    "embedding": (lambda: nn.Embedding(9, 6, padding_idx=0), None),
    "lstm cell": (lambda: Recurrent(nn.LSTMCell(5, 6)), (B, 5)),
    "lstm": (lambda: Recurrent(nn.LSTM(5, 6, num_layers=2, batch_first=True, bidirectional=True)), (B, 7, 5)),
    "lstm without bias": (lambda: Recurrent(nn.LSTM(5, 6, bias=False, batch_first=True)), (B, 7, 5)),
}


def problem(name, dtype=torch.float64, gate_std=0.5):
    """A converted layer inside a network, its response, an input, and inputs of the hyper-network."""
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    net = nn.Sequential(make()).to(dtype)
    x = torch.randint(1, 9, (B, 7)) if shape is None else torch.randn(shape, dtype=dtype)
    response = convert(net, inputs=N, gate_std=gate_std)
    return net, response, x, torch.randn(B, N, dtype=dtype)


def written_out(net, response, x, h):
    """Each example alone, through an ordinary network with its weights."""
    rows = []
    for i in range(B):
        plain = copy.deepcopy(net)
        for module in plain.modules():
            module.__dict__.pop("_response", None)
        values = response.folded(h[i])
        rows.append(torch.func.functional_call(plain, values, (x[i : i + 1],)))
    return torch.cat(rows)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 1e-12)])
def test_each_example_has_the_weights_of_its_hyperparameters(name, dtype, tolerance):
    net, response, x, h = problem(name, dtype)
    with response.at(h):
        found = net(x)
    torch.testing.assert_close(found, written_out(net, response, x, h), rtol=tolerance, atol=tolerance)
    assert (found - net(x)).abs().max() > 0.01  # the response is felt


def test_folded_weights_are_those_of_the_formula():
    net, response, _, h = problem("linear")
    (layer,) = response.layers.values()
    v_weight, v_bias = layer.gate[:6], layer.gate[6:]
    weight = net[0].weight + torch.diag(v_weight @ h[0]) @ layer.weight
    found = response.folded(h[0])
    torch.testing.assert_close(found["0.weight"], weight)
    torch.testing.assert_close(found["0.bias"], net[0].bias + (v_bias @ h[0]) * layer.bias)
    torch.testing.assert_close(layer.weight.abs().max(), torch.tensor(5**-0.5).double(), atol=0.1, rtol=0)


def test_a_convolution_of_one_pixel_is_a_linear_layer():
    conv, linear = nn.Sequential(nn.Conv2d(5, 6, 1)).double(), nn.Sequential(nn.Linear(5, 6)).double()
    linear[0].weight.data, linear[0].bias.data = conv[0].weight.data[..., 0, 0].clone(), conv[0].bias.data.clone()
    first, second = convert(conv, N, gate_std=0.5), convert(linear, N, gate_std=0.5)
    x, h = torch.randn(B, 5).double(), torch.randn(B, N).double()
    with first.at(h), second.at(h):
        torch.testing.assert_close(conv(x[..., None, None])[..., 0, 0], linear(x))


@pytest.mark.parametrize("name", ["tokens", "conv2d", "embedding", "lstm cell"])
def test_gradients_are_right(name):
    net, response, x, h = problem(name)
    values = [*net.parameters(), *response.parameters()]
    x = x.requires_grad_() if x.is_floating_point() else x

    def call(x, h, *_):
        with response.at(h):
            return net(x)

    assert torch.autograd.gradcheck(call, (x, h.requires_grad_(), *values), atol=1e-6)


@pytest.mark.parametrize("name", LAYERS)
def test_without_gates_the_layer_is_what_it_was_bit_for_bit(name):
    net, response, x, h = problem(name, torch.float32, gate_std=0.0)
    plain = LAYERS[name][0]()
    plain.load_state_dict(net[0].state_dict())  # the names are the same
    expected = plain(x)
    assert torch.equal(net(x), expected)
    with response.at(h[0]):
        assert torch.equal(net(x), expected)
    with response.at(h):  # recurrent layers run in another order of sums
        torch.testing.assert_close(net(x), expected, rtol=0, atol=2e-7 if "lstm" in name else 0)


@pytest.mark.parametrize("name", LAYERS)
def test_linearised_is_the_slope_in_the_response(name):
    net, response, x, delta = problem(name)
    with response.along(delta) as calls:
        found = net(x)
    assert calls == [1]
    step = 1e-6
    with response.at(step * delta):
        ahead = net(x)
    with response.at(-step * delta):
        behind = net(x)
    slope = (ahead - behind) / (2 * step)
    assert slope.abs().max() > 0.01
    torch.testing.assert_close(found, net(x) + slope, rtol=1e-6, atol=1e-6)


class Deep(nn.Module):
    """Everything that a linearised pass must get through."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(16, 5)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        x = self.act(self.norm(self.conv(x)))
        x = F.scaled_dot_product_attention(x, x, x)
        return self.head(F.max_pool2d(x, 3).flatten(1))


@pytest.mark.parametrize("training", [True, False])
def test_one_forward_pass_is_two_backward_passes(training):
    torch.manual_seed(0)
    net = Deep().double().train(training)
    response = convert(net, N, gate_std=0.5)
    x, delta = torch.randn(B, 3, 8, 8).double(), torch.randn(B, N).double()
    with response.along(delta):
        found = net(x)
    h = torch.zeros(B, N).double().requires_grad_()
    with response.at(h), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        out = net(x)
    dummy = torch.zeros_like(out, requires_grad=True)
    (pulled,) = torch.autograd.grad(out, h, dummy, create_graph=True)
    (slope,) = torch.autograd.grad((pulled * delta).sum(), dummy, create_graph=True)
    torch.testing.assert_close(found, out + slope, rtol=1e-9, atol=1e-9)
    if training:
        return  # batch norm has no third derivative, which the other way would need
    weights = torch.randn_like(out)
    parameters = list(response.parameters())
    first = torch.autograd.grad((found * weights).sum(), parameters)
    second = torch.autograd.grad((slope * weights).sum(), parameters)
    for one, other in zip(first, second, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("name", LAYERS)
def test_export_is_a_plain_network_with_the_same_outputs(name):
    net, response, x, h = problem(name, torch.float32)
    kinds = [type(m) for m in nn.Sequential(LAYERS[name][0]()).modules()]
    with response.at(h[1]):
        expected = net(x)
    names = list(net.state_dict())
    response.revert(h[1])
    assert [type(m) for m in net.modules()] == kinds
    assert list(net.state_dict()) == names
    torch.testing.assert_close(net(x), expected, rtol=1e-6, atol=1e-6)
    assert all(attached(m) is None for m in net.modules())


MODELS = {
    "resnet18": {"num_classes": 7},
    "vit_tiny_patch16_224": {"img_size": 32, "patch_size": 8, "num_classes": 7},
    "mobilenetv3_small_050": {"num_classes": 7},
    "convnext_atto": {"num_classes": 7},
    "mixer_s32_224": {"img_size": 64, "num_classes": 7},
}


@pytest.mark.parametrize("name", MODELS)
def test_timm_networks_there_and_back(name):
    torch.manual_seed(0)
    net = timm.create_model(name, **MODELS[name]).eval()
    x = torch.randn(2, 3, MODELS[name].get("img_size", 64), MODELS[name].get("img_size", 64))
    with torch.no_grad():
        expected, before = net(x), copy.deepcopy(net.state_dict())
        parts = {name: type(m) for name, m in net.named_modules()}
        response = convert(net, N)
        kinds = (nn.Linear, nn.Conv2d)
        assert response.names == [n for n, m in net.named_modules() if isinstance(m, kinds) and attached(m)]
        assert len(response.names) > 15
        assert not any("Linear is" in why or "Conv2d is" in why for why in response.skipped.values())
        h = torch.randn(2, N)
        for inputs in (None, h[0], h):
            with response.at(inputs):
                torch.testing.assert_close(net(x), expected, rtol=1e-6, atol=1e-6)
        net.load_state_dict(before)  # a pretrained file fits as it is
        for gate in [p for n, p in response.named_parameters() if n.endswith("gate")]:
            gate.normal_(std=0.1)
        with response.at(h):
            rows = net(x)
        assert (rows - expected).abs().max() > 1e-3
        for i in range(2):
            with response.at(h[i]):
                torch.testing.assert_close(rows[i], net(x)[i], rtol=1e-3, atol=1e-4 * expected.abs().max())
        response.revert()
        assert {name: type(m) for name, m in net.named_modules()} == parts
        assert torch.equal(net(x), expected)


def test_a_language_model():
    torch.manual_seed(0)
    table, lstm, head = (
        nn.Embedding(11, 6),
        WeightDropLSTM(6, 6, 2, batch_first=True, weight_drop=0.0),
        nn.Linear(6, 11),
    )
    net = nn.Sequential(table, Recurrent(lstm), head).double()
    tokens = torch.randint(11, (B, 9))
    expected = net(tokens)
    response = convert(net, N)
    assert response.names == ["0", "1.lstm", "2"]
    h = torch.randn(B, N).double()
    for inputs in (None, h[0], h):
        with response.at(inputs):
            torch.testing.assert_close(net(tokens), expected)
    response.revert()
    assert torch.equal(net(tokens), expected)
    assert type(lstm) is WeightDropLSTM


def test_dropped_weights_are_the_same_in_both_branches_and_for_all_examples():
    torch.manual_seed(0)
    net = nn.Sequential(Recurrent(WeightDropLSTM(3, 4, batch_first=True, weight_drop=0.6))).double()
    response = convert(net, N, gate_std=0.5)
    x, h = torch.randn(1, 5, 3).double().expand(B, 5, 3), torch.randn(1, N).double()

    def run(inputs):
        torch.manual_seed(5)
        with response.at(inputs):
            return net(x)

    same = run(h.expand(B, N))
    torch.testing.assert_close(same, same[:1].expand_as(same))
    torch.testing.assert_close(same, run(h[0]))  # masked after folding: the mask is a factor of both
    net.eval()
    assert torch.equal(run(None), run(None))
    assert (run(None) - same).abs().max() > 1e-3


def test_a_copy_responds_on_its_own():
    net, response, x, h = problem("linear")
    response.set(h)
    other = copy.deepcopy(net)
    torch.testing.assert_close(other(x), net(x))
    response.set(None)
    assert (other(x) - net(x)).abs().max() > 0.01


def test_rows_that_do_not_fit_are_refused_and_multiples_are_repeated():
    net, response, _, h = problem("linear")
    windows = torch.randn(2 * B, 5).double()  # two windows of each example, one after the other
    with response.at(h):
        found = net(windows)
        with pytest.raises(ValueError, match=r"expected 4 rows, one an example, or a multiple of it .* got 6"):
            net(windows[:6])
    with response.at(h.repeat_interleave(2, 0)):
        torch.testing.assert_close(net(windows), found)


def test_what_is_not_converted_is_said_with_the_reason():
    shared = nn.Linear(4, 4)
    net = nn.ModuleDict(
        {
            "table": nn.Embedding(4, 4),
            "encoder": nn.TransformerEncoderLayer(4, 2, 8, batch_first=True),
            "norm": nn.BatchNorm1d(4),
            "one": shared,
            "again": nn.Linear(4, 4),
            "frozen": nn.Linear(4, 4).requires_grad_(False),
            "sparse": nn.Embedding(3, 4, sparse=True),
            "projected": nn.LSTM(4, 4, proj_size=2),
            "free": nn.Linear(4, 4),
            "out": nn.Linear(4, 4),
            "kept": nn.Linear(4, 4),
        }
    )
    net["out"].weight = net["table"].weight  # as language models do
    net["again"].weight = shared.weight
    response = convert(net, N, exclude=["fre*"])
    assert response.names == ["kept"]
    why = {name.partition(".")[0]: reason for name, reason in response.skipped.items()}
    assert why == {
        "table": "its weights are tied to another layer's",
        "encoder": "TransformerEncoderLayer reads its weights directly",
        "norm": "BatchNorm1d is shared",
        "one": "its weights are tied to another layer's",
        "again": "its weights are tied to another layer's",
        "frozen": "frozen",
        "sparse": "an embedding with sparse gradients or a largest norm",
        "projected": "an LSTM with projections",
        "free": "excluded",
        "out": "its weights are tied to another layer's",
    }
    with pytest.raises(ValueError, match=r"inputs must be.*already converted: \['kept'\].*named like \['no'\]"):
        convert(net, 0, include=["no"])
    with pytest.raises(ValueError, match="nothing to convert: needs one of Linear, .*BatchNorm1d is shared"):
        convert(nn.Sequential(nn.BatchNorm1d(3)), 1)


def test_random_numbers_are_not_used_up_and_begin_alike():
    nets = [nn.Sequential(nn.Linear(2, 3)) for _ in range(2)]
    before = torch.get_rng_state()
    first, second = (convert(net, 1) for net in nets)
    assert torch.equal(torch.get_rng_state(), before)
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)
