"""The maths of vae.py: each formula against an independent one; and the models, with images, labels and Keras."""

import argparse
import copy
import pathlib
import subprocess
import sys

import assignment
import numpy as np
import pytest
import tensorflow as tf
from vae import (
    CVAE,
    VAE,
    bce_function,
    kl_divergence,
    loss_function,
    reparameterization,
    reparametrize,
)

RNG = np.random.default_rng(0)
IMAGES = RNG.random((6, 1, 28, 28))
RECONSTRUCTIONS = RNG.uniform(0.01, 0.99, (6, 1, 28, 28))
MU = RNG.normal(size=(6, 15))
LOGVAR = RNG.normal(size=(6, 15))
LABELS = np.eye(10)[[3, 1, 4, 1, 5, 9]]


def bce_in_numpy(x_hat, x):
    return -np.sum(np.where(x > 0, x * np.log(x_hat), 0) + (1 - x) * np.log1p(-x_hat))


def test_kl_of_the_prior_is_zero():
    assert kl_divergence(np.zeros((4, 15)), np.zeros((4, 15))).numpy() == 0


@pytest.mark.parametrize("prior_scale", [1.0, 1.3])
def test_kl_is_the_expected_log_ratio_of_the_densities(prior_scale):
    mu, sigma = 0.7, 0.4
    z = np.linspace(mu - 8 * sigma, mu + 8 * sigma, 20_001)
    log_q = -0.5 * ((z - mu) / sigma) ** 2 - np.log(sigma)
    log_p = -0.5 * (z / prior_scale) ** 2 - np.log(prior_scale)
    density = np.exp(log_q) / np.sqrt(2 * np.pi)
    expected = np.sum(density * (log_q - log_p)) * (z[1] - z[0])
    kl = kl_divergence(np.array([[mu]]), np.array([[2 * np.log(sigma)]]), prior_scale)
    np.testing.assert_allclose(kl, expected, rtol=1e-6)


def test_kl_adds_up_over_dimensions_and_images():
    parts = [kl_divergence(MU[i : i + 1, j : j + 1], LOGVAR[i : i + 1, j : j + 1]) for i in range(6) for j in range(15)]
    np.testing.assert_allclose(kl_divergence(MU, LOGVAR), np.sum(parts), rtol=1e-12)


def test_bce_matches_numpy():
    bce = bce_function(RECONSTRUCTIONS, IMAGES)
    assert bce.shape == ()
    np.testing.assert_allclose(bce, bce_in_numpy(RECONSTRUCTIONS, IMAGES), rtol=1e-9)


def test_gradients_of_bce_are_the_derivatives_of_its_formula():
    x_hat, x = tf.constant(RECONSTRUCTIONS), tf.constant(IMAGES)
    with tf.GradientTape() as tape:
        tape.watch([x_hat, x])
        thrice = 3 * bce_function(x_hat, x)
    by_x_hat, by_x = tape.gradient(thrice, [x_hat, x])
    np.testing.assert_allclose(by_x_hat, 3 * ((1 - x) / (1 - x_hat) - x / x_hat), rtol=1e-9)
    np.testing.assert_allclose(by_x, 3 * (np.log(1 - x_hat) - np.log(x_hat)), rtol=1e-9)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_bce_and_its_gradient_are_finite_on_saturated_pixels(dtype):
    x_hat = tf.constant([[0.0, 0.0, 1.0, 1.0]], dtype)
    x = tf.constant([[0.0, 1.0, 0.0, 1.0]], dtype)
    with tf.GradientTape() as tape:
        tape.watch(x_hat)
        bce = bce_function(x_hat, x)
    assert np.isfinite(bce) and 20 < bce < 40
    assert np.all(np.isfinite(tape.gradient(bce, x_hat)))


def test_loss_is_the_negative_elbo_per_image():
    kl = -0.5 * np.sum(1 + LOGVAR - MU**2 - np.exp(LOGVAR))
    expected = (bce_in_numpy(RECONSTRUCTIONS, IMAGES) + kl) / 6
    np.testing.assert_allclose(loss_function(RECONSTRUCTIONS, IMAGES, MU, LOGVAR), expected, rtol=1e-9)


def test_loss_does_not_depend_on_the_number_of_images():
    once = [RECONSTRUCTIONS, IMAGES, MU, LOGVAR]
    thrice = [np.tile(array, (3, *[1] * (array.ndim - 1))) for array in once]
    np.testing.assert_allclose(loss_function(*thrice), loss_function(*once), rtol=1e-12)


@pytest.mark.parametrize("model_dtype", ["float32", "float64"])
@pytest.mark.parametrize("image_dtype", ["float32", "float64"])
def test_loss_takes_images_of_another_dtype_than_the_models(model_dtype, image_dtype):
    of_model = [array.astype(model_dtype) for array in (RECONSTRUCTIONS, MU, LOGVAR)]
    loss = loss_function(of_model[0], IMAGES.astype(image_dtype), *of_model[1:])
    assert loss.dtype == model_dtype
    np.testing.assert_allclose(loss, loss_function(RECONSTRUCTIONS, IMAGES, MU, LOGVAR), rtol=1e-5)


def test_loss_in_a_graph_that_does_not_know_how_many_images_come():
    unknown = [tf.TensorSpec((None, *a.shape[1:]), tf.float64) for a in (RECONSTRUCTIONS, IMAGES, MU, LOGVAR)]
    graph = tf.function(loss_function, input_signature=unknown)
    for n in (1, 6):
        arrays = [a[:n] for a in (RECONSTRUCTIONS, IMAGES, MU, LOGVAR)]
        np.testing.assert_allclose(graph(*arrays), loss_function(*arrays), rtol=1e-12)


def test_losses_of_unequal_shapes_are_refused():
    with pytest.raises(ValueError, match=r"x_hat and x .*28, 28, 1"):
        bce_function(RECONSTRUCTIONS, IMAGES.reshape(6, 28, 28, 1))
    with pytest.raises(ValueError, match=r"mu and logvar .*\(6, 14\)"):
        loss_function(RECONSTRUCTIONS, IMAGES, MU, LOGVAR[:, :14])


def test_z_has_mean_mu_and_standard_deviation_sigma():
    mu, sigma, n = np.array([-2.0, 0.0, 3.0]), np.array([0.5, 1.0, 2.0]), 100_000
    z = reparametrize(np.tile(mu, (n, 1)), np.tile(2 * np.log(sigma), (n, 1))).numpy()
    assert np.all(np.abs(z.mean(axis=0) - mu) < 5 * sigma / np.sqrt(n))
    assert np.all(np.abs(z.std(axis=0) - sigma) < 5 * sigma / np.sqrt(2 * n))


def test_gradients_of_z_are_1_and_half_of_z_minus_mu():
    mu, logvar = tf.constant(MU), tf.constant(LOGVAR)
    with tf.GradientTape() as tape:
        tape.watch([mu, logvar])
        z = reparametrize(mu, logvar)
    by_mu, by_logvar = tape.gradient(z, [mu, logvar])
    np.testing.assert_allclose(by_mu, np.ones_like(MU))
    np.testing.assert_allclose(by_logvar, (z - mu) / 2, rtol=1e-9)


def test_the_handouts_name_for_it():
    assert reparameterization is reparametrize


def dense_widths(sequential):
    return [layer.units for layer in sequential.layers if isinstance(layer, tf.keras.layers.Dense)]


@pytest.mark.parametrize("model", [VAE(784), CVAE(784)], ids=["VAE", "CVAE"])
def test_architecture_of_the_handout(model):
    assert (model.input_size, model.latent_size) == (784, 15)
    h = model.hidden_dim
    assert dense_widths(model.encoder) == [h, h, h]
    assert dense_widths(model.decoder) == [h, h, h, 784]
    assert model.mu_layer.units == model.logvar_layer.units == 15
    c = 10 if isinstance(model, CVAE) else 0
    weights = (784 + c) * h + 2 * h * h + 2 * h * 15 + (15 + c) * h + 2 * h * h + h * 784
    biases = 6 * h + 2 * 15 + 784
    assert sum(int(np.prod(v.shape)) for v in model.trainable_variables) == weights + biases


@pytest.mark.parametrize("dtype", ["float32", "float64", "uint8"])
@pytest.mark.parametrize("latent_size", [2, 15])
def test_forward_pass(dtype, latent_size):
    images = np.round(IMAGES).astype(dtype)
    labels = LABELS.astype(dtype)
    for outputs in (VAE(784, latent_size)(images), CVAE(784, latent_size=latent_size)(images, labels)):
        assert [tuple(output.shape) for output in outputs] == [(6, 1, 28, 28), (6, latent_size), (6, latent_size)]
        assert all(output.dtype == "float32" for output in outputs)
        assert outputs[0].numpy().min() >= 0 and outputs[0].numpy().max() <= 1


def test_other_image_sizes_and_numbers_of_classes():
    x_hat, mu, _ = CVAE(16, 3, 2)(np.zeros((5, 1, 4, 4)), np.eye(3)[[0, 1, 2, 0, 1]])
    assert x_hat.shape == (5, 1, 4, 4) and mu.shape == (5, 2)
    assert CVAE(16, num_classes=3).num_classes == 3


def test_parts_can_be_called_from_outside():
    vae, cvae = VAE(784), CVAE(784)
    assert vae.decoder(np.zeros((3, 15), "float32")).shape == (3, 1, 28, 28)
    assert cvae.decoder(np.zeros((3, 25), "float32")).shape == (3, 1, 28, 28)
    assert vae.encoder(IMAGES.astype("float32")).shape == (6, vae.hidden_dim)
    assert cvae.encoder(np.zeros((3, 794), "float32")).shape == (3, cvae.hidden_dim)


def test_a_cvaes_posterior_starts_beside_the_prior():
    assert 0 < kl_divergence(*CVAE(784)(IMAGES, LABELS)[1:]).numpy() / len(IMAGES) < 12


def test_a_new_model_listens_to_the_image_and_to_the_label():
    x = np.repeat(IMAGES[:1], 10, axis=0)
    for posteriors in (VAE(784)(IMAGES)[1:], CVAE(784)(IMAGES, LABELS[[0] * 6])[1:], CVAE(784)(x, np.eye(10))[1:]):
        for parameter in posteriors:
            distances = np.abs(parameter[:, tf.newaxis] - parameter[tf.newaxis]).max(axis=2)
            assert np.all(distances[~np.eye(len(distances), dtype=bool)] > 1e-5)


def test_mu_and_logvar_start_apart():
    for model in (VAE(784), CVAE(784)):
        assert not np.array_equal(model.mu_layer.kernel.numpy(), model.logvar_layer.kernel.numpy())


def test_pixels_start_nearly_as_dark_as_those_of_mnist():
    images = VAE(784).decoder(np.zeros((3, 15), "float32")).numpy()
    assert assignment.read_mnist("test")[0].mean() / 255 < images.min() <= images.max() < 0.2


def test_posterior_is_the_encoders_and_the_image_the_decoders():
    model = CVAE(784)
    x, c = IMAGES.astype("float32"), LABELS.astype("float32")
    hidden = model.encoder(np.concatenate([x.reshape(6, 784), c], axis=1))
    tf.keras.utils.set_random_seed(1)
    x_hat, mu, logvar = model(x, c)
    np.testing.assert_allclose(mu, model.mu_layer(hidden), rtol=1e-5)
    np.testing.assert_allclose(logvar, model.logvar_layer(hidden), rtol=1e-5)
    tf.keras.utils.set_random_seed(1)
    z = reparametrize(mu, logvar)
    np.testing.assert_allclose(x_hat, model.decoder(np.concatenate([z, c], axis=1)), atol=1e-5)


def test_label_reaches_both_encoder_and_decoder():
    model = CVAE(784)
    x = np.repeat(IMAGES[:1], 10, axis=0)
    _, mu, logvar = model(x, np.eye(10))
    pictures = model.decoder(np.concatenate([np.zeros((10, 15)), np.eye(10)], axis=1).astype("float32"))
    for by_class in (mu, logvar, pictures):
        assert len(np.unique(by_class.numpy().reshape(10, -1).round(5), axis=0)) == 10


@pytest.mark.parametrize(("part", "strength"), [("encoder", 1.5), ("decoder", 1)])
def test_a_label_starts_as_strong_as_all_inputs_together_or_stronger(part, strength):
    kernel = getattr(CVAE(784), part).trainable_variables[0].numpy()
    inputs, label = kernel[:-10], kernel[-10:]
    np.testing.assert_allclose(inputs.std(), np.sqrt(2 / len(kernel)), rtol=0.05)
    np.testing.assert_allclose(label.std(), strength * np.sqrt(2), rtol=0.05)
    assert len(np.unique(label, axis=0)) == 10


@pytest.mark.parametrize("size", [0, -4, 783])
def test_an_input_size_that_is_no_square_is_refused(size):
    for model in (VAE, CVAE):
        with pytest.raises(ValueError, match=f"input_size .* square .* {size}"):
            model(size)


def test_sizes_below_1_are_refused():
    with pytest.raises(ValueError, match=r"latent_size .* 0"):
        VAE(784, latent_size=0)
    with pytest.raises(ValueError, match=r"num_classes .* 0"):
        CVAE(784, num_classes=0)


@pytest.mark.parametrize("shape", [(6, 1, 14, 14), (6, 784), (6, 28, 28, 1)])
def test_images_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"x must have the shape \(N, 1, 28, 28\); got \(6"):
        VAE(784)(np.zeros(shape))
    with pytest.raises(ValueError, match=r"x must have the shape \(N, 1, 28, 28\); got \(6"):
        CVAE(784)(np.zeros(shape), LABELS)


def test_labels_of_another_width_are_refused():
    with pytest.raises(ValueError, match=r"c must have the shape \(N, 10\); got \(6, 9\)"):
        CVAE(784)(IMAGES, LABELS[:, :9])


# Keras's own tools

# The Keras of TensorFlow 2.12 writes a whole subclassed model in one format only, a folder.
WHOLE_MODEL = "model" if tf.__version__.startswith("2.12.") else "model.keras"


def inputs_of(model):
    return (IMAGES, LABELS) if isinstance(model, CVAE) else (IMAGES,)


def assert_same_weights(model, other):
    assert len(model.get_weights()) == len(other.get_weights()) > 0
    for ours, theirs in zip(model.get_weights(), other.get_weights()):
        np.testing.assert_array_equal(ours, theirs)


def train(model, epochs=1):
    """The losses of some epochs of `train_vae` on a batch of six random images."""
    args = argparse.Namespace(learning_rate=1e-3, num_epochs=100)
    loader = [(IMAGES, LABELS.argmax(axis=1))]
    return [assignment.train_vae(model, loader, args, isinstance(model, CVAE)) for _ in range(epochs)]


@pytest.mark.parametrize("make", [VAE, CVAE])
def test_the_loss_of_random_images_falls_from_the_first_epoch(make):
    tf.keras.utils.set_random_seed(0)
    rng = np.random.default_rng(0)  # RNG gives other images when other tests run first
    loader = [(rng.random((128, 1, 28, 28)), np.arange(128) % 10) for _ in range(3)]
    args = argparse.Namespace(learning_rate=1e-3, num_epochs=10)
    model = make(784)
    first, second = (assignment.train_vae(model, loader, args, make is CVAE) for _ in range(2))
    assert second < 0.95 * first


def new_model(make):
    return make(16, num_classes=3, latent_size=2) if make is CVAE else make(16, latent_size=2)


@pytest.mark.parametrize("make", [VAE, CVAE])
def test_config_carries_the_constructors_arguments(make):
    config = new_model(make).get_config()
    assert config == {"input_size": 16, "latent_size": 2} | ({"num_classes": 3} if make is CVAE else {})
    again = make.from_config(config)
    assert again.get_config() == config
    assert [v.shape for v in again.trainable_variables] == [v.shape for v in new_model(make).trainable_variables]


@pytest.mark.parametrize("epochs", [0, 2], ids=["new", "trained"])
@pytest.mark.parametrize("make", [VAE, CVAE])
def test_a_saved_model_is_loaded_by_whoever_imports_vae_and_trains_on(make, epochs, tmp_path):
    model = make(784)
    train(model, epochs)
    if WHOLE_MODEL == "model":
        model(*inputs_of(model))  # Keras 2 saves what it has seen
    model.save(tmp_path / WHOLE_MODEL)
    loaded = tf.keras.models.load_model(tmp_path / WHOLE_MODEL)
    assert type(loaded) is make
    assert_same_weights(loaded, model)
    losses = train(loaded, 8)
    assert losses[-1] < losses[0]

    program = (
        "import sys, numpy, vae, tensorflow as tf; folder = sys.argv[1];"
        f"model = tf.keras.models.load_model(folder + '/{WHOLE_MODEL}');"
        "numpy.savez(folder + '/weights.npz', *model.get_weights())"
    )
    folder = pathlib.Path(assignment.__file__).parent
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], cwd=folder, check=True, capture_output=True)
    with np.load(tmp_path / "weights.npz") as arrays:
        for ours, theirs in zip(model.get_weights(), arrays.values()):
            np.testing.assert_array_equal(ours, theirs)


def test_decoders_are_loaded_without_vae(tmp_path):
    models = [VAE(784), CVAE(784)]
    for i, model in enumerate(models):
        train(model)
        model.decoder.save(tmp_path / f"{i}.keras")
    program = """if True:
        import sys, numpy, tensorflow as tf
        assert "vae" not in sys.modules
        for i, size in enumerate((15, 25)):
            images = tf.keras.models.load_model(f"{sys.argv[1]}/{i}.keras")(tf.ones((2, size)))
            numpy.save(f"{sys.argv[1]}/{i}.npy", images)
    """
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], cwd="/", check=True, capture_output=True)
    for i, (model, size) in enumerate(zip(models, (15, 25))):
        np.testing.assert_allclose(np.load(tmp_path / f"{i}.npy"), model.decoder(tf.ones((2, size))), rtol=1e-5)


@pytest.mark.parametrize("make", [VAE, CVAE])
def test_a_trained_model_is_copied_with_its_weights(make):
    model = make(784)
    train(model, 2)
    copied = copy.deepcopy(model)
    assert_same_weights(copied, model)
    before = model.get_weights()
    losses = train(copied, 8)
    assert losses[-1] < losses[0]
    for ours, then in zip(model.get_weights(), before):
        np.testing.assert_array_equal(ours, then)


def test_a_subclass_may_add_layers_of_its_own():
    class Classifier(VAE):
        def __init__(self):
            super().__init__(784)
            self.head = tf.keras.layers.Dense(10)

        def call(self, x):
            return self.head(super().call(x)[1])

    model = Classifier()
    assert model(IMAGES).shape == (6, 10)
    assert len(model.trainable_variables) == len(VAE(784).trainable_variables) + 2


@pytest.fixture(params=["mixed_float16", "mixed_bfloat16", "float64"])
def policy(request):
    tf.keras.mixed_precision.set_global_policy(request.param)
    yield request.param
    tf.keras.mixed_precision.set_global_policy("float32")


@pytest.mark.parametrize("make", [VAE, CVAE])
def test_dtype_policies(make, policy):
    model = make(784)
    assert all(output.dtype == "float32" for output in model(*inputs_of(model)))
    assert model.encoder(np.zeros((1, 1, 28, 28) if make is VAE else (1, 794))).dtype == policy.removeprefix("mixed_")
    losses = train(model, 8)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("make", [VAE, CVAE])
@pytest.mark.parametrize("part", ["encoder", "mu_layer", "logvar_layer", "decoder"])
def test_a_frozen_part_holds_still_and_the_others_move(make, part):
    model = make(784)

    def moved():
        """Which of the four parts an epoch moves."""
        parts = {name: getattr(model, name) for name in ("encoder", "mu_layer", "logvar_layer", "decoder")}
        before = {name: layer.get_weights() for name, layer in parts.items()}
        train(model)
        return {
            name
            for name, layer in parts.items()
            if not all(np.array_equal(ours, then) for ours, then in zip(layer.get_weights(), before[name]))
        }

    everything = {"encoder", "mu_layer", "logvar_layer", "decoder"}
    getattr(model, part).trainable = False
    assert moved() == everything - {part}
    getattr(model, part).trainable = True
    assert moved() == everything
    getattr(model, part).trainable = False
    assert moved() == everything - {part}
    model.trainable = False
    assert moved() == set()
