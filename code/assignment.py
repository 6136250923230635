"""Train a VAE or a CVAE on MNIST, save its weights and draw what it generates."""

import argparse
import contextlib
import hashlib
import io
import math
import operator
import os
import pathlib
import signal
import sys
import tempfile
import threading


@contextlib.contextmanager
def _quiet_stderr():
    """Keep start-up notes off the screen; TensorFlow writes some of them before it reads its own log level."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "wb") as sink:
        os.dup2(sink.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _exit_interrupted(message):
    """Leave as a program that Ctrl-C ended, with one line."""
    print(f"\n{message}", file=sys.stderr)
    sys.exit(130)


os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
try:
    with _quiet_stderr():
        import numpy as np
        import tensorflow as tf
        from matplotlib.figure import Figure
        from vae import CVAE, VAE, bce_function, kl_divergence, loss_function
except KeyboardInterrupt:  # these imports take seconds: time enough to think again
    if pathlib.Path(sys.argv[0]).resolve().parent != pathlib.Path(__file__).resolve().parent:
        raise  # in a program of somebody else's
    _exit_interrupted("interrupted: nothing was begun")

ROOT = pathlib.Path(__file__).resolve().parent.parent
OUTPUTS = ROOT / "outputs"
MNIST = ROOT / "data" / "mnist.npz"
MNIST_SHA256 = "06af5dfe73b70e3bc1c36439982b18a8d76803db9b544f6fdf838a37fbb01b64"
TRAIN_SIZE = 60_000
INPUT_SIZE = 28 * 28
NUM_CLASSES = 10
HANDOUT_LOSS = 120  # after 10 epochs the handout asks for less, of both models

STEP_SIZE = 512  # images in an optimizer step, at the most: a larger batch of the loader takes several steps
# What the CVAE's training adds to the plain loss:
KL_WEIGHT = 2.0  # makes z dear, so that the decoder takes the digit from c, and z needs fewer of its dimensions
KL_WEIGHT_UNTIL = 0.75  # of the training; the rest is for the loss itself, which the encoder soon adapts to
PRIOR_SCALE = 1.1  # trained for a prior this much wider, z ~ N(0, I) seldom falls where the decoder was never trained


def parseArguments():
    """Read the command line.

    Returns:
        An `argparse.Namespace` of the stencil's seven settings, and `kl_weight` and `seed` where they were given.
    """
    parser = Parser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--is_cvae", action="store_true", help="train the conditional VAE")
    parser.add_argument("--load_weights", action="store_true", help="draw from the saved weights, without training")
    parser.add_argument("--batch_size", type=number(int, 1), default=1024, help="images in a batch of the loader")
    parser.add_argument("--num_epochs", type=number(int, 0), default=10, help="passes over the training images")
    parser.add_argument("--latent_size", type=number(int, 1), default=15, help="dimensions of the latent space")
    parser.add_argument(
        "--input_size", type=number(int, INPUT_SIZE, INPUT_SIZE), default=INPUT_SIZE, help="pixels of an image"
    )
    parser.add_argument(
        "--learning_rate", type=number(float, 1e-12), default=1e-3, help="Adam's highest rate, for steps of 16 images"
    )
    parser.add_argument(
        "--kl_weight",
        type=number(float, 0),
        default=argparse.SUPPRESS,
        help=f"weight of the KL term, in the first {100 * KL_WEIGHT_UNTIL:.0f} percent of training "
        f"(default: {KL_WEIGHT} for the CVAE, 1 for the VAE)",
    )
    parser.add_argument(
        "--seed",
        type=number(int, 0, 2**32 - 1),
        default=argparse.SUPPRESS,
        help="same seed, same losses and pictures (default: other ones every run)",
    )
    return parser.parse_args()


class Parser(argparse.ArgumentParser):
    def error(self, message):
        """Leave with one line; argparse would put the usage above it."""
        self.exit(2, f"{self.prog}: error: {message}; see --help\n")


def number(kind, low, high=math.inf):
    """An argparse type: an int or a float from `low` to `high`, finite."""

    def parse(text):
        bounds = f"{low} or more" if high == math.inf else f"{low}" if low == high else f"{low} to {high}"
        expected = f"takes {'a whole number' if kind is int else 'a number'}, {bounds}"
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (low <= value <= high and math.isfinite(value)):
            raise argparse.ArgumentTypeError(f"{expected}; got {text!r}")
        return value

    return parse


def one_hot(labels, class_size):
    """One-hot vectors of `labels`.

    Args:
        labels: (N,), any integer dtype, an array or a tensor, values from 0 to `class_size` - 1.
        class_size: the width of the vectors, C.

    Returns:
        A float32 tensor (N, C).
    """
    return tf.one_hot(tf.cast(labels, tf.int64), class_size)


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
    """Adam's learning rate: it rises in a line to the middle of training and falls in a line to its end.

    The top is `learning_rate` for steps of 16 images, and grows with the square root of their number, as Malladi et al.
    derive for Adam ("On the SDEs and Scaling Rules for Adaptive Gradient Algorithms", 2022).

    Args:
        learning_rate: the setting, such as 1e-3.
        progress: how much of the training is done, from 0 to 1; more counts as the end.
        step_size: the images in this step.

    Returns:
        The rate, a float; never 0, so that training beyond its planned length still learns a little.
    """
    top = learning_rate * math.sqrt(step_size / 16)
    return top * max(1 - abs(2 * progress - 1), 0.02)


def train_vae(model, train_loader, args, is_cvae=False):
    """Train `model` for one epoch.

    The compiled step and the optimizer stay with the model, so the next call goes on where this one ends.

    Args:
        model: a VAE, or a CVAE if `is_cvae`.
        train_loader: gives batches of images (N, 1, H, W) in [0, 1], any real dtype, and integer labels (N,).
        args: `learning_rate`; `num_epochs`, over which the learning rate is scheduled; and `kl_weight`, if it is there.
        is_cvae: whether the model takes the labels too.

    Returns:
        The sum over the loader's batches of `loss_function`, a float.

    Raises:
        ValueError: the loss is no longer finite, or the images or labels do not fit the model.
    """
    epochs_trained = getattr(model, "epochs_trained", 0)
    kl_weight = getattr(args, "kl_weight", KL_WEIGHT if is_cvae else 1.0)
    num_batches = operator.length_hint(train_loader)  # 0 if the loader cannot tell
    bar = tf.keras.utils.Progbar(num_batches or None, verbose=1 if sys.stdout.isatty() else 0)
    total = 0.0
    for i, (images, labels) in enumerate(train_loader, start=1):
        batch = [tf.cast(images, tf.float32)] + ([tf.cast(labels, tf.int64)] if is_cvae else [])
        if not hasattr(model, "training_step"):
            model.training_step = _compile_step(model, batch)
        progress = (epochs_trained + (i / num_batches if num_batches else 0.5)) / max(args.num_epochs, 1)
        objective = (kl_weight if progress < KL_WEIGHT_UNTIL else 1.0, PRIOR_SCALE if is_cvae else 1.0)
        loss = 0.0
        for start in range(0, len(images), STEP_SIZE):
            step_size = min(STEP_SIZE, len(images) - start)
            rate = scheduled_rate(args.learning_rate, progress, step_size)
            loss += float(model.training_step(batch, start, rate, *objective)) * step_size / len(images)
        if not math.isfinite(loss):
            raise ValueError(
                f"the loss is {loss} in epoch {epochs_trained + 1} at learning rate {args.learning_rate}: "
                "try a smaller --learning_rate"
            )
        total += loss
        bar.update(i, [("loss", loss)])
    model.epochs_trained = epochs_trained + 1
    return total


def training_objective(x_hat, x, mu, logvar, kl_weight, prior_scale):
    """What a training step minimises: `loss_function`, with another weight on the KL term and a wider prior.

    Args:
        x_hat, x, mu, logvar: as in `loss_function`, which this is if `kl_weight` and `prior_scale` are 1.
        kl_weight: lambda, the weight of the KL divergence.
        prior_scale: s, where the prior is N(0, s² I).

    Returns:
        A scalar of the dtype of `x_hat`, per image.
    """
    # KL(N(mu, sigma²) || N(0, s²)) is KL(N(mu / s, sigma² / s²) || N(0, 1)): both densities measured in units of s.
    kl = kl_divergence(mu / prior_scale, logvar - 2 * tf.math.log(prior_scale))
    return (bce_function(x_hat, x) + kl_weight * kl) / tf.cast(tf.shape(x_hat)[0], x_hat.dtype)


def _compile_step(model, batch):
    """A compiled step of Adam; it returns `loss_function`, whatever the KL term weighs.

    It takes a batch like `batch`, images (float32) and for a CVAE labels (int64), and `start`: of that batch the images
    from there on are used, STEP_SIZE at the most.
    """
    # Its update is one kernel a variable. That of Keras's Adam is a dozen passes over each, a tenth of an epoch at 128.
    rate = tf.Variable(0.0, trainable=False)
    optimizer = tf.compat.v1.train.AdamOptimizer(rate.read_value)
    # One trace for batches of every size.
    batch_spec = [tf.TensorSpec((None, *tensor.shape[1:]), tensor.dtype) for tensor in batch]
    number = tf.TensorSpec(())

    # Cutting the batch and encoding the labels in here saves a round trip through Python for each.
    @tf.function(input_signature=[batch_spec, tf.TensorSpec((), tf.int32), number, number, number])
    def step(batch, start, learning_rate, kl_weight, prior_scale):
        x, *labels = [tensor[start : start + STEP_SIZE] for tensor in batch]
        condition = [one_hot(digits, model.num_classes) for digits in labels]
        with tf.GradientTape() as tape:
            x_hat, mu, logvar = model(x, *condition)
            objective = training_objective(x_hat, x, mu, logvar, kl_weight, prior_scale)
        variables = tape.watched_variables()
        gradients = tape.gradient(objective, variables)
        rate.assign(learning_rate)
        # An update that runs beside the products of other gradients takes their caches. Waiting saves 2 to 10% of
        # an epoch at 128, by machine, and costs 1 to 2% of one at 1024.
        with tf.control_dependencies(gradients):
            optimizer.apply_gradients([(tf.identity(gradient), v) for gradient, v in zip(gradients, variables)])
        return loss_function(x_hat, x, mu, logvar)

    concrete = step.get_concrete_function()  # a call of it checks the arguments once, a call of `step` three times
    concrete.function = step  # keeps the optimizer's variables alive
    return concrete


def check_room(folder, network):
    """Make `folder` if need be, and find out whether it takes the weights of `network`: OSError if it does not."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(bytes(8 * network.count_params()))  # the weights in float32, twice
    except OSError as error:
        raise OSError(f"cannot write to {folder} ({error}): free some space or change its permissions") from error


@contextlib.contextmanager
def _whole_file(path):
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


def weights_path(name):
    """Where the weights of a network are kept: outputs/model_ckpts/`name`.weights.h5."""
    return OUTPUTS / "model_ckpts" / f"{name}.weights.h5"


def _name(model):
    return "cvae" if isinstance(model, CVAE) else "vae"


def write_weights(network, name):
    """Write the weights of any Keras network to `weights_path(name)`, whole or not at all; OSError if it cannot."""
    path = weights_path(name)
    check_room(path.parent, network)  # where the disk is full, HDF5 can crash the whole process
    with _whole_file(path) as part:
        network.save_weights(str(part))


def read_weights(network, name, remedy):
    """Read the weights that `write_weights` wrote.

    Raises:
        FileNotFoundError: there are none.
        ValueError: the file is damaged or does not fit. Both messages end in `remedy`, what to do about it.
    """
    path = weights_path(name)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: {remedy}")
    try:
        network.load_weights(str(path))
    except Exception as error:  # h5py and Keras raise a dozen kinds, by version and by what is wrong
        raise ValueError(f"{path} is damaged, or of another model, latent size or TensorFlow: {remedy}") from error


def save_model_weights(model, args):
    """Write the model's weights to outputs/model_ckpts/, whole or not at all.

    Args:
        model: a VAE or a CVAE.
        args: not used; the stencil tells the two models apart by it.

    Raises:
        OSError: the file cannot be written.
    """
    write_weights(model, _name(model))


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
    flag = " --is_cvae" if isinstance(model, CVAE) else ""
    latent = f"--latent_size {model.latent_size}"
    read_weights(model, _name(model), f"train new ones with `python assignment.py{flag} {latent}`")
    return model


def show_vae_images(model, latent_size):
    """Draw 10 images decoded from z ~ N(0, I) in a row.

    Args:
        model: a VAE.
        latent_size: its Z.

    Returns:
        The path of the picture, outputs/show_vae_images.png.
    """
    samples = model.decoder(tf.random.normal((10, latent_size)))
    return _save_grid("show_vae_images", samples, rows=1)


def show_vae_interpolation(model, latent_size):
    """Draw a grid of 12 × 12 images, each row decoded from a straight line between two random z.

    Args:
        model: a VAE.
        latent_size: its Z.

    Returns:
        The path of the picture, outputs/show_vae_interpolation.png.
    """
    start, end = tf.random.normal((2, 12, 1, latent_size))
    weight = tf.reshape(tf.linspace(0.0, 1.0, 12), (1, 12, 1))
    z = (1 - weight) * start + weight * end
    return _save_grid("show_vae_interpolation", model.decoder(tf.reshape(z, (-1, latent_size))), rows=12)


def show_cvae_images(model, latent_size):
    """Draw 10 random images of each digit, a row a digit.

    Args:
        model: a CVAE.
        latent_size: its Z.

    Returns:
        The path of the picture, outputs/show_cvae_images.png.
    """
    digits = np.arange(model.num_classes)
    samples = generate_digits(model, np.repeat(digits, 10), latent_size)
    return _save_grid("show_cvae_images", samples, rows=len(digits), row_labels=digits)


def generate_digits(model, digits, latent_size):
    """Decode a random image of each of `digits` (N,), from z ~ N(0, I): a tensor (N, 1, H, W) in [0, 1]."""
    z = tf.random.normal((len(digits), latent_size))
    return model.decoder(tf.concat([z, one_hot(digits, model.num_classes)], axis=1))


def _save_grid(name, images, rows, row_labels=()):
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
    with _whole_file(path) as part:
        figure.savefig(part, format="png")
    return path


def save_loss_curve(losses, is_cvae):
    """Draw the printed losses by epoch, with the handout's bar.

    Args:
        losses: the mean loss of each epoch, the first one first.
        is_cvae: whose they are.

    Returns:
        The path of the picture, outputs/vae_loss.png or outputs/cvae_loss.png.
    """
    name = "cvae" if is_cvae else "vae"
    figure = Figure(figsize=(6, 4), dpi=150, layout="constrained")
    axes = figure.add_subplot(
        xlabel="epoch", ylabel="loss: negative ELBO per image, in nats", title=f"{name.upper()}: loss by epoch"
    )
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
        KeyboardInterrupt: training was interrupted; its message names the epoch that is saved.
    """
    if hasattr(args, "seed"):
        tf.keras.utils.set_random_seed(args.seed)
    if args.is_cvae:
        model = CVAE(args.input_size, num_classes=NUM_CLASSES, latent_size=args.latent_size)
    else:
        model = VAE(args.input_size, latent_size=args.latent_size)
    for folder in (OUTPUTS, weights_path(_name(model)).parent):
        check_room(folder, model)  # now, not after ten epochs
    written = []
    if args.load_weights:
        load_weights(model)
    elif args.num_epochs:
        written += [save_loss_curve(_train(model, args), args.is_cvae), weights_path(_name(model))]
    if args.is_cvae:
        written += [show_cvae_images(model, args.latent_size)]
    else:
        written += [show_vae_images(model, args.latent_size), show_vae_interpolation(model, args.latent_size)]
    print("Wrote:", *written, sep="\n  ")


class _Interruptible:
    """A loader whose `with` block keeps Ctrl-C for the next batch, or for its end, and raises KeyboardInterrupt there.

    Raised anywhere, as Python does it, that can meet TensorFlow in C++, damage its memory and crash the process.
    """

    def __init__(self, loader):
        self.loader = loader
        self.pressed = False

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        for batch in self.loader:
            self._heed()
            yield batch

    def __enter__(self):
        self.is_heard = (
            threading.current_thread() is threading.main_thread()
            and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        )
        if self.is_heard:  # in the background Ctrl-C is ignored, and a program that imports this may use it otherwise
            signal.signal(signal.SIGINT, self._press)
        return self

    def __exit__(self, error, *_):
        if self.is_heard:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if error is None:
            self._heed()

    def _press(self, *_):
        self.pressed = True

    def _heed(self):
        if self.pressed:
            raise KeyboardInterrupt


def _train(model, args):
    """Train for `args.num_epochs`, saving the weights after each; returns the mean loss of each."""
    loader = load_mnist(args.batch_size, buffer_size=TRAIN_SIZE)
    losses = []
    try:
        with _Interruptible(loader) as train_loader:
            for epoch in range(1, args.num_epochs + 1):
                losses.append(train_vae(model, train_loader, args, is_cvae=args.is_cvae) / len(train_loader))
                save_model_weights(model, args)
                print(f"Train Epoch: {epoch} \tLoss: {losses[-1]:.6f}", flush=True)
    except KeyboardInterrupt:
        kept = f"epoch {len(losses)} is saved in {weights_path(_name(model))}" if losses else "no epoch was saved"
        raise KeyboardInterrupt(f"interrupted: {kept}") from None
    return losses


def run_command(command):
    """Run `command()`; an error or an interrupt ends the program in one line on stderr, without a traceback."""
    try:
        command()
    except KeyboardInterrupt as interrupt:
        _exit_interrupted(str(interrupt) or "interrupted")
    except (ValueError, OSError) as error:
        sys.exit(" ".join(f"error: {error}".split()))


if __name__ == "__main__":
    run_command(lambda: main(parseArguments()))
