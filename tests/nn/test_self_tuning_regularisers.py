"""Regularisers with a strength for each example, against torch, torchvision and loops."""

import pytest
import torch
from torch import nn
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as torchvision

from lightning_hpo.nn.self_tuning_augmentation import (
    TunedAffine,
    TunedColorJitter,
    TunedCutout,
    affine,
    cutout,
    shift_hue,
)
from lightning_hpo.nn.self_tuning_lstm import WeightDropLSTM
from lightning_hpo.nn.self_tuning_regularisers import (
    TunedDropout,
    TunedInputScale,
    activation_penalty,
    dropout_layers,
    temporal_penalty,
    tune_dropout,
)

RATES = torch.tensor([0.0, 0.3, 0.9, 0.999])


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def test_each_example_is_dropped_at_its_rate_and_keeps_its_mean():
    x = TunedDropout(lambda: RATES)(torch.ones(4, 20_000))
    share = (x == 0).float().mean(1)
    torch.testing.assert_close(share, RATES.clamp(max=0.95), atol=0.01, rtol=0)
    torch.testing.assert_close(x.mean(1), torch.ones(4), atol=0.1, rtol=0)
    assert torch.equal(x[0], torch.ones(20_000))


def test_channels_are_dropped_as_a_whole_and_windows_belong_to_their_example():
    x = TunedDropout(lambda: torch.tensor([0.0, 0.5]), per="channel")(torch.ones(4, 600, 3, 3))
    assert torch.equal(x.amin((2, 3)), x.amax((2, 3)))
    share = (x[:, :, 0, 0] == 0).float().mean(1)
    torch.testing.assert_close(share, torch.tensor([0.0, 0.0, 0.5, 0.5]), atol=0.06, rtol=0)


@pytest.mark.parametrize(
    "layer",
    [
        TunedDropout(0.5),
        TunedInputScale(0.5),
        TunedCutout(3, 2),
        TunedColorJitter(0.5, 0.5, 0.5, 0.5),
        TunedAffine(45, 0.5, 0.5, 10),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_nothing_happens_in_eval_mode_and_something_in_training(layer):
    images = torch.rand(3, 3, 8, 8)
    assert torch.equal(layer.eval()(images), images)
    assert not torch.equal(layer.train()(images), images)
    assert layer(images).shape == images.shape


def test_dropout_layers_of_any_network_get_rates_and_go_back():
    net = nn.Sequential(nn.Linear(4, 400), nn.Dropout(0.1), nn.Unflatten(1, (40, 10, 1)), nn.Dropout2d(0.2))
    assert dropout_layers(net) == ["1", "3"]
    with pytest.raises(ValueError, match=r"\['0'\] are no dropout layers; there are \['1', '3'\]"):
        tune_dropout(net, {"0": 0.5})
    tuned = tune_dropout(net, {"1": lambda: torch.tensor([0.0, 0.9]), "3": 0.0})
    dropped = (net(torch.ones(2, 4)) == 0).float().mean((1, 2, 3))
    torch.testing.assert_close(dropped, torch.tensor([0.0, 0.9]), atol=0.06, rtol=0)
    net.eval()
    assert (net(torch.ones(2, 4)) == 0).sum() == 0
    tuned.undo()
    assert [type(layer) for layer in (net[1], net[3])] == [nn.Dropout, nn.Dropout2d]
    assert (net[1].p, "_rate" in net[1].__dict__) == (0.1, False)


def test_input_scale_lies_between_its_bounds():
    amounts = torch.tensor([0.0, 0.5, 2.0]).repeat(3000)
    factors = TunedInputScale(lambda: amounts)(torch.ones(9000, 1)).view(3000, 3)
    torch.testing.assert_close(factors.amin(0), 1 / (1 + amounts[:3]), atol=0.01, rtol=0)
    torch.testing.assert_close(factors.amax(0), 1 + amounts[:3], atol=0.01, rtol=0)


def test_penalties_are_means_over_examples_of_their_strengths():
    outputs, weights = torch.randn(5, 7, 3), torch.rand(5)
    expected = sum(weights[i] * outputs[i].square().mean() for i in range(5)) / 5
    torch.testing.assert_close(activation_penalty(outputs, lambda: weights), expected)
    change = outputs[:, 1:] - outputs[:, :-1]
    expected = sum(weights[i] * change[i].square().mean() for i in range(5)) / 5
    torch.testing.assert_close(temporal_penalty(outputs, lambda: weights), expected)


def test_cutout_blackens_what_it_says():
    images, centres = torch.rand(3, 2, 9, 11) + 0.1, torch.tensor([[[4.0, 5], [0, 0]], [[8, 10], [4, 5]], [[4, 5]] * 2])
    length, holes = torch.tensor([3.0, 4.9, 0.5]), torch.tensor([2.0, 1.7, 2.0])
    found = cutout(images, centres, length, holes)
    for i in range(3):
        expected = images[i].clone()
        for k in range(int(holes[i])):
            side = int(length[i])
            for row in range(9):
                for column in range(11):
                    top, left = (int(c) - side // 2 for c in centres[i, k])
                    if top <= row < top + side and left <= column < left + side:
                        expected[:, row, column] = 0
        assert torch.equal(found[i], expected)
    assert (found[0, 0] == 0).sum() == 9 + 4  # the second one is cut by the corner


def test_cutout_takes_whole_numbers_for_each_example():
    holes = torch.tensor([0.0, 1.0, 4.0]).repeat(200)
    found = TunedCutout(lambda: torch.full((600,), 2.3), lambda: holes)(torch.ones(600, 1, 40, 40))
    black = (found == 0).sum((1, 2, 3)).view(200, 3).float().mean(0)
    assert black[0] == 0
    torch.testing.assert_close(black[1:], torch.tensor([4.0, 16.0]), rtol=0.1, atol=0)


def test_hues_are_those_of_torchvision():
    images, shifts = torch.rand(6, 3, 5, 5), torch.tensor([-0.5, -0.2, 0.0, 0.1, 0.35, 0.5])
    images[0, :, 0] = 0.5  # grey has no hue
    found = shift_hue(images, shifts.view(6, 1, 1, 1))
    for image, shift, ours in zip(images, shifts, found, strict=True):
        torch.testing.assert_close(ours, torchvision.adjust_hue(image, shift.item()), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation"])
def test_jitter_is_that_of_torchvision_with_a_factor_for_each_image(name, monkeypatch):
    images, drawn = torch.rand(4, 3, 5, 5), torch.tensor([0.0, 0.2, 0.7, 1.0])
    amounts = torch.tensor([0.1, 0.5, 0.8, 1.5])
    monkeypatch.setattr("lightning_hpo.nn.self_tuning_augmentation._uniform", lambda _: drawn.view(4, 1, 1, 1))
    found = TunedColorJitter(**{name: lambda: amounts})(images)
    for i in range(4):
        low, high = max(0.0, 1 - amounts[i].item()), 1 + amounts[i].item()
        factor = low + (high - low) * drawn[i].item()
        expected = getattr(torchvision, f"adjust_{name}")(images[i], factor)
        torch.testing.assert_close(found[i], expected, rtol=0, atol=1e-5)


def test_affine_is_that_of_torchvision_with_values_for_each_image():
    images = torch.rand(4, 2, 9, 13)
    degrees, shear = torch.tensor([0.0, 30.0, -75.0, 160.0]), torch.tensor([0.0, 10.0, -20.0, 5.0])
    shift, scale = torch.tensor([[2.0, -1], [0, 0], [-3, 4], [1, 1]]), torch.tensor([1.0, 0.7, 1.4, 1.0])
    found = affine(images, degrees, shift, scale, shear)
    for i in range(4):
        expected = torchvision.affine(
            images[i],
            degrees[i].item(),
            [int(s) for s in shift[i]],
            scale[i].item(),
            [shear[i].item(), 0.0],
            interpolation=InterpolationMode.BILINEAR,
        )
        torch.testing.assert_close(found[i], expected, rtol=0, atol=2e-4)


def test_weights_are_dropped_at_their_rate_and_never_by_examples():
    lstm = WeightDropLSTM(2, 50, weight_drop=lambda: torch.tensor(0.4))
    x = torch.randn(5, 1, 2)
    first, second = lstm(x)[0], lstm(x)[0]
    assert (first - second).abs().max() > 1e-4
    plain = nn.LSTM(2, 50)
    plain.load_state_dict(lstm.state_dict())
    torch.testing.assert_close(lstm.eval()(x)[0], plain(x)[0])
    lstm.train().weight_drop = lambda: torch.tensor([0.1, 0.2])
    with pytest.raises(ValueError, match="one value a batch, got one an example: name it in `per_batch`"):
        lstm(x)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: TunedDropout(1.0, per="row"), "rate must be at least 0 and below 1, got 1.0; per must be 'element'"),
        (lambda: TunedInputScale(-1.0), "amount must be at least 0"),
        (lambda: TunedCutout(-1, 5), "length must be at least 0, got -1; holes must be from 0 to 4"),
        (lambda: TunedColorJitter(-1, hue=0.7), "brightness must be .*; hue must be from 0 to 0.5"),
        (lambda: TunedAffine(200, 2, 1, 90), "degrees must .* translate must .* scale must .* shear must"),
        (lambda: TunedDropout(lambda: torch.ones(3))(torch.ones(4, 2)), "expected 3 rows"),
        (lambda: TunedDropout(lambda: torch.ones(4, 1))(torch.ones(4, 2)), r"one an example, got shape \(4, 1\)"),
        (lambda: TunedColorJitter(hue=0.1)(torch.ones(2, 1, 3, 3)), "hues need three channels, got 1"),
        (lambda: TunedColorJitter(contrast=0.1)(torch.ones(2, 2, 3, 3)), "one channel or three, got 2"),
        (lambda: WeightDropLSTM(1, 1, weight_drop=1.5), "weight_drop must lie from 0 to 1, got 1.5"),
    ],
)
def test_refusals(make, words):
    with pytest.raises(ValueError, match=words):
        make()
