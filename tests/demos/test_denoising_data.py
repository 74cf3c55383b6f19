"""Noisy crops: the same every time, from different images, and real photographs where there are any."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchmetrics.functional.image import peak_signal_noise_ratio

from lightning_hpo.demos.denoising_data import DenoisingDataModule, PhotoDenoisingDataModule, read_grey
from lightning_hpo.functional.bilevel.denoising import TotalVariation, denoising_problem
from lightning_hpo.functional.bilevel.lower_solvers import lbfgs
from lightning_hpo.functional.bilevel.maid import MAID

ROOT = os.environ.get("LIGHTNING_HPO_DATA")


def write(folder, count, shape):
    folder.mkdir(parents=True)
    for i in range(count):
        image = np.full(shape, 10 * i, dtype=np.uint8)
        image[0, 0] = 255
        Image.fromarray(image).save(folder / f"{i}.png")


@pytest.fixture
def root(tmp_path):
    write(tmp_path / "denoising" / "bsd68", 6, (20, 30))
    write(tmp_path / "denoising" / "set12", 3, (12, 10))
    return tmp_path


def test_grey_values(root):
    images = read_grey(root / "denoising" / "bsd68")
    assert [image.shape for image in images] == [(20, 30)] * 6
    assert images[3].dtype == torch.float64
    assert images[3][5, 5].item() == pytest.approx(30 / 255)
    assert images[3].max().item() == 1.0


def test_crops_come_from_different_images_and_noise_is_fixed(root):
    first, again, other = (
        DenoisingDataModule(root, noise=0.2, size=16, crops=4, val_crops=2, seed=s) for s in (1, 1, 2)
    )
    for data in (first, again, other):
        data.setup()
        data.setup()  # does nothing
    noisy, clean = next(iter(first.train_dataloader()))
    val_noisy, val_clean = next(iter(first.val_dataloader()))
    assert noisy.shape == clean.shape == (4, 16, 16)
    levels = torch.cat([clean, val_clean]).flatten(1).median(1).values
    assert len(levels.unique()) == 6
    assert (noisy - clean).std().item() == pytest.approx(0.2, rel=0.1)
    assert torch.equal(noisy, next(iter(again.train_dataloader()))[0])
    assert not torch.equal(noisy, next(iter(other.train_dataloader()))[0])
    (test_noisy, test_clean), *rest = first.test_dataloader()
    assert len(rest) == 2
    assert test_noisy.shape == (1, 12, 10)
    assert torch.equal(test_noisy, next(iter(first.predict_dataloader()))[0])
    assert (test_noisy - test_clean).std().item() == pytest.approx(0.2, rel=0.2)
    assert not torch.equal(val_noisy, val_clean)


def test_photographs_that_come_with_scikit_learn():
    data = PhotoDenoisingDataModule(size=32, crops=3, val_crops=2)
    data.setup()
    noisy, clean = next(iter(data.train_dataloader()))
    assert noisy.shape == (3, 32, 32)
    assert 0 <= clean.min() < clean.max() <= 1
    assert len(data.test_set) == 8


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"noise": 0.0, "size": 4, "crops": 0, "val_crops": 0}, "noise .*; size .*; crops .*; val_crops must"),
        ({"crops": 5, "val_crops": 2, "size": 16}, "5 training and 2 validation crops .* there are 6"),
        ({"crops": 1, "val_crops": 1, "size": 24}, "24 pixels a side; there are 0"),
    ],
)
def test_what_is_refused(settings, match, root):
    with pytest.raises(ValueError, match=match):
        DenoisingDataModule(root, **settings).setup()


def test_missing_folders_and_loaders_before_setup(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"bsd68/\*.png"):
        DenoisingDataModule(tmp_path).setup()
    with pytest.raises(RuntimeError, match="call `setup"):
        DenoisingDataModule(tmp_path).train_dataloader()


@pytest.mark.data
@pytest.mark.skipif(
    not ROOT or not (Path(ROOT) / "denoising" / "set12").is_dir(), reason="LIGHTNING_HPO_DATA names no such images"
)
def test_total_variation_that_was_learned_improves_real_images():
    data = DenoisingDataModule(size=32, crops=6, val_crops=2)
    data.setup()
    noisy, clean = next(iter(data.train_dataloader()))
    start = torch.full((2,), -5.0, dtype=torch.float64)
    end = MAID(denoising_problem(noisy, clean, TotalVariation()), solver=lbfgs).run(start, noisy, max_steps=4)
    gains = []
    for noisy, clean in list(data.test_dataloader())[:3]:
        x = lbfgs(denoising_problem(noisy, clean, TotalVariation()).lower, end.theta, noisy, 0.1).x
        before, after = (peak_signal_noise_ratio(image, clean, data_range=1.0).item() for image in (noisy, x))
        assert before == pytest.approx(20.0, abs=0.2)  # noise of 0.1
        gains.append(after - before)
    assert min(gains) > 6  # decibels
