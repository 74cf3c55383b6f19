"""Projected SGD and Epoch-SGD against closed forms and the rate of the theory."""

import math

import pytest
import torch

from lightning_hpo.functional.bilevel.epoch_sgd import epoch_sgd, project_ball, projected_sgd


def test_projection_is_over_all_tensors_together():
    center = {"a": torch.tensor([1.0, 0.0]), "b": torch.tensor([[2.0]])}
    far = {"a": torch.tensor([3.0, 1.0]), "b": torch.tensor([[4.0]])}  # (2, 1, 2) away: a distance of 3
    found = project_ball(far, center, 1.5)
    torch.testing.assert_close(found, {"a": torch.tensor([2.0, 0.5]), "b": torch.tensor([[3.0]])})
    torch.testing.assert_close(project_ball(far, center, 3.5), far)
    assert torch.equal(project_ball(center, center, 0.1)["a"], center["a"])
    with pytest.raises(ValueError, match="radius must be positive, got 0"):
        project_ball(far, center, 0)


def test_projected_steps_end_where_the_ball_ends():
    found = projected_sgd(lambda w: {"w": w["w"] - 10}, {"w": torch.zeros(1)}, lr=0.1, steps=50, radius=2.0)
    assert found["w"].item() == pytest.approx(2.0)
    found = projected_sgd(lambda w: {"w": w["w"] - 10}, {"w": torch.zeros(1)}, lr=0.1, steps=50)
    assert found["w"].item() == pytest.approx(10 * (1 - 0.9**50), rel=1e-5)


def slow_twin(gradient, w, lr, steps, epochs, radius):
    """Written out for one number."""
    asked = 0
    for _ in range(epochs):
        iterates, v = [], w
        for _ in range(steps):
            iterates.append(v)
            v = v - lr * gradient(v, asked)
            v = min(max(v, w - radius), w + radius)
            asked += 1
        w = sum(iterates) / len(iterates)
        lr, steps, radius = lr / 2, 2 * steps, radius / math.sqrt(2)
    return w, asked


@pytest.mark.parametrize("radius", [math.inf, 0.7])
def test_epochs_halve_steps_double_length_and_shrink_the_ball(radius):
    asked = []

    def gradient(w):
        asked.append(1)
        return {"w": 2 * (w["w"] - 3) + 0.1 * (len(asked) - 1)}

    found = epoch_sgd(gradient, {"w": torch.zeros((), dtype=torch.float64)}, lr=0.3, steps=3, epochs=4, radius=radius)
    expected, count = slow_twin(lambda v, k: 2 * (v - 3) + 0.1 * k, 0.0, 0.3, 3, 4, radius)
    assert found["w"].item() == pytest.approx(expected, rel=1e-12)
    assert len(asked) == count == 3 * (2**4 - 1)


def test_the_error_falls_with_the_square_root_of_two_an_epoch():
    """A noisy quadratic, 200 runs at once; root mean square error after S epochs against that after the first."""
    generator = torch.Generator().manual_seed(0)
    curvature = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)

    def gradient(w):
        return {"w": curvature * w["w"] + torch.randn(200, 3, generator=generator, dtype=torch.float64)}

    start = {"w": torch.ones(200, 3, dtype=torch.float64)}
    errors = []
    for epochs in range(1, 8):
        found = epoch_sgd(gradient, start, lr=0.2, steps=20, epochs=epochs)["w"]
        errors.append(found.square().sum(1).mean().sqrt().item())
    for epoch, error in enumerate(errors):
        assert error <= 1.5 * errors[0] * 2 ** (-epoch / 2), errors
    assert errors[-1] > 0.2 * errors[0] * 2 ** (-6 / 2)  # the noise is real: nothing is solved exactly


def test_wrong_numbers_are_listed_at_once():
    with pytest.raises(ValueError, match="lr must be positive, got 0; steps must be .* got 0; epochs must be .* got 0"):
        epoch_sgd(lambda w: w, {"w": torch.zeros(1)}, lr=0, steps=0, epochs=0)
