"""Tests of assignment.py, imported as a module and run as a program."""

import argparse
import contextlib
import gc
import os
import re
import runpy
import shutil
import subprocess
import sys
from unittest.mock import Mock, call
import weakref

import assignment
import evaluate
from matplotlib.image import imread
import numpy as np
import pytest
import tensorflow as tf
import third_party_vae
import vae
from vae import CVAE, VAE, bce_function, kl_divergence

IMAGES, DIGITS = (array[:48] for array in assignment.read_mnist()[1])
IMAGES = IMAGES[:, np.newaxis] / 255  # float64, as in most graders
BATCHES = [(IMAGES[i : i + 16], DIGITS[i : i + 16]) for i in (0, 16, 32)]


def settings(**changed):
    """Return what an autograder passes: the stencil's seven fields and nothing else."""
    flags = {"is_cvae": False, "load_weights": False, "batch_size": 16, "num_epochs": 3}
    return argparse.Namespace(**flags | {"latent_size": 15, "input_size": 784, "learning_rate": 1e-3} | changed)


def train(model, loader, **changed):
    return assignment.train_vae(model, loader, settings(**changed), is_cvae=assignment.is_conditional(model))


def same(these, those):
    return len(these) == len(those) and all(map(np.array_equal, these, those))


# Data


@pytest.fixture
def gray_mnist(monkeypatch):
    """Use 250 training and 40 test images. All pixels of an image equal its label."""
    labels = np.arange(250, dtype=np.uint8)
    images = np.broadcast_to(labels[:, np.newaxis, np.newaxis], (250, 28, 28))
    monkeypatch.setattr(assignment, "read_mnist", lambda: ((images, labels), (images[:40], labels[:40])))


def labels_of(loader):
    return np.concatenate([labels for _, labels in loader])


def test_loader_drops_the_last_partial_batch(gray_mnist):
    assert [images.shape for images, _ in assignment.load_mnist(64)] == [(64, 1, 28, 28)] * 3


def test_loader_repeats_no_image_and_keeps_its_label(gray_mnist):
    loader = assignment.load_mnist(64)
    assert len({*labels_of(loader)}) == 64 * len(loader)
    for images, labels in loader:
        np.testing.assert_allclose(images[:, 0, 5, 5], labels.numpy() / 255, rtol=1e-6)


def test_loader_drops_different_images_each_epoch(gray_mnist):
    loader = assignment.load_mnist(64, buffer_size=250)
    assert {*labels_of(loader)} != {*labels_of(loader)}


@pytest.mark.parametrize("sizes", [(0, 1024), (251, 1024), (128, 0)])
def test_load_mnist_rejects_invalid_sizes(gray_mnist, sizes):
    with pytest.raises(ValueError, match="batch_size .*1 to 250, buffer_size .*got {}, {}".format(*sizes)):
        assignment.load_mnist(*sizes)


CUT_OR_REPLACED = [lambda b: b"", lambda b: b[: len(b) // 2], lambda b: b[:-9], lambda b: b"<html>404</html>"]


@pytest.mark.parametrize("damage", [*CUT_OR_REPLACED, lambda b: b[:99] + bytes([b[99] ^ 1]) + b[100:]])
def test_damaged_data_file_raises(damage, tmp_path, monkeypatch):
    whole = assignment.MNIST.read_bytes()
    monkeypatch.setattr(assignment, "MNIST", tmp_path / "mnist.npz")
    assignment.MNIST.write_bytes(damage(whole))
    with pytest.raises(OSError, match=r"mnist\.npz is damaged.*git checkout -- data/mnist\.npz"):
        assignment.load_mnist(128)


@pytest.mark.parametrize("brightest", [(1, 255), (255, 1)])
def test_pixels_from_0_to_1_raise(brightest, tmp_path, monkeypatch):
    monkeypatch.setattr(assignment, "MNIST", tmp_path / "mnist.npz")
    np.savez(assignment.MNIST, x_train=brightest[:1], x_test=brightest[1:], y_train=[0], y_test=[0])
    with pytest.raises(OSError, match=r"mnist\.npz .*0 to 255, not .*0 to 1"):
        assignment.read_mnist()


def test_missing_data_file_is_downloaded_by_keras(monkeypatch, tmp_path):
    monkeypatch.setattr(assignment, "MNIST", tmp_path / "mnist.npz")
    monkeypatch.setattr(tf.keras.datasets.mnist, "load_data", Mock(side_effect=["Keras's", Exception("no network")]))
    assert assignment.read_mnist() == "Keras's"
    with pytest.raises(OSError, match=r"mnist\.npz is missing \(no network\).*git checkout"):
        assignment.read_mnist()


def test_one_hot_accepts_vectors_and_columns_of_integers():
    labels = np.array([2, 0, 1], np.uint8)
    for given in (labels, labels[:, np.newaxis], labels.astype(int), tf.constant(labels), tf.constant([[2], [0], [1]])):
        vectors = assignment.one_hot(given, 3)
        assert vectors.dtype == tf.float32
        np.testing.assert_array_equal(vectors, [[0, 0, 1], [1, 0, 0], [0, 1, 0]])
    with pytest.raises(ValueError, match=r"\(N, 1\), not one-hot; got \(3, 3\)"):
        assignment.one_hot(vectors, 3)


# Training


def test_train_vae_lowers_the_loss_with_any_loader(make):
    tf.keras.utils.set_random_seed(1)
    model = make(784)
    dataset = tf.data.Dataset.from_tensor_slices((IMAGES.astype("float32"), DIGITS)).batch(16)
    lists = [(images.tolist(), [[float(digit)] for digit in labels]) for images, labels in BATCHES]
    losses = [train(model, loader) for loader in (BATCHES, dataset, iter(BATCHES), iter(lists))]
    assert losses == sorted(losses, reverse=True)


def test_model_without_an_optimizer_gets_adam_at_the_given_rate():
    model = VAE(784)
    train(model, [(IMAGES, None)], learning_rate=0.002)  # a VAE ignores labels
    assert isinstance(model.optimizer, tf.keras.optimizers.Adam)
    assert model.optimizer.learning_rate.numpy() == np.float32(0.002)


def test_train_vae_takes_a_gradient_step_on_the_negative_elbo(make, monkeypatch):
    monkeypatch.setattr(vae, "reparametrize", lambda mu, logvar: mu)  # so that both gradients use the same z
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


@pytest.mark.parametrize("run_eagerly", [False, True])
def test_batches_are_read_one_by_one_and_the_first_runs_eagerly(run_eagerly):
    """If `run_eagerly`, all run eagerly. The optimizer starts at step 100, like a restored one."""
    model, steps, eager = VAE(784), [], []
    model.compile(optimizer=tf.keras.optimizers.SGD(0.0), run_eagerly=run_eagerly)
    model.optimizer.iterations.assign(100)
    model.call = lambda x: eager.append(tf.executing_eagerly()) or VAE.call(model, x)
    loss = train(model, (steps.append(model.optimizer.iterations.numpy()) or batch for batch in BATCHES))
    assert steps == [100, 101, 102]
    assert eager == ([True, True, True] if run_eagerly else [True, False])  # the third reuses the trace
    assert loss == pytest.approx(sum(train(model, [batch]) for batch in BATCHES), rel=0.01)


def test_recompiled_model_keeps_frozen_layers_and_is_freed():
    """The new optimizer takes the steps, and no trace keeps the model alive."""
    model = VAE(784)
    train(model, BATCHES)
    weights = model.encoder.get_weights()
    model.encoder.trainable = False
    model.compile(optimizer=tf.keras.optimizers.SGD(1e-3))
    train(model, BATCHES)
    assert model.optimizer.iterations.numpy() == 3
    assert same(model.encoder.get_weights(), weights)
    reference = weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None


def test_extended_subclass_trains(make):
    """It has its own constructor, metric and `call`."""

    class Extended(make):
        def __init__(self):
            super().__init__(784)
            self.mean_kl = tf.keras.metrics.Mean()

        def call(self, x, *c):
            outputs = super().call(x, *c)
            self.mean_kl.update_state(kl_divergence(*outputs[1:]))
            return outputs

    model = Extended()
    assert train(model, BATCHES) > train(model, BATCHES)


def bug(*arguments):
    return tf.sqare(0)


def bug_when_compiled(*arguments):
    return third_party_vae.loss_function(*arguments) if tf.executing_eagerly() else bug()


@pytest.mark.parametrize("loss_function", [bug, bug_when_compiled])
def test_third_party_model_trains_after_a_bug_is_fixed(loss_function, monkeypatch):
    model = third_party_vae.VAE(784)
    monkeypatch.setattr(assignment, "loss_function", loss_function)
    with pytest.raises(AttributeError, match="sqare"):
        train(model, BATCHES)
    monkeypatch.setattr(assignment, "loss_function", third_party_vae.loss_function)
    assert train(model, BATCHES) > train(model, BATCHES)
    assert np.any(model.encoder.layers[-1].moving_mean.numpy())  # BatchNormalization updates it only in training


def test_cvae_with_48_classes_trains():
    model, loader = CVAE(784, num_classes=48), [(IMAGES, np.arange(48))]
    assert train(model, loader) > train(model, loader)


def test_cvae_is_recognized_by_num_classes_or_name():
    makes = [CVAE, type("ConditionalVAE", (CVAE,), {}), third_party_vae.CVAE, VAE, third_party_vae.VAE]
    assert [assignment.is_conditional(make(784)) for make in makes] == [True, True, True, False, False]


@pytest.mark.parametrize(("learning_rate", "loader"), [(1e9, BATCHES), (np.nan, [(IMAGES, DIGITS)])])
def test_non_finite_loss_or_weight_raises(learning_rate, loader):
    with pytest.raises(FloatingPointError, match="no longer finite: try a smaller learning rate"):
        train(CVAE(784), loader, learning_rate=learning_rate)


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


def test_bad_or_missing_batch_raises_and_leaves_weights_unchanged():
    model = CVAE(784)
    weights = model.get_weights()
    for images, labels, message in BAD_BATCHES:
        with pytest.raises(ValueError, match=message):
            train(model, [(images, labels), (IMAGES, DIGITS)])
    with pytest.raises(ValueError, match="loader gave no batch"):
        train(model, iter(()))
    assert same(model.get_weights(), weights)


def test_progress_bar_is_shown_only_in_a_terminal(monkeypatch):
    logger, file, terminal = Mock(spec=["write"]), Mock(isatty=lambda: False), Mock(isatty=lambda: True)
    for stdout in (None, logger, file, terminal):
        monkeypatch.setattr(sys, "stdout", stdout)
        assert list(assignment.with_bar(["a", "b"])) == ["a", "b"]
    assert [stdout.write.called for stdout in (logger, file, terminal)] == [False, False, True]


# Weights


@pytest.mark.parametrize("make", [VAE, CVAE, third_party_vae.CVAE])
def test_saved_weights_load_into_a_new_model(make, monkeypatch):
    """The system's temporary folder is not used. `load_weights` builds a model that is not built yet."""
    monkeypatch.setattr("tempfile.tempdir", "/another/file/system")
    model, loaded = make(784), make(784)
    model(*assignment.model_inputs(model, IMAGES, DIGITS, assignment.is_conditional(model)))
    assignment.save_model_weights(model, settings())
    assert assignment.load_weights(loaded) is loaded
    assert same(loaded.get_weights(), model.get_weights())


@pytest.mark.parametrize("damage", CUT_OR_REPLACED)
def test_damaged_weights_raise(damage):
    model = VAE(16)
    assignment.save_model_weights(model)
    path = assignment.weights_path(model)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(OSError, match=r"h5 is damaged: train again with .*assignment\.py"):
        assignment.load_weights(model)


def test_weights_of_another_model_are_not_called_damaged():
    assignment.save_model_weights(VAE(784, latent_size=3))
    with pytest.raises(OSError, match=r"another model .*latent size 15 .* width 400; .*: train again .* \(.{1,200}\)$"):
        assignment.load_weights(VAE(784))


def test_failed_write_leaves_only_the_old_weights(monkeypatch):
    assignment.save_model_weights(VAE(16))
    path = assignment.weights_path(VAE(16))
    before = path.read_bytes()
    monkeypatch.setattr(os, "replace", Mock(side_effect=OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        assignment.save_model_weights(VAE(16))
    assert path.read_bytes() == before and [*path.parent.iterdir()] == [path]


# Pictures


def decoded_z(show, rows, num_classes=10):
    """Return the decoder's inputs by row and column, and check that the picture shows its outputs."""
    decoder = Mock(side_effect=lambda z: tf.sigmoid(z[:, :784]) * 0.8)  # no pixel is white
    picture = imread(show(Mock(decoder=decoder, num_classes=num_classes), 4000))[1::3, 1::3, 0]
    z = np.asarray(decoder.call_args[0][0])
    tiles = [tile for row in np.split(picture, rows) for tile in np.split(row, picture.shape[1] // 28, axis=1)]
    np.testing.assert_allclose(np.reshape(tiles, (-1, 784)), decoder(z), atol=2.5 / 255)
    return z.reshape(rows, -1, z.shape[1])


def assert_standard_normal_and_independent(z):
    """Check that the rows of z (N, 4000) are independent samples of N(0, I), not of a narrower normal."""
    np.testing.assert_allclose(z @ z.T / 4000, np.eye(len(z)), atol=0.15)


def test_vae_images_are_ten_samples_in_a_row():
    z = decoded_z(assignment.show_vae_images, rows=1)
    assert_standard_normal_and_independent(z.reshape(10, 4000))


def test_interpolation_rows_are_straight_lines_between_samples():
    z = decoded_z(assignment.show_vae_interpolation, rows=12)
    start, end = z[:, :1], z[:, -1:]
    np.testing.assert_allclose(z, start + np.linspace(0, 1, 12)[:, np.newaxis] * (end - start), atol=1e-5)
    assert_standard_normal_and_independent(np.concatenate([start, end]).reshape(24, 4000))


@pytest.mark.parametrize("classes", [10, 47, 1])
def test_cvae_images_have_a_row_of_ten_samples_per_class(classes):
    z = decoded_z(assignment.show_cvae_images, classes, classes)
    np.testing.assert_array_equal(z[:, :, 4000:], np.eye(classes)[:, np.newaxis].repeat(10, axis=1))
    assert_standard_normal_and_independent(z[:10, :, :4000].reshape(-1, 4000))


@pytest.mark.parametrize(("losses", "highest"), [([290.0, 150.0, 99.5], 150), ([130.0, 110.0], 120), ([290.0], 290)])
def test_loss_curve_shows_the_limit_and_crops_a_high_first_loss(figures, losses, highest):
    assignment.save_loss_curve(losses, "cvae")
    (axes,) = figures[0].axes
    curve, line = axes.lines
    assert [*map(tuple, curve.get_xydata())] == [*enumerate(losses, start=1)]
    assert set(line.get_ydata()) == {120}
    assert highest < axes.get_ylim()[1] < 1.3 * highest
    assert re.search(f"{losses[-1]}.*less than 120", " ".join(text.get_text() for text in axes.get_legend().texts))


# The program


def test_defaults_match_the_handout(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["assignment.py", "--is_cvae", "--seed", "7"])
    assert assignment.parseArguments() == settings(batch_size=1024, num_epochs=10, is_cvae=True, seed=7)


INVALID = ["--batch_size 0", "--batch_size 60001", "--num_epochs -1", "--latent_size 1.5", "--learning_rate nan"]


@pytest.mark.parametrize("setting", [*INVALID, "--learning_rate 0", "--input_size 100", "--seed -1"])
def test_invalid_flag_is_rejected(exit_argument, capsys, setting):
    assert exit_argument(assignment.parseArguments, setting) == 2
    assert re.search("error: argument {}: .*{}".format(*map(re.escape, setting.split())), capsys.readouterr().err)


@pytest.fixture
def train_vae(gray_mnist, figures, monkeypatch):
    """Replace `train_vae` in the program by a mock that trains nothing."""
    monkeypatch.setattr(assignment, "train_vae", Mock(return_value=300.0))
    return assignment.train_vae


def test_each_epoch_prints_its_mean_loss_and_saves_weights(train_vae, monkeypatch):
    train_vae.side_effect = [300.0, 150.0, FloatingPointError("nan")]
    monkeypatch.setattr("builtins.print", Mock())
    monkeypatch.setattr(assignment, "save_model_weights", Mock())
    with pytest.raises(FloatingPointError, match="nan"):
        assignment.train(VAE(784), settings(num_epochs=4, batch_size=64))
    lines = ["Train Epoch: 1 \tLoss: 100.000000", "Train Epoch: 2 \tLoss: 50.000000"]
    assert print.call_args_list == [call(line, flush=True) for line in lines]
    assert assignment.save_model_weights.call_count == 2


@pytest.mark.parametrize(("batch_size", "peak", "beta_2"), [(16, 1e-3, 0.999), (64, 2e-3, 0.996), (1024, 8e-3, 0.95)])
def test_learning_rate_and_beta_2_depend_on_the_batch_size(train_vae, batch_size, peak, beta_2, monkeypatch):
    monkeypatch.setattr(assignment, "load_mnist", lambda *_, **__: [None] * 15)
    monkeypatch.setattr(tf.keras.optimizers, "Adam", Mock(return_value=None))
    assignment.train(VAE(784), settings(batch_size=batch_size, num_epochs=4))
    (rate,), options = tf.keras.optimizers.Adam.call_args
    steps = np.arange(100)  # training has 60; then the rate stays small
    np.testing.assert_allclose(rate(steps), peak * np.sin(np.pi * (steps.clip(max=59) + 0.5) / 60), rtol=1e-4)
    assert options == {"beta_2": pytest.approx(beta_2, abs=1e-5)}


def test_program_shuffles_all_training_images(train_vae, monkeypatch):
    images, labels = np.broadcast_to(np.uint8(0), (60_000, 1, 1)), np.arange(60_000)
    monkeypatch.setattr(assignment, "read_mnist", lambda: ((images, labels), None))
    assignment.train(VAE(784), settings(num_epochs=1, batch_size=1024))
    assert max(next(train_vae.call_args[0][1])[1]) > 59_000


@pytest.mark.parametrize("own", [None, tf.keras.optimizers.SGD(0.25)])
@pytest.mark.parametrize("outcome", [300.0, FloatingPointError, KeyboardInterrupt])
def test_train_restores_the_optimizer_of_the_model(train_vae, own, outcome, monkeypatch):
    """Adam is created only if the model has no optimizer."""
    model = VAE(784)
    model.optimizer, train_vae.side_effect = own, [300.0, outcome]
    monkeypatch.setattr(tf.keras.optimizers, "Adam", Mock(return_value="Adam"))
    with contextlib.suppress(FloatingPointError, KeyboardInterrupt):
        assignment.train(model, settings(num_epochs=2))
    assert tf.keras.optimizers.Adam.call_count == (own is None)
    assert model.optimizer is own


def test_load_weights_flag_skips_training(capsys):
    assignment.save_model_weights(CVAE(784))
    assignment.main(settings(is_cvae=True, load_weights=True))
    assert capsys.readouterr().out == "Wrote:\n  outputs/show_cvae_images.png\n"


def test_seed_repeats_losses_and_pictures(gray_mnist, outputs, capsys):
    results = []
    for _ in range(2):
        assignment.main(settings(seed=1, num_epochs=1, batch_size=64))
        assignment.save_model_weights(CVAE(784))
        assignment.main(settings(seed=1, is_cvae=True, load_weights=True))
        results.append([capsys.readouterr().out, *(path.read_bytes() for path in sorted(outputs.glob("show*.png")))])
    assert results[0] == results[1]


def test_readme_example_generates_ten_images(gray_mnist):
    readme, names = (assignment.ROOT / "README.md").read_text(encoding="utf-8"), {}
    exec(readme.split("```python")[1].split("```")[0], names)
    assert names["images"].shape == (10, 1, 28, 28)
    assert 0 <= np.min(names["images"]) < np.max(names["images"]) <= 1


# The program in a folder of its own


@pytest.fixture
def project(tmp_path):
    """Copy both files and 2,000 images per split to a path with spaces and non-cp1252 letters."""
    copy, others = tmp_path / "häuser und Ähren 数字", shutil.ignore_patterns("tests", "__pycache__", "evaluate.py")
    shutil.copytree(assignment.CODE, copy / "code", ignore=others)
    (copy / "data").mkdir()
    with np.load(assignment.MNIST) as arrays:
        np.savez(copy / "data/mnist.npz", **{name: array[:2000] for name, array in arrays.items()})
    return copy


NOTEBOOK = "module://matplotlib_inline.backend_inline"
# This imitates redirected stdout on Windows, a missing home, and a shell started from Jupyter.
ENVIRONMENT = {"PYTHONIOENCODING": "cp1252", "HOME": "/proc/none", "MPLBACKEND": NOTEBOOK}


def run(folder, *flags):
    """Run assignment.py in a new process and return the printed lines."""
    command = [sys.executable, folder / "assignment.py", *flags]
    return subprocess.check_output(command, cwd=folder.anchor, env=os.environ | ENVIRONMENT, text=True).splitlines()


def test_program_prints_losses_and_paths_of_written_files(project):
    first, second, *wrote = run(project / "code", "--is_cvae", "--num_epochs", "2")
    assert re.fullmatch(r"Train Epoch: 1 \tLoss: \d+\.\d{6}\nTrain Epoch: 2 \tLoss: \d+\.\d{6}", f"{first}\n{second}")
    files = ["cvae_loss.png", "model_ckpts/cvae.weights.h5", "show_cvae_images.png"]
    assert wrote == ["Wrote:", *(f"  outputs/{file}" for file in files)]
    assert all((project / "outputs" / file).is_file() for file in files)


def test_flat_copy_runs_with_a_third_party_vae(project):
    flat = shutil.copytree(project / "code", project / "graded")  # the data/ beside it must be ignored
    shutil.copytree(project / "data", flat / "data")
    numpys = "\ntf.experimental.numpy.experimental_enable_numpy_behavior()\n"  # as TensorFlow's own errors advise
    (flat / "vae.py").write_text((assignment.CODE / "tests/third_party_vae.py").read_text() + numpys)
    both = "import sys, runpy\nfor sys.argv[1:] in [], ['--is_cvae']: runpy.run_path('assignment.py', {}, '__main__')"
    subprocess.check_call([sys.executable, "-c", both], cwd=flat)
    assert len([*(flat / "outputs").glob("*.png")]) == 5 and not (project / "outputs").exists()


def program(project):
    return lambda: runpy.run_path(str(project / "code/assignment.py"), run_name="__main__")


def test_user_errors_end_in_one_line_and_write_nothing(project, exit_argument):
    start = program(project)
    missing = r"error: .*cvae\.weights\.h5 is missing: train .*assignment\.py --is_cvae --latent_size 3` in .*"
    assert re.fullmatch(missing, exit_argument(start, "--load_weights --is_cvae --latent_size 3"))
    assert re.fullmatch("error: .*no longer finite.*", exit_argument(start, "--batch_size 99 --learning_rate 1e9"))
    assert re.fullmatch("error: batch_size must be 1 to 2000.* got 2001.*", exit_argument(start, "--batch_size 2001"))
    arrays = {**np.load(project / "data/mnist.npz")}
    np.savez(project / "data/mnist.npz", **arrays | {"y_train": arrays["y_train"] + 1})
    assert re.fullmatch("error: labels must be .* 0 to 9.*", exit_argument(start, "--is_cvae"))
    (project / "data/mnist.npz").write_text("<html>404 Not Found</html>")
    assert re.fullmatch(r"error: .*mnist\.npz is damaged.*", exit_argument(start))
    assert not [path for path in (project / "outputs").rglob("*") if path.is_file()]


def test_interrupt_reports_the_saved_weights(project, exit_argument, monkeypatch, capsys):
    monkeypatch.setattr(tf.keras.utils, "Progbar", Mock(side_effect=KeyboardInterrupt))
    assert exit_argument(program(project)) == 130
    assert re.fullmatch("\ninterrupted: .*last epoch printed.*saved.*\n", capsys.readouterr().err)


def test_bug_in_the_code_keeps_its_traceback(project, exit_argument, monkeypatch):
    monkeypatch.setattr(vae, "loss_function", bug)
    with pytest.raises(AttributeError, match="sqare"):
        exit_argument(program(project))


def test_jupyter_keeps_its_own_backend(monkeypatch):
    monkeypatch.setenv("MPLBACKEND", NOTEBOOK)
    monkeypatch.setitem(sys.modules, "ipykernel", Mock())
    runpy.run_path(assignment.__file__)
    assert os.environ["MPLBACKEND"] == NOTEBOOK


# Learning on real images


def test_short_training_learns_the_requested_digit(exit_argument, figures, monkeypatch, capsys):
    """After 200 steps, the loss is 132 and the accuracy of the worst digit is 97%.

    Without He's rule, the loss is 152. Without initialized label rows, that accuracy is 32%.
    """
    load = assignment.load_mnist
    monkeypatch.setattr(assignment, "load_mnist", lambda *args, **kwargs: load(*args, **kwargs).take(200))
    assignment.main(settings(is_cvae=True, batch_size=128, num_epochs=1, seed=0))
    exit_argument(evaluate.main)
    printed = capsys.readouterr().out
    for measured, least, most in (("CVAE: loss", 100, 142), ("worst digit", 65, 100), ("test images:", 99.2, 100)):
        assert least < float(re.search(rf"{measured} ([\d.]+)", printed)[1]) < most


@pytest.mark.slow
@pytest.mark.parametrize(("batch_size", "new_adam"), [(1024, False), (128, False), (1024, True)])
def test_ten_epochs_of_train_vae_meet_the_handout(batch_size, new_adam):
    """The rate is constant. With a new Adam each epoch, a VAE's loss is 116 to 119; 125 leaves a margin."""
    for make in (VAE, CVAE):
        tf.keras.utils.set_random_seed(0)
        loader, model = assignment.load_mnist(batch_size, assignment.TRAINING_IMAGES), make(784)
        for _ in range(10):
            if new_adam:
                model.compile(optimizer=tf.keras.optimizers.Adam(1e-3))
            loss = train(model, loader) / len(loader)
        assert loss < (125 if new_adam else 120)
    assert evaluate.grade_samples(model, evaluate.load_classifier(), *assignment.read_mnist()[1]) > 0.93
