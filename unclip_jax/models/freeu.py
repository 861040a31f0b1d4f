"""FreeU (Si et al. 2023, arXiv:2309.11497): reweights a trained UNet's decoder, without training.

On the lowest two levels of the up path, half of the backbone's channels are multiplied by b, and the lowest frequencies
of the skip connections by s, as in diffusers' `enable_freeu`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class FreeU(NamedTuple):
    """The four factors, each a number or (): s1 and b1 for the first level of the up path, s2 and b2 for the second.

    Recommended for Stable Diffusion 2.1: s1=0.9, s2=0.2, b1=1.1, b2=1.2.
    """

    s1: jax.Array | float
    s2: jax.Array | float
    b1: jax.Array | float
    b2: jax.Array | float


def reweight(x: jax.Array, skip: jax.Array, level: int, freeu: FreeU) -> tuple[jax.Array, jax.Array]:
    """Reweights the inputs of one resnet on the up path.

    Args:
        x: (B, H, W, C), the backbone's features.
        skip: (B, H, W, C'), the skip connection's.
        level: Counted from the lowest.
        freeu: The factors.

    Returns:
        x and skip, reweighted.
    """
    if level > 1:
        return x, skip
    s, b = ((freeu.s1, freeu.b1), (freeu.s2, freeu.b2))[level]
    half = x.shape[-1] // 2
    scaled = (x[..., :half].astype(jnp.float32) * b).astype(x.dtype)
    return jnp.concatenate([scaled, x[..., half:]], axis=-1), scale_low_frequencies(skip, s)


def scale_low_frequencies(x: jax.Array, scale: jax.Array | float) -> jax.Array:
    """x: (B, H, W, C) with the frequencies 0 and -1 of both axes scaled: the real part of what a filter leaves.

    The reference scales a square of two by two around the middle of the shifted spectrum, which holds these four
    frequencies and not their mirror images. For so few, sums over the image are cheaper than a Fourier transform.
    """
    height, width = x.shape[1:3]
    # Along an axis of one the two are the same, and are counted once.
    angles = [
        2 * np.pi * (u * np.arange(height)[:, None] / height + v * np.arange(width) / width)
        for u in sorted({0, -1 % height})
        for v in sorted({0, -1 % width})
    ]
    waves = jnp.asarray(np.stack([wave(angle) for angle in angles for wave in (np.cos, np.sin)]), jnp.float32)
    wide = x.astype(jnp.float32)
    sums = jnp.einsum("khw,bhwc->bkc", waves, wide, precision="highest") / (height * width)
    low = jnp.einsum("khw,bkc->bhwc", waves, sums, precision="highest")
    return (wide + (scale - 1) * low).astype(x.dtype)
