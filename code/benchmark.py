"""Time an epoch of `train_vae` on this machine, beside its floor, the matrix products alone, and Keras `fit`."""

import argparse
import os
import statistics
import time

from assignment import load_mnist, train_vae
import tensorflow as tf
from vae import VAE, loss_function

BATCH_SIZES = (1024, 128)
EPOCHS = 5  # timed, after a first one that also compiles


def seconds(function, *args, **kwargs):
    """How long one call takes."""
    start = time.perf_counter()
    function(*args, **kwargs)
    return time.perf_counter() - start


def floor(batch_size, num_batches):
    """Seconds that an epoch's matrix products take, those of a step in one compiled call.

    A dense layer is one product forward and two backward; the images need no gradient, so the first layer has one less.
    """
    kernels = [variable for variable in VAE(28 * 28).trainable_variables if len(variable.shape) == 2]
    layers = [(tf.ones((batch_size, w.shape[0])), w + 0, tf.ones((batch_size, w.shape[1]))) for w in kernels]

    @tf.function
    def products():
        forward = [tf.matmul(x, w) for x, w, _ in layers]
        to_kernels = [tf.matmul(x, y, transpose_a=True) for x, _, y in layers]
        return forward + to_kernels + [tf.matmul(y, w, transpose_b=True) for _, w, y in layers[1:]]

    products()  # the first call compiles
    return statistics.median(seconds(products) for _ in range(60)) * num_batches


class FitVAE(VAE):
    """The VAE for Keras's own training loop."""

    def train_step(self, data):
        x, _ = data
        with tf.GradientTape() as tape:
            x_hat, mu, logvar = self(x, training=True)
            loss = loss_function(x_hat, x, mu, logvar)
        self.optimizer.apply_gradients(zip(tape.gradient(loss, self.trainable_variables), self.trainable_variables))
        return {"negative_elbo": loss}


def epochs(batch_size):
    """Median seconds of an epoch: [the floor, `train_vae`, Keras `fit`], the last two taken in turn."""
    ours, theirs, loader = VAE(28 * 28), FitVAE(28 * 28), load_mnist(batch_size)
    theirs.compile(optimizer="adam")
    args = argparse.Namespace(learning_rate=1e-3, num_epochs=10)
    rounds = [
        (seconds(train_vae, ours, loader, args), seconds(theirs.fit, loader, shuffle=False, verbose=0))
        for _ in range(1 + EPOCHS)
    ]
    return [floor(batch_size, len(loader)), *map(statistics.median, zip(*rounds[1:]))]


def main():
    """Print the table of this machine."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    print(f"{os.cpu_count()} cores, TensorFlow {tf.__version__}; seconds an epoch of the VAE, medians\n")
    print(f"{'batch size':<12}" + "".join(f"{size:10}" for size in BATCH_SIZES))
    for name, *cells in zip(["floor", "train_vae", "Keras fit"], *map(epochs, BATCH_SIZES)):
        print(f"{name:<12}" + "".join(f"{cell:10.2f}" for cell in cells))


if __name__ == "__main__":
    main()
