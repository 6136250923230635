"""Train a VAE or a CVAE on MNIST, save its weights and draw what it generates."""

import argparse
import functools
import math
import operator
import os
import pathlib
import sys
import tempfile

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # no start-up notes; TensorFlow reads it when it is imported

from matplotlib.figure import Figure
from matplotlib.image import imsave
import numpy as np
import tensorflow as tf
from vae import CVAE, VAE, loss_function

CODE = pathlib.Path(__file__).resolve().parent
# Graders copy the two files alone, to a folder of any name: data/ and outputs/ are then in that one.
ROOT = CODE.parent if CODE.name == "code" or (CODE.parent / "data").is_dir() else CODE
OUTPUTS = ROOT / "outputs"
MNIST = ROOT / "data" / "mnist.npz"
NUM_CLASSES = 10
HANDOUT_LOSS = 120  # after 10 epochs the handout asks for less, of both models


def parseArguments():
    """The command line: an `argparse.Namespace` of the stencil's seven settings, and `seed` where it was given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--is_cvae", action="store_true", help="train the conditional VAE")
    parser.add_argument("--load_weights", action="store_true", help="draw from the saved weights, without training")
    parser.add_argument("--batch_size", type=int, default=1024, help="images in a batch")
    parser.add_argument("--num_epochs", type=int, default=10, help="passes over the training images")
    parser.add_argument("--latent_size", type=int, default=15, help="dimensions of the latent space")
    parser.add_argument("--input_size", type=int, default=28 * 28, choices=[28 * 28], help="pixels of an image")
    parser.add_argument("--learning_rate", type=float, default=1e-3, help="the peak: sqrt(batch_size / 16) times it")
    parser.add_argument("--seed", type=int, default=argparse.SUPPRESS, help="same seed, same losses and pictures")
    args = parser.parse_args()
    for name in ("batch_size", "num_epochs", "latent_size", "learning_rate"):
        if not 0 < getattr(args, name) < math.inf:
            parser.error(f"argument --{name}: must be above 0; got {getattr(args, name)}")
    if not 0 <= getattr(args, "seed", 0) < 2**32:
        parser.error(f"argument --seed: must be from 0 to 2**32 - 1; got {args.seed}")
    return args


def one_hot(labels, class_size):
    """One-hot vectors, float32 (N, `class_size`), of labels (N,) or (N, 1) of any integer dtype, arrays or tensors."""
    return tf.one_hot(tf.reshape(tf.cast(labels, tf.int64), (-1,)), class_size)


def num_classes_of(model):
    """C of a CVAE. Somebody's may not keep it, as the stencil never reads that attribute; it is then MNIST's 10."""
    return getattr(model, "num_classes", NUM_CLASSES)


def read_mnist(split):
    """The MNIST images (N, 28, 28) and labels (N,), both uint8, of `split`, "train" (60,000) or "test" (10,000).

    Raises:
        OSError: data/mnist.npz is damaged, or missing where Keras cannot download it either. No file is changed.
    """
    try:
        if not MNIST.exists():
            return tf.keras.datasets.mnist.load_data()[["train", "test"].index(split)]
        with np.load(MNIST) as arrays:
            return arrays[f"x_{split}"], arrays[f"y_{split}"]
    except Exception as error:  # numpy, zipfile and Keras raise a dozen kinds
        fault = "damaged" if MNIST.exists() else "missing"
        raise OSError(f"{MNIST} is {fault} ({error}): restore it with `git checkout -- data/mnist.npz`") from error


def load_mnist(batch_size, buffer_size=1024):
    """The training images in batches, each once an epoch, shuffled afresh by `tf.data` with this buffer.

    Returns:
        A `tf.data.Dataset` of images (N, 1, 28, 28), float32 in [0, 1], and labels (N,), uint8; the last N is smaller.

    Raises:
        ValueError: `batch_size` or `buffer_size` is below 1.
        OSError: as `read_mnist`.
    """
    if batch_size < 1 or buffer_size < 1:
        raise ValueError(f"batch_size and buffer_size must be 1 or more; got {batch_size} and {buffer_size}")
    images, labels = (tf.constant(array) for array in read_mnist("train"))

    def gather(indices):
        pixels = tf.gather(images, indices)[:, tf.newaxis]
        return tf.cast(pixels, tf.float32) / 255, tf.gather(labels, indices)

    # Shuffling indices and gathering a batch at a time moves every byte once, and only when it is needed.
    indices = tf.data.Dataset.range(len(images)).shuffle(buffer_size).batch(batch_size)
    options = tf.data.Options()
    options.autotune.enabled = False  # nothing here needs it, and an epoch would last until its thread wakes, or 5 s
    return indices.map(gather).prefetch(1).with_options(options)


class SineRate(tf.keras.optimizers.schedules.LearningRateSchedule):
    """A learning rate by step: peak · |sin(pi (step + 1/2) / steps)|, up and down in `steps` steps, over and over."""

    def __init__(self, peak, steps):
        self.peak, self.steps = peak, steps

    def __call__(self, step):
        return self.peak * tf.abs(tf.sin(math.pi * (tf.cast(step, tf.float32) + 0.5) / self.steps))

    def get_config(self):
        return {"peak": self.peak, "steps": self.steps}


def adam(args, batch_size, num_batches):
    """Adam for `num_epochs` epochs of `num_batches` batches; at a constant rate if that is 0, for not known.

    The peak grows with the root of the batch size, as larger batches have less noise in their gradients (Malladi et
    al., "On the SDEs and Scaling Rules for Adaptive Gradient Algorithms", 2022). Fewer than 10 epochs get the start of
    a longer training: ten trainings of one epoch are then the same as one of ten.
    """
    peak, steps = args.learning_rate * math.sqrt(batch_size / 16), num_batches * max(args.num_epochs, 10)
    return tf.keras.optimizers.Adam(SineRate(peak, steps) if num_batches else args.learning_rate)


@functools.lru_cache(maxsize=4)
def compile_step(model, optimizer, is_cvae):
    """The compiled function that moves the weights of `model` by one step of `optimizer`, and returns the batch's loss.

    Its first call makes what variables the two do not have yet. It trains what was trainable then: who freezes or
    replaces a part later calls `model.compile` with a new optimizer, as in Keras.
    """

    @tf.function
    def train_step(x, *labels):
        condition = [one_hot(digits, num_classes_of(model)) for digits in labels]
        with tf.GradientTape() as tape:
            x_hat, mu, logvar = model(x, *condition, training=True)
            loss = loss_function(x_hat, x, mu, logvar)
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply_gradients(zip(gradients, model.trainable_variables))
        return loss

    return train_step


def train_vae(model, train_loader, args, is_cvae=False):
    """Train `model` for one epoch, by one optimizer step a batch.

    A model that has an optimizer, by `compile` or from its constructor, keeps it, and `args` is not read.

    Args:
        model: a VAE, or a CVAE if `is_cvae`; anybody's with the stencil's attributes.
        train_loader: gives batches of images (N, 1, H, W) in [0, 1] and labels (N,), as arrays, tensors or lists.
        args: `learning_rate` and `num_epochs`, for the optimizer of a model that has none.
        is_cvae: whether the model takes the labels too.

    Returns:
        The sum over the batches of `loss_function`, a float.

    Raises:
        ValueError: the loader gives no batch, or one that does not fit; the weights are as they were before it.
        FloatingPointError: the loss or a weight is no longer finite.
    """
    num_batches = operator.length_hint(train_loader)  # 0 if the loader cannot tell
    in_terminal = getattr(sys.stdout, "isatty", bool)()  # graders put a logger there, or None
    bar = tf.keras.utils.Progbar(num_batches or None, stateful_metrics=["loss"], verbose=int(in_terminal))
    total, i = 0.0, 0
    for i, (images, labels) in enumerate(train_loader, start=1):
        batch = check_batch(images, labels, model, is_cvae)
        if getattr(model, "optimizer", None) is None:
            model.compile(optimizer=adam(args, len(images), num_batches))
        total += float(compile_step(model, model.optimizer, is_cvae)(*batch))
        bar.update(i, [("loss", total / i)], finalize=False)
    if i == 0:
        raise ValueError("the loader gave no batch: is it empty, or an iterator that an epoch before has used up?")
    bar.update(i, [("loss", total / i)], finalize=True)
    if not all(np.isfinite(numbers).all() for numbers in [total, *model.get_weights()]):
        raise FloatingPointError("the loss or a weight is no longer finite: try a smaller learning rate")
    return total


def check_batch(images, labels, model, is_cvae):
    """A batch of somebody's loader as a list: images (N, 1, H, W), float32, and, if `is_cvae`, labels (N,) or (N, 1).

    Raises:
        ValueError: they have another shape, or values that they cannot have.
    """
    x, side = tf.cast(images, tf.float32), math.isqrt(model.input_size)
    if x.shape[1:] != (1, side, side) or not len(x):
        raise ValueError(f"images must have the shape (N, 1, {side}, {side}); got {tuple(x.shape)}")
    if not (np.min(x) >= 0 and np.max(x) <= 1):  # NaN is neither
        raise ValueError(f"images must be in [0, 1], as a division by 255 gives; got {np.min(x):g} to {np.max(x):g}")
    if not is_cvae:
        return [x]
    y, top = tf.convert_to_tensor(labels), num_classes_of(model) - 1
    if y.shape not in [(len(x),), (len(x), 1)] or not np.isin(y, range(top + 1)).all():
        raise ValueError(f"labels must be {len(x)} whole numbers from 0 to {top}; got {y.shape}: {np.unique(y)}")
    return [x, y]


def output_path(name):
    """outputs/`name`, in a folder that exists."""
    path = OUTPUTS / name
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def weights_path(model):
    """Where a model's weights are kept, by the name of its class: outputs/model_ckpts/vae.weights.h5."""
    return output_path(f"model_ckpts/{type(model).__name__.lower()}.weights.h5")


def save_model_weights(model, args=None):
    """Write a model's weights to `weights_path`, whole or not at all; `args`, the stencil's, is not used.

    Raises:
        OSError: the file cannot be written.
    """
    path = weights_path(model)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        part = os.path.join(folder, path.name)
        model.save_weights(part)
        os.replace(part, path)


def load_weights(model):
    """Read the saved weights into an untrained model, and return it.

    Raises:
        FileNotFoundError: none are saved.
        OSError: the file is damaged, or of a model with another latent size.
    """
    path, side = weights_path(model), math.isqrt(model.input_size)
    is_cvae = "cvae" in path.name or hasattr(model, "num_classes")  # somebody's class need not be the one of vae.py
    if not path.is_file():
        remedy = f"`python assignment.py{' --is_cvae' * is_cvae} --latent_size {model.latent_size}`"
        raise FileNotFoundError(f"{path} is missing: train new weights with {remedy}")
    condition = [one_hot([[0]], num_classes_of(model))] if is_cvae else []
    model(tf.zeros((1, 1, side, side)), *condition)  # somebody's layers are built by their first call
    try:
        model.load_weights(str(path))
    except Exception as error:  # Keras and h5py raise a dozen kinds
        reason = " ".join(str(error).split())
        raise OSError(f"{path} is damaged, or of another --latent_size: use that or train again ({reason})") from error
    return model


def show_vae_images(model, latent_size):
    """Draw 10 images in a row, decoded from z ~ N(0, I) of (10, `latent_size`); returns the PNG's path."""
    return save_grid("show_vae_images", model.decoder(tf.random.normal((10, latent_size))), rows=1)


def show_vae_interpolation(model, latent_size):
    """Draw 12 × 12 images, each row decoded from a straight line between two z ~ N(0, I); returns the PNG's path."""
    start, end = tf.random.normal((2, 12, latent_size))
    z = tf.linspace(start, end, 12, axis=1)
    return save_grid("show_vae_interpolation", model.decoder(tf.reshape(z, (-1, latent_size))), rows=12)


def show_cvae_images(model, latent_size):
    """Draw 10 random images of each digit, a row a digit; returns the PNG's path."""
    digits = np.arange(num_classes_of(model))
    return save_grid("show_cvae_images", generate_digits(model, np.repeat(digits, 10), latent_size), rows=len(digits))


def generate_digits(model, digits, latent_size):
    """Decode a random image of each of `digits` (N,), from z ~ N(0, I): a tensor (N, 1, H, W) in [0, 1]."""
    z = tf.random.normal((len(digits), latent_size))
    return model.decoder(tf.concat([z, one_hot(digits, num_classes_of(model))], axis=1))


def save_grid(name, images, rows):
    """Draw N square images, (N, 1, H, W) or (N, H·W) in [0, 1], in `rows` rows, enlarged; returns the PNG's path."""
    path, side = output_path(f"{name}.png"), math.isqrt(np.size(images) // len(images))
    grid = np.reshape(images, (rows, -1, side, side)).swapaxes(1, 2).reshape(rows * side, -1)
    imsave(path, grid.repeat(3, axis=0).repeat(3, axis=1), cmap="gray", vmin=0, vmax=1, origin="upper")
    return path


def save_loss_curve(losses, name):
    """Draw the printed losses of the model `name` by epoch, with the handout's 120; returns the PNG's path."""
    path, figure = output_path(f"{name}_loss.png"), Figure(figsize=(6, 4), dpi=150, layout="constrained")
    axes = figure.add_subplot(xlabel="epoch", ylabel=f"{name.upper()} loss: negative ELBO per image, in nats")
    axes.plot(range(1, len(losses) + 1), losses, marker="o", label="training")
    axes.axhline(HANDOUT_LOSS, color="tab:red", linestyle="--", label=f"the handout asks for less than {HANDOUT_LOSS}")
    axes.locator_params(axis="x", integer=True)
    axes.legend()
    figure.savefig(path)
    return path


def main(args):
    """Train a model, or load its weights, then draw from it, as the `args` of `parseArguments` say."""
    if hasattr(args, "seed"):
        tf.keras.utils.set_random_seed(args.seed)
    model = (CVAE if args.is_cvae else VAE)(args.input_size, latent_size=args.latent_size)
    checkpoint = weights_path(model)  # where it cannot be written, this fails before training
    losses, written = [], []
    if args.load_weights:
        load_weights(model)
    else:
        train_loader = load_mnist(args.batch_size, buffer_size=60_000)
        for epoch in range(1, args.num_epochs + 1):
            losses.append(train_vae(model, train_loader, args, is_cvae=args.is_cvae) / len(train_loader))
            save_model_weights(model, args)
            print(f"Train Epoch: {epoch} \tLoss: {losses[-1]:.6f}", flush=True)
        written += [save_loss_curve(losses, "cvae" if args.is_cvae else "vae"), checkpoint]
    pictures = [show_cvae_images] if args.is_cvae else [show_vae_images, show_vae_interpolation]
    written += [show(model, args.latent_size) for show in pictures]
    # From the project's folder, whose own name a redirected stdout may have no letters for.
    print("Wrote:", *(path.relative_to(OUTPUTS.parent).as_posix() for path in written), sep="\n  ")


if __name__ == "__main__":
    try:
        main(parseArguments())
    except (OSError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("\ninterrupted: the weights are saved as of the last epoch printed above, if any", file=sys.stderr)
        sys.exit(130)
