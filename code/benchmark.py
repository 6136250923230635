"""Time `train_vae` on this machine beside its floor, Keras `fit` and the stencil's eager loop."""

import argparse
import os
import statistics
import time

import tensorflow as tf
from assignment import INPUT_SIZE, TRAIN_SIZE, batch_loss, load_mnist, read_mnist, train_vae
from vae import CVAE

BATCH_SIZES = (1024, 128)
EPOCHS = 5  # timed after the first one, which also traces
EAGER_STEPS = 100
RATE = 1e-3


def seconds(function, *args, **kwargs):
    """How long one call takes."""
    start = time.perf_counter()
    function(*args, **kwargs)
    return time.perf_counter() - start


def floor(batch_size):
    """Seconds an epoch's matrix products take alone, those of an optimizer step in one compiled call.

    A dense layer is one product forward and two backward; the images need no gradient, so the first layer has one less.
    """
    shapes = [kernel.shape for kernel in CVAE(INPUT_SIZE).trainable_variables if len(kernel.shape) == 2]
    layers = [
        [tf.random.normal(shape) for shape in ((batch_size, inputs), (inputs, outputs), (batch_size, outputs))]
        for inputs, outputs in shapes
    ]

    @tf.function
    def products():
        forward = [tf.matmul(x, w) for x, w, _ in layers]
        to_kernels = [tf.matmul(x, y, transpose_a=True) for x, _, y in layers]
        to_inputs = [tf.matmul(y, w, transpose_b=True) for _, w, y in layers[1:]]
        return forward + to_kernels + to_inputs

    products()  # the first call compiles
    return statistics.median(seconds(products) for _ in range(60)) * TRAIN_SIZE / batch_size


class FitCVAE(CVAE):
    """The CVAE for Keras's own training loop."""

    def train_step(self, data):
        with tf.GradientTape() as tape:
            loss = batch_loss(self, *data)
        gradients = tape.gradient(loss, self.trainable_variables)
        self.optimizer.apply_gradients(zip(gradients, self.trainable_variables))
        return {"loss": loss}


def train_vae_and_fit(batch_size):
    """Seconds of an epoch of `train_vae`, and of Keras `fit` with the same model, loss and optimizer, taken in turn.

    Both are medians of the epochs after the first.
    """
    ours, theirs, loader = CVAE(INPUT_SIZE), FitCVAE(INPUT_SIZE), load_mnist(batch_size)
    theirs.compile(optimizer=tf.keras.optimizers.Adam(RATE))
    args = argparse.Namespace(learning_rate=RATE, num_epochs=1 + EPOCHS)
    rounds = [
        (seconds(train_vae, ours, loader, args, is_cvae=True), seconds(theirs.fit, loader, shuffle=False, verbose=0))
        for _ in range(1 + EPOCHS)
    ]
    return [statistics.median(epochs) for epochs in zip(*rounds[1:])]


def eager_loop(batch_size):
    """Seconds an epoch takes in the stencil's way: images in float64 one by one, each operation called from Python."""
    model = FitCVAE(INPUT_SIZE)
    model.compile(optimizer=tf.keras.optimizers.Adam(RATE))
    images, labels = read_mnist("train")
    loader = tf.data.Dataset.from_tensor_slices((images[:, None] / 255, labels)).shuffle(1024).batch(batch_size)
    batches = iter(loader)
    steps = (seconds(lambda: model.train_step(next(batches))) for _ in range(min(EAGER_STEPS, len(loader))))
    return statistics.median(steps) * TRAIN_SIZE / batch_size


def main():
    """Print the table of this machine."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    print(f"{os.cpu_count()} cores, TensorFlow {tf.__version__}; seconds an epoch of the CVAE, medians\n")
    row = "{:<36}{:>10}{:>10}".format
    print(row("batch size", *BATCH_SIZES))
    names = ["floor: the matrix products alone", "train_vae", "Keras fit", "the stencil's eager loop"]
    columns = [[floor(size), *train_vae_and_fit(size), eager_loop(size)] for size in BATCH_SIZES]
    for name, *cells in zip(names, *columns):
        print(row(name, *(f"{cell:.2f}" for cell in cells)))


if __name__ == "__main__":
    main()
