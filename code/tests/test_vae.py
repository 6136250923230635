"""Tests of vae.py: each formula against an independent one, and both models against the handout."""

import numpy as np
import pytest
import tensorflow as tf
from vae import CVAE, VAE, bce_function, kl_divergence, loss_function, reparameterization, reparametrize

RNG = np.random.default_rng(0)
IMAGES = RNG.random((6, 1, 28, 28))
RECONSTRUCTIONS = RNG.uniform(0.01, 0.99, (6, 1, 28, 28))
MU, LOGVAR = RNG.normal(size=(2, 6, 15))
LABELS = np.eye(10)[[3, 1, 4, 1, 5, 9]]
WITH_LABEL = (784 + 10, 15 + 10)  # inputs of a CVAE's encoder and decoder


@pytest.fixture
def labels(make):
    """Return the inputs after the images: labels for a CVAE, none for a VAE."""
    return [LABELS] if make is CVAE else []


# The formulas


def test_bce_equals_the_sum_of_keras_binary_cross_entropy():
    mean = tf.keras.losses.BinaryCrossentropy()(IMAGES, RECONSTRUCTIONS)
    np.testing.assert_allclose(bce_function(RECONSTRUCTIONS, IMAGES), mean * IMAGES.size, rtol=1e-5)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_bce_and_its_gradient_are_finite_for_saturated_pixels(dtype):
    x_hat, x = tf.repeat(tf.constant([[0, 0, 1, 1], [0, 1, 0, 1]], dtype), 10_000, axis=1)
    with tf.GradientTape() as tape:
        tape.watch(x_hat)
        bce = bce_function(x_hat, x)
    assert 20 < bce / 10_000 < 40
    assert np.all(np.isfinite(tape.gradient(bce, x_hat)))


def test_kl_divergence_equals_the_integral_of_its_definition():
    t = np.linspace(-8, 8, 2001)
    z = MU[..., np.newaxis] + np.exp(LOGVAR / 2)[..., np.newaxis] * t
    log_q, log_p = -0.5 * t**2 - LOGVAR[..., np.newaxis] / 2, -0.5 * z**2
    expected = np.sum(np.exp(-0.5 * t**2) / np.sqrt(2 * np.pi) * (log_q - log_p)) * (t[1] - t[0])
    np.testing.assert_allclose(kl_divergence(MU, LOGVAR), expected, rtol=1e-5)


@pytest.mark.parametrize("n", [1, 6])
def test_loss_is_bce_plus_kl_per_image_for_mixed_dtypes(n):
    x_hat, x, mu, logvar = RECONSTRUCTIONS[:n].astype("float32"), IMAGES[:n], MU[:n], LOGVAR[:n]
    expected = (bce_function(x_hat, x) + kl_divergence(mu, logvar)) / n
    np.testing.assert_allclose(loss_function(x_hat, x, mu, logvar), expected, rtol=1e-6)


def test_loss_is_the_same_in_a_graph_with_unknown_batch_size():
    arguments = (RECONSTRUCTIONS, IMAGES, MU, LOGVAR)
    (loss,) = tf.data.Dataset.from_tensor_slices(arguments).batch(6).map(loss_function)
    np.testing.assert_allclose(loss, loss_function(*arguments), rtol=1e-6)


def test_losses_reject_mismatched_shapes():
    with pytest.raises(ValueError, match=r"\(6, 1, 28, 28\) and \(6, 28, 28, 1\)"):
        bce_function(RECONSTRUCTIONS, IMAGES.reshape(6, 28, 28, 1))
    with pytest.raises(ValueError, match=r"\(6, 15\) and \(6, 1\)"):
        loss_function(RECONSTRUCTIONS, IMAGES, MU, LOGVAR[:, :1])


def test_reparametrize_returns_independent_posterior_samples():
    mu, sigma, n = np.array([-2.0, 0.0, 3.0]), np.array([0.5, 1.0, 2.0]), 100_000
    z = reparameterization(tf.tile([mu], (n, 1)), tf.tile([2 * np.log(sigma)], (n, 1)))
    np.testing.assert_allclose(np.mean(z, axis=0), mu, atol=5 * 2 / np.sqrt(n))
    np.testing.assert_allclose(np.cov(z, rowvar=False), np.diag(sigma**2), atol=5 * 2**2 * np.sqrt(2 / n))


def test_reparametrize_passes_gradients_to_mu_and_logvar():
    mu, logvar = tf.Variable(MU), tf.Variable(LOGVAR)
    with tf.GradientTape() as tape:
        z = reparametrize(mu, logvar)
    by_mu, by_logvar = tape.gradient(z, [mu, logvar])
    np.testing.assert_allclose(by_mu, np.ones_like(MU))
    np.testing.assert_allclose(by_logvar, (z - MU) / 2, atol=1e-9)


# The models


def dense(part):
    """Return the kernel and the name of the activation of each Dense layer."""
    layers = [layer for layer in part.layers if isinstance(layer, tf.keras.layers.Dense)]
    return [(layer.kernel.numpy(), layer.activation.__name__) for layer in layers]


def shapes(part):
    return [(*kernel.shape, activation) for kernel, activation in dense(part)]


def hidden_kernels(model):
    return [kernel for kernel, activation in dense(model.encoder) + dense(model.decoder) if activation == "relu"]


def test_architecture_matches_the_handout(make, labels):
    model = make(784)
    c, hidden = 10 * len(labels), model.hidden_dim
    two_hidden_layers = [(hidden, hidden, "relu")] * 2
    assert shapes(model.encoder) == [(784 + c, hidden, "relu"), *two_hidden_layers]
    assert shapes(model) == [(hidden, 15, "linear")] * 2  # mu and logvar
    assert shapes(model.decoder) == [(15 + c, hidden, "relu"), *two_hidden_layers, (hidden, 784, "sigmoid")]


def test_hidden_kernels_have_he_initialization(make):
    for kernel in hidden_kernels(make(784)):
        rows = kernel[:-10] if len(kernel) in WITH_LABEL else kernel
        np.testing.assert_allclose(rows.std(), np.sqrt(2 / len(kernel)), rtol=0.05)


def test_label_rows_have_he_initialization_with_fan_in_1():
    spreads = [kernel[-10:].std() for kernel in hidden_kernels(CVAE(784)) if len(kernel) in WITH_LABEL]
    np.testing.assert_allclose(spreads, [np.sqrt(2 / 1)] * 2, rtol=0.05)


def test_logvar_bias_initializes_sigma_to_1_over_e(make):
    model = make(784)
    logvar = model.logvar_layer(np.zeros((1, model.hidden_dim)))
    np.testing.assert_allclose(np.exp(logvar / 2), np.full((1, 15), 1 / np.e), rtol=1e-6)


def test_untrained_posterior_depends_on_image_and_label(make, labels):
    model = make(784)
    changes = [(IMAGES[::-1], *labels), *[(IMAGES, label[::-1]) for label in labels]]
    for changed in changes:
        for before, after in zip(model(IMAGES, *labels)[1:], model(*changed)[1:]):
            assert np.mean(np.abs(after - before)) > 0.05


def test_non_square_input_size_raises():
    with pytest.raises(ValueError, match=r"square .* 28 \* 28 = 784; got 28$"):
        VAE(28)


@pytest.mark.parametrize("policy", ["float32", "mixed_float16", "float64"])
def test_forward_pass_supports_other_sizes_dtypes_and_policies(policy, request):
    request.addfinalizer(lambda: tf.keras.mixed_precision.set_global_policy("float32"))
    tf.keras.mixed_precision.set_global_policy(policy)
    vae, cvae = VAE(16, latent_size=2), CVAE(16, num_classes=3, latent_size=2)
    for dtype in ("float32", "float64", "uint8"):
        images, labels = np.ones((6, 1, 4, 4), dtype), np.eye(3, dtype=dtype)[[0, 1, 2] * 2]
        for outputs in (vae(images), cvae(images, labels), cvae.call(images, labels)):
            assert [tuple(output.shape) for output in outputs] == [(6, 1, 4, 4), (6, 2), (6, 2)]
            assert {output.dtype.name for output in outputs} == {policy.removeprefix("mixed_")}


def test_forward_pass_concatenates_the_label_with_x_and_z(make, labels):
    model = make(784)
    tf.keras.utils.set_random_seed(1)
    x_hat, mu, logvar = model(IMAGES, *labels)
    tf.keras.utils.set_random_seed(1)
    z = reparametrize(mu, logvar)
    hidden = model.encoder(np.concatenate([IMAGES.reshape(6, 784), *labels], axis=1) if labels else IMAGES)
    np.testing.assert_allclose(mu, model.mu_layer(hidden), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(logvar, model.logvar_layer(hidden), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(x_hat, model.decoder(np.concatenate([z, *labels], axis=1)), atol=1e-5)


def test_encoder_receives_gradients_from_every_output(make, labels):
    model = make(784)
    with tf.GradientTape(persistent=True) as tape:
        outputs = model(IMAGES, *labels)
    for output in outputs:
        assert all(np.any(gradient) for gradient in tape.gradient(output, model.encoder.trainable_variables))


# Saving and subclasses


@pytest.mark.parametrize("subclassed", [False, True])
@pytest.mark.parametrize(("make", "labels", "sizes"), [(VAE, [], {}), (CVAE, [LABELS[:, :7]], {"num_classes": 7})])
def test_saved_model_and_saved_weights_restore_the_outputs(make, labels, sizes, subclassed, tmp_path):
    make = type("Subclass", (make,), {}) if subclassed else make
    model, with_weights = make(784, latent_size=3, **sizes), make(784, latent_size=3, **sizes)
    expected = model(IMAGES, *labels)[1:]
    path = str(tmp_path / ("model.keras" if tf.version.VERSION > "2.16" else "model"))  # a folder before Keras 3
    model.save(path)
    model.save_weights(f"{path}.weights.h5")
    with_weights.load_weights(f"{path}.weights.h5")
    for loaded in (with_weights, tf.keras.models.load_model(path, custom_objects={make.__name__: make})):
        np.testing.assert_array_equal(loaded(IMAGES, *labels)[1:], expected)
