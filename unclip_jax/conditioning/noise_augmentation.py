"""unCLIP's condition: an image's CLIP embedding, noised to a level, beside the level's own embedding."""

import jax
import jax.numpy as jnp

from unclip_jax.models.timestep import timestep_embedding


def noise_image_embeddings(
    embeddings: jax.Array,
    levels: jax.Array,
    noise: jax.Array,
    *,
    alphas_cumprod: jax.Array,
    mean: jax.Array,
    std: jax.Array,
) -> jax.Array:
    """Noises CLIP image embeddings to a level by forward diffusion, and appends the level's embedding.

    Source: CLIPEmbeddingNoiseAugmentation of the original.

    Args:
        embeddings: (B, D), un-normalised projections of the vision tower.
        levels: (B,) int in 0..999. Level 0 adds a little noise, too.
        noise: (B, D) standard normal.
        alphas_cumprod: (1000,), of the cosine schedule.
        mean: (D,), of the embeddings, which are normalised for the noising and denormalised afterwards.
        std: (D,), likewise.

    Returns:
        (B, 2 D) float32, the UNet's class label: [embedding | cos | sin].
    """
    alpha = jnp.asarray(alphas_cumprod)[levels][:, None]
    scaled = (embeddings.astype(jnp.float32) - mean) / std
    noised = jnp.sqrt(alpha) * scaled + jnp.sqrt(1.0 - alpha) * noise
    return jnp.concatenate([noised * std + mean, timestep_embedding(levels, embeddings.shape[-1])], axis=-1)


def mix_conditions(conditions: jax.Array, weights: jax.Array) -> jax.Array:
    """The weighted mean of several images' conditions, sum(w c) / sum(w), including the level's half.

    Args:
        conditions: (B, K, 2 D).
        weights: (K,), or (B, K), of any sign; their sum is not zero.

    Returns:
        (B, 2 D).
    """
    weights = jnp.broadcast_to(weights, conditions.shape[:2])
    mix = jnp.einsum("bkd,bk->bd", conditions, weights, precision=jax.lax.Precision.HIGHEST)
    return mix / jnp.sum(weights, axis=1, keepdims=True)
