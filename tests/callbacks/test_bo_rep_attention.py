"""A transformer in an ordinary loop: fused attention has no second derivative, on the CPU neither.

It needs one as soon as attention has inner parameters; with a head alone as inner problem the first is enough.
"""

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, TensorDataset

from lightning_hpo import SingleLoopMixin
from lightning_hpo.functional.bilevel.bo_rep import SingleLoopBilevel
from lightning_hpo.functional.bilevel.outer_gradient import outer_gradient
from lightning_hpo.functional.bilevel.problem import Problem
from lightning_hpo.functional.bilevel.second_derivatives import SecondDerivativesMissingError
from lightning_hpo.testing import tiny_trainer


def sentences(samples, seed):
    """Numbers between 2 and 9, padded with 0; the label is whether 3 occurs more often than 4."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(2, 10, (samples, 9), generator=generator)
    lengths = torch.randint(4, 10, (samples, 1), generator=generator)
    words = words.masked_fill(torch.arange(9) >= lengths, 0)
    return words, ((words == 3).sum(1) > (words == 4).sum(1)).long()


class Reader(SingleLoopMixin, LightningModule):
    """The embedding is outer, and `nn.TransformerEncoder` too if it says so; a linear head is inner."""

    def __init__(self, outer, backends=None, dropout=0.1, **arguments):
        super().__init__(**arguments)
        torch.manual_seed(0)
        self.outer, self.backends = outer, backends
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=dropout, batch_first=True)
        self.embedding = nn.Embedding(10, 16, padding_idx=0)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(16, 2)

    def outer_parameters(self):
        return [p for part in self.outer for p in getattr(self, part).parameters()]

    def forward(self, words):
        absent = words == 0
        if self.backends is None:
            hidden = self.encoder(self.embedding(words), src_key_padding_mask=absent)
        else:
            with sdpa_kernel(self.backends):
                hidden = self.encoder(self.embedding(words), src_key_padding_mask=absent)
        return self.head(hidden.masked_fill(absent[..., None], 0.0).mean(1))

    def outer_loss(self, batch):
        return F.cross_entropy(self(batch[0]), batch[1])

    def inner_loss(self, batch):
        return self.outer_loss(batch) + 1e-2 * self.head.weight.square().sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.5 if "encoder" in self.outer else 0.1)


def fit(module, steps=100):
    (callback,) = module.configure_callbacks()
    module.configure_callbacks = lambda: [callback]
    train, val = (DataLoader(TensorDataset(*sentences(96, seed)), batch_size=32) for seed in (0, 1))
    with torch.no_grad():
        before = module.eval().outer_loss(sentences(96, 1)).item()
    tiny_trainer(max_steps=steps).fit(module.train(), train, val)
    with torch.no_grad():
        return callback, before, module.eval().outer_loss(sentences(96, 1)).item()


ARGS = {"refine_steps": 0, "lr": 0.3, "z_lr": 0.1, "every_n_steps": 1}
STEEPER = {**ARGS, "z_lr": 0.01}  # attention is more curved than a head


@pytest.mark.parametrize("product", ["auto", "exact", "fd"])
@pytest.mark.parametrize("outer", [("embedding", "encoder"), ("embedding",)], ids=["head inner", "attention inner"])
def test_a_transformer_learns_in_an_ordinary_loop(outer, product):
    settings = ARGS if "encoder" in outer else STEEPER
    callback, before, after = fit(Reader(outer, single_loop_args={**settings, "product": product}))
    print(before, after)
    assert after < 0.6 * before
    assert callback.product == product  # attention was put in the form that has a second derivative
    assert callback.watch[0] == 100


def test_a_module_that_insists_on_fused_attention_falls_back_to_differences():
    module = Reader(("embedding",), [SDPBackend.FLASH_ATTENTION], dropout=0.0, single_loop_args=STEEPER)
    with pytest.warns(UserWarning, match=r"goes on with differences of gradients .*flash_attention"):
        callback, before, after = fit(module)
    assert callback.product == "fd"
    print(before, after)
    assert after < 0.6 * before


def test_a_head_behind_fused_attention_needs_no_second_derivative_of_it():
    module = Reader(("embedding", "encoder"), [SDPBackend.FLASH_ATTENTION], dropout=0.0, single_loop_args=ARGS)
    callback, before, after = fit(module)
    assert callback.product == "auto"
    print(before, after)
    assert after < 0.6 * before


def attention_problem(backend):
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randn(2, 5, 8, generator=generator, dtype=torch.float64)
    weight = torch.randn(8, 24, generator=generator, dtype=torch.float64) / 3

    def attend(y, x):
        q, k, v = (
            (tokens * x["scale"] @ y["weight"]).unflatten(-1, (3, 2, 4)).transpose(1, 3).unbind(2)
        )  # (batch, heads, 5, 4)
        if backend == "by hand":
            return (q @ k.transpose(-1, -2) / 2).softmax(-1) @ v
        if backend is None:
            return F.scaled_dot_product_attention(q, k, v)
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v)

    def train(y, x):
        return (attend(y, x).sum((1, 2)) @ y["head"]).square().sum() + 0.1 * y["head"].square().sum()

    y = {"weight": weight, "head": torch.randn(4, generator=generator, dtype=torch.float64)}
    x = {"scale": torch.rand(8, generator=generator, dtype=torch.float64)}
    return Problem(train, lambda y, x: (attend(y, x).mean((1, 2)) @ y["head"]).sum()), y, x


def estimated(backend, product="exact"):
    """The hypergradient and the next z as one vector."""
    problem, y, x = attention_problem(backend)
    found = outer_gradient(problem, y, x, {name: value.sin() for name, value in y.items()}, z_lr=0.1, product=product)
    return torch.cat([value.flatten() for part in (found.gradients, found.z) for value in part.values()])


def test_plain_attention_gives_what_is_written_out_by_hand_and_differences_come_close():
    known = estimated("by hand")
    torch.testing.assert_close(estimated(SDPBackend.MATH), known, rtol=1e-10, atol=1e-12)
    assert (estimated(SDPBackend.FLASH_ATTENTION, "fd") - known).norm() < 1e-6 * known.norm()  # differentiated once


@pytest.mark.parametrize("backend", [None, SDPBackend.FLASH_ATTENTION], ids=["torch chooses", "flash"])
def test_fused_attention_names_the_remedies(backend):
    problem, y, x = attention_problem(backend)
    method = SingleLoopBilevel(
        lambda p, q, _: problem.train_loss(p, q), lambda p, q, _: problem.val_loss(p, q), lr=0.1, inner_lr=0.1
    )
    with pytest.raises(SecondDerivativesMissingError, match=r"product='fd', or sdpa_kernel\(SDPBackend.MATH\).*flash"):
        method.step(method.start(y, x), iter([None]), iter([None]))
