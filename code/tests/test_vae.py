"""The maths of vae.py, each formula against an independent one, and the handout's two models."""

import numpy as np
import pytest
import tensorflow as tf
from vae import CVAE, VAE, bce_function, kl_divergence, loss_function, reparameterization, reparametrize

RNG = np.random.default_rng(0)
IMAGES = RNG.random((6, 1, 28, 28))
RECONSTRUCTIONS = RNG.uniform(0.01, 0.99, (6, 1, 28, 28))
MU, LOGVAR = RNG.normal(size=(2, 6, 15))
LABELS = np.eye(10)[[3, 1, 4, 1, 5, 9]]


def test_kl_is_the_expected_log_ratio_of_the_densities():
    mu, sigma = 0.7, 0.4
    z = np.linspace(mu - 8 * sigma, mu + 8 * sigma, 20_001)
    log_q, log_p = -0.5 * ((z - mu) / sigma) ** 2 - np.log(sigma), -0.5 * z**2
    expected = np.sum(np.exp(log_q) / np.sqrt(2 * np.pi) * (log_q - log_p)) * (z[1] - z[0])
    np.testing.assert_allclose(kl_divergence([[mu]], np.log([[sigma**2]])), expected, rtol=1e-5)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_bce_and_its_gradient_are_finite_on_saturated_pixels(dtype):
    x_hat, x = tf.repeat(tf.constant([[0, 0, 1, 1], [0, 1, 0, 1]], dtype), 10_000, axis=1)
    with tf.GradientTape() as tape:
        tape.watch(x_hat)
        bce = bce_function(x_hat, x)
    assert 20 < bce / 10_000 < 40 and np.all(np.isfinite(tape.gradient(bce, x_hat)))


@pytest.mark.parametrize("n", [1, 6])
def test_loss_is_the_negative_elbo_per_image_of_any_number_and_dtypes(n):
    x_hat, x, mu, logvar = (array[:n] for array in (RECONSTRUCTIONS, IMAGES, MU, LOGVAR))
    bce = -np.sum(x * np.log(x_hat) + (1 - x) * np.log1p(-x_hat))
    kl = -0.5 * np.sum(1 + logvar - mu**2 - np.exp(logvar))
    np.testing.assert_allclose(bce_function(x_hat, x), bce, rtol=1e-5)
    np.testing.assert_allclose(kl_divergence(mu, logvar), kl, rtol=1e-5)
    np.testing.assert_allclose(loss_function(x_hat.astype("float32"), x, mu, logvar), (bce + kl) / n, rtol=1e-5)


def test_shapes_that_do_not_fit_and_a_size_that_is_no_square_are_refused():
    with pytest.raises(ValueError, match=r"\(6, 1, 28, 28\) and \(6, 28, 28, 1\)"):
        bce_function(RECONSTRUCTIONS, IMAGES.reshape(6, 28, 28, 1))
    with pytest.raises(ValueError, match=r"\(6, 15\) and \(6, 1\)"):
        loss_function(RECONSTRUCTIONS, IMAGES, MU, LOGVAR[:, :1])
    with pytest.raises(ValueError, match=r"square .* 28 \* 28 = 784; got 28$"):
        VAE(28)


def test_z_has_mean_mu_and_standard_deviation_sigma_no_two_are_drawn_together_and_gradients_pass():
    mu, sigma, n = np.array([-2.0, 0.0, 3.0]), np.array([0.5, 1.0, 2.0]), 100_000
    parameters = [tf.Variable(np.tile(mu, (n, 1))), tf.Variable(np.tile(2 * np.log(sigma), (n, 1)))]
    with tf.GradientTape() as tape:
        z = reparameterization(*parameters)
    np.testing.assert_allclose(np.mean(z, axis=0), mu, atol=5 * 2 / np.sqrt(n))
    np.testing.assert_allclose(np.cov(z, rowvar=False), np.diag(sigma**2), atol=5 * 2**2 * np.sqrt(2 / n))
    by_mu, by_logvar = tape.gradient(z, parameters)
    np.testing.assert_allclose(by_mu, np.ones((n, 3)))
    np.testing.assert_allclose(by_logvar, (z - mu) / 2, atol=1e-9)


@pytest.mark.parametrize(("make", "c", "posterior"), [(VAE, 0, np.sqrt(2 / 415)), (CVAE, 10, 0.018)])
def test_architecture_of_the_handout_and_its_starts(make, c, posterior):
    """He's for hidden layers, stronger for label rows, and for a CVAE's posterior weaker than Keras's, Glorot's."""
    model, h = make(784), 400
    assert (model.input_size, model.latent_size, model.hidden_dim, getattr(model, "num_classes", 0)) == (784, 15, h, c)
    assert [layer.name for layer in model.layers] == ["encoder", "mu_layer", "logvar_layer", "decoder"]
    kernels = [weights for layer in model.layers for weights in layer.get_weights()[::2]]
    shapes = [(784 + c, h), (h, h), (h, h), (h, 15), (h, 15), (15 + c, h), (h, h), (h, h), (h, 784)]
    assert [kernel.shape for kernel in kernels] == shapes
    for i in (0, 5) if c else ():
        np.testing.assert_allclose(kernels[i][-c:].std(), 2.5, rtol=0.05)
        kernels[i] = kernels[i][:-c]
    stds = [np.sqrt(2 / inputs) for inputs, _ in shapes]
    stds[3:5], stds[8] = [posterior] * 2, np.sqrt(2 / (h + 784))
    np.testing.assert_allclose([kernel.std() for kernel in kernels], stds, rtol=0.05)
    assert not np.array_equal(kernels[3], kernels[4])


@pytest.mark.parametrize("dtype", ["float32", "float64", "uint8"])
@pytest.mark.parametrize(("side", "classes", "latent_size"), [(28, 10, 15), (4, 3, 2)])
def test_forward_pass_of_any_size_and_dtype(dtype, side, classes, latent_size):
    images, labels = np.round(RNG.random((6, 1, side, side))).astype(dtype), np.eye(classes, dtype=dtype)[[0, 1, 2] * 2]
    cvae = CVAE(side**2, classes, latent_size)
    for outputs in (VAE(side**2, latent_size)(images), cvae(images, labels), cvae.call(images, labels)):
        assert [tuple(output.shape) for output in outputs] == [(6, 1, side, side), (6, latent_size), (6, latent_size)]
        assert {output.dtype for output in outputs} == {tf.float32} and np.all(np.abs(outputs[0] - 0.5) <= 0.5)


@pytest.mark.parametrize(("make", "c"), [(VAE, []), (CVAE, [LABELS])])
def test_the_posterior_is_the_encoders_and_the_image_the_decoders_each_with_the_label_behind(make, c):
    model = make(784)
    hidden = model.encoder(np.concatenate([IMAGES.reshape(6, 784), *c], axis=1) if c else IMAGES)
    tf.keras.utils.set_random_seed(1)
    x_hat, mu, logvar = model(IMAGES, *c)
    np.testing.assert_allclose(mu, model.mu_layer(hidden), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(logvar, model.logvar_layer(hidden), rtol=1e-5, atol=1e-6)
    tf.keras.utils.set_random_seed(1)
    z = reparametrize(mu, logvar)
    np.testing.assert_allclose(x_hat, model.decoder(np.concatenate([z, *c], axis=1)), atol=1e-5)


class FitVAE(VAE):
    """The VAE for Keras's own training loop."""

    def train_step(self, data):
        with tf.GradientTape() as tape:
            x_hat, mu, logvar = self(data[0], training=True)
            loss = loss_function(x_hat, data[0], mu, logvar)
        self.optimizer.apply_gradients(zip(tape.gradient(loss, self.trainable_variables), self.trainable_variables))
        return {"negative_elbo": loss}


def test_keras_fits_a_model():
    model = FitVAE(784)
    model.compile(optimizer="adam")
    losses = model.fit(np.float32(IMAGES), LABELS, epochs=9, verbose=0).history["negative_elbo"]
    assert losses[-1] < losses[0]
