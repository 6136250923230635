"""A variational autoencoder (VAE), a conditional VAE (CVAE), and the loss that trains them.

Shapes: N images of height H and width W, with H·W = `input_size`; Z = `latent_size`; C = `num_classes`.
Sources: Kingma and Welling, "Auto-Encoding Variational Bayes", 2014 (https://arxiv.org/abs/1312.6114);
Sohn, Lee and Yan, "Learning Structured Output Representation using Deep Conditional Generative Models", 2015.
"""

import math

import tensorflow as tf
from tensorflow.keras import Sequential
from tensorflow.keras.initializers import Constant
from tensorflow.keras.layers import Dense, Flatten, Reshape

HIDDEN_DIM = 400  # most public implementations use 400; Kingma and Welling use 500 for MNIST
# Bias of the logvar layer. It gives sigma = exp(-2 / 2) = 1/e. Where mu² averages 1 - sigma², the KL divergence is then
# log(1 / sigma) = 1 nat per latent dimension. Trained models have about as much: 14 to 19 nats over 15 dimensions. With
# a sigma of 1, z is mostly noise at first, and the decoder learns to ignore some dimensions of z before the encoder
# uses them.
INITIAL_LOGVAR = -2.0
MIN_PROBABILITY = 1e-7  # avoids log(0) in the cross-entropy; Keras clips probabilities at the same value


def hidden_layers():
    """Return three ReLU layers, initialized with He's rule: a variance of 2 / fan_in (He et al., 2015)."""
    return [Dense(HIDDEN_DIM, activation="relu", kernel_initializer="he_uniform") for _ in range(3)]


def image_shape(input_size):
    """Return the shape (1, H, W) of a square image with `input_size` pixels."""
    side = math.isqrt(input_size)
    if side**2 != input_size:
        raise ValueError(f"input_size must be a square number, such as 28 * 28 = 784; got {input_size}")
    return 1, side, side


def image_layers(input_size):
    """Return the last layers of a decoder: a sigmoid layer of `input_size` pixels and a reshape to (1, H, W)."""
    return [Dense(input_size, activation="sigmoid"), Reshape(image_shape(input_size))]


class VAE(tf.keras.Model):
    """Fully-connected variational autoencoder.

    To generate new images, sample z (N, Z) from N(0, I) and call `decoder(z)`, which returns images (N, 1, H, W).

    Args:
        input_size: Number of pixels of an image, H·W with H = W.
        latent_size: Number of dimensions of the latent space, Z.

    Raises:
        ValueError: If `input_size` is not a square number.
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
        if type(self).__init__ is VAE.__init__:  # the constructor of a subclass may not have set all attributes yet
            self(tf.zeros((1, *image_shape(input_size))))  # creates the weights, so that they can be saved or loaded

    def get_config(self):
        """Return the constructor's arguments. `load_model` needs them, and Keras 3 does not record them."""
        return {"input_size": self.input_size, "latent_size": self.latent_size}

    def call(self, x):
        """Encode images, sample z from their posterior, and decode it.

        Args:
            x: Images (N, 1, H, W) in [0, 1], of any real dtype.

        Returns:
            Three tensors: the reconstructions `x_hat` (N, 1, H, W) in [0, 1], and the mean `mu` (N, Z) and
            log-variance `logvar` (N, Z) of q(z|x). Their dtype is the layers' compute dtype, float32 by default.
        """
        x = tf.cast(x, self.compute_dtype)
        hidden = self.encoder(x)
        mu, logvar = self.mu_layer(hidden), self.logvar_layer(hidden)
        z = reparametrize(mu, logvar)
        return self.decoder(z), mu, logvar


def initialize_label_rows(kernel, num_classes):
    """Re-initialize the label's rows, the last `num_classes` of `kernel`, using He's rule with a fan-in of 1.

    He's rule assumes that all inputs are active. A fan-in of 794 (encoder) gives a standard deviation of 0.05, and one
    of 25 (decoder) 0.28. A one-hot label has only one active input, which gives sqrt(2 / 1) = 1.4. With smaller rows,
    the decoder learns the class from z before it learns to use c. Then z determines the digit, whatever c is. If the
    layer's initializer runs again, it overwrites these rows.
    """
    rows = tf.random.normal((num_classes, kernel.shape[1]), stddev=math.sqrt(2), dtype=kernel.dtype)
    kernel.assign(tf.concat([kernel[:-num_classes], rows], axis=0))


class CVAE(tf.keras.Model):
    """Conditional VAE: the VAE with a one-hot class label c concatenated with the image and with z.

    To generate new images of class c, sample z (N, Z) from N(0, I) and call `decoder` on the concatenation [z, c]
    (N, Z + C). It returns images (N, 1, H, W).

    Args:
        input_size: Number of pixels of an image, H·W with H = W.
        num_classes: Number of classes, C.
        latent_size: Number of dimensions of the latent space, Z.

    Raises:
        ValueError: If `input_size` is not a square number.
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
        for layer in (self.mu_layer, self.logvar_layer):  # without this, a subclass would lack these weights
            layer.build((None, HIDDEN_DIM))
        if type(self).__init__ is CVAE.__init__:  # see VAE
            self(tf.zeros((1, *image_shape(input_size))), tf.zeros((1, num_classes)))

    def get_config(self):
        """Return the constructor's arguments."""
        return {"input_size": self.input_size, "num_classes": self.num_classes, "latent_size": self.latent_size}

    def call(self, x, c):
        """Encode images and labels, sample z from their posterior, and decode z and the labels.

        Args:
            x: Images (N, 1, H, W) in [0, 1], of any real dtype.
            c: One-hot labels (N, C), of any real dtype.

        Returns:
            Three tensors as in `VAE.call`; `mu` and `logvar` are those of q(z|x, c).
        """
        x, c = tf.cast(x, self.compute_dtype), tf.cast(c, self.compute_dtype)
        hidden = self.encoder(tf.concat([tf.reshape(x, (-1, self.input_size)), c], axis=1))
        mu, logvar = self.mu_layer(hidden), self.logvar_layer(hidden)
        z = reparametrize(mu, logvar)
        return self.decoder(tf.concat([z, c], axis=1)), mu, logvar


def reparametrize(mu, logvar):
    """Sample z = mu + sigma * epsilon, with sigma² = exp(logvar) and epsilon ~ N(0, I), independently for each image.

    Gradients flow through z to `mu` and `logvar` (Kingma and Welling, section 2.4).

    Args:
        mu: Means (N, Z).
        logvar: Log-variances (N, Z).

    Returns:
        z (N, Z), of the dtype of `mu`.
    """
    epsilon = tf.random.normal(tf.shape(mu), dtype=mu.dtype)
    return mu + tf.exp(0.5 * logvar) * epsilon


reparameterization = reparametrize  # the handout's name for it


def bce_function(x_hat, x):
    """Compute the binary cross-entropy, -sum(x log x_hat + (1 - x) log(1 - x_hat)), over all pixels of all images.

    This is the reconstruction term -log p(x|z) of the negative ELBO, for a Bernoulli decoder (Kingma and Welling,
    appendix C.1).

    Args:
        x_hat: Reconstructions (N, 1, H, W) in [0, 1].
        x: Images (N, 1, H, W) in [0, 1].

    Returns:
        A float32 scalar, which is finite even if pixels are exactly 0 or 1.

    Raises:
        ValueError: If the shapes differ.
    """
    x_hat, x = tf.cast(x_hat, tf.float32), tf.cast(x, tf.float32)
    x_hat.shape.assert_is_compatible_with(x.shape)
    x_hat = tf.clip_by_value(x_hat, MIN_PROBABILITY, 1 - MIN_PROBABILITY)
    return -tf.reduce_sum(x * tf.math.log(x_hat) + (1 - x) * tf.math.log(1 - x_hat))


def kl_divergence(mu, logvar):
    """Compute KL(N(mu, sigma²) || N(0, I)) = -1/2 sum(1 + logvar - mu² - exp(logvar)), summed over all images.

    The formula is derived in Kingma and Welling, appendix B.

    Args:
        mu: Means (N, Z).
        logvar: Log-variances (N, Z).

    Returns:
        A float32 scalar, not negative except for rounding.

    Raises:
        ValueError: If the shapes differ.
    """
    mu, logvar = tf.cast(mu, tf.float32), tf.cast(logvar, tf.float32)
    mu.shape.assert_is_compatible_with(logvar.shape)
    return -0.5 * tf.reduce_sum(1 + logvar - tf.square(mu) - tf.exp(logvar))


def loss_function(x_hat, x, mu, logvar):
    """Compute the negative ELBO per image, (BCE + KL) / N, as a float32 scalar. In the handout's terms, lambda is 1.

    The arguments and errors are those of `bce_function` and `kl_divergence`.
    """
    num_images = tf.cast(tf.shape(x)[0], tf.float32)
    return (bce_function(x_hat, x) + kl_divergence(mu, logvar)) / num_images
