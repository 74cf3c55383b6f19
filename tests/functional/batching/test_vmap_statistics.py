"""Per-sample statistics by vmap against autograd, one sample at a time."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_hpo.functional.batching import vmap_statistics
from lightning_hpo.functional.batching.vmap_statistics import per_sample_statistics

N = 7


class Net(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 4), *layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def setting(*layers: nn.Module):
    net = Net(*layers).double()
    x, y = torch.randn(N, 2, 4, 4, dtype=torch.float64), torch.randint(0, 4, (N,))

    def loss(params, batch):
        return F.cross_entropy(torch.func.functional_call(net, params, (batch["x"],)), batch["more"][0])

    return net, loss, dict(net.named_parameters()), {"x": x, "more": (y, "a name", 3, torch.tensor(1.0))}


def twin(loss, params, batch) -> dict[str, Tensor]:
    rows = []
    for i in range(N):
        sample = {"x": batch["x"][i : i + 1], "more": (batch["more"][0][i : i + 1],)}
        rows.append(torch.autograd.grad(loss(params, sample), list(params.values())))
    return {name: torch.stack(row) for name, row in zip(params, zip(*rows, strict=True), strict=True)}


@pytest.mark.parametrize("chunk_size", [1, 3, 7, 100])
@pytest.mark.parametrize("max_samples", [None, 5, 50])
def test_statistics_are_those_of_single_samples(chunk_size, max_samples):
    _, loss, params, batch = setting()
    rows = {name: row[:max_samples] for name, row in twin(loss, params, batch).items()}
    gradients = {name: torch.randn_like(p) for name, p in params.items()}
    found = per_sample_statistics(loss, params, batch, chunk_size, gradients, moments=True, max_samples=max_samples)
    close = {"rtol": 1e-10, "atol": 1e-12}
    torch.testing.assert_close(found.squared_norms, sum(r.flatten(1).square().sum(1) for r in rows.values()), **close)
    inner = sum(rows[name].flatten(1) @ gradients[name].flatten() for name in rows)
    torch.testing.assert_close(found.inner_products, inner, **close)
    for name, row in rows.items():
        torch.testing.assert_close(found.gradient_sum[name], row.sum(0), **close)
        torch.testing.assert_close(found.second_moments[name], row.square().sum(0), **close)


def test_what_is_not_asked_for_is_not_there():
    _, loss, params, batch = setting()
    found = per_sample_statistics(loss, params, batch)
    assert found.inner_products is None
    assert found.second_moments is None
    assert not found.squared_norms.requires_grad
    alone = per_sample_statistics(loss, params, batch, sums=False)
    assert alone.gradient_sum is None
    assert torch.equal(alone.squared_norms, found.squared_norms)
    assert "conv" not in repr(found)


def test_gradients_that_are_missing_count_as_zero():
    _, loss, params, batch = setting()
    (name, p), *_ = params.items()
    found = per_sample_statistics(loss, params, batch, gradients={name: torch.ones_like(p)})
    torch.testing.assert_close(found.inner_products, twin(loss, params, batch)[name].flatten(1).sum(1))


def test_no_more_gradients_than_a_chunk_are_held(monkeypatch):
    _, loss, params, batch = setting()
    sizes = []
    add = vmap_statistics._Sums.add
    monkeypatch.setattr(
        vmap_statistics._Sums,
        "add",
        lambda self, chunk: (sizes.append(len(next(iter(chunk.values())))), add(self, chunk)),
    )
    per_sample_statistics(loss, params, batch, chunk_size=3)
    assert sizes == [3, 3, 1]


def test_samples_draw_different_dropout():
    _, loss, params, batch = setting(nn.Dropout(0.5))
    batch["x"][:] = batch["x"][:1].clone()
    batch["more"][0][:] = 0
    norms = per_sample_statistics(loss, params, batch).squared_norms
    assert len(set(norms.tolist())) > 1


def test_fused_attention_does_not_warn():
    def loss(params, batch):
        return F.scaled_dot_product_attention(batch * params["w"], batch, batch).square().sum()

    x = torch.randn(4, 2, 3, 8)
    found = per_sample_statistics(loss, {"w": torch.ones(8)}, x)
    assert torch.isfinite(found.squared_norms).all()


def test_half_precision_is_summed_in_single():
    x = torch.full((3, 4), 300.0, dtype=torch.float16)  # squares do not fit into float16
    found = per_sample_statistics(lambda p, b: (p["w"] * b).sum(), {"w": torch.zeros(4, dtype=torch.float16)}, x)
    assert found.squared_norms.tolist() == pytest.approx([360000.0] * 3)


class Branch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


@pytest.mark.parametrize(
    ("layer", "place"),
    [
        (nn.BatchNorm1d(4), r"in `body.4` \(`BatchNorm1d`\)"),
        (Branch(), r"in `body.4` \(`Branch`\)"),
    ],
)
def test_what_vmap_cannot_do_is_said_with_its_place(layer, place):
    _, loss, params, batch = setting(layer)
    with pytest.raises(RuntimeError, match=f"sample by sample {place}: .*from layer rules or from micro-batches"):
        per_sample_statistics(loss, params, batch)


def test_a_loss_without_modules_has_no_place():
    with pytest.raises(RuntimeError, match=r"sample by sample: .*item"):
        per_sample_statistics(lambda p, b: (p["w"] * b).sum() * b.sum().item(), {"w": torch.ones(1)}, torch.ones(3, 1))


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ((torch.zeros(3, 1), torch.zeros(2)), r"must agree on their first dimension, the samples; it is \[2, 3\]"),
        (torch.zeros(0, 1), "must agree"),
        (["a", 2], "no tensors with samples, only `int`, `str`"),
        (torch.tensor(1.0), "no tensors with samples, only `Tensor`"),
        ([], "no tensors with samples, only nothing"),
    ],
)
def test_batches_without_samples_are_refused(batch, message):
    with pytest.raises(ValueError, match=message):
        per_sample_statistics(lambda p, b: p["w"].sum(), {"w": torch.ones(1)}, batch)


def test_all_wrong_limits_are_named():
    with pytest.raises(
        ValueError, match="chunk_size must be at least 1, got 0; max_samples must be at least 1, got -1"
    ):
        per_sample_statistics(lambda p, b: b.sum(), {}, torch.zeros(1, 1), chunk_size=0, max_samples=-1)
