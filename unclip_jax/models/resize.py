"""Resizing as PyTorch's `interpolate`, without antialiasing: bilinear with or without aligned corners, and bicubic."""

import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax.models.precision import precision_of


def resize_bilinear(x: jax.Array, height: int, width: int, *, align_corners: bool) -> jax.Array:
    """x: (B, H, W, C) -> (B, height, width, C).

    align_corners: keep the centres of the corner pixels in place; else the corners of the image.
    """
    rows = linear_weights(x.shape[1], height, align_corners).astype(x.dtype)
    columns = linear_weights(x.shape[2], width, align_corners).astype(x.dtype)
    return jnp.einsum("bhwc,yh,xw->byxc", x, rows, columns, precision=precision_of(x.dtype))


def resize_bicubic(x: jax.Array, height: int, width: int) -> jax.Array:
    """x: (B, H, W, C) -> (B, height, width, C), by cubic convolution with a = -0.75, the edges repeated."""
    rows, columns = (
        cubic_weights(old, new).astype(x.dtype) for old, new in zip(x.shape[1:3], (height, width), strict=True)
    )
    return jnp.einsum("bhwc,yh,xw->byxc", x, rows, columns, precision=precision_of(x.dtype))


def cubic_weights(old: int, new: int) -> np.ndarray:
    """The weights of each new pixel's four neighbours along one axis, see `resize_bicubic`: (new, old) float64."""
    place = (np.arange(new) + 0.5) * (old / new) - 0.5
    first = np.floor(place).astype(int) - 1
    weights = np.zeros((new, old))
    for tap in range(4):
        distance = np.abs(place - (first + tap))
        near = (1.25 * distance - 2.25) * distance**2 + 1
        far = -0.75 * (((distance - 5) * distance + 8) * distance - 4)
        np.add.at(weights, (np.arange(new), np.clip(first + tap, 0, old - 1)), np.where(distance <= 1, near, far))
    return weights


def linear_weights(old: int, new: int, align_corners: bool) -> np.ndarray:
    """The weights of each new pixel's two neighbours along one axis, see `resize_bilinear`: (new, old) float64."""
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
