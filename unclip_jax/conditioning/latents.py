"""The UNet's latents of encoded images: a sample from the VAE's posterior, or its mode."""

import jax

from unclip_jax.models.posterior import posterior


def latents_from_moments(moments: jax.Array, noise: jax.Array | None, scaling_factor: float) -> jax.Array:
    """An image's latents at the UNet's scale.

    Args:
        moments: (B, h, w, 2 C) float32, from `VAE.moments`.
        noise: (B, h, w, C) standard normal, for a sample from the posterior, which is how both references encode every
            given image. None takes the mode.
        scaling_factor: The VAE's.

    Returns:
        (B, h, w, C) float32.
    """
    predicted = posterior(moments)
    return scaling_factor * (predicted.mean if noise is None else predicted.sample(noise))


def latents_as_encoded(latents: jax.Array, noise: jax.Array | None, scaling_factor: float) -> jax.Array:
    """The same where the encoder predicts latents and no distribution, as a tiny autoencoder's does.

    Args:
        latents: (B, h, w, C) float32, from `AutoencoderTiny.moments`.
        noise: Not read: nothing is drawn.
        scaling_factor: The autoencoder's.

    Returns:
        (B, h, w, C) float32.
    """
    return scaling_factor * latents
