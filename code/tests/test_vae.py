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
both = pytest.mark.parametrize(("make", "labels"), [(VAE, []), (CVAE, [LABELS])])


# The formulas


def test_bce_of_black_and_white_pixels_is_minus_the_log_of_their_probability():
    x_hat, white = RECONSTRUCTIONS[:, :, :4, :4], IMAGES[:, :, :4, :4] < 0.5
    probability = np.prod(np.where(white, x_hat, 1 - x_hat))
    np.testing.assert_allclose(bce_function(x_hat, white), -np.log(probability), rtol=1e-5)


def test_bce_of_grey_pixels_lies_between_those_of_black_and_white_ones():
    black, grey, white = (bce_function(RECONSTRUCTIONS, np.full_like(IMAGES, shade)) for shade in (0, 0.25, 1))
    np.testing.assert_allclose(grey, 0.75 * black + 0.25 * white, rtol=1e-5)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_bce_and_its_gradient_are_finite_on_saturated_pixels(dtype):
    x_hat, x = tf.repeat(tf.constant([[0, 0, 1, 1], [0, 1, 0, 1]], dtype), 10_000, axis=1)
    with tf.GradientTape() as tape:
        tape.watch(x_hat)
        bce = bce_function(x_hat, x)
    assert 20 < bce / 10_000 < 40
    assert np.all(np.isfinite(tape.gradient(bce, x_hat)))


def test_kl_is_the_expected_log_ratio_of_the_densities_over_all_images_and_dimensions():
    t = np.linspace(-8, 8, 2001)
    z = MU[..., np.newaxis] + np.exp(LOGVAR / 2)[..., np.newaxis] * t
    log_q, log_p = -0.5 * t**2 - LOGVAR[..., np.newaxis] / 2, -0.5 * z**2
    expected = np.sum(np.exp(-0.5 * t**2) / np.sqrt(2 * np.pi) * (log_q - log_p)) * (t[1] - t[0])
    np.testing.assert_allclose(kl_divergence(MU, LOGVAR), expected, rtol=1e-5)


@pytest.mark.parametrize("n", [1, 6])
def test_loss_is_bce_and_kl_per_image_of_any_dtypes(n):
    x_hat, x, mu, logvar = RECONSTRUCTIONS[:n].astype("float32"), IMAGES[:n], MU[:n], LOGVAR[:n]
    expected = (bce_function(x_hat, x) + kl_divergence(mu, logvar)) / n
    np.testing.assert_allclose(loss_function(x_hat, x, mu, logvar), expected, rtol=1e-6)


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"\(6, 1, 28, 28\) and \(6, 28, 28, 1\)"):
        bce_function(RECONSTRUCTIONS, IMAGES.reshape(6, 28, 28, 1))
    with pytest.raises(ValueError, match=r"\(6, 15\) and \(6, 1\)"):
        loss_function(RECONSTRUCTIONS, IMAGES, MU, LOGVAR[:, :1])


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


# The models


def kernels(part):
    return part.get_weights()[::2]


def dense(part):
    return [(*layer.kernel.shape, layer.activation.__name__) for layer in part.layers if hasattr(layer, "kernel")]


@both
def test_layers_are_the_handouts(make, labels):
    model = make(784)
    c, h = 10 * len(labels), model.hidden_dim
    assert dense(model.encoder) == [(784 + c, h, "relu"), (h, h, "relu"), (h, h, "relu")]
    assert dense(model) == [(h, 15, "linear")] * 2  # mu and logvar
    assert dense(model.decoder) == [(15 + c, h, "relu"), (h, h, "relu"), (h, h, "relu"), (h, 784, "sigmoid")]


@both
def test_hidden_layers_start_by_hes_rule(make, labels):
    model = make(784)
    for part, unlabelled in ((model.encoder, 784), (model.decoder, 15)):
        first, *others = kernels(part)[:3]
        np.testing.assert_allclose(first[:unlabelled].std(), np.sqrt(2 / len(first)), rtol=0.05)
        np.testing.assert_allclose(np.std(others, axis=(1, 2)), np.sqrt(2 / model.hidden_dim), rtol=0.05)


def test_label_rows_start_by_hes_rule_for_the_one_of_them_that_acts():
    model = CVAE(784)
    for part in (model.encoder, model.decoder):
        np.testing.assert_allclose(kernels(part)[0][-10:].std(), np.sqrt(2 / 1), rtol=0.05)


def test_a_size_that_is_no_square_is_refused():
    with pytest.raises(ValueError, match=r"square .* 28 \* 28 = 784; got 28$"):
        VAE(28)


@pytest.mark.parametrize("policy", ["float32", "mixed_float16", "float64"])
def test_forward_pass_of_any_size_and_input_in_the_dtype_of_the_policy(policy, request):
    request.addfinalizer(lambda: tf.keras.mixed_precision.set_global_policy("float32"))
    tf.keras.mixed_precision.set_global_policy(policy)
    vae, cvae = VAE(16, latent_size=2), CVAE(16, num_classes=3, latent_size=2)
    for dtype in ("float32", "float64", "uint8"):
        images, labels = np.ones((6, 1, 4, 4), dtype), np.eye(3, dtype=dtype)[[0, 1, 2] * 2]
        for outputs in (vae(images), cvae(images, labels), cvae.call(images, labels)):
            assert [tuple(output.shape) for output in outputs] == [(6, 1, 4, 4), (6, 2), (6, 2)]
            assert {output.dtype.name for output in outputs} == {policy.removeprefix("mixed_")}


@both
def test_the_posterior_is_the_encoders_and_the_image_the_decoders_each_with_the_label_behind(make, labels):
    model = make(784)
    tf.keras.utils.set_random_seed(1)
    x_hat, mu, logvar = model(IMAGES, *labels)
    tf.keras.utils.set_random_seed(1)
    z = reparametrize(mu, logvar)
    hidden = model.encoder(np.concatenate([IMAGES.reshape(6, 784), *labels], axis=1) if labels else IMAGES)
    np.testing.assert_allclose(mu, model.mu_layer(hidden), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(logvar, model.logvar_layer(hidden), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(x_hat, model.decoder(np.concatenate([z, *labels], axis=1)), atol=1e-5)


@both
def test_the_encoder_learns_from_each_output(make, labels):
    model = make(784)
    with tf.GradientTape(persistent=True) as tape:
        outputs = model(IMAGES, *labels)
    for output in outputs:
        assert all(np.any(gradient) for gradient in tape.gradient(output, model.encoder.trainable_variables))


@both
def test_a_saved_model_is_loaded_with_its_class_alone(make, labels, tmp_path):
    path = str(tmp_path / ("model.keras" if tf.version.VERSION > "2.16" else "model"))  # a folder before Keras 3
    model = make(784, latent_size=3)
    model.save(path)
    loaded = tf.keras.models.load_model(path, custom_objects={make.__name__: make})
    np.testing.assert_array_equal(loaded(IMAGES, *labels)[1], model(IMAGES, *labels)[1])
