"""The programs as they are started from a shell, in a copy that the tests may spoil; and what evaluate.py measures."""

import argparse
from concurrent.futures import ThreadPoolExecutor
import os
import pathlib
import re
import runpy
import shutil
import subprocess
import sys
import time
from unittest.mock import Mock

import assignment
import evaluate
import numpy as np
import pytest
import tensorflow as tf
import vae
from vae import CVAE, VAE, bce_function

RNG = np.random.default_rng(0)
PROJECT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture
def project(tmp_path):
    """A copy with 2,000 training images and no outputs, at a path with spaces and letters outside cp1252."""
    copy = tmp_path / "häuser und Ähren 数字"
    shutil.copytree(PROJECT / "code", copy / "code", ignore=shutil.ignore_patterns("tests", "__pycache__"))
    shutil.copytree(PROJECT / "data", copy / "data")
    with np.load(PROJECT / "data/mnist.npz") as arrays:
        np.savez(copy / "data/mnist.npz", **{name: array[:2000] for name, array in arrays.items()})
    return copy


def train_and_draw_again(project, is_cvae):
    """Two epochs, then `--load_weights`, as processes of their own: the lines and files are those of the stencil."""
    command = [sys.executable, project / "code/assignment.py", *["--is_cvae"] * is_cvae]
    name = "cvae" if is_cvae else "vae"
    pictures = [f"show_{name}_images.png", "show_vae_interpolation.png"][: 2 - is_cvae]
    files = [f"{name}_loss.png", f"model_ckpts/{name}.weights.h5", *pictures]
    env = os.environ | {"PYTHONIOENCODING": "cp1252", "HOME": "/proc/none"}  # as Windows redirects stdout; no home
    options = {"cwd": project.anchor, "env": env, "text": True}
    first, second, *wrote = subprocess.check_output([*command, "--num_epochs", "2"], **options).splitlines()
    losses = [re.fullmatch(rf"Train Epoch: {i} \tLoss: (\d+\.\d{{6}})", s)[1] for i, s in ((1, first), (2, second))]
    assert float(losses[1]) < float(losses[0])
    assert wrote == ["Wrote:", *(f"  outputs/{file}" for file in files)]
    before = [(project / "outputs" / file).read_bytes() for file in files]
    again = subprocess.check_output([*command, "--load_weights"], **options).splitlines()
    assert again == ["Wrote:", *(f"  outputs/{picture}" for picture in pictures)]
    changed = [(project / "outputs" / file).read_bytes() != old for file, old in zip(files, before)]
    assert changed == [False, False, *[True] * len(pictures)]


def test_the_two_files_train_and_draw_wherever_they_are_and_whosever_vae_it_is(project):
    for other in {path.name for path in (project / "code").iterdir()} - {"assignment.py", "vae.py"}:
        (project / "code" / other).unlink()
    anothers = shutil.copytree(project, project.with_name("another's"))
    shutil.copy(PROJECT / "code/tests/others_vae.py", anothers / "code/vae.py")
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(train_and_draw_again, (project, anothers, anothers), (True, True, False)))


@pytest.fixture
def run(monkeypatch, project):
    """Runs a program of the copy here; what it ends with, as `sys.exit` takes it."""

    def run(program, *arguments):
        monkeypatch.setattr(sys, "argv", [program, *arguments])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(project / "code" / program), run_name="__main__")
        return ended.value.code

    return run


def test_what_a_user_can_mend_is_one_line_and_changes_nothing(project, run, monkeypatch):
    monkeypatch.setattr(assignment, "OUTPUTS", project / "outputs")  # evaluate.py's
    endings = {
        run("assignment.py", "--load_weights"): r"vae\.weights\.h5 is missing.*python assignment\.py",
        run("evaluate.py"): r"vae\.weights\.h5 is missing.*cvae\.weights\.h5 is missing.*--is_cvae",
        run(
            "assignment.py", "--batch_size", "100", "--learning_rate", "1e9"
        ): "no longer finite.*smaller learning rate",
    }
    (project / "data/mnist.npz").write_text("<html>404 Not Found</html>")
    endings[run("assignment.py")] = r"mnist\.npz is damaged.*git checkout"
    assert all(re.fullmatch(f"error: .*{expected}.*", line) for line, expected in endings.items()), endings
    assert (project / "data/mnist.npz").read_text() == "<html>404 Not Found</html>"
    assert not [path for path in (project / "outputs").rglob("*") if path.is_file()]


def test_ctrl_c_is_one_line_that_says_what_is_saved(project, run, monkeypatch, capsys):
    monkeypatch.setattr(
        tf.keras.utils, "Progbar", Mock(side_effect=[Mock(), Mock(), KeyboardInterrupt])
    )  # one an epoch
    assert run("assignment.py") == 130
    out, err = capsys.readouterr()
    assert out.count("Train Epoch") == 2
    assert re.fullmatch(r"\ninterrupted: .*saved .*last epoch printed.*\n", err)
    assert [path.name for path in (project / "outputs/model_ckpts").iterdir()] == ["vae.weights.h5"]


def test_a_slip_in_somebodys_own_code_keeps_its_traceback(run, monkeypatch):
    monkeypatch.setattr(vae, "loss_function", lambda x_hat, x, mu, logvar: tf.sqare(x_hat - x))
    with pytest.raises(AttributeError, match="sqare"):
        run("assignment.py")


def test_data_and_outputs_are_beside_code_or_in_a_flat_copys_own_folder(tmp_path):
    (tmp_path / "with_data/data").mkdir(parents=True)
    for folder, root in (("hw6/code", "hw6"), ("graded/ann", "graded/ann"), ("with_data/src", "with_data")):
        (tmp_path / folder).mkdir(parents=True)
        names = runpy.run_path(shutil.copy(PROJECT / "code/assignment.py", tmp_path / folder))
        assert [names["OUTPUTS"], names["MNIST"]] == [tmp_path / root / "outputs", tmp_path / root / "data/mnist.npz"]


SAVE_FOREVER = """
import itertools, pathlib, sys, assignment
assignment.OUTPUTS, model = pathlib.Path(sys.argv[1]), assignment.VAE(784)
for number in itertools.count(1):
    model.set_weights([0 * weights + number for weights in model.get_weights()])
    assignment.save_model_weights(model)
    print(number, flush=True)
"""


def test_weights_are_whole_whenever_the_program_is_killed(tmp_path, monkeypatch):
    folders, options = [tmp_path / name for name in "abc"], {"cwd": PROJECT / "code", "stdout": subprocess.PIPE}
    killed = [subprocess.Popen([sys.executable, "-c", SAVE_FOREVER, folder], **options) for folder in folders]
    for number, (process, folder) in enumerate(zip(killed, folders)):
        process.stdout.readline()
        time.sleep(0.07 * number)
        process.kill()
        monkeypatch.setattr(assignment, "OUTPUTS", folder)
        (saved,) = {*np.concatenate([w.ravel() for w in assignment.load_weights(VAE(784)).get_weights()])}
        assert saved - int([1, *process.communicate()[0].split()][-1]) in (0, 1)


# Grades


@pytest.fixture
def outputs(tmp_path, monkeypatch):
    monkeypatch.setattr(assignment, "OUTPUTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["evaluate.py"])
    return tmp_path


@pytest.mark.parametrize("make", [VAE, CVAE])
def test_the_two_terms_are_the_loss(make):
    model, digits = make(784), RNG.integers(0, 10, 20)
    for layer, bias in ((model.mu_layer, 2.0), (model.logvar_layer, 0.0)):  # N(2, 1): a KL of 2² / 2 in each dimension
        layer.set_weights([np.zeros((model.hidden_dim, 15)), np.full(15, bias)])
    images = RNG.integers(0, 256, (20, 28, 28), np.uint8)
    tf.keras.utils.set_random_seed(0)
    bce, kl = evaluate.elbo_terms(model, images, digits)
    tf.keras.utils.set_random_seed(0)
    x = images[:, None] / np.float32(255)
    np.testing.assert_allclose(bce, bce_function(model(x, *[np.eye(10)[digits]][: make is CVAE])[0], x) / 20, rtol=1e-5)
    np.testing.assert_allclose(kl, 15 * 2, rtol=1e-4)


def test_samples_are_counted_as_the_classifier_sees_them(monkeypatch, outputs, capsys):
    """The decoder writes the digit asked for into the first pixels, misprints 7 as 1; the classifier reads them."""

    def decoder(z):
        np.testing.assert_allclose(np.std(z[::100, :4000], axis=1), 1, atol=0.06)  # a narrower z would look better
        digit = np.argmax(z[:, 4000:], axis=1)
        samples = RNG.random((len(z), 1, 28, 28), np.float32)
        samples[:, 0, 0] = np.where(digit == 7, 1, digit)[:, np.newaxis] / 10
        return samples

    monkeypatch.setattr(evaluate, "SAMPLES", 1000)
    monkeypatch.setattr(evaluate, "classify", lambda _, images: np.rint(images[:, 0, 0] * 10).astype(int))
    images, labels = RNG.integers(0, 256, (1000, 28, 28)).astype(np.uint8), np.arange(1000) % 10
    images[:, 0] = 0  # are seen as zeros
    cvae = argparse.Namespace(num_classes=10, latent_size=4000, decoder=decoder)
    assert evaluate.grade_samples(cvae, None, images, labels) == pytest.approx(0.9)
    printed = capsys.readouterr().out
    assert "accuracy 90.00% over 1,000 samples, 0.0% for the worst digit" in printed
    assert "real test images: 10.00%" in printed
    assert (outputs / "evaluate_cvae.png").exists()


def test_main_grades_what_is_saved_on_all_test_images_and_says_how_to_train_the_rest(outputs, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "elbo_terms", lambda model, images, labels: (110.5, len(images) / 1000))
    assignment.save_model_weights(VAE(784))
    with pytest.raises(SystemExit, match="1"):
        evaluate.main()
    printed, missing = capsys.readouterr()
    assert "VAE: loss 120.50" in printed and "FAIL  VAE loss below 120" in printed and "CVAE loss" not in printed
    assert "cvae.weights.h5 is missing" in missing and "--is_cvae" in missing


def test_a_damaged_classifier_is_named(monkeypatch, outputs):
    whole = evaluate.CLASSIFIER.read_bytes()
    monkeypatch.setattr(evaluate, "CLASSIFIER", outputs / "classifier.npz")
    for content in (b"", whole[:-99], whole[:9999] + b"?" + whole[10_000:]):
        evaluate.CLASSIFIER.write_bytes(content)
        with pytest.raises(OSError, match=r"classifier\.npz is missing or damaged.*--train_classifier"):
            evaluate.load_classifier()


def test_a_short_training_on_real_images_listens_to_the_digit_asked_for(outputs, capsys):
    """300 steps give 99% and a loss of 137; without the strong label rows 50%, and 40% with no start of our own."""
    tf.keras.utils.set_random_seed(0)
    model, loader = CVAE(784), assignment.load_mnist(128, buffer_size=60_000).take(100)
    args = argparse.Namespace(learning_rate=1e-3, num_epochs=10)
    losses = [assignment.train_vae(model, loader, args, is_cvae=True) / len(loader) for _ in range(3)]
    assert losses[2] < 155 < losses[1]
    assignment.save_model_weights(model)
    with pytest.raises(SystemExit, match="1"):
        evaluate.main()
    printed = capsys.readouterr().out
    assert "FAIL  CVAE loss below 120" in printed and "pass  CVAE accuracy above 90%" in printed
    assert float(re.search(r"real test images: ([\d.]+)%", printed)[1]) >= 99.2


@pytest.mark.slow
@pytest.mark.parametrize("loop", ["train_vae's Adam", "one Adam at 1e-3", "a new Adam at 1e-3 each epoch"])
def test_ten_epochs_are_what_the_handout_asks_for_and_more(loop):
    """Whether `train_vae` is called with `num_epochs` of 10 or ten times with 1, or trains with somebody's own Adam."""
    tf.keras.utils.set_random_seed(0)
    cvae, loader = CVAE(784), assignment.load_mnist(1024, buffer_size=60_000)
    args = argparse.Namespace(num_epochs=1, learning_rate=1e-3)
    for model in (VAE(784), cvae):
        for epoch in range(10):
            if loop.startswith("a new") or (loop.startswith("one") and epoch == 0):
                model.compile(optimizer=tf.keras.optimizers.Adam(1e-3))
            loss = assignment.train_vae(model, loader, args, is_cvae=model is cvae) / len(loader)
        print(f"\n{loop}: {type(model).__name__} {loss:.1f}")
        assert loss < 120
    digits = np.repeat(np.arange(10), 1000)
    seen = evaluate.classify(evaluate.load_classifier(), assignment.generate_digits(cvae, digits, 15))
    print(f"\n{loop}: accuracy {np.mean(seen == digits):.2%}")
    assert np.mean(seen == digits) > 0.95  # the handout asks for 90%; where the digit hides in z it is 65%
