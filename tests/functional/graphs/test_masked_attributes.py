"""The draw of masked nodes and the cosine error."""

import pytest
import torch
from torch.autograd import gradcheck
from torch.nn import functional as F

from lightning_hpo.functional.graphs.masked_attributes import draw_mask, scaled_cosine_errors


@pytest.mark.parametrize(
    ("nodes", "rate", "replace"), [(10, 0.5, 0.0), (101, 0.3, 0.1), (7, 0.99, 0.5), (50, 0.5, 0.01)]
)
def test_counts_are_exact(nodes, rate, replace):
    mask = draw_mask(nodes, rate, replace)
    assert len(mask.masked) == int(rate * nodes)
    assert len(mask.replaced) == len(mask.sources) == int(replace * len(mask.masked))
    assert len(mask.tokens) + len(mask.replaced) == len(mask.masked)  # with none replaced, all show the token
    assert len({*mask.tokens.tolist(), *mask.replaced.tolist()}) == len(mask.masked)
    assert len(mask.sources) == 0 or int(mask.sources.max()) < nodes


def test_draws_follow_the_generator():
    draws = [draw_mask(30, 0.5, 0.2, torch.Generator().manual_seed(seed)) for seed in (3, 3, 4)]
    assert all(map(torch.equal, draws[0], draws[1]))
    assert not torch.equal(draws[0].masked, draws[2].masked)


def test_every_node_is_masked_as_often_as_any_other():
    generator = torch.Generator().manual_seed(0)
    counts = sum(torch.zeros(8).index_fill(0, draw_mask(8, 0.25, 0.0, generator).masked, 1) for _ in range(4000))
    torch.testing.assert_close(counts / 4000, torch.full((8,), 0.25), rtol=0, atol=0.03)


def test_all_wrong_rates_are_named():
    with pytest.raises(ValueError, match=r"mask_rate must lie between 0 and 1, got 1.0; replace_rate must be"):
        draw_mask(10, 1.0, -0.1)
    with pytest.raises(ValueError, match="masks 0 of 3 nodes: some must be masked and some kept"):
        draw_mask(3, 0.2)


def mean(*arguments):
    error, rows = scaled_cosine_errors(*arguments)
    return error / rows


def test_cosine_error_in_closed_form():
    y, z = torch.randn(2, 6, 5, dtype=torch.float64)
    torch.testing.assert_close(mean(z, y, 1.0), 1 - F.cosine_similarity(z, y).mean())
    for gamma in (1.0, 2.0, 3.0):
        assert mean(y, y, gamma).item() == pytest.approx(0, abs=1e-12)
        assert mean(3 * y, y, gamma).item() == pytest.approx(0, abs=1e-12)  # lengths do not matter
        assert mean(-y, y, gamma).item() == pytest.approx(2**gamma)
    torch.testing.assert_close(mean(z, y, 3.0), ((1 - F.cosine_similarity(z, y)) ** 3).mean())


def test_rows_without_attributes_do_not_count():
    y, z = torch.randn(2, 4, 5, dtype=torch.float64)
    y[1:3] = 0
    error, rows = scaled_cosine_errors(z.requires_grad_(), y, 2.0)
    assert rows == 2
    torch.testing.assert_close(error, scaled_cosine_errors(z[[0, 3]], y[[0, 3]], 2.0)[0])
    error.backward()
    assert z.grad[1:3].abs().sum() == 0
    assert z.grad.isfinite().all()


def test_slope_is_that_of_finite_differences():
    y, z = torch.randn(2, 3, 4, dtype=torch.float64)
    for gamma in (1.0, 1.5, 3.0):
        assert gradcheck(lambda z, gamma=gamma: scaled_cosine_errors(z, y, gamma)[0], z.requires_grad_())


def test_half_precision_is_computed_in_float32():
    y = torch.randn(5, 300)
    error, _ = scaled_cosine_errors(y.bfloat16(), y, 1.0)
    assert error.dtype == torch.float32
    assert error.item() < 1e-3
