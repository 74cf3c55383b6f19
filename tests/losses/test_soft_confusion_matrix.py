"""Soft counts as a metric of torchmetrics."""

import pytest
import torch
import torchmetrics.classification as tm

from lightning_hpo import AnyLoss, SoftConfusionMatrix


def test_batches_add_up_and_forward_can_be_differentiated():
    generator = torch.Generator().manual_seed(0)
    z, y = torch.randn(30, generator=generator), torch.randint(2, (30,), generator=generator)
    counts = SoftConfusionMatrix()
    for part in (slice(0, 10), slice(10, 30)):
        logits = z[part].clone().requires_grad_()
        tp, fp, fn, _ = counts(logits, y[part])
        (2 * tp / (2 * tp + fp + fn)).backward()
        expected = z[part].clone().requires_grad_()
        (1 - AnyLoss("f1")(expected, y[part])).backward()
        torch.testing.assert_close(logits.grad, expected.grad)
    torch.testing.assert_close(counts.score("f1"), 1 - AnyLoss("f1")(z, y))
    torch.testing.assert_close(counts.compute().sum(), torch.tensor(30.0))
    counts.reset()
    assert not counts.sums.any()


@pytest.mark.parametrize("task", ["binary", "multiclass", "multilabel"])
def test_hard_counts_are_those_of_torchmetrics(task):
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(50 if task == "binary" else (50, 3), generator=generator)
    y = torch.randint(3 if task == "multiclass" else 2, (50,) if task != "multilabel" else (50, 3), generator=generator)
    size = {"binary": None, "multiclass": 3, "multilabel": 3}[task]
    counts = SoftConfusionMatrix(task, size, hard=True)
    theirs = {
        "binary": tm.BinaryStatScores(),
        "multiclass": tm.MulticlassStatScores(3, average=None),
        "multilabel": tm.MultilabelStatScores(3, average=None),
    }[task]
    for part in (slice(0, 20), slice(20, 50)):
        counts.update(z[part], y[part])
        theirs.update(z[part].softmax(1) if task == "multiclass" else z[part].sigmoid(), y[part])
    tp, fp, tn, fn, _ = theirs.compute().float().movedim(-1, 0)
    torch.testing.assert_close(counts.compute(), torch.stack([tp, fp, fn, tn]))


def test_hard_counts_are_whole_under_autocast():
    y = torch.arange(903) // 301
    counts = SoftConfusionMatrix("multiclass", 3, hard=True)
    with torch.autocast("cpu", torch.bfloat16):
        counts.update(torch.nn.functional.one_hot(y, 3).float(), y)
    assert counts.compute()[0].tolist() == [301.0] * 3  # which 16 bits cannot hold


def test_wrong_arguments_and_values_are_named():
    with pytest.raises(ValueError, match="num_classes is for several classes"):
        SoftConfusionMatrix("multiclass")
    for wrong in (1, 2.5, "3"):
        with pytest.raises(ValueError, match=f"num_classes must be a whole number of at least 2, got {wrong!r}"):
            SoftConfusionMatrix("multiclass", wrong)
    with pytest.raises(ValueError, match="no effect with hard=True"):
        SoftConfusionMatrix(hard=True, amplification=5.0)
    with pytest.raises(ValueError, match=r"task must be .*; surrogate must be"):
        SoftConfusionMatrix("ordinal", surrogate="hinge")
    counts = SoftConfusionMatrix("multiclass", 3)
    with pytest.raises(ValueError, match=r"num_classes is 3, logits have shape \(2, 4\)"):
        counts.update(torch.zeros(2, 4), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="from 0 to 2, got 7"):
        counts.update(torch.zeros(2, 3), torch.tensor([0, 7]))
    with pytest.raises(ValueError, match="metric must be one of"):
        counts.score("auc")
