"""assignment.py as its users meet it: imported, and started from a shell."""

import argparse
from concurrent.futures import ThreadPoolExecutor
import os
import re
import runpy
import shutil
import subprocess
import sys
from unittest.mock import Mock

import assignment
import evaluate
from matplotlib.image import imread
import numpy as np
import others_vae
import pytest
import tensorflow as tf
import vae
from vae import CVAE, VAE, bce_function, kl_divergence

both = pytest.mark.parametrize("make", [VAE, CVAE])
IMAGES, DIGITS = (array[:48] for array in assignment.read_mnist()[1])
IMAGES = IMAGES[:, np.newaxis] / 255  # float64, as graders have them


def settings(**changed):
    """What an autograder passes: the stencil's seven fields and nothing else."""
    flags = {"is_cvae": False, "load_weights": False, "batch_size": 16, "num_epochs": 3}
    return argparse.Namespace(**flags | {"latent_size": 15, "input_size": 784, "learning_rate": 1e-3} | changed)


def small_loader(batch_size=16):
    """The images in a list of batches, as simple as an autograder may have it."""
    return [(IMAGES[i : i + batch_size], DIGITS[i : i + batch_size]) for i in range(0, len(IMAGES), batch_size)]


def train(model, loader, **changed):
    return assignment.train_vae(model, loader, settings(**changed), is_cvae=assignment.is_conditional(model))


def same(these, those):
    return len(these) == len(those) and all(map(np.array_equal, these, those))


# Data


@pytest.fixture
def grey_mnist(monkeypatch):
    """250 training images, each in the grey of its label."""
    labels = np.arange(250, dtype=np.uint8)
    images = np.broadcast_to(labels[:, np.newaxis, np.newaxis], (250, 28, 28))
    monkeypatch.setattr(assignment, "read_mnist", lambda: ((images, labels), None))


def labels_of(loader):
    return np.concatenate([labels for _, labels in loader])


def test_the_loader_gives_full_batches_and_leaves_the_rest_out(grey_mnist):
    assert [images.shape for images, _ in assignment.load_mnist(64)] == [(64, 1, 28, 28)] * 3


def test_each_image_comes_once_with_its_label_and_in_0_to_1(grey_mnist):
    loader = assignment.load_mnist(64)
    assert len({*labels_of(loader)}) == 64 * len(loader)
    for images, labels in loader:
        np.testing.assert_allclose(images[:, 0, 5, 5], labels.numpy() / 255, rtol=1e-6)


def test_each_epoch_is_shuffled_anew_and_leaves_other_images_out(grey_mnist):
    loader = assignment.load_mnist(64, buffer_size=250)
    assert {*labels_of(loader)} != {*labels_of(loader)}


def test_a_buffer_of_one_image_shuffles_nothing(grey_mnist):
    assert same(labels_of(assignment.load_mnist(64, buffer_size=1)), range(192))


@pytest.mark.parametrize("sizes", [(0, 1024), (251, 1024), (128, 0)])
def test_sizes_that_no_loader_can_have_are_refused(grey_mnist, sizes):
    with pytest.raises(ValueError, match="batch_size .*1 to 250, buffer_size .*got {}, {}".format(*sizes)):
        assignment.load_mnist(*sizes)


CUT_OR_REPLACED = [lambda b: b"", lambda b: b[: len(b) // 2], lambda b: b[:-9], lambda b: b"<html>404</html>"]


@pytest.mark.parametrize("damage", [*CUT_OR_REPLACED, lambda b: b[:99] + bytes([b[99] ^ 1]) + b[100:]])
def test_a_damaged_data_file_is_named(damage, tmp_path, monkeypatch):
    whole = assignment.MNIST.read_bytes()
    monkeypatch.setattr(assignment, "MNIST", tmp_path / "mnist.npz")
    assignment.MNIST.write_bytes(damage(whole))
    with pytest.raises(OSError, match=r"mnist\.npz is damaged.*git checkout -- data/mnist\.npz"):
        assignment.load_mnist(128)


def test_a_data_file_that_may_not_be_read_is_not_called_damaged(monkeypatch):
    monkeypatch.setattr(np, "load", Mock(side_effect=PermissionError("denied")))
    with pytest.raises(PermissionError, match="denied"):
        assignment.read_mnist()


def test_a_missing_data_file_is_downloaded_by_keras(monkeypatch, tmp_path):
    monkeypatch.setattr(assignment, "MNIST", tmp_path / "mnist.npz")
    monkeypatch.setattr(tf.keras.datasets.mnist, "load_data", Mock(side_effect=["Keras's", Exception("no network")]))
    assert assignment.read_mnist() == "Keras's"
    with pytest.raises(OSError, match=r"mnist\.npz is missing \(no network\).*git checkout"):
        assignment.read_mnist()


def test_one_hot_vectors_of_labels_in_a_row_or_a_column_of_any_integers():
    labels = np.array([2, 0, 1], np.uint8)
    for given in (labels, labels[:, np.newaxis], labels.astype(int), tf.constant(labels), tf.constant([[2], [0], [1]])):
        vectors = assignment.one_hot(given, 3)
        assert vectors.dtype == tf.float32
        np.testing.assert_array_equal(vectors, [[0, 0, 1], [1, 0, 0], [0, 1, 0]])


@pytest.mark.parametrize("labels", [np.eye(10)[DIGITS], DIGITS[np.newaxis], DIGITS[:, np.newaxis, np.newaxis]])
def test_labels_that_are_one_hot_already_are_refused(labels):
    with pytest.raises(ValueError, match=rf"\(N, 1\), not one-hot; got {re.escape(str(labels.shape))}"):
        assignment.one_hot(labels, 10)


# Training


@both
def test_training_lowers_the_loss_with_any_loader(make):
    tf.keras.utils.set_random_seed(1)
    model = make(784)
    dataset = tf.data.Dataset.from_tensor_slices((IMAGES.astype("float32"), DIGITS)).batch(16)
    lists = [(images.tolist(), [[float(digit)] for digit in labels]) for images, labels in small_loader()]
    losses = [train(model, loader) for loader in (small_loader(), dataset, iter(small_loader()), iter(lists))]
    assert losses == sorted(losses, reverse=True)


def test_a_model_without_an_optimizer_gets_adam_at_the_rate_of_args():
    model = VAE(784)
    train(model, small_loader(), learning_rate=0.002)
    assert isinstance(model.optimizer, tf.keras.optimizers.Adam)
    assert model.optimizer.learning_rate.numpy() == np.float32(0.002)


@both
def test_a_batch_is_one_step_of_the_models_own_optimizer_down_the_gradient_of_the_elbo(make, monkeypatch):
    monkeypatch.setattr(vae, "reparametrize", lambda mu, logvar: mu)  # so that both gradients are of the same z
    model = make(784)
    model.compile(optimizer=tf.keras.optimizers.SGD(2**-7))
    x = tf.cast(IMAGES, tf.float32)
    with tf.GradientTape() as tape:
        x_hat, mu, logvar = model(x, np.eye(10)[DIGITS]) if make is CVAE else model(x)
        loss = (bce_function(x_hat, x) + kl_divergence(mu, logvar)) / len(x)
    before, gradients = model.get_weights(), tape.gradient(loss, model.trainable_variables)
    assert assignment.train_vae(model, [(IMAGES, DIGITS)], None, make is CVAE) == pytest.approx(float(loss), rel=1e-5)
    for start, gradient, end in zip(before, gradients, model.get_weights()):
        np.testing.assert_allclose(end, start - gradient / 2**7, atol=1e-6)


@pytest.mark.parametrize(("run_eagerly", "loss"), [(False, 1 + 100 + 100), (True, 3)])
def test_the_first_batch_runs_as_written_the_others_compiled_and_losses_are_summed(run_eagerly, loss, monkeypatch):
    train_step = Mock(return_value=100.0, python_function=Mock(return_value=1.0))
    monkeypatch.setattr(assignment, "train_step", train_step)
    model = VAE(784)
    model.compile(optimizer=tf.keras.optimizers.Adam(), run_eagerly=run_eagerly)
    assert train(model, small_loader()) == loss


def test_a_model_that_is_compiled_anew_trains_by_its_new_optimizer():
    model = VAE(784)
    train(model, small_loader())
    weights = model.get_weights()
    model.compile(optimizer=tf.keras.optimizers.SGD(0.0))
    train(model, small_loader())
    assert same(model.get_weights(), weights)


def slip(*arguments):
    return tf.sqare(0)


def slip_when_compiled(*arguments):
    return others_vae.loss_function(*arguments) if tf.executing_eagerly() else slip()


@pytest.mark.parametrize("loss_function", [slip, slip_when_compiled])
def test_a_model_of_others_trains_on_once_a_slip_is_mended(loss_function, monkeypatch):
    model = others_vae.VAE(784)
    monkeypatch.setattr(assignment, "loss_function", loss_function)
    with pytest.raises(AttributeError, match="sqare"):
        train(model, small_loader())
    monkeypatch.setattr(assignment, "loss_function", others_vae.loss_function)
    assert train(model, small_loader()) > train(model, small_loader())
    assert np.any(model.encoder.layers[-1].moving_mean.numpy())  # a BatchNormalization's, which moves in training


def test_a_cvae_of_other_classes_than_ten_trains():
    assert train(CVAE(784, num_classes=48), [(IMAGES, np.arange(48))]) > 0


@pytest.mark.parametrize(("learning_rate", "batch_size"), [(1e9, 16), (np.nan, 48)])
def test_a_loss_or_a_weight_that_is_not_finite_blames_the_learning_rate(learning_rate, batch_size):
    with pytest.raises(FloatingPointError, match="no longer finite: try a smaller learning rate"):
        train(CVAE(784), small_loader(batch_size), learning_rate=learning_rate)


BAD_BATCHES = [
    ((IMAGES * 255).astype("uint8"), DIGITS, r"images .*\[0, 1\].* 0 to 255"),
    (np.where(IMAGES.max() == IMAGES, np.nan, IMAGES), DIGITS, r"images .*\[0, 1\].* nan"),
    (IMAGES - 0.00002, DIGITS, r"images .*\[0, 1\].* -2e-05 to 0\.99998$"),
    (IMAGES + 0.00002, DIGITS, r"images .*\[0, 1\].* 2e-05 to 1\.00002$"),
    (IMAGES.reshape(-1, 28, 28, 1), DIGITS, r"images .*\(N, 1, 28, 28\); got \(48, 28, 28, 1\)"),
    (IMAGES[:0], DIGITS[:0], r"images .*got \(0, 1, 28, 28\)"),
    (IMAGES, np.where(DIGITS == 7, 10, DIGITS), r"labels .*0 to 9.*got .* 9 10\]"),
    (IMAGES, DIGITS - 0.5, r"labels .*integers.*\.5"),
    (IMAGES, np.eye(10)[DIGITS], r"labels .* 48 .*not one-hot; got .*\(48, 10\)"),
]


def test_a_bad_batch_is_named_and_teaches_nothing():
    model = CVAE(784)
    weights = model.get_weights()
    for images, labels, message in BAD_BATCHES:
        with pytest.raises(ValueError, match=message):
            train(model, [(images, labels), (IMAGES, DIGITS)])
    assert same(model.get_weights(), weights)


def test_no_batch_is_an_error_and_not_a_perfect_loss():
    with pytest.raises(ValueError, match="loader gave no batch"):
        train(VAE(784), iter(()))


def test_a_progress_bar_is_drawn_on_a_terminal_alone(monkeypatch):
    logger, file, terminal = Mock(spec=["write"]), Mock(isatty=lambda: False), Mock(isatty=lambda: True)
    for stdout in (None, logger, file, terminal):
        monkeypatch.setattr(sys, "stdout", stdout)
        assert list(assignment.with_bar(["a", "b"])) == ["a", "b"]
    assert [stdout.write.called for stdout in (logger, file, terminal)] == [False, False, True]


# Weights


@both
def test_weights_survive_a_round_trip_on_a_file_system_of_their_own(make, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", "/another/file/system")
    model, loaded = make(784), make(784)
    assignment.save_model_weights(model, settings())
    assert assignment.load_weights(loaded) is loaded
    assert same(loaded.get_weights(), model.get_weights())


def test_missing_weights_are_named_with_the_command_that_makes_them():
    missing = r"h5 is missing: train .*assignment\.py --is_cvae --latent_size 3` in "
    with pytest.raises(FileNotFoundError, match=missing):
        assignment.load_weights(CVAE(784, latent_size=3))


@pytest.mark.parametrize("damage", CUT_OR_REPLACED)
def test_damaged_weights_are_called_so(damage):
    assignment.save_model_weights(VAE(784))
    path = assignment.weights_path(VAE(784))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(OSError, match=r"h5 is damaged: train again with .*assignment\.py"):
        assignment.load_weights(VAE(784))


def test_weights_of_another_model_are_not_called_damaged():
    assignment.save_model_weights(VAE(784, latent_size=3))
    this = "another model .*latent size 15 and hidden width 400; --latent_size, vae.py .*differ"
    with pytest.raises(OSError, match=rf"{this}.*: train again with .*assignment\.py.* \(.{{1,200}}\)$"):
        assignment.load_weights(VAE(784))


def test_a_write_that_fails_leaves_the_old_weights_and_nothing_else(outputs, monkeypatch):
    assignment.save_model_weights(VAE(784))
    (old,) = (outputs / "model_ckpts").iterdir()
    whole = old.read_bytes()
    monkeypatch.setattr(os, "replace", Mock(side_effect=OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        assignment.save_model_weights(VAE(784))
    assert {path: path.read_bytes() for path in old.parent.iterdir()} == {old: whole}


# Pictures


class Canvas:
    """A model whose decoder draws the first 784 numbers of z, and keeps all of them."""

    def __init__(self, num_classes):
        self.num_classes = num_classes

    def decoder(self, z):
        self.z = np.asarray(z)
        return tf.sigmoid(z[:, :784]) * 0.8  # no pixel is white


def drawn(show, rows, num_classes=10):
    """The z (rows, columns, 4000 + C) that `show` decodes; its picture holds their images in that order."""
    model = Canvas(num_classes)
    picture = imread(show(model, 4000))[1::3, 1::3, 0]
    tiles = [tile for row in np.split(picture, rows) for tile in np.split(row, picture.shape[1] // 28, axis=1)]
    np.testing.assert_allclose(np.reshape(tiles, (-1, 784)), model.decoder(model.z), atol=2.5 / 255)
    return model.z.reshape(rows, -1, model.z.shape[1])


def assert_standard_normal_and_independent(z):
    """Of z (N, 4000): from the whole prior, as a narrower one looks better, and each row another."""
    np.testing.assert_allclose(z @ z.T / 4000, np.eye(len(z)), atol=0.15)


def test_vae_images_are_a_row_of_ten_random_ones():
    z = drawn(assignment.show_vae_images, rows=1)
    assert_standard_normal_and_independent(z.reshape(10, 4000))


def test_interpolation_walks_in_a_straight_line_along_each_row_from_one_random_z_to_another():
    z = drawn(assignment.show_vae_interpolation, rows=12)
    start, end = z[:, :1], z[:, -1:]
    np.testing.assert_allclose(z, start + np.linspace(0, 1, 12)[:, np.newaxis] * (end - start), atol=1e-5)
    assert_standard_normal_and_independent(np.concatenate([start, end]).reshape(24, 4000))


@pytest.mark.parametrize("classes", [10, 47, 1])
def test_cvae_images_are_a_row_of_ten_random_ones_for_each_class_the_first_at_the_top(classes):
    z = drawn(assignment.show_cvae_images, classes, classes)
    np.testing.assert_array_equal(z[:, :, 4000:], np.eye(classes)[:, np.newaxis].repeat(10, axis=1))
    assert_standard_normal_and_independent(z[:10, :, :4000].reshape(-1, 4000))


def test_the_loss_curve_counts_epochs_from_one_with_room_for_all_but_a_high_first_and_names_its_lines(figures):
    assignment.save_loss_curve([290.0, 150.0, 101.5], "cvae")
    (axes,) = figures[0].axes
    curve, line = axes.lines
    np.testing.assert_array_equal(curve.get_xydata(), [(1, 290), (2, 150), (3, 101.5)])
    assert set(line.get_ydata()) == {120}
    assert 150 < axes.get_ylim()[1] < 200
    assert re.search("101.5.*less than 120", " ".join(text.get_text() for text in axes.get_legend().texts))


# Command line


def test_defaults_are_the_handouts(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["assignment.py", "--is_cvae", "--seed", "7"])
    assert assignment.parseArguments() == settings(batch_size=1024, num_epochs=10, is_cvae=True, seed=7)


OUT_OF_RANGE = ["--batch_size 0", "--batch_size 60001", "--num_epochs -1", "--latent_size 1.5", "--learning_rate nan"]


@pytest.mark.parametrize("setting", [*OUT_OF_RANGE, "--learning_rate 0", "--input_size 100", "--seed -1"])
def test_a_setting_out_of_range_is_named_with_what_came(ending, capsys, setting):
    assert ending(assignment.parseArguments, setting) == 2
    assert re.search("error: argument {}: .*{}".format(*map(re.escape, setting.split())), capsys.readouterr().err)


@pytest.fixture
def train_vae(grey_mnist, monkeypatch):
    """Stands for `train_vae` in the program, on three batches of 64; its calls are counted and kept."""
    monkeypatch.setattr(assignment, "train_vae", Mock(return_value=300.0))
    return assignment.train_vae


def test_the_program_prints_the_mean_loss_and_saves_the_weights_of_each_finite_epoch(train_vae, monkeypatch, capsys):
    train_vae.side_effect = [300.0, 150.0, FloatingPointError("nan")]
    monkeypatch.setattr(assignment, "save_model_weights", Mock())
    with pytest.raises(FloatingPointError, match="nan"):
        assignment.main(settings(num_epochs=4, batch_size=64))
    assert capsys.readouterr().out == "Train Epoch: 1 \tLoss: 100.000000\nTrain Epoch: 2 \tLoss: 50.000000\n"
    assert assignment.save_model_weights.call_count == 2


def test_the_program_trains_saves_and_draws_with_the_latent_size_asked_for(train_vae):
    assignment.main(settings(latent_size=3))
    assert train_vae.call_args[0][0].latent_size == 3


@pytest.mark.parametrize(("batch_size", "peak", "batches"), [(16, 1e-3, 15), (64, 2e-3, 3)])
def test_the_peak_rate_of_the_program_grows_with_the_root_of_the_batch_size(train_vae, batch_size, peak, batches):
    assignment.main(settings(batch_size=batch_size, num_epochs=4))
    rate = train_vae.call_args[0][0].optimizer.get_config()["learning_rate"]
    assert rate["config"] == {"peak": pytest.approx(peak), "steps": 4 * batches}


def test_the_rate_of_the_program_is_half_a_sine_wave_over_its_training():
    rates = assignment.SineRate(peak=8.0, steps=100)(np.arange(200)).numpy()
    np.testing.assert_allclose(rates, 8 * np.sin(np.pi * (np.arange(200).clip(max=99) + 0.5) / 100), atol=1e-5)


def test_the_program_keeps_a_models_own_optimizer(train_vae, monkeypatch):
    model = VAE(784)
    model.optimizer = own = tf.keras.optimizers.SGD(0.25)
    monkeypatch.setattr(assignment, "VAE", lambda *_, **__: model)
    assignment.main(settings())
    assert model.optimizer is own


def test_a_seed_of_any_number_repeats_losses_and_pictures(grey_mnist, outputs, capsys):
    results = []
    for seed in (0, 0, 1):
        assignment.main(settings(seed=seed, num_epochs=2))
        results.append([capsys.readouterr().out, *(path.read_bytes() for path in sorted(outputs.glob("show*.png")))])
    assert results[0] == results[1] != results[2]


@pytest.fixture
def project(tmp_path):
    """The two files and 2,000 training images, at a path with spaces and letters outside cp1252."""
    copy, others = tmp_path / "häuser und Ähren 数字", shutil.ignore_patterns("tests", "__pycache__", "evaluate.py")
    shutil.copytree(assignment.CODE, copy / "code", ignore=others)
    (copy / "data").mkdir()
    with np.load(assignment.MNIST) as arrays:
        np.savez(copy / "data/mnist.npz", **{name: array[:2000] for name, array in arrays.items()})
    return copy


NOTEBOOK = "module://matplotlib_inline.backend_inline"
# As Windows redirects stdout; no home; in a notebook's shell.
ENVIRONMENT = {"PYTHONIOENCODING": "cp1252", "HOME": "/proc/none", "MPLBACKEND": NOTEBOOK}


def train_and_draw_again(folder, is_cvae):
    """Two epochs, then `--load_weights`, as processes of their own: the lines and files are those of the stencil."""
    name = "cvae" if is_cvae else "vae"
    pictures = [f"  outputs/show_{picture}.png" for picture in (f"{name}_images", "vae_interpolation")[: 2 - is_cvae]]
    command = [sys.executable, folder / "assignment.py", *["--is_cvae"] * is_cvae]
    options = {"cwd": folder.anchor, "env": os.environ | ENVIRONMENT, "text": True}
    first, second, *wrote = subprocess.check_output([*command, "--num_epochs", "2"], **options).splitlines()
    assert re.fullmatch(r"Train Epoch: 1 \tLoss: \d+\.\d{6}\nTrain Epoch: 2 \tLoss: \d+\.\d{6}", f"{first}\n{second}")
    assert wrote == ["Wrote:", f"  outputs/{name}_loss.png", f"  outputs/model_ckpts/{name}.weights.h5", *pictures]
    assert subprocess.check_output([*command, "--load_weights"], **options).splitlines() == ["Wrote:", *pictures]


def test_the_two_files_train_and_draw_in_code_or_flat_and_with_another_vae(project):
    flat = shutil.copytree(project / "code", project / "graded")  # there are data/ and outputs/ beside it too
    shutil.copytree(project / "data", flat / "data")
    numpys = "\ntf.experimental.numpy.experimental_enable_numpy_behavior()\n"  # as TensorFlow's own errors advise
    (flat / "vae.py").write_text((assignment.CODE / "tests/others_vae.py").read_text() + numpys)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(train_and_draw_again, (project / "code", flat, flat), (True, True, False)))
    assert [len([*(folder / "outputs").glob("*.png")]) for folder in (project, flat)] == [2, 5]


def program(project):
    return lambda: runpy.run_path(str(project / "code/assignment.py"), run_name="__main__")


def test_what_a_user_can_mend_is_one_line_and_writes_nothing(project, ending):
    assert re.fullmatch(r"error: .*vae\.weights\.h5 is missing.*", ending(program(project), "--load_weights"))
    assert re.fullmatch("error: .*no longer finite.*", ending(program(project), "--batch_size 99 --learning_rate 1e9"))
    (project / "data/mnist.npz").write_text("<html>404 Not Found</html>")
    assert re.fullmatch(r"error: .*mnist\.npz is damaged.*", ending(program(project)))
    assert not [path for path in (project / "outputs").rglob("*") if path.is_file()]


def test_an_interrupt_says_what_is_saved(project, ending, monkeypatch, capsys):
    monkeypatch.setattr(tf.keras.utils, "Progbar", Mock(side_effect=KeyboardInterrupt))
    assert ending(program(project)) == 130
    assert re.fullmatch("\ninterrupted: .*saved .*last epoch printed.*\n", capsys.readouterr().err)


def test_a_slip_in_the_code_keeps_its_traceback(project, ending, monkeypatch):
    monkeypatch.setattr(vae, "loss_function", slip)
    with pytest.raises(AttributeError, match="sqare"):
        ending(program(project))


# What is learned


def test_a_short_training_on_real_images_listens_to_the_digit_asked_for(ending, monkeypatch, capsys):
    """200 steps; without the label's rows, or with default initializers, it does not."""
    load = assignment.load_mnist
    # 200 batches of 128 of a loader that shuffles all 60,000 images, fewer if it shuffles less.
    monkeypatch.setattr(assignment, "load_mnist", lambda n, buffer_size: load(n, buffer_size).take(buffer_size // 300))
    assignment.main(settings(is_cvae=True, batch_size=128, num_epochs=1, seed=0))
    ending(evaluate.main)
    printed = capsys.readouterr().out
    for measured, least, most in (("CVAE: loss", 100, 170), ("worst digit", 90, 100), ("test images:", 99.2, 100)):
        assert least < float(re.search(rf"{measured} ([\d.]+)", printed)[1]) < most


@pytest.mark.slow
@pytest.mark.parametrize(("batch_size", "new_adam"), [(1024, False), (128, False), (1024, True)])
def test_ten_epochs_of_train_vae_alone_are_what_the_handout_asks_for_and_more(batch_size, new_adam):
    """At its constant rate; also with a new Adam each epoch, by which a VAE ends at 116 to 121, as the seed has it."""
    for make in (VAE, CVAE):
        tf.keras.utils.set_random_seed(0)
        loader, model = assignment.load_mnist(batch_size, buffer_size=60_000), make(784)
        for _ in range(10):
            if new_adam:
                model.compile(optimizer=tf.keras.optimizers.Adam(1e-3))
            loss = train(model, loader) / len(loader)
        print(f"\n{type(model).__name__}, batches of {batch_size}, new Adam {new_adam}: training loss {loss:.1f}")
        assert loss < 120
    assert evaluate.grade_samples(model, evaluate.load_classifier(), *assignment.read_mnist()[1]) > 0.93
