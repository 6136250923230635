"""Grade the saved weights: each model's test loss, and how often a classifier recognizes the requested digit.

The handout limits the training loss, which can be up to 2 nats higher than the test loss.
The exit status is 0 if weights are saved and every saved model meets the requirements, else 1.
"""

import argparse
import sys

import assignment
from assignment import HANDOUT_ACCURACY, HANDOUT_LOSS, NUM_CLASSES, is_conditional, model_inputs
from matplotlib.figure import Figure
import numpy as np
import tensorflow as tf
from vae import CVAE, VAE

CLASSIFIER = assignment.MNIST.with_name("classifier.npz")


def elbo_terms(model, images, labels):
    """Compute the two terms of the loss on images and labels as returned by `read_mnist`.

    The formulas of vae.py are repeated here, in float64, so that a bug there does not affect them.

    Returns:
        Two floats, the BCE per image and the KL divergence per image.
    """
    bce = kl = 0
    # A convolutional model would need 2 GB for all images at once.
    for x, y in tf.data.Dataset.from_tensor_slices((images / 255, labels)).batch(1000).as_numpy_iterator():
        outputs = model(*model_inputs(model, x[:, np.newaxis], y, is_conditional(model)))
        x_hat, mu, logvar = (tf.cast(output, tf.float64).numpy() for output in outputs)
        x_hat = x_hat.reshape(x.shape).clip(1e-7, 1 - 1e-7)
        bce -= np.sum(x * np.log(x_hat) + (1 - x) * np.log(1 - x_hat))
        kl -= 0.5 * np.sum(1 + logvar - mu**2 - np.exp(logvar))
    return bce / len(images), kl / len(images)


def save_reconstructions(model, images, labels):
    """Save a picture of ten test images, one per digit, above their reconstructions; return the PNG's path."""
    _, first = np.unique(labels, return_index=True)
    inputs = model_inputs(model, images[first][:, np.newaxis] / 255, labels[first], is_conditional(model))
    x_hat, _, _ = model(*inputs)
    name = f"evaluate_{type(model).__name__.lower()}_reconstructions"
    return assignment.save_grid(name, np.concatenate([inputs[0], np.reshape(x_hat, inputs[0].shape)]), rows=2)


def new_classifier():
    """Return a small convolutional network that maps images (N, 28, 28) in [0, 1] to probabilities (N, 10)."""
    layers = tf.keras.layers
    layout = {"data_format": "channels_last"}  # overrides keras.json
    stages = [tf.keras.Input((28, 28)), layers.Reshape((28, 28, 1))]
    for filters in (32, 64):
        stages += [layers.Conv2D(filters, 3, activation="relu", **layout), layers.MaxPooling2D(**layout)]
    stages += [layers.Flatten(**layout), layers.Dropout(0.3), layers.Dense(128, activation="relu")]
    return tf.keras.Sequential([*stages, layers.Dropout(0.3), layers.Dense(NUM_CLASSES, activation="softmax")])


def train_classifier():
    """Train a classifier on the training images and save its weights to data/classifier.npz."""
    CLASSIFIER.parent.mkdir(exist_ok=True)  # missing if only the code was copied
    (images, labels), _ = assignment.read_mnist()
    classifier = new_classifier()
    rate = tf.keras.optimizers.schedules.CosineDecay(2e-3, 8 * len(images) // 128)
    classifier.compile(tf.keras.optimizers.Adam(rate), loss="sparse_categorical_crossentropy", jit_compile=False)
    classifier.fit(images / np.float32(255), labels, batch_size=128, epochs=8, verbose=2)
    np.savez_compressed(CLASSIFIER, *(weights.astype(np.float16) for weights in classifier.get_weights()))


def load_classifier():
    """Load the bundled classifier.

    Raises:
        OSError: If data/classifier.npz is missing or damaged, or cannot be read.
    """
    classifier = new_classifier()
    try:
        with np.load(CLASSIFIER) as arrays:
            classifier.set_weights([arrays[name] for name in arrays.files])
    except PermissionError:
        raise
    except Exception as error:  # numpy, zipfile and Keras raise many exception types
        remedy = f"run `python evaluate.py --train_classifier` in {assignment.CODE}"
        raise OSError(f"{CLASSIFIER} cannot be read ({error}): {remedy}") from error
    return classifier


def classify(classifier, images):
    """Return the predicted digits (N,) of images (N, ..., 28, 28) in [0, 1]."""
    return classifier.predict(np.reshape(images, (-1, 28, 28)), batch_size=1000, verbose=0).argmax(axis=1)


def save_confusion(samples, digits, predicted):
    """Save a figure of the confusion matrix and up to 50 misclassified samples; return the PNG's path.

    Args:
        samples: Generated images (N, 28, 28) in [0, 1].
        digits: The requested digits (N,).
        predicted: The predicted digits (N,).
    """
    path = assignment.output_path("evaluate_cvae.png")
    figure = Figure(figsize=(11, 5.5), dpi=150, layout="constrained")
    left, right = figure.subfigures(1, 2)
    ticks = range(NUM_CLASSES)
    axes = left.add_subplot(xticks=ticks, yticks=ticks, xlabel="predicted digit", ylabel="requested digit")
    axes.set_title(f"accuracy {np.mean(predicted == digits):.2%} over {len(digits):,} samples (logarithmic colors)")
    confusion = tf.math.confusion_matrix(digits, predicted, NUM_CLASSES).numpy()
    axes.imshow(np.log1p(confusion), cmap="Blues")
    for (row, column), count in np.ndenumerate(confusion):
        axes.text(column, row, count or "", ha="center", va="center", color="white" if row == column else "black")
    wrong = np.flatnonzero(predicted != digits)
    shown = wrong[np.linspace(0, len(wrong) - 1, min(50, len(wrong))).astype(int)]  # evenly spaced
    right.suptitle(f"{len(shown)} of the {len(wrong)} misclassified samples: requested → predicted")
    for place, sample in enumerate(shown, start=1):
        axes = right.add_subplot(5, 10, place, frame_on=False, xticks=[], yticks=[])
        axes.set_title(f"{digits[sample]}→{predicted[sample]}", fontsize=8)
        axes.imshow(samples[sample], cmap="gray_r", vmin=0, vmax=1)
    figure.savefig(path)
    return path


def grade_samples(cvae, classifier, images, labels):
    """Generate 1,000 samples of each digit, print how many are recognized, and save their confusion matrix.

    Args:
        cvae: A trained CVAE.
        classifier: The classifier, as returned by `load_classifier`.
        images, labels: Test images and labels, as returned by `read_mnist`.

    Returns:
        The accuracy: the share of samples, from 0 to 1, whose predicted digit is the requested one.
    """
    digits = np.repeat(np.arange(NUM_CLASSES), 1000)
    batches = np.split(digits, NUM_CLASSES)
    samples = np.reshape([assignment.generate_digits(cvae, batch, cvae.latent_size) for batch in batches], (-1, 28, 28))
    predicted = classify(classifier, samples)
    overall = np.mean(predicted == digits)
    by_digit = np.mean(np.split(predicted == digits, NUM_CLASSES), axis=1)
    print(f"CVAE: accuracy {overall:.2%} on {len(digits):,} samples, worst digit {min(by_digit):.1%}")
    print("  per digit:", *(f"{digit}: {share:.1%}" for digit, share in enumerate(by_digit)), sep="  ")
    print(f"  (classifier accuracy on test images: {np.mean(classify(classifier, images / 255) == labels):.2%})")
    print(f"  Wrote outputs/{save_confusion(samples, digits, predicted).name}")
    return overall


def main():
    """Grade the saved weights and exit with the status above, or retrain the classifier."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--latent_size", type=int, default=15, help="latent size of the saved weights")
    parser.add_argument("--train_classifier", action="store_true", help="retrain data/classifier.npz; do not grade")
    args = parser.parse_args()
    if args.train_classifier:
        tf.keras.utils.set_random_seed(0)
        return train_classifier()
    _, (images, labels) = assignment.read_mnist()
    met = {}
    for make in (VAE, CVAE):
        tf.keras.utils.set_random_seed(0)  # makes the grades independent of each other
        try:
            model = assignment.load_weights(make(28 * 28, latent_size=args.latent_size))
        except FileNotFoundError as error:
            print(error, file=sys.stderr)
            continue
        bce, kl = elbo_terms(model, images, labels)
        print(f"{make.__name__}: loss {bce + kl:.2f} on the test images, of which BCE {bce:.2f} and KL {kl:.2f}")
        met[f"{make.__name__} test loss below {HANDOUT_LOSS}"] = bce + kl < HANDOUT_LOSS
        if is_conditional(model):
            accuracy = grade_samples(model, load_classifier(), images, labels)
            met[f"CVAE accuracy above {HANDOUT_ACCURACY:.0%}"] = accuracy > HANDOUT_ACCURACY
        print(f"  Wrote outputs/{save_reconstructions(model, images, labels).name}")
    sys.stdout.writelines(f"{'pass' if ok else 'FAIL'}  {what}\n" for what, ok in met.items())
    sys.exit(0 if met and all(met.values()) else 1)


if __name__ == "__main__":
    try:
        main()
    except (OSError, assignment.DataError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
