"""Masked attention against its definition, against slicing, and far from comfortable numbers."""

import pytest
import torch
import torch.nn.functional as F

from lightning_hpo.functional.compression import masked_attention as module
from lightning_hpo.functional.compression.masked_attention import _spare_columns, masked_attention, masked_softmax


@pytest.fixture(params=["cpu", "gpu"], autouse=True)
def _layout(request, monkeypatch):
    """The layout of either kind of device, wherever the test runs."""
    monkeypatch.setattr(
        module,
        "_spare_columns",
        lambda width, _: _spare_columns(width, torch.device({"cpu": "cpu", "gpu": "cuda"}[request.param])),
    )


def problem(dtype=torch.float64, tokens=7, width=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (torch.randn(2, 3, tokens, width, generator=generator, dtype=torch.float64) for _ in range(3))
    mask = (torch.rand(2, tokens, generator=generator, dtype=torch.float64) > 0.4).double()
    mask[:, 0] = 1
    bias = torch.rand(2, tokens, generator=generator, dtype=torch.float64)
    return [t.to(dtype) for t in (query, key, value, mask, bias)]


def by_definition(query, key, value, mask, bias, scale=None):
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    logits = query @ key.transpose(-2, -1) * scale + bias[:, None, None, :]
    return masked_softmax(logits, mask, eps=0.0) @ value


def softmax_by_loops(logits, mask, eps):
    batch, heads, tokens, _ = logits.shape
    weights = torch.zeros_like(logits)
    for b in range(batch):
        for h in range(heads):
            for j in range(tokens):
                row = logits[b, h, j]
                e = [(row[k] - row.max()).exp() * (1.0 if j == k else mask[b, k]) for k in range(tokens)]
                for k in range(tokens):
                    weights[b, h, j, k] = (e[k] + eps / tokens) / (sum(e) + eps)
    return weights


@pytest.mark.parametrize("eps", [0.0, 1e-6, 0.1])
def test_masked_softmax_equals_the_loops(eps):
    logits, mask = torch.randn(2, 2, 5, 5).double() * 3, torch.rand(2, 5).double()
    weights = masked_softmax(logits, mask, eps)
    torch.testing.assert_close(weights, softmax_by_loops(logits, mask, eps))
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, 5).double())


@pytest.mark.parametrize("eps", [0.0, 1e-6])
def test_masked_softmax_gradcheck_in_a_continuous_mask(eps):
    logits, mask = torch.randn(1, 2, 4, 4).double(), torch.rand(1, 4).double() + 0.1
    logits.requires_grad_()
    mask.requires_grad_()
    assert torch.autograd.gradcheck(lambda m: masked_softmax(logits.detach(), m, eps), (mask,))
    assert torch.autograd.gradcheck(lambda a, m: masked_softmax(a, m, eps), (logits, mask))


def test_masked_softmax_without_smoothing_equals_slicing():
    logits = torch.randn(2, 2, 6, 6)
    mask = torch.tensor([1.0, 0, 1, 1, 0, 1]).expand(2, 6)
    living = mask[0] > 0
    sliced = logits[..., living, :][..., living].softmax(-1)
    torch.testing.assert_close(masked_softmax(logits, mask, 0.0)[..., living, :][..., living], sliced)


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("width", [4, 6, 13, 16])
def test_masked_attention_equals_its_definition(width, scale):
    for continuous in (False, True):
        query, key, value, mask, bias = problem(width=width)
        mask = torch.rand_like(mask) if continuous else mask
        out = masked_attention(query, key, value, mask, bias, scale)
        torch.testing.assert_close(out, by_definition(query, key, value, mask, bias, scale))


def test_gradients_for_zero_one_masks_where_living_tokens_are_read():
    inputs, twins = ([t.requires_grad_() for t in problem()] for _ in range(2))
    read = torch.randn(2, 3, 7, 5).double() * inputs[3].detach()[:, None, :, None]
    (masked_attention(*inputs) * read).sum().backward()
    (by_definition(*twins) * read).sum().backward()
    for name, first, second in zip(("query", "key", "value", "mask", "bias"), inputs, twins, strict=True):
        torch.testing.assert_close(first.grad, second.grad, msg=lambda text, name=name: f"{name}: {text}")
        assert second.grad.abs().max() > 1e-3


def test_gradient_in_the_mask_for_any_mask_and_any_reader():
    *rest, _, bias = problem()
    mask = torch.rand(2, 7).double().requires_grad_()
    read = torch.randn(2, 3, 7, 5).double()
    slopes = [
        torch.autograd.grad((f(*rest, mask, bias) * read).sum(), mask)[0] for f in (masked_attention, by_definition)
    ]
    torch.testing.assert_close(*slopes)


def test_zero_one_masks_equal_slicing_with_the_size_bias():
    query, key, value, mask, bias = problem()
    out = masked_attention(query, key, value, mask, bias)
    for b in range(2):
        living = mask[b] > 0
        q, k, v = (t[b : b + 1, :, living] for t in (query, key, value))
        sliced = F.scaled_dot_product_attention(q, k, v, attn_mask=bias[b, living].expand(1, 1, 1, -1))
        torch.testing.assert_close(out[b : b + 1, :, living], sliced)


@pytest.mark.parametrize(("dtype", "error"), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_half_precision_is_off_by_its_own_rounding(dtype, error):
    query, key, value, mask, bias = problem(torch.float32, tokens=40, width=16)
    query, key, value = (t.to(dtype) for t in (query, key, value))
    out = masked_attention(query, key, value, mask, bias)
    assert out.dtype == dtype
    exact = by_definition(query.double(), key.double(), value.double(), mask.double(), bias.double())
    living = mask[:, None, :, None].double()
    assert ((out - exact) * living).abs().max() < error


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shift", [-300.0, -30.0, 30.0, 300.0])
def test_logits_far_from_zero(shift, dtype):
    """A constant added to all logits of a row changes nothing, whichever way and however far."""
    query, key, value, mask, bias = problem(torch.float32, tokens=12, width=8)
    far = torch.full_like(query[..., :1], shift)
    query, key, value = (torch.cat([t, last], -1) for t, last in ((query, far / far), (key, far), (value, far / far)))
    query, key, value = (t.to(dtype) for t in (query, key, value))
    out = masked_attention(query, key, value, mask, bias, scale=1.0)
    exact = by_definition(*(t.double() for t in (query, key, value, mask, bias)), scale=1.0)
    living = mask[:, None, :, None].double()
    assert torch.isfinite(out).all()
    assert ((out - exact) * living).abs().max() < {torch.float32: 1e-3}.get(dtype, 5e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_dead_token_that_would_dominate_gives_finite_values_and_bounded_slopes(dtype):
    query, key, value, mask, bias = problem(torch.float32, tokens=6, width=8)
    mask[:, 2], mask[:, 3] = 1, 0
    key[:, :, 3] = 40 * query.mean((1, 2))[:, None]
    query, key, value = (t.to(dtype).requires_grad_() for t in (40 * query, key, value))
    mask.requires_grad_()
    out = masked_attention(query, key, value, mask, bias)
    out.float().square().sum().backward()
    for tensor in (out, query.grad, key.grad, value.grad, mask.grad):
        assert torch.isfinite(tensor).all()
    assert mask.grad.abs().max() < 1e8


def test_no_square_matrix_is_kept_for_the_backward_pass():
    saved = []
    inputs = [t.requires_grad_() for t in problem(torch.float32, tokens=50, width=8)]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        masked_attention(*inputs).sum().backward()
    assert saved
    assert not [shape for shape in saved if shape[-2:] in ((50, 50), (50, 51))]


def test_columns_are_a_multiple_of_eight_where_fused_kernels_want_it():
    for width in (1, 6, 32, 64, 65):
        assert (width + _spare_columns(width, torch.device("cuda"))) % 8 == 0
        assert _spare_columns(width, torch.device("cuda")) < 8
        assert _spare_columns(width, torch.device("cpu")) == 0
