"""Train a VAE or a CVAE on MNIST, save its weights and draw what it generates."""

import argparse
import math
import os
import pathlib
import sys
import tempfile

# Fewer start-up notes: TensorFlow reads this when it is imported. Version 2.21 prints some lines all the same.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# A notebook's shell hands on the notebook's backend, which another environment lacks. Nothing here draws on a screen.
if os.environ.get("MPLBACKEND", "").startswith("module:") and "ipykernel" not in sys.modules:
    del os.environ["MPLBACKEND"]

from matplotlib.figure import Figure
from matplotlib.image import imsave
import numpy as np
import tensorflow as tf
from vae import CVAE, VAE, loss_function

CODE = pathlib.Path(__file__).resolve().parent
ROOT = CODE.parent if CODE.name == "code" else CODE  # graders copy the two files alone, to a folder of any name
OUTPUTS = ROOT / "outputs"
MNIST = ROOT / "data" / "mnist.npz"
TRAINING_IMAGES = 60_000
NUM_CLASSES = 10
HANDOUT_LOSS = 120  # the handout requires a lower training loss after 10 epochs, for both models
HANDOUT_ACCURACY = 0.9  # and a higher accuracy of the CVAE's samples


class DataError(ValueError):
    """Images, labels or a batch size that the data set or the model does not allow: a user's error, not a bug."""


def parseArguments():
    """The command line: an `argparse.Namespace` of the stencil's seven settings, and `seed` where it was given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--is_cvae", action="store_true", help="train the conditional VAE")
    parser.add_argument("--load_weights", action="store_true", help="draw from the saved weights, without training")
    parser.add_argument("--batch_size", type=int, default=1024, help="images in a batch")
    parser.add_argument("--num_epochs", type=int, default=10, help="passes over the training images")
    parser.add_argument("--latent_size", type=int, default=15, help="dimensions of the latent space")
    parser.add_argument("--input_size", type=int, default=28 * 28, choices=[28 * 28], help="pixels of an image")
    parser.add_argument("--learning_rate", type=float, default=1e-3, help="peak rate: sqrt(batch_size / 16) times this")
    parser.add_argument("--seed", type=int, default=argparse.SUPPRESS, help="same seed, same losses and pictures")
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
    """One-hot vectors, float32 (N, `class_size`), of labels (N,) or (N, 1) of any integer dtype, arrays or tensors.

    Raises:
        ValueError: the labels have another shape, as those that are one-hot already.
    """
    labels = tf.cast(labels, tf.int64)
    if not any(labels.shape[1:].is_compatible_with(rest) for rest in ((), (1,))):
        raise ValueError(f"labels must have the shape (N,) or (N, 1), not one-hot; got {tuple(labels.shape)}")
    return tf.one_hot(labels[:, 0] if labels.shape.rank == 2 else labels, class_size)


def is_conditional(model):
    """Whether a model is a CVAE, where no `is_cvae` says so: one of another vae.py is no instance of our class."""
    return hasattr(model, "num_classes") or "cvae" in type(model).__name__.lower()


def num_classes_of(model):
    """C of a CVAE; MNIST's 10 where it does not keep it, as the stencil never reads that attribute."""
    return getattr(model, "num_classes", NUM_CLASSES)


def read_mnist():
    """MNIST as Keras gives it, uint8: 60,000 training images (N, 28, 28) and their labels (N,), 10,000 of each to test.

    Raises:
        OSError: data/mnist.npz is damaged or lacks read permission, or is missing and Keras cannot download it.
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
    except Exception as error:  # numpy, zipfile and Keras raise a dozen kinds
        fault = "damaged" if MNIST.exists() else "missing"
        remedy = f"take the repository's, in a clone by `git checkout -- data/mnist.npz` in {ROOT}"
        raise OSError(f"{MNIST} is {fault} ({error}): {remedy}") from error


def load_mnist(batch_size, buffer_size=1024):
    """The training images in full batches, shuffled afresh each epoch by `tf.data` with this buffer.

    Returns:
        A `tf.data.Dataset` of images (N, 1, 28, 28), float32 in [0, 1], and labels (N,), uint8. All batches are full:
        the last images of an epoch, if too few for another batch, are left out.

    Raises:
        ValueError: `batch_size` is not from 1 to 60,000, or `buffer_size` is below 1.
        OSError: as `read_mnist`.
    """
    images, labels = map(tf.constant, read_mnist()[0])
    if not 1 <= batch_size <= len(images) or buffer_size < 1:
        raise DataError(f"batch_size must be 1 to {len(images)}, buffer_size above 0; got {batch_size}, {buffer_size}")

    def gather(indices):
        return tf.cast(tf.gather(images, indices)[:, tf.newaxis], tf.float32) / 255, tf.gather(labels, indices)

    # Shuffling and batching indices instead of images saves 5% of an epoch and 100 MB.
    indices = tf.data.Dataset.range(len(images)).shuffle(buffer_size).batch(batch_size, drop_remainder=True)
    options = tf.data.Options()
    options.autotune.enabled = False  # an epoch would end only when its thread wakes, some after 5 s instead of 3
    return indices.map(gather).prefetch(1).with_options(options)


class SineRate(tf.keras.optimizers.schedules.LearningRateSchedule):
    """Learning rate over `steps` steps: half a sine wave, peak · sin(pi (step + 1/2) / steps).

    The rise is a warm-up for Adam, whose moments are inaccurate at first. The fall reduces the noise of the last steps.
    A warm-up over 20 or 30% of the steps, followed by a cosine or linear decay, gave no lower loss.
    """

    def __init__(self, peak, steps):
        self.peak, self.steps = peak, steps

    def __call__(self, step):
        step = tf.minimum(tf.cast(step, tf.float32), self.steps - 1)
        return self.peak * tf.sin(math.pi * (step + 0.5) / self.steps)

    def get_config(self):
        return {"peak": self.peak, "steps": self.steps}


def model_inputs(model, images, labels, is_cvae):
    """What `model` takes of a batch: images (N, 1, H, W) and, if `is_cvae`, one-hot labels (N, C), both float32.

    Raises:
        ValueError: the images, or the labels (N,) or (N, 1), have another shape, or values that they cannot have.
    """
    x = tf.cast(images, tf.float32)
    side = math.isqrt(model.input_size)
    if x.shape[1:] != (1, side, side) or not len(x):
        raise DataError(f"images must have the shape (N, 1, {side}, {side}); got {tuple(x.shape)}")
    if not (np.min(x) >= -1e-5 and np.max(x) <= 1 + 1e-5):  # a resize rounds to a little outside; NaN is neither
        raise DataError(f"images must be in [0, 1], as a division by 255 gives; got {np.min(x):g} to {np.max(x):g}")
    if not is_cvae:
        return [x]
    y = tf.convert_to_tensor(labels)
    top = num_classes_of(model) - 1
    if y.shape not in [(len(x),), (len(x), 1)] or not np.isin(y, range(top + 1)).all():
        raise DataError(f"labels must be {len(x)} integers, 0 to {top}, not one-hot; got {y.shape}: {np.unique(y)}")
    return [x, one_hot(y, top + 1)]


@tf.function
def train_step(model, optimizer, x, *condition):
    """Do one step of `optimizer` down the gradient of the loss of `model` on a batch; returns that loss, a scalar.

    TensorFlow compiles it for each model and optimizer that it meets. Whoever freezes or replaces a part of a model
    after that has to compile the model again, with a new optimizer.
    """
    with tf.GradientTape() as tape:
        x_hat, mu, logvar = model(x, *condition, training=True)
        loss = loss_function(x_hat, x, mu, logvar)
    gradients = tape.gradient(loss, model.trainable_variables)
    optimizer.apply_gradients(zip(gradients, model.trainable_variables))
    return loss


def train_vae(model, train_loader, args, is_cvae=False):
    """Train `model` for one epoch, one optimizer step a batch.

    Args:
        model: a VAE, or a CVAE if `is_cvae`; one without an optimizer gets Keras's Adam.
        train_loader: gives batches of images (N, 1, H, W) in [0, 1] and labels (N,), as arrays, tensors or lists.
        args: its `learning_rate` is that Adam's, constant; not used if the model has an optimizer of its own.
        is_cvae: whether the model takes the labels too.

    Returns:
        The sum over the batches of `loss_function`, a float.

    Raises:
        ValueError: the loader gives no batch, or one that does not fit, from which nothing is learned.
        FloatingPointError: the loss or a weight is no longer finite.
    """
    if getattr(model, "optimizer", None) is None:
        model.optimizer = tf.keras.optimizers.Adam(args.learning_rate)
    losses = []
    for images, labels in train_loader:
        inputs = model_inputs(model, images, labels, is_cvae)
        # The first batch runs uncompiled, as it may make variables: a compiled function may in its first trace alone.
        step = train_step.python_function if not losses or getattr(model, "run_eagerly", False) else train_step
        losses.append(float(step(model, model.optimizer, *inputs)))
    if not losses:
        raise ValueError("the loader gave no batch: is it empty, or an iterator that an epoch before has used up?")
    if not all(np.isfinite(numbers).all() for numbers in [losses, *model.get_weights()]):
        raise FloatingPointError("the loss or a weight is no longer finite: try a smaller learning rate")
    return sum(losses)


def with_bar(train_loader):
    """The batches of `train_loader`, counted by Keras's progress bar if stdout is a terminal."""
    # A grader's stdout may be a logger without `isatty`, a windowed program's is None.
    bar = tf.keras.utils.Progbar(len(train_loader), verbose=hasattr(sys.stdout, "isatty") and sys.stdout.isatty())
    for batch in train_loader:
        yield batch
        bar.add(1)


def output_path(name):
    """outputs/`name`, in a folder that exists."""
    path = OUTPUTS / name
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def weights_path(model):
    """Where a model's weights are kept, by the name of its class: outputs/model_ckpts/vae.weights.h5."""
    return output_path(f"model_ckpts/{type(model).__name__.lower()}.weights.h5")


def save_model_weights(model, args=None):
    """Write a model's weights to `weights_path`, whole or not at all (OSError); `args`, the stencil's, is not used."""
    path = weights_path(model)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        part = os.path.join(folder, path.name)
        model.save_weights(part)
        os.replace(part, path)


def load_weights(model):
    """Read the saved weights into an untrained model, and return it.

    Raises:
        FileNotFoundError: none are saved.
        OSError: they are damaged, or of another model; on Keras 3 this one may then be half loaded.
    """
    path = weights_path(model)
    is_cvae = is_conditional(model)
    remedy = f"with `python assignment.py{' --is_cvae' * is_cvae} --latent_size {model.latent_size}` in {CODE}"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: train {remedy}")
    side = math.isqrt(model.input_size)
    model(*model_inputs(model, tf.zeros((1, 1, side, side)), [0], is_cvae))  # builds layers that are built when called
    try:
        model.load_weights(str(path))
    except Exception as error:  # Keras and h5py raise a dozen kinds; for a file that h5py cannot open, an OSError
        this = f"latent size {model.latent_size} and hidden width {model.hidden_dim}"
        other = f"of another model (this one has {this}; --latent_size, vae.py or Keras may differ)"
        fault = "damaged" if isinstance(error, OSError) else other
        raise OSError(f"{path} is {fault}: train again {remedy} ({' '.join(str(error).split())[:200]})") from error
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
    path = output_path(f"{name}.png")
    side = math.isqrt(np.asarray(images[0]).size)
    grid = np.reshape(np.asarray(images), (rows, -1, side, side)).swapaxes(1, 2).reshape(rows * side, -1)
    imsave(path, grid.repeat(3, axis=0).repeat(3, axis=1), cmap="gray", vmin=0, vmax=1, origin="upper")
    return path


def save_loss_curve(losses, name):
    """Draw the printed losses of the model `name` by epoch, with the handout's 120; returns the PNG's path."""
    path = output_path(f"{name}_loss.png")
    curve = Figure(figsize=(6, 4), dpi=150, layout="constrained")
    axes = curve.add_subplot(xlabel="epoch", ylabel=f"training loss of the {name.upper()}")
    axes.plot(range(1, len(losses) + 1), losses, marker="o", label=f"epoch 1: {losses[0]:.1f}, last: {losses[-1]:.1f}")
    axes.axhline(HANDOUT_LOSS, color="tab:red", linestyle="--", label=f"the handout asks for less than {HANDOUT_LOSS}")
    axes.legend()
    axes.locator_params(axis="x", integer=True)
    axes.set_ylim(top=1.05 * max(HANDOUT_LOSS, *(losses[1:] or losses)))  # the first epoch's would squash the others
    curve.savefig(path)
    return path


def train(model, args):
    """Train `model` as the `args` of `parseArguments` say; returns the paths of its loss curve and of its weights.

    The weights are saved after each epoch. OSError and FloatingPointError are raised as by what is called here.
    """
    train_loader = load_mnist(args.batch_size, buffer_size=TRAINING_IMAGES)
    own_optimizer = getattr(model, "optimizer", None)
    if own_optimizer is None:
        # A larger batch has a less noisy gradient and tolerates a rate that grows with its square root (Malladi et al.,
        # "On the SDEs and Scaling Rules for Adaptive Gradient Algorithms", 2022). The 16 was tuned: the default peak is
        # 8e-3. In the same paper, 1 - beta_2 grows with the batch size. Here it stops at 0.05, which is usual for short
        # trainings with large batches (Brown et al., "Language Models are Few-Shot Learners", 2020, appendix B): in a
        # longer average, the large gradients of the first epoch would keep all later steps small.
        peak = args.learning_rate * math.sqrt(args.batch_size / 16)
        rate = SineRate(peak, args.num_epochs * len(train_loader))
        model.optimizer = tf.keras.optimizers.Adam(rate, beta_2=max(0.95, 0.999 ** (args.batch_size / 16)))
    losses = []
    try:
        for epoch in range(1, args.num_epochs + 1):
            losses.append(train_vae(model, with_bar(train_loader), args, is_cvae=args.is_cvae) / len(train_loader))
            save_model_weights(model, args)
            print(f"Train Epoch: {epoch} \tLoss: {losses[-1]:.6f}", flush=True)
    finally:
        model.optimizer = own_optimizer  # a finished schedule would hardly train the model further
    return [save_loss_curve(losses, "cvae" if args.is_cvae else "vae"), weights_path(model)]


def main(args):
    """Train a model, or load its weights, then draw from it, as the `args` of `parseArguments` say."""
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
