"""Train a VAE or a CVAE on MNIST, save its weights and draw what it generates."""

import argparse
import math
import operator
import os
import pathlib
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # no start-up notes; TensorFlow reads it when it is imported

import numpy as np
import tensorflow as tf
from matplotlib.figure import Figure
from vae import CVAE, VAE, loss_function

ROOT = pathlib.Path(__file__).resolve().parent.parent
OUTPUTS = ROOT / "outputs"
MNIST = ROOT / "data" / "mnist.npz"
TRAIN_SIZE = 60_000
INPUT_SIZE = 28 * 28
NUM_CLASSES = 10
HANDOUT_LOSS = 120  # after 10 epochs the handout asks for less, of both models
PLANNED = "planned_adam"  # the name of the optimizer that `train_vae` makes, and whose rate it plans


def parseArguments():
    """Read the command line.

    Returns:
        An `argparse.Namespace` of the stencil's seven settings, and `seed` where it was given.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--is_cvae", action="store_true", help="train the conditional VAE")
    add("--load_weights", action="store_true", help="draw from the saved weights, without training")
    add("--batch_size", type=int, default=1024, help="images in a batch")
    add("--num_epochs", type=int, default=10, help="passes over the training images")
    add("--latent_size", type=int, default=15, help="dimensions of the latent space")
    add("--input_size", type=int, default=INPUT_SIZE, choices=[INPUT_SIZE], help="pixels of an image")
    add("--learning_rate", type=float, default=1e-3, help="Adam's at the start; it rises, then falls to almost 0")
    seed = "same seed, same losses and pictures (default: other ones every run)"
    add("--seed", type=int, default=argparse.SUPPRESS, help=seed)
    args = parser.parse_args()
    for name in ("batch_size", "num_epochs", "latent_size", "learning_rate"):
        if not 0 < getattr(args, name) < math.inf:
            parser.error(f"argument --{name}: must be above 0; got {getattr(args, name)}")
    if not 0 <= getattr(args, "seed", 0) < 2**32:
        parser.error(f"argument --seed: must be from 0 to 2**32 - 1; got {args.seed}")
    return args


def one_hot(labels, class_size):
    """One-hot vectors of `labels`.

    Args:
        labels: (N,) or (N, 1), any integer dtype, an array or a tensor, values from 0 to `class_size` - 1.
        class_size: the width of the vectors, C.

    Returns:
        A float32 tensor (N, C).
    """
    return tf.one_hot(tf.reshape(tf.cast(labels, tf.int64), (-1,)), class_size)


def read_mnist(split):
    """The MNIST images and labels of `split`, "train" (60,000) or "test" (10,000).

    Returns:
        Images (N, 28, 28) and labels (N,), both uint8 arrays.

    Raises:
        OSError: data/mnist.npz is damaged, or missing where Keras cannot download it either. No file is changed.
    """
    try:
        if not MNIST.exists():
            train, test = tf.keras.datasets.mnist.load_data()
            return train if split == "train" else test
        with np.load(MNIST) as arrays:
            return arrays[f"x_{split}"], arrays[f"y_{split}"]
    except Exception as error:  # numpy, zipfile and Keras raise a dozen kinds
        fault = "damaged" if MNIST.exists() else "missing"
        raise OSError(f"{MNIST} is {fault} ({error}): restore it with `git checkout -- data/mnist.npz`") from error


def load_mnist(batch_size, buffer_size=1024):
    """The training images in batches, in a fresh order every epoch, each image once.

    Args:
        batch_size: images in a batch; the last batch has what is left.
        buffer_size: how many images ahead the shuffle draws from, as in `tf.data.Dataset.shuffle`.

    Returns:
        A `tf.data.Dataset` of images (N, 1, 28, 28), float32 in [0, 1], and labels (N,), uint8.

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
    options.autotune.enabled = False  # its threads take the cores from the matrix products
    return indices.map(gather).prefetch(1).with_options(options)


def planned_rate(learning_rate, progress, batch_size):
    """Adam's learning rate after `progress` plans, each of which rises, falls to almost 0, and is followed by another.

    A plan begins at `learning_rate`. Its peak grows with the batch, whose gradient then has less noise (Goyal et al.,
    "Accurate, Large Minibatch SGD", 2017), up to 8 times `learning_rate`; far above, training diverges.
    """
    peak = np.clip(batch_size / 80, 1, 8)
    return float(learning_rate * np.interp(progress % 1, [0, 0.5, 1], [1, peak, 0.02]))


def batch_loss(model, images, *labels):
    """`loss_function` of `model` on images (N, 1, H, W), any real dtype; a CVAE takes their labels (N,) as well."""
    x = tf.cast(images, tf.float32)
    x_hat, mu, logvar = model(x, *[one_hot(digits, model.num_classes) for digits in labels], training=True)
    return loss_function(x_hat, x, mu, logvar)


@tf.function(reduce_retracing=True)
def train_step(model, optimizer, trainable, rate, *batch):
    """Move the weights of `model` by one step of `optimizer` down the gradient of `batch_loss`, which it returns.

    Where `rate` is None the optimizer keeps its own. `trainable` is not used: with another value of it TensorFlow
    compiles the step anew, as it has to once a part was frozen or thawed.
    """
    with tf.GradientTape() as tape:
        loss = batch_loss(model, *batch)
    gradients = tape.gradient(loss, model.trainable_variables)
    if rate is not None:
        optimizer.learning_rate.assign(rate)
    if gradients:  # there are none where the whole model is frozen
        optimizer.apply_gradients(zip(gradients, model.trainable_variables))
    return loss


def train_vae(model, train_loader, args, is_cvae=False):
    """Train `model` for one epoch, by one optimizer step a batch.

    A model that was compiled keeps its own optimizer and rate; any other is compiled with Adam, whose rate is planned
    if the loader can tell its length, and otherwise stays at `learning_rate`.

    Args:
        model: a VAE, or a CVAE if `is_cvae`.
        train_loader: gives batches of images (N, 1, H, W) in [0, 1], any real dtype, and integer labels (N,).
        args: `learning_rate`; and `num_epochs`, over which it is planned.
        is_cvae: whether the model takes the labels too.

    Returns:
        The sum over the batches of `loss_function`, a float.

    Raises:
        ValueError: `is_cvae` is not what the model is; the loader gives no batch, or one that does not fit, and then
            the weights are as they were before that batch; or the loss or a weight is no longer finite.
    """
    if bool(is_cvae) != hasattr(model, "num_classes"):
        raise ValueError(f"is_cvae is {is_cvae}, but the model is a {type(model).__name__}: pass is_cvae={not is_cvae}")
    if getattr(model, "optimizer", None) is None:
        model.compile(optimizer=tf.keras.optimizers.Adam(float(args.learning_rate), beta_2=0.99, name=PLANNED))
    optimizer, done = model.optimizer, int(model.optimizer.iterations)
    planned = optimizer.get_config().get("name") == PLANNED
    num_batches = operator.length_hint(train_loader)  # 0 if the loader cannot tell
    plan = num_batches * args.num_epochs or math.inf
    bar = tf.keras.utils.Progbar(num_batches or None, stateful_metrics=["loss"], verbose=int(sys.stdout.isatty()))
    rate, total, i = None, 0.0, 0
    for i, batch in enumerate(train_loader, start=1):
        batch = check_batch(batch, model)
        if i == 1:
            if done == 0:
                batch_loss(model, *batch)  # somebody's layers may be built by their first call
                # Keras 2 makes Adam a legacy one on a Mac, and those have no `build`.
                (getattr(optimizer, "build", None) or optimizer._create_all_weights)(model.weights)
            trainable = hash(tuple(map(id, model.trainable_variables)))  # a tuple would cost 3% of an epoch at 128
        if planned:
            rate = tf.constant(planned_rate(args.learning_rate, (done + i - 1) / plan, len(batch[0])))
        total += float(train_step(model, optimizer, trainable, rate, *batch))
        bar.update(i, [("loss", total / i)], finalize=False)
    if i == 0:
        raise ValueError("the loader gave no batch: is it empty, or an iterator that an epoch before has used up?")
    bar.update(i, [("loss", total / i)], finalize=True)
    if not all(np.isfinite(numbers).all() for numbers in [total, *model.get_weights()]):
        raise ValueError("the loss is no longer finite: try a smaller learning rate")
    return total


def check_batch(batch, model):
    """A batch of somebody's loader, an (images, labels) pair, if it is one that `model` can be trained on.

    Returns:
        A list of images (N, 1, H, W), and for a CVAE labels (N,).

    Raises:
        ValueError: the images or the labels have another shape, or values that they cannot have.
    """
    if len(batch) != 2:
        raise ValueError(f"the loader must give pairs of images and labels; got {len(batch)} parts")
    images, labels = tf.convert_to_tensor(batch[0]), batch[1]
    side = math.isqrt(model.input_size)
    if images.shape[1:] != (1, side, side) or not len(images):
        raise ValueError(f"images must have the shape (N, 1, {side}, {side}); got {tuple(images.shape)}")
    low, high = np.min(images), np.max(images)
    if not (low >= 0 and high <= 1):  # NaN is neither
        raise ValueError(f"images must have values in [0, 1], as a division by 255 gives; got {low:g} to {high:g}")
    if not hasattr(model, "num_classes"):
        return [images]
    labels, digits = tf.convert_to_tensor(labels), range(model.num_classes)
    if labels.shape not in [(len(images),), (len(images), 1)] or not set(np.ravel(labels).tolist()) <= set(digits):
        came = f"the shape {tuple(labels.shape)}, values {np.unique(labels)}"
        raise ValueError(f"labels must be {len(images)} whole numbers from 0 to {digits[-1]}; got {came}")
    return [images, labels]


def weights_path(network):
    """Where the weights of a Keras network are kept: outputs/model_ckpts/NAME.weights.h5."""
    return OUTPUTS / "model_ckpts" / f"{network.name}.weights.h5"


def save_model_weights(model, args=None):
    """Write a model's weights to outputs/model_ckpts/, whole or not at all.

    Args:
        model: a VAE, a CVAE, or any Keras network; the name of the file is its `name`.
        args: not used; the stencil tells the two models apart by it.

    Raises:
        OSError: the file cannot be written.
    """
    path = weights_path(model)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        model.save_weights(str(part))
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def load_weights(model):
    """Read the saved weights into an untrained model.

    Args:
        model: a VAE or a CVAE.

    Returns:
        The same model.

    Raises:
        FileNotFoundError: none are saved.
        OSError: the file is damaged, or of a model with another latent size.
    """
    path = weights_path(model)
    if not path.is_file():
        remedy = f"`python assignment.py{' --is_cvae' * isinstance(model, CVAE)} --latent_size {model.latent_size}`"
        raise FileNotFoundError(f"{path} is missing: train new weights with {remedy}")
    try:
        model.load_weights(str(path))
    except ValueError as error:
        fault = "does not fit the model: is it of another latent size, or of another Keras"
        raise OSError(f"{path} {fault}? Give its --latent_size, or delete it and train anew") from error
    except Exception as error:  # h5py raises a dozen kinds
        raise OSError(f"{path} is damaged ({error}): delete it and train anew") from error
    return model


def show_vae_images(model, latent_size):
    """Draw 10 images in a row, decoded from z ~ N(0, I) of (10, `latent_size`); returns the PNG's path."""
    return save_grid("show_vae_images", model.decoder(tf.random.normal((10, latent_size))), rows=1)


def show_vae_interpolation(model, latent_size):
    """Draw 12 × 12 images, each row decoded from a straight line between two z ~ N(0, I); returns the PNG's path."""
    start, end = tf.random.normal((2, 12, 1, latent_size))
    weight = tf.reshape(tf.linspace(0.0, 1.0, 12), (1, 12, 1))
    z = (1 - weight) * start + weight * end
    return save_grid("show_vae_interpolation", model.decoder(tf.reshape(z, (-1, latent_size))), rows=12)


def show_cvae_images(model, latent_size):
    """Draw 10 random images of each digit, a row a digit; returns the PNG's path."""
    digits = np.arange(model.num_classes)
    samples = generate_digits(model, np.repeat(digits, 10), latent_size)
    return save_grid("show_cvae_images", samples, rows=len(digits), row_labels=digits)


def generate_digits(model, digits, latent_size):
    """Decode a random image of each of `digits` (N,), from z ~ N(0, I): a tensor (N, 1, H, W) in [0, 1]."""
    z = tf.random.normal((len(digits), latent_size))
    return model.decoder(tf.concat([z, one_hot(digits, model.num_classes)], axis=1))


def save_grid(name, images, rows, row_labels=()):
    """Draw images (N, 1, H, W) as one array in `rows` rows, three screen pixels a pixel; returns the PNG's path."""
    grid = tile_images(images, rows)
    height = len(grid) // rows
    scale, margin = 3, 24 if len(row_labels) else 0
    figure_width, figure_height = grid.shape[1] * scale + margin, grid.shape[0] * scale
    figure = Figure(figsize=(figure_width / 100, figure_height / 100), dpi=100)
    axes = figure.add_axes([margin / figure_width, 0, 1 - margin / figure_width, 1])
    axes.imshow(grid, cmap="gray", vmin=0, vmax=1, interpolation="nearest", aspect="auto")
    axes.set_xticks([])
    axes.set_yticks((np.arange(len(row_labels)) + 0.5) * height, row_labels, fontsize=14)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return save_figure(name, figure)


def tile_images(images, rows):
    """Lay images (N, 1, H, W) out in `rows` rows, N / `rows` in each: an array (rows·H, N / rows·W)."""
    _, _, height, width = images.shape
    return np.reshape(images, (rows, -1, height, width)).swapaxes(1, 2).reshape(rows * height, -1)


def save_figure(name, figure):
    """Write a matplotlib figure to outputs/`name`.png; returns the path."""
    path = OUTPUTS / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path


def save_loss_curve(losses, name):
    """Draw the printed losses of the model `name` by epoch, with the handout's bar; returns the PNG's path."""
    figure = Figure(figsize=(6, 4), dpi=150, layout="constrained")
    axes = figure.add_subplot(xlabel="epoch", ylabel="loss: negative ELBO per image, in nats")
    axes.set_title(f"{name.upper()}: loss by epoch")
    epochs = range(1, len(losses) + 1)
    axes.plot(epochs, losses, marker="o", label="training")
    axes.axhline(HANDOUT_LOSS, color="tab:red", linestyle="--", label=f"the handout's bar, {HANDOUT_LOSS}")
    axes.locator_params(axis="x", integer=True)
    axes.legend()
    return save_figure(f"{name}_loss", figure)


def main(args):
    """Train a model, or load its weights, then draw from it; print what was written.

    Args:
        args: the settings that `parseArguments` returns.

    Raises:
        ValueError, OSError: as the functions above.
    """
    if hasattr(args, "seed"):
        tf.keras.utils.set_random_seed(args.seed)
    if args.is_cvae:
        model = CVAE(args.input_size, num_classes=NUM_CLASSES, latent_size=args.latent_size)
    else:
        model = VAE(args.input_size, latent_size=args.latent_size)
    weights_path(model).parent.mkdir(parents=True, exist_ok=True)  # what cannot be written is found before training
    written = []
    if args.load_weights:
        load_weights(model)
    else:
        train_loader = load_mnist(args.batch_size, buffer_size=TRAIN_SIZE)
        losses = []
        for epoch in range(1, args.num_epochs + 1):
            losses.append(train_vae(model, train_loader, args, is_cvae=args.is_cvae) / len(train_loader))
            save_model_weights(model, args)
            print(f"Train Epoch: {epoch} \tLoss: {losses[-1]:.6f}", flush=True)
        written += [save_loss_curve(losses, model.name), weights_path(model)]
    if args.is_cvae:
        written += [show_cvae_images(model, args.latent_size)]
    else:
        written += [show_vae_images(model, args.latent_size), show_vae_interpolation(model, args.latent_size)]
    print("Wrote:", *written, sep="\n  ")


if __name__ == "__main__":
    try:
        main(parseArguments())
    except OSError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("\ninterrupted: the weights are saved as of the last epoch printed above, if any", file=sys.stderr)
        sys.exit(130)
