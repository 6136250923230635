"""assignment.py and evaluate.py as their users meet them: imported, and started from a shell."""

import argparse
from concurrent.futures import ThreadPoolExecutor
import os
import pathlib
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

PROJECT = pathlib.Path(__file__).resolve().parents[2]
both = pytest.mark.parametrize("make", [VAE, CVAE])
IMAGES, DIGITS = (array[:48] for array in assignment.read_mnist()[1])
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
    return assignment.train_vae(model, loader, settings(**changed), is_cvae=assignment.is_conditional(model))


def same(these, those):
    return len(these) == len(those) and all(map(np.array_equal, these, those))


# Data


def test_loader_gives_full_batches_each_image_once_with_its_label_shuffled_anew_each_epoch(monkeypatch):
    images, labels = np.random.default_rng(0).integers(0, 256, (1000, 28, 28), np.uint8), np.arange(1000, dtype="uint8")
    images[:, 0, :2] = np.stack(np.divmod(np.arange(1000), 256), axis=1)  # its number
    monkeypatch.setattr(assignment, "read_mnist", lambda: ((images, labels), None))
    loader, epochs = assignment.load_mnist(64, buffer_size=1000), []
    for _ in range(2):
        x, y = map(np.concatenate, zip(*[(x.numpy(), y.numpy()) for x, y in loader]))
        numbers = np.rint(x[:, 0, 0, :2] @ [256 * 255, 255]).astype(int)
        assert len(x) == 64 * len(loader) == 960 == np.unique(numbers).size
        assert same([x, y], [images[numbers, np.newaxis] / np.float32(255), labels[numbers]])
        epochs.append(numbers)
    assert {*epochs[0]} != {*epochs[1]} and not np.all(np.diff(epochs[0]) > 0)
    for sizes in ((0, 1024), (1001, 1024), (128, 0)):
        with pytest.raises(ValueError, match="batch_size .*1 to 1000, buffer_size .*got {}, {}".format(*sizes)):
            assignment.load_mnist(*sizes)


CUT_OR_REPLACED = [lambda b: b"", lambda b: b[: len(b) // 2], lambda b: b[:-9], lambda b: b"<html>404</html>"]


@pytest.mark.parametrize("damage", [*CUT_OR_REPLACED, lambda b: b[:99] + bytes([b[99] ^ 1]) + b[100:]])
def test_a_damaged_data_file_is_named(damage, tmp_path, monkeypatch):
    whole = assignment.MNIST.read_bytes()
    monkeypatch.setattr(assignment, "MNIST", tmp_path / "mnist.npz")
    assignment.MNIST.write_bytes(damage(whole))
    with pytest.raises(OSError, match=r"mnist\.npz is damaged.*git checkout .* in /"):
        assignment.load_mnist(128)


def test_a_missing_data_file_is_downloaded_by_keras_and_one_that_may_not_be_read_is_not_called_damaged(monkeypatch):
    monkeypatch.setattr(np, "load", Mock(side_effect=PermissionError("denied")))
    with pytest.raises(PermissionError, match="denied"):
        assignment.read_mnist()
    monkeypatch.setattr(assignment, "MNIST", assignment.OUTPUTS)
    monkeypatch.setattr(tf.keras.datasets.mnist, "load_data", Mock(side_effect=["Keras's", Exception("no network")]))
    assert assignment.read_mnist() == "Keras's"
    with pytest.raises(OSError, match=r"outputs is missing \(no network\).*git checkout"):
        assignment.read_mnist()


# Training


@both
def test_training_lowers_the_loss_by_adam_at_a_constant_rate_with_any_loader(make):
    tf.keras.utils.set_random_seed(1)
    model = make(784)
    dataset = tf.data.Dataset.from_tensor_slices((IMAGES.astype("float32"), DIGITS)).batch(32)
    lists = [(images.tolist(), [[float(digit)] for digit in labels]) for images, labels in small_loader()]
    loaders = [small_loader(), dataset, iter(small_loader(32)), (batch for batch in lists)]
    losses = [train(model, loader) / batches for loader, batches in zip(loaders, (3, 2, 2, 3))]
    assert losses == sorted(losses, reverse=True) and {type(loss) for loss in losses} == {float}
    assert (type(model.optimizer), float(model.optimizer.learning_rate)) == (tf.keras.optimizers.Adam, np.float32(1e-3))


@both
def test_a_batch_is_one_step_of_the_models_own_optimizer_down_the_gradient_of_the_elbo(make, monkeypatch):
    monkeypatch.setattr(vae, "reparametrize", lambda mu, logvar: mu)  # so that both gradients are of the same z
    model, x, is_cvae = make(784), tf.cast(IMAGES, tf.float32), make is CVAE
    model.compile(optimizer=tf.keras.optimizers.SGD(2**-7))
    with tf.GradientTape() as tape:
        x_hat, mu, logvar = model(x, np.eye(10)[DIGITS]) if is_cvae else model(x)
        loss = (bce_function(x_hat, x) + kl_divergence(mu, logvar)) / len(x)
    expected = [w - g / 2**7 for w, g in zip(model.trainable_variables, tape.gradient(loss, model.trainable_variables))]
    assert assignment.train_vae(model, [(IMAGES, DIGITS)], None, is_cvae) == pytest.approx(float(loss), rel=1e-5)
    for moved, wanted in zip(model.trainable_variables, expected):
        np.testing.assert_allclose(moved, wanted, atol=1e-6)
    model.compile(optimizer=tf.keras.optimizers.SGD(0.0))  # another one, between two epochs, takes over
    one, two = (assignment.train_vae(model, [(IMAGES, DIGITS)] * batches, None, is_cvae) for batches in (1, 2))
    assert two == pytest.approx(2 * one, rel=1e-5)  # the sum over the batches


@pytest.mark.parametrize("when_compiled", [False, True])
def test_a_slip_in_the_code_is_mended_and_another_models_parts_know_that_they_train(when_compiled, monkeypatch):
    def slip(*arguments):
        return tf.sqare(0) if when_compiled != tf.executing_eagerly() else others_vae.loss_function(*arguments)

    model, loss_function = others_vae.VAE(784), Mock(side_effect=others_vae.loss_function)
    monkeypatch.setattr(assignment, "loss_function", slip)
    with pytest.raises(AttributeError, match="sqare"):
        train(model, small_loader())
    monkeypatch.setattr(assignment, "loss_function", loss_function)
    assert train(model, small_loader()) > train(model, small_loader())
    assert loss_function.call_count == 2 - when_compiled  # the first step, if it is still to do, and one trace
    assert np.any(model.encoder.layers[-1].moving_mean)  # a BatchNormalization's, which moves in training


@pytest.mark.parametrize(("learning_rate", "batch_size"), [(1e9, 16), (np.nan, 48)])
def test_a_loss_or_a_weight_that_is_not_finite_blames_the_learning_rate(learning_rate, batch_size):
    with pytest.raises(FloatingPointError, match="no longer finite: try a smaller learning rate"):
        train(CVAE(784), small_loader(batch_size), learning_rate=learning_rate)


ONE_PIXEL = np.arange(IMAGES.size).reshape(IMAGES.shape) == 3000
BAD_BATCHES = [
    ((IMAGES * 255).astype("uint8"), DIGITS, r"images .*\[0, 1\].* 0 to 255"),
    (np.where(ONE_PIXEL, np.nan, IMAGES), DIGITS, r"images .*\[0, 1\].* nan"),
    (IMAGES * 1.00004 - 0.00002, DIGITS, r"images .*\[0, 1\].* -2e-05 to 1\.00002$"),
    (IMAGES.reshape(-1, 28, 28, 1), DIGITS, r"images .*\(N, 1, 28, 28\); got \(48, 28, 28, 1\)"),
    (IMAGES[:0], DIGITS[:0], r"images .*got \(0, 1, 28, 28\)"),
    (IMAGES, np.where(DIGITS == 7, 10, DIGITS), r"labels .*0 to 9.*got .* 9 10\]"),
    (IMAGES, DIGITS - 0.5, r"labels .*integers.*\.5"),
    (IMAGES, np.eye(10)[DIGITS], r"labels .* 48 .*not one-hot; got .*\(48, 10\)"),
]


def test_a_bad_batch_or_none_is_named_and_the_model_trains_on_with_good_ones():
    model = CVAE(784)
    weights = model.get_weights()
    for images, labels, message in BAD_BATCHES:
        with pytest.raises(ValueError, match=message):
            train(model, [(images, labels), (IMAGES, DIGITS)])
    assert same(model.get_weights(), weights)
    rounded = IMAGES * (1 + 3e-6) - 3e-6  # as a resize may leave them
    assert train(model, [(rounded, DIGITS)] * 3) > train(model, [(IMAGES, DIGITS)] * 3)
    with pytest.raises(ValueError, match="loader gave no batch"):  # and not a perfect loss of 0
        train(model, iter(()))


# Weights


@both
def test_weights_survive_a_round_trip(make):
    model, loaded, flags = make(784), make(784), "--is_cvae --lat" if make is CVAE else "--lat"
    with pytest.raises(FileNotFoundError, match=rf"vae\.weights\.h5 is missing.*assignment.py {flags}.* in /"):
        assignment.load_weights(loaded)
    assignment.save_model_weights(model, settings())
    assert assignment.load_weights(loaded) is loaded and same(loaded.get_weights(), model.get_weights())


@pytest.mark.parametrize("damage", [*CUT_OR_REPLACED, None])
def test_weights_that_do_not_fit_are_named_with_all_causes(damage):
    assignment.save_model_weights(VAE(784, latent_size=15 if damage else 3))
    path = assignment.weights_path(VAE(784))
    if damage:
        path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(OSError, match=r"h5 is damaged.*latent.*width.*vae\.py.*Keras.*assignment\.py.*\(.+\)$"):
        assignment.load_weights(VAE(784))


def test_a_write_that_fails_leaves_the_old_weights_and_nothing_else(outputs, monkeypatch):
    model = VAE(784)
    assignment.save_model_weights(model)
    monkeypatch.setattr(model, "save_weights", lambda part: np.savez(part) or {}["disk full"])
    with pytest.raises(KeyError, match="disk full"):
        assignment.save_model_weights(model)
    assert [path.name for path in (outputs / "model_ckpts").iterdir()] == ["vae.weights.h5"]
    assert same(assignment.load_weights(VAE(784)).get_weights(), model.get_weights())


# Pictures


def drawn(show, rows, num_classes=0):
    """The z that `show` has decoded, (rows, columns, 4000 + C); its picture has them as images, pixel by pixel."""
    model = Mock(num_classes=num_classes)
    model.decoder.side_effect = lambda z: tf.sigmoid(z[:, :784]) * 0.8  # no pixel is white
    picture = imread(show(model, 4000))[1::3, 1::3, 0]
    z = np.reshape(model.decoder.call_args[0][0], (rows, -1, 4000 + num_classes))
    images = picture.reshape(rows, 28, -1, 28).swapaxes(1, 2).reshape(*z.shape[:2], 784)
    np.testing.assert_allclose(images, tf.sigmoid(z[:, :, :784]) * 0.8, atol=2.5 / 255)
    return z


def assert_standard_normal_and_independent(z, n):
    """Of z (N, 4000): from the whole prior, as a narrower one looks better, and each row another."""
    np.testing.assert_allclose(z @ z.T / 4000, np.eye(n), atol=0.15)


def test_vae_images_are_a_row_of_ten_random_ones():
    (z,) = drawn(assignment.show_vae_images, rows=1)
    assert_standard_normal_and_independent(z, 10)


def test_interpolation_walks_in_a_straight_line_along_each_row_from_one_random_z_to_another():
    z, t = drawn(assignment.show_vae_interpolation, rows=12), np.linspace(0, 1, 12)
    np.testing.assert_allclose(z, z[:, :1] + t[:, np.newaxis] * (z[:, -1:] - z[:, :1]), atol=1e-5)
    assert_standard_normal_and_independent(z[:, [0, -1]].reshape(-1, 4000), 24)


@pytest.mark.parametrize("classes", [10, 47, 1])
def test_cvae_images_have_a_row_of_ten_for_each_class_the_first_at_the_top(classes):
    z = drawn(assignment.show_cvae_images, classes, classes)
    np.testing.assert_array_equal(z[:, :, 4000:], np.eye(classes)[:, np.newaxis].repeat(10, axis=1))
    assert_standard_normal_and_independent(z[:10, :, :4000].reshape(-1, 4000), min(classes, 10) * 10)


# Command line


def parse(monkeypatch, setting):
    monkeypatch.setattr(sys, "argv", ["assignment.py", *setting.split()])
    return assignment.parseArguments()


def test_defaults_are_the_handouts(monkeypatch):
    assert parse(monkeypatch, "") == settings(batch_size=1024, num_epochs=10)
    assert parse(monkeypatch, "--is_cvae --seed 7") == settings(batch_size=1024, num_epochs=10, is_cvae=True, seed=7)


OUT_OF_RANGE = ["--batch_size 0", "--batch_size 60001", "--num_epochs -1", "--latent_size 1.5", "--learning_rate nan"]


@pytest.mark.parametrize("setting", [*OUT_OF_RANGE, "--learning_rate 0", "--input_size 100", "--seed -1"])
def test_a_setting_out_of_range_is_named_with_what_came(monkeypatch, capsys, setting):
    with pytest.raises(SystemExit, match="2"):
        parse(monkeypatch, setting)
    assert re.search("error: argument {}: .*{}".format(*map(re.escape, setting.split())), capsys.readouterr().err)


@pytest.fixture
def epochs(monkeypatch):
    """Of each epoch of `main`: weights, optimizer and labels. It has three batches; the third epoch fails."""
    epochs, load = [], assignment.load_mnist

    def train(model, loader, *_, **__):
        epochs.append((model.get_weights(), model.optimizer.get_config(), [labels for _, labels in loader]))
        if len(epochs) == 3:
            raise FloatingPointError("the loss is nan")
        return 300.0

    monkeypatch.setattr(assignment, "load_mnist", lambda size, buffer_size: load(size, buffer_size).take(3))
    monkeypatch.setattr(assignment, "train_vae", train)
    return epochs


def test_the_program_prints_the_mean_loss_of_a_batch_and_keeps_the_last_finite_weights(epochs, capsys):
    with pytest.raises(FloatingPointError, match="nan"):
        assignment.main(settings(num_epochs=4, batch_size=64))
    assert capsys.readouterr().out == "Train Epoch: 1 \tLoss: 100.000000\nTrain Epoch: 2 \tLoss: 100.000000\n"
    assert same(assignment.load_weights(VAE(784)).get_weights(), epochs[1][0])
    assert epochs[0][1]["learning_rate"]["config"] == {"peak": pytest.approx(2e-3), "steps": 4 * len(epochs[0][2])}


def test_the_rate_of_the_program_is_half_a_sine_wave_over_its_training():
    rates = assignment.SineRate(peak=8.0, steps=100)(np.arange(200)).numpy()
    np.testing.assert_allclose(rates, 8 * np.sin(np.pi * (np.arange(200).clip(max=99) + 0.5) / 100), atol=1e-5)


def test_the_same_seed_gives_the_same_weights_and_the_same_batches(epochs):
    for seed in (5, 5):
        assignment.main(settings(seed=seed, num_epochs=1))
    assert same(epochs[0][0], epochs[1][0]) and same(epochs[0][2], epochs[1][2])


def test_the_program_keeps_a_models_own_optimizer(epochs, monkeypatch):
    model = VAE(784)
    model.compile(optimizer=tf.keras.optimizers.SGD(0.25))
    monkeypatch.setattr(assignment, "VAE", lambda *_, **__: model)
    assignment.main(settings(num_epochs=1))
    assert epochs[0][1]["learning_rate"] == 0.25


@pytest.fixture
def project(tmp_path):
    """The two files and 2,000 training images, at a path with spaces and letters outside cp1252."""
    copy, others = tmp_path / "häuser und Ähren 数字", shutil.ignore_patterns("tests", "__pycache__", "evaluate.py")
    shutil.copytree(PROJECT / "code", copy / "code", ignore=others)
    (copy / "data").mkdir()
    with np.load(assignment.MNIST) as arrays:
        np.savez(copy / "data/mnist.npz", **{name: array[:2000] for name, array in arrays.items()})
    return copy


def train_and_draw_again(program, is_cvae):
    """Two epochs, then `--load_weights`, as processes of their own: the lines and files are those of the stencil."""
    command, name = [sys.executable, program, *["--is_cvae"] * is_cvae], "cvae" if is_cvae else "vae"
    pictures = [f"  outputs/show_{picture}.png" for picture in (f"{name}_images", "vae_interpolation")[: 2 - is_cvae]]
    env = os.environ | {"PYTHONIOENCODING": "cp1252", "HOME": "/proc/none"}  # as Windows redirects stdout; no home
    options = {"cwd": program.anchor, "env": env, "text": True}
    first, second, *wrote = subprocess.check_output([*command, "--num_epochs", "2"], **options).splitlines()
    losses = [re.fullmatch(rf"Train Epoch: {i} \tLoss: (\d+\.\d{{6}})", s)[1] for i, s in ((1, first), (2, second))]
    assert float(losses[1]) < float(losses[0])
    assert wrote == ["Wrote:", f"  outputs/{name}_loss.png", f"  outputs/model_ckpts/{name}.weights.h5", *pictures]
    assert subprocess.check_output([*command, "--load_weights"], **options).splitlines() == ["Wrote:", *pictures]


def test_the_two_files_train_and_draw_in_code_or_flat_and_with_another_vae(project):
    flat = shutil.copytree(project / "code", project / "graded")  # there are data/ and outputs/ beside it too
    shutil.copytree(project / "data", flat / "data")
    numpys = "\ntf.experimental.numpy.experimental_enable_numpy_behavior()\n"  # as TensorFlow's own errors advise
    (flat / "vae.py").write_text((PROJECT / "code/tests/others_vae.py").read_text() + numpys)
    programs = [folder / "assignment.py" for folder in (project / "code", flat, flat)]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(train_and_draw_again, programs, (True, True, False)))
    assert [len([*(folder / "outputs").glob("*.png")]) for folder in (project, flat)] == [2, 5]


@pytest.fixture
def run(monkeypatch, project):
    """Runs assignment.py of the copy here; what it ends with, as `sys.exit` takes it."""

    def run(flags=""):
        monkeypatch.setattr(sys, "argv", ["assignment.py", *flags.split()])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(project / "code/assignment.py"), run_name="__main__")
        return ended.value.code

    return run


def test_what_a_user_can_mend_is_one_line_and_changes_nothing(project, run, monkeypatch, capsys):
    assert re.fullmatch(r"error: .*vae\.weights\.h5 is missing.*", run("--load_weights"))
    assert re.fullmatch("error: .*no longer finite.*smaller learning rate", run("--batch_size 100 --learning_rate 1e9"))
    monkeypatch.setattr(tf.keras.utils, "Progbar", Mock(side_effect=KeyboardInterrupt))
    assert run() == 130 and re.fullmatch("\ninterrupted: .*saved .*last epoch printed.*\n", capsys.readouterr().err)
    (project / "data/mnist.npz").write_text("<html>404 Not Found</html>")
    assert re.fullmatch(r"error: .*mnist\.npz is damaged.*git checkout.*", run())
    assert not [path for path in (project / "outputs").rglob("*") if path.is_file()]


def test_a_slip_in_the_code_keeps_its_traceback(run, monkeypatch):
    monkeypatch.setattr(vae, "loss_function", lambda x_hat, x, mu, logvar: tf.sqare(x_hat - x))
    with pytest.raises(AttributeError, match="sqare"):
        run()


# Grades


def grade(monkeypatch):
    """Runs evaluate.py here, on the weights of `assignment.OUTPUTS`; its exit status."""
    monkeypatch.setattr(sys, "argv", ["evaluate.py"])
    with pytest.raises(SystemExit) as ended:
        evaluate.main()
    return ended.value.code


@pytest.mark.parametrize(("loss", "accuracy", "code"), [(119.9, 0.901, 0), (120.1, 0.901, 1), (119.9, 0.899, 1)])
def test_a_grade_is_what_the_handout_asks_for_of_all_that_is_saved(monkeypatch, capsys, loss, accuracy, code):
    monkeypatch.setattr(evaluate, "elbo_terms", lambda model, images, labels: (loss - 10, len(images) / 1000))
    monkeypatch.setattr(evaluate, "grade_samples", lambda *_: accuracy)
    assert grade(monkeypatch) == 1  # nothing is saved
    assignment.save_model_weights(CVAE(784))
    assert grade(monkeypatch) == code
    printed, missing = capsys.readouterr()
    assert re.findall("pass|FAIL", printed) == ["FAIL" if failed else "pass" for failed in (loss > 120, accuracy < 0.9)]
    assert "/vae.weights.h5 is missing" in missing


def test_a_classifier_that_is_trained_again_learns_and_a_damaged_one_is_named(monkeypatch, tmp_path):
    (images, labels), (test_images, test_labels) = assignment.read_mnist()
    monkeypatch.setattr(assignment, "read_mnist", lambda: ((images[:2000], labels[:2000]), None))
    monkeypatch.setattr(evaluate, "CLASSIFIER", tmp_path / "classifier.npz")
    evaluate.train_classifier()
    assert 0.9 < evaluate.accuracy(evaluate.classify(evaluate.load_classifier(), test_images / 255), test_labels) < 1
    evaluate.CLASSIFIER.write_bytes(evaluate.CLASSIFIER.read_bytes()[:-99])
    with pytest.raises(OSError, match=r"classifier\.npz cannot be read.*--train_classifier"):
        evaluate.load_classifier()


def test_a_short_training_on_real_images_listens_to_the_digit_asked_for(monkeypatch, capsys):
    """200 steps give 99.5% and a loss of 148; without the strong label rows 30%, and 19% with default initializers."""
    load = assignment.load_mnist
    monkeypatch.setattr(assignment, "load_mnist", lambda *args, **kwargs: load(*args, **kwargs).take(200))
    assignment.main(settings(is_cvae=True, batch_size=128, num_epochs=1, seed=0))
    grade(monkeypatch)
    printed = capsys.readouterr().out
    assert "pass  CVAE accuracy above 90%" in printed
    loss, bce, kl = map(float, re.search(r"loss ([\d.]+) .* BCE ([\d.]+) and KL ([\d.]+)", printed).groups())
    assert loss < 170 and loss == pytest.approx(bce + kl, abs=0.02) and 2 < kl < 30
    for measured, least in (("worst digit", 90), ("real test images:", 99.2)):
        assert least <= float(re.search(rf"{measured} ([\d.]+)%", printed)[1]) <= 100


@pytest.mark.slow
@pytest.mark.parametrize(("batch_size", "new_adam"), [(1024, False), (128, False), (1024, True)])
def test_ten_epochs_of_train_vae_alone_are_what_the_handout_asks_for_and_more(batch_size, new_adam):
    """At its constant rate; also with a model that is compiled with a new Adam each epoch."""
    tf.keras.utils.set_random_seed(0)
    loader = assignment.load_mnist(batch_size, buffer_size=60_000)
    for model in (VAE(784), CVAE(784)):
        for _ in range(10):
            if new_adam:
                model.compile(optimizer=tf.keras.optimizers.Adam(1e-3))
            loss = train(model, loader) / len(loader)
        print(f"\n{type(model).__name__}, batches of {batch_size}, new Adam {new_adam}: training loss {loss:.1f}")
        assert loss < 120
    assert evaluate.grade_samples(model, evaluate.load_classifier(), *assignment.read_mnist()[1]) > 0.95
