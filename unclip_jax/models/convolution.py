"""The library's one entry point for 2-D convolution."""

from typing import Literal

import jax

from unclip_jax.models.precision import precision_of
from unclip_jax.models.winograd import convolve_transformed


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
        kernel: (kh, kw, Cin, Cout); or ((m + 2)^2, Cin, Cout), a 3x3 kernel from
            `unclip_jax.models.winograd.transform_kernel`, for a stride of 1.
        bias: (Cout,).
        stride: Along both axes.
        padding: ((top, bottom), (left, right)), or TensorFlow's "SAME".

    Returns:
        (B, H', W', Cout).
    """
    if kernel.ndim == 3:
        assert stride == 1
        assert padding != "SAME"
        out = convolve_transformed(x, kernel, padding)
        return out if bias is None else out + bias
    dimensions, precision = ("NHWC", "HWIO", "NHWC"), precision_of(kernel.dtype)
    out = jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), padding, dimension_numbers=dimensions, precision=precision
    )
    return out if bias is None else out + bias
