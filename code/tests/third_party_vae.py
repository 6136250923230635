"""A third-party vae.py that assignment.py must support.

It reads batch sizes from static shapes and builds its layers in the first call. Its decoder returns (N, H·W). Every
model has its own Adam. The CVAE has no `num_classes`.
"""

import tensorflow as tf
from tensorflow.keras.layers import BatchNormalization, Dense


class VAE(tf.keras.Model):
    def __init__(self, input_size, latent_size=15):
        super().__init__()
        self.input_size, self.latent_size, self.hidden_dim = input_size, latent_size, 64
        self.encoder = tf.keras.Sequential([Dense(64, activation="relu"), BatchNormalization()])
        self.mu_layer, self.logvar_layer = tf.keras.Sequential([Dense(latent_size)]), Dense(latent_size)
        self.decoder = tf.keras.Sequential([Dense(64, activation="relu"), Dense(input_size, activation="sigmoid")])
        self.optimizer = tf.keras.optimizers.Adam(0.01)

    def call(self, x, c=None, training=None):
        label = [] if c is None else [c]
        hidden = self.encoder(tf.concat([tf.reshape(x, [x.shape[0], self.input_size]), *label], 1))
        mu, logvar = self.mu_layer(hidden), self.logvar_layer(hidden)
        z = mu + tf.exp(logvar / 2) * tf.random.normal([mu.shape[0], mu.shape[1]])
        return self.decoder(tf.concat([z, *label], 1)), mu, logvar


class CVAE(VAE):
    """The layers are the same. Their first call determines the input width."""


def loss_function(x_hat, x, mu, logvar):
    bce = tf.reduce_sum(tf.keras.losses.binary_crossentropy(tf.reshape(x, x_hat.shape), x_hat)) * x_hat.shape[1]
    return (bce - 0.5 * tf.reduce_sum(1 + logvar - mu**2 - tf.exp(logvar))) / x.shape[0]
