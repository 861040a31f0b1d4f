"""The small picture that an upscaler enlarges: noised to a level, which hides what the model shall invent anew."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax.sampling.schedule import add_noise

# The upscaler was trained up to this level of its 1000.
MAX_LEVEL = 350


def noise_low_res(
    pixels: jax.Array, levels: jax.Array, noise: jax.Array, *, alphas_cumprod: jax.Array | np.ndarray
) -> jax.Array:
    """The small picture as the UNet reads it, beside latents of the same size: (B, h, w, 3) float32.

    pixels: (B, h, w, 3) in -1..1, see `unclip_jax.conditioning.vae_image.start_pixels` (bicubic in both references).
    levels: (B,) int in 0..350, the UNet's class labels too; level 0 adds a little noise. noise: (B, h, w, 3) standard
    normal. alphas_cumprod: (1000,), of the schedule in image space, `CheckpointConfig.image_noising`. The picture of
    the unconditional half is the same. Source: the original's `low_scale_model`, diffusers' `low_res_scheduler`.
    """
    return add_noise(pixels, noise, jnp.asarray(alphas_cumprod)[levels])


def check_levels(value: Any, pictures: int, rows: int = MAX_LEVEL + 1) -> np.ndarray:
    """(pictures,) int32 noise levels out of one or one a picture.

    rows: of the UNet's table of levels, where it has fewer than the published one. Raises ValueError otherwise.
    """
    several = isinstance(value, Sequence | np.ndarray) and not isinstance(value, str)
    levels = list(value) if several else [value] * pictures
    if len(levels) != pictures:
        raise ValueError(f"noise_level has {len(levels)} values; there are {pictures} images, want one for each")
    most = min(rows - 1, MAX_LEVEL)
    for level in levels:
        if not isinstance(level, int | np.integer) or isinstance(level, bool) or not 0 <= level <= most:
            raise ValueError(f"noise_level is {level!r}; want an integer from 0 to {most}")
    return np.asarray(levels, np.int32)
