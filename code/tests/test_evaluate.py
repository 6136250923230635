"""The measures of evaluate.py on cases whose answer is known."""

import evaluate
import numpy as np
import pytest
import tensorflow as tf
from vae import CVAE, VAE, loss_function

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("make", [VAE, CVAE])
def test_the_two_terms_are_the_loss(make):
    model = make(784)
    for layer in (model.mu_layer, model.logvar_layer):
        layer.kernel.assign(tf.zeros_like(layer.kernel))
    model.mu_layer.bias.assign(tf.fill((15,), 2.0))  # N(2, 1): a KL divergence of half of 2², in each dimension
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


def test_grade_counts_what_the_classifier_reads(monkeypatch, tmp_path, capsys):
    """A decoder that writes the digit into a pixel, misprinting 7 as 1, and a classifier that reads that pixel."""
    monkeypatch.setattr(evaluate, "elbo_terms", lambda model, *_: (90.0, 20.0) if model == "vae" else (115.0, 6.0))
    monkeypatch.setitem(evaluate.read_mnist.__globals__, "OUTPUTS", tmp_path)

    class Model:
        num_classes, latent_size = 10, 15

        def decoder(self, z):
            digit = tf.argmax(z[:, 15:], axis=1)
            digit = tf.where(digit == 7, tf.ones_like(digit), digit)
            noise = tf.random.uniform((len(z), 1, 28, 28))
            return tf.concat(
                [tf.ones((len(z), 1, 1, 28)) * tf.cast(digit, tf.float32)[:, None, None, None] / 10, noise[:, :, 1:]], 2
            )

    class Classifier:
        def predict(self, images, **_):
            return np.eye(10)[np.rint(images[:, 0, 0] * 10).astype(int) % 10]

    grade = evaluate.grade("vae", Model(), Classifier())
    assert grade["accuracy"] == pytest.approx(0.9)
    assert grade["worst"] == 0
    assert (grade["vae_loss"], grade["cvae_loss"], grade["passed"]) == (110, 121, False)
    printed = capsys.readouterr().out
    assert "pass  VAE loss below 120" in printed
    assert "FAIL  CVAE loss below 120" in printed
    assert "FAIL  CVAE samples recognised, more than 90%" in printed
    assert (tmp_path / "evaluate_cvae.png").exists()
