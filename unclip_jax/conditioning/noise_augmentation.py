"""What the denoiser is told of an image: its CLIP embedding, noised to a level, beside the level's own embedding."""

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
    """Perturbs CLIP image embeddings by the forward diffusion at a noise level and appends the level's embedding.

    embeddings: (B, D) un-normalised projections of the vision tower. levels: (B,) int in 0..999; level 0 adds a little
    noise, too. noise: (B, D) standard normal. alphas_cumprod: (1000,), the cosine schedule. mean, std: (D,) statistics
    of the embeddings, which are normalised by them around the noising. Returns (B, 2 D) float32, the UNet's class
    label: [embedding | cos | sin]. Source: CLIPEmbeddingNoiseAugmentation of the original.
    """
    alpha = jnp.asarray(alphas_cumprod)[levels][:, None]
    scaled = (embeddings.astype(jnp.float32) - mean) / std
    noised = jnp.sqrt(alpha) * scaled + jnp.sqrt(1.0 - alpha) * noise
    return jnp.concatenate([noised * std + mean, timestep_embedding(levels, embeddings.shape[-1])], axis=-1)


def mix_conditions(conditions: jax.Array, weights: jax.Array) -> jax.Array:
    """The weighted mean of several images' conditions: sum(w c) / sum(w), the level's half included.

    conditions: (B, K, 2 D); weights: (K,), any sign, their sum not zero. Returns (B, 2 D).
    """
    return jnp.einsum("bkd,k->bd", conditions, weights, precision=jax.lax.Precision.HIGHEST) / jnp.sum(weights)
