"""The maths of vae.py: each formula against an independent one; and the models, with images, labels and Keras."""

import argparse
import copy
import json
import pathlib
import subprocess
import sys

import assignment
import numpy as np
import pytest
import tensorflow as tf
from vae import CVAE, VAE, bce_function, kl_divergence, loss_function, reparameterization, reparametrize

RNG = np.random.default_rng(0)
IMAGES = RNG.random((6, 1, 28, 28))
RECONSTRUCTIONS = RNG.uniform(0.01, 0.99, (6, 1, 28, 28))
MU, LOGVAR = RNG.normal(size=(2, 6, 15))
DIGITS = np.array([3, 1, 4, 1, 5, 9])
LABELS = np.eye(10)[DIGITS]
SIX = [(IMAGES, DIGITS)]  # a loader
PARTS = {"encoder", "mu_layer", "logvar_layer", "decoder"}
both = pytest.mark.parametrize("make", [VAE, CVAE])


def same(these, those):
    return len(these) == len(those) > 0 and all(map(np.array_equal, these, those))


def inputs_of(model):
    return (IMAGES, LABELS) if isinstance(model, CVAE) else (IMAGES,)


@pytest.mark.parametrize(("mu", "sigma"), [(0.7, 0.4), (0.0, 1.0)])
def test_kl_is_the_expected_log_ratio_of_the_densities(mu, sigma):
    z = np.linspace(mu - 8 * sigma, mu + 8 * sigma, 20_001)
    log_q, log_p = -0.5 * ((z - mu) / sigma) ** 2 - np.log(sigma), -0.5 * z**2
    density = np.exp(log_q) / np.sqrt(2 * np.pi)
    expected = np.sum(density * (log_q - log_p)) * (z[1] - z[0])
    np.testing.assert_allclose(kl_divergence(np.array([[mu]]), np.log([[sigma**2]])), expected, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_bce_and_its_gradient_are_finite_on_saturated_pixels(dtype):
    x_hat, x = tf.repeat(tf.constant([[0, 0, 1, 1], [0, 1, 0, 1]], dtype), 10_000, axis=1)
    with tf.GradientTape() as tape:
        tape.watch(x_hat)
        bce = bce_function(x_hat, x)
    assert 20 < bce / 10_000 < 40
    assert np.all(np.isfinite(tape.gradient(bce, x_hat)))


def test_loss_is_the_negative_elbo_per_image():
    bce = -np.sum(IMAGES * np.log(RECONSTRUCTIONS) + (1 - IMAGES) * np.log1p(-RECONSTRUCTIONS))
    kl = -0.5 * np.sum(1 + LOGVAR - MU**2 - np.exp(LOGVAR))
    assert bce_function(RECONSTRUCTIONS, IMAGES).shape == kl_divergence(MU, LOGVAR).shape == ()
    np.testing.assert_allclose(bce_function(RECONSTRUCTIONS, IMAGES), bce, rtol=1e-9)
    np.testing.assert_allclose(loss_function(RECONSTRUCTIONS, IMAGES, MU, LOGVAR), (bce + kl) / 6, rtol=1e-9)


@pytest.mark.parametrize("model_dtype", ["float32", "float64"])
@pytest.mark.parametrize("image_dtype", ["float32", "float64"])
def test_loss_takes_images_of_another_dtype_than_the_models_and_any_number_of_them(model_dtype, image_dtype):
    dtypes = (model_dtype, image_dtype, model_dtype, model_dtype)
    arrays = [a.astype(dtype) for a, dtype in zip((RECONSTRUCTIONS, IMAGES, MU, LOGVAR), dtypes)]
    graph = tf.function(loss_function, input_signature=[tf.TensorSpec((None, *a.shape[1:]), a.dtype) for a in arrays])
    for n in (1, 6):
        loss = graph(*(a[:n] for a in arrays))
        assert loss.dtype == model_dtype
        np.testing.assert_allclose(loss, loss_function(RECONSTRUCTIONS[:n], IMAGES[:n], MU[:n], LOGVAR[:n]), rtol=1e-5)


def test_losses_of_unequal_shapes_are_refused():
    with pytest.raises(ValueError, match=r"x_hat and x .*28, 28, 1"):
        bce_function(RECONSTRUCTIONS, IMAGES.reshape(6, 28, 28, 1))
    with pytest.raises(ValueError, match=r"mu and logvar .*\(6, 14\)"):
        loss_function(RECONSTRUCTIONS, IMAGES, MU, LOGVAR[:, :14])


def test_z_has_mean_mu_and_standard_deviation_sigma():
    mu, sigma, n = np.array([-2.0, 0.0, 3.0]), np.array([0.5, 1.0, 2.0]), 100_000
    z = reparameterization(np.tile(mu, (n, 1)), np.tile(2 * np.log(sigma), (n, 1))).numpy()
    assert np.all(np.abs(z.mean(axis=0) - mu) < 5 * sigma / np.sqrt(n))
    assert np.all(np.abs(z.std(axis=0) - sigma) < 5 * sigma / np.sqrt(2 * n))


def test_gradients_of_z_are_1_and_half_of_z_minus_mu():
    parameters = [tf.Variable(MU), tf.Variable(LOGVAR)]
    with tf.GradientTape() as tape:
        z = reparametrize(*parameters)
    by_mu, by_logvar = tape.gradient(z, parameters)
    np.testing.assert_allclose(by_mu, np.ones_like(MU))
    np.testing.assert_allclose(by_logvar, (z - MU) / 2, rtol=1e-9)


def dense_widths(sequential):
    return [layer.units for layer in sequential.layers if isinstance(layer, tf.keras.layers.Dense)]


@both
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
    for outputs in (vae(images), cvae(images, labels)):
        assert [tuple(output.shape) for output in outputs] == [(6, 1, side, side), (6, latent_size), (6, latent_size)]
        assert all(output.dtype == "float32" for output in outputs)
        assert outputs[0].numpy().min() >= 0 and outputs[0].numpy().max() <= 1
    assert vae.decoder(tf.zeros((3, latent_size))).shape == (3, 1, side, side)
    assert cvae.decoder(tf.zeros((3, latent_size + classes))).shape == (3, 1, side, side)
    assert vae.encoder(tf.zeros((3, 1, side, side))).shape == (3, vae.hidden_dim)
    assert cvae.encoder(tf.zeros((3, side**2 + classes))).shape == (3, cvae.hidden_dim)


def test_a_cvaes_posterior_starts_beside_the_prior():
    assert 0 < kl_divergence(*CVAE(784)(IMAGES, LABELS)[1:]).numpy() / len(IMAGES) < 12


def test_a_new_model_listens_to_the_image_and_to_the_label():
    vae, cvae, same_image = VAE(784), CVAE(784), np.repeat(IMAGES[:1], 10, axis=0)
    assert not any(same(m.mu_layer.get_weights(), m.logvar_layer.get_weights()) for m in (vae, cvae))
    of_images = [*vae(IMAGES)[1:], *cvae(IMAGES, LABELS[[0] * 6])[1:]]
    of_labels = [*cvae(same_image, np.eye(10))[1:], cvae.decoder(np.eye(25)[15:])]
    for outputs in of_images + of_labels:
        rows = np.reshape(outputs, (len(outputs), -1))
        distances = np.abs(rows[:, np.newaxis] - rows).max(axis=2)
        assert np.all(distances[~np.eye(len(rows), dtype=bool)] > 1e-5)


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


@pytest.mark.parametrize(("part", "strength"), [("encoder", 1.5), ("decoder", 1)])
def test_a_label_starts_as_strong_as_all_inputs_together_or_stronger(part, strength):
    kernel = getattr(CVAE(784), part).trainable_variables[0].numpy()
    np.testing.assert_allclose(kernel[:-10].std(), np.sqrt(2 / len(kernel)), rtol=0.05)
    np.testing.assert_allclose(kernel[-10:].std(), strength * np.sqrt(2), rtol=0.05)


REFUSED = {
    "input_size .* square .* 0": lambda: VAE(0),
    "input_size .* square .* -4": lambda: VAE(-4),
    "input_size .* square .* 783": lambda: CVAE(783),
    "latent_size .* 0": lambda: VAE(784, latent_size=0),
    "num_classes .* 0": lambda: CVAE(784, num_classes=0),
    r"c must have the shape \(N, 10\); got \(6, 9\)": lambda: CVAE(784)(IMAGES, LABELS[:, :9]),
    r"x must have the shape \(N, 1, 28, 28\); got \(6, 784\)": lambda: VAE(784)(IMAGES.reshape(6, 784)),
    r"x must have .*; got \(6, 1, 14, 14\)": lambda: CVAE(784)(IMAGES[:, :, ::2, ::2], LABELS),
    r"x must have .*; got \(6, 28, 28, 1\)": lambda: CVAE(784)(IMAGES.reshape(6, 28, 28, 1), LABELS),
}


@pytest.mark.parametrize("message", REFUSED)
def test_sizes_that_cannot_be_are_refused(message):
    with pytest.raises(ValueError, match=message):
        REFUSED[message]()


# Keras's own tools

# The Keras of TensorFlow 2.12 writes a whole subclassed model in one format only, a folder.
SUFFIX = "" if tf.__version__.startswith("2.12.") else ".keras"


def train(model, epochs=1, loader=SIX, num_epochs=100):
    """The losses of some epochs of `train_vae`."""
    args = argparse.Namespace(learning_rate=1e-3, num_epochs=num_epochs)
    return [assignment.train_vae(model, loader, args, isinstance(model, CVAE)) for _ in range(epochs)]


@both
def test_the_loss_of_random_images_falls_from_the_first_epoch(make):
    losses = []
    for seed in range(3):
        tf.keras.utils.set_random_seed(seed)
        images = np.random.default_rng(seed).random((3, 128, 1, 28, 28))
        losses.append(train(make(784), 2, [(x, np.arange(128) % 10) for x in images], num_epochs=10))
    assert np.sum(losses, axis=0)[1] < 0.95 * np.sum(losses, axis=0)[0]


@both
def test_config_carries_the_constructors_arguments_of_any_integer_type(make):
    sizes = {"input_size": np.int64(16), "latent_size": np.int32(2)} | (
        {"num_classes": np.uint8(3)} if make is CVAE else {}
    )
    model = make(**sizes)
    again = make.from_config(json.loads(json.dumps(model.get_config())))
    assert again.get_config() == model.get_config() == sizes
    assert [v.shape for v in again.trainable_variables] == [v.shape for v in model.trainable_variables]


LOAD_ALL = """
import importlib, sys, numpy, tensorflow as tf
code, suffix, *names = sys.argv[1:]
load = tf.keras.models.load_model
decoders = {name: load(f"{name}.decoder.keras").get_weights() for name in names}
sys.path.insert(0, code)
importlib.reload(importlib.import_module("vae"))  # as in a notebook
for name in names:
    numpy.savez(name, *load(name + suffix).get_weights(), *decoders[name])
"""


def test_a_model_is_copied_saved_loaded_and_trained_on_and_its_decoder_loads_without_vae(tmp_path):
    models = {f"{make.__name__}{epochs}": make(784) for make in (VAE, CVAE) for epochs in (0, 2)}
    for name, model in models.items():
        train(model, int(name[-1]))
        if not SUFFIX:
            model(*inputs_of(model))  # Keras 2 saves what it has seen
        model.save(tmp_path / f"{name}{SUFFIX}")
        model.decoder.save(tmp_path / f"{name}.decoder.keras")
        weights = model.get_weights()
        for again in (copy.deepcopy(model), tf.keras.models.load_model(tmp_path / f"{name}{SUFFIX}")):
            assert type(again) is type(model)
            assert same(again.get_weights(), weights)
            losses = train(again, 8)
            assert losses[-1] < losses[0]
            assert same(model.get_weights(), weights)
    command = [sys.executable, "-c", LOAD_ALL, pathlib.Path(assignment.__file__).parent, SUFFIX, *models]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    for name, model in models.items():
        with np.load(tmp_path / f"{name}.npz") as arrays:
            assert same(model.get_weights() + model.decoder.get_weights(), list(arrays.values()))


def test_a_called_model_is_exported_for_batches_of_any_size(tmp_path):
    images, labels, vae, cvae = tf.zeros((4, 1, 28, 28)), tf.zeros((4, 10)), VAE(784), CVAE(784)
    vae(IMAGES)
    vae.export(str(tmp_path / "vae"))
    tf.saved_model.save(vae, str(tmp_path / "saved"))
    exported, saved = (tf.saved_model.load(str(tmp_path / name)) for name in ("vae", "saved"))
    (name,) = saved.signatures["serving_default"].structured_input_signature[1]
    served = [exported.serve(images), saved.signatures["serving_default"](**{name: images}).values()]
    if SUFFIX:  # TensorFlow 2.12 exports models of one input only
        cvae(IMAGES, LABELS)
        signature = [tf.TensorSpec((None, *array.shape[1:])) for array in (images, labels)]
        cvae.export(str(tmp_path / "cvae"), input_signature=signature)
        loaded = tf.saved_model.load(str(tmp_path / "cvae"))
        served += [loaded.serve(images, labels)]
    assert all([len(output) for output in outputs] == [4, 4, 4] for outputs in served)


def test_keras_names_the_parts(capsys):
    CVAE(784).summary()
    printed = capsys.readouterr().out
    assert all(f" {part} (" in printed for part in PARTS)


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


@both
@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16", "float64"])
def test_dtype_policies(make, policy, request):
    request.addfinalizer(lambda: tf.keras.mixed_precision.set_global_policy("float32"))
    tf.keras.mixed_precision.set_global_policy(policy)
    model = make(784)
    assert all(output.dtype == "float32" for output in model(*inputs_of(model)))
    assert model.encoder(np.zeros((1, 1, 28, 28) if make is VAE else (1, 794))).dtype == policy.removeprefix("mixed_")
    losses = train(model, 8)
    assert losses[-1] < losses[0]


@both
def test_a_frozen_part_holds_still_and_the_others_move(make):
    model = make(784)
    for frozen in (*[{part} for part in PARTS], set(), PARTS):
        for part in PARTS:
            getattr(model, part).trainable = part not in frozen
        before = {part: getattr(model, part).get_weights() for part in PARTS}
        train(model)
        still = {part for part in PARTS if same(getattr(model, part).get_weights(), before[part])}
        assert still == frozen
