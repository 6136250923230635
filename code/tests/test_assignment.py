"""assignment.py as its users meet it: the data, the training loop, weights, pictures and bad input."""

import argparse
import itertools
import re
import sys

import assignment
import numpy as np
import pytest
import tensorflow as tf
import vae
from matplotlib.image import imread
from vae import CVAE, VAE, bce_function, kl_divergence, loss_function

ENTRIES = 48  # images in the small loader
both = pytest.mark.parametrize("make", [VAE, CVAE])


@pytest.fixture(autouse=True)
def outputs(tmp_path, monkeypatch):
    """No test writes to the project's own outputs/."""
    monkeypatch.setattr(assignment, "OUTPUTS", tmp_path / "outputs")
    return tmp_path / "outputs"


def settings(**changed):
    """What an autograder passes: the stencil's seven fields and nothing else."""
    sizes = {"batch_size": 16, "num_epochs": 3, "latent_size": 15, "input_size": 784, "learning_rate": 1e-3}
    return argparse.Namespace(**({"is_cvae": False, "load_weights": False} | sizes | changed))


def small_loader(batch_size=16, dtype="float64"):
    """A loader of 48 images in a list of batches, as simple as an autograder may have it."""
    images, labels = (array[:ENTRIES] for array in assignment.read_mnist("test"))
    images = (images[:, np.newaxis] / 255.0).astype(dtype)
    return [(images[i : i + batch_size], labels[i : i + batch_size]) for i in range(0, ENTRIES, batch_size)]


def train(model, loader=None, epochs=1, **changed):
    """The losses of some epochs of `train_vae`, each the mean over the batches."""
    loader = small_loader() if loader is None else loader
    is_cvae = hasattr(model, "num_classes")
    return [assignment.train_vae(model, loader, settings(**changed), is_cvae) / len(loader) for _ in range(epochs)]


def same(these, those):
    return len(these) == len(those) and all(map(np.array_equal, these, those))


# Data


def test_loader_gives_every_image_with_its_label_once_an_epoch_in_a_fresh_order():
    images, labels = assignment.read_mnist("train")
    orders = [images.reshape(60_000, -1).sum(axis=1) * 10 + labels]
    loader = assignment.load_mnist(1024)
    for _ in range(2):
        batches = [(x.numpy(), y.numpy()) for x, y in loader]
        assert [len(x) for x, _ in batches] == [1024] * 58 + [608]
        x, y = (np.concatenate(arrays) for arrays in zip(*batches, strict=True))
        assert x.shape == (60_000, 1, 28, 28) and x.dtype == np.float32
        assert x.min() == 0 and x.max() == 1
        found = np.rint(x.reshape(60_000, -1).sum(axis=1, dtype=np.float64) * 255).astype(int) * 10 + y
        np.testing.assert_array_equal(np.sort(found), np.sort(orders[0]))
        assert not any(np.array_equal(found, order) for order in orders)
        orders.append(found)


def test_the_batch_and_the_buffer_have_the_size_asked_for():
    images, labels = assignment.read_mnist("train")
    x, y = next(iter(assignment.load_mnist(100, buffer_size=1)))
    np.testing.assert_allclose(x[:, 0], images[:100] / 255, atol=1e-6)
    np.testing.assert_array_equal(y, labels[:100])
    _, y = next(iter(assignment.load_mnist(100, buffer_size=300)))
    assert not np.array_equal(y, labels[:100])
    with pytest.raises(ValueError, match=r"batch_size .* 0"):
        assignment.load_mnist(0)


CUT_OR_REPLACED = [lambda b: b"", lambda b: b[: len(b) // 2], lambda b: b[:-9], lambda b: b"<html>404</html>"]


@pytest.mark.parametrize("damage", [*CUT_OR_REPLACED, lambda b: b[:99] + bytes([b[99] ^ 1]) + b[100:]])
def test_a_damaged_data_file_is_named_and_left_alone(damage, tmp_path, monkeypatch):
    damaged = damage(assignment.MNIST.read_bytes())
    monkeypatch.setattr(assignment, "MNIST", tmp_path / "mnist.npz")
    assignment.MNIST.write_bytes(damaged)
    with pytest.raises(OSError, match=r"mnist\.npz is damaged.*git checkout"):
        assignment.load_mnist(128)
    assert assignment.MNIST.read_bytes() == damaged


def test_without_the_data_file_keras_downloads_it(tmp_path, monkeypatch):
    monkeypatch.setattr(assignment, "MNIST", tmp_path / "mnist.npz")
    training, test = (np.zeros((3, 28, 28), np.uint8), np.arange(3)), (np.ones((2, 28, 28), np.uint8), np.arange(2))
    monkeypatch.setattr(tf.keras.datasets.mnist, "load_data", lambda: (training, test))
    ((x, y),) = assignment.load_mnist(10)
    assert x.shape == (3, 1, 28, 28) and sorted(y.numpy()) == [0, 1, 2]
    monkeypatch.setattr(tf.keras.datasets.mnist, "load_data", lambda: training[9])  # raises as a failed download does
    with pytest.raises(OSError, match=r"mnist\.npz is missing \(.+\).*git checkout"):
        assignment.load_mnist(10)


@pytest.mark.parametrize("dtype", ["uint8", "int32", "int64"])
def test_one_hot(dtype):
    for labels in (np.array([2, 0], dtype), np.array([[2], [0]], dtype)):
        for vectors in (assignment.one_hot(labels, 3), assignment.one_hot(tf.constant(labels), 3)):
            assert vectors.dtype == "float32"
            np.testing.assert_array_equal(vectors, [[0, 0, 1], [1, 0, 0]])


# Training


@both
def test_training_lowers_the_loss_and_takes_any_loader(make):
    tf.keras.utils.set_random_seed(1)
    model = make(784)
    dataset = tf.data.Dataset.from_tensor_slices(small_loader(ENTRIES, "float32")[0]).batch(20)
    unknown_length = iter(small_loader(7))
    losses = train(model, epochs=4, num_epochs=8) + train(model, dataset, num_epochs=8)
    losses += [assignment.train_vae(model, unknown_length, settings(num_epochs=8), make is CVAE) / 7]
    assert all(isinstance(loss, float) for loss in losses)
    assert losses[-1] < losses[3] < losses[0]


def test_the_returned_loss_is_the_sum_of_loss_function_over_the_loaders_batches():
    model = VAE(784)
    model.logvar_layer.set_weights([np.zeros((400, 15)), np.full(15, -60.0)])  # z is mu, so the loss is not random
    expected = sum(loss_function(model(x)[0], x, *model(x)[1:]).numpy() for x, _ in small_loader(20))
    loss = assignment.train_vae(model, small_loader(20), settings(learning_rate=1e-30))
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


@both
def test_a_batch_is_one_step_of_the_users_own_optimizer_down_the_gradient_of_the_elbo(make, monkeypatch):
    monkeypatch.setattr(vae, "reparametrize", lambda mu, logvar: mu)  # so that both gradients are of the same z
    model = make(784)
    model.compile(optimizer=tf.keras.optimizers.SGD(0.125))
    ((images, labels),) = small_loader(ENTRIES)
    x = tf.cast(images, tf.float32)
    with tf.GradientTape() as tape:
        x_hat, mu, logvar = model(x, assignment.one_hot(labels, 10)) if make is CVAE else model(x)
        loss = (bce_function(x_hat, x) + kl_divergence(mu, logvar)) / len(x)
    expected = [w - g / 8 for w, g in zip(model.trainable_variables, tape.gradient(loss, model.trainable_variables))]
    train(model, [(images, labels)])
    for moved, wanted in zip(model.trainable_variables, expected):
        np.testing.assert_allclose(moved, wanted, atol=1e-5)
    assert float(model.optimizer.learning_rate) == 0.125
    legacy = tf.__version__.startswith("2.12.")  # whose Adam, on a Mac, is a legacy one
    # Another one, between two epochs, takes over.
    model.compile(optimizer=(tf.keras.optimizers.legacy if legacy else tf.keras.optimizers).SGD(0.0))
    before = model.get_weights()
    train(model, [(images, labels)])
    assert same(model.get_weights(), before)


class SomebodysVAE(tf.keras.Model):
    """The stencil's attributes and nothing more; plain Sequentials, which are built when they are first called."""

    def __init__(self, num_classes=None):
        super().__init__()
        dense, self.input_size, self.latent_size, self.hidden_dim = tf.keras.layers.Dense, 784, 15, 32
        self.encoder = tf.keras.Sequential([tf.keras.layers.Flatten(), dense(32, activation="relu")])
        self.mu_layer, self.logvar_layer = dense(15), dense(15)
        self.decoder = tf.keras.Sequential([dense(784, activation="sigmoid"), tf.keras.layers.Reshape((1, 28, 28))])
        if num_classes:
            self.num_classes = num_classes

    def call(self, x, *c, training=False):
        assert training  # or no dropout would drop
        hidden = self.encoder(tf.concat([tf.reshape(x, (-1, 784)), *c], axis=1))
        mu, logvar = self.mu_layer(hidden), self.logvar_layer(hidden)
        return self.decoder(tf.concat([vae.reparametrize(mu, logvar), *c], axis=1)), mu, logvar


@pytest.mark.parametrize("num_classes", [None, 10])
def test_a_model_that_is_built_by_its_first_call_learns_from_its_first_batch(num_classes):
    black = [(np.zeros((16, 1, 28, 28)), np.arange(16) % 10)] * 20
    (loss,) = train(SomebodysVAE(num_classes), black, learning_rate=0.1)
    assert loss < 0.7 * 784 * np.log(2)  # which is what grey images cost


def test_a_plan_rises_from_the_rate_asked_for_and_falls_to_almost_0_then_begins_anew():
    rates = [assignment.planned_rate(1e-3, progress, 1024) for progress in np.linspace(0, 1, 100, endpoint=False)]
    peak = int(np.argmax(rates))
    assert peak == 50 and rates[peak] == 8e-3 and rates[0] == 1e-3 and 0 < rates[-1] < 3e-4
    assert np.all(np.diff(rates[: peak + 1]) > 0) and np.all(np.diff(rates[peak:]) < 0)
    assert assignment.planned_rate(1e-3, 2.3, 1024) == pytest.approx(assignment.planned_rate(1e-3, 0.3, 1024))
    assert [assignment.planned_rate(2e-3, 0.5, size) for size in (16, 160, 60_000)] == [2e-3, 4e-3, 16e-3]


def test_the_plan_counts_the_steps_of_one_optimizer_over_all_epochs(monkeypatch):
    asked = []
    monkeypatch.setattr(assignment, "planned_rate", lambda *arguments: asked.append(arguments) or 1e-9)
    model = VAE(784)
    for loader in (small_loader(), small_loader(), (batch for batch in small_loader(24))):
        assignment.train_vae(model, loader, settings(num_epochs=4, learning_rate=2e-3))
    planned = [(2e-3, step / 12, 16) for step in range(6)]
    assert asked == [*planned, (2e-3, 0, 24), (2e-3, 0, 24)]  # a loader that cannot tell its length has no plan
    assert int(model.optimizer.iterations) == 8
    assert float(model.optimizer.learning_rate) == pytest.approx(1e-9)


@both
@pytest.mark.parametrize("learning_rate", [1e2, 1e29])
def test_a_loss_that_is_not_finite_blames_the_learning_rate(make, learning_rate):
    with pytest.raises(ValueError, match="no longer finite: try a smaller learning rate"):
        train(make(784), epochs=3, learning_rate=learning_rate)
    last_step_ruins = make(784)
    last_step_ruins.compile(optimizer=tf.keras.optimizers.SGD(np.nan))
    with pytest.raises(ValueError, match="no longer finite"):
        train(last_step_ruins, small_loader(ENTRIES))


IMAGES, DIGITS = (array[:16] for array in assignment.read_mnist("test"))
IMAGES, DIGITS = IMAGES[:, np.newaxis] / 255, DIGITS.astype(int)
FIFTH = np.arange(16) == 5


def with_one(value):
    """Images of which one has a pixel of this value."""
    return np.where(np.arange(IMAGES.size).reshape(IMAGES.shape) == 3000, value, IMAGES)


BAD_IMAGES = [
    (IMAGES * 255, r"images .*\[0, 1\].* 0 to 255"),
    ((IMAGES * 255).astype("uint8"), r"images .*\[0, 1\].* 0 to 255"),
    (with_one(np.nan), r"images .*\[0, 1\].* nan"),
    (with_one(np.inf), r"images .*\[0, 1\].* 0 to inf"),
    (with_one(-0.01), r"images .*\[0, 1\].* -0\.01 to 1"),
    (with_one(1.01), r"images .*\[0, 1\].* 0 to 1\.01"),
    (IMAGES.reshape(-1, 784), r"images .*\(N, 1, 28, 28\); got \(16, 784\)"),
    (IMAGES.reshape(-1, 28, 28, 1), r"images .*\(N, 1, 28, 28\); got \(16, 28, 28, 1\)"),
    (IMAGES[:0], r"images .*got \(0, 1, 28, 28\)"),
]
BAD_LABELS = [
    (np.arange(16) % 10 + 1, r"labels .*0 to 9; got .* 9 10\]"),
    (np.where(FIFTH, -9, DIGITS), r"labels .*0 to 9; .*\[-9"),
    (DIGITS + 0.5, r"labels .*whole numbers .*\.5"),
    (np.where(FIFTH, np.nan, DIGITS), r"labels .*nan"),
    (np.eye(10)[DIGITS], r"labels .* 16 .*got .*\(16, 10\)"),
    (DIGITS[:9], r"labels .* 16 .*got .*\(9,\)"),
]
BAD_BATCHES = [(is_cvae, (bad, DIGITS), says) for is_cvae in (False, True) for bad, says in BAD_IMAGES]
BAD_BATCHES += [(True, (IMAGES, bad), says) for bad, says in BAD_LABELS]
BAD_BATCHES += [(is_cvae, IMAGES, "pairs of images and labels; got 16 parts") for is_cvae in (False, True)]


@pytest.fixture(scope="module")
def in_training():
    """A VAE and a CVAE, by `is_cvae`; that they are compiled once for all bad batches saves a minute."""
    return {False: VAE(784), True: CVAE(784)}


@pytest.mark.parametrize(("is_cvae", "bad", "message"), BAD_BATCHES)
def test_a_bad_batch_is_named_and_the_weights_stay_as_they_were_before_it(in_training, is_cvae, bad, message):
    model = in_training[is_cvae]
    before, at_the_bad_batch = model.get_weights(), []

    def loader():
        yield from [(IMAGES, DIGITS)] * 2  # not only the first batch is looked at
        at_the_bad_batch.extend(model.get_weights())
        yield bad

    with pytest.raises(ValueError, match=message):
        assignment.train_vae(model, loader(), settings(), is_cvae)
    assert same(model.get_weights(), at_the_bad_batch) and not same(model.get_weights(), before)


def test_only_a_cvae_looks_at_the_labels(in_training):
    for labels in (np.eye(10)[DIGITS], DIGITS + 9, np.full(16, "?"), None):
        assert np.isfinite(train(in_training[False], [(IMAGES, labels)]))
    for labels in (DIGITS[:, np.newaxis], DIGITS.astype(float)):
        assert np.isfinite(train(in_training[True], [(IMAGES, labels)]))


def test_a_model_of_the_other_kind_is_refused():
    with pytest.raises(ValueError, match=r"is_cvae is True.* VAE.*is_cvae=False"):
        assignment.train_vae(VAE(784), small_loader(), settings(), is_cvae=True)
    with pytest.raises(ValueError, match=r"is_cvae is False.* CVAE.*is_cvae=True"):
        assignment.train_vae(CVAE(784), small_loader(), settings())


def test_a_loader_without_a_batch_is_no_perfect_loss():
    with pytest.raises(ValueError, match="loader gave no batch"):
        assignment.train_vae(VAE(784), iter(()), settings())


# Weights


@both
def test_weights_survive_a_round_trip(make):
    model, loaded = make(784), make(784)
    remedy = "assignment.py --is_cvae --lat" if make is CVAE else "assignment.py --lat"
    with pytest.raises(FileNotFoundError, match=rf"vae\.weights\.h5 is missing.*{remedy}"):
        assignment.load_weights(loaded)
    assignment.save_model_weights(model, settings())
    assert not same(loaded.get_weights(), model.get_weights())
    assert assignment.load_weights(loaded) is loaded
    assert same(loaded.get_weights(), model.get_weights())


@pytest.mark.parametrize("damage", CUT_OR_REPLACED)
def test_damaged_weights(damage):
    assignment.save_model_weights(VAE(784))
    path = assignment.weights_path(VAE(784))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(OSError, match=r"vae\.weights\.h5 is damaged (?!.*latent).*train anew"):
        assignment.load_weights(VAE(784))


def test_weights_of_another_model_or_latent_size_are_not_called_damaged():
    for other in (VAE(784, latent_size=3), CVAE(784)):
        assignment.save_model_weights(other)
        assignment.weights_path(other).replace(assignment.weights_path(VAE(784)))
        with pytest.raises(OSError, match=r"vae\.weights\.h5 does not fit.*another latent size"):
            assignment.load_weights(VAE(784))


def test_a_write_that_fails_leaves_the_old_weights_and_nothing_else(monkeypatch):
    model = VAE(784)
    assignment.save_model_weights(model)
    path, save_weights = assignment.weights_path(model), model.save_weights
    old = path.read_bytes()

    def disk_full(part):
        save_weights(part)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(model, "save_weights", disk_full)
    with pytest.raises(OSError, match="No space"):
        assignment.save_model_weights(model)
    assert path.read_bytes() == old and list(path.parent.iterdir()) == [path]


# Pictures


def brightness(picture, rows, columns):
    """Mean grey of each image of a grid (height, width, channels)."""
    height, width = picture.shape[0] // rows, picture.shape[1] // columns
    return picture[: rows * height, : columns * width, 0].reshape(rows, height, columns, width).mean(axis=(1, 3))


class Shade:
    """Stands in for a model: its images are as bright as z, or as the digit asked for; it keeps the z that it got."""

    num_classes = 10

    def __init__(self, shade=lambda z: 0 * z[:, 0]):
        self.shade = shade

    def decoder(self, z):
        self.z = z
        return tf.ones((len(z), 1, 28, 28)) * tf.reshape(tf.cast(self.shade(z), tf.float32), (-1, 1, 1, 1))


def test_vae_images_are_a_row_of_ten_random_ones(outputs):
    path = assignment.show_vae_images(Shade(lambda z: tf.sigmoid(z[:, 0])), latent_size=3)
    assert path == outputs / "show_vae_images.png"
    assert len(np.unique(brightness(imread(path), 1, 10))) == 10


@pytest.mark.parametrize("show", [assignment.show_vae_images, assignment.show_cvae_images])
def test_pictures_are_of_z_from_the_whole_prior_as_a_narrower_z_looks_better(show):
    model = Shade()
    show(model, latent_size=4000)
    z = model.z[:, :4000].numpy()
    np.testing.assert_allclose(z @ z.T / 4000, np.eye(len(z)), atol=0.15)


def test_interpolation_walks_in_a_straight_line_along_each_row_from_one_random_z_to_another(outputs):
    model = Shade(lambda z: 0.5 + z[:, 0] / 8)
    path = assignment.show_vae_interpolation(model, latent_size=4000)
    assert path == outputs / "show_vae_interpolation.png"
    z, t = np.reshape(model.z, (12, 12, 4000)), np.linspace(0, 1, 12)
    np.testing.assert_allclose(brightness(imread(path), 12, 12), np.clip(0.5 + z[:, :, 0] / 8, 0, 1), atol=2.5 / 255)
    np.testing.assert_allclose(z, z[:, :1] + t[:, np.newaxis] * (z[:, -1:] - z[:, :1]), atol=1e-5)
    ends = z[:, [0, -1]].reshape(24, 4000)
    np.testing.assert_allclose(ends @ ends.T / 4000, np.eye(24), atol=0.15)


@pytest.fixture
def figure(monkeypatch):
    """The figures that are drawn, in a list."""
    figures, save = [], assignment.save_figure
    monkeypatch.setattr(assignment, "save_figure", lambda name, figure: figures.append(figure) or save(name, figure))
    return figures


def test_cvae_images_have_a_row_for_each_digit_with_its_label(outputs, figure):
    path = assignment.show_cvae_images(Shade(lambda z: tf.argmax(z[:, 3:], axis=1) / 10), latent_size=3)
    assert path == outputs / "show_cvae_images.png"
    picture = imread(path)[:, -10 * 28 * 3 :]
    shades = np.repeat(np.arange(10)[:, None] / 10, 10, axis=1)
    np.testing.assert_allclose(brightness(picture, 10, 10), shades, atol=1 / 255)
    (axes,) = figure[0].axes
    assert axes.get_ylim() == (279.5, -0.5)  # the first row is at the top
    assert list(axes.get_yticks()) == [28 * digit + 14 for digit in range(10)]
    assert [label.get_text() for label in axes.get_yticklabels()] == list("0123456789")
    assert np.all(imread(path)[:, : -10 * 28 * 3, 0].reshape(10, -1).min(axis=1) < 0.5)  # there is ink in the margin


def test_loss_curve(outputs, figure):
    assert assignment.save_loss_curve([150.0, 130.0, 110.0], "cvae") == outputs / "cvae_loss.png"
    assert assignment.save_loss_curve(np.linspace(150, 100, 60), "vae") == outputs / "vae_loss.png"
    curve, bar = figure[0].axes[0].lines
    assert (*curve.get_xdata(), *curve.get_ydata(), *set(bar.get_ydata())) == (1, 2, 3, 150, 130, 110, 120)
    for drawn in figure:
        labels = [label for label in drawn.axes[0].get_xticklabels() if label.get_text()]
        assert len(labels) > 2 and all(label.get_position()[0] % 1 == 0 for label in labels)
        boxes = [label.get_window_extent() for label in labels]
        assert all(left.x1 < right.x0 for left, right in itertools.pairwise(boxes))


# Command line


def parse(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["assignment.py", *arguments])
    return assignment.parseArguments()


def test_defaults_are_the_handouts(monkeypatch):
    defaults = {"batch_size": 1024, "num_epochs": 10}
    assert parse(monkeypatch) == settings(**defaults)
    assert parse(monkeypatch, "--is_cvae", "--seed", "7") == settings(is_cvae=True, seed=7, **defaults)


OUT_OF_RANGE = [
    *[f"{flag} {value}" for flag in ("--batch_size", "--num_epochs", "--latent_size") for value in ("0", "-1", "1.5")],
    *[f"--learning_rate {value}" for value in ("nan", "inf", "0", "-0.001", "fast")],
    *["--input_size 100", "--seed -1", f"--seed {2**32}"],
]


@pytest.mark.parametrize("setting", OUT_OF_RANGE)
def test_a_setting_out_of_range_is_named_with_what_came(monkeypatch, capsys, setting):
    flag, value = setting.split()
    with pytest.raises(SystemExit, match="2"):
        parse(monkeypatch, flag, value)
    assert re.search(rf"error: argument {flag}: .*{re.escape(value)}", capsys.readouterr().err)


def test_outputs_that_cannot_be_written_are_found_before_training(outputs, monkeypatch):
    outputs.write_text("a file where the folder should be")
    monkeypatch.setattr(assignment, "train_vae", lambda *_: pytest.fail("trained"))
    with pytest.raises(OSError, match="outputs"):
        assignment.main(settings())


def test_the_program_prints_the_mean_loss_of_a_batch_and_keeps_the_last_finite_weights(monkeypatch, capsys, figure):
    returned, trained = [300.0, 270.0], []
    monkeypatch.setattr(assignment, "load_mnist", lambda *_, **__: small_loader())  # three batches

    def train(model, loader, args, is_cvae):
        trained.append(model.get_weights())
        if not returned:
            raise ValueError("the loss is nan")
        return returned.pop(0)

    monkeypatch.setattr(assignment, "train_vae", train)
    with pytest.raises(ValueError, match="nan"):
        assignment.main(settings())
    assert same(assignment.load_weights(VAE(784)).get_weights(), trained[1])
    assert capsys.readouterr().out == "Train Epoch: 1 \tLoss: 100.000000\nTrain Epoch: 2 \tLoss: 90.000000\n"
    returned += [300.0, 270.0, 240.0]
    assignment.main(settings())
    assert list(figure[0].axes[0].lines[0].get_ydata()) == [100, 90, 80]


def test_the_bar_ends_on_the_loss_that_is_printed(monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    for loader in (small_loader(), iter(small_loader())):  # an iterator cannot tell its length
        loss = assignment.train_vae(VAE(784), loader, settings()) / 3
        (shown,) = re.findall(r"loss: ([\d.]+)\s*\n\Z", capsys.readouterr().out)
        assert float(shown) == pytest.approx(loss, abs=1e-3)


def test_the_same_seed_gives_the_same_losses(monkeypatch, capsys):
    monkeypatch.setattr(assignment, "load_mnist", lambda *_, **__: small_loader())
    printed = []
    for seed in (5, 5, 6):
        assignment.main(settings(seed=seed, num_epochs=1))
        printed += re.findall(r"Loss: (\S+)", capsys.readouterr().out)
    assert printed[0] == printed[1] != printed[2]
