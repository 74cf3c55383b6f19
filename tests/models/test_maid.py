"""MAIDModule: a Trainer's steps are those of the functional loop, on any number of ranks, across a break."""

import tempfile
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_hpo import MAIDModule
from lightning_hpo.functional.bilevel.maid import MAID, BilevelProblem, LowerProblem
from lightning_hpo.testing import tiny_trainer

generator = torch.Generator().manual_seed(0)
DATA = torch.randn(2, 40, 5, generator=generator, dtype=torch.float64)
LABELS = (DATA[..., 0] + torch.randn(2, 40, generator=generator).double() > 0).double()
BOUNDS = [torch.linalg.eigvalsh(part.T @ part / 40)[-1].item() / 4 for part in DATA]
START = {"x0": torch.zeros(5, dtype=torch.float64), "theta0": torch.full((5,), -1.0, dtype=torch.float64)}


def lower(w, theta, batch):
    return upper(w, batch) + 0.5 * (theta.exp() * w * w).sum()


def upper(w, batch):
    return F.binary_cross_entropy_with_logits(batch[0] @ w, batch[1])


def modulus(theta):
    return theta.exp().min()


def smoothness(theta):
    return BOUNDS[0] + theta.exp().max()


def make(dtype=torch.float64, **settings):
    known = {"mu": modulus, "smoothness": smoothness, "upper_smoothness": BOUNDS[1], "convex_upper": True}
    start = {name: value.to(dtype) for name, value in START.items()}
    return MAIDModule(lower, upper, **start, **known, **settings)


def loaders(batch_size=40, dtype=torch.float64):
    sets = [TensorDataset(x.to(dtype), y.to(dtype)) for x, y in zip(DATA, LABELS, strict=True)]
    return [DataLoader(part, batch_size=batch_size) for part in sets]


def functional(steps, **settings):
    train, val = [(x, y) for x, y in zip(DATA, LABELS, strict=True)]
    problem = BilevelProblem(
        LowerProblem(lambda w, t: lower(w, t, train), modulus, smoothness),
        lambda w: upper(w, val),
        BOUNDS[1],
        convex_upper=True,
    )
    return MAID(problem, **settings).run(START["theta0"], START["x0"], max_steps=steps)


@pytest.mark.parametrize("batch_size", [40, 16])
def test_steps_are_those_of_the_loop(batch_size):
    module = make()
    trainer = tiny_trainer(max_steps=12, max_epochs=-1)
    trainer.fit(module, *loaders(batch_size))
    expected = functional(12)
    assert trainer.global_step == 12
    torch.testing.assert_close(module.theta.data, expected.theta, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(module.x.data, expected.x, rtol=1e-10, atol=1e-12)
    assert trainer.callback_metrics["maid/lower_iterations"] == expected.lower_iterations
    assert expected.lower - 1e-12 <= upper(module.x, (DATA[1], LABELS[1])).item() <= expected.upper + 1e-12


def test_training_stops_where_maid_does():
    module = make(check_descent=True, tolerance=1e-2)
    trainer = tiny_trainer(max_epochs=500)
    trainer.fit(module, *loaders())
    assert module.state.status == "stationary"
    assert trainer.global_step == module.state.iteration < 500


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint")
def test_a_resumed_run_is_the_same_bit_for_bit(tmp_path):
    whole = make(bb_init=True, nonmonotone=True)
    tiny_trainer(max_epochs=9).fit(whole, *loaders())
    saver = ModelCheckpoint(dirpath=tmp_path, filename="four", every_n_epochs=4, save_top_k=-1)
    tiny_trainer(saver, max_epochs=4).fit(make(bb_init=True, nonmonotone=True), *loaders())
    resumed = make(bb_init=True, nonmonotone=True)
    tiny_trainer(max_epochs=9).fit(resumed, *loaders(), ckpt_path=str(tmp_path / "four.ckpt"), weights_only=True)
    expected, found = whole.state.state_dict(), resumed.state.state_dict()
    for name, value in expected.items():
        left, right = (v if isinstance(v, tuple) else (v,) for v in (value, found[name]))
        for a, b in zip(left, right, strict=True):
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, name
    assert torch.equal(whole.theta, resumed.theta)


class Save(Callback):
    def __init__(self, folder):
        self.folder = Path(folder)

    def on_train_end(self, trainer, pl_module):
        torch.save(pl_module.state.state_dict(), self.folder / f"{trainer.global_rank}.pt")


def test_two_ranks_are_one_process():
    strategy = DDPStrategy(start_method="fork", process_group_backend="gloo", timeout=timedelta(seconds=60))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as folder:
            trainer = tiny_trainer(Save(folder), max_epochs=8, devices=2, strategy=strategy)
            trainer.fit(make(check_descent=True), *loaders())
            first, second = (torch.load(Path(folder) / f"{rank}.pt") for rank in (0, 1))
    finally:
        torch.set_num_threads(threads)
    expected = functional(8, check_descent=True)
    for name in ("theta", "x"):
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], getattr(expected, name), rtol=1e-12, atol=1e-12)
    assert first["trials"] == expected.trials


def test_double_precision_takes_float32_data_along():
    module = make(torch.float32)
    tiny_trainer(max_epochs=12, precision="64-true").fit(module, *loaders(dtype=torch.float32))
    expected = functional(12)
    assert module.theta.dtype == module.state.x.dtype == torch.float64
    torch.testing.assert_close(module.theta.data, expected.theta, rtol=1e-5, atol=0)  # of data that were rounded
    torch.testing.assert_close(module.x.data, expected.x, rtol=1e-5, atol=0)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "16-true"])
def test_low_precision_is_refused(precision):
    where = f"`MAIDModule`: errors cannot be certified under precision='{precision}': give '32-true' or '64-true'"
    with pytest.raises(MisconfigurationException, match=where):
        tiny_trainer(max_epochs=1, precision=precision).fit(make(torch.float32), *loaders(dtype=torch.float32))


def test_low_precision_is_refused_in_any_case_where_losses_round_by_themselves():
    module = make(torch.float32, allow_low_precision=True)
    with pytest.raises(MisconfigurationException, match=r"errors cannot be certified .* or '64-true'\."):
        tiny_trainer(max_epochs=1, precision="bf16-mixed").validate(module, loaders(dtype=torch.float32)[1])


def test_sixteen_bits_on_request():
    module = make(torch.float32, allow_low_precision=True)
    tiny_trainer(max_epochs=4, precision="bf16-true").fit(module, *loaders(dtype=torch.float32))
    assert module.state.x.dtype == torch.bfloat16
    assert module.state.status == "accuracy_floor"
    assert module.state.upper < upper(START["x0"], (DATA[1], LABELS[1])).item()


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint")
@pytest.mark.parametrize(("before", "after"), [("32-true", "64-true"), ("64-true", "32-true")])
def test_a_run_goes_on_in_another_precision(before, after, tmp_path):
    data = loaders(dtype=torch.float32)
    saver = ModelCheckpoint(dirpath=tmp_path, filename="four", every_n_epochs=4, save_top_k=-1)
    tiny_trainer(saver, max_epochs=4, precision=before).fit(make(torch.float32), *data)
    module = make(torch.float32)
    trainer = tiny_trainer(max_epochs=8, precision=after)
    trainer.fit(module, *data, ckpt_path=str(tmp_path / "four.ckpt"), weights_only=True)
    assert module.state.theta.dtype == module.state.previous[0].dtype == module.theta.dtype
    assert module.state.error.dtype == torch.float64
    torch.testing.assert_close(module.theta.data.double(), functional(8).theta, rtol=1e-4, atol=1e-4)


class Stream(IterableDataset):
    def __iter__(self):
        return zip(*DATA, strict=True)


@pytest.mark.filterwarnings("ignore:Total length of `DataLoader` across ranks is zero")
def test_what_is_refused():
    with pytest.raises(ValueError, match="rho must"):
        make(rho=2.0)
    stream = DataLoader(Stream(), batch_size=4)
    with pytest.raises(MisconfigurationException, match="val data: a DataLoader over a data set"):
        tiny_trainer(max_epochs=1, num_sanity_val_steps=0).fit(make(), loaders()[0], stream)
    empty = DataLoader(TensorDataset(DATA[1, :0], LABELS[1, :0]))
    with pytest.raises(MisconfigurationException, match="val data: "):
        tiny_trainer(max_epochs=1, num_sanity_val_steps=0).fit(make(), loaders()[0], empty)
