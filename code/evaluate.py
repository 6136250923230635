"""Grade the saved weights: the loss of each model, and how many of a CVAE's samples a classifier reads.

The losses are those of the test images; the handout's bar is for the training images, on which they are a little lower.
The exit status is 0 only if every bar that was measured holds.
"""

import argparse
import sys

import numpy as np
import tensorflow as tf
from assignment import (
    HANDOUT_LOSS,
    INPUT_SIZE,
    NUM_CLASSES,
    generate_digits,
    load_weights,
    one_hot,
    read_mnist,
    save_figure,
    save_model_weights,
    tile_images,
    weights_path,
)
from matplotlib.figure import Figure
from vae import CVAE, VAE, bce_function, kl_divergence

HANDOUT_ACCURACY = 0.9  # of the samples, the classifier has to read more than this share as the digit asked for
SAMPLES = 10_000


def elbo_terms(model, images, labels):
    """The two terms of the loss on images as `read_mnist` gives them: (BCE per image, KL per image), floats."""
    x = tf.constant(images[:, np.newaxis] / np.float32(255))
    condition = [one_hot(labels, NUM_CLASSES)] if isinstance(model, CVAE) else []
    x_hat, mu, logvar = model(x, *condition)
    return float(bce_function(x_hat, x)) / len(x), float(kl_divergence(mu, logvar)) / len(x)


def load_classifier():
    """A small convolutional network that reads digits: the saved one, or a new one, trained in some minutes.

    Returns:
        A `tf.keras.Model` from images (N, 28, 28), float in [0, 1], to logits (N, 10).

    Raises:
        OSError: the saved weights are damaged, or new ones cannot be written.
    """
    layers = tf.keras.layers
    classifier = tf.keras.Sequential(
        [
            layers.Reshape((28, 28, 1)),
            layers.Conv2D(32, 3, activation="relu"),
            layers.MaxPooling2D(),
            layers.Conv2D(64, 3, activation="relu"),
            layers.MaxPooling2D(),
            layers.Flatten(),
            layers.Dropout(0.3),
            layers.Dense(128, activation="relu"),
            layers.Dropout(0.3),
            layers.Dense(NUM_CLASSES),
        ],
        name="classifier",
    )
    classifier.build((None, 28, 28))
    if weights_path(classifier).exists():
        return load_weights(classifier)
    print("Training the classifier, once:", flush=True)
    images, labels = read_mnist("train")
    epochs, batch_size = 6, 128
    rate = tf.keras.optimizers.schedules.CosineDecay(2e-3, epochs * len(images) // batch_size)
    loss = tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    classifier.compile(optimizer=tf.keras.optimizers.Adam(rate), loss=loss, jit_compile=False)
    verbose = "auto" if sys.stdout.isatty() else 2
    classifier.fit(images / np.float32(255), labels, batch_size=batch_size, epochs=epochs, verbose=verbose)
    save_model_weights(classifier)
    return classifier


def recognise(classifier, images):
    """The digits (N,) that the classifier reads in images (N, ..., 28, 28) in [0, 1]."""
    return classifier.predict(np.reshape(images, (-1, 28, 28)), batch_size=1000, verbose=0).argmax(axis=1)


def spread(samples, digits, images, labels):
    """How varied samples are beside real images: their pixels' standard deviation within a digit, as a ratio.

    Args:
        samples: (N, 28, 28) in [0, 1], of the classes `digits` (N,).
        images: (M, 28, 28) in [0, 1], of the classes `labels` (M,).

    Returns:
        The ratio of the means over pixels, averaged over the digits: 1 is as varied, 0 is one picture for all.
    """
    ratios = [
        samples[digits == digit].std(axis=0).mean() / images[labels == digit].std(axis=0).mean()
        for digit in np.unique(digits)
    ]
    return float(np.mean(ratios))


def draw_confusion(samples, digits, recognised, confusion):
    """Draw the confusion matrix beside up to 50 misread samples; returns the path of outputs/evaluate_cvae.png."""
    figure = Figure(figsize=(11, 5.5), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2)
    left.imshow(np.log1p(confusion), cmap="Blues")
    for (row, column), count in np.ndenumerate(confusion):
        if count:
            left.text(column, row, count, ha="center", va="center", color="white" if row == column else "black")
    left.set(xticks=range(NUM_CLASSES), yticks=range(NUM_CLASSES), xlabel="recognised", ylabel="asked for")
    left.set_title(f"{np.trace(confusion) / len(digits):.2%} of {len(digits):,} samples recognised")

    misread = np.flatnonzero(recognised != digits)
    shown = misread[np.linspace(0, len(misread) - 1, min(50, len(misread))).astype(int)]  # some of every digit
    right.set_title(f"{len(shown)} of the {len(misread)} misread: asked for → recognised")
    right.axis("off")
    page = np.zeros((50, 1, 40, 28), np.float32)  # 12 rows of pixels under each image hold its caption
    page[: len(shown), :, :28] = samples[shown][:, np.newaxis]
    right.imshow(1 - tile_images(page, rows=5), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    for place, sample in enumerate(shown):
        x, y = place % 10 * 28 + 14, place // 10 * 40 + 34
        right.text(x, y, f"{digits[sample]}→{recognised[sample]}", ha="center", va="center", fontsize=8)
    return save_figure("evaluate_cvae", figure)


def grade_samples(cvae, classifier, images, labels):
    """Print and draw what the classifier reads in samples of `cvae`, and how varied they are beside real images.

    Args:
        cvae: a trained CVAE.
        classifier: as `load_classifier` gives.
        images, labels: real ones, as `read_mnist` gives them.

    Returns:
        Two shares of the samples, from 0 to 1, and a ratio: `accuracy`, that of the `worst` digit, and the `spread`.
    """
    images = images / np.float32(255)
    digits = np.repeat(np.arange(NUM_CLASSES), SAMPLES // NUM_CLASSES)
    samples = np.reshape(generate_digits(cvae, digits, cvae.latent_size), (-1, 28, 28))
    recognised = recognise(classifier, samples)
    confusion = tf.math.confusion_matrix(digits, recognised, NUM_CLASSES).numpy()
    by_digit = np.diag(confusion) / confusion.sum(axis=1)
    accuracy, worst, varied = by_digit.mean(), by_digit.min(), spread(samples, digits, images, labels)
    print(f"CVAE: {accuracy:.2%} of {SAMPLES:,} samples recognised, {worst:.1%} of the worst digit")
    print("  digit   " + "".join(f"{digit:7}" for digit in range(NUM_CLASSES)))
    print("  percent " + "".join(f"{100 * share:7.1f}" for share in by_digit))
    print(f"  spread of the samples within a digit, over that of real images: {varied:.3f}")
    print(f"  (the classifier reads {np.mean(recognise(classifier, images) == labels):.2%} of the real test images)")
    print(f"Wrote:\n  {draw_confusion(samples, digits, recognised, confusion)}")
    return accuracy, worst, varied


def main():
    """Grade the weights in outputs/; exit with status 1 if a bar does not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--latent_size", type=int, default=15, help="what the weights were trained with")
    args = parser.parse_args()
    if args.latent_size < 1:
        parser.error(f"argument --latent_size: must be above 0; got {args.latent_size}")
    tf.keras.utils.set_random_seed(0)  # the same weights get the same grade
    images, labels = read_mnist("test")
    bars, missing = {}, []
    for make in (VAE, CVAE):
        try:
            model = load_weights(make(INPUT_SIZE, latent_size=args.latent_size))
        except FileNotFoundError as error:
            missing.append(f"{error}")
            continue
        name, (bce, kl) = model.name.upper(), elbo_terms(model, images, labels)
        print(f"{name}: loss {bce + kl:.2f} on the test images, of which BCE {bce:.2f} and KL {kl:.2f}")
        bars[f"{name} loss below {HANDOUT_LOSS}"] = bce + kl < HANDOUT_LOSS
        if make is CVAE:
            accuracy, *_ = grade_samples(model, load_classifier(), images, labels)
            bars[f"CVAE samples recognised, more than {HANDOUT_ACCURACY:.0%}"] = accuracy > HANDOUT_ACCURACY
    if not bars:
        raise FileNotFoundError(", and ".join(missing))
    print(*missing, sep="\n")
    print("The handout's bars")
    for bar, holds in bars.items():
        print(f"  {'pass' if holds else 'FAIL'}  {bar}")
    sys.exit(0 if all(bars.values()) else 1)


if __name__ == "__main__":
    try:
        main()
    except OSError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("\ninterrupted: a classifier is saved only once it is trained", file=sys.stderr)
        sys.exit(130)
