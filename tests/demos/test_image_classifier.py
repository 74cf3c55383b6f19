import math

import pytest
import torch
from lightning.pytorch import Trainer

from lightning_hpo.demos import DigitsDataModule, ImageClassifier
from lightning_hpo.demos.image_classifier import warmup_cosine

SMALL = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 32, "depth": 2, "num_heads": 2}


def trainer(**kwargs) -> Trainer:
    return Trainer(
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=False,
        enable_checkpointing=False,
        **kwargs,
    )


def test_learns_digits_and_reports_test_accuracy():
    torch.manual_seed(0)
    digits = DigitsDataModule(seed=0)
    fit = trainer(max_epochs=15)
    classifier = ImageClassifier(model_args=SMALL, lr=5e-3)
    fit.fit(classifier, digits)
    assert {"train_loss", "val_loss", "val_acc"} <= fit.callback_metrics.keys()
    (figures,) = fit.test(classifier, digits, verbose=False)
    assert figures["test_acc"] > 0.75
    probabilities = torch.cat(fit.predict(classifier, digits))
    assert probabilities.shape == (450, 10)
    torch.testing.assert_close(probabilities.sum(1), torch.ones(450))
    # The logged accuracy is that of the predictions.
    right = (probabilities.argmax(1) == digits.test_set.labels).float().mean().item()
    assert math.isclose(right, figures["test_acc"], rel_tol=1e-5)


def test_label_smoothing_is_used_in_training_only():
    torch.manual_seed(0)
    images, labels = torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 2, 3])
    smooth = ImageClassifier(model_args=SMALL, label_smoothing=0.5).eval()
    smooth.log = lambda *args, **kwargs: None
    log_p = smooth(images).log_softmax(1)
    expected = -(0.5 * log_p[range(4), labels] + 0.5 * log_p.mean(1)).mean()
    torch.testing.assert_close(smooth.training_step((images, labels), 0), expected)


def test_learning_rate_warms_up_and_falls_to_zero():
    rates = []

    class Watch(ImageClassifier):
        def training_step(self, batch, batch_idx):
            rates.append(self.optimizers().param_groups[0]["lr"])
            return super().training_step(batch, batch_idx)

    trainer(max_steps=10).fit(Watch(model_args=SMALL, lr=1.0, warmup_steps=4), DigitsDataModule())
    assert rates == pytest.approx([warmup_cosine(t, 4, 10) for t in range(10)])
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert warmup_cosine(10, 4, 10) == pytest.approx(0)


def test_unknown_length_keeps_the_rate():
    assert warmup_cosine(1000, 0, math.inf) == warmup_cosine(1000, 0, -1) == 1.0


def test_vectors_are_not_decayed():
    classifier = ImageClassifier(model_args=SMALL, cosine=False)
    groups = classifier.configure_optimizers().param_groups  # no schedule was asked for
    assert [group["weight_decay"] for group in groups] == [0.05, 0.0]
    assert all(p.ndim > 1 for p in groups[0]["params"])
    assert sum(len(group["params"]) for group in groups) == len(list(classifier.parameters()))


def test_checkpoint_reloads(tmp_path):
    classifier = ImageClassifier(model_args=SMALL)
    fit = trainer(max_steps=1)
    fit.fit(classifier, DigitsDataModule(limit=64))
    fit.save_checkpoint(tmp_path / "last.ckpt")
    again = ImageClassifier.load_from_checkpoint(tmp_path / "last.ckpt")
    images = torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(again.eval()(images), classifier.eval()(images))
