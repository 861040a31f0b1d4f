"""The training losses of an autoencoder: reconstruction, and latents near a standard normal distribution."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from unclip_jax.conditioning.clip_image import CLIP_MEAN, CLIP_STD
from unclip_jax.models.clip import VisionEncoder
from unclip_jax.models.resize import resize_bilinear
from unclip_jax.models.vae import Posterior

Perceptual = Callable[[jax.Array, jax.Array], jax.Array]


def kl_divergence(posterior: Posterior) -> jax.Array:
    """The divergence of each image's posterior from the standard normal, summed over latents: (B,) float32, nats.

    Source: arXiv:1312.6114.
    """
    terms = jnp.square(posterior.mean) + jnp.exp(posterior.logvar) - 1.0 - posterior.logvar
    return 0.5 * terms.sum(axis=(1, 2, 3))


def gradient_difference(made: jax.Array, wanted: jax.Array) -> jax.Array:
    """The difference of the differences of neighbouring pixels, (B,): what blurring loses.

    made, wanted: (B, H, W, C). Source: Mathieu et al. 2016, arXiv:1511.05440, with the differences' sign kept.
    """
    down, across = (
        jnp.abs(jnp.diff(made, axis=axis) - jnp.diff(wanted, axis=axis)).mean(axis=(1, 2, 3)) for axis in (1, 2)
    )
    return down + across


def autoencoding_losses(
    made: jax.Array,
    wanted: jax.Array,
    posterior: Posterior,
    *,
    kl_weight: float,
    gradient_weight: float = 0.0,
    squared_weight: float = 0.0,
    perceptual: Perceptual | None = None,
    perceptual_weight: float = 1.0,
) -> jax.Array:
    """Each image's loss: mean absolute error, and the weighted terms beside it.

    Args:
        made: (B, H, W, C) in -1..1, the decoded image.
        wanted: (B, H, W, C) in -1..1, the image.
        posterior: The encoder's.
        kl_weight: Of the divergence per latent number, so that it means the same at every size.
        gradient_weight: Of `gradient_difference`.
        squared_weight: Of the mean squared error.
        perceptual: (made, wanted) -> (B,), such as a distance of a network's features.
        perceptual_weight: Of that distance.

    Returns:
        (B,) float32.
    """
    error = made.astype(jnp.float32) - wanted.astype(jnp.float32)
    losses = jnp.abs(error).mean(axis=(1, 2, 3))
    losses += kl_weight * kl_divergence(posterior) / posterior.mean[0].size
    if squared_weight:
        losses += squared_weight * jnp.square(error).mean(axis=(1, 2, 3))
    if gradient_weight:
        losses += gradient_weight * gradient_difference(made, wanted)
    if perceptual is not None:
        losses += perceptual_weight * perceptual(made, wanted)
    return losses


def clip_distance(vision: VisionEncoder) -> Perceptual:
    """A perceptual term: half the squared distance of two images' normalised CLIP embeddings, 0 to 2.

    It measures what an image shows as a whole, not its texture; weight it lightly.
    """
    size = vision.config.image_size

    def embed(images: jax.Array) -> jax.Array:
        pixels = resize_bilinear(images.astype(jnp.float32) / 2 + 0.5, size, size, align_corners=False)
        seen = vision((pixels - CLIP_MEAN) / CLIP_STD).astype(jnp.float32)
        return seen / jnp.linalg.norm(seen, axis=-1, keepdims=True)

    return lambda made, wanted: 0.5 * jnp.square(embed(made) - embed(wanted)).sum(axis=-1)


def psnr(made: jax.Array, wanted: jax.Array) -> jax.Array:
    """Peak signal-to-noise ratio of each image in decibels, (B,), for values in -1..1 (a peak of 2)."""
    squared = jnp.square(made.astype(jnp.float32) - wanted.astype(jnp.float32)).mean(axis=(1, 2, 3))
    return 10.0 * jnp.log10(4.0 / jnp.maximum(squared, 1e-12))
