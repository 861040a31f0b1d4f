"""Samples of a denoiser in training: a grid of images, each column for one condition."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from unclip_jax.checkpoints.networks import Network
from unclip_jax.conditioning.noise_augmentation import noise_image_embeddings
from unclip_jax.image_files import to_uint8
from unclip_jax.models.vae import posterior
from unclip_jax.sampling.guidance import double, guide, interleave
from unclip_jax.sampling.loop import sample
from unclip_jax.sampling.noise import Branch, draw, image_keys
from unclip_jax.sampling.schedule import add_noise
from unclip_jax.sampling.solvers import Solver


def sample_latents(
    unet: Network,
    solver: Solver,
    frozen: Mapping[str, Any],
    scaling_factor: float,
    params: Mapping[str, Any],
    encoded: Mapping[str, Any],
    guidance_scale: jax.Array,
    seed: int = 0,
) -> jax.Array:
    """Samples latents under the conditions of a batch; images condition at noise level 0.

    Args:
        unet: The UNet.
        solver: The solver.
        frozen: As in `unclip_jax.training.diffusion_objective.losses`.
        scaling_factor: The VAE's.
        params: The UNet's parameters.
        encoded: As in `losses`.
        guidance_scale: ().
        seed: The seed.

    Returns:
        (B, h, w, C), scaled.
    """
    model = unet.merge(params)
    count = len(encoded["moments"])
    shape = (*encoded["moments"].shape[1:3], encoded["moments"].shape[3] // 2)
    keys = image_keys(seed, jnp.arange(count))
    empty = jnp.broadcast_to(frozen["empty_context"], encoded["context"].shape)
    labels = None
    if (embeds := encoded.get("image_embeds")) is not None:
        noise = draw(keys, Branch.IMAGE, embeds.shape[1:])
        labels = noise_image_embeddings(embeds, jnp.zeros(count, jnp.int32), noise, **frozen["noising"])
        labels = interleave(jnp.zeros_like(labels), labels)
    added = None
    if "low_res" in encoded:
        level = jnp.full(count, 20)
        noise = draw(keys, Branch.IMAGE, encoded["low_res"].shape[1:])
        added = add_noise(encoded["low_res"], noise, frozen["low_res_alphas_cumprod"][level])
        labels = double(level)
    elif "masked_moments" in encoded:
        added = jnp.concatenate([encoded["mask"], scaling_factor * posterior(encoded["masked_moments"]).mean], axis=-1)
    elif "depth_map" in encoded:
        added = encoded["depth_map"]
    text = model.encode_context(interleave(empty, encoded["context"]))

    def denoise(x: jax.Array, row: Mapping[str, jax.Array]) -> jax.Array:
        emb = model.embed_time(jnp.full(2 * count, row["timestep"]))
        emb = emb if labels is None else emb + model.embed_class(labels)
        x = x if added is None else jnp.concatenate([x, added], axis=-1)
        # Merged within the loop: one that recomputes activations must not come from outside of it.
        return guide(unet.merge(params).denoise(double(x), emb, text), guidance_scale)

    return sample(denoise, solver, draw(keys, Branch.LATENTS, shape), keys=keys)


def grid(rows: list[np.ndarray]) -> Image.Image:
    """Rows of images, each (B, H, W, 3) in -1..1, one row below the other."""
    lines = [np.concatenate(list(row / 2 + 0.5), axis=1) for row in rows]
    return Image.fromarray(to_uint8(np.concatenate(lines, axis=0), "round"))
