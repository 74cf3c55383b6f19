"""Hypernetized modules: against equations written out, what may be selected, precision, compilation, one plain copy."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_hpo import ConditionSpec, hypernetize
from lightning_hpo.nn.hyper_network import HyperNetwork


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def net():
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def written_out(network, gamma):
    """The method's equations with one flat last layer, whose bias is what does not depend on the condition."""
    angle = torch.tensor([g * torch.pi / 2 for g in gamma.tolist()], dtype=torch.float64)
    hidden = torch.cat([torch.cos(angle), torch.sin(angle)])
    for layer in network.body:
        if isinstance(layer, nn.Linear):
            hidden = layer.weight.double() @ hidden + layer.bias.double()
            hidden = torch.where(hidden > 0, hidden, 0.01 * hidden)
    names = list(network.shapes)
    weight = torch.cat([network.heads[name.replace(".", "/")].weight for name in names]).double()
    bias = torch.cat([network.base[name.replace(".", "/")].flatten() for name in names]).double()
    flat, found, offset = weight @ hidden + bias, {}, 0
    for name in names:
        size = network.shapes[name].numel()
        found[name] = flat[offset : offset + size].view(network.shapes[name])
        offset += size
    return found


@pytest.mark.parametrize("k", [1, 3])
def test_forward_is_the_papers(k):
    hyper = hypernetize(net(), k, hidden=(16, 32))
    with torch.no_grad():
        for parameter in hyper.hyper_network.parameters():  # zeros would hide a mistake
            parameter.add_(0.1 * torch.randn_like(parameter))
    for gamma in torch.rand(4, k):
        expected, found = written_out(hyper.hyper_network, gamma), hyper.hyper_network(gamma)
        assert expected.keys() == found.keys() == dict(net().named_parameters()).keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name].double(), value, rtol=1e-6, atol=1e-6)
    x = torch.randn(5, 4)
    first = torch.tanh(F.linear(x, found["0.weight"].float(), found["0.bias"].float()))
    expected = F.linear(first, found["2.weight"].float(), found["2.bias"].float())
    torch.testing.assert_close(hyper.float()(x, gamma=gamma), expected, rtol=1e-5, atol=1e-6)


def test_what_is_added_nothing_to_is_the_base():
    network = HyperNetwork({"w": torch.randn(5, 4), "b": torch.randn(5)}, conditions=2)
    for head in network.heads.values():
        nn.init.zeros_(head.weight)
    for gamma in torch.rand(3, 2):
        assert all(torch.equal(value, network.base[name]) for name, value in network(gamma).items())


def test_without_a_residual_the_last_bias_begins_at_zero_and_learns():
    network = HyperNetwork({"w": torch.ones(5, 4)}, conditions=1, residual=False)
    assert network.base["w"].abs().max() == 0
    network(torch.tensor([0.5]))["w"].sum().backward()
    torch.testing.assert_close(network.base["w"].grad, torch.ones(5, 4))


def test_full_rank_is_the_full_head():
    target = {"w": torch.randn(9, 7)}
    full, low = (HyperNetwork(target, conditions=1, hidden=(16,), rank=rank).double() for rank in (None, 16))
    low.body.load_state_dict(full.body.state_dict())
    first, last = low.heads["w"]
    with torch.no_grad():
        first.weight.copy_(torch.eye(16))
        last.weight.copy_(full.heads["w"].weight)
    gamma = torch.rand(6, 1)
    torch.testing.assert_close(low(gamma)["w"], full(gamma)["w"], rtol=1e-12, atol=1e-12)


def test_a_low_rank_adds_as_much_with_fewer_parameters():
    target = {"w": torch.zeros(64, 64)}
    full, low = (HyperNetwork(target, conditions=1, rank=rank) for rank in (None, 4))
    first, last = low.heads["w"]
    assert (last.weight @ first.weight).std().item() == pytest.approx(full.heads["w"].weight.std().item(), rel=0.1)
    assert torch.linalg.matrix_rank((last.weight @ first.weight).detach()) == 4
    assert sum(p.numel() for p in low.heads.parameters()) == 4 * (64 * 64 + 128)
    still = HyperNetwork({"w": torch.ones(3, 3)}, conditions=1, rank=2, delta_init="zeros")
    assert torch.equal(still(torch.tensor([0.4]))["w"], torch.ones(3, 3))
    with pytest.raises(ValueError, match="rank must be a positive integer, got 0"):
        HyperNetwork(target, conditions=1, rank=0)


@pytest.mark.parametrize("include", [("first.weight",), ("second.weight",)])
def test_tied_parameters_are_predicted_once_and_stay_tied(include):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
            self.second.weight = self.first.weight

        def forward(self, x):
            return self.second(self.first(x))

    hyper, x, gamma = hypernetize(Tied(), 1, include=include), torch.randn(3, 4), torch.tensor([0.4])
    weights = hyper.hyper_network(gamma)
    assert list(weights) == ["first.weight"]
    (weight,) = weights.values()
    torch.testing.assert_close(hyper(x, gamma=gamma), x @ weight.T @ weight.T)
    torch.testing.assert_close(hyper(x, gamma=gamma.expand(3, 1)), x @ weight.T @ weight.T)
    plain = hyper.materialize(gamma)
    assert plain.second.weight is plain.first.weight
    torch.testing.assert_close(plain(x), x @ weight.T @ weight.T)


def test_frozen_parameters_stay_and_integers_are_refused():
    frozen = net().requires_grad_(False)
    frozen[2].requires_grad_(True)
    assert list(hypernetize(frozen, 1).hyper_network.shapes) == ["2.weight", "2.bias"]
    with pytest.raises(ValueError, match="no trainable parameter is named like"):
        hypernetize(net().requires_grad_(False), 1)
    counted = nn.Linear(1, 1)
    counted.steps = nn.Parameter(torch.zeros(1, dtype=torch.long), requires_grad=False)
    with pytest.raises(TypeError, match=r"not \['steps'\]"):
        hypernetize(counted, 1)
    with pytest.raises(ValueError, match="conditions must be a positive integer, got 0"):
        hypernetize(net(), ConditionSpec())


def test_running_statistics_are_warned_of():
    normed = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    with pytest.warns(UserWarning, match=r"batch norms \(\['1'\]\) are those of all conditions mixed: use GroupNorm"):
        hypernetize(normed, 1)
    hypernetize(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2, track_running_stats=False)), 1)


def test_the_present_condition_is_used_where_none_is_given():
    hyper, x = (
        hypernetize(net(), ConditionSpec().add("noise", 0.0, 0.5).add("rate", 1e-4, 1.0, log=True)),
        torch.ones(2, 4),
    )
    x = x.double()
    for use in (lambda: hyper(x), lambda: hyper.condition, lambda: hyper.materialize()):
        with pytest.raises(
            ValueError, match="there is no condition: give `gamma`, or train with `ConditionedTraining`"
        ):
            use()
    hyper.gamma = hyper.spec.encode({"rate": 1e-2, "noise": 0.125})
    assert {n: round(v.item(), 6) for n, v in hyper.condition.items()} == {"noise": 0.125, "rate": 0.01}
    assert torch.equal(hyper(x), hyper(x, gamma=torch.tensor([0.25, 0.5])))
    torch.testing.assert_close(hyper.materialize(noise=0.125, rate=1e-2)(x), hyper(x))
    torch.testing.assert_close(hyper.materialize()(x), hyper(x))
    with pytest.raises(ValueError, match="`rate` is missing; `noise` must be from 0 to 0.5, got 0.6"):
        hyper.materialize(noise=0.6)
    with pytest.raises(ValueError, match="either gamma or values"):
        hyper.materialize(torch.zeros(2), noise=0.1)
    with pytest.raises(ValueError, match=r"a plain copy has one condition, got shape \(3, 2\)"):
        hyper.materialize(torch.zeros(3, 2))


def test_groups_for_an_optimizer_hold_everything_once():
    hyper = hypernetize(net(), 1, include=("2.*",))
    omega, base = hyper.parameter_groups(weight_decay=0.1)
    assert [omega["weight_decay"], base["weight_decay"]] == [0.0, 0.1]
    held = [id(p) for group in (omega, base) for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in hyper.parameters() if p.requires_grad)
    assert {id(p) for p in base["params"]} == {
        *map(id, hyper.module[0].parameters()),
        *map(id, hyper.hyper_network.base.parameters()),
    }


def test_weights_are_predicted_in_full_precision_under_autocast():
    hyper, gamma = hypernetize(net().float(), 1, hidden=(16, 64)), torch.tensor([0.3])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        weights, out = hyper.hyper_network(gamma), hyper(torch.randn(2, 4), gamma=gamma)
        hyper(torch.randn(2, 4), gamma=gamma.expand(2, 1)).sum().backward()
    assert out.dtype == torch.bfloat16
    expected = hyper.hyper_network(gamma)
    assert all(torch.equal(weights[name], value) for name, value in expected.items())


def test_a_condition_of_another_precision_is_taken():
    assert hypernetize(net(), 1)(torch.ones(2, 4).double(), gamma=torch.tensor([0.3])).dtype == torch.float64
    half = hypernetize(net(), 1).bfloat16()
    assert half(torch.ones(2, 4).bfloat16(), gamma=torch.tensor([0.3])).dtype == torch.bfloat16


def test_attention_may_have_a_condition_for_each_example():
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    hyper = hypernetize(layer, 1, include=("linear*", "self_attn.out*")).double()
    x, gamma = torch.randn(3, 5, 8).double(), torch.rand(3, 1)
    expected = torch.cat([hyper(x[i : i + 1], gamma=gamma[i]) for i in range(3)])
    torch.testing.assert_close(hyper(x, gamma=gamma), expected, rtol=1e-9, atol=1e-9)


def test_it_compiles_as_a_whole_and_once():
    hyper = hypernetize(net().float(), 1)
    compiled, x = torch.compile(hyper, backend="eager", fullgraph=True), torch.randn(2, 4)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for gamma in torch.rand(3, 1):
            hyper.gamma = gamma
            torch.testing.assert_close(compiled(x), hyper(x))


def test_several_outputs_may_have_a_condition_for_each_example():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x, scale):
            return {"sum": self.layer(x), "rest": (x * scale, self.layer(x)[:, 0])}

    hyper, x, gamma = hypernetize(Two(), 1), torch.randn(5, 4), torch.rand(5, 1)
    found = hyper(x, gamma=gamma, scale=2.0)
    loop = [hyper(x[i : i + 1], gamma=gamma[i], scale=2.0) for i in range(5)]
    torch.testing.assert_close(found["sum"], torch.cat([one["sum"] for one in loop]))
    torch.testing.assert_close(found["rest"][0], 2 * x)
    torch.testing.assert_close(found["rest"][1], torch.cat([one["rest"][1] for one in loop]))


# What is refused


@pytest.mark.parametrize(
    ("gamma", "text"),
    [
        ([1.5, 0.5], r"`noise` must be from 0 to 0.5, got 0.75 \(gamma 1.5\)$"),
        ([0.5, -0.5], r"`rate` must be from 0.0001 to 1, got .* \(gamma -0.5\)"),
        ([float("nan"), 2.0], r"`noise` .* got nan \(gamma nan\); `rate` must be from 0.0001 to 1"),
        ([[0.5, 0.5], [float("inf"), 0.5]], r"`noise` must be from 0 to 0.5, got \[0.25, inf\]"),
        ([0.5], r"a condition has 2 numbers, or so many for each example, got shape \(1,\)"),
        (0.5, r"got shape \(\)"),
        ([[[0.5, 0.5]]], r"got shape \(1, 1, 2\)"),
    ],
)
def test_a_condition_that_is_none_is_refused(gamma, text):
    hyper = hypernetize(net(), ConditionSpec().add("noise", 0.0, 0.5).add("rate", 1e-4, 1.0, log=True))
    with pytest.raises(ValueError, match=text):
        hyper(torch.ones(2, 4).double(), gamma=torch.tensor(gamma))
    with pytest.raises(ValueError, match=text):
        hyper.materialize(torch.tensor(gamma))
    hyper.gamma = torch.tensor(gamma)
    with pytest.raises(ValueError, match=text):
        hyper(torch.ones(2, 4).double())


def test_numbers_of_categories_lie_within_the_unit_interval():
    hyper = hypernetize(net(), ConditionSpec().add("task", categories=2))
    with pytest.raises(ValueError, match=r"`task` must be 2 numbers from 0 to 1, got \[0.0, 2.0\]"):
        hyper(torch.ones(2, 4).double(), gamma=torch.tensor([0.0, 2.0]))


def test_a_condition_may_be_vectorised_over():
    hyper, x, gamma = hypernetize(net(), 1).double(), torch.randn(2, 4).double(), torch.rand(5, 1)
    found = torch.func.vmap(lambda g: hyper(x, gamma=g))(gamma)
    torch.testing.assert_close(found, torch.stack([hyper(x, gamma=g) for g in gamma]))


@pytest.mark.parametrize("argument", ["include", "exclude"])
@pytest.mark.parametrize("patterns", ["2.weight", [nn.Linear]])
def test_patterns_are_a_list_of_texts(argument, patterns):
    with pytest.raises(TypeError, match=rf'{argument} must be a list of patterns of names, such as \["head.\*"\]'):
        hypernetize(net(), 1, **{argument: patterns})


def test_every_pattern_must_fit_something():
    for arguments in ({"include": ["2.*", "head.*"]}, {"exclude": ["head.*"]}):
        with pytest.raises(
            ValueError, match=r"no trainable parameter is named like \['head.\*'\]; there are \['0.weight'"
        ):
            hypernetize(net(), 1, **arguments)
    with pytest.raises(ValueError, match=r"no parameter is left of \['2.\*'\] without \['\*'\]"):
        hypernetize(net(), 1, include=["2.*"], exclude=["*"])


def test_what_is_hypernetized_is_not_hypernetized_again():
    with pytest.raises(ValueError, match=r"hypernetized already: \['1'\]; give all conditions in one `ConditionSpec`"):
        hypernetize(nn.Sequential(nn.Linear(1, 1), hypernetize(nn.Linear(1, 1), 1)), 1)
    with pytest.raises(ValueError, match=r"hypernetized already: \['the module itself'\]"):
        hypernetize(hypernetize(nn.Linear(1, 1), 1), 1)


@pytest.mark.parametrize("conditions", [0, -1, 1.5, True, "noise"])
def test_conditions_are_a_number_or_a_spec(conditions):
    with pytest.raises(ValueError, match=f"positive integer or a `ConditionSpec`, got {conditions!r}"):
        hypernetize(net(), conditions)


def test_a_condition_may_be_called_gamma():
    hyper = hypernetize(net(), ConditionSpec().add("gamma", 0.0, 5.0))
    x = torch.ones(2, 4).double()
    torch.testing.assert_close(hyper.materialize(gamma=2.5)(x), hyper(x, gamma=torch.tensor([0.5])))


def test_outputs_are_those_of_the_papers_code():
    hyperlight = pytest.importorskip("hyperlight", reason="hyperlight, the paper's code, is in the extra `peers`")
    ours, plain = hypernetize(net(), 2, hidden=(16, 32)).double(), net()
    theirs = hyperlight.hypernetize(plain, modules=[plain[0], plain[2]])
    predictor = hyperlight.HyperNet({"gamma": (2,)}, theirs.external_shapes(), [16, 32]).double()
    last = predictor.backbone.output
    with torch.no_grad():
        for parameter in predictor.parameters():  # zeros would hide a mistake
            parameter.add_(0.1 * torch.randn_like(parameter))
        layers = [
            [part for part in parts if isinstance(part, nn.Linear)]
            for parts in (ours.hyper_network.body, predictor.backbone)
        ]
        for mine, other in zip(*layers, strict=False):
            mine.load_state_dict(other.state_dict())
        for name, (first, size) in predictor.output_offsets().items():
            key = name.replace(".", "/")
            ours.hyper_network.heads[key].weight.copy_(last.weight[first : first + size])
            ours.hyper_network.base[key].copy_(last.bias[first : first + size].view(theirs.external_shapes()[name]))
    x = torch.randn(5, 4).double()
    for gamma in (*torch.rand(4, 2).double(), torch.zeros(2).double(), torch.ones(2).double()):
        with theirs.using_externals(predictor(gamma=gamma)):
            expected = theirs(x)
        torch.testing.assert_close(ours(x, gamma=gamma), expected, rtol=1e-12, atol=1e-12)
