"""Doubling an image's sides and convolving it, as one convolution.

Repeating pixels is itself a convolution, of the image with zeros between its pixels, with four ones. The 3x3 kernel and
those ones together are one 4x4 kernel, of which only 2x2 taps meet a pixel at any place: 4/9 of the arithmetic, and
nothing is repeated in memory. It is the transposed convolution of stride 2 that libraries have for gradients.
"""

import jax
import jax.numpy as jnp

from unclip_jax.models.layers import Conv, upsample_nearest
from unclip_jax.models.partition import read_weight
from unclip_jax.models.platform import by_platform
from unclip_jax.models.precision import precision_of

# Fewer pixels, in all images together, are not worth a kernel that is 16/9 as large and made at every step: by the TPU
# compiler's estimates for a v5e, 2,048 of 640 channels are (a quarter less time), 512 of 1,280 are not (four times).
LEAST_PIXELS = 2048


def upsample_and_convolve(conv: Conv, x: jax.Array, size: tuple[int, int] | None = None) -> jax.Array:
    """`conv(upsample_nearest(x)[:, :height, :width])` for a 3x3 convolution, in the way that is fast on the platform.

    On CPUs that is what it says: the convolution in Winograd's domain does still less arithmetic.

    Args:
        conv: The convolution.
        x: (B, H, W, C).
        size: (height, width), 2 H or 2 H - 1 and 2 W or 2 W - 1. None: 2 H and 2 W.

    Returns:
        (B, height, width, C').
    """
    doubled = (2 * x.shape[1], 2 * x.shape[2])
    height, width = doubled if size is None else size

    def repeated(x: jax.Array) -> jax.Array:
        return conv(upsample_nearest(x)[:, :height, :width])

    def folded(x: jax.Array) -> jax.Array:
        dtype = x.dtype if conv.dtype is None else conv.dtype
        x, kernel = read_weight(x, conv.kernel)
        out = convolve_folded(x.astype(dtype), kernel.astype(dtype))
        return out if conv.bias is None else out + conv.bias[...].astype(dtype)

    transformed = conv.kernel[...].ndim == 3  # for a CPU
    # What is cut off lies within the reach of a kernel's tap, so it is cut before the convolution.
    if transformed or (height, width) != doubled or x.shape[0] * x.shape[1] * x.shape[2] < LEAST_PIXELS:
        return repeated(x)
    return by_platform(lambda platform: repeated if platform == "cpu" else folded, x)


def convolve_folded(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """The 3x3 convolution of x with each pixel repeated twice along both sides, padded with zeros.

    Args:
        x: (B, H, W, C).
        kernel: (3, 3, C, C'). Its taps are added in float32.

    Returns:
        (B, 2 H, 2 W, C').
    """
    folded = _fold(_fold(kernel.astype(jnp.float32), 0), 1).astype(x.dtype)
    return jax.lax.conv_general_dilated(
        x,
        folded,
        (1, 1),
        ((2, 2), (2, 2)),
        lhs_dilation=(2, 2),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=precision_of(x.dtype),
    )


def _fold(kernel: jax.Array, axis: int) -> jax.Array:
    """Three taps along an axis, after one that repeats -> four."""
    first, middle, last = jnp.split(kernel, 3, axis=axis)
    return jnp.concatenate([first, first + middle, middle + last, last], axis)
