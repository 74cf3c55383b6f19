"""AnyLoss as a module: running sums, checks, state."""

import copy
import io
import itertools
import warnings

import pytest
import torch
from torch import nn

from lightning_hpo import AnyLoss
from lightning_hpo.functional.objectives.anyloss import anyloss
from lightning_hpo.functional.objectives.anyloss_metrics import METRICS
from lightning_hpo.functional.objectives.anyloss_surrogates import Surrogate


def batches(count, n=16, classes=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (n,) if classes is None else (n, classes)
    for _ in range(count):
        yield (
            torch.randn(shape, generator=generator, dtype=torch.float64),
            torch.randint(classes or 2, (n,), generator=generator),
        )


@pytest.mark.parametrize("metric", ["f1", "mcc"])
@pytest.mark.parametrize("classes", [None, 3, 4])
def test_it_is_the_function(metric, classes):
    task = "binary" if classes is None else "multiclass"
    criterion = AnyLoss(metric, task, amplification=20.0)
    for logits, target in batches(2, classes=classes):
        expected = anyloss(logits, target, metric, task, surrogate=Surrogate(amplification=20.0))
        torch.testing.assert_close(criterion(logits, target), expected)


def test_a_function_of_counts_is_a_metric():
    logits, target = next(batches(1))
    own = AnyLoss(lambda tp, fp, fn, tn: 2 * tp / (2 * tp + fp + fn))
    torch.testing.assert_close(own(logits, target), AnyLoss("f1")(logits, target))
    with pytest.raises(ValueError, match="shaped like its arguments"):
        AnyLoss(lambda tp, fp, fn, tn: 0.5)(logits, target)


# Running sums


@pytest.mark.parametrize("metric", ["f1", "gmean", "mcc"])
@pytest.mark.parametrize("classes", [None, 4])
def test_running_sums_give_slopes_at_earlier_batches(metric, classes):
    """A slow twin: the metric's derivative in the shares, at shares of earlier batches, times the batch's own."""
    task = "binary" if classes is None else "multiclass"
    criterion = AnyLoss(metric, task, running=0.75)
    plain = AnyLoss(metric, task)
    sums = None
    for logits, target in batches(4, classes=classes):
        logits.requires_grad_()
        loss = criterion(logits, target)
        (found,) = torch.autograd.grad(loss, logits)
        own = plain.batch_sums(plain.arranged(logits, target))
        at = (own if sums is None else sums).detach().requires_grad_()
        value = plain.value(at)
        (slope,) = torch.autograd.grad(value, at)
        total = float(len(target))
        samples = at.sum() if metric == "mcc" and classes else at[3, 0]
        (expected,) = torch.autograd.grad(-(slope * own * (samples / total).detach()).sum(), logits)
        torch.testing.assert_close(loss, 1 - value)
        torch.testing.assert_close(found, expected)
        sums = own.detach() if sums is None else 0.75 * sums + 0.25 * own.detach()
        torch.testing.assert_close(criterion.sums, sums)


def test_one_batch_again_and_again_is_the_plain_loss():
    logits, target = next(batches(1))
    logits.requires_grad_()
    criterion = AnyLoss("gmean", running=0.9)
    (expected,) = torch.autograd.grad(AnyLoss("gmean")(logits, target), logits)
    for _ in range(3):
        loss = criterion(logits, target)
        (found,) = torch.autograd.grad(loss, logits)
        torch.testing.assert_close(found, expected)


def test_a_batch_without_positives_still_learns_about_negatives():
    criterion = AnyLoss("f1", running=0.9)
    criterion(torch.tensor([0.1, -0.1, 0.2]), torch.tensor([1, 0, 1]))
    z = torch.zeros(3, requires_grad=True)
    criterion(z, torch.zeros(3)).backward()
    assert (z.grad > 0).all()  # false positives cost precision, whatever the batch holds


def test_micro_batches_of_a_step_see_the_same_slopes():
    whole, parts = AnyLoss("gmean", running=0.9), AnyLoss("gmean", running=0.9)
    parts.commits = False
    first, *rest = list(batches(4))
    whole(*first)
    parts(*first)
    parts.commit()
    for (z1, y1), (z2, y2) in itertools.pairwise(rest):
        z1, z2 = z1.requires_grad_(), z2.clone().requires_grad_()
        joined = torch.cat([z1, z2])
        (expected,) = torch.autograd.grad(whole(joined, torch.cat([y1, y2])), joined)
        found = [torch.autograd.grad(parts(z, y) / 2, z)[0] for z, y in ((z1, y1), (z2, y2))]
        parts.commit()
        torch.testing.assert_close(torch.cat(found), expected)
    torch.testing.assert_close(parts.sums, whole.sums)


def test_what_is_not_finite_leaves_no_trace():
    criterion = AnyLoss("f1", running=0.9)
    first, second = batches(2)
    criterion(*first)
    before = criterion.sums.clone()
    assert criterion(second[0] * torch.nan, second[1]).isnan()
    torch.testing.assert_close(criterion.sums, before)
    ignoring = AnyLoss("f1", running=0.9, ignore_index=1)
    ignoring(torch.zeros(2), torch.ones(2))
    assert not ignoring.sums.any()


def test_evaluation_neither_reads_nor_moves_the_running_sums():
    criterion = AnyLoss("f1", running=0.9)
    first, second = batches(2)
    criterion(*first)
    before = criterion.sums.clone()
    criterion.eval()
    torch.testing.assert_close(criterion(*second), AnyLoss("f1")(*second))
    torch.testing.assert_close(criterion.sums, before)


@pytest.mark.parametrize("moment", [0, 2])
def test_state_is_saved_and_goes_on_bit_for_bit(moment):
    criterion = AnyLoss("f1", "multiclass", running=0.9)
    drawn = list(batches(4, classes=3))
    for batch in drawn[:moment]:
        criterion(*batch)
    file = io.BytesIO()
    torch.save(criterion.state_dict(), file)
    file.seek(0)
    other = AnyLoss("f1", "multiclass", running=0.9)
    other.load_state_dict(torch.load(file, weights_only=True))
    for batch in drawn[moment:]:
        assert torch.equal(criterion(*batch), other(*batch))
    assert AnyLoss("f1").state_dict() == {}  # nothing to save without running sums


# Values


def test_wrong_targets_are_named_in_every_batch():
    criterion = AnyLoss("f1")
    criterion(torch.zeros(3), torch.tensor([0, 1, 1]))
    with pytest.raises(ValueError, match="targets must be 0 or 1, got 2"):
        criterion(torch.zeros(3), torch.tensor([0, 2, 1]))


def test_probabilities_are_warned_of_once():
    p, y = torch.rand(20, generator=torch.Generator().manual_seed(0)), torch.randint(2, (20,))
    criterion = AnyLoss("f1")
    with pytest.warns(UserWarning, match="from_logits=False"):
        criterion(p, y)
    criterion(p, y)
    torch.testing.assert_close(AnyLoss("f1", from_logits=False)(p, y), AnyLoss("f1")(torch.logit(p), y))


def test_what_cannot_be_a_probability_or_a_weight_is_named():
    y = torch.tensor([0, 1])
    with pytest.raises(ValueError, match=r"probabilities must be from 0 to 1, got some from -3 to 0\.5"):
        AnyLoss("f1", from_logits=False)(torch.tensor([-3.0, 0.5]), y)
    with pytest.raises(ValueError, match="weights must not be negative, got -1"):
        AnyLoss("f1")(torch.zeros(2), y, torch.tensor([1.0, -1.0]))
    with pytest.raises(ValueError, match=r"targets must be 0 or 1, got nan\.$"):
        AnyLoss("f1")(torch.zeros(2), torch.full((2,), torch.nan))


def test_nan_is_an_error_if_asked():
    z = torch.tensor([0.0, torch.nan])
    assert AnyLoss("f1")(z, torch.tensor([0, 1])).isnan()
    with pytest.raises(ValueError, match="NaN among the logits"):
        AnyLoss("f1", detect_nan=True)(z, torch.tensor([0, 1]))


def test_every_wrong_argument_is_named_at_once():
    with pytest.raises(ValueError) as error:
        AnyLoss("auc", "ordinal", amplification=-1.0, threshold=1.5, beta=-2.0, running=1.0, ignore_index="no")
    for name in ("metric", "task", "amplification", "threshold", "beta", "running", "ignore_index"):
        assert name in str(error.value)
    for name in METRICS:
        assert repr(name) in str(error.value)


def test_the_amplification_may_be_set():
    logits, target = next(batches(1))
    criterion = AnyLoss("f1")
    criterion.amplification = 5.0
    torch.testing.assert_close(criterion(logits, target), AnyLoss("f1", amplification=5.0)(logits, target))
    for wrong in (0.0, "steep"):
        with pytest.raises(ValueError, match="positive"):
            criterion.amplification = wrong
    with pytest.raises(ValueError, match="no effect on surrogate='sol-cosine'"):
        AnyLoss("f1", surrogate="sol-cosine").amplification = 5.0


def test_copies_and_autocast():
    logits, target = next(batches(1, classes=3))
    criterion = AnyLoss("mcc", "multiclass", running=0.5)
    criterion(logits.float(), target)
    other = copy.deepcopy(criterion)
    with torch.autocast("cpu", torch.bfloat16):
        found = criterion(logits.float(), target)
    assert found.dtype == torch.float32
    assert torch.equal(found, other(logits.float(), target))
    assert criterion.sums.dtype == torch.float32


@pytest.mark.parametrize("task", ["binary", "multiclass", "multilabel"])
def test_it_compiles_into_one_graph(task):
    generator = torch.Generator().manual_seed(0)
    shape = (16,) if task == "binary" else (16, 3)
    logits = torch.randn(shape, generator=generator)
    target = torch.randint(3, (16,), generator=generator) if task == "multiclass" else (logits > 0.5).long()
    criterion, gradients = AnyLoss("f1", task), []
    for call in (criterion, torch.compile(criterion, backend="aot_eager", fullgraph=True)):
        leaf = logits.clone().requires_grad_()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own, while tracing
            call(leaf, target).backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients)


def test_a_small_last_layer_leaves_no_sample_dead():
    """Labels that a network is confidently wrong about are learned only if it begins without confidence."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 5, generator=generator)
    y = (x[:, 0] > 1).float()
    f1 = []
    for shrink in (False, True):
        layer = nn.Linear(5, 1)
        with torch.no_grad():
            layer.weight.copy_(torch.tensor([[-9.0, 3.0, 0.0, 0.0, 0.0]]))
            layer.bias.fill_(-2.0)
        if shrink:
            AnyLoss.shrink(layer)
        criterion, optimizer = AnyLoss("f1"), torch.optim.Adam(layer.parameters(), lr=0.01)
        for _ in range(300):
            optimizer.zero_grad()
            criterion(layer(x).squeeze(1), y).backward()
            optimizer.step()
        with torch.no_grad():
            f1.append(1 - anyloss(layer(x).squeeze(1), y, surrogate=Surrogate("hard")).item())
    assert f1[1] > 0.9
    assert f1[0] < f1[1] - 0.3


@pytest.mark.gpu
def test_targets_on_a_gpu_are_looked_at_without_waiting():
    criterion = AnyLoss("f1").cuda()
    z = torch.zeros(64, device="cuda")
    good, bad = torch.arange(64, device="cuda") % 2, torch.arange(64, device="cuda") % 3
    criterion(z, good)
    torch.cuda.set_sync_debug_mode("error")
    try:
        criterion(z, bad)
        criterion(z, good)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    with pytest.raises(ValueError, match="targets must be from 0 to 1, got some from 0 to 2"):
        criterion(z, good)
