"""The maths of vae.py, each formula against an independent one, and the handout's two models."""

from benchmark import FitVAE
import numpy as np
import pytest
import tensorflow as tf
from vae import CVAE, VAE, bce_function, kl_divergence, loss_function, reparameterization, reparametrize

RNG = np.random.default_rng(0)
IMAGES = RNG.random((6, 1, 28, 28))
RECONSTRUCTIONS = RNG.uniform(0.01, 0.99, (6, 1, 28, 28))
MU, LOGVAR = RNG.normal(size=(2, 6, 15))
LABELS = np.eye(10)[[3, 1, 4, 1, 5, 9]]


@pytest.mark.parametrize(("mu", "sigma"), [(0.7, 0.4), (0.0, 1.0)])
def test_kl_is_the_expected_log_ratio_of_the_densities(mu, sigma):
    z = np.linspace(mu - 8 * sigma, mu + 8 * sigma, 20_001)
    log_q, log_p = -0.5 * ((z - mu) / sigma) ** 2 - np.log(sigma), -0.5 * z**2
    density = np.exp(log_q) / np.sqrt(2 * np.pi)
    expected = np.sum(density * (log_q - log_p)) * (z[1] - z[0])
    np.testing.assert_allclose(kl_divergence([[mu]], np.log([[sigma**2]])), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_bce_and_its_gradient_are_finite_on_saturated_pixels(dtype):
    x_hat, x = tf.repeat(tf.constant([[0, 0, 1, 1], [0, 1, 0, 1]], dtype), 10_000, axis=1)
    with tf.GradientTape() as tape:
        tape.watch(x_hat)
        bce = bce_function(x_hat, x)
    assert 20 < bce / 10_000 < 40
    assert np.all(np.isfinite(tape.gradient(bce, x_hat)))


def test_loss_is_the_negative_elbo_per_image_whatever_the_number_and_the_dtypes():
    shapes = [(None, 1, 28, 28)] * 2 + [(None, 15)] * 2
    graph = tf.function(loss_function, input_signature=list(map(tf.TensorSpec, shapes)))
    for n in (1, 6):
        x_hat, x, mu, logvar = (array[:n] for array in (RECONSTRUCTIONS, IMAGES, MU, LOGVAR))
        bce = -np.sum(x * np.log(x_hat) + (1 - x) * np.log1p(-x_hat))
        kl = -0.5 * np.sum(1 + logvar - mu**2 - np.exp(logvar))
        np.testing.assert_allclose(bce_function(x_hat, x), bce, rtol=1e-5)
        np.testing.assert_allclose(kl_divergence(mu, logvar), kl, rtol=1e-5)
        for loss in (loss_function, graph):
            np.testing.assert_allclose(loss(*map(np.float32, (x_hat, x, mu, logvar))), (bce + kl) / n, rtol=1e-5)
        np.testing.assert_allclose(loss_function(x_hat.astype("float32"), x, mu, logvar), (bce + kl) / n, rtol=1e-5)


def test_losses_of_unequal_shapes_are_refused():
    with pytest.raises(ValueError, match=r"\(6, 1, 28, 28\) and \(6, 28, 28, 1\)"):
        bce_function(RECONSTRUCTIONS, IMAGES.reshape(6, 28, 28, 1))
    with pytest.raises(ValueError, match=r"\(6, 15\) and \(6, 1\)"):
        loss_function(RECONSTRUCTIONS, IMAGES, MU, LOGVAR[:, :1])


def test_z_has_mean_mu_and_standard_deviation_sigma_and_no_two_are_drawn_together():
    mu, sigma, n = np.array([-2.0, 0.0, 3.0]), np.array([0.5, 1.0, 2.0]), 100_000
    z = reparameterization(np.tile(mu, (n, 1)), np.tile(2 * np.log(sigma), (n, 1))).numpy()
    np.testing.assert_allclose(z.mean(axis=0), mu, atol=5 * 2 / np.sqrt(n))
    np.testing.assert_allclose(np.cov(z.T), np.diag(sigma**2), atol=5 * 2**2 * np.sqrt(2 / n))


def test_gradients_of_z_are_1_and_half_of_z_minus_mu():
    parameters = [tf.Variable(MU), tf.Variable(LOGVAR)]
    with tf.GradientTape() as tape:
        z = reparametrize(*parameters)
    by_mu, by_logvar = tape.gradient(z, parameters)
    np.testing.assert_allclose(by_mu, np.ones_like(MU))
    np.testing.assert_allclose(by_logvar, (z - MU) / 2, rtol=1e-9)


def dense_widths(sequential):
    return [layer.units for layer in sequential.layers if isinstance(layer, tf.keras.layers.Dense)]


@pytest.mark.parametrize("make", [VAE, CVAE])
def test_architecture_of_the_handout(make):
    model, c = make(784), 10 if make is CVAE else 0
    h = model.hidden_dim
    assert (model.input_size, model.latent_size, dense_widths(model.encoder)) == (784, 15, [h, h, h])
    assert dense_widths(model.decoder) == [h, h, h, 784]
    assert model.mu_layer.units == model.logvar_layer.units == 15
    weights = (784 + c) * h + 2 * h * h + 2 * h * 15 + (15 + c) * h + 2 * h * h + h * 784
    assert model.count_params() == weights + 6 * h + 2 * 15 + 784


@pytest.mark.parametrize("dtype", ["float32", "float64", "uint8"])
@pytest.mark.parametrize(("side", "classes", "latent_size"), [(28, 10, 15), (4, 3, 2)])
def test_forward_pass_and_parts_called_from_outside(dtype, side, classes, latent_size):
    images, labels = np.round(RNG.random((6, 1, side, side))).astype(dtype), np.eye(classes, dtype=dtype)[[0, 1, 2] * 2]
    vae, cvae = VAE(side**2, latent_size), CVAE(side**2, classes, latent_size)
    for outputs in (vae(images), cvae(images, labels), cvae.call(images, labels)):
        assert [tuple(output.shape) for output in outputs] == [(6, 1, side, side), (6, latent_size), (6, latent_size)]
        assert all(output.dtype == "float32" for output in outputs)
        assert outputs[0].numpy().min() >= 0 and outputs[0].numpy().max() <= 1
    assert vae.decoder(tf.zeros((3, latent_size))).shape == (3, 1, side, side)
    assert cvae.decoder(tf.zeros((3, latent_size + classes))).shape == (3, 1, side, side)
    assert vae.encoder(tf.zeros((3, 1, side, side))).shape == (3, vae.hidden_dim)
    assert cvae.encoder(tf.zeros((3, side**2 + classes))).shape == (3, cvae.hidden_dim)


def test_the_posterior_is_the_encoders_and_the_image_the_decoders_with_the_label_behind_image_and_z():
    model = CVAE(784)
    x, c = IMAGES.astype("float32"), LABELS.astype("float32")
    hidden = model.encoder(np.concatenate([x.reshape(6, 784), c], axis=1))
    tf.keras.utils.set_random_seed(1)
    x_hat, mu, logvar = model(x, c)
    np.testing.assert_allclose(mu, model.mu_layer(hidden), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(logvar, model.logvar_layer(hidden), rtol=1e-5, atol=1e-7)
    tf.keras.utils.set_random_seed(1)
    z = reparametrize(mu, logvar)
    np.testing.assert_allclose(x_hat, model.decoder(np.concatenate([z, c], axis=1)), atol=1e-5)


def test_a_new_model_listens_to_the_image_and_to_the_label():
    vae, cvae, same_image = VAE(784), CVAE(784), np.repeat(IMAGES[:1], 10, axis=0)
    of_images = [*vae(IMAGES)[1:], *cvae(IMAGES, LABELS[[0] * 6])[1:]]
    of_labels = [*cvae(same_image, np.eye(10))[1:], cvae.decoder(np.eye(25)[15:])]
    for outputs in of_images + of_labels:
        rows = np.reshape(outputs, (len(outputs), -1))
        distances = np.abs(rows[:, np.newaxis] - rows).max(axis=2)
        assert np.all(distances[~np.eye(len(rows), dtype=bool)] > 1e-5)
    for model in (vae, cvae):
        assert not np.array_equal(model.mu_layer.get_weights()[0], model.logvar_layer.get_weights()[0])


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_a_label_starts_stronger_than_all_inputs_together(part):
    kernel = getattr(CVAE(784), part).trainable_variables[0].numpy()
    np.testing.assert_allclose(kernel[:-10].std(), np.sqrt(2 / len(kernel)), rtol=0.05)  # He's
    np.testing.assert_allclose(kernel[-10:].std(), 2.5, rtol=0.05)


def test_a_size_that_is_no_square_is_refused():
    with pytest.raises(ValueError, match=r"square .* 28 \* 28 = 784; got 28$"):
        VAE(28)


def test_keras_saves_and_loads_a_new_model_and_fits_it(tmp_path):
    fitted, loaded, path = FitVAE(784), VAE(784), str(tmp_path / "vae.weights.h5")
    fitted.save_weights(path)
    loaded.load_weights(path)
    assert all(map(np.array_equal, fitted.get_weights(), loaded.get_weights()))
    fitted.compile(optimizer="adam")
    losses = fitted.fit(np.float32(IMAGES), LABELS, epochs=9, verbose=0).history["negative_elbo"]
    assert losses[-1] < losses[0]
