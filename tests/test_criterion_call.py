"""Standing in for a loss: what is copied and saved meanwhile, and what a loss may be called with."""

import copy
import pickle
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_hpo.criterion_call import CriterionCall, ignored_target, logits_and_target, one_number


def owner(loss):
    net = nn.Module()
    net.criterion = loss
    return net


@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(label_smoothing=0.1), partial(F.cross_entropy, reduction="sum")])
@pytest.mark.parametrize("again", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_copies_and_pickles_hold_the_loss_as_it_was(loss, again):
    net, batch = owner(loss), (torch.eye(3), torch.arange(3))
    expected = loss(*batch)
    call = CriterionCall(net, "criterion", lambda *_: torch.tensor(-1.0))
    assert b"lightning_hpo" not in pickle.dumps(net)  # they load without us
    other = again(net)
    assert net.criterion(*batch) == -1
    torch.testing.assert_close(other.criterion(*batch), expected)
    torch.testing.assert_close(copy.deepcopy(other).criterion(*batch), expected)
    call.release()
    assert net.criterion is loss
    torch.testing.assert_close(net.criterion(*batch), expected)


def own_names(scores, labels):
    return F.cross_entropy(scores, labels)


@pytest.mark.parametrize("loss", [own_names, F.cross_entropy, nn.CrossEntropyLoss().forward, lambda *args, **kwargs: 0])
def test_logits_and_targets_are_found_by_place_and_by_name(loss):
    names = ("scores", "labels") if loss is own_names else ("input", "target")
    z, y = torch.zeros(2, 3), torch.zeros(2)
    for given in range(3):
        args, kwargs = (z, y)[:given], dict(zip(names[given:], (z, y)[given:], strict=True))
        found = logits_and_target(loss, args, kwargs)
        assert found[0] is z
        assert found[1] is y


@pytest.mark.parametrize(("args", "names"), [((1,), ()), ((1, 2), ("weight",)), ((1, 2, 3), ()), ((1,), ("weight",))])
def test_anything_else_is_refused(args, names):
    with pytest.raises(ValueError, match="takes logits and targets only"):
        logits_and_target(F.cross_entropy, args, dict.fromkeys(names))


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (nn.CrossEntropyLoss(), -100),
        (nn.CrossEntropyLoss(ignore_index=3), 3),
        (nn.BCEWithLogitsLoss(), None),
        (F.cross_entropy, -100),
        (partial(F.cross_entropy, label_smoothing=0.1), -100),
        (partial(F.cross_entropy, ignore_index=3), 3),
        (F.binary_cross_entropy_with_logits, None),
    ],
)
def test_what_a_loss_leaves_out(loss, expected):
    assert ignored_target(owner(loss), "criterion") == expected


def test_a_loss_is_one_number():
    for given in (torch.tensor(2.0), torch.tensor([2.0])):
        assert one_number(given).shape == ()
        assert one_number(given) == 2
    for wrong, named in [(2.0, "a `float`"), (torch.zeros(3), r"shape \(3,\)"), ({}, "a `dict`")]:
        with pytest.raises(ValueError, match=f"one number, got {named}"):
            one_number(wrong)
