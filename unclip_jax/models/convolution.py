"""The library's one entry point for 2-D convolution."""

from typing import Literal

import jax


def convolve(
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None = None,
    *,
    stride: int = 1,
    padding: tuple[tuple[int, int], tuple[int, int]] | Literal["SAME"] = ((1, 1), (1, 1)),
) -> jax.Array:
    """2-D cross-correlation.

    Args:
        x: (B, H, W, Cin).
        kernel: (kh, kw, Cin, Cout).
        bias: (Cout,).
        stride: Along both axes.
        padding: ((top, bottom), (left, right)), or TensorFlow's "SAME".

    Returns:
        (B, H', W', Cout).
    """
    out = jax.lax.conv_general_dilated(x, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return out if bias is None else out + bias
