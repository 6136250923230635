"""The measures of evaluate.py on cases whose answer is known."""

import argparse
import sys

import assignment
import evaluate
import numpy as np
import pytest
import tensorflow as tf
from vae import CVAE, VAE, loss_function

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("make", [VAE, CVAE])
def test_the_two_terms_are_the_loss(make):
    model = make(784)
    for layer, bias in ((model.mu_layer, 2.0), (model.logvar_layer, 0.0)):  # N(2, 1): a KL of 2² / 2 in each dimension
        layer.set_weights([np.zeros((model.hidden_dim, 15)), np.full(15, bias)])
    images, labels = RNG.integers(0, 256, (20, 28, 28), np.uint8), RNG.integers(0, 10, 20, np.uint8)
    tf.keras.utils.set_random_seed(0)
    bce, kl = evaluate.elbo_terms(model, images, labels)
    tf.keras.utils.set_random_seed(0)
    x = images[:, None] / np.float32(255)
    x_hat, mu, logvar = model(x, np.eye(10)[labels]) if make is CVAE else model(x)
    np.testing.assert_allclose(kl, 15 * 2, rtol=1e-5)
    np.testing.assert_allclose(bce + kl, loss_function(x_hat, x, mu, logvar), rtol=1e-5)


def test_spread_is_1_for_real_images_and_0_for_one_picture_a_digit():
    labels = np.repeat(np.arange(10), 30)
    images = RNG.random((300, 28, 28)) + labels[:, None, None]
    assert evaluate.spread(images, labels, images, labels) == pytest.approx(1)
    means = np.repeat([images[labels == digit].mean(axis=0) for digit in range(10)], 30, axis=0)
    assert evaluate.spread(means, labels, images, labels) == pytest.approx(0, abs=1e-12)
    halfway = (means + images) / 2
    assert evaluate.spread(halfway, labels, images, labels) == pytest.approx(0.5)
    shuffled = RNG.permutation(300)
    assert evaluate.spread(images[shuffled], labels[shuffled], images, labels) == pytest.approx(1)


def test_samples_are_counted_as_the_classifier_reads_them(monkeypatch, tmp_path, capsys):
    """The decoder writes the digit asked for into the first pixels, misprints 7 as 1; the classifier reads them."""

    def decoder(z):
        np.testing.assert_allclose(np.std(z[::100, :4000], axis=1), 1, atol=0.06)  # a narrower z would read better
        digit = np.argmax(z[:, 4000:], axis=1)
        samples = RNG.random((len(z), 1, 28, 28), np.float32)
        samples[:, 0, 0] = np.where(digit == 7, 1, digit)[:, np.newaxis] / 10
        return samples

    monkeypatch.setattr(assignment, "OUTPUTS", tmp_path)
    monkeypatch.setattr(evaluate, "SAMPLES", 1000)
    monkeypatch.setattr(evaluate, "recognise", lambda _, images: np.rint(images[:, 0, 0] * 10).astype(int))
    images, labels = RNG.integers(0, 256, (1000, 28, 28)).astype(np.uint8), np.arange(1000) % 10
    images[:, 0] = 0  # are read as zeros
    cvae = argparse.Namespace(num_classes=10, latent_size=4000, decoder=decoder)
    accuracy, worst, varied = evaluate.grade_samples(cvae, None, images, labels)
    assert (accuracy, worst, varied) == (pytest.approx(0.9), 0, pytest.approx(1, abs=0.05))
    printed = capsys.readouterr().out
    assert "90.00% of 1,000 samples recognised, 0.0% of the worst digit" in printed
    assert "reads 10.00% of the real test images" in printed
    assert (tmp_path / "evaluate_cvae.png").exists()


def test_main_grades_what_is_saved_on_all_test_images_and_says_how_to_train_the_rest(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(assignment, "OUTPUTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["evaluate.py"])
    monkeypatch.setattr(evaluate, "elbo_terms", lambda model, images, labels: (110.5, len(images) / 1000))
    assignment.save_model_weights(VAE(784))
    with pytest.raises(SystemExit, match="1"):
        evaluate.main()
    printed = capsys.readouterr().out
    assert "VAE: loss 120.50" in printed and "FAIL  VAE loss below 120" in printed and "CVAE loss" not in printed
    assert "cvae.weights.h5 is missing" in printed and "--is_cvae" in printed
