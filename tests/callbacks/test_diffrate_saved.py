"""TokenCompression saved, reloaded in a new process, resumed after a kill, and on two ranks."""

import subprocess
import sys

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from timm.models.vision_transformer import VisionTransformer

from lightning_hpo import TokenCompression, apply_token_compression
from lightning_hpo.testing import TinyClassifier, TinyImages, fit_two_ranks, kill_and_resume, tiny_trainer


def learned(steps=4, extra=(), **arguments):
    compression, module = TokenCompression(0.6, lr=0.3, **arguments), TinyClassifier()
    tiny_trainer(compression, *extra, max_steps=steps).fit(module, TinyImages(8))
    return compression, module


VALIDATE = """
import sys, torch
from lightning_hpo import TokenCompression
from lightning_hpo.testing import TinyClassifier, TinyImages, tiny_trainer

class Logits(TinyClassifier):
    found = []
    def validation_step(self, batch, batch_idx):
        self.found.append(self(batch[0]))

compression = TokenCompression(0.6)
module = Logits()
tiny_trainer(compression).validate(module, TinyImages(8), ckpt_path=sys.argv[1], verbose=False)
torch.save({"schedule": compression.schedule.to_dict(), "logits": torch.cat(module.found)}, sys.argv[2])
"""


def test_kept_counts_survive_reload(tmp_path):
    """In a new process, with a fresh callback, before any training step: the same schedule and the same logits."""
    saver = ModelCheckpoint(dirpath=tmp_path, filename="end", every_n_train_steps=4)
    compression, module = learned(freeze=False, extra=(saver,))
    path, out = tmp_path / "end.ckpt", tmp_path / "out.pt"
    subprocess.run([sys.executable, "-W", "ignore", "-c", VALIDATE, path, out], check=True, cwd=tmp_path)
    reloaded = torch.load(out, weights_only=True)
    assert reloaded["schedule"] == compression.schedule.to_dict()
    start = TokenCompression(0.6)
    start.setup(tiny_trainer(start), TinyClassifier(), "validate")
    assert compression.schedule.merge != start.schedule.merge
    apply_token_compression(module.network.eval(), compression.schedule)
    images = torch.cat([batch[0] for batch in TinyImages(8).val_dataloader()])
    with torch.no_grad():
        torch.testing.assert_close(reloaded["logits"], module(images), rtol=1e-5, atol=1e-6)
    assert torch.load(path, weights_only=True)["callbacks"][compression.state_key]["schedule"] == reloaded["schedule"]


def test_a_state_loaded_by_hand(tmp_path):
    """Before the network is known: the schedule is there, evaluation is short, and saving again loses nothing."""
    compression, module = learned()
    fresh = TokenCompression(0.6)
    fresh.load_state_dict(compression.state_dict())
    assert fresh.schedule == compression.schedule
    assert fresh.state_dict()["schedule"] == compression.state_dict()["schedule"]
    lengths = []
    module.network.blocks[3].mlp.register_forward_pre_hook(lambda _, inputs: lengths.append(inputs[0].shape[1]))
    tiny_trainer(fresh).validate(module, TinyImages(8), verbose=False)  # a warning would say that it is dense
    assert set(lengths) == {compression.schedule.merge[-1]}
    assert fresh.schedule == compression.schedule


@pytest.mark.parametrize("evaluate", ["validate", "test", "predict"])
def test_evaluation_is_short_and_the_network_is_given_back(evaluate):
    compression, module = learned()
    lengths = []
    module.network.blocks[3].mlp.register_forward_pre_hook(lambda _, inputs: lengths.append(inputs[0].shape[1]))
    type(module).test_step, type(module).predict_step = module.validation_step.__func__, lambda s, b, i: s(b[0])
    try:
        trainer = tiny_trainer(compression)
        getattr(trainer, evaluate)(module, TinyImages(8).val_dataloader())
    finally:
        del type(module).test_step, type(module).predict_step
    assert set(lengths) == {compression.schedule.merge[-1]}
    assert compression.schedule.merge[-1] < 17
    assert type(module.network) is VisionTransformer


def test_validation_within_training_is_short_and_training_goes_on_by_mask():
    compression, module, lengths = TokenCompression(0.6, lr=0.3), TinyClassifier(), []
    block = module.network.blocks[3].mlp
    block.register_forward_pre_hook(lambda _, inputs: lengths.append((module.training, inputs[0].shape[1])))
    tiny_trainer(compression, max_epochs=2).fit(module, TinyImages(8))
    assert [length for training, length in lengths if training] == [17] * 12
    checks = [length for training, length in lengths if not training]
    assert checks[:2] == [10, 10]  # before the first step: half of the patches
    assert checks[-1] == compression.schedule.merge[-1] < 10


def test_training_resumes_to_identical_rates_after_a_kill():
    whole, _, resumed = kill_and_resume(lambda: TokenCompression(0.6, lr=0.3), steps=9, kill_at=4)
    (key,) = (k for k in whole.method["hypers"] if "kept" in k)
    assert torch.equal(whole.method["hypers"][key], resumed.method["hypers"][key])
    assert not torch.equal(resumed.first["hypers"][key], resumed.method["hypers"][key])


def test_two_ranks_learn_what_one_process_learns_on_the_joined_batch():
    first, second = fit_two_ranks(lambda: TokenCompression(0.6, lr=0.3), TinyClassifier, TinyImages, 4, max_steps=6)
    assert first.losses != second.losses
    (key,) = (k for k in first.method["hypers"] if "kept" in k)
    assert torch.equal(first.method["hypers"][key], second.method["hypers"][key])
    assert first.method["schedule"] == second.method["schedule"]
    single, _ = learned(steps=6)
    torch.testing.assert_close(first.method["hypers"][key], single.hypers.raw["kept"].detach(), rtol=1e-3, atol=1e-4)
