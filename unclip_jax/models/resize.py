"""Bilinear resizing as PyTorch's `interpolate` does it: no anti-aliasing, corners aligned or not."""

import jax
import jax.numpy as jnp
import numpy as np


def resize_bilinear(x: jax.Array, height: int, width: int, *, align_corners: bool) -> jax.Array:
    """x: (B, H, W, C) -> (B, height, width, C).

    align_corners: whether the centres of the corner pixels stay where they are; else the corners of the picture do.
    """
    rows = _weights(x.shape[1], height, align_corners).astype(x.dtype)
    columns = _weights(x.shape[2], width, align_corners).astype(x.dtype)
    return jnp.einsum("bhwc,yh,xw->byxc", x, rows, columns)


def _weights(old: int, new: int, align_corners: bool) -> np.ndarray:
    """(new, old): each new pixel's weights over its two neighbours along one axis."""
    if align_corners:
        place = np.arange(new) * ((old - 1) / max(new - 1, 1))
    else:
        place = np.maximum((np.arange(new) + 0.5) * (old / new) - 0.5, 0)
    place = np.minimum(place, old - 1)
    low = np.minimum(np.floor(place).astype(int), old - 1)
    high = np.minimum(low + 1, old - 1)
    weights = np.zeros((new, old))
    np.add.at(weights, (np.arange(new), low), 1 - (place - low))
    np.add.at(weights, (np.arange(new), high), place - low)
    return weights
