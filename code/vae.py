"""The variational autoencoder (VAE), its conditional form (CVAE), and the formulas they are trained with.

Shapes: N images of H·W = `input_size` pixels, Z = `latent_size`, C = `num_classes`.
Sources: Kingma and Welling, "Auto-Encoding Variational Bayes", 2014 (https://arxiv.org/abs/1312.6114);
Sohn, Lee and Yan, "Learning Structured Output Representation using Deep Conditional Generative Models", 2015.
"""

import math

import tensorflow as tf
from tensorflow.keras import Sequential
from tensorflow.keras.initializers import Constant
from tensorflow.keras.layers import Dense, Flatten, Reshape

HIDDEN_DIM = 400  # the width in Kingma and Welling's MNIST networks is 500, in most public ones 400
# Bias of the logvar layer: sigma = exp(-2 / 2) = 1/e, so log(1 / sigma) is one nat per latent dimension, about what a
# trained model uses (a KL of 17 over 15 dimensions). With a sigma of 1, z is mostly noise at first, and the decoder
# learns to ignore some of its dimensions before the encoder uses them.
INITIAL_LOGVAR = -2.0
MIN_PROBABILITY = 1e-7  # keeps log(0) out of the cross-entropy; Keras clips probabilities at the same value


def hidden_layers():
    """Three ReLU layers of width H, whose kernels start by He's rule, a variance of 2 / inputs (He et al., 2015)."""
    return [Dense(HIDDEN_DIM, activation="relu", kernel_initializer="he_uniform") for _ in range(3)]


def image_shape(input_size):
    """(1, H, W) of a square image of `input_size` pixels."""
    side = math.isqrt(input_size)
    if side**2 != input_size:
        raise ValueError(f"input_size must be a square number, such as 28 * 28 = 784; got {input_size}")
    return 1, side, side


def image_layers(input_size):
    """The end of a decoder: a sigmoid layer of `input_size` pixels, and their reshape to an image."""
    return [Dense(input_size, activation="sigmoid"), Reshape(image_shape(input_size))]


class VAE(tf.keras.Model):
    """A fully-connected variational autoencoder.

    `decoder` maps z (N, Z) to images (N, 1, H, W); with z ~ N(0, I) they are new ones.

    Args:
        input_size: pixels of an image, H·W with H = W; ValueError if it is no square.
        latent_size: Z, the dimensions of the latent space.
    """

    def __init__(self, input_size, latent_size=15):
        super().__init__()
        self.input_size = input_size
        self.latent_size = latent_size
        self.hidden_dim = HIDDEN_DIM
        self.encoder = Sequential([Flatten(), *hidden_layers()], name="encoder")
        self.mu_layer = Dense(latent_size, name="mu_layer")
        self.logvar_layer = Dense(latent_size, bias_initializer=Constant(INITIAL_LOGVAR), name="logvar_layer")
        self.decoder = Sequential([*hidden_layers(), *image_layers(input_size)], name="decoder")
        if type(self).__init__ is VAE.__init__:  # a subclass may need attributes that its constructor sets later
            self(tf.zeros((1, *image_shape(input_size))))  # creates the weights, so they can be saved or loaded

    def get_config(self):
        """The constructor's arguments, for `load_model`: Keras 3 does not know those of a subclassed model."""
        return {"input_size": self.input_size, "latent_size": self.latent_size}

    def call(self, x):
        """Reconstruct images x (N, 1, H, W), in [0, 1] and of any real dtype, through the latent space.

        Returns:
            `x_hat` (N, 1, H, W) in [0, 1], and `mu` and `logvar` (N, Z) of q(z|x), in the layers' dtype, float32
            unless a policy says otherwise.
        """
        x = tf.cast(x, self.compute_dtype)
        hidden = self.encoder(x)
        mu, logvar = self.mu_layer(hidden), self.logvar_layer(hidden)
        z = reparametrize(mu, logvar)
        return self.decoder(z), mu, logvar


def initialize_label_rows(kernel, num_classes):
    """Re-initialize the label's rows (the last `num_classes`) of a first kernel, using He's rule with a fan-in of 1.

    He's rule assumes that all inputs are active: 794 in the encoder give a standard deviation of sqrt(2 / 794) = 0.05.
    Of a one-hot label only one input is active, which gives sqrt(2 / 1) = 1.4. With rows as small as the others, the
    decoder learns the class from z before it learns to use c, and a random z then determines the digit. Running the
    layer's initializer again undoes this.
    """
    rows = tf.random.normal((num_classes, kernel.shape[1]), stddev=math.sqrt(2), dtype=kernel.dtype)
    kernel.assign(tf.concat([kernel[:-num_classes], rows], axis=0))


class CVAE(tf.keras.Model):
    """A conditional VAE: the VAE with the one-hot class c joined to the image and to z.

    `decoder` maps [z, c] (N, Z + C) to images (N, 1, H, W); with z ~ N(0, I) they are new ones of class c.

    Args:
        input_size: pixels of an image, H·W with H = W; ValueError if it is no square.
        num_classes: C, the width of the one-hot labels.
        latent_size: Z, the dimensions of the latent space.
    """

    def __init__(self, input_size, num_classes=10, latent_size=15):
        super().__init__()
        self.input_size = input_size
        self.num_classes = num_classes
        self.latent_size = latent_size
        self.hidden_dim = HIDDEN_DIM
        self.encoder = Sequential([Flatten(), *hidden_layers()], name="encoder")
        self.mu_layer = Dense(latent_size, name="mu_layer")
        self.logvar_layer = Dense(latent_size, bias_initializer=Constant(INITIAL_LOGVAR), name="logvar_layer")
        self.decoder = Sequential([*hidden_layers(), *image_layers(input_size)], name="decoder")
        for part, num_inputs in ((self.encoder, input_size), (self.decoder, latent_size)):
            part.build((None, num_inputs + num_classes))
            initialize_label_rows(part.weights[0], num_classes)
        for layer in (self.mu_layer, self.logvar_layer):
            layer.build((None, HIDDEN_DIM))
        if type(self).__init__ is CVAE.__init__:
            self(tf.zeros((1, *image_shape(input_size))), tf.zeros((1, num_classes)))

    def get_config(self):
        return {"input_size": self.input_size, "num_classes": self.num_classes, "latent_size": self.latent_size}

    def call(self, x, c):
        """Reconstruct images x (N, 1, H, W), as `VAE.call` does, given their classes as one-hot labels c (N, C).

        Returns:
            `x_hat` (N, 1, H, W) in [0, 1], and `mu` and `logvar` (N, Z) of q(z|x, c), in the layers' dtype, float32
            unless a policy says otherwise.
        """
        x, c = tf.cast(x, self.compute_dtype), tf.cast(c, self.compute_dtype)
        hidden = self.encoder(tf.concat([tf.reshape(x, (-1, self.input_size)), c], axis=1))
        mu, logvar = self.mu_layer(hidden), self.logvar_layer(hidden)
        z = reparametrize(mu, logvar)
        return self.decoder(tf.concat([z, c], axis=1)), mu, logvar


def reparametrize(mu, logvar):
    """Draw z (N, Z) = mu + sigma * epsilon, with epsilon ~ N(0, I) and sigma² = exp(logvar), for each image anew.

    The draw is differentiable in the means and log-variances, both (N, Z) (Kingma and Welling, section 2.4).
    """
    epsilon = tf.random.normal(tf.shape(mu), dtype=mu.dtype)
    return mu + tf.exp(0.5 * logvar) * epsilon


reparameterization = reparametrize  # the handout's name for it


def bce_function(x_hat, x):
    """Binary cross-entropy, summed over all pixels of all images: -sum(x log x_hat + (1 - x) log(1 - x_hat)).

    This is the reconstruction term -log p(x|z) of the ELBO for a Bernoulli decoder (Kingma and Welling, appendix C.1).

    Args:
        x_hat: reconstructions (N, 1, H, W) in [0, 1].
        x: images (N, 1, H, W) in [0, 1].

    Returns:
        A float32 scalar; finite for pixels of exactly 0 and 1 too.

    Raises:
        ValueError: the two shapes differ.
    """
    x_hat, x = tf.cast(x_hat, tf.float32), tf.cast(x, tf.float32)
    x_hat.shape.assert_is_compatible_with(x.shape)
    x_hat = tf.clip_by_value(x_hat, MIN_PROBABILITY, 1 - MIN_PROBABILITY)
    return -tf.reduce_sum(x * tf.math.log(x_hat) + (1 - x) * tf.math.log(1 - x_hat))


def kl_divergence(mu, logvar):
    """KL(N(mu, sigma²) || N(0, I)), summed over all images: -1/2 sum(1 + logvar - mu² - exp(logvar)).

    The means and the log-variances are (N, Z); the sum is a float32 scalar, 0 or more (Kingma and Welling, appendix B).

    Raises:
        ValueError: the two shapes differ.
    """
    mu, logvar = tf.cast(mu, tf.float32), tf.cast(logvar, tf.float32)
    mu.shape.assert_is_compatible_with(logvar.shape)
    return -0.5 * tf.reduce_sum(1 + logvar - tf.square(mu) - tf.exp(logvar))


def loss_function(x_hat, x, mu, logvar):
    """The negative ELBO per image, (BCE + KL) / N, a float32 scalar: what the handout minimises, with lambda = 1.

    Arguments and errors are those of `bce_function` and `kl_divergence`.
    """
    num_images = tf.cast(tf.shape(x)[0], tf.float32)
    return (bce_function(x_hat, x) + kl_divergence(mu, logvar)) / num_images
