"""Encoded images to the UNet's latents: a draw from the VAE's posterior, or its mode."""

import jax

from unclip_jax.models.vae import posterior


def latents_from_moments(moments: jax.Array, noise: jax.Array | None, scaling_factor: float) -> jax.Array:
    """An image's latents at the UNet's scale.

    moments: (B, h, w, 2 C) float32, what `VAE.moments` gives. noise: (B, h, w, C) standard normal for a draw from the
    posterior, as both references encode every given image; None takes the mode. Returns (B, h, w, C) float32.
    """
    predicted = posterior(moments)
    return scaling_factor * (predicted.mean if noise is None else predicted.sample(noise))
