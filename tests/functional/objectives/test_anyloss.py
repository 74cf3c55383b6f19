"""Soft confusion matrices: counts, limits, gradients."""

import math

import pytest
import torch
import torchmetrics.functional.classification as tm
from sklearn.metrics import balanced_accuracy_score

from lightning_hpo.functional.objectives.anyloss import anyloss, dead_share, lacks_a_class, soft_counts, soft_sums
from lightning_hpo.functional.objectives.anyloss_inputs import arrange
from lightning_hpo.functional.objectives.anyloss_metrics import METRICS, score
from lightning_hpo.functional.objectives.anyloss_surrogates import SURROGATES, Surrogate

CLASSES, LABELS, N = 4, 3, 60
HARD = Surrogate("anyloss", amplification=1e6)


def draw(task, seed=0, n=N, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    if task == "binary":
        logits = torch.randn(n, generator=generator, dtype=dtype)
        return logits, (logits + torch.randn(n, generator=generator) > 0.6).long()
    if task == "multilabel":
        logits = torch.randn(n, LABELS, generator=generator, dtype=dtype)
        return logits, (logits + torch.randn(n, LABELS, generator=generator) > 0.4).long()
    logits = torch.randn(n, CLASSES, generator=generator, dtype=dtype)
    return logits, (logits + torch.randn(n, CLASSES, generator=generator)).argmax(1)


@pytest.mark.parametrize("task", ["binary", "multiclass", "multilabel"])
@pytest.mark.parametrize("name", SURROGATES)
def test_counts_sum_to_the_number_of_samples(task, name):
    logits, target = draw(task, n=999, dtype=torch.float32)
    counts = soft_counts(soft_sums(arrange(logits, target, task), Surrogate(name), task))
    assert (counts >= 0).all()
    torch.testing.assert_close(counts.sum(0), torch.full(counts.shape[1:], 999.0), rtol=1e-6, atol=0)
    if task == "multiclass":  # every sample is predicted to be something exactly once
        torch.testing.assert_close((counts[0] + counts[1]).sum(), torch.tensor(999.0), rtol=1e-6, atol=0)


def test_counts_are_those_of_the_definition():
    """A slow twin, sample by sample."""
    logits, target = draw("binary")
    tp = fp = fn = tn = 0.0
    for z, y in zip(logits.tolist(), target.tolist(), strict=True):
        a = 1 / (1 + math.exp(-73 * (1 / (1 + math.exp(-z)) - 0.3)))
        tp, fp, fn, tn = tp + a * y, fp + a * (1 - y), fn + (1 - a) * y, tn + (1 - a) * (1 - y)
    counts = soft_counts(soft_sums(arrange(logits, target, "binary"), Surrogate(threshold=0.3)))
    torch.testing.assert_close(counts.flatten(), torch.tensor([tp, fp, fn, tn], dtype=torch.float64))


def test_class_counts_are_those_of_the_definition():
    logits, target = draw("multiclass")
    matrix = torch.zeros(CLASSES, CLASSES, dtype=torch.float64)
    for z, y in zip(logits, target.tolist(), strict=True):
        q = z.softmax(0).tolist()
        a = [1 / (1 + math.exp(-36.5 * (q[c] - max(q[:c] + q[c + 1 :])))) for c in range(CLASSES)]
        for c in range(CLASSES):
            matrix[y, c] += a[c] / sum(a)
    inputs = arrange(logits, target, "multiclass")
    torch.testing.assert_close(soft_sums(inputs, Surrogate(), "multiclass", matrix=True), matrix)
    rows = soft_sums(inputs, Surrogate(), "multiclass")
    expected = torch.stack([matrix.diag(), matrix.sum(0), matrix.sum(1), torch.full((CLASSES,), 60.0).double()])
    torch.testing.assert_close(rows, expected)


# The limit of a hard decision

OF_TORCHMETRICS = {
    "accuracy": "accuracy",
    "f1": "f1_score",
    "jaccard": "jaccard_index",
    "precision": "precision",
    "recall": "recall",
    "specificity": "specificity",
}


def theirs(task, name, logits, target, average=None):
    more = {"multiclass": {"num_classes": CLASSES}, "multilabel": {"num_labels": LABELS}}.get(task, {})
    more |= {"average": average} if average else {}
    p = logits.softmax(1) if task == "multiclass" else logits.sigmoid()
    return getattr(tm, f"{task}_{name}")(p, target, **more).double()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("metric", OF_TORCHMETRICS)
@pytest.mark.parametrize(
    ("task", "average"),
    [("binary", None), *((t, a) for t in ("multiclass", "multilabel") for a in ("macro", "micro", "weighted"))],
)
def test_the_limit_is_that_of_torchmetrics(task, average, metric, seed):
    logits, target = draw(task, seed)
    expected = theirs(task, OF_TORCHMETRICS[metric], logits, target, average)
    found = 1 - anyloss(logits, target, metric, task, average or "macro", surrogate=HARD)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("beta", [0.5, 2.0])
@pytest.mark.parametrize("task", ["binary", "multiclass", "multilabel"])
def test_fbeta_in_the_limit(task, beta):
    logits, target = draw(task)
    more = {"multiclass": {"num_classes": CLASSES}, "multilabel": {"num_labels": LABELS}}.get(task, {})
    p = logits.softmax(1) if task == "multiclass" else logits.sigmoid()
    expected = getattr(tm, f"{task}_fbeta_score")(p, target, beta=beta, **more).double()
    found = 1 - anyloss(logits, target, "fbeta", task, beta=beta, surrogate=HARD)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("metric", "name"), [("mcc", "matthews_corrcoef"), ("kappa", "cohen_kappa")])
@pytest.mark.parametrize("task", ["binary", "multiclass"])
def test_mcc_and_kappa_in_the_limit(task, metric, name):
    logits, target = draw(task)
    found = 1 - anyloss(logits, target, metric, task, surrogate=HARD)
    torch.testing.assert_close(found, theirs(task, name, logits, target), rtol=0, atol=1e-6)


def test_mcc_of_labels_in_the_limit():
    logits, target = draw("multilabel")
    micro = 1 - anyloss(logits, target, "mcc", "multilabel", "micro", surrogate=HARD)
    torch.testing.assert_close(micro, theirs("multilabel", "matthews_corrcoef", logits, target), rtol=0, atol=1e-6)
    macro = 1 - anyloss(logits, target, "mcc", "multilabel", surrogate=HARD)
    each = [theirs("binary", "matthews_corrcoef", logits[:, k], target[:, k]) for k in range(LABELS)]
    torch.testing.assert_close(macro, torch.stack(each).mean(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("task", ["binary", "multiclass"])
def test_metrics_of_recalls_in_the_limit(task):
    logits, target = draw(task)
    predicted = logits.argmax(1) if task == "multiclass" else (logits > 0).long()
    recalls = torch.tensor([(predicted[target == c] == c).double().mean() for c in target.unique()]).double()
    values = {m: 1 - anyloss(logits, target, m, task, surrogate=HARD) for m in ("balanced_accuracy", "gmean", "youden")}
    torch.testing.assert_close(values["balanced_accuracy"], recalls.mean(), rtol=0, atol=1e-6)
    assert values["balanced_accuracy"].item() == pytest.approx(balanced_accuracy_score(target, predicted), abs=1e-6)
    torch.testing.assert_close(values["gmean"], recalls.prod() ** (1 / len(recalls)), rtol=0, atol=1e-6)
    if task == "binary":
        torch.testing.assert_close(values["youden"], recalls.sum() - 1, rtol=0, atol=1e-6)


# Gradients


def closed_form(metric, z, y, L=73.0, beta=1.0):
    p = z.sigmoid()
    a = torch.sigmoid(L * (p - 0.5))
    w = L * a * (1 - a) * p * (1 - p)
    n, positive, tp = len(z), y.sum(), (a * y).sum()
    negative = n - positive
    tn = ((1 - a) * (1 - y)).sum()
    if metric == "accuracy":
        return w * (1 - 2 * y) / n
    if metric == "balanced_accuracy":
        return -w * (y / positive - (1 - y) / negative) / 2
    if metric == "gmean":
        g = (tp * tn / (positive * negative)).sqrt()
        return -(g / 2) * w * (y / tp - (1 - y) / tn)
    whole = beta**2 * positive + a.sum()
    return -(1 + beta**2) * w * (y * whole - tp) / whole**2


@pytest.mark.parametrize(
    ("metric", "beta"),
    [("accuracy", 1.0), ("balanced_accuracy", 1.0), ("gmean", 1.0), ("f1", 1.0), ("fbeta", 0.5), ("fbeta", 2.0)],
)
def test_gradients_are_the_closed_forms(metric, beta):
    z, y = draw("binary")
    z.requires_grad_()
    anyloss(z, y, metric, beta=beta).backward()
    torch.testing.assert_close(z.grad, closed_form(metric, z.detach(), y.double(), beta=beta), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("name", SURROGATES)
@pytest.mark.parametrize("task", ["binary", "multiclass", "multilabel"])
def test_gradcheck(task, name, metric):
    logits, target = draw(task, n=12)
    soft = Surrogate(name, amplification=9.0 if name == "anyloss" else None, width=0.4 if name == "sol-cosine" else 0.1)

    def function(z):
        return anyloss(z, target, metric, task, surrogate=soft)

    assert torch.autograd.gradcheck(function, logits.requires_grad_(), atol=1e-6)


@pytest.mark.parametrize("name", SURROGATES)
def test_derivatives_and_transforms_of_sums_in_pieces(name, monkeypatch):
    monkeypatch.setattr("lightning_hpo.functional.objectives.anyloss._CHUNK", 4)
    logits, target = draw("binary", n=10)
    soft = Surrogate(name, amplification=9.0 if name == "anyloss" else None, width=0.4 if name == "sol-cosine" else 0.1)

    def function(z):
        return anyloss(z, target, "gmean", surrogate=soft)

    def plain(z):
        rows = [(soft(z) * target).sum(), soft(z).sum(), target.sum().double(), torch.tensor(10.0).double()]
        return 1 - score(torch.stack(rows)[:, None], "gmean")

    assert torch.autograd.gradgradcheck(function, logits.requires_grad_(), atol=1e-5)
    z = logits.detach()
    (found,) = torch.autograd.grad(function(logits), logits)
    torch.testing.assert_close(found, torch.func.grad(plain)(z))
    torch.testing.assert_close(torch.func.grad(function)(z), found)
    tangent = torch.linspace(-1, 1, 10, dtype=torch.float64)
    torch.testing.assert_close(
        torch.func.jvp(function, (z,), (tangent,))[1], torch.func.jvp(plain, (z,), (tangent,))[1]
    )
    batch = torch.stack([z, -z, 2 * z])
    for of in (lambda f: f, torch.func.grad):
        torch.testing.assert_close(torch.func.vmap(of(function))(batch), torch.stack([of(plain)(row) for row in batch]))


@pytest.mark.parametrize("metric", ["f1", "mcc"])
def test_higher_derivatives_and_transforms_of_classes(metric):
    logits, target = draw("multiclass", n=6)

    def function(z):
        return anyloss(z, target, metric, "multiclass", surrogate=Surrogate(amplification=9.0))

    assert torch.autograd.gradgradcheck(function, logits.requires_grad_(), atol=1e-5)
    z = logits.detach()
    (expected,) = torch.autograd.grad(function(logits), logits)
    tangent = torch.linspace(-1, 1, z.numel(), dtype=torch.float64).view_as(z)
    torch.testing.assert_close(torch.func.grad(function)(z), expected)
    torch.testing.assert_close(torch.func.jvp(function, (z,), (tangent,))[1], (expected * tangent).sum())
    batch = torch.stack([z, -z, 2 * z])
    torch.testing.assert_close(torch.func.vmap(function)(batch), torch.stack([function(row) for row in batch]))


@pytest.mark.parametrize("name", SURROGATES)
def test_ties_are_shared_and_impossible_classes_are_never_predicted(name):
    soft = Surrogate(name)
    tied = soft_sums(arrange(torch.zeros(4, 3), torch.tensor([0, 1, 2, 2]), "multiclass"), soft, "multiclass", True)
    torch.testing.assert_close(tied, torch.tensor([[1.0], [1.0], [2.0]]).expand(3, 3) / 3)
    logits, target = draw("multiclass")
    logits[:, 3] = -torch.inf  # a mask, as of labels that cannot be
    target = target.clamp(max=2)
    logits.requires_grad_()
    loss = anyloss(logits, target, "f1", "multiclass", surrogate=soft)
    loss.backward()
    assert logits.grad.isfinite().all()
    rest = soft_sums(arrange(logits[:, :3], target, "multiclass"), soft, "multiclass", matrix=True)
    masked = soft_sums(arrange(logits, target, "multiclass"), soft, "multiclass", matrix=True)
    assert (masked[:, 3] <= masked[:, :3].amin(1)).all()
    if name in ("sol-uniform", "sigmoid"):
        torch.testing.assert_close(masked[:3, :3], rest)


def test_many_samples_are_summed_in_pieces_without_a_difference():
    logits, target = draw("binary", n=200_000)
    logits.requires_grad_()
    anyloss(logits, target, "mcc").backward()
    found, logits.grad = logits.grad, None
    ones = torch.ones_like(logits)
    anyloss(logits, target, "mcc", weight=ones).backward()  # the other way to sum
    torch.testing.assert_close(found, logits.grad)


@pytest.mark.parametrize("name", SURROGATES)
def test_slopes_are_those_of_autograd(name):
    z = torch.linspace(-2, 2, 41, dtype=torch.float64, requires_grad=True)
    soft = Surrogate(name)
    (expected,) = torch.autograd.grad(soft(z).sum(), z)
    with torch.no_grad():
        torch.testing.assert_close(soft.slope(z), expected)
    torch.testing.assert_close(soft.slope(z), expected)
    logits = draw("multiclass")[0].requires_grad_()
    own = [torch.autograd.grad(soft.of_classes(logits)[:, c].sum(), logits)[0][:, c] for c in range(CLASSES)]
    torch.testing.assert_close(soft.class_slopes(logits), torch.stack(own, 1))


# Identities


def test_f1_is_dice_with_soft_decisions():
    z, y = draw("binary")
    a = torch.sigmoid(73 * (z.sigmoid() - 0.5))
    dice = 1 - 2 * (a * y).sum() / (a.sum() + y.sum())
    torch.testing.assert_close(anyloss(z, y, "f1"), dice)


def test_sol_uniform_is_the_expected_matrix_over_thresholds():
    """The mean of hard counts over thresholds that are drawn uniformly."""
    z, y = draw("binary")
    thresholds = (torch.arange(20_000) + 0.5) / 20_000
    tp = torch.stack([((z.sigmoid() > t) * y).sum() for t in thresholds]).double().mean()
    counts = soft_counts(soft_sums(arrange(z, y, "binary"), Surrogate("sol-uniform"))).flatten()
    torch.testing.assert_close(counts[0], tp, rtol=1e-4, atol=0)
    p = z.sigmoid()
    youden = 1 - anyloss(z, y, "youden", surrogate=Surrogate("sol-uniform"))
    torch.testing.assert_close(youden, p[y == 1].mean() - p[y == 0].mean())


def test_sol_cosine_is_the_raised_cosine_distribution():
    p = torch.linspace(0.3, 0.8, 26, dtype=torch.float64)
    t = torch.linspace(0.4, 0.6, 20_001, dtype=torch.float64)
    density = (1 + torch.cos(math.pi * (t - 0.5) / 0.1)) / 0.2
    assert torch.trapezoid(density, t).item() == pytest.approx(1.0)
    below = torch.stack([torch.trapezoid(density * (t <= x), t) for x in p])
    torch.testing.assert_close(Surrogate("sol-cosine")(torch.logit(p)), below, rtol=0, atol=2e-4)


@pytest.mark.parametrize("metric", ["f1", "mcc", "kappa", "jaccard"])
@pytest.mark.parametrize("name", SURROGATES)
def test_two_classes_are_the_binary_case(name, metric):
    z, y = draw("binary")
    two = torch.stack([torch.zeros_like(z), z], 1)
    soft, inputs = Surrogate(name), arrange(two, y, "multiclass")
    torch.testing.assert_close(soft_sums(inputs, soft, "multiclass")[:, 1:], soft_sums(arrange(z, y, "binary"), soft))
    if metric in ("mcc", "kappa"):
        torch.testing.assert_close(
            anyloss(two, y, metric, "multiclass", surrogate=soft), anyloss(z, y, metric, surrogate=soft)
        )


@pytest.mark.parametrize("task", ["binary", "multiclass", "multilabel"])
def test_the_order_of_a_batch_does_not_matter(task):
    logits, target = draw(task)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(anyloss(logits[order], target[order], "f1", task), anyloss(logits, target, "f1", task))


@pytest.mark.parametrize("task", ["binary", "multiclass", "multilabel"])
@pytest.mark.parametrize("metric", ["f1", "mcc", "gmean"])
def test_whole_weights_are_copies_and_ignored_rows_are_not_there(task, metric):
    logits, target = draw(task)
    copies = torch.arange(N) % 3
    rows = torch.repeat_interleave(torch.arange(N), copies)
    expected = anyloss(logits[rows], target[rows], metric, task)
    torch.testing.assert_close(anyloss(logits, target, metric, task, weight=copies), expected)
    gone = copies == 0
    marked, poisoned = target.clone(), logits.clone()
    marked[gone], poisoned[gone] = -7, torch.nan
    kept = anyloss(logits[~gone], target[~gone], metric, task)
    torch.testing.assert_close(anyloss(poisoned, marked, metric, task, ignore_index=-7), kept)


def test_weights_have_gradients():
    z, y = draw("binary", n=8)
    weight = torch.rand(8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.autograd.gradcheck(lambda w: anyloss(z, y, "gmean", weight=w), weight)


def test_maps_of_classes_are_samples():
    logits = torch.randn(2, CLASSES, 3, 5, generator=torch.Generator().manual_seed(0))
    target = torch.randint(CLASSES, (2, 3, 5), generator=torch.Generator().manual_seed(1))
    flat = logits.permute(0, 2, 3, 1).reshape(-1, CLASSES)
    found = anyloss(logits, target, "jaccard", "multiclass")
    torch.testing.assert_close(found, anyloss(flat, target.flatten(), "jaccard", "multiclass"))
    masks = torch.randn(2, 1, 3, 5, generator=torch.Generator().manual_seed(2))
    marked = (masks > 1).long()
    torch.testing.assert_close(anyloss(masks, marked), anyloss(masks.flatten(), marked.flatten()))


# Degenerate batches


@pytest.mark.parametrize("target", [torch.zeros(6), torch.ones(6)], ids=["no positives", "no negatives"])
@pytest.mark.parametrize("name", SURROGATES)
@pytest.mark.parametrize("metric", [*METRICS, lambda tp, fp, fn, tn: tp / (tp + fn) + tn / (tn + fp)])
def test_a_missing_class_never_gives_nan(metric, name, target):
    for z in (torch.linspace(-2, 2, 6), torch.full((6,), -40.0), torch.full((6,), 40.0), torch.zeros(6)):
        z = z.clone().requires_grad_()
        loss = anyloss(z, target, metric, surrogate=Surrogate(name))
        loss.backward()
        assert loss.isfinite()
        assert z.grad.isfinite().all()


def test_undefined_terms_are_left_out():
    z = torch.tensor([0.3, -0.2, 0.01])
    negative = 1 - Surrogate()(z)  # how much each counts as predicted negative
    recall = negative.mean()
    assert anyloss(z, torch.zeros(3), "balanced_accuracy").item() == pytest.approx(1 - recall.item())
    assert anyloss(z, torch.zeros(3), "gmean").item() == pytest.approx(1 - recall.sqrt().item())
    assert anyloss(z, torch.zeros(3), "f1").item() == 1
    z.requires_grad_()
    (grad,) = torch.autograd.grad(anyloss(z, torch.zeros(3), "f1"), z)
    assert not grad.any()  # without positives F1 pushes nothing
    logits = torch.eye(3)[:2] * 9  # of three classes the last is not there, and not predicted
    assert anyloss(logits, torch.tensor([0, 1]), "recall", "multiclass").item() < 1e-6


def test_g_mean_of_classes_is_zero_with_one_class_missed_and_has_a_gradient():
    sums = torch.tensor([[5.0, 0.0], [10.0, 0.0], [5.0, 5.0], [10.0, 10.0]], requires_grad=True)
    value = score(sums, "gmean", "multiclass")
    assert value.item() == 0
    value.backward()
    assert sums.grad.isfinite().all()


def test_batches_that_lack_a_class_are_found():
    for target, lacks in [([0, 0], True), ([1, 1], True), ([0, 1], False)]:
        sums = soft_sums(arrange(torch.zeros(2), torch.tensor(target), "binary"), Surrogate())
        assert bool(lacks_a_class(sums)) is lacks
    inputs = arrange(torch.zeros(3, 3), torch.tensor([0, 2, 2]), "multiclass")
    assert lacks_a_class(soft_sums(inputs, Surrogate(), "multiclass"), "multiclass")
    matrix = soft_sums(inputs, Surrogate(), "multiclass", matrix=True)
    assert lacks_a_class(matrix, "multiclass", matrix=True)
    assert not lacks_a_class(matrix, "multiclass", matrix=True, ignore_index=1)
    assert lacks_a_class(matrix, "multiclass", matrix=True, ignore_index=-100)


def test_nan_is_not_hidden():
    z, y = draw("binary")
    z[3] = torch.nan
    assert all(anyloss(z, y, metric).isnan() for metric in METRICS)
    logits, target = draw("multiclass")
    logits[0, 0] = torch.nan
    for metric in METRICS:
        assert anyloss(logits, target, metric, "multiclass").isnan(), metric


def test_half_precision_is_summed_in_full():
    z, y = draw("binary", n=5000, dtype=torch.float32)
    coarse = z.bfloat16()
    assert anyloss(coarse, y).dtype == torch.float32
    torch.testing.assert_close(anyloss(coarse, y), anyloss(coarse.float(), y))


@pytest.mark.parametrize("metric", ["f1", "mcc", "kappa"])
@pytest.mark.parametrize("task", ["binary", "multiclass", "multilabel"])
def test_autocast_does_not_round_counts(task, metric):
    logits, target = draw(task, n=999, dtype=torch.float32)
    expected = anyloss(logits, target, metric, task)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(anyloss(logits, target, metric, task), expected)


def test_dead_samples_are_counted():
    p = torch.tensor([0.5, 0.6, 0.65, 0.7, 0.2])
    a = torch.sigmoid(73 * (p - 0.5))
    slopes = 73 * a * (1 - a) * p * (1 - p)
    assert slopes[0].item() == pytest.approx(73 / 16)  # the largest there is
    assert (slopes < 1e-4).tolist() == [False, False, False, True, True] or slopes[1].item() > 1e-2
    inputs = arrange(torch.logit(p), torch.tensor([0, 0, 1, 0, -1]), "binary", ignore_index=-1)
    assert dead_share(inputs, Surrogate()).item() == (slopes[:4] < 1e-4).float().mean().item()
    two = torch.stack([torch.zeros(4), torch.logit(p[:4])], 1)
    inputs = arrange(two, torch.zeros(4, dtype=torch.long), "multiclass")
    assert dead_share(inputs, Surrogate(), "multiclass").item() == (slopes[:4] < 1e-4).float().mean().item()
