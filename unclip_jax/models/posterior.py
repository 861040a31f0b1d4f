"""What the VAE's encoder predicts of an image's latents: a Gaussian."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Posterior(NamedTuple):
    """The diagonal Gaussian that the encoder predicts; mean and logvar are (B, H/f, W/f, latent_channels) float32."""

    mean: jax.Array
    logvar: jax.Array

    def sample(self, noise: jax.Array) -> jax.Array:
        """A sample from the posterior. noise: standard normal of the mean's shape."""
        return self.mean + jnp.exp(0.5 * self.logvar) * noise


def posterior(moments: jax.Array) -> Posterior:
    """The posterior of moments: means and log variances, (B, H/f, W/f, 2 latent_channels) float32."""
    mean, logvar = jnp.split(moments, 2, axis=-1)
    return Posterior(mean, jnp.clip(logvar, -30.0, 20.0))
