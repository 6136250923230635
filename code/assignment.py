"""Train a VAE or a CVAE on MNIST, save its weights and draw what it generates."""

import argparse
import contextlib
import hashlib
import io
import logging
import math
import operator
import os
import pathlib
import sys
import tempfile

if __name__ == "__main__":
    with contextlib.suppress(ModuleNotFoundError):  # the handout's two files may be alone in an autograder's folder
        import console

        console.start()

import numpy as np
import tensorflow as tf
from matplotlib.figure import Figure
from vae import CVAE, VAE, kl_divergence, loss_function

LOG = logging.getLogger("assignment")  # console.py listens to it
ROOT = pathlib.Path(__file__).resolve().parent.parent
OUTPUTS = ROOT / "outputs"
MNIST = ROOT / "data" / "mnist.npz"
MNIST_SHA256 = "06af5dfe73b70e3bc1c36439982b18a8d76803db9b544f6fdf838a37fbb01b64"
TRAIN_SIZE = 60_000
INPUT_SIZE = 28 * 28
NUM_CLASSES = 10
HANDOUT_LOSS = 120  # after 10 epochs the handout asks for less, of both models

STEP_SIZE = 256  # images in an optimizer step, at the most: a larger batch of the loader takes several steps
PRIOR_SCALE = 1.055  # of a CVAE in training: then z ~ N(0, I) seldom falls where its decoder was never trained


def parseArguments():
    """Read the command line.

    Returns:
        An `argparse.Namespace` of the stencil's seven settings, and `kl_weight` and `seed` where they were given.
    """
    parser = Parser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add, unless_given = parser.add_argument, argparse.SUPPRESS
    add("--is_cvae", action="store_true", help="train the conditional VAE")
    add("--load_weights", action="store_true", help="draw from the saved weights, without training")
    add("--batch_size", type=number(int, 1), default=1024, help="images in a batch of the loader")
    add("--num_epochs", type=number(int, 0), default=10, help="passes over the training images")
    add("--latent_size", type=number(int, 1), default=15, help="dimensions of the latent space")
    add("--input_size", type=number(int, INPUT_SIZE, INPUT_SIZE), default=INPUT_SIZE, help="pixels of an image")
    rate = "Adam's at the start; it rises, fourfold at most, to the middle of training, then falls to almost 0"
    add("--learning_rate", type=number(float, 1e-12), default=1e-3, help=rate)
    add("--kl_weight", type=number(float, 0), default=unless_given, help="lambda in training (default: 1)")
    seed = "same seed, same losses and pictures (default: other ones every run)"
    add("--seed", type=number(int, 0, 2**32 - 1), default=unless_given, help=seed)
    return parser.parse_args()


class Parser(argparse.ArgumentParser):
    def error(self, message):
        """Leave with one line; argparse would put the usage above it."""
        self.exit(2, f"{self.prog}: error: {message}; see --help\n")


def number(kind, low, high=math.inf):
    """An argparse type: an int or a float from `low` to `high`, finite."""

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (low <= value <= high and value < math.inf):
            bounds = f"{low} or more" if high == math.inf else f"{low}" if low == high else f"{low} to {high}"
            kinds = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"takes {kinds}, {bounds}; got {text!r}")
        return value

    return parse


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
        ValueError: data/mnist.npz is damaged. It is left as it is.
        FileNotFoundError: there is no such file, and Keras cannot download one.
    """
    restore = "restore it with `git checkout -- data/mnist.npz`"
    try:
        content = MNIST.read_bytes()
    except FileNotFoundError:
        try:
            train, test = tf.keras.datasets.mnist.load_data()
        except Exception as error:  # Keras raises a bare Exception when a download fails
            raise FileNotFoundError(f"{MNIST} is missing and cannot be downloaded ({error}): {restore}") from error
        return train if split == "train" else test
    if hashlib.sha256(content).hexdigest() != MNIST_SHA256:
        raise ValueError(f"{MNIST} is damaged, its SHA-256 is not {MNIST_SHA256}: {restore}")
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        return arrays[f"x_{split}"], arrays[f"y_{split}"]


def load_mnist(batch_size, buffer_size=1024):
    """The training images in batches, in a fresh order every epoch, each image once.

    Args:
        batch_size: images in a batch; the last batch has what is left.
        buffer_size: how many images ahead the shuffle draws from, as in `tf.data.Dataset.shuffle`.

    Returns:
        A `tf.data.Dataset` of images (N, 1, 28, 28), float32 in [0, 1], and labels (N,), uint8.

    Raises:
        ValueError: `batch_size` or `buffer_size` is below 1, or data/mnist.npz is damaged.
        FileNotFoundError: as `read_mnist`.
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


def scheduled_rate(learning_rate, progress, step_size):
    """Adam's learning rate when `progress` of the training, from 0 to 1, is done; beyond 1 it stays as it is there.

    It rises from `learning_rate` to the middle, then falls to almost 0. In steps of STEP_SIZE images the peak is four
    times `learning_rate`; with fewer it goes down by the root of their number, as their gradient is noisier.
    """
    peak = 4 * math.sqrt(step_size / STEP_SIZE)
    return learning_rate * np.interp(progress, [0, 0.5, 1], [1, peak, 0.02])


def train_vae(model, train_loader, args, is_cvae=False):
    """Train `model` for one epoch.

    What the next epoch needs of this one stays with the model, in its `training_state`.

    Args:
        model: a VAE, or a CVAE if `is_cvae`.
        train_loader: gives batches of images (N, 1, H, W) in [0, 1], any real dtype, and integer labels (N,).
        args: `learning_rate`; `num_epochs`, over which the learning rate is scheduled; and `kl_weight`, if it is there.
        is_cvae: whether the model takes the labels too.

    Returns:
        The sum over the loader's batches of `loss_function`, a float.

    Raises:
        ValueError: `is_cvae` is not what the model is; the learning rate is out of range; the loader gives no batch, or
            one that does not fit, and then the weights are as they were before that batch; or the loss or a weight is
            no longer finite, and then the weights are as they were before the epoch, and Adam starts anew.
    """
    if bool(is_cvae) != hasattr(model, "num_classes"):
        raise ValueError(f"is_cvae is {is_cvae}, but the model is a {type(model).__name__}: pass is_cvae={not is_cvae}")
    if not 0 < args.learning_rate < 1e30:
        raise ValueError(f"learning_rate must be above 0, and far below 1e30; got {args.learning_rate}")
    if not hasattr(model, "training_state"):
        model.training_state = TrainingState(model)
    state = model.training_state
    step = state.compiled_step()
    weights_before = model.get_weights()
    kl_weight = getattr(args, "kl_weight", 1.0)
    num_batches = operator.length_hint(train_loader)  # 0 if the loader cannot tell
    bar = tf.keras.utils.Progbar(num_batches or None, verbose=1 if sys.stdout.isatty() else 0)
    total, i = 0.0, 0
    for i, batch in enumerate(train_loader, start=1):
        batch = check_batch(batch, model)
        size = len(batch[0])
        progress = (state.epochs + (i / num_batches if num_batches else 0.5)) / max(args.num_epochs, 1)
        loss = 0.0
        for start in range(0, size, STEP_SIZE):
            step_size = min(STEP_SIZE, size - start)
            rate = scheduled_rate(args.learning_rate, progress, step_size)
            loss += float(step(batch, start, rate, kl_weight)) * step_size / size
        total += loss
        bar.update(i, [("loss", loss)])
        if not math.isfinite(loss):
            break
    if i == 0:
        raise ValueError("the loader gave no batch: is it empty, or an iterator that an epoch before has used up?")
    state.epochs += 1
    if not all(np.isfinite(numbers).all() for numbers in [total, *model.get_weights()]):
        model.set_weights(weights_before)
        del model.training_state
        raise ValueError(
            f"the loss is no longer finite in epoch {state.epochs} at learning rate {args.learning_rate}: "
            "try a smaller --learning_rate"
        )
    return total


def check_batch(batch, model):
    """A batch of somebody's loader, an (images, labels) pair, if it is one that `model` can be trained on.

    Returns:
        A list of images (N, 1, H, W), float32, and for a CVAE labels (N,), int64.

    Raises:
        ValueError: the images or the labels have another shape, or values that they cannot have.
    """
    if len(batch) != 2:
        raise ValueError(f"the loader must give pairs of images and labels; got {len(batch)} parts")
    images, labels = tf.cast(batch[0], tf.float32), batch[1]
    side = math.isqrt(model.input_size)
    if images.shape[1:] != (1, side, side) or not len(images):
        raise ValueError(f"images must have the shape (N, 1, {side}, {side}); got {tuple(images.shape)}")
    low, high = np.min(images), np.max(images)
    if not (low >= 0 and high <= 1):  # NaN is neither
        raise ValueError(f"images must have values in [0, 1], as a division by 255 gives; got {low:g} to {high:g}")
    if not hasattr(model, "num_classes"):
        return [images]
    labels = np.asarray(labels)
    if labels.shape not in [(len(images),), (len(images), 1)]:
        raise ValueError(f"labels must be digits, ({len(images)},) for as many images; got the shape {labels.shape}")
    if not np.isin(labels, np.arange(model.num_classes)).all():
        values, highest = np.unique(labels), model.num_classes - 1
        raise ValueError(f"labels must be whole numbers from 0 to {highest}; got {values[0]} to {values[-1]}")
    return [images, labels.reshape(-1).astype(np.int64)]


class TrainingState:
    """What `train_vae` keeps of a model from one epoch to the next."""

    def __init__(self, model):
        self.model = model
        self.epochs = 0  # that are done
        self.steps = tf.Variable(0.0, trainable=False)  # that Adam has taken
        self.moments = {}  # each variable that was ever trained and Adam's two moments of it, by the variable's id
        self.compiled = {}  # a step for each choice of trainable variables: a part may be frozen between two epochs

    def compiled_step(self):
        """A step of Adam for the variables that are trainable now.

        Returns:
            A function of a batch as `check_batch` gives it; of `start`, from where on STEP_SIZE of its images, or what
            is left, are used; of the learning rate; and of the weight of the KL term. It gives `loss_function`,
            whatever the KL term weighs.
        """
        model, variables = self.model, self.model.trainable_variables
        key = tuple(map(id, variables))
        if key in self.compiled:
            return self.compiled[key]
        for variable in variables:
            zeros = tf.zeros(variable.shape, variable.dtype)
            moments = [tf.Variable(zeros, trainable=False) for _ in range(2)]
            self.moments.setdefault(id(variable), (variable, *moments))
        side, scalar = math.isqrt(model.input_size), tf.TensorSpec(())
        batch, prior_scale = [tf.TensorSpec((None, 1, side, side))], 1.0
        if hasattr(model, "num_classes"):
            batch, prior_scale = [*batch, tf.TensorSpec((None,), tf.int64)], PRIOR_SCALE

        # One trace for batches of all sizes.
        @tf.function(input_signature=[batch, tf.TensorSpec((), tf.int32), scalar, scalar])
        def step(batch, start, learning_rate, kl_weight):
            x, *labels = [tensor[start : start + STEP_SIZE] for tensor in batch]
            c = [one_hot(digits, model.num_classes) for digits in labels]
            with tf.GradientTape() as tape:
                x_hat, mu, logvar = model(x, *c)
                loss = loss_function(x_hat, x, mu, logvar)
                # The loss has the plain KL term; this exchanges it for the one to train with.
                further_kl = kl_weight * kl_divergence(mu, logvar, prior_scale) - kl_divergence(mu, logvar)
                objective = loss + further_kl / tf.cast(tf.shape(mu)[0], mu.dtype)
            gradients = tape.gradient(objective, variables, unconnected_gradients="zero")
            steps = tf.identity(self.steps.assign_add(1.0))  # read once, not once a variable: 4% of an epoch at 128
            with tf.control_dependencies(gradients):  # updates beside the last products take their caches: 4% at 128
                for variable, gradient in zip(variables, gradients):
                    adam_update(*self.moments[id(variable)], gradient, learning_rate, steps)
            return loss

        # A call of the concrete function checks the arguments once, a call of `step` three times.
        self.compiled[key] = step.get_concrete_function()
        return self.compiled[key]


def adam_update(variable, m, v, gradient, learning_rate, step):
    """Adam's update of a variable and of its two moments, in place (Kingma and Ba, "Adam", 2015, algorithm 1).

    One kernel. Keras's Adam passes over a variable a dozen times: a fifth more of an epoch in steps of 1024 images, two
    fifths in steps of 128.
    """
    beta1, beta2, rate = (tf.cast(number, gradient.dtype) for number in (0.9, 0.999, learning_rate))
    tf.raw_ops.ResourceApplyAdam(
        var=variable.handle,
        m=m.handle,
        v=v.handle,
        beta1_power=beta1 ** tf.cast(step, gradient.dtype),
        beta2_power=beta2 ** tf.cast(step, gradient.dtype),
        lr=rate,
        beta1=beta1,
        beta2=beta2,
        epsilon=tf.cast(1e-7, gradient.dtype),
        grad=gradient,
    )


def weights_path(network):
    """Where the weights of a Keras network are kept: outputs/model_ckpts/NAME.weights.h5."""
    return OUTPUTS / "model_ckpts" / f"{network.name}.weights.h5"


def check_room(folder, network):
    """Make `folder` if need be, and find out whether it takes the weights of `network`: OSError if it does not."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(bytes(8 * network.count_params()))  # the weights in float32, twice
    except OSError as error:
        raise OSError(f"cannot write to {folder} ({error}): free some space or change its permissions") from error


@contextlib.contextmanager
def whole_file(path):
    """A path beside `path` to write to; it is renamed over `path` once all is written, so no reader sees a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        yield part
        os.replace(part, path)
    except OSError as error:
        raise OSError(f"cannot write {path} ({error}): free some space or change its permissions") from error
    finally:
        part.unlink(missing_ok=True)


def save_model_weights(model, args=None):
    """Write a model's weights to outputs/model_ckpts/, whole or not at all.

    Args:
        model: a VAE, a CVAE, or any Keras network; the name of the file is its `name`.
        args: not used; the stencil tells the two models apart by it.

    Raises:
        OSError: the file cannot be written.
    """
    path = weights_path(model)
    check_room(path.parent, model)  # where the disk is full, HDF5 can crash the whole process
    with whole_file(path) as part:
        model.save_weights(str(part))


def load_weights(model):
    """Read the saved weights into an untrained model.

    Args:
        model: a VAE or a CVAE.

    Returns:
        The same model.

    Raises:
        FileNotFoundError: none are saved.
        ValueError: the file is damaged, or of a model with another latent size.
    """
    path = weights_path(model)
    flag = " --is_cvae" if isinstance(model, CVAE) else ""
    remedy = f"train new ones with `python assignment.py{flag} --latent_size {model.latent_size}`"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: {remedy}")
    try:
        model.load_weights(str(path))
    except Exception as error:  # h5py and Keras raise a dozen kinds, by version and by what is wrong
        raise ValueError(f"{path} is damaged, or of another model, latent size or TensorFlow: {remedy}") from error
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
    """Write a matplotlib figure to outputs/`name`.png, whole or not at all; returns the path."""
    path = OUTPUTS / f"{name}.png"
    with whole_file(path) as part:
        figure.savefig(part, format="png")
    return path


def save_loss_curve(losses, is_cvae):
    """Draw the printed losses by epoch, with the handout's bar; returns the PNG's path."""
    name = "cvae" if is_cvae else "vae"
    figure = Figure(figsize=(6, 4), dpi=150, layout="constrained")
    axes = figure.add_subplot(xlabel="epoch", ylabel="loss: negative ELBO per image, in nats")
    axes.set_title(f"{name.upper()}: loss by epoch")
    epochs = range(1, len(losses) + 1)
    axes.plot(epochs, losses, marker="o", label="training")
    axes.axhline(HANDOUT_LOSS, color="tab:red", linestyle="--", label=f"the handout's bar, {HANDOUT_LOSS}")
    axes.set_xticks(epochs)
    axes.legend()
    return save_figure(f"{name}_loss", figure)


def main(args):
    """Train a model, or load its weights, then draw from it; print what was written.

    Args:
        args: the settings that `parseArguments` returns.

    Raises:
        ValueError, FileNotFoundError, OSError: as the functions above.
    """
    if hasattr(args, "seed"):
        tf.keras.utils.set_random_seed(args.seed)
    if args.is_cvae:
        model = CVAE(args.input_size, num_classes=NUM_CLASSES, latent_size=args.latent_size)
    else:
        model = VAE(args.input_size, latent_size=args.latent_size)
    for folder in (OUTPUTS, weights_path(model).parent):
        check_room(folder, model)  # now, not after ten epochs
    written = []
    if args.load_weights:
        load_weights(model)
    elif args.num_epochs:
        train_loader = load_mnist(args.batch_size, buffer_size=TRAIN_SIZE)
        losses = []
        LOG.info("no epoch was saved")
        for epoch in range(1, args.num_epochs + 1):
            losses.append(train_vae(model, train_loader, args, is_cvae=args.is_cvae) / len(train_loader))
            save_model_weights(model, args)
            LOG.info("epoch %d is saved in %s", epoch, weights_path(model))
            print(f"Train Epoch: {epoch} \tLoss: {losses[-1]:.6f}", flush=True)
        written += [save_loss_curve(losses, args.is_cvae), weights_path(model)]
    if args.is_cvae:
        written += [show_cvae_images(model, args.latent_size)]
    else:
        written += [show_vae_images(model, args.latent_size), show_vae_interpolation(model, args.latent_size)]
    print("Wrote:", *written, sep="\n  ")


if __name__ == "__main__":
    main(parseArguments())
