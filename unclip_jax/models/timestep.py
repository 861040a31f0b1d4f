"""The sinusoidal embedding of diffusion timesteps and of noise levels."""

import math

import jax
import jax.numpy as jnp
import numpy as np


def timestep_embedding(timesteps: jax.Array, dim: int, max_period: float = 10000.0) -> jax.Array:
    """Embeds scalars as [cos | sin] of geometrically spaced frequencies (Vaswani et al. 2017, arXiv:1706.03762).

    Frequencies are exp(-ln(max_period) * i / (dim // 2)), the original's (no "- 1" in the divisor).

    Args:
        timesteps: (B,) of any real dtype; fractions are kept.
        dim: The width of the result. An odd one ends in a column of zeros.
        max_period: The longest period.

    Returns:
        (B, dim) float32.
    """
    half = dim // 2
    # The exponents are formed in float32 as the references form them: at t = 999 one rounding more in a frequency
    # moves the sinusoid by 6e-5.
    exponents = np.float32(-math.log(max_period)) * np.arange(half, dtype=np.float32) / np.float32(half)
    frequencies = np.exp(exponents.astype(np.float64)).astype(np.float32)
    angles = timesteps.astype(jnp.float32)[:, None] * frequencies
    embedding = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
    return jnp.pad(embedding, ((0, 0), (0, dim % 2)))
