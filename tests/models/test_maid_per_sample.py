"""PerSampleMAIDModule: the steps of the functional loop on batched problems, on two ranks, across a break."""

import tempfile
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_hpo import PerSampleMAIDModule
from lightning_hpo.functional.bilevel.denoising import (
    TotalVariation,
    denoising_loss,
    denoising_problem,
    reconstruction_loss,
)
from lightning_hpo.functional.bilevel.maid import MAID
from lightning_hpo.testing import tiny_trainer

generator = torch.Generator().manual_seed(0)
CLEAN = (torch.rand(6, 1, 1, generator=generator) * torch.ones(8, 8)).double()
CLEAN[:, :, 4:] += 0.5
NOISY = CLEAN + 0.1 * torch.randn(6, 8, 8, generator=generator, dtype=torch.float64)
START, VARIATION = torch.full((2,), -4.0, dtype=torch.float64), TotalVariation()
ALL = {"alpha0": 0.1}


def make(**settings):
    return PerSampleMAIDModule(
        lambda x, theta, batch: denoising_loss(x, theta, batch[0], VARIATION),
        lambda x, batch: reconstruction_loss(x, batch[1]),
        x0=lambda batch: batch[0],
        theta0=START,
        mu=1.0,
        smoothness=lambda theta: 1 + VARIATION.smoothness(theta),
        upper_smoothness=1.0,
        convex_upper=True,
        **ALL | settings,
    )


def loaders(batch_size=6, count=6):
    return [DataLoader(TensorDataset(NOISY[:count], CLEAN[:count]), batch_size=batch_size)] * 2


def functional(steps):
    return MAID(denoising_problem(NOISY, CLEAN, VARIATION), **ALL).run(START, NOISY, max_steps=steps)


@pytest.mark.parametrize("batch_size", [6, 4])
def test_steps_are_those_of_the_loop(batch_size):
    module = make()
    trainer = tiny_trainer(max_steps=6, max_epochs=-1)
    trainer.fit(module, *loaders(batch_size))
    expected = functional(6)
    torch.testing.assert_close(module.theta.data, expected.theta, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(module.state.x, expected.x, rtol=1e-10, atol=1e-12)
    assert trainer.callback_metrics["maid/lower_iterations"] == expected.lower_iterations
    assert trainer.callback_metrics["val_loss"].item() == pytest.approx((expected.lower + expected.upper) / 2, rel=1e-2)


def test_the_precision_of_the_trainer():
    data = [DataLoader(TensorDataset(NOISY.float(), CLEAN.float()), batch_size=6)] * 2
    module = make()
    tiny_trainer(max_epochs=6, precision="64-true").fit(module, *data)
    assert module.state.x.dtype == torch.float64
    torch.testing.assert_close(module.theta.data, functional(6).theta, rtol=1e-5, atol=0)  # of data that were rounded
    with pytest.raises(MisconfigurationException, match="errors cannot be certified under precision='bf16-mixed'"):
        tiny_trainer(precision="bf16-mixed").predict(make(), data[0])


def test_other_samples_are_solved_at_what_was_learned():
    module = make(accuracy=1e-6)
    trainer = tiny_trainer(max_epochs=4)
    trainer.fit(module, *loaders())
    (found,) = trainer.predict(module, DataLoader(TensorDataset(NOISY[:2], CLEAN[:2]), batch_size=2))
    problem = denoising_problem(NOISY[:2], CLEAN[:2], VARIATION).lower
    assert (problem.norms(problem.gradient(found, module.theta)) < 1e-5).all()
    (loss,) = trainer.test(module, DataLoader(TensorDataset(NOISY[:2], CLEAN[:2]), batch_size=2), verbose=False)
    assert loss["test_loss"] == pytest.approx(reconstruction_loss(found, CLEAN[:2]).mean().item())
    assert loss["test_loss"] < 0.7 * reconstruction_loss(NOISY[:2], CLEAN[:2]).mean().item()


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint")
def test_a_resumed_run_is_the_same_bit_for_bit(tmp_path):
    whole = make()
    tiny_trainer(max_epochs=6).fit(whole, *loaders())
    saver = ModelCheckpoint(dirpath=tmp_path, filename="three", every_n_epochs=3, save_top_k=-1)
    tiny_trainer(saver, max_epochs=3).fit(make(), *loaders())
    resumed, path = make(), str(tmp_path / "three.ckpt")
    tiny_trainer(max_epochs=6).fit(resumed, *loaders(), ckpt_path=path, weights_only=True)
    expected, found = whole.state.state_dict(), resumed.state.state_dict()
    for name, value in expected.items():
        left, right = (v if isinstance(v, tuple) else (v,) for v in (value, found[name]))
        for a, b in zip(left, right, strict=True):
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, name
    with pytest.raises(MisconfigurationException, match="5 samples on this rank, the checkpoint has 6"):
        tiny_trainer(max_epochs=6).fit(make(), *loaders(count=5), ckpt_path=path, weights_only=True)


class Save(Callback):
    def __init__(self, folder):
        self.folder = Path(folder)

    def on_train_end(self, trainer, pl_module):
        checkpoint = {}
        pl_module.on_save_checkpoint(checkpoint)
        torch.save(checkpoint["maid"] | {"own": pl_module.state.x}, self.folder / f"{trainer.global_rank}.pt")


def test_two_ranks_own_half_of_the_samples_each():
    strategy = DDPStrategy(start_method="fork", process_group_backend="gloo", timeout=timedelta(seconds=60))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as folder:
            trainer = tiny_trainer(Save(folder), max_epochs=5, devices=2, strategy=strategy)
            trainer.fit(make(kappa=1e-8), *loaders())
            first, second = (torch.load(Path(folder) / f"{rank}.pt") for rank in (0, 1))
    finally:
        torch.set_num_threads(threads)
    expected = MAID(denoising_problem(NOISY, CLEAN, VARIATION), **ALL, kappa=1e-8).run(START, NOISY, max_steps=5)
    assert torch.equal(first["theta"], second["theta"])
    assert torch.equal(first["x"], second["x"])  # of all samples, in the order of the data set
    assert torch.equal(first["x"][0::2], first["own"])
    assert torch.equal(first["x"][1::2], second["own"])
    torch.testing.assert_close(first["theta"], expected.theta, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(first["x"], expected.x, rtol=1e-6, atol=1e-6)
    assert first["trials"] == expected.trials


class Stream(IterableDataset):
    def __iter__(self):
        return zip(NOISY, CLEAN, strict=True)


def test_what_is_refused():
    with pytest.raises(ValueError, match="accuracy must be between 0 and 1"):
        make(accuracy=0.0)
    with pytest.raises(ValueError, match="rho must"):
        make(rho=2.0)
    with pytest.raises(MisconfigurationException, match="training data: a DataLoader over a data set"):
        tiny_trainer(max_epochs=1, num_sanity_val_steps=0).fit(make(), DataLoader(Stream(), batch_size=2), loaders()[0])
    hard = make(solver=lambda *args, **kw: make().solver(*args, maxiter=1))
    with pytest.raises(RuntimeError, match="not solved to"):
        hard.solve([NOISY, CLEAN])
    with pytest.raises(MisconfigurationException, match="was not written by a `PerSampleMAIDModule`"):
        make().on_load_checkpoint({})
