"""Time training on this machine beside its floor, an eager loop, Keras `fit` and, where it is installed, PyTorch."""

import argparse
import itertools
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

if __name__ == "__main__":
    import console

    console.start()

import tensorflow as tf
from assignment import (
    INPUT_SIZE,
    NUM_CLASSES,
    STEP_SIZE,
    TRAIN_SIZE,
    Parser,
    load_mnist,
    one_hot,
    read_mnist,
    train_vae,
)
from vae import CVAE, loss_function

HERE = pathlib.Path(__file__).resolve().parent
BATCH_SIZES = (1024, 128)
EPOCHS = 3  # timed after the first one, which also traces
EAGER_STEPS = 100
RATE = 1e-3


def seconds(function, *args, **kwargs):
    """How long one call takes."""
    start = time.perf_counter()
    function(*args, **kwargs)
    return time.perf_counter() - start


def floor(step_size):
    """Seconds an epoch's matrix products take alone, those of an optimizer step in one compiled call.

    A dense layer is one product forward and two backward; the images need no gradient, so the first layer has one less.
    """
    kernels = [variable for variable in CVAE(INPUT_SIZE).trainable_variables if len(variable.shape) == 2]
    layers = [
        (tf.random.normal((step_size, w.shape[0])), +w, tf.random.normal((step_size, w.shape[1]))) for w in kernels
    ]

    @tf.function
    def products():
        forward = [tf.matmul(x, w) for x, w, _ in layers]
        to_kernels = [tf.matmul(x, y, transpose_a=True) for x, _, y in layers]
        to_inputs = [tf.matmul(y, w, transpose_b=True) for _, w, y in layers[1:]]
        return forward + to_kernels + to_inputs

    products()  # the first call compiles
    return statistics.median(seconds(products) for _ in range(60)) * TRAIN_SIZE / step_size


def ours(batch_size):
    """Seconds of the first epoch of `train_vae` and the median of the next ones."""
    model, loader = CVAE(INPUT_SIZE), load_mnist(batch_size)
    args = argparse.Namespace(learning_rate=RATE, num_epochs=1 + EPOCHS)
    first, *others = (seconds(train_vae, model, loader, args, is_cvae=True) for _ in range(1 + EPOCHS))
    return first, statistics.median(others)


def compute_gradients(model, images, labels):
    """The loss of a batch and its gradients, as every loop here needs them."""
    with tf.GradientTape() as tape:
        x_hat, mu, logvar = model(images, one_hot(labels, NUM_CLASSES))
        loss = loss_function(x_hat, images, mu, logvar)
    return loss, tape.gradient(loss, model.trainable_variables)


def eager_loop(batch_size):
    """Seconds an epoch takes in the stencil's way: images in float64 one by one, each operation called from Python."""
    model, optimizer = CVAE(INPUT_SIZE), tf.keras.optimizers.Adam(RATE)
    images, labels = read_mnist("train")
    loader = tf.data.Dataset.from_tensor_slices((images[:, None] / 255, labels)).shuffle(1024).batch(batch_size)
    batches = iter(loader)

    def step():
        loss, gradients = compute_gradients(model, *next(batches))
        optimizer.apply_gradients(zip(gradients, model.trainable_variables))
        return float(loss)

    return statistics.median(seconds(step) for _ in range(min(EAGER_STEPS, len(loader)))) * TRAIN_SIZE / batch_size


class FitCVAE(CVAE):
    """The CVAE for Keras's own training loop."""

    def train_step(self, data):
        loss, gradients = compute_gradients(self, *data)
        self.optimizer.apply_gradients(zip(gradients, self.trainable_variables))
        return {"loss": loss}


def keras_fit(batch_size):
    """Seconds of an epoch of `fit` with the same model, loss and optimizer; the median of those after the first."""
    model, loader = FitCVAE(INPUT_SIZE), load_mnist(batch_size)
    model.compile(optimizer=tf.keras.optimizers.Adam(RATE))
    _, *others = (seconds(model.fit, loader, shuffle=False, verbose=0) for _ in range(1 + EPOCHS))
    return statistics.median(others)


def pytorch(batch_size):
    """Seconds of an epoch of the same network in eager PyTorch, all data in memory; None where it is not installed."""
    try:
        import torch
    except ImportError:
        return None
    cvae = CVAE(INPUT_SIZE)
    hidden, latent = cvae.hidden_dim, cvae.latent_size

    def layers(inputs):
        sizes = [inputs, hidden, hidden, hidden]
        return [part for pair in itertools.pairwise(sizes) for part in (torch.nn.Linear(*pair), torch.nn.ReLU())]

    encoder = torch.nn.Sequential(*layers(INPUT_SIZE + NUM_CLASSES), torch.nn.Linear(hidden, 2 * latent))
    decoder = torch.nn.Sequential(
        *layers(latent + NUM_CLASSES), torch.nn.Linear(hidden, INPUT_SIZE), torch.nn.Sigmoid()
    )
    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=RATE)
    images, labels = (torch.from_numpy(array) for array in read_mnist("train"))
    images, labels = images.reshape(-1, INPUT_SIZE) / 255, torch.nn.functional.one_hot(labels.long()).float()

    def epoch():
        for chosen in torch.randperm(len(images)).split(batch_size):
            x, c = images[chosen], labels[chosen]
            mu, logvar = encoder(torch.cat([x, c], 1)).chunk(2, dim=1)
            z = mu + torch.exp(0.5 * logvar) * torch.randn_like(mu)
            x_hat = decoder(torch.cat([z, c], 1))
            bce = torch.nn.functional.binary_cross_entropy(x_hat, x, reduction="sum")
            loss = (bce - 0.5 * torch.sum(1 + logvar - mu**2 - logvar.exp())) / len(x)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    epoch()
    return statistics.median(seconds(epoch) for _ in range(EPOCHS))


WHOLE_JOB = """
import pathlib, resource, sys, time
import assignment
assignment.OUTPUTS, epoch, spent = pathlib.Path(sys.argv.pop()), assignment.train_vae, []
def train_vae(*args, **kwargs):
    start = time.perf_counter()
    try:
        return epoch(*args, **kwargs)
    finally:
        spent.append(time.perf_counter() - start)
assignment.train_vae = train_vae
assignment.main(assignment.parseArguments())
print(sum(spent), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def whole_job():
    """`assignment.py --is_cvae` in a process of its own: (seconds outside training, peak memory in MB)."""
    with tempfile.TemporaryDirectory() as outputs:
        program = [sys.executable, "-c", WHOLE_JOB, "--is_cvae", "--num_epochs", "2", outputs]
        start = time.perf_counter()
        printed = subprocess.run(program, cwd=HERE, check=True, capture_output=True, text=True).stdout
        wall = time.perf_counter() - start
    training, kilobytes = map(float, printed.split()[-2:])
    return wall - training, kilobytes / 1024


def main():
    """Print the table of this machine."""
    Parser(description=__doc__).parse_args()
    print(f"{os.cpu_count()} cores, TensorFlow {tf.__version__}; seconds an epoch, medians; a ratio is to ours\n")
    outside, memory = whole_job()
    row = "{:<44}{:>16}{:>16}".format
    columns = []
    for batch_size in BATCH_SIZES:
        step_size = min(batch_size, STEP_SIZE)  # so that the others take the same optimizer steps as train_vae
        lowest = floor(step_size)
        first, median = ours(batch_size)
        others = [eager_loop(batch_size), keras_fit(step_size), pytorch(step_size)]
        columns.append(
            [
                f"{lowest:.2f}",
                f"{median:.2f}",
                f"{median / lowest:.2f}",
                *(f"{other:.2f} ({other / median:.2f}×)" if other else "not installed" for other in others),
                f"{first - median:.2f}",
            ]
        )
    print(row("batch size", *BATCH_SIZES))
    names = [
        "floor: the matrix products alone",
        "train_vae",
        "train_vae over the floor",
        "the stencil's eager loop",
        "Keras fit, in the same optimizer steps",
        "PyTorch, eager, in the same optimizer steps",
        "first epoch's extra seconds",
    ]
    for name, *cells in zip(names, *columns):
        print(row(name, *cells))
    print(row("seconds outside training, whole program", f"{outside:.2f}", ""))
    print(row("peak memory, whole program", f"{memory:.0f} MB", ""))


if __name__ == "__main__":
    main()
