"""Grade the saved weights: the loss of each model, and the accuracy of a CVAE's samples as a classifier sees them.

The losses are of the test images; the handout asks for those of the training images, which are much the same.
The exit status is 0 only if all that was measured is what the handout asks for.
"""

import argparse
import sys

from assignment import HANDOUT_LOSS, MNIST, NUM_CLASSES, generate_digits, load_weights, one_hot, output_path, read_mnist
from matplotlib.figure import Figure
import numpy as np
import tensorflow as tf
from vae import CVAE, VAE, bce_function, loss_function

CLASSIFIER = MNIST.with_name("classifier.npz")
HANDOUT_ACCURACY = 0.9
SAMPLES = 10_000


def elbo_terms(model, images, labels):
    """The two terms of the loss on images as `read_mnist` gives them: (BCE per image, KL per image), floats."""
    x = tf.constant(images[:, np.newaxis] / np.float32(255))
    x_hat, mu, logvar = model(x, one_hot(labels, NUM_CLASSES)) if isinstance(model, CVAE) else model(x)
    bce = float(bce_function(x_hat, x)) / len(x)
    return bce, float(loss_function(x_hat, x, mu, logvar)) - bce


def new_classifier():
    """A small convolutional network from images (N, 28, 28) in [0, 1] to logits (N, 10)."""
    layers, order = tf.keras.layers, {"data_format": "channels_last"}  # whatever somebody's keras.json says
    stages = [tf.keras.Input((28, 28)), layers.Reshape((28, 28, 1))]
    for filters in (32, 64):
        stages += [layers.Conv2D(filters, 3, activation="relu", **order), layers.MaxPooling2D(**order)]
    stages += [layers.Flatten(**order), layers.Dropout(0.3), layers.Dense(128, activation="relu")]
    return tf.keras.Sequential([*stages, layers.Dropout(0.3), layers.Dense(NUM_CLASSES)])


def train_classifier(epochs=8, batch_size=128):
    """Train a classifier on the training images, and write its weights to data/classifier.npz."""
    images, labels = read_mnist("train")
    classifier = new_classifier()
    rate = tf.keras.optimizers.schedules.CosineDecay(2e-3, epochs * len(images) // batch_size)
    loss = tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    classifier.compile(optimizer=tf.keras.optimizers.Adam(rate), loss=loss, jit_compile=False)
    classifier.fit(images / np.float32(255), labels, batch_size=batch_size, epochs=epochs, verbose=2)
    np.savez_compressed(CLASSIFIER, *(weights.astype(np.float16) for weights in classifier.get_weights()))


def load_classifier():
    """The classifier that the project brings.

    Raises:
        OSError: data/classifier.npz is missing or damaged.
    """
    classifier = new_classifier()
    try:
        with np.load(CLASSIFIER) as arrays:
            classifier.set_weights([arrays[name] for name in arrays.files])
    except Exception as error:  # numpy, zipfile and Keras raise a dozen kinds
        remedy = "restore it with `git checkout -- data/classifier.npz`, or `python evaluate.py --train_classifier`"
        raise OSError(f"{CLASSIFIER} is missing or damaged ({error}): {remedy}") from error
    return classifier


def classify(classifier, images):
    """The digits (N,) that the classifier sees in images (N, ..., 28, 28) in [0, 1]."""
    return classifier.predict(np.reshape(images, (-1, 28, 28)), batch_size=1000, verbose=0).argmax(axis=1)


def draw_confusion(samples, digits, predicted, confusion):
    """Draw the confusion matrix beside up to 50 samples that are seen as another digit; returns the PNG's path."""
    figure, path = Figure(figsize=(11, 5.5), dpi=150, layout="constrained"), output_path("evaluate_cvae.png")
    left, right = figure.subfigures(1, 2)
    axes = left.add_subplot(xticks=range(NUM_CLASSES), yticks=range(NUM_CLASSES), xlabel="seen", ylabel="asked for")
    axes.set_title(f"accuracy {np.mean(predicted == digits):.2%} over {len(digits):,} samples")
    axes.imshow(np.log1p(confusion), cmap="Blues")
    for (row, column), count in np.ndenumerate(confusion):
        axes.text(column, row, count or "", ha="center", va="center", color="white" if row == column else "black")
    wrong = np.flatnonzero(predicted != digits)
    shown = wrong[np.linspace(0, len(wrong) - 1, min(50, len(wrong))).astype(int)]  # some of every digit
    right.suptitle(f"{len(shown)} of the {len(wrong)} wrong ones: asked for → seen")
    for place, sample in enumerate(shown, start=1):
        axes = right.add_subplot(5, 10, place, frame_on=False, xticks=[], yticks=[])
        axes.set_title(f"{digits[sample]}→{predicted[sample]}", fontsize=8)
        axes.imshow(samples[sample], cmap="gray_r", vmin=0, vmax=1)
    figure.savefig(path)
    return path


def grade_samples(cvae, classifier, images, labels):
    """Print and draw what the classifier sees in samples of `cvae`.

    Args:
        cvae: a trained CVAE.
        classifier: as `load_classifier` gives.
        images, labels: real ones, as `read_mnist` gives them.

    Returns:
        The accuracy: the share of samples that the classifier sees as the digit asked for, from 0 to 1.
    """
    digits = np.repeat(np.arange(NUM_CLASSES), SAMPLES // NUM_CLASSES)
    samples = np.reshape(generate_digits(cvae, digits, cvae.latent_size), (-1, 28, 28))
    predicted = classify(classifier, samples)
    confusion = tf.math.confusion_matrix(digits, predicted, NUM_CLASSES).numpy()
    by_digit = np.diag(confusion) / confusion.sum(axis=1)
    print(f"CVAE: accuracy {by_digit.mean():.2%} over {SAMPLES:,} samples, {by_digit.min():.1%} for the worst digit")
    print("  digit    " + "".join(f"{digit:7}" for digit in range(NUM_CLASSES)))
    print("  accuracy " + "".join(f"{100 * share:7.1f}" for share in by_digit))
    print(f"  (the classifier's on real test images: {np.mean(classify(classifier, images / 255) == labels):.2%})")
    print(f"  drawn in outputs/{draw_confusion(samples, digits, predicted, confusion).name}")
    return by_digit.mean()


def main():
    """Grade the weights in outputs/; exit with status 1 if the handout asks for more."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--latent_size", type=int, default=15, help="what the weights were trained with")
    parser.add_argument("--train_classifier", action="store_true", help="make data/classifier.npz again; no grade")
    args = parser.parse_args()
    tf.keras.utils.set_random_seed(0)  # the same weights get the same grade
    if args.train_classifier:
        return train_classifier()
    images, labels = read_mnist("test")
    met, missing = {}, []
    for make in (VAE, CVAE):
        try:
            model = load_weights(make(28 * 28, latent_size=args.latent_size))
        except FileNotFoundError as error:
            missing.append(f"{error}")
            continue
        name, (bce, kl) = make.__name__, elbo_terms(model, images, labels)
        print(f"{name}: loss {bce + kl:.2f} on the test images, of which BCE {bce:.2f} and KL {kl:.2f}")
        met[f"{name} loss below {HANDOUT_LOSS}"] = bce + kl < HANDOUT_LOSS
        if make is CVAE:
            accuracy = grade_samples(model, load_classifier(), images, labels)
            met[f"CVAE accuracy above {HANDOUT_ACCURACY:.0%}"] = accuracy > HANDOUT_ACCURACY
    if not met:
        raise FileNotFoundError(", and ".join(missing))
    sys.stderr.writelines(f"{line}\n" for line in missing)  # a redirected stdout may have no letters for the path
    print("The handout asks for:", *(f"  {'pass' if ok else 'FAIL'}  {what}" for what, ok in met.items()), sep="\n")
    sys.exit(0 if all(met.values()) else 1)


if __name__ == "__main__":
    try:
        main()
    except OSError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
