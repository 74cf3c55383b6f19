"""Hooks on whole modules against autograd, one sample at a time."""

import copy
import gc
import pickle
import weakref
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lightning_hpo.stateless import PerSampleGradients

N = 6


class Words(nn.Module):
    """A text classifier: embedding, position embedding, norms, attention."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(7, 8, padding_idx=0), nn.Embedding(5, 8)
        self.norm, self.mix = nn.LayerNorm(8), nn.Linear(8, 8)
        self.final, self.head = nn.RMSNorm(8), nn.Linear(8, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.words(tokens) + self.places(torch.arange(5, device=tokens.device).expand_as(tokens))
        query = self.mix(self.norm(x))
        x = x + torch.softmax(query @ x.mT, -1) @ x
        return self.head(self.final(x).mean(1))


class Shared(nn.Module):
    """One layer three times in a pass, and a norm twice; one module under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm, self.head = nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 3)
        self.again = self.inner

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.norm(self.inner(x)))
        return self.head(torch.tanh(self.norm(self.again(x))) + self.inner(x.flip(-1)))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 16, 3, padding=1, stride=2),
        nn.GroupNorm(2, 16),
        nn.ReLU(inplace=True),
        nn.Conv2d(16, 8, 3, padding="same", dilation=2, groups=2),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 8, 2),
        nn.InstanceNorm2d(8, affine=True),
        nn.Flatten(),
        nn.Linear(72, 3),
    )


def vit() -> nn.Module:
    return VisionTransformer(
        img_size=8, patch_size=4, in_chans=2, num_classes=3, embed_dim=16, depth=2, num_heads=2, init_values=0.5
    )


def sequences() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.GELU(), nn.Conv1d(3, 6, 2, bias=False), nn.Flatten(), nn.Linear(24, 3))


MODULES: dict[str, tuple[Any, Any]] = {
    "mlp": (
        lambda: nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3, bias=False)),
        lambda: torch.randn(N, 5),
    ),
    "cnn": (cnn, lambda: torch.randn(N, 2, 8, 8)),
    "words": (Words, lambda: torch.randint(0, 7, (N, 5))),
    "vit": (vit, lambda: torch.randn(N, 2, 8, 8)),
    "shared": (Shared, lambda: torch.randn(N, 6)),
    "sequences": (sequences, lambda: torch.randn(N, 3, 4)),
}


def made(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    net = MODULES[name][0]().double()
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.5)
    x = MODULES[name][1]()
    return net, x.double() if x.is_floating_point() else x, torch.randint(0, 3, (N,))


def twin(net: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Each sample's contribution to the gradient of the mean loss; nothing for frozen parameters."""
    named = {name: p for name, p in net.named_parameters() if p.requires_grad}
    rows = []
    for i in range(len(x)):
        loss = F.cross_entropy(net(x[i : i + 1]), y[i : i + 1]) / len(x)
        rows.append(torch.autograd.grad(loss, list(named.values()), materialize_grads=True))
    return {name: torch.stack(row) for name, row in zip(named, zip(*rows, strict=True), strict=True)}


def norms(rows: dict[str, Tensor], names: tuple[str, ...]) -> Tensor:
    return sum((rows[name].flatten(1).square().sum(1) for name in names), torch.zeros(()))


def step(net: nn.Module, x: Tensor, y: Tensor) -> None:
    F.cross_entropy(net(x), y).backward()


EXACT = {"rtol": 1e-10, "atol": 1e-12}


@pytest.mark.parametrize("name", MODULES)
def test_norms_are_those_of_single_samples(name):
    net, x, y = made(name)
    rows = twin(net, x, y)
    with PerSampleGradients(net) as samples:
        step(net, x, y)
        torch.testing.assert_close(samples.take(), norms(rows, samples.covered), **EXACT)
        step(net, x[:4], y[:4])  # another batch, another size
        torch.testing.assert_close(samples.take(), norms(twin(net, x[:4], y[:4]), samples.covered), **EXACT)


@pytest.mark.parametrize("name", MODULES)
def test_kept_factors_answer_every_question(name):
    net, x, y = made(name)
    rows = twin(net, x, y)
    with PerSampleGradients(net, keep=True) as samples:
        step(net, x, y)
        gradients = {n: p.grad for n, p in net.named_parameters()}
        names = samples.covered
        inner = sum(rows[n].flatten(1) @ gradients[n].flatten() for n in names)
        weights = torch.randn(N)
        torch.testing.assert_close(samples.inner_products(gradients), inner, **EXACT)
        torch.testing.assert_close(samples.take(), norms(rows, names), **EXACT)
        moments, total = samples.second_moments(), samples.weighted_sum(weights)
        assert tuple(moments) == tuple(total) == names
        for n in names:
            torch.testing.assert_close(moments[n], rows[n].square().sum(0), **EXACT)
            torch.testing.assert_close(total[n], torch.tensordot(weights.double(), rows[n], 1), **EXACT)
            torch.testing.assert_close(samples.weighted_sum(torch.ones(N))[n], gradients[n], **EXACT)
        few = {n: gradients[n] for n in names[:1]}
        torch.testing.assert_close(
            samples.inner_products(few), rows[names[0]].flatten(1) @ gradients[names[0]].flatten(), **EXACT
        )


def test_the_users_gradients_do_not_change():
    net, x, y = made("cnn")
    step(net, x, y)
    plain = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    with PerSampleGradients(net, keep=True):
        step(net, x, y)
    assert all(torch.equal(p.grad, g) for p, g in zip(net.parameters(), plain, strict=True))


@pytest.mark.parametrize("keep", [False, True])
def test_the_first_samples_only(keep):
    net, x, y = made("cnn")
    rows = {name: row[:2] for name, row in twin(net, x, y).items()}
    with PerSampleGradients(net, max_samples=2, keep=keep) as samples:
        step(net, x, y)
        torch.testing.assert_close(samples.take(), norms(rows, samples.covered), **EXACT)
    with PerSampleGradients(net, max_samples=100, keep=keep) as samples:
        step(net, x, y)
        assert samples.take().shape == (N,)


def test_frozen_parameters_do_not_count():
    net, x, y = made("words")
    with PerSampleGradients(net) as samples:
        for frozen in (net.norm.weight, net.mix.bias, net.head.weight, net.head.bias):
            frozen.requires_grad_(False)  # also after the hooks are there
        rows = twin(net, x, y)
        step(net, x, y)
        assert samples.covered == tuple(rows)
        torch.testing.assert_close(samples.take(), norms(rows, samples.covered), **EXACT)
        net.head.weight.requires_grad_(True)
        rows = twin(net, x, y)
        step(net, x, y)
        torch.testing.assert_close(samples.take(), norms(rows, tuple(rows)), **EXACT)


def test_passes_without_gradients_and_switched_off_ones_are_not_seen():
    net, x, y = made("cnn")
    rows = twin(net, x, y)
    with PerSampleGradients(net, keep=True) as samples:
        step(net, x, y)
        with torch.no_grad():
            net.eval()(x[:2])
        with torch.inference_mode():
            net.train()(x[:3])
        samples.enabled = False
        step(net, x[:2], y[:2])
        samples.enabled = True
        torch.testing.assert_close(samples.take(), norms(rows, samples.covered), **EXACT)
        assert samples.take() is samples.take()  # as often as one likes, worked out once
        step(net, x[:2], y[:2])  # the next pass takes the place of this one
        assert samples.take().shape == (2,)
        samples.clear()
        with pytest.raises(RuntimeError, match="no gradient has arrived"):
            samples.take()


def test_a_pass_that_nobody_took_gives_way_to_the_next():
    net, x, y = made("shared")
    with PerSampleGradients(net) as samples:
        step(net, x[:3], y[:3])
        loss = F.cross_entropy(net(x), y)  # a forward pass without a backward one stays alive
        loss.backward()
        torch.testing.assert_close(samples.take(), norms(twin(net, x, y), samples.covered), **EXACT)


def test_two_forward_passes_over_the_same_samples_add_up():
    net, x, y = made("mlp")
    with PerSampleGradients(net) as samples:
        (F.cross_entropy(net(x), y) + F.cross_entropy(net(2 * x), y)).backward()
        found = samples.take()
    first, second = twin(net, x, y), twin(net, 2 * x, y)
    torch.testing.assert_close(found, norms({n: first[n] + second[n] for n in first}, samples.covered), **EXACT)


def test_a_call_that_the_loss_does_not_use():
    net, x, y = made("mlp")
    with PerSampleGradients(net) as samples:
        unused = net(torch.randn_like(x))
        step(net, x, y)
        torch.testing.assert_close(samples.take(), norms(twin(net, x, y), samples.covered), **EXACT)
        assert unused.requires_grad


def test_the_same_graph_twice_needs_the_switch():
    net, x, y = made("mlp")
    with PerSampleGradients(net) as samples:
        loss = F.cross_entropy(net(x), y, reduction="none")
        loss.mean().backward(retain_graph=True)
        found = samples.take()
        samples.enabled = False
        (found * loss).sum().backward(retain_graph=True)
        samples.enabled = True
        with pytest.raises(RuntimeError, match="set `enabled` to False"):
            loss.mean().backward()
    torch.testing.assert_close(found, norms(twin(net, x, y), samples.covered), **EXACT)


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_of_activations(reentrant, keep):
    net, x, y = made("shared")
    rows = twin(net, x, y)

    def run(images: Tensor) -> Tensor:
        return checkpoint(net, images, use_reentrant=reentrant)

    with PerSampleGradients(net, keep=keep) as samples:
        for _ in range(2):
            F.cross_entropy(run(x.clone().requires_grad_()), y).backward()
            torch.testing.assert_close(samples.take(), norms(rows, samples.covered), **EXACT)


def test_checkpointing_still_saves_memory():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    seen: list[StorageWeakRef] = []
    net[1].register_forward_pre_hook(lambda _, args: seen.append(StorageWeakRef(args[0].untyped_storage())))
    with PerSampleGradients(net):
        loss = checkpoint(net, torch.ones(2, 4, requires_grad=True), use_reentrant=False).sum()
        gc.collect()
        assert seen[0].expired()
        loss.backward()


@pytest.mark.parametrize("keep", [False, True])
def test_nothing_is_held_after_the_backward_pass(keep):
    net, x, y = made("cnn")
    alive: list[StorageWeakRef] = []
    for layer in net:
        layer.register_forward_hook(lambda _, args, output: alive.append(StorageWeakRef(args[0].untyped_storage())))
    with PerSampleGradients(net, keep=keep) as samples:
        x = x.clone()
        loss = F.cross_entropy(net(x), y)
        loss.backward()
        del x
        gc.collect()
        assert any(not storage.expired() for storage in alive) == keep
        samples.take()
        samples.clear()
        gc.collect()
        assert loss.grad_fn is not None  # the user may hold the loss for as long as they like
        assert all(storage.expired() for storage in alive)


def test_a_forward_pass_without_a_backward_one_holds_nothing():
    net, x, _ = made("mlp")
    alive: list[StorageWeakRef] = []
    net[1].register_forward_hook(lambda _, args, output: alive.append(StorageWeakRef(output.untyped_storage())))
    with PerSampleGradients(net):
        net(x)
        gc.collect()
        assert alive[0].expired()


def test_hooks_are_gone_afterwards_and_with_their_owner():
    net, x, y = made("mlp")
    samples = PerSampleGradients(net).attach()
    with pytest.raises(RuntimeError, match="attached already"):
        samples.attach()
    samples.remove()
    assert not any(layer._forward_hooks for layer in net.modules())
    owner = weakref.ref(PerSampleGradients(net).attach())
    gc.collect()
    assert owner() is None
    step(net, x, y)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net)), copy.copy])
def test_copies_made_meanwhile_work_and_are_not_watched(copied):
    net, x, y = made("mlp")
    net = net[0]
    with PerSampleGradients(net) as samples:
        step(net, x, y)
        other = copied(net)
        step(other, x[:2], y[:2])
        assert samples.take().shape == (N,)
    step(other, x, y)


def test_what_is_not_covered_is_named_with_the_reason():
    net = nn.Module()
    net.embed, net.head, net.norm = nn.Embedding(5, 4), nn.Linear(4, 5), nn.BatchNorm1d(4)
    net.scale, net.frozen = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(1), requires_grad=False)
    net.head.weight = net.embed.weight
    net.attention = nn.MultiheadAttention(4, 2)
    samples = PerSampleGradients(net)
    assert samples.covered == ("head.bias",)
    assert samples.uncovered == {
        "scale": "it belongs to `Module`, which has no rule",
        "embed.weight": "it is one tensor with `head.weight`",
        "norm.weight": "it belongs to `BatchNorm1d`, which has no rule",
        "norm.bias": "it belongs to `BatchNorm1d`, which has no rule",
        "attention.in_proj_weight": "it belongs to `MultiheadAttention`, which has no rule",
        "attention.in_proj_bias": "it belongs to `MultiheadAttention`, which has no rule",
        "attention.out_proj.weight": "`MultiheadAttention` uses it without calling its layer",
        "attention.out_proj.bias": "`MultiheadAttention` uses it without calling its layer",
    }


def test_a_vision_transformer_lacks_two_parameters():
    assert set(PerSampleGradients(vit()).uncovered) == {"cls_token", "pos_embed"}


def test_a_layer_that_does_not_count_samples_first_is_named():
    net = nn.ModuleDict({"place": nn.Embedding(4, 3), "head": nn.Linear(3, 1)})
    x = torch.randn(N, 4, 3)
    with PerSampleGradients(net) as samples:
        loss = net["head"](x + net["place"](torch.arange(4))).sum()
        with pytest.raises(RuntimeError, match="`place` maps 4 rows to 4, but the batch has 6 samples"):
            loss.backward()
        assert samples.enabled


def test_an_input_that_is_overwritten_is_noticed():
    net = nn.Linear(3, 3)
    with PerSampleGradients(net):
        x = torch.randn(N, 3)
        loss = net(x).sum()
        x.zero_()
        with pytest.raises(RuntimeError, match="inplace operation"):
            loss.backward()


@pytest.mark.parametrize("backward_inside", [False, True])
@pytest.mark.parametrize("name", ["mlp", "cnn", "words", "vit"])
def test_bfloat16_autocast(name, backward_inside):
    net, x, y = made(name)
    net, x = net.float(), x.float() if x.is_floating_point() else x
    exact = norms(twin(net, x, y), PerSampleGradients(net).covered)
    with PerSampleGradients(net) as samples:
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(net(x), y)
            if backward_inside:
                loss.backward()
        if not backward_inside:
            loss.backward()
        found = samples.take()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, exact, rtol=0.1, atol=0.02 * exact.max().item())


def test_autocast_norms_are_exact_for_the_rounded_numbers():
    net, x, y = nn.Linear(64, 64, bias=False), torch.randn(N, 9, 64), torch.randn(N, 9, 64)
    with PerSampleGradients(net) as samples, torch.autocast("cpu", torch.bfloat16):
        (net(x) * y.bfloat16()).sum().backward()  # also the backward pass, where products would be rounded
        found = samples.take()
    a, b = x.bfloat16().double(), y.bfloat16().double()
    torch.testing.assert_close(found.double(), (b.mT @ a).square().sum((1, 2)), rtol=1e-5, atol=0)


def test_a_compiled_module_is_refused():
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    net[1].compile()
    with pytest.raises(RuntimeError, match="compiled modules .*: 1$"):
        PerSampleGradients(net).attach()
    with pytest.raises(RuntimeError, match="compiled modules .*: the module itself"):
        PerSampleGradients(torch.compile(nn.Linear(2, 2))).attach()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # the compiler looks at it
def test_a_module_that_is_compiled_later_is_watched():
    net, x, y = made("mlp")
    with PerSampleGradients(net) as samples:
        step(torch.compile(net, backend="eager"), x, y)
        torch.testing.assert_close(samples.take(), norms(twin(net, x, y), samples.covered), **EXACT)


def test_hooks_do_not_look_into_transforms():
    net, x, _ = made("mlp")
    parameters = dict(net.named_parameters())

    def loss(values: dict[str, Tensor], sample: Tensor) -> Tensor:
        return torch.func.functional_call(net, values, (sample,)).sum()

    with PerSampleGradients(net) as samples:
        torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
        with pytest.raises(RuntimeError, match="no gradient has arrived"):
            samples.take()


def test_keyword_inputs():
    net = nn.Linear(3, 2)
    with PerSampleGradients(net) as samples:
        net(input=torch.ones(2, 3)).sum().backward()
        assert samples.take().tolist() == pytest.approx([8.0, 8.0])


@pytest.mark.parametrize("wrong", [0, -1])
def test_max_samples_is_positive(wrong):
    with pytest.raises(ValueError, match=f"max_samples must be at least 1, got {wrong}"):
        PerSampleGradients(nn.Linear(1, 1), max_samples=wrong)


def test_questions_need_what_is_kept():
    with PerSampleGradients(nn.Linear(1, 1)) as samples, pytest.raises(RuntimeError, match="keep=True"):
        samples.second_moments()
    with PerSampleGradients(nn.Linear(1, 1), keep=True) as samples, pytest.raises(RuntimeError, match="no gradient"):
        samples.second_moments()


def test_layers_that_the_loss_leaves_out_have_zeros():
    net = nn.ModuleList([nn.Linear(2, 1), nn.Linear(2, 1)])
    with PerSampleGradients(net, keep=True) as samples:
        net[0](torch.ones(3, 2)).sum().backward()
        moments = samples.second_moments()
        assert [moment.sum().item() for moment in moments.values()] == [6.0, 3.0, 0.0, 0.0]
