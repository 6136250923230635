"""evaluate.py: a grade that takes nothing but a model's outputs from what it grades."""

import re
import runpy
from unittest.mock import Mock

import assignment
import evaluate
import numpy as np
import pytest
import tensorflow as tf
import vae
from vae import CVAE, VAE

IMAGES, LABELS = (array[:40] for array in assignment.read_mnist()[1])


# The loss


@pytest.mark.parametrize(("x_hat", "mu", "logvar"), [(0.5, 1, 0), (0.25, 0, 2)])
def test_the_loss_is_reckoned_from_the_outputs_whatever_vae_py_says(x_hat, mu, logvar, monkeypatch):
    monkeypatch.setattr(vae, "bce_function", lambda x_hat, x: np.nan)  # and so is the loss of vae.py
    white = IMAGES.mean() / 255
    bce = -784 * (white * np.log(x_hat) + (1 - white) * np.log(1 - x_hat))
    kl = -15 / 2 * (1 + logvar - mu**2 - np.exp(logvar))
    outputs = [tf.fill((40, size), tf.constant(o, tf.float16)) for size, o in ((784, x_hat), (15, mu), (15, logvar))]
    model = Mock(spec=["input_size"], input_size=784, return_value=outputs)
    assert evaluate.elbo_terms(model, IMAGES, LABELS) == pytest.approx((bce, kl))


# The samples


def test_each_digit_has_its_share_of_right_samples_of_all_that_were_asked_for(monkeypatch, capsys):
    digits = np.repeat(np.arange(10), 1000)
    in_digit = np.tile(np.arange(1000), 10)
    predicted = np.where(in_digit < 10 * digits, (digits + 1) % 10, digits)  # of digit k, k% are taken for the next
    monkeypatch.setattr(evaluate, "classify", lambda classifier, images: predicted if len(images) == 10_000 else LABELS)
    assert evaluate.grade_samples(CVAE(784), None, IMAGES, LABELS) == pytest.approx(0.955)
    printed = capsys.readouterr().out
    assert "accuracy 95.50% of 10,000 samples, worst digit 91.0%" in printed
    assert re.findall(r"(\d): ([\d.]+)%", printed) == [(str(k), f"{100 - k:.1f}") for k in range(10)]


def test_the_confusion_matrix_has_a_row_for_each_digit_asked_for(figures):
    evaluate.draw_confusion(np.zeros((4, 28, 28)), np.array([3, 3, 3, 5]), predicted=np.array([8, 8, 3, 5]))
    matrix, *samples = figures[0].axes
    counts = {text.get_position(): text.get_text() for text in matrix.texts if text.get_text()}
    assert counts == {(8, 3): "2", (3, 3): "1", (5, 5): "1"}
    assert (matrix.get_xlabel(), matrix.get_ylabel()) == ("predicted digit", "digit asked for")
    assert [axes.get_title() for axes in samples] == ["3→8", "3→8"]


def test_the_same_weights_get_the_same_samples_whatever_is_saved_beside_them(ending, monkeypatch):
    monkeypatch.setattr(evaluate, "classify", Mock(side_effect=lambda classifier, images: np.zeros(len(images), int)))
    for make in (CVAE, VAE):
        assignment.save_model_weights(make(784))
        ending(evaluate.main)
    (_, first), (_, second) = (call[0] for call in evaluate.classify.call_args_list[::2])
    np.testing.assert_array_equal(first, second)


# The grade


VERDICTS = [(119, 0.91, "pass pass"), (121, 0.91, "FAIL pass"), (np.nan, 0.91, "FAIL pass"), (99, 0.89, "pass FAIL")]


@pytest.mark.parametrize(("loss", "accuracy", "verdicts"), VERDICTS)
def test_a_grade_is_what_the_handout_asks_for_of_what_is_saved(ending, monkeypatch, capsys, loss, accuracy, verdicts):
    monkeypatch.setattr(evaluate, "elbo_terms", lambda *_: (loss - 10, 10))
    monkeypatch.setattr(evaluate, "grade_samples", lambda *_: accuracy)
    assignment.save_model_weights(CVAE(784))
    assert ending(evaluate.main) == ("FAIL" in verdicts)
    assert re.findall("pass|FAIL", capsys.readouterr().out) == verdicts.split()


def test_nothing_saved_fails_and_is_named(ending, capsys):
    assert ending(evaluate.main) == 1
    assert re.fullmatch(r"(.*vae\.weights\.h5 is missing.*\n){2}", capsys.readouterr().err)


def test_weights_of_another_latent_size_are_graded_with_the_flag(ending, capsys):
    assignment.save_model_weights(VAE(784, latent_size=3))
    ending(evaluate.main, "--latent_size 3")
    assert "VAE: loss" in capsys.readouterr().out


def test_weights_that_cannot_be_read_end_the_program_with_one_line(ending):
    assignment.weights_path(VAE(784)).write_text("<html>")
    error = ending(lambda: runpy.run_path(evaluate.__file__, run_name="__main__"))
    assert re.fullmatch(r"error: .*vae\.weights\.h5 is damaged.*", error)


# The classifier


def test_a_classifier_is_trained_again_where_there_is_no_data_and_a_damaged_one_is_named(monkeypatch, tmp_path):
    (images, labels), (test_images, test_labels) = assignment.read_mnist()
    monkeypatch.setattr(assignment, "read_mnist", lambda: ((images[:2000], labels[:2000]), None))
    monkeypatch.setattr(evaluate, "CLASSIFIER", tmp_path / "data" / "classifier.npz")
    evaluate.train_classifier()
    assert 0.9 < evaluate.accuracy(evaluate.classify(evaluate.load_classifier(), test_images / 255), test_labels) < 1
    evaluate.CLASSIFIER.write_bytes(evaluate.CLASSIFIER.read_bytes()[:-99])
    with pytest.raises(OSError, match=r"classifier\.npz cannot be read.*--train_classifier"):
        evaluate.load_classifier()
