"""Tests of evaluate.py: a grade depends only on the outputs of the models."""

import re
import runpy
from unittest.mock import Mock

import assignment
import evaluate
from matplotlib.image import imread
import numpy as np
import pytest
import vae
from vae import CVAE, VAE

IMAGES, LABELS = (array[:40] for array in assignment.read_mnist()[1])


@pytest.fixture
def few_images(monkeypatch):
    """Use the same 40 images for training and testing."""
    monkeypatch.setattr(assignment, "read_mnist", lambda: ((IMAGES, LABELS), (IMAGES, LABELS)))


def program():
    runpy.run_path(evaluate.__file__, run_name="__main__")


# The loss


@pytest.mark.parametrize(("x_hat", "mu", "logvar"), [(0.5, 1, 0), (0.25, 0, 2), (0, 0, 0)])
def test_losses_are_computed_from_the_outputs_only(x_hat, mu, logvar, monkeypatch):
    monkeypatch.setattr(vae, "bce_function", lambda x_hat, x: np.nan)  # the loss of vae.py is then nan too
    images, labels = np.repeat(IMAGES, 26, axis=0), np.repeat(LABELS, 26)  # more than a batch of 1,000
    white, p = images.mean() / 255, np.clip(x_hat, 1e-7, 1)
    bce = -784 * (white * np.log(p) + (1 - white) * np.log(1 - p))
    kl = -15 / 2 * (1 + logvar - mu**2 - np.exp(logvar))

    model = Mock(spec=["input_size"], input_size=784)
    outputs = ((784, x_hat), (15, mu), (15, logvar))
    model.side_effect = lambda x: [np.full((len(x), size), output, np.float16) for size, output in outputs]
    assert evaluate.elbo_terms(model, images, labels) == pytest.approx((bce, kl))


# The samples and the pictures


def test_accuracy_is_reported_for_all_samples_and_for_each_digit(figures, monkeypatch, capsys):
    digits = np.repeat(np.arange(10), 1000)
    # k% of the samples of digit k are misclassified.
    predicted = np.where(np.tile(np.arange(1000), 10) < 10 * digits, (digits + 1) % 10, digits)
    monkeypatch.setattr(evaluate, "classify", lambda classifier, images: predicted if len(images) == 10_000 else LABELS)
    assert evaluate.grade_samples(CVAE(784), None, IMAGES, LABELS) == pytest.approx(0.955)
    printed = capsys.readouterr().out
    assert "accuracy 95.50% on 10,000 samples, worst digit 91.0%" in printed
    assert re.findall(r"(\d): ([\d.]+)%", printed) == [(str(k), f"{100 - k:.1f}") for k in range(10)]


def test_confusion_matrix_has_requested_digits_as_rows(figures):
    evaluate.save_confusion(np.zeros((4, 28, 28)), np.array([3, 3, 3, 5]), predicted=np.array([8, 8, 3, 5]))
    matrix, *samples = figures[0].axes
    counts = {text.get_position(): text.get_text() for text in matrix.texts if text.get_text()}
    assert counts == {(8, 3): "2", (3, 3): "1", (5, 5): "1"}
    assert (matrix.get_xlabel(), matrix.get_ylabel()) == ("predicted digit", "requested digit")
    assert [axes.get_title() for axes in samples] == ["3→8", "3→8"]


def test_reconstructions_are_in_a_row_under_their_test_images():
    """The 40 images contain no 8, so there are nine columns."""
    model = CVAE(784)
    model.call = lambda x, c: (x / 2, None, None)
    first = np.hstack([IMAGES[digit == LABELS][0] for digit in np.unique(LABELS)]) / 255
    picture = imread(evaluate.save_reconstructions(model, IMAGES, LABELS))[1::3, 1::3, 0]
    np.testing.assert_allclose(picture, np.concatenate([first, first / 2]), atol=1.5 / 255)


# The grade


def test_grade_does_not_depend_on_other_saved_models(few_images, figures, exit_argument, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "classify", lambda _, images: np.sum(images, axis=(1, 2)).astype(int) % 10)
    printed = []
    for make in (CVAE, VAE):
        assignment.save_model_weights(make(784))
        exit_argument(evaluate.main)
        printed.append(re.findall(r"CVAE: .*|per digit: .*", capsys.readouterr().out))
    assert printed[0] == printed[1] and len(printed[0]) == 3


VERDICTS = [(119, 0.91, "pass pass"), (121, 0.91, "FAIL pass"), (np.nan, 0.91, "FAIL pass"), (99, 0.89, "pass FAIL")]


@pytest.mark.parametrize(("loss", "accuracy", "verdicts"), VERDICTS)
def test_verdicts_decide_the_exit_status(few_images, exit_argument, monkeypatch, capsys, loss, accuracy, verdicts):
    monkeypatch.setattr(evaluate, "elbo_terms", lambda *_: (loss - 10, 10))
    monkeypatch.setattr(evaluate, "grade_samples", lambda *_: accuracy)
    assignment.save_model_weights(CVAE(784))
    assert exit_argument(evaluate.main) == ("FAIL" in verdicts)
    requirements = "(pass|FAIL)  CVAE test loss below 120\n(pass|FAIL)  CVAE accuracy above 90%\n"
    assert re.search(requirements, capsys.readouterr().out).groups() == tuple(verdicts.split())


def test_missing_weights_are_reported_and_exit_with_1(few_images, exit_argument, capsys):
    assert exit_argument(evaluate.main) == 1
    assert re.fullmatch(r"(.*vae\.weights\.h5 is missing.*\n){2}", capsys.readouterr().err)


def test_latent_size_flag_loads_weights_of_that_size(few_images, exit_argument, capsys):
    assignment.save_model_weights(VAE(784, latent_size=3))
    exit_argument(evaluate.main, "--latent_size 3")
    assert "VAE: loss" in capsys.readouterr().out


def test_user_errors_end_the_program_with_one_line(exit_argument, monkeypatch):
    monkeypatch.setattr(assignment, "read_mnist", lambda: (None, (IMAGES, LABELS + 1)))
    assignment.save_model_weights(CVAE(784))
    assert re.fullmatch("error: labels must be .*", exit_argument(program))
    assignment.weights_path(VAE(784)).write_text("<html>")
    assert re.fullmatch(r"error: .*vae\.weights\.h5 is damaged.*", exit_argument(program))


def test_interrupt_exits_with_status_130(exit_argument, monkeypatch):
    monkeypatch.setattr(assignment, "read_mnist", Mock(side_effect=KeyboardInterrupt))
    assert exit_argument(program) == 130


# The classifier


def test_train_classifier_creates_the_data_folder(monkeypatch, tmp_path):
    (images, labels), (test_images, test_labels) = assignment.read_mnist()
    monkeypatch.setattr(assignment, "read_mnist", lambda: ((images[:1000], labels[:1000]), None))
    monkeypatch.setattr(evaluate, "CLASSIFIER", tmp_path / "data" / "classifier.npz")
    evaluate.train_classifier()
    predicted = evaluate.classify(evaluate.load_classifier(), test_images[:2000] / 255)
    assert 0.8 < np.mean(predicted == test_labels[:2000]) < 1  # 0.87 with so few training images


def test_damaged_classifier_is_reported(monkeypatch, tmp_path):
    monkeypatch.setattr(evaluate, "CLASSIFIER", tmp_path / "classifier.npz")
    evaluate.CLASSIFIER.write_text("<html>404 Not Found</html>")
    with pytest.raises(OSError, match=r"classifier\.npz cannot be read.*evaluate\.py --train_classifier` in "):
        evaluate.load_classifier()


@pytest.mark.parametrize("read", [assignment.read_mnist, evaluate.load_classifier])
def test_file_without_read_permission_is_not_called_damaged(read, monkeypatch):
    monkeypatch.setattr(np, "load", Mock(side_effect=PermissionError("denied")))
    with pytest.raises(PermissionError, match="denied"):
        read()
