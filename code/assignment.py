"""Train a VAE or a CVAE on MNIST, save its weights, and save pictures of what it generates."""

import argparse
import math
import os
import pathlib
import sys
import tempfile

# TensorFlow reads this when it is imported, and then logs less. Version 2.21 still prints some lines.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# A shell started from Jupyter inherits MPLBACKEND. matplotlib rejects its value if Jupyter's backend is not installed.
if os.environ.get("MPLBACKEND", "").startswith("module:") and "ipykernel" not in sys.modules:
    del os.environ["MPLBACKEND"]

from matplotlib.figure import Figure
from matplotlib.image import imsave
import numpy as np
import tensorflow as tf
from vae import CVAE, VAE, loss_function

CODE = pathlib.Path(__file__).resolve().parent
ROOT = CODE.parent if CODE.name == "code" else CODE  # graders copy only the two files, to any folder
OUTPUTS = ROOT / "outputs"
MNIST = ROOT / "data" / "mnist.npz"
TRAINING_IMAGES = 60_000
NUM_CLASSES = 10
HANDOUT_LOSS = 120  # the handout requires a lower training loss after 10 epochs, for both models
HANDOUT_ACCURACY = 0.9  # the handout requires a higher accuracy of the CVAE's samples


class DataError(ValueError):
    """Invalid images, labels, batch size or buffer size. The program prints its message without a traceback."""


def parseArguments():
    """Parse the command line into a namespace of the stencil's seven settings, and `seed` if it is given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--is_cvae", action="store_true", help="use the CVAE instead of the VAE")
    parser.add_argument("--load_weights", action="store_true", help="load the saved weights instead of training")
    parser.add_argument("--batch_size", type=int, default=1024, help="number of images per batch")
    parser.add_argument("--num_epochs", type=int, default=10, help="number of passes over the training images")
    parser.add_argument("--latent_size", type=int, default=15, help="number of latent dimensions")
    parser.add_argument("--input_size", type=int, default=28 * 28, choices=[28 * 28], help="number of pixels per image")
    parser.add_argument("--learning_rate", type=float, default=1e-3, help="peak rate at batch size 16")
    parser.add_argument("--seed", type=int, default=argparse.SUPPRESS, help="random seed")
    args = parser.parse_args()
    if not 1 <= args.batch_size <= TRAINING_IMAGES:
        parser.error(f"argument --batch_size: must be from 1 to {TRAINING_IMAGES}; got {args.batch_size}")
    for name in ("num_epochs", "latent_size", "learning_rate"):
        if not 0 < getattr(args, name) < math.inf:
            parser.error(f"argument --{name}: must be positive and finite; got {getattr(args, name)}")
    if not 0 <= getattr(args, "seed", 0) < 2**32:
        parser.error(f"argument --seed: must be from 0 to 2**32 - 1; got {args.seed}")
    return args


def one_hot(labels, class_size):
    """Convert labels to one-hot vectors.

    Args:
        labels: An array or a tensor (N,) or (N, 1) of any integer dtype.
        class_size: Number of classes.

    Returns:
        A float32 tensor (N, `class_size`).

    Raises:
        ValueError: If the labels have the wrong shape, for example because they are one-hot already.
    """
    labels = tf.cast(labels, tf.int64)
    if not any(labels.shape.is_compatible_with(shape) for shape in ([None], [None, 1])):
        raise ValueError(f"labels must have the shape (N,) or (N, 1), not one-hot; got {tuple(labels.shape)}")
    return tf.one_hot(labels[:, 0] if labels.shape.rank == 2 else labels, class_size)


def is_conditional(model):
    """Return whether a model is a CVAE. `isinstance` misses a CVAE from another vae.py."""
    return hasattr(model, "num_classes") or "cvae" in type(model).__name__.lower()


def num_classes_of(model):
    """Return the model's `num_classes`, or 10: a third-party CVAE may not store it."""
    return getattr(model, "num_classes", NUM_CLASSES)


def read_mnist():
    """Read MNIST from data/mnist.npz. If that file is missing, Keras downloads the data set.

    Returns:
        Two pairs of uint8 arrays, images (N, 28, 28) and labels (N,): 60,000 for training and 10,000 for testing.

    Raises:
        OSError: If the file is damaged, cannot be read or has pixels from 0 to 1, or if the download fails.
    """
    try:
        if not MNIST.exists():
            return tf.keras.datasets.mnist.load_data()
        with np.load(MNIST) as arrays:
            splits = tuple((arrays[f"x_{split}"], arrays[f"y_{split}"]) for split in ("train", "test"))
        if any(images.max() <= 1 for images, _ in splits):
            raise ValueError("pixels must be from 0 to 255, not from 0 to 1")
        return splits
    except PermissionError:
        raise
    except Exception as error:  # numpy, zipfile and Keras raise many exception types
        fault = "damaged" if MNIST.exists() else "missing"
        remedy = f"copy it from the repository, or run `git checkout -- data/mnist.npz` in your clone, {ROOT}"
        raise OSError(f"{MNIST} is {fault} ({error}): {remedy}") from error


def load_mnist(batch_size, buffer_size=1024):
    """Load the training images in batches, in a new random order each epoch.

    Args:
        batch_size: Number of images per batch, N. The last images of an epoch are dropped if they do not fill a batch.
        buffer_size: Size of the shuffle buffer of `tf.data`.

    Returns:
        A `tf.data.Dataset` of images (N, 1, 28, 28), float32 in [0, 1], and labels (N,), uint8.

    Raises:
        ValueError: If `batch_size` is not from 1 to the number of images, or `buffer_size` is not positive.
        OSError: As in `read_mnist`.
    """
    images, labels = map(tf.constant, read_mnist()[0])
    if not 1 <= batch_size <= len(images) or buffer_size < 1:
        raise DataError(f"batch_size must be 1 to {len(images)}, buffer_size above 0; got {batch_size}, {buffer_size}")

    def gather(indices):
        return tf.cast(tf.gather(images, indices)[:, tf.newaxis], tf.float32) / 255, tf.gather(labels, indices)

    # Shuffling and batching indices instead of images saves 5% of an epoch's time and 100 MB.
    indices = tf.data.Dataset.range(len(images)).shuffle(buffer_size).batch(batch_size, drop_remainder=True)
    options = tf.data.Options()
    options.autotune.enabled = False  # its thread can lengthen an epoch from 3 s to 5 s
    return indices.map(gather).prefetch(1).with_options(options)


class SineRate(tf.keras.optimizers.schedules.LearningRateSchedule):
    """Learning rate over `steps` steps: half a sine wave, peak · sin(pi (step + 1/2) / steps).

    The rise is a warm-up for Adam, whose moments are inaccurate at first. The fall reduces the noise of the last steps.
    A warm-up over 20 or 30% of the steps, followed by a cosine or linear decay, does not reach a lower loss.
    """

    def __init__(self, peak, steps):
        self.peak, self.steps = peak, steps

    def __call__(self, step):
        step = tf.minimum(tf.cast(step, tf.float32), self.steps - 1)
        return self.peak * tf.sin(math.pi * (step + 0.5) / self.steps)

    def get_config(self):
        return {"peak": self.peak, "steps": self.steps}


def model_inputs(model, images, labels, is_cvae):
    """Check a batch and convert it to the inputs of `model`.

    Args:
        model: A VAE, or a CVAE if `is_cvae`.
        images: Images (N, 1, H, W) in [0, 1], of any real dtype.
        labels: Integers (N,) or (N, 1) from 0 to C - 1. A VAE ignores them.
        is_cvae: Whether the model takes labels.

    Returns:
        A list of the images and, if `is_cvae`, the one-hot labels (N, C), both float32.

    Raises:
        DataError: If the images or the labels have the wrong shape or out-of-range values.
    """
    x = tf.cast(images, tf.float32)
    side = math.isqrt(model.input_size)
    if x.shape[1:] != (1, side, side) or not len(x):
        raise DataError(f"images must have the shape (N, 1, {side}, {side}); got {tuple(x.shape)}")
    if not (np.min(x) >= -1e-5 and np.max(x) <= 1 + 1e-5):  # tolerates rounding; rejects NaN
        raise DataError(f"images must be in [0, 1], for example divided by 255; got {np.min(x):g} to {np.max(x):g}")
    if not is_cvae:
        return [x]
    y = tf.convert_to_tensor(labels)
    top = num_classes_of(model) - 1
    if y.shape not in [(len(x),), (len(x), 1)] or not np.isin(y, range(top + 1)).all():
        raise DataError(f"labels must be {len(x)} integers from 0 to {top}, not one-hot; got {y.shape}, {np.unique(y)}")
    return [x, one_hot(y, top + 1)]


@tf.function
def train_step(model, optimizer, x, *condition):
    """Take one optimizer step on a batch and return its loss, a scalar.

    A trace keeps the layers and the optimizer that it was made with. After freezing or replacing a layer, call
    `model.compile` with a new optimizer.
    """
    with tf.GradientTape() as tape:
        x_hat, mu, logvar = model(x, *condition, training=True)
        loss = loss_function(x_hat, x, mu, logvar)
    gradients = tape.gradient(loss, model.trainable_variables)
    optimizer.apply_gradients(zip(gradients, model.trainable_variables))
    return loss


def train_vae(model, train_loader, args, is_cvae=False):
    """Train the model for one epoch, with one optimizer step per batch.

    Args:
        model: A VAE, or a CVAE if `is_cvae`. If it has no optimizer, it gets Keras's Adam.
        train_loader: Yields batches of images (N, 1, H, W) in [0, 1] and labels (N,), as arrays, tensors or lists.
        args: `args.learning_rate` is Adam's constant rate. `args` is ignored if the model has an optimizer.
        is_cvae: Whether the model takes labels.

    Returns:
        The sum of the batches' losses, a float.

    Raises:
        ValueError: If the loader yields no batch, or an invalid one. No step is taken on an invalid batch.
        FloatingPointError: If, after the last batch, a loss or a weight is not finite.
    """
    if getattr(model, "optimizer", None) is None:
        model.optimizer = tf.keras.optimizers.Adam(args.learning_rate)
    losses = []
    for images, labels in train_loader:
        inputs = model_inputs(model, images, labels, is_cvae)
        # The first batch runs eagerly: it may create variables, which a `tf.function` may do only in its first trace.
        step = train_step.python_function if not losses or getattr(model, "run_eagerly", False) else train_step
        losses.append(float(step(model, model.optimizer, *inputs)))
    if not losses:
        raise ValueError("the loader gave no batch: is it empty, or an iterator that an earlier epoch has exhausted?")
    if not all(np.isfinite(numbers).all() for numbers in [losses, *model.get_weights()]):
        raise FloatingPointError("the loss or a weight is no longer finite: try a smaller learning rate")
    return sum(losses)


def with_bar(train_loader):
    """Yield the batches of `train_loader`, with Keras's progress bar if stdout is a terminal."""
    # stdout may be a grader's logger without `isatty`, or None in a program without a console.
    bar = tf.keras.utils.Progbar(len(train_loader), verbose=hasattr(sys.stdout, "isatty") and sys.stdout.isatty())
    for batch in train_loader:
        yield batch
        bar.add(1)


def output_path(name):
    """Return the path outputs/`name` and create its folder."""
    path = OUTPUTS / name
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def weights_path(model):
    """Return the path of a model's weights: outputs/model_ckpts/vae.weights.h5 for the class `VAE`."""
    return output_path(f"model_ckpts/{type(model).__name__.lower()}.weights.h5")


def save_model_weights(model, args=None):
    """Save a model's weights to `weights_path` atomically. `args` is part of the stencil's interface and ignored."""
    path = weights_path(model)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        part = os.path.join(folder, path.name)
        model.save_weights(part)
        os.replace(part, path)


def load_weights(model):
    """Load the saved weights into a model and return the model.

    Raises:
        FileNotFoundError: If no weights are saved.
        OSError: If the file is damaged or does not fit the model. On Keras 3, the model may be partly loaded.
    """
    path = weights_path(model)
    is_cvae = is_conditional(model)
    remedy = f"with `python assignment.py{' --is_cvae' * is_cvae} --latent_size {model.latent_size}` in {CODE}"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: train {remedy}")
    side = math.isqrt(model.input_size)
    model(*model_inputs(model, tf.zeros((1, 1, side, side)), [0], is_cvae))  # builds the layers
    try:
        model.load_weights(str(path))
    except PermissionError:
        raise
    except Exception as error:  # h5py raises OSError if it cannot open the file, Keras many types
        this = f"latent size {model.latent_size} and hidden width {model.hidden_dim}"
        other = f"for another model (this one has {this}; --latent_size, vae.py or Keras may differ)"
        fault = "damaged" if isinstance(error, OSError) else other
        raise OSError(f"{path} is {fault}: train again {remedy} ({' '.join(str(error).split())[:200]})") from error
    return model


def show_vae_images(model, latent_size):
    """Save a picture of 10 generated images in a row; return the PNG's path."""
    return save_grid("show_vae_images", model.decoder(tf.random.normal((10, latent_size))), rows=1)


def show_vae_interpolation(model, latent_size):
    """Save a picture of 12 × 12 images; each row interpolates linearly between two random z. Return the PNG's path."""
    start, end = tf.random.normal((2, 12, latent_size))
    z = tf.linspace(start, end, 12, axis=1)
    return save_grid("show_vae_interpolation", model.decoder(tf.reshape(z, (-1, latent_size))), rows=12)


def show_cvae_images(model, latent_size):
    """Save a picture of 10 generated images of each digit, one row per digit; return the PNG's path."""
    digits = np.arange(num_classes_of(model))
    return save_grid("show_cvae_images", generate_digits(model, np.repeat(digits, 10), latent_size), rows=len(digits))


def generate_digits(model, digits, latent_size):
    """Generate one image for each of `digits` (N,), from z ~ N(0, I). Return a tensor (N, 1, H, W) in [0, 1]."""
    z = tf.random.normal((len(digits), latent_size))
    return model.decoder(tf.concat([z, one_hot(digits, num_classes_of(model))], axis=1))


def save_grid(name, images, rows):
    """Save a picture of square images in a grid of `rows` rows, magnified three times.

    Args:
        name: Name of the PNG file, without its extension.
        images: Images (N, 1, H, W) or (N, H·W) in [0, 1].
        rows: Number of rows, a divisor of N.

    Returns:
        The path of the PNG file in outputs/.
    """
    path = output_path(f"{name}.png")
    side = math.isqrt(np.asarray(images[0]).size)
    grid = np.reshape(np.asarray(images), (rows, -1, side, side)).swapaxes(1, 2).reshape(rows * side, -1)
    imsave(path, grid.repeat(3, axis=0).repeat(3, axis=1), cmap="gray", vmin=0, vmax=1, origin="upper")
    return path


def save_loss_curve(losses, name):
    """Plot the loss of each epoch, with the handout's limit; return the PNG's path, outputs/`name`_loss.png."""
    path = output_path(f"{name}_loss.png")
    curve = Figure(figsize=(6, 4), dpi=150, layout="constrained")
    axes = curve.add_subplot(xlabel="epoch", ylabel=f"training loss of the {name.upper()}")
    axes.plot(range(1, len(losses) + 1), losses, marker="o", label=f"epoch 1: {losses[0]:.1f}, last: {losses[-1]:.1f}")
    axes.axhline(HANDOUT_LOSS, color="tab:red", linestyle="--", label=f"required: less than {HANDOUT_LOSS}")
    axes.legend()
    axes.locator_params(axis="x", integer=True)
    axes.set_ylim(top=1.05 * max(HANDOUT_LOSS, *(losses[1:] or losses)))  # a high first loss would flatten the rest
    curve.savefig(path)
    return path


def train(model, args):
    """Train the model for `args.num_epochs` epochs and save its weights after each; `args` is from `parseArguments`.

    A model without an optimizer is trained with Adam, and has no optimizer afterwards.

    Returns:
        The paths of the loss curve and of the weights.

    Raises:
        OSError, ValueError, FloatingPointError: As in `load_mnist`, `train_vae` and `save_model_weights`.
    """
    train_loader = load_mnist(args.batch_size, buffer_size=TRAINING_IMAGES)
    own_optimizer = getattr(model, "optimizer", None)
    if own_optimizer is None:
        # A larger batch has a less noisy gradient and tolerates a rate that grows as sqrt(batch_size) (Malladi et al.,
        # "On the SDEs and Scaling Rules for Adaptive Gradient Algorithms", 2022). The 16 was tuned; it gives a peak of
        # 8e-3 by default. The same paper lets 1 - beta_2 grow with the batch size. Here it is at most 0.05, so beta_2
        # is at least 0.95, as in Brown et al., "Language Models are Few-Shot Learners", 2020, appendix B. With Keras's
        # beta_2 of 0.999, the large gradients of the first epoch keep the steps small until the end.
        rate = SineRate(args.learning_rate * math.sqrt(args.batch_size / 16), args.num_epochs * len(train_loader))
        model.optimizer = tf.keras.optimizers.Adam(rate, beta_2=max(0.95, 0.999 ** (args.batch_size / 16)))
    losses = []
    try:
        for epoch in range(1, args.num_epochs + 1):
            losses.append(train_vae(model, with_bar(train_loader), args, is_cvae=args.is_cvae) / len(train_loader))
            save_model_weights(model, args)
            print(f"Train Epoch: {epoch} \tLoss: {losses[-1]:.6f}", flush=True)
    finally:
        model.optimizer = own_optimizer  # at the end of its schedule, the rate is almost 0
    return [save_loss_curve(losses, "cvae" if args.is_cvae else "vae"), weights_path(model)]


def main(args):
    """Train a model or load its weights, then save pictures of generated images, as set by `args`."""
    if hasattr(args, "seed"):
        tf.keras.utils.set_random_seed(args.seed)
    model = (CVAE if args.is_cvae else VAE)(args.input_size, latent_size=args.latent_size)
    if args.load_weights:
        written = []
        load_weights(model)
    else:
        written = train(model, args)
    pictures = [show_cvae_images] if args.is_cvae else [show_vae_images, show_vae_interpolation]
    written += [show(model, args.latent_size) for show in pictures]
    print("Wrote:", *(path.relative_to(OUTPUTS.parent).as_posix() for path in written), sep="\n  ")


if __name__ == "__main__":
    try:
        main(parseArguments())
    except (OSError, FloatingPointError, DataError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("\ninterrupted: the weights of the last epoch printed above, if any, are saved", file=sys.stderr)
        sys.exit(130)
