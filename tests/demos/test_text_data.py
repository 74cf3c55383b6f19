import pytest
import torch

from lightning_hpo.demos import SST2DataModule


def write(folder, **parts):
    (folder / "sst2").mkdir()
    for part, lines in parts.items():
        (folder / "sst2" / f"{part}.tsv").write_text("".join(f"{line}\n" for line in lines))


def test_words_are_numbered_by_the_training_sentences_alone(tmp_path):
    write(
        tmp_path, train=["a good good film\t1", "a bad film\t0"], dev=["a superb film\t1"], test=["bad bad bad bad\t0"]
    )
    data = SST2DataModule(tmp_path, batch_size=2, max_length=3, min_count=2)
    data.setup()
    assert data.vocabulary == {"a": 2, "film": 3, "good": 4}
    assert data.words == 5
    words, labels = data.train_set.tensors
    assert words.tolist() == [[2, 4, 4], [2, 1, 3]]  # the fourth word is cut off
    assert labels.tolist() == [1, 0]
    assert data.val_set.tensors[0].tolist() == [[2, 1, 3]]
    (batch,) = data.test_dataloader()
    assert batch[0].tolist() == [[1, 1, 1]]
    first = data.train_set
    data.setup()
    assert data.train_set is first


def test_absent_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="SST-2 not found: looked for .*sst2/train.tsv, dev.tsv and test.tsv"):
        SST2DataModule(tmp_path).setup()


def test_lines_that_are_no_sentence_with_a_label(tmp_path):
    write(tmp_path, train=["fine\t1", "no label", "wrong\t2"], dev=["a\t0"], test=["a\t0"])
    with pytest.raises(ValueError, match=r"train.tsv: lines must be a sentence, a tab and 0 or 1; others are \[2, 3\]"):
        SST2DataModule(tmp_path).setup()


def test_bad_values():
    with pytest.raises(ValueError, match="`batch_size` must be at least 1, got 0; `max_length` must be at least 1"):
        SST2DataModule(batch_size=0, max_length=0)
    with pytest.raises(RuntimeError, match="setup"):
        SST2DataModule().val_dataloader()


@pytest.mark.data
def test_sst2_on_disk():
    data = SST2DataModule()
    data.setup()
    words, labels = next(iter(data.train_dataloader()))
    assert words.shape == (32, 24)
    assert labels.unique().tolist() == [0, 1]
    assert int(words.max()) < data.words
    assert (
        torch.stack([part.tensors[1].float().mean() for part in (data.train_set, data.test_set)]).sub(0.5).abs().max()
        < 0.1
    )
