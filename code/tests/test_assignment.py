"""assignment.py as its users meet it: the data, the training loop, weights, pictures and bad input."""

import argparse
import pathlib
import re
import sys

import assignment
from matplotlib.image import imread
import numpy as np
import pytest
import tensorflow as tf
import vae
from vae import CVAE, VAE, bce_function, kl_divergence

both = pytest.mark.parametrize("make", [VAE, CVAE])
IMAGES, DIGITS = (array[:48] for array in assignment.read_mnist("test"))
IMAGES = IMAGES[:, np.newaxis] / 255  # float64, as graders have them


@pytest.fixture(autouse=True)
def outputs(tmp_path, monkeypatch):
    """No test writes to the project's own outputs/."""
    monkeypatch.setattr(assignment, "OUTPUTS", tmp_path / "outputs")
    return tmp_path / "outputs"


def settings(**changed):
    """What an autograder passes: the stencil's seven fields and nothing else."""
    flags = {"is_cvae": False, "load_weights": False, "batch_size": 16, "num_epochs": 3}
    return argparse.Namespace(**flags | {"latent_size": 15, "input_size": 784, "learning_rate": 1e-3} | changed)


def small_loader(batch_size=16):
    """The images in a list of batches, as simple as an autograder may have it."""
    return [(IMAGES[i : i + batch_size], DIGITS[i : i + batch_size]) for i in range(0, len(IMAGES), batch_size)]


def train(model, loader, **changed):
    return assignment.train_vae(model, loader, settings(**changed), is_cvae=isinstance(model, CVAE))


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
        x, y = map(np.concatenate, zip(*batches))
        assert (x.shape, x.dtype, x.min(), x.max()) == ((60_000, 1, 28, 28), np.float32, 0, 1)
        found = np.rint(x.reshape(60_000, -1).sum(axis=1, dtype=np.float64) * 255).astype(int) * 10 + y
        np.testing.assert_array_equal(np.sort(found), np.sort(orders[0]))
        assert not any(np.array_equal(found, order) for order in orders)
        orders.append(found)
    assert np.array_equal(next(iter(assignment.load_mnist(100, buffer_size=1)))[1], labels[:100])
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
    monkeypatch.setattr(tf.keras.datasets.mnist, "load_data", lambda: ("training images", "test images"))
    assert [assignment.read_mnist(split) for split in ("train", "test")] == ["training images", "test images"]
    monkeypatch.setattr(tf.keras.datasets.mnist, "load_data", lambda: {}["no network"])
    with pytest.raises(OSError, match=r"mnist\.npz is missing \(.+\).*git checkout"):
        assignment.load_mnist(10)


@pytest.mark.parametrize("dtype", ["uint8", "int32", "int64"])
def test_one_hot(dtype):
    for labels in (np.array([2, 0], dtype), tf.constant([[2], [0]], dtype)):
        vectors = assignment.one_hot(labels, 3)
        assert vectors.dtype == "float32"
        np.testing.assert_array_equal(vectors, [[0, 0, 1], [1, 0, 0]])


# Training


@both
def test_training_lowers_the_loss_and_takes_any_loader(make):
    tf.keras.utils.set_random_seed(1)
    model = make(784)
    dataset = tf.data.Dataset.from_tensor_slices((IMAGES.astype("float32"), DIGITS)).batch(32)
    lists = [(images.tolist(), [[float(digit)] for digit in labels]) for images, labels in small_loader()]
    loaders = [small_loader(), dataset, iter(small_loader(32)), (batch for batch in lists)]
    losses = [train(model, loader) / batches for loader, batches in zip(loaders, (3, 2, 2, 3))]
    assert all(isinstance(loss, float) for loss in losses)
    assert losses == sorted(losses, reverse=True)


@both
def test_a_batch_is_one_step_of_the_users_own_optimizer_down_the_gradient_of_the_elbo(make, monkeypatch):
    monkeypatch.setattr(vae, "reparametrize", lambda mu, logvar: mu)  # so that both gradients are of the same z
    model, x, is_cvae = make(784), tf.cast(IMAGES, tf.float32), make is CVAE
    model.compile(optimizer=tf.keras.optimizers.SGD(2**-7))
    with tf.GradientTape() as tape:
        x_hat, mu, logvar = model(x, assignment.one_hot(DIGITS, 10)) if is_cvae else model(x)
        loss = (bce_function(x_hat, x) + kl_divergence(mu, logvar)) / len(x)
    expected = [w - g / 2**7 for w, g in zip(model.trainable_variables, tape.gradient(loss, model.trainable_variables))]
    assert assignment.train_vae(model, [(IMAGES, DIGITS)], None, is_cvae) == pytest.approx(float(loss), rel=1e-5)
    for moved, wanted in zip(model.trainable_variables, expected):
        np.testing.assert_allclose(moved, wanted, atol=1e-6)
    model.compile(optimizer=tf.keras.optimizers.SGD(0.0))  # another one, between two epochs, takes over
    one, two = (assignment.train_vae(model, [(IMAGES, DIGITS)] * batches, None, is_cvae) for batches in (1, 2))
    assert two == pytest.approx(2 * one, rel=1e-5)  # the sum over the batches


def test_the_rate_rises_to_its_peak_and_falls_to_almost_0_over_and_over():
    rates = assignment.SineRate(peak=8.0, steps=100)(np.arange(300)).numpy().reshape(3, 100)
    assert 0 < rates[0, 0] < 0.2 and 0 < rates[0, -1] < 0.2 and rates.max() == pytest.approx(8, abs=0.01)
    assert np.all(np.diff(rates[0, :50]) > 0) and np.all(np.diff(rates[0, 50:]) < 0)
    np.testing.assert_allclose(rates[1:], rates[[0, 0]], atol=1e-3)


def test_the_peak_grows_with_the_root_of_the_batch_and_ten_epochs_are_the_shortest_period():
    model, constant = VAE(784), VAE(784)
    train(model, [(np.zeros((64, 1, 28, 28)), None)] * 3, num_epochs=1, learning_rate=1e-3)
    train(constant, (batch for batch in small_loader()), learning_rate=1e-3)  # cannot tell its length
    longer = assignment.adam(settings(num_epochs=20, learning_rate=1e-3), batch_size=1024, num_batches=3)
    for optimizer, peak, steps in ((model.optimizer, 2e-3, 30), (longer, 8e-3, 60)):
        assert optimizer.get_config()["learning_rate"]["config"] == {"peak": pytest.approx(peak), "steps": steps}
    assert float(constant.optimizer.learning_rate) == pytest.approx(1e-3)


@pytest.mark.parametrize(("learning_rate", "batch_size"), [(1e9, 16), (np.nan, 48)])
def test_a_loss_or_a_weight_that_is_not_finite_blames_the_learning_rate(learning_rate, batch_size):
    with pytest.raises(FloatingPointError, match="no longer finite: try a smaller learning rate"):
        train(CVAE(784), small_loader(batch_size), learning_rate=learning_rate)


ONE_PIXEL = np.arange(IMAGES.size).reshape(IMAGES.shape) == 3000
BAD_BATCHES = [
    ((IMAGES * 255).astype("uint8"), DIGITS, r"images .*\[0, 1\].* 0 to 255"),
    (np.where(ONE_PIXEL, np.nan, IMAGES), DIGITS, r"images .*\[0, 1\].* nan"),
    (np.where(ONE_PIXEL, -0.01, IMAGES), DIGITS, r"images .*\[0, 1\].* -0\.01 to 1"),
    (IMAGES.reshape(-1, 28, 28, 1), DIGITS, r"images .*\(N, 1, 28, 28\); got \(48, 28, 28, 1\)"),
    (IMAGES[:0], DIGITS[:0], r"images .*got \(0, 1, 28, 28\)"),
    (IMAGES, np.where(DIGITS == 7, 10, DIGITS), r"labels .*0 to 9; got .* 9 10\]"),
    (IMAGES, DIGITS - 0.5, r"labels .*whole numbers .*\.5"),
    (IMAGES, np.eye(10)[DIGITS], r"labels .* 48 .*got .*\(48, 10\)"),
]


def test_a_bad_batch_is_named_and_leaves_the_weights_and_the_model_to_good_ones():
    model = CVAE(784)
    weights = model.get_weights()
    for images, labels, message in BAD_BATCHES:
        with pytest.raises(ValueError, match=message):
            train(model, [(images, labels), (IMAGES, DIGITS)])
    assert same(model.get_weights(), weights)
    assert train(model, [(IMAGES, DIGITS)] * 3) > train(model, [(IMAGES, DIGITS)] * 3)


def test_a_loader_without_a_batch_is_no_perfect_loss():
    with pytest.raises(ValueError, match="loader gave no batch"):
        train(VAE(784), iter(()))


def test_training_needs_no_stdout_but_one_that_can_be_written_to(monkeypatch):
    model = VAE(784)
    for stdout in (None, argparse.Namespace(write=len)):
        monkeypatch.setattr(sys, "stdout", stdout)
        assert np.isfinite(train(model, small_loader()))


def test_the_bar_ends_on_the_loss_that_is_printed(monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    model = VAE(784)
    for loader in (small_loader(), (batch for batch in small_loader())):  # a generator cannot tell its length
        loss = train(model, loader) / 3
        (shown,) = re.findall(r"loss: ([\d.]+)\s*\n\Z", capsys.readouterr().out)
        assert float(shown) == pytest.approx(loss, abs=1e-3)


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


@pytest.mark.parametrize("damage", [*CUT_OR_REPLACED, None])
def test_weights_that_are_damaged_or_of_another_latent_size_are_named_with_both_causes(damage):
    assignment.save_model_weights(VAE(784, latent_size=15 if damage else 3))
    path = assignment.weights_path(VAE(784))
    if damage:
        path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(OSError, match=r"vae\.weights\.h5 .*damaged.*--latent_size.* \(.+\)$"):
        assignment.load_weights(VAE(784))


def test_a_write_that_fails_leaves_the_old_weights_and_nothing_else(outputs, monkeypatch):
    def fill_the_disk(part):
        pathlib.Path(part).write_bytes(b"the first half")
        raise OSError(28, "No space left on device")

    model = VAE(784)
    assignment.save_model_weights(model)
    monkeypatch.setattr(model, "save_weights", fill_the_disk)
    with pytest.raises(OSError, match="No space"):
        assignment.save_model_weights(model)
    assert [path.name for path in (outputs / "model_ckpts").iterdir()] == ["vae.weights.h5"]
    assert same(assignment.load_weights(VAE(784)).get_weights(), model.get_weights())


# Pictures


def brightness(path, rows):
    """Mean grey of each image of a grid, (rows, columns)."""
    picture = imread(path)[:, :, 0]
    side = len(picture) // rows
    return picture.reshape(rows, side, -1, side).mean(axis=(1, 3))


class Shade:
    """Stands in for a model: its images are as bright as z, or as the digit asked for; it keeps the z that it got."""

    def __init__(self, shade, num_classes=10):
        self.shade, self.num_classes = shade, num_classes

    def decoder(self, z):
        self.z = z.numpy()
        return np.repeat(np.reshape(self.shade(z), (-1, 1)), 784, axis=1)


def assert_standard_normal_and_independent(z):
    """Of z (N, 4000): from the whole prior, as a narrower one looks better, and each row another."""
    np.testing.assert_allclose(z @ z.T / 4000, np.eye(len(z)), atol=0.15)


def test_vae_images_are_a_row_of_ten_random_ones(outputs):
    model = Shade(lambda z: tf.sigmoid(z[:, 0]))
    path = assignment.show_vae_images(model, latent_size=4000)
    assert path == outputs / "show_vae_images.png" and brightness(path, 1).shape == (1, 10)
    assert_standard_normal_and_independent(model.z)
    np.testing.assert_allclose(brightness(path, 1)[0], model.shade(model.z), atol=2.5 / 255)


def test_interpolation_walks_in_a_straight_line_along_each_row_from_one_random_z_to_another(outputs):
    model = Shade(lambda z: tf.sigmoid(z[:, 0]))
    path = assignment.show_vae_interpolation(model, latent_size=4000)
    assert path == outputs / "show_vae_interpolation.png"
    z, t = np.reshape(model.z, (12, 12, 4000)), np.linspace(0, 1, 12)
    np.testing.assert_allclose(brightness(path, 12), tf.sigmoid(z[:, :, 0]), atol=2.5 / 255)
    np.testing.assert_allclose(z, z[:, :1] + t[:, np.newaxis] * (z[:, -1:] - z[:, :1]), atol=1e-5)
    assert_standard_normal_and_independent(z[:, [0, -1]].reshape(24, 4000))


@pytest.mark.parametrize("classes", [10, 47, 1])
def test_cvae_images_have_a_row_of_ten_for_each_class_the_first_at_the_top(outputs, classes):
    model = Shade(lambda z: tf.argmax(z[:, 4000:], axis=1) / classes, num_classes=classes)
    path = assignment.show_cvae_images(model, latent_size=4000)
    assert path == outputs / "show_cvae_images.png" and model.z.shape[1] == 4000 + classes
    assert_standard_normal_and_independent(model.z[:100, :4000])
    shades = np.repeat(np.arange(classes)[:, None] / classes, 10, axis=1)
    np.testing.assert_allclose(brightness(path, classes), shades, atol=2.5 / 255)


def test_an_image_is_drawn_pixel_by_pixel_as_it_is():
    images = np.random.default_rng(0).integers(0, 200, (2, 1, 28, 28)) / 255  # no pixel is white
    picture = imread(assignment.save_grid("two", images, rows=1))
    np.testing.assert_allclose(picture[1::3, 1::3, 0], np.hstack(images[:, 0]), atol=1.5 / 255)


def test_loss_curve(outputs, monkeypatch):
    def look(figure, path):
        curve, asked_for = figure.axes[0].lines
        assert (*curve.get_xdata(), *curve.get_ydata(), *set(asked_for.get_ydata())) == (1, 2, 3, 150, 130, 110, 120)
        assert all(tick % 1 == 0 for tick in figure.axes[0].get_xticks())

    monkeypatch.setattr(assignment.Figure, "savefig", look)
    assert assignment.save_loss_curve([150.0, 130.0, 110.0], "cvae") == outputs / "cvae_loss.png"


# Command line


def parse(monkeypatch, setting):
    monkeypatch.setattr(sys, "argv", ["assignment.py", *setting.split()])
    return assignment.parseArguments()


def test_defaults_are_the_handouts(monkeypatch):
    assert parse(monkeypatch, "") == settings(batch_size=1024, num_epochs=10)
    assert parse(monkeypatch, "--is_cvae --seed 7") == settings(batch_size=1024, num_epochs=10, is_cvae=True, seed=7)


OUT_OF_RANGE = ["--batch_size 0", "--num_epochs -1", "--latent_size 1.5", "--learning_rate nan", "--learning_rate 0"]


@pytest.mark.parametrize("setting", [*OUT_OF_RANGE, "--input_size 100", "--seed -1", f"--seed {2**32}"])
def test_a_setting_out_of_range_is_named_with_what_came(monkeypatch, capsys, setting):
    with pytest.raises(SystemExit, match="2"):
        parse(monkeypatch, setting)
    assert re.search("error: argument {}: .*{}".format(*map(re.escape, setting.split())), capsys.readouterr().err)


def test_outputs_that_cannot_be_written_are_found_before_training(outputs, monkeypatch):
    outputs.write_text("a file where the folder should be")
    monkeypatch.setattr(assignment, "train_vae", lambda *_: pytest.fail("trained"))
    with pytest.raises(OSError, match="outputs"):
        assignment.main(settings())


def test_the_program_prints_the_mean_loss_of_a_batch_and_keeps_the_last_finite_weights(monkeypatch, capsys):
    trained, returned = [], [300.0, 270.0]

    def train(model, *_, **__):
        trained.append(model.get_weights())
        if len(trained) > len(returned):
            raise FloatingPointError("the loss is nan")
        return returned[len(trained) - 1]

    monkeypatch.setattr(assignment, "load_mnist", lambda *_, **__: small_loader())  # three batches
    monkeypatch.setattr(assignment, "train_vae", train)
    with pytest.raises(FloatingPointError, match="nan"):
        assignment.main(settings())
    assert same(assignment.load_weights(VAE(784)).get_weights(), trained[1])
    assert capsys.readouterr().out == "Train Epoch: 1 \tLoss: 100.000000\nTrain Epoch: 2 \tLoss: 90.000000\n"


def test_the_same_seed_gives_the_same_weights_and_the_same_batches(monkeypatch):
    started = []

    def train(model, loader, *_, **__):
        started.append([*model.get_weights(), next(iter(loader))[1]])
        return 1.0

    monkeypatch.setattr(assignment, "train_vae", train)
    for seed in (5, 5, 6):
        assignment.main(settings(seed=seed, num_epochs=1))
    assert same(started[0], started[1])
    assert not np.array_equal(started[0][0], started[2][0]) and not np.array_equal(started[0][-1], started[2][-1])
