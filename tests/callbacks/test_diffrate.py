"""TokenCompression inside a Trainer; what holds for every method is in `test_matrix.py`."""

import copy

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from lightning_hpo import TokenCompression, apply_token_compression, vit_macs
from lightning_hpo.functional.compression.diffrate import candidate_counts, kept_tokens
from lightning_hpo.nn.diffrate import attach, remove_token_compression
from lightning_hpo.nn.timm_models import describe
from lightning_hpo.testing import TinyClassifier, TinyImages, tiny_trainer


def learned(target=0.6, lr=0.3, steps=4, module=None, module_name=None, extra=(), **arguments):
    compression = TokenCompression(target, module_name, lr=lr, **arguments)
    module = TinyClassifier() if module is None else module
    tiny_trainer(compression, *extra, max_steps=steps).fit(module, TinyImages(8))
    return compression, module


def raw(compression):
    return compression.hypers.raw["kept"].detach().clone()


class AtEachStep(Callback):
    """Calls a function before the optimizer's step, after TokenCompression has acted."""

    def __init__(self, act):
        self.act = act

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.act(trainer, pl_module)


# The optimization


def by_hand(steps, freeze=True, target=0.6, lr=0.3, weight=30.0, min_lr=0.001):
    """The same rates, learned by a loop without Lightning; the budget's gradient by autograd of the cost's slope."""
    module, data = TinyClassifier(), TinyImages(8)
    anatomy = describe(module.network)
    layout, candidates = anatomy.layout, candidate_counts(16)
    start = torch.stack([torch.linspace(6, -6, 16), torch.zeros(16)])  # prune little, merge half
    rates = start[:, None].repeat(1, 3, 1).requires_grad_()
    own = torch.optim.AdamW([rates], lr=lr, weight_decay=0.0)
    users = module.configure_optimizers()
    attach(anatomy, probabilities=lambda: rates.softmax(-1)).learning = True
    loader, multiplier = data.train_dataloader(), 0.0
    for step, (images, labels) in zip(range(steps), loader, strict=False):
        own.param_groups[0]["lr"] = (
            min_lr + (lr - min_lr) * (1 + torch.tensor(torch.pi * step / steps).cos().item()) / 2
        )
        kept = kept_tokens(rates.softmax(-1), candidates, prefix=0)
        macs, slope = layout.cost.count_and_slope(*layout.counts(kept.detach()))
        full = layout.cost.full
        excess = macs / full - target
        budget = ((2 * weight * excess + multiplier) / full * slope[1:] * kept).sum()
        multiplier = multiplier + 2 * 0.05 * weight * excess.clamp(-0.02, 0.02)
        own.zero_grad()
        users["optimizer"].zero_grad()
        (F.cross_entropy(module(images), labels) + budget).backward()
        if not freeze:
            users["optimizer"].step()
            users["lr_scheduler"]["scheduler"].step()
        own.step()
    return rates.detach(), module


@pytest.mark.parametrize("freeze", [True, False])
def test_rates_equal_a_loop_by_hand(freeze):
    compression, module = learned(steps=5, freeze=freeze)
    expected, twin = by_hand(5, freeze)
    expected = expected - expected.mean(-1, keepdim=True)
    torch.testing.assert_close(
        raw(compression) - raw(compression).mean(-1, keepdim=True), expected, rtol=1e-3, atol=1e-4
    )
    remove_token_compression(twin.network)
    for name, weight in twin.state_dict().items():
        torch.testing.assert_close(module.state_dict()[name], weight, rtol=1e-3, atol=1e-4)


def test_weight_decay_of_the_rates_is_zero():
    compression, module = learned()
    (group,) = compression.optimizer.param_groups
    assert isinstance(compression.optimizer, torch.optim.AdamW)
    assert group["weight_decay"] == 0
    own = {id(p) for p in group["params"]}
    assert not own & {id(p) for p in module.parameters()}


def test_learning_rate_is_a_cosine_over_the_training():
    seen = []
    compression = TokenCompression(0.6, lr=0.02, min_lr=0.004)
    note = AtEachStep(lambda *_: seen.append(compression.optimizer.param_groups[0]["lr"]))
    tiny_trainer(compression, note, max_steps=4).fit(TinyClassifier(), TinyImages(8))
    half = 0.008 * 2**-0.5
    assert seen == pytest.approx([0.02, 0.012 + half, 0.012, 0.012 - half])
    compression.total_steps, seen[:] = 2, []
    tiny_trainer(compression, note, max_steps=4).fit(TinyClassifier(), TinyImages(8))
    assert seen == pytest.approx([0.02, 0.012, 0.004, 0.004])


def test_last_block_gets_no_task_gradient_from_a_class_token_head():
    seen = []

    class Watch(TokenCompression):
        def _add_budget_gradient(self):
            seen.append(self.hypers.raw["kept"].grad.clone())
            return super()._add_budget_gradient()

    tiny_trainer(Watch(0.6, lr=0.3), max_steps=5).fit(TinyClassifier(), TinyImages(8))
    reached = torch.stack(seen).abs().sum(-1) > 0  # step, kind, block
    assert not reached[:, :, -1].any()
    assert reached[:, 1, 0].all()
    assert not reached[0, 0].any()  # at the start nothing is pruned


def test_budget_gradient_is_added_once_per_step_whatever_the_accumulation():
    calls = []

    class Count(TokenCompression):
        def _add_budget_gradient(self):
            calls.append(self.step)
            return super()._add_budget_gradient()

    trainer = tiny_trainer(Count(0.6), max_steps=3, accumulate_grad_batches=2)
    trainer.fit(TinyClassifier(), TinyImages(4))
    assert calls == [0, 1, 2]


def test_the_budget_is_met():
    compression, module = learned(target=0.6, steps=150)
    assert compression.schedule.macs / vit_macs(module.network) == pytest.approx(0.6, abs=0.03)
    whole = compression.schedule.full_macs
    absolute, _ = learned(target=0.7 * whole, steps=150, macs_loss="absolute", macs_weight=1e18 / whole**2 * 100)
    assert absolute.schedule.macs / whole == pytest.approx(0.7, abs=0.03)


# Frozen and not


def test_backbone_gradients_are_not_computed_when_frozen():
    with_gradient = []

    class Look(Callback):
        def on_after_backward(self, trainer, pl_module):
            with_gradient.append([name for name, p in pl_module.named_parameters() if p.grad is not None])

    at_step = []
    look = AtEachStep(lambda _, module: at_step.extend(p for p in module.parameters() if p.grad is not None))
    _, module = learned(steps=3, extra=(Look(), look))
    assert with_gradient == [["network.blocks.3.mlp.fc2.bias"]] * 3  # the cheapest: something must have one
    assert at_step == []
    for name, weight in TinyClassifier().state_dict().items():
        assert torch.equal(module.state_dict()[name], weight)


@pytest.mark.parametrize("end", ["normal", "exception"])
def test_freezing_restores_what_wanted_a_gradient(end):
    class Mixed(TinyClassifier):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(4, 4)
            self.network.patch_embed.requires_grad_(False)
            self.network.blocks[3].mlp.fc2.bias.requires_grad_(False)

        def forward(self, images):
            return self.head(self.network(images))

        def training_step(self, batch, batch_idx):
            if end == "exception" and batch_idx == 2:
                raise RuntimeError("boom")
            return super().training_step(batch, batch_idx)

    module = Mixed()
    before = {name: p.requires_grad for name, p in module.named_parameters()}
    trainer = tiny_trainer(TokenCompression(0.6), max_steps=3)
    if end == "exception":
        with pytest.raises(RuntimeError, match="boom"):
            trainer.fit(module, TinyImages(8))
    else:
        trainer.fit(module, TinyImages(8))
    assert {name: p.requires_grad for name, p in module.named_parameters()} == before
    assert type(module.network) is VisionTransformer
    module(torch.randn(2, 1, 8, 8)).sum().backward()


def test_parameters_of_the_module_are_neither_hidden_nor_added():
    seen = []
    names = [name for name, _ in TinyClassifier().named_parameters()]
    learned(steps=2, extra=(AtEachStep(lambda _, m: seen.append([name for name, _ in m.named_parameters()])),))
    assert seen == [names, names]


def test_an_optimizer_over_what_wants_a_gradient():
    class Filtering(TinyClassifier):
        def configure_optimizers(self):
            return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], weight_decay=0.5)

    compression, module = learned(module=Filtering())
    torch.testing.assert_close(raw(compression), raw(learned()[0]))
    for name, weight in TinyClassifier().state_dict().items():
        assert torch.equal(module.state_dict()[name], weight)


def test_a_network_in_eval_mode_learns_the_same():
    class Sleeping(TinyClassifier):
        def on_train_start(self):
            self.network.eval()

    torch.testing.assert_close(raw(learned(module=Sleeping())[0]), raw(learned()[0]))


# Two networks


class Pair(TinyClassifier):
    def __init__(self):
        super().__init__()
        self.other = copy.deepcopy(self.network)

    def forward(self, images):
        return self.network(images) + self.other(images)


def test_two_callbacks_for_two_networks():
    module = Pair()
    module.requires_grad_(False)
    module.other.head.requires_grad_(True)
    before = [p.requires_grad for p in module.parameters()]
    first, second = (TokenCompression(t, n, lr=0.3) for t, n in ((0.6, "network"), (0.85, "other")))
    trainer = tiny_trainer(first, second, max_steps=40)
    trainer.fit(module, TinyImages(8))
    assert first.schedule.macs < second.schedule.macs
    assert [p.requires_grad for p in module.parameters()] == before
    assert {"diffrate[network]/macs_ratio", "diffrate[other]/macs_ratio"} <= set(trainer.logged_metrics)


def test_one_callback_for_one_of_two_networks():
    module = Pair()
    compression, _ = learned(module=module, module_name="other")
    assert compression.schedule.merge[-1] < 17
    compression.setup(trainer := tiny_trainer(compression), module, "validate")
    assert type(module.network) is VisionTransformer
    assert type(module.other) is not VisionTransformer
    compression.teardown(trainer, module, "validate")
    assert type(module.other) is VisionTransformer


# What is logged and reported


def test_logged_and_reported_figures_agree_with_the_schedule():
    compression = TokenCompression(0.6, lr=0.3)
    trainer = tiny_trainer(compression, max_steps=3)
    trainer.fit(TinyClassifier(), TinyImages(8))
    logged = trainer.logged_metrics
    blocks = [f"diffrate/{kind}/block_{b}" for kind in ("pruned_to", "merged_to") for b in (1, 2, 3)]
    assert {"diffrate/macs_ratio", "diffrate/macs_loss", *blocks} <= set(logged)
    ratio = compression.hyperparameters()["macs_ratio"]
    assert ratio == compression.schedule.macs / compression.schedule.full_macs
    assert 0.4 < ratio < logged["diffrate/macs_ratio"].item() + 1e-6 < 1  # logged before the last step
    assert compression.hyperparameters()["tokens_after_merging"] == list(compression.schedule.merge[1:])


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
@pytest.mark.parametrize("freeze", [True, False])
def test_other_precisions_learn_much_the_same(precision, freeze):
    compression = TokenCompression(0.6, lr=0.3, freeze=freeze)
    tiny_trainer(compression, max_steps=4, precision=precision).fit(TinyClassifier(lr=0.01), TinyImages(8))
    assert raw(compression).dtype == torch.float32
    single, _ = learned()
    for got, expected in zip(compression.schedule.merge, single.schedule.merge, strict=True):
        assert abs(got - expected) <= 1


def test_a_copy_of_the_module_in_the_middle_of_learning():
    copies = []

    def duplicate(trainer, pl_module):
        copies.append(copy.deepcopy(pl_module.network))

    learned(steps=2, extra=(AtEachStep(duplicate),))
    x = torch.randn(2, 1, 8, 8)
    for twin in copies:
        assert torch.isfinite(twin(x)).all()
        assert type(remove_token_compression(twin)) is VisionTransformer


def test_pairs_meet_the_budget_and_are_evaluated_as_learned():
    compression, module = learned(target=0.7, steps=60, matching="bipartite")
    schedule = compression.schedule
    assert schedule.matching == "bipartite"
    assert schedule.macs / vit_macs(module.network) == pytest.approx(0.7, abs=0.03)
    assert all(before == kept for before, kept, _ in schedule.running())
    apply_token_compression(module.network, schedule)
    lengths = []
    for block in module.network.blocks:
        block.mlp.register_forward_pre_hook(lambda _, inputs: lengths.append(inputs[0].shape[1]))
    module.eval()(next(iter(TinyImages(8).val_dataloader()))[0])
    assert tuple(lengths) == schedule.merge
