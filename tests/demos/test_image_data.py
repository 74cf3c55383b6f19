import pytest
import torch
from lightning.pytorch import Trainer
from PIL import Image

from lightning_hpo.demos import (
    CIFAR10DataModule,
    DigitsDataModule,
    FashionMNISTDataModule,
    ImageFolderDataModule,
    MNISTDataModule,
)


def test_digits_are_standardised_and_split_apart():
    digits = DigitsDataModule(seed=1)
    digits.setup()
    every = torch.cat([images for images, _ in digits.train_dataloader()])
    assert abs(every.mean().item()) < 1e-4
    assert abs(every.std().item() - 1) < 1e-3
    assert len(digits.train_set) + len(digits.val_set) + len(digits.test_set) == 1797
    shares = (
        digits.test_set.labels.bincount() / torch.cat([p.labels for p in (digits.train_set, digits.val_set)]).bincount()
    )
    assert (shares - 1 / 3).abs().max() < 0.02


def test_digits_without_validation_images():
    digits = DigitsDataModule(val_fraction=0.0)
    digits.setup()
    assert digits.val_dataloader() == []
    assert len(digits.train_set) == 1347


def test_setup_twice_keeps_the_images():
    digits = DigitsDataModule(limit=100)
    digits.setup("fit")
    first = digits.train_set
    digits.setup("test")
    assert digits.train_set is first
    assert len(digits.test_set) == 100


@pytest.mark.parametrize("arguments", [{"shift": -1}, {"val_fraction": 1.0}])
def test_bad_values(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        DigitsDataModule(**arguments)


def test_loader_before_setup():
    with pytest.raises(RuntimeError, match="setup"):
        DigitsDataModule().train_dataloader()


class _Sums:
    def __init__(self):
        self.training, self.evaluation = [], []


def test_only_training_batches_are_moved(monkeypatch):
    from lightning.pytorch.demos.boring_classes import BoringModel

    seen = _Sums()

    class Looker(BoringModel):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(64, 2)

        def training_step(self, batch, batch_idx):
            seen.training.append(batch[0])
            return self.layer(batch[0].flatten(1)).sum()

        def validation_step(self, batch, batch_idx):
            seen.evaluation.append(batch[0])

    digits = DigitsDataModule(shift=2, batch_size=2000)
    trainer = Trainer(
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
    )
    trainer.fit(Looker(), digits)
    still = {tuple(image.flatten().tolist()) for image in next(iter(digits.train_dataloader()))[0]}
    moved = sum(tuple(image.flatten().tolist()) not in still for image in seen.training[0])
    assert moved > 1000  # one offset in 25 leaves an image where it was
    assert torch.equal(seen.evaluation[-1], next(iter(digits.val_dataloader()))[0])


def image(path, colour, size=(32, 32)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def test_cifar10_from_a_folder_of_images(tmp_path):
    for part, count in (("train", 4), ("test", 2)):
        for label, name in enumerate(("airplane", "bird")):
            for i in range(count):
                image(tmp_path / "cifar10" / part / name / f"{i}.png", (100 * label, 10 * i, 0))
    data = CIFAR10DataModule(tmp_path, val_fraction=0.25)
    data.setup()
    assert (len(data.train_set), len(data.val_set), len(data.test_set)) == (6, 2, 4)
    assert data.test_set.labels.tolist() == [0, 0, 1, 1]
    assert data.test_set.images[2, 0, 0, 0] == 100


def test_image_folder_resizes_and_takes_given_statistics(tmp_path):
    for part in ("train", "val"):
        image(tmp_path / part / "a" / "1.png", (255, 0, 0), (20, 10))
        image(tmp_path / part / "b" / "1.png", (0, 255, 0), (10, 30))
    data = ImageFolderDataModule(tmp_path, image_size=8, mean=[0.0] * 3, std=[0.5] * 3, val_fraction=0.0, batch_size=2)
    data.setup()
    images, _ = next(iter(data.test_dataloader()))
    assert images.shape == (2, 3, 8, 8)
    assert images[0, :, 0, 0].tolist() == [2.0, 0.0, 0.0]
    with pytest.raises(ValueError, match="both"):
        ImageFolderDataModule(tmp_path, mean=[0.0] * 3)


def test_image_folder_with_other_classes_for_testing(tmp_path):
    image(tmp_path / "train" / "a" / "1.png", (0, 0, 0))
    image(tmp_path / "test" / "b" / "1.png", (0, 0, 0))
    with pytest.raises(ValueError, match="different classes"):
        ImageFolderDataModule(tmp_path, image_size=8).setup()


@pytest.mark.parametrize(
    ("kind", "looked_for"),
    [
        (MNISTDataModule, "MNIST/raw/train-images-idx3-ubyte"),
        (FashionMNISTDataModule, "FashionMNIST/raw"),
        (CIFAR10DataModule, "cifar-10-batches-py and for .*cifar10/train/<class>"),
        (ImageFolderDataModule, "train/<class>"),
    ],
)
def test_absent_files_are_named(kind, looked_for, tmp_path):
    with pytest.raises(FileNotFoundError, match=looked_for):
        kind(tmp_path).setup()


@pytest.mark.data
def test_mnist_on_disk():
    data = MNISTDataModule(limit=500)
    data.setup()
    images, _ = next(iter(data.test_dataloader()))
    assert images.shape == (64, 1, 28, 28)
    assert data.test_set.labels.unique().tolist() == list(range(10))


@pytest.mark.data
def test_cifar10_on_disk():
    data = CIFAR10DataModule(limit=200)
    data.setup()
    images, _ = next(iter(data.train_dataloader()))
    assert images.shape[1:] == (3, 32, 32)
    assert data.test_set.labels.unique().tolist() == list(range(10))
