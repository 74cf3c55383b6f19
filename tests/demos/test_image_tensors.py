from pathlib import Path

import pytest
import torch
from PIL import Image

from lightning_hpo.demos.image_tensors import (
    ImageTensors,
    data_root,
    random_flip,
    random_shift,
    read_folder,
    stratified_split,
)


def test_split_is_stratified_disjoint_and_decided_by_the_seed():
    labels = torch.tensor([0] * 40 + [1] * 20 + [2] * 12)
    kept, held_out = stratified_split(labels, 0.25, seed=3)
    assert sorted(torch.cat([kept, held_out]).tolist()) == list(range(72))
    assert labels[held_out].bincount().tolist() == [10, 5, 3]
    assert not labels[kept].diff().ge(0).all()  # shuffled, not one class after the other
    again, other = stratified_split(labels, 0.25, seed=3), stratified_split(labels, 0.25, seed=4)
    assert torch.equal(again[1], held_out)
    assert not torch.equal(other[1], held_out)


def test_split_without_a_second_part_and_bad_share():
    kept, held_out = stratified_split(torch.zeros(5, dtype=torch.long), 0.0, seed=0)
    assert (len(kept), len(held_out)) == (5, 0)
    with pytest.raises(ValueError, match=r"\[0, 1\), got 1.5"):
        stratified_split(torch.zeros(5), 1.5, seed=0)


def test_batch_is_standardised_bytes():
    images = torch.randint(0, 256, (6, 3, 4, 4), dtype=torch.uint8)
    data = ImageTensors(images, torch.arange(6), [0.1, 0.2, 0.3], [0.5, 0.25, 1.0])
    batch, labels = data.__getitems__([5, 0])
    expected = (images[[5, 0]].double() / 255 - torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)) / torch.tensor(
        [0.5, 0.25, 1.0]
    ).view(3, 1, 1)
    torch.testing.assert_close(batch.double(), expected, rtol=1e-5, atol=1e-5)
    assert labels.tolist() == [5, 0]
    single, label = data[5]
    torch.testing.assert_close(single, batch[0])
    assert label == 5


def test_shift_moves_each_image_by_its_own_offset_and_repeats_the_edge():
    torch.manual_seed(0)
    images = torch.rand(64, 2, 6, 5)
    moved = random_shift(images, 2)
    assert moved.shape == images.shape
    offsets = set()
    for before, after in zip(images, moved, strict=True):
        matches = []
        for dy in range(-2, 3):
            for dx in range(-2, 3):
                rows = (torch.arange(6) + dy).clamp(0, 5)
                columns = (torch.arange(5) + dx).clamp(0, 4)
                if torch.equal(before[:, rows][:, :, columns], after):
                    matches.append((dy, dx))
        assert len(matches) == 1
        offsets.update(matches)
    assert len(offsets) > 12  # of 25: offsets really differ between images


def test_flip_mirrors_whole_images_only():
    torch.manual_seed(0)
    images = torch.rand(32, 1, 3, 4)
    flipped = random_flip(images)
    same = [torch.equal(a, b) for a, b in zip(images, flipped, strict=True)]
    mirrored = [torch.equal(a.flip(-1), b) for a, b in zip(images, flipped, strict=True)]
    assert all(a != b for a, b in zip(same, mirrored, strict=True))
    assert 4 < sum(mirrored) < 28


def save(path: Path, colour: tuple[int, int, int], size: tuple[int, int] = (4, 4)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def test_folder_is_read_in_alphabetical_order(tmp_path):
    save(tmp_path / "dog" / "b.png", (0, 255, 0))
    save(tmp_path / "cat" / "a.png", (255, 0, 0))
    save(tmp_path / "dog" / "a.png", (0, 0, 255))
    (tmp_path / "dog" / "notes.txt").write_text("not an image")
    images, labels, classes = read_folder(tmp_path)
    assert classes == ["cat", "dog"]
    assert labels.tolist() == [0, 1, 1]
    assert images.dtype == torch.uint8
    assert images[:, :, 0, 0].tolist() == [[255, 0, 0], [0, 0, 255], [0, 255, 0]]
    assert read_folder(tmp_path)[0] is images  # decoded once
    assert read_folder(tmp_path, limit=1)[1].tolist() == [0, 1]


def test_folder_of_different_sizes_needs_a_size(tmp_path):
    save(tmp_path / "a" / "1.png", (255, 255, 255), (8, 4))
    save(tmp_path / "a" / "2.png", (0, 0, 0), (4, 4))
    with pytest.raises(ValueError, match="differ in size"):
        read_folder(tmp_path)
    assert read_folder(tmp_path, size=2)[0].shape == (2, 3, 2, 2)


def test_folder_without_images_says_what_was_looked_for(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"<class>/\*\.jpg"):
        read_folder(tmp_path / "absent")


def test_root_comes_from_the_argument_then_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("LIGHTNING_HPO_DATA", str(tmp_path))
    assert data_root(None) == tmp_path
    assert data_root("elsewhere") == Path("elsewhere")
    monkeypatch.delenv("LIGHTNING_HPO_DATA")
    with pytest.raises(FileNotFoundError, match="LIGHTNING_HPO_DATA"):
        data_root(None)
