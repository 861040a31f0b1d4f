"""The small image that an upscaler enlarges: noised to a level, which hides the details that the model invents."""

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
    """The small image as the UNet reads it, beside latents of the same size.

    The unconditional half reads the same image. Source: the original's `low_scale_model`, diffusers'
    `low_res_scheduler`.

    Args:
        pixels: (B, h, w, 3) in -1..1, see `unclip_jax.conditioning.vae_image.start_pixels` (bicubic in both
            references).
        levels: (B,) int in 0..350, which are also the UNet's class labels. Level 0 adds a little noise.
        noise: (B, h, w, 3) standard normal.
        alphas_cumprod: (1000,), of the schedule in image space, `CheckpointConfig.image_noising`.

    Returns:
        (B, h, w, 3) float32.
    """
    return add_noise(pixels, noise, jnp.asarray(alphas_cumprod)[levels])


def check_levels(value: Any, images: int, rows: int = MAX_LEVEL + 1) -> np.ndarray:
    """Checks the noise levels, one for all images or one per image.

    Args:
        value: An integer, or a sequence of them.
        images: The number of images.
        rows: The number of rows in the UNet's table of levels, if smaller than the published one.

    Returns:
        (images,) int32.

    Raises:
        ValueError: A level is out of range, or there is a wrong number of them.
    """
    several = isinstance(value, Sequence | np.ndarray) and not isinstance(value, str)
    levels = list(value) if several else [value] * images
    if len(levels) != images:
        raise ValueError(
            f"noise_level has {len(levels)} values for {images} images; want one per image, or one for all"
        )
    most = min(rows - 1, MAX_LEVEL)
    for level in levels:
        if not isinstance(level, int | np.integer) or isinstance(level, bool) or not 0 <= level <= most:
            raise ValueError(f"noise_level is {level!r}; want an integer from 0 to {most}")
    return np.asarray(levels, np.int32)
