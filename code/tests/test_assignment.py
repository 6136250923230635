"""assignment.py as its users meet it: the data, the training loop, weights, pictures and bad input."""

import argparse
import re
import shutil
import sys

import assignment
import numpy as np
import pytest
import tensorflow as tf
import vae
from matplotlib.image import imread
from vae import CVAE, VAE, bce_function, kl_divergence, loss_function

RNG = np.random.default_rng(0)
ENTRIES = 48  # images in the small loader


@pytest.fixture(autouse=True)
def outputs(tmp_path, monkeypatch):
    """No test writes to the project's own outputs/."""
    monkeypatch.setattr(assignment, "OUTPUTS", tmp_path / "outputs")
    return tmp_path / "outputs"


def settings(**changed):
    """What an autograder passes: the stencil's seven fields and nothing else."""
    fields = {
        "is_cvae": False,
        "load_weights": False,
        "batch_size": 16,
        "num_epochs": 3,
        "latent_size": 15,
        "input_size": 784,
        "learning_rate": 1e-3,
    }
    return argparse.Namespace(**(fields | changed))


def small_loader(batch_size=16, dtype="float64"):
    """A loader of 48 images in a list of batches, as simple as an autograder may have it."""
    images, labels = assignment.read_mnist("test")
    images = (images[:ENTRIES, np.newaxis] / 255.0).astype(dtype)
    labels = labels[:ENTRIES]
    return [(images[i : i + batch_size], labels[i : i + batch_size]) for i in range(0, ENTRIES, batch_size)]


def weights_of(model):
    return [variable.numpy().copy() for variable in model.trainable_variables]


def same(these, those):
    return all(np.array_equal(a, b) for a, b in zip(these, those, strict=True))


# Data


def test_loader_gives_every_image_once_an_epoch_in_a_fresh_order():
    images, labels = assignment.read_mnist("train")
    sums = np.sort(images.reshape(60_000, -1).sum(axis=1))
    orders = []
    loader = assignment.load_mnist(1024)
    for _ in range(2):
        batches = [(x.numpy(), y.numpy()) for x, y in loader]
        assert [len(x) for x, _ in batches] == [1024] * 58 + [608]
        x, y = (np.concatenate(arrays) for arrays in zip(*batches, strict=True))
        assert x.shape == (60_000, 1, 28, 28) and x.dtype == np.float32
        assert x.min() == 0 and x.max() == 1
        found = np.rint(x.reshape(60_000, -1).sum(axis=1, dtype=np.float64) * 255).astype(int)
        np.testing.assert_array_equal(np.sort(found), sums)
        for digit in range(10):
            assert np.sum(y == digit) == np.sum(labels == digit)
            np.testing.assert_allclose(x[y == digit].mean(), images[labels == digit].mean() / 255, rtol=1e-4)
        orders.append(found)
    assert not np.array_equal(*orders)
    assert not np.array_equal(orders[0], images.reshape(60_000, -1).sum(axis=1))


def test_the_shuffle_draws_from_a_buffer_of_the_size_asked_for():
    images, labels = assignment.read_mnist("train")
    x, y = next(iter(assignment.load_mnist(100, buffer_size=1)))
    np.testing.assert_allclose(x[:, 0], images[:100] / 255, atol=1e-6)
    np.testing.assert_array_equal(y, labels[:100])
    _, y = next(iter(assignment.load_mnist(100, buffer_size=300)))
    assert not np.array_equal(y, labels[:100])


def test_loader_refuses_sizes_below_1():
    with pytest.raises(ValueError, match=r"batch_size .* 0"):
        assignment.load_mnist(0)


@pytest.mark.parametrize(
    "damage",
    [lambda b: b"", lambda b: b[:-9], lambda b: b"<html>404</html>", lambda b: b[:99] + bytes([b[99] ^ 1]) + b[100:]],
)
def test_a_damaged_data_file_is_named_and_left_alone(damage, tmp_path, monkeypatch):
    damaged = damage(assignment.MNIST.read_bytes())
    path = tmp_path / "mnist.npz"
    path.write_bytes(damaged)
    monkeypatch.setattr(assignment, "MNIST", path)
    with pytest.raises(ValueError, match=r"mnist\.npz is damaged.*git checkout"):
        assignment.load_mnist(128)
    assert path.read_bytes() == damaged


def test_without_the_data_file_keras_downloads_it(tmp_path, monkeypatch):
    monkeypatch.setattr(assignment, "MNIST", tmp_path / "mnist.npz")
    downloaded = (np.zeros((3, 28, 28), np.uint8), np.arange(3)), (np.ones((2, 28, 28), np.uint8), np.arange(2))
    monkeypatch.setattr(tf.keras.datasets.mnist, "load_data", lambda: downloaded)
    ((x, y),) = assignment.load_mnist(10)
    assert x.shape == (3, 1, 28, 28) and sorted(y.numpy()) == [0, 1, 2]

    def no_network():
        raise Exception("URL fetch failure")

    monkeypatch.setattr(tf.keras.datasets.mnist, "load_data", no_network)
    with pytest.raises(FileNotFoundError, match=r"mnist\.npz is missing.*URL fetch failure.*git checkout"):
        assignment.load_mnist(10)


@pytest.mark.parametrize("shape", [(2,), (2, 1)])
@pytest.mark.parametrize("dtype", ["uint8", "int32", "int64"])
@pytest.mark.parametrize("wrap", [np.asarray, tf.constant], ids=["array", "tensor"])
def test_one_hot(shape, dtype, wrap):
    vectors = assignment.one_hot(wrap(np.array([2, 0], dtype).reshape(shape)), 3)
    assert vectors.dtype == "float32"
    np.testing.assert_array_equal(vectors, [[0, 0, 1], [1, 0, 0]])


# Training


@pytest.mark.parametrize("is_cvae", [False, True], ids=["VAE", "CVAE"])
def test_training_lowers_the_loss_and_takes_any_loader(is_cvae):
    tf.keras.utils.set_random_seed(1)
    model = (CVAE if is_cvae else VAE)(784)
    args = settings(num_epochs=8)
    losses = [assignment.train_vae(model, small_loader(), args, is_cvae) / 3 for _ in range(4)]
    dataset = tf.data.Dataset.from_tensor_slices(small_loader(ENTRIES, "float32")[0]).batch(20)
    losses += [assignment.train_vae(model, dataset, args, is_cvae) / 3]
    losses += [assignment.train_vae(model, iter(small_loader(7)), args, is_cvae) / 7]  # of unknown length
    assert all(isinstance(loss, float) for loss in losses)
    assert losses[-1] < losses[3] < losses[0]


def test_the_returned_loss_is_the_sum_of_loss_function_over_the_loaders_batches():
    loader = small_loader()
    model = VAE(784)
    for layer in (model.mu_layer, model.logvar_layer):
        layer.kernel.assign(tf.zeros_like(layer.kernel))
    model.logvar_layer.bias.assign(tf.fill((15,), -60.0))  # z is mu, so the loss is not random
    expected = sum(loss_function(model(x)[0], x, *model(x)[1:]).numpy() for x, _ in loader)
    args = settings(learning_rate=1e-30, kl_weight=7.0)
    np.testing.assert_allclose(assignment.train_vae(model, loader, args), expected, rtol=1e-5)


def test_a_batch_larger_than_an_optimizer_step_counts_as_one_batch(monkeypatch):
    whole, parted = VAE(784), VAE(784)
    whole.decoder.trainable_variables[-1].assign(np.full(784, -5.0))  # an expensive surprise, if the image is white
    parted.set_weights(whole.get_weights())
    images = np.repeat([0.0, 1.0], [20, 28]).reshape(48, 1, 1, 1) * np.ones((1, 1, 28, 28))
    loader = [(images, np.zeros(48, "int64"))]
    loss = assignment.train_vae(whole, loader, settings(learning_rate=1e-30))
    monkeypatch.setattr(assignment, "STEP_SIZE", 20)  # steps of 20, 20 and 8 images
    np.testing.assert_allclose(assignment.train_vae(parted, loader, settings(learning_rate=1e-30)), loss, rtol=0.05)


def test_adam_moves_a_variable_as_its_paper_says():
    value, m, v = np.full(3, 0.5), np.zeros(3), np.zeros(3)
    variables = [tf.Variable(value), tf.Variable(m), tf.Variable(v)]
    for step in range(1, 6):
        gradient = RNG.normal(size=3) * [1, 100, 0.1]
        assignment.adam_update(*variables, tf.constant(gradient), tf.constant(0.01), tf.constant(step, tf.float32))
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        value = value - 0.01 * (m / (1 - 0.9**step)) / (np.sqrt(v / (1 - 0.999**step)) + 1e-7)
        np.testing.assert_allclose(variables[0], value, rtol=1e-3)


@pytest.mark.parametrize("is_cvae", [False, True], ids=["VAE", "CVAE"])
@pytest.mark.parametrize(("changed", "weight"), [({}, 1.0), ({"kl_weight": 2.5}, 2.5)])
def test_a_step_follows_the_gradient_of_the_elbo_with_the_kl_weight_and_prior_asked_for(
    is_cvae, changed, weight, monkeypatch
):
    monkeypatch.setattr(vae, "reparametrize", lambda mu, logvar: mu)  # so that both gradients are of the same z
    monkeypatch.setattr(assignment, "adam_update", lambda variable, m, v, gradient, *_: variable.assign_sub(gradient))
    assert assignment.PRIOR_SCALE > 1
    monkeypatch.setattr(assignment, "PRIOR_SCALE", 1.3)
    model = CVAE(784) if is_cvae else VAE(784)
    images, labels = small_loader()[0]
    x = tf.cast(images, tf.float32)
    with tf.GradientTape() as tape:
        x_hat, mu, logvar = model(x, assignment.one_hot(labels, 10)) if is_cvae else model(x)
        kl = kl_divergence(mu, logvar, 1.3 if is_cvae else 1.0)
        objective = (bce_function(x_hat, x) + weight * kl) / len(x)
    expected = [w - g for w, g in zip(weights_of(model), tape.gradient(objective, model.trainable_variables))]
    loss = float(loss_function(x_hat, x, mu, logvar))
    returned = assignment.train_vae(model, [(images, labels)], settings(**changed), is_cvae=is_cvae)
    np.testing.assert_allclose(returned, loss, rtol=1e-5)  # the handout's, whatever is minimised
    for weights, wanted in zip(weights_of(model), expected):
        np.testing.assert_allclose(weights, wanted, atol=1e-5)


def test_models_trained_in_turn_do_not_disturb_each_other():
    first, second = VAE(784), CVAE(784)
    assignment.train_vae(first, small_loader(), settings())
    before = weights_of(first)
    assignment.train_vae(second, small_loader(), settings(), is_cvae=True)
    assert same(weights_of(first), before)
    before = weights_of(second)
    assignment.train_vae(first, small_loader(), settings())
    assert same(weights_of(second), before)


def test_the_optimizer_goes_on_where_the_last_epoch_ended():
    """A first step of a new Adam moves every weight by the whole learning rate; a later one, by less."""

    def largest_move(epochs_before):
        tf.keras.utils.set_random_seed(2)
        model = VAE(784)
        args = settings(num_epochs=100)
        for _ in range(epochs_before):
            assignment.train_vae(model, small_loader(), args)
        before = weights_of(model)
        assignment.train_vae(model, small_loader(ENTRIES), args)
        rate = assignment.scheduled_rate(args.learning_rate, (epochs_before + 1) / 100, ENTRIES)
        moves = np.concatenate([np.abs(a - b).ravel() for a, b in zip(before, weights_of(model), strict=True)])
        return np.median(moves[moves > 0]) / rate

    assert largest_move(0) > 0.95
    assert largest_move(5) < 0.8


def test_the_learning_rate_warms_up_cools_down_and_never_ends():
    rates = [assignment.scheduled_rate(1e-3, progress, 256) for progress in np.linspace(0, 1, 101)]
    peak = int(np.argmax(rates))
    assert peak == 50 and rates[peak] == 4e-3
    assert np.all(np.diff(rates[: peak + 1]) > 0) and np.all(np.diff(rates[peak:]) < 0)
    assert rates[0] == 1e-3 and 0 < rates[-1] < 1e-4
    assert assignment.scheduled_rate(1e-3, 2.5, 256) == rates[-1]
    scheduled = [assignment.scheduled_rate(rate, 0.4, 256) for rate in (1e-3, 3e-3)]
    np.testing.assert_allclose(scheduled[1], 3 * scheduled[0])
    assert assignment.scheduled_rate(2e-3, 0.5, 64) == 4e-3
    assert assignment.scheduled_rate(2e-3, 0, 64) == 2e-3


def test_progress_is_counted_over_epochs_and_batches(monkeypatch):
    asked = []
    monkeypatch.setattr(assignment, "scheduled_rate", lambda *arguments: asked.append(arguments) or 1e-9)
    model = VAE(784)
    for loader in (small_loader(), small_loader(24), (batch for batch in small_loader(24))):  # no length
        assignment.train_vae(model, loader, settings(num_epochs=4, learning_rate=2e-3))
    rates, progress, sizes = zip(*asked)
    assert set(rates) == {2e-3} and sizes == (16, 16, 16, 24, 24, 24, 24)
    np.testing.assert_allclose(progress, np.array([1 / 3, 2 / 3, 1, 1.5, 2, 2.5, 2.5]) / 4)


def test_training_works_within_the_tape_of_a_caller():
    model = VAE(784)
    with tf.GradientTape():  # it looks up each variable of the compiled step, so all of them must still be there
        losses = [assignment.train_vae(model, small_loader(), settings()) for _ in range(2)]
    assert losses[1] < losses[0]


def test_training_goes_on_beyond_the_planned_epochs():
    model = VAE(784)
    args = settings(num_epochs=1)
    for _ in range(3):
        before = weights_of(model)
        assignment.train_vae(model, small_loader(), args)
        assert not same(weights_of(model), before)


def test_kl_weight_trades_information_in_z_for_the_reconstruction():
    def kl_after(kl_weight):
        tf.keras.utils.set_random_seed(3)
        model = VAE(784)
        args = settings(num_epochs=20, kl_weight=kl_weight)
        for _ in range(20):
            assignment.train_vae(model, small_loader(), args)
        x = small_loader(ENTRIES)[0][0]
        return float(kl_divergence(*model(x)[1:]))

    assert kl_after(20.0) < kl_after(1.0) / 2


@pytest.mark.parametrize("learning_rate", [1e2, 1e6, 1e29])
@pytest.mark.parametrize("is_cvae", [False, True], ids=["VAE", "CVAE"])
def test_a_loss_that_is_not_finite_blames_the_learning_rate_and_leaves_finite_weights(is_cvae, learning_rate):
    model = (CVAE if is_cvae else VAE)(784)
    before = []
    with pytest.raises(ValueError, match=r"loss is no longer finite in epoch \d at learning rate .*smaller --learning"):
        for _ in range(3):
            before.append(weights_of(model))
            assignment.train_vae(model, small_loader(), settings(learning_rate=learning_rate), is_cvae)
    assert same(weights_of(model), before[-1])
    assert all(np.all(np.isfinite(weights)) for weights in weights_of(model))


def test_weights_that_only_the_last_step_ruined_are_noticed_too(monkeypatch):
    model = VAE(784)
    before = weights_of(model)
    monkeypatch.setattr(assignment, "adam_update", lambda variable, *_: variable.assign(variable * np.nan))
    with pytest.raises(ValueError, match="no longer finite"):
        assignment.train_vae(model, small_loader(ENTRIES), settings())
    assert same(weights_of(model), before)
    monkeypatch.undo()
    losses = [assignment.train_vae(model, small_loader(), settings()) for _ in range(2)]
    assert losses[1] < losses[0]


@pytest.mark.parametrize("learning_rate", [0, -1e-3, np.nan, np.inf, 1e38])
def test_learning_rates_out_of_range_are_refused(learning_rate):
    with pytest.raises(ValueError, match=rf"learning_rate .*{re.escape(str(learning_rate))}"):
        assignment.train_vae(VAE(784), small_loader(), settings(learning_rate=learning_rate))


def with_one(value):
    """Images of which one has a pixel of this value."""

    def spoil(images, labels):
        images = images.copy()
        images[3, 0, 14, 14] = value
        return images, labels

    return spoil


BAD_IMAGES = {
    "0 to 255": (lambda images, labels: (images * 255, labels), r"images .*\[0, 1\].* 0 to 255"),
    "bytes": (lambda images, labels: ((images * 255).astype("uint8"), labels), r"images .*\[0, 1\].* 0 to 255"),
    "one NaN": (with_one(np.nan), r"images .*\[0, 1\].* nan"),
    "one infinite": (with_one(np.inf), r"images .*\[0, 1\].* 0 to inf"),
    "one below 0": (with_one(-0.01), r"images .*\[0, 1\].* -0\.01 to 1"),
    "one above 1": (with_one(1.01), r"images .*\[0, 1\].* 0 to 1\.01"),
    "flat": (lambda images, labels: (images.reshape(-1, 784), labels), r"images .*\(N, 1, 28, 28\); got \(16, 784\)"),
    "channels last": (
        lambda images, labels: (images.reshape(-1, 28, 28, 1), labels),
        r"images .*\(N, 1, 28, 28\); got \(16, 28, 28, 1\)",
    ),
    "none": (lambda images, labels: (images[:0], labels[:0]), r"images .*got \(0, 1, 28, 28\)"),
    "no labels": (lambda images, _: images, r"pairs of images and labels; got 16 parts"),
}
BAD_LABELS = {
    "1 to 10": (lambda images, labels: (images, np.arange(16) % 10 + 1), r"labels .*0 to 9; got 1 to 10"),
    "one negative": (lambda images, labels: (images, labels - (np.arange(16) == 5) * 20), r"labels .*0 to 9; got -"),
    "halves": (lambda images, labels: (images, labels + 0.5), r"labels .*whole numbers .*\.5 to"),
    "one NaN": (lambda images, labels: (images, np.where(np.arange(16) == 5, np.nan, labels)), r"labels .*nan"),
    "one-hot": (lambda images, labels: (images, np.eye(10)[labels]), r"labels .*\(16,\).*got .*\(16, 10\)"),
    "too few": (lambda images, labels: (images, labels[:9]), r"labels .*\(16,\).*got .*\(9,\)"),
}
BAD_BATCHES = [(is_cvae, *bad) for is_cvae in (False, True) for bad in BAD_IMAGES.items()]
BAD_BATCHES += [(True, *bad) for bad in BAD_LABELS.items()]


@pytest.fixture(scope="module")
def in_training():
    """A VAE and a CVAE, by `is_cvae`; that they are compiled once for all bad batches saves a minute."""
    return {False: VAE(784), True: CVAE(784)}


@pytest.mark.parametrize(("is_cvae", "name", "bad"), BAD_BATCHES)
def test_a_bad_batch_is_named_and_the_weights_stay_as_they_were_before_it(in_training, is_cvae, name, bad):
    spoil, message = bad
    model = in_training[is_cvae]
    good, before = small_loader(), weights_of(model)
    at_the_bad_batch = []

    def loader():
        yield from good[:2]  # not only the first batch is looked at
        at_the_bad_batch.append(weights_of(model))
        yield spoil(*good[2])

    with pytest.raises(ValueError, match=message):
        assignment.train_vae(model, loader(), settings(), is_cvae)
    assert same(weights_of(model), at_the_bad_batch[0])
    assert not same(weights_of(model), before)


def test_only_a_cvae_looks_at_the_labels(in_training):
    for labels in (np.eye(10)[:16], np.full(16, 11), np.full(16, "?"), None):
        assert np.isfinite(assignment.train_vae(in_training[False], [(small_loader()[0][0], labels)], settings()))
    for labels in (small_loader()[0][1][:, np.newaxis], small_loader()[0][1].astype(float)):
        assert np.isfinite(assignment.train_vae(in_training[True], [(small_loader()[0][0], labels)], settings(), True))


def test_a_model_of_the_other_kind_is_refused():
    with pytest.raises(ValueError, match=r"is_cvae is True.* VAE.*is_cvae=False"):
        assignment.train_vae(VAE(784), small_loader(), settings(), is_cvae=True)
    with pytest.raises(ValueError, match=r"is_cvae is False.* CVAE.*is_cvae=True"):
        assignment.train_vae(CVAE(784), small_loader(), settings())


@pytest.mark.parametrize("loader", [[], iter(())], ids=["list", "iterator"])
def test_a_loader_without_a_batch_is_no_perfect_loss(loader):
    with pytest.raises(ValueError, match="loader gave no batch"):
        assignment.train_vae(VAE(784), loader, settings())


def test_images_that_do_not_fit_the_model_are_refused():
    with pytest.raises(ValueError, match=r"\(N, 1, 10, 10\); got \(16, 1, 28, 28\)"):
        assignment.train_vae(VAE(100), small_loader(), settings())


# Weights


@pytest.mark.parametrize("make", [VAE, CVAE])
def test_weights_survive_a_round_trip(make):
    model = make(784)
    assignment.save_model_weights(model, settings())
    loaded = make(784)
    assert not same(weights_of(loaded), weights_of(model))
    assert assignment.load_weights(loaded) is loaded
    assert same(weights_of(loaded), weights_of(model))


def test_missing_weights(outputs):
    with pytest.raises(FileNotFoundError, match=r"cvae\.weights\.h5 is missing.*assignment\.py --is_cvae"):
        assignment.load_weights(CVAE(784))


@pytest.mark.parametrize("make", [VAE, CVAE])
@pytest.mark.parametrize("damage", [lambda b: b"", lambda b: b[: len(b) // 2], lambda b: b"<html>404</html>"])
def test_damaged_weights(make, damage, outputs):
    assignment.save_model_weights(make(784), settings())
    (path,) = outputs.rglob("*.weights.h5")
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"vae\.weights\.h5 is damaged.*train new ones"):
        assignment.load_weights(make(784))


def test_weights_of_another_model_or_latent_size(outputs):
    assignment.save_model_weights(VAE(784), settings())
    assignment.save_model_weights(CVAE(784), settings())
    with pytest.raises(ValueError, match=r"vae\.weights\.h5 .*latent size.*--latent_size 3"):
        assignment.load_weights(VAE(784, latent_size=3))
    shutil.copy(assignment.weights_path(CVAE(784)), assignment.weights_path(VAE(784)))
    with pytest.raises(ValueError, match=r"vae\.weights\.h5 .*another model"):
        assignment.load_weights(VAE(784))


class FullDisk:
    """Stands in for `tempfile.TemporaryFile` where no file of 5 MB fits."""

    def __init__(self, dir):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def write(self, content):
        assert len(content) > 5_000_000
        raise OSError(28, "No space left on device")


def test_a_disk_that_fills_up_during_training_is_found_before_hdf5_meets_it(outputs, monkeypatch):
    model = VAE(784)
    assignment.save_model_weights(model, settings())
    (path,) = outputs.rglob("*.weights.h5")
    old = path.read_bytes()
    monkeypatch.setattr(assignment.tempfile, "TemporaryFile", FullDisk)
    monkeypatch.setattr(model, "save_weights", lambda _: pytest.fail("HDF5 wrote to a full disk"))
    with pytest.raises(OSError, match=r"cannot write to .*outputs.*No space left.*free some space"):
        assignment.save_model_weights(model, settings())
    assert path.read_bytes() == old


def test_a_write_that_fails_leaves_the_old_weights_and_nothing_else(outputs, monkeypatch):
    model = VAE(784)
    assignment.save_model_weights(model, settings())
    (path,) = outputs.rglob("*.weights.h5")
    old = path.read_bytes()

    def disk_full(part):
        with open(part, "wb") as file:
            file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(model, "save_weights", disk_full)
    with pytest.raises(OSError, match=r"cannot write .*vae\.weights\.h5.*No space"):
        assignment.save_model_weights(model, settings())
    assert path.read_bytes() == old
    assert list(path.parent.iterdir()) == [path]


# Pictures


def brightness(picture, rows, columns):
    """Mean grey of each image of a grid (height, width, channels)."""
    height, width = picture.shape[0] // rows, picture.shape[1] // columns
    return picture[: rows * height, : columns * width, 0].reshape(rows, height, columns, width).mean(axis=(1, 3))


class Shade:
    """Stands in for a model: its images are as bright as z, or as the digit asked for."""

    num_classes = 10

    def __init__(self, shade):
        self.shade = shade

    def decoder(self, z):
        return tf.ones((len(z), 1, 28, 28)) * tf.reshape(tf.cast(self.shade(z), tf.float32), (-1, 1, 1, 1))


def test_vae_images_are_a_row_of_ten_random_ones(outputs):
    path = assignment.show_vae_images(Shade(lambda z: tf.sigmoid(z[:, 0])), latent_size=3)
    assert path == outputs / "show_vae_images.png"
    assert len(np.unique(brightness(imread(path), 1, 10))) == 10


def test_interpolation_walks_in_a_straight_line_along_each_row(outputs):
    path = assignment.show_vae_interpolation(Shade(lambda z: 0.5 + z[:, 0] / 8), latent_size=3)
    assert path == outputs / "show_vae_interpolation.png"
    grid = brightness(imread(path), 12, 12)
    steps = np.diff(grid, axis=1)
    np.testing.assert_allclose(steps, np.repeat(steps.mean(axis=1, keepdims=True), 11, axis=1), atol=2.5 / 255)
    assert len(np.unique(grid[:, 0].round(3))) > 6 and len(np.unique(grid[:, -1].round(3))) > 6


def test_interpolation_begins_and_ends_at_the_two_random_z(outputs):
    """Along a row z is (1 - t) a + t b with t from 0 to 1, and a and b drawn from N(0, 1)."""

    class Recorder(Shade):
        def decoder(self, z):
            self.z = z
            return super().decoder(z)

    model = Recorder(lambda z: 0 * z[:, 0])
    assignment.show_vae_interpolation(model, latent_size=4000)
    z = np.reshape(model.z, (12, 12, 4000))
    t = np.arange(12) / 11
    np.testing.assert_allclose(z.std(axis=(0, 2)), np.sqrt((1 - t) ** 2 + t**2), rtol=0.02)
    assert abs(np.mean(z[:, 0] * z[:, -1])) < 0.03
    assert abs(np.mean(z[0] * z[1])) < 0.05


@pytest.fixture
def figure(monkeypatch):
    """The figures that are drawn, in a list."""
    figures, save = [], assignment.save_figure
    monkeypatch.setattr(assignment, "save_figure", lambda name, figure: figures.append(figure) or save(name, figure))
    return figures


def test_each_row_of_the_cvaes_picture_is_labelled_with_its_digit(figure):
    assignment.show_cvae_images(Shade(lambda z: tf.argmax(z[:, 3:], axis=1) / 10), latent_size=3)
    (axes,) = figure[0].axes
    drawn = axes.images[0].get_array()
    bottom, top = axes.get_ylim()
    assert (bottom, top) == (len(drawn) - 0.5, -0.5)  # the first row is at the top
    for tick, label in zip(axes.get_yticks(), axes.get_yticklabels(), strict=True):
        np.testing.assert_allclose(drawn[int(tick)], int(label.get_text()) / 10)
        assert tick % 28 == 14


def test_cvae_images_have_a_row_for_each_digit(outputs):
    path = assignment.show_cvae_images(Shade(lambda z: tf.argmax(z[:, 3:], axis=1) / 10), latent_size=3)
    assert path == outputs / "show_cvae_images.png"
    picture = imread(path)
    margin = picture.shape[1] - 10 * 28 * 3
    assert margin > 0
    grid = brightness(picture[:, margin:], 10, 10)
    np.testing.assert_allclose(grid, np.repeat(np.arange(10)[:, None] / 10, 10, axis=1), atol=1 / 255)
    labels = picture[:, :margin, 0].reshape(10, -1)
    assert np.all(labels.min(axis=1) < 0.5)  # each row of the margin has ink on it


@pytest.mark.parametrize(("is_cvae", "name"), [(True, "cvae"), (False, "vae")])
def test_loss_curve(outputs, figure, is_cvae, name):
    assert assignment.save_loss_curve([150.0, 130.0, 110.0], is_cvae) == outputs / f"{name}_loss.png"
    assert imread(outputs / f"{name}_loss.png").shape[0] > 400
    curve, bar = figure[0].axes[0].lines
    assert list(curve.get_xdata()) == [1, 2, 3] and list(curve.get_ydata()) == [150, 130, 110]
    assert set(bar.get_ydata()) == {120}


# Command line


def parse(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["assignment.py", *arguments])
    return assignment.parseArguments()


def test_defaults_are_the_handouts(monkeypatch):
    assert parse(monkeypatch) == settings(batch_size=1024, num_epochs=10)
    assert parse(monkeypatch, "--is_cvae", "--kl_weight", "1.5", "--seed", "7") == settings(
        is_cvae=True, batch_size=1024, num_epochs=10, kl_weight=1.5, seed=7
    )


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--batch_size", "0"),
        ("--batch_size", "many"),
        ("--batch_size", "1.5"),
        ("--num_epochs", "-1"),
        ("--latent_size", "0"),
        ("--learning_rate", "nan"),
        ("--learning_rate", "inf"),
        ("--learning_rate", "0"),
        ("--learning_rate", "-0.001"),
        ("--input_size", "100"),
        ("--kl_weight", "-1"),
        ("--seed", "-1"),
        ("--seed", str(2**32)),
    ],
)
def test_a_setting_out_of_range_is_one_line_that_names_it(monkeypatch, capsys, flag, value):
    with pytest.raises(SystemExit) as stop:
        parse(monkeypatch, flag, value)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert flag in line and "takes" in line and repr(value) in line


def test_no_epochs_draw_from_an_untrained_model_and_save_no_weights(outputs, capsys):
    assignment.main(settings(num_epochs=0))
    assert {path.name for path in outputs.rglob("*.*")} == {"show_vae_images.png", "show_vae_interpolation.png"}
    assert str(outputs / "show_vae_images.png") in capsys.readouterr().out


def test_outputs_that_cannot_be_written_are_found_before_training(outputs, monkeypatch):
    outputs.write_text("a file where the folder should be")
    monkeypatch.setattr(assignment, "train_vae", lambda *_: pytest.fail("trained"))
    with pytest.raises(OSError, match=r"cannot write to .*outputs"):
        assignment.main(settings())


def test_a_full_disk_is_found_before_training(outputs, monkeypatch):
    monkeypatch.setattr(assignment.tempfile, "TemporaryFile", FullDisk)
    monkeypatch.setattr(assignment, "train_vae", lambda *_: pytest.fail("trained"))
    with pytest.raises(OSError, match=r"cannot write to .*outputs.*No space left"):
        assignment.main(settings())


def test_a_loss_that_is_not_finite_keeps_the_last_good_weights(outputs, monkeypatch):
    calls = []
    monkeypatch.setattr(assignment, "load_mnist", lambda *_, **__: small_loader())

    def train(model, loader, args, is_cvae):
        calls.append(weights_of(model))
        if len(calls) == 2:
            raise ValueError("the loss is nan")
        return 1.0

    monkeypatch.setattr(assignment, "train_vae", train)
    with pytest.raises(ValueError, match="nan"):
        assignment.main(settings())
    assert same(weights_of(assignment.load_weights(VAE(784))), calls[0])


def test_the_same_seed_gives_the_same_losses(outputs, monkeypatch, capsys):
    monkeypatch.setattr(assignment, "load_mnist", lambda *_, **__: small_loader())
    printed = []
    for seed in (5, 5, 6):
        assignment.main(settings(seed=seed))
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] != printed[2]
    assert printed[0].startswith("Train Epoch: 1 \tLoss: ")
