"""The variational autoencoder (VAE), its conditional form (CVAE), and the formulas they are trained with.

Shapes: N images of H·W = `input_size` pixels, Z = `latent_size`, C = `num_classes`.
Sources: Kingma and Welling, "Auto-Encoding Variational Bayes", 2014 (https://arxiv.org/abs/1312.6114);
Sohn, Lee and Yan, "Learning Structured Output Representation using Deep Conditional Generative Models", 2015.
"""

import math
import operator

import tensorflow as tf

HIDDEN_DIM = 400  # the width in Kingma and Welling's MNIST networks is 500, in most public ones 400
EPSILON = 1e-7  # keeps log(0) out of the cross-entropy; Keras clips probabilities at the same value
# MNIST's average pixel, 0.13, has log-odds of -1.9: no epoch goes into learning that the background is black. A little
# lighter, as from there the loss on brighter images, such as a test's random ones, rises for some steps at first.
PIXEL_LOGIT = -1.5


class _Autoencoder(tf.keras.Model):
    """What the VAE and the CVAE share: the four parts, and the pass through them."""

    def __init__(self, name, input_size, latent_size, num_classes=0):
        super().__init__(name=name, dtype="float32")  # whatever the global dtype policy is; the hidden layers follow it
        side = math.isqrt(max(input_size, 0))
        if side < 1 or side**2 != input_size:
            raise ValueError(f"input_size must be a square number, such as 28 * 28 = 784; got {input_size}")
        if latent_size < 1:
            raise ValueError(f"latent_size must be 1 or more; got {latent_size}")
        self.input_size = operator.index(input_size)
        self.latent_size = operator.index(latent_size)
        self.hidden_dim = HIDDEN_DIM
        self._images_shape = (None, 1, side, side)

        layers = tf.keras.layers
        faint = {"kernel_initializer": tf.keras.initializers.RandomNormal(stddev=0.01)}
        dark = {"bias_initializer": tf.keras.initializers.Constant(PIXEL_LOGIT)}
        pixels = layers.Dense(self.input_size, activation="sigmoid", **faint, **dark, dtype="float32")
        to_image = layers.Reshape((1, side, side), dtype="float32")
        self.encoder = tf.keras.Sequential([layers.Flatten(), *_hidden_layers()], name="encoder")
        self.mu_layer = _posterior_layer("mu_layer", self.latent_size, num_classes)
        self.logvar_layer = _posterior_layer("logvar_layer", self.latent_size, num_classes)
        self.decoder = tf.keras.Sequential([*_hidden_layers(), pixels, to_image], name="decoder")
        # With the weights made here, a new model can be saved, loaded, frozen, or trained in a graph.
        self.encoder.build((None, self.input_size + num_classes) if num_classes else self._images_shape)
        self.mu_layer.build((None, HIDDEN_DIM))
        self.logvar_layer.build((None, HIDDEN_DIM))
        self.decoder.build((None, self.latent_size + num_classes))
        self.built = True
        # Keras 3 exports no model without.
        self._build_shapes_dict = {"x": self._images_shape} | ({"c": (None, num_classes)} if num_classes else {})
        if num_classes:
            _strengthen_label_rows(self.encoder.layers[1].kernel, num_classes, gain=1.5)
            _strengthen_label_rows(self.decoder.layers[0].kernel, num_classes)

    def get_config(self):
        """The constructor's arguments, from which Keras's `from_config` and `load_model` make the model again."""
        return {"input_size": self.input_size, "latent_size": self.latent_size}

    def _autoencode(self, encoder_input, *condition):
        """Encode to q(z|·), draw z from it, decode z with `condition`, (N, C) if given, behind it."""
        hidden = self.encoder(encoder_input)
        mu, logvar = self.mu_layer(hidden), self.logvar_layer(hidden)
        z = reparametrize(mu, logvar)
        return self.decoder(tf.concat([z, *condition], axis=1)), mu, logvar


for _name in ("VAE", "CVAE"):  # TensorFlow 2.12 registers no name twice, as a reload of this module would
    tf.keras.utils.get_custom_objects().pop(f"vae>{_name}", None)


@tf.keras.utils.register_keras_serializable("vae")
class VAE(_Autoencoder):
    """A fully-connected variational autoencoder.

    `decoder` maps z (N, Z) to images (N, 1, H, W); with z ~ N(0, I) they are new ones.

    Args:
        input_size: pixels of an image, H·W with H = W.
        latent_size: Z, the dimensions of the latent space.

    Raises:
        ValueError: `input_size` is no square, or `latent_size` is below 1.
    """

    def __init__(self, input_size, latent_size=15):
        super().__init__("vae", input_size, latent_size)

    def call(self, x):
        """Reconstruct a batch of images through the latent space.

        Args:
            x: images (N, 1, H, W), any real dtype, values in [0, 1].

        Returns:
            `x_hat` (N, 1, H, W) in [0, 1], and `mu` and `logvar` (N, Z) of q(z|x), all float32.

        Raises:
            ValueError: the images are not of this model's size.
        """
        return self._autoencode(_as_float32(x, "x", self._images_shape))


@tf.keras.utils.register_keras_serializable("vae")
class CVAE(_Autoencoder):
    """A conditional VAE: the VAE with the one-hot class c joined to the image and to z.

    `decoder` maps [z, c] (N, Z + C) to images (N, 1, H, W); with z ~ N(0, I) they are new ones of class c.

    Args:
        input_size: pixels of an image, H·W with H = W.
        num_classes: C, the width of the one-hot labels.
        latent_size: Z, the dimensions of the latent space.

    Raises:
        ValueError: `input_size` is no square, or `latent_size` or `num_classes` is below 1.
    """

    def __init__(self, input_size, num_classes=10, latent_size=15):
        if num_classes < 1:
            raise ValueError(f"num_classes must be 1 or more; got {num_classes}")
        super().__init__("cvae", input_size, latent_size, operator.index(num_classes))
        self.num_classes = operator.index(num_classes)

    def get_config(self):
        return {**super().get_config(), "num_classes": self.num_classes}

    def call(self, x, c):
        """Reconstruct a batch of images through the latent space, given their classes.

        Args:
            x: images (N, 1, H, W), any real dtype, values in [0, 1].
            c: one-hot labels (N, C), any real dtype.

        Returns:
            `x_hat` (N, 1, H, W) in [0, 1], and `mu` and `logvar` (N, Z) of q(z|x, c), all float32.

        Raises:
            ValueError: the images or the labels are not of this model's size.
        """
        x = _as_float32(x, "x", self._images_shape)
        c = _as_float32(c, "c", (None, self.num_classes))
        return self._autoencode(tf.concat([tf.reshape(x, (-1, self.input_size)), c], axis=1), c)


def reparametrize(mu, logvar):
    """Draw z = mu + sigma * epsilon, with epsilon ~ N(0, I) and sigma² = exp(logvar).

    The draw is differentiable in both arguments (Kingma and Welling, section 2.4).

    Args:
        mu: means (N, Z).
        logvar: log-variances (N, Z).

    Returns:
        z (N, Z), float64 if `mu` is, else float32; freshly drawn at every call.

    Raises:
        ValueError: the two shapes differ.
    """
    mu, logvar = _as_floats(mu, logvar, "mu and logvar")
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
        A scalar, float64 if `x_hat` is, else float32; finite for pixels of exactly 0 and 1 too.

    Raises:
        ValueError: the two shapes differ.
    """
    x_hat, x = _as_floats(x_hat, x, "x_hat and x")
    x_hat = tf.clip_by_value(x_hat, EPSILON, 1 - EPSILON)
    return -tf.reduce_sum(x * tf.math.log(x_hat) + (1 - x) * tf.math.log(1 - x_hat))


def kl_divergence(mu, logvar):
    """KL(N(mu, sigma²) || N(0, I)), summed over all images: -1/2 sum(1 + logvar - mu² - exp(logvar)).

    Source: Kingma and Welling, appendix B.

    Args:
        mu: means (N, Z).
        logvar: log-variances (N, Z).

    Returns:
        A scalar, float64 if `mu` is, else float32; 0 or more.

    Raises:
        ValueError: the two shapes differ.
    """
    mu, logvar = _as_floats(mu, logvar, "mu and logvar")
    return -0.5 * tf.reduce_sum(1 + logvar - tf.square(mu) - tf.exp(logvar))


def loss_function(x_hat, x, mu, logvar):
    """The negative ELBO per image, (BCE + KL) / N: what the handout minimises, with lambda = 1.

    Args:
        x_hat: reconstructions (N, 1, H, W) in [0, 1].
        x: images (N, 1, H, W) in [0, 1].
        mu: posterior means (N, Z).
        logvar: posterior log-variances (N, Z).

    Returns:
        A scalar, float64 if `x_hat` is, else float32.

    Raises:
        ValueError: the shapes of `x_hat` and `x`, or of `mu` and `logvar`, differ.
    """
    bce = bce_function(x_hat, x)
    images = tf.cast(tf.shape(x_hat)[0], bce.dtype)
    return (bce + tf.cast(kl_divergence(mu, logvar), bce.dtype)) / images


def _hidden_layers():
    """Three ReLU layers, with weights of variance 2 / fan-in (He et al., "Delving Deep into Rectifiers", 2015)."""
    return [tf.keras.layers.Dense(HIDDEN_DIM, activation="relu", kernel_initializer="he_uniform") for _ in range(3)]


def _posterior_layer(name, latent_size, num_classes):
    """A linear layer for mu or logvar; in a CVAE it starts near zero.

    z then says little at first, and the decoder has to listen to c.
    """
    initializer = tf.keras.initializers.RandomNormal(stddev=0.02) if num_classes else "glorot_uniform"
    return tf.keras.layers.Dense(latent_size, kernel_initializer=initializer, dtype="float32", name=name)


def _strengthen_label_rows(kernel, num_classes, gain=1.0):
    """Scale a kernel's last rows, those of a one-hot label, to `gain` times the size for a fan-in of 1.

    One of these rows is in use at a time, so that is their fan-in. As they are drawn they would be 28 times smaller in
    the encoder and 5 times smaller in the decoder; the class would then reach the decoder sooner through z than through
    c, and a random z decode to a random digit whatever c asks for. The encoder's gain is by trial: with more of it
    samples are more readable and the loss is higher.
    """
    weights = kernel.numpy()
    weights[-num_classes:] *= gain * math.sqrt(len(weights))
    kernel.assign(weights)


def _as_float32(tensor, name, shape):
    """`tensor` as float32; ValueError if its shape is not `shape`, in which None is any size."""
    tensor = tf.convert_to_tensor(tensor)
    if not tensor.shape.is_compatible_with(shape):
        raise ValueError(f"{name} must have the shape {str(shape).replace('None', 'N')}; got {tuple(tensor.shape)}")
    return tf.cast(tensor, tf.float32)


def _as_floats(first, second, names):
    """Both tensors in float32, or float64 if the first is; ValueError if their shapes differ."""
    first, second = tf.convert_to_tensor(first), tf.convert_to_tensor(second)
    if not first.shape.is_compatible_with(second.shape):
        raise ValueError(f"{names} must have the same shape; got {first.shape} and {second.shape}")
    dtype = tf.float64 if first.dtype == tf.float64 else tf.float32  # half precision holds no sum over many pixels
    return tf.cast(first, dtype), tf.cast(second, dtype)
