"""3x3 convolution of stride 1 in Winograd's domain, for CPUs (Lavin and Gray 2015, arXiv:1509.09308).

A tile of m x m outputs reads (m + 2) x (m + 2) inputs. Both it and the kernel are evaluated as polynomials at m + 1
points and at infinity, along each axis; there the convolution is a product for each pair of points, and all tiles
together make one matrix product for each. With m = 4 that takes a quarter of the multiplications, with m = 2 four
ninths. A transformed kernel has (m + 2)^2 / 9 times the size, so m is chosen for each kernel, by `tile_of`.

Which points are taken decides the rounding error. Those here were searched for the smallest: of a product over 64
channels it is 4.7e-7 (relative L2), where the usual 0, +-1, +-2 give 1.0e-6, m = 2 gives 1.6e-7.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax.models.precision import precision_of

Padding = tuple[tuple[int, int], tuple[int, int]]

POINTS: dict[int, tuple[float, ...]] = {2: (0.0, 1.0, -1.0), 4: (0.0, 0.5**0.5, -(0.5**0.5), 1.5, -1.5)}

# Transformed inputs at a time: larger maps run in strips of rows, which stay in cache.
STRIP = 2**21
# Tiles in a strip at least: with few, the products would wait for their kernels to be read.
MIN_TILES = 256
# Weights of a kernel that are transformed at a time, for the same reason.
BLOCK = 2048


@functools.cache
def matrices(tile: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The transforms along one axis, float64: of inputs (n, n), kernels (n, 3) and outputs (tile, n), n = tile + 2.

    outputs @ ((inputs @ x) * (kernels @ k)) is the correlation of n numbers x with 3 numbers k.
    """
    points = np.asarray(POINTS[tile])

    def evaluate(terms: int) -> np.ndarray:
        # Polynomials at the points; at infinity only the leading coefficient counts.
        return np.vstack([np.vander(points, terms, increasing=True), np.eye(terms)[-1]])

    outputs, kernels, inputs = evaluate(tile).T, evaluate(3), np.linalg.inv(evaluate(tile + 2).T)
    # Both factors of a product at about the same size.
    balance = np.sqrt(np.abs(inputs).max(axis=1) / np.abs(kernels).max(axis=1))[:, None]
    return inputs / balance, kernels * balance, outputs


def tile_of(shape: tuple[int, ...]) -> int | None:
    """The side of a kernel's tiles; None: the kernel stays as it is.

    By milliseconds on 2 cores of a Zen 3 without AVX-512, batch 2, direct / 2 / 4: 64x64, 320 channels, 103 / 105 / 57;
    32x32, 640: 96 / 76 / 35; 16x16, 1280: 99 / 49 / 46; 8x8, 1280: 27 / 18 / 17. The fastest is 4 everywhere; where
    it gains little over 2, among the widest kernels, which hold most of the weights, 2 saves half of the memory.

    Args:
        shape: Of any parameter.
    """
    if len(shape) != 4 or shape[:2] != (3, 3) or min(shape[2:]) < 128:
        return None
    return 2 if shape[3] >= 1280 else 4


def transformed_shape(shape: tuple[int, ...], tile: int) -> tuple[int, int, int]:
    """The shape of `transform_kernel`'s result. shape: (3, 3, Cin, Cout)."""
    return (tile + 2) ** 2, shape[2], shape[3]


def transform_kernel(kernel: np.ndarray, tile: int) -> np.ndarray:
    """A kernel in Winograd's domain, computed in float64 and rounded once.

    NumPy makes it: a program for it would have to be compiled for every shape.

    Args:
        kernel: (3, 3, Cin, Cout) float32.
        tile: The side of a tile of outputs, 2 or 4.

    Returns:
        ((tile + 2)^2, Cin, Cout) float32, for `convolve_transformed`.
    """
    transform = matrices(tile)[1]
    taps = kernel.reshape(3, 3, -1)
    out = np.empty((tile + 2, tile + 2, taps.shape[-1]), np.float32)
    for first in range(0, taps.shape[-1], BLOCK):
        some = taps[..., first : first + BLOCK].astype(np.float64)
        rows = np.einsum("ai,ijn->ajn", transform, some)
        out[..., first : first + BLOCK] = np.einsum("bj,ajn->abn", transform, rows)
    return out.reshape(transformed_shape(kernel.shape, tile))


# Jitted, so that a network with many kernels of one shape is traced and lowered with one of them.
@functools.partial(jax.jit, static_argnames=("padding", "strip"))
def convolve_transformed(x: jax.Array, kernel: jax.Array, padding: Padding, strip: int = STRIP) -> jax.Array:
    """2-D cross-correlation by a transformed kernel.

    Args:
        x: (B, H, W, Cin) float32.
        kernel: ((m + 2)^2, Cin, Cout), from `transform_kernel`.
        padding: ((top, bottom), (left, right)), zeros around x.
        strip: The number of transformed inputs at a time.

    Returns:
        (B, H', W', Cout), with H' = H + top + bottom - 2.
    """
    n = math.isqrt(kernel.shape[0])
    m = n - 2
    (top, bottom), (left, right) = padding
    height, width = x.shape[1] + top + bottom - 2, x.shape[2] + left + right - 2
    down, across = -(-height // m), -(-width // m)  # tiles
    tiles = x.shape[0] * across  # in a row of tiles
    rows = min(down, max(-(-MIN_TILES // tiles), strip // (n * n * tiles * x.shape[3])))
    strips = -(-down // rows)
    rows = -(-down // strips)
    x = jnp.pad(x, ((0, 0), (top, bottom + rows * strips * m - height), (0, 0), (0, 0)))
    sides = (left, right + across * m - width)
    if strips == 1:
        out = _strip(x, kernel, rows, across, sides)
    else:

        def some(number: jax.Array) -> jax.Array:
            part = jax.lax.dynamic_slice_in_dim(x, number * rows * m, rows * m + 2, axis=1)
            return _strip(part, kernel, rows, across, sides)

        out = jnp.moveaxis(jax.lax.map(some, jnp.arange(strips)), 0, 1)
        out = out.reshape(out.shape[0], -1, *out.shape[3:])
    return out[:, :height, :width]


def _strip(x: jax.Array, kernel: jax.Array, down: int, across: int, sides: tuple[int, int]) -> jax.Array:
    """x: (B, m down + 2, W, Cin) -> (B, m down, m across, Cout). sides: zeros left and right of x."""
    n = math.isqrt(kernel.shape[0])
    m = n - 2
    inputs, _, outputs = matrices(m)
    # The padding between the two transforms is also what keeps the compiler from making one of them, which would
    # compute the first of them n times over.
    x = _combine(inputs, [x[:, i : i + m * down : m] for i in range(n)])  # (n, B, down, W, Cin)
    x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), sides, (0, 0)))
    x = _combine(inputs, [x[:, :, :, i : i + m * across : m] for i in range(n)], axis=1)  # (n, n, B, down, across, Cin)
    precision = precision_of(kernel.dtype)
    y = jnp.einsum("pti,pio->pto", x.reshape(n * n, -1, x.shape[-1]), kernel, precision=precision)
    y = y.reshape(n, *x.shape[1:-1], -1)
    y = _combine(outputs, list(y))  # (m, n, B, down, across, Cout)
    # Stacked: as one expression it would be fused with the transform before, and take three to six times as long.
    y = jnp.stack([_weighted(row, [y[:, i] for i in range(n)]) for row in outputs], axis=4)
    # (m, B, down, across, m, Cout)
    return jnp.moveaxis(y, 0, 2).reshape(y.shape[1], m * down, m * across, -1)


def _combine(matrix: np.ndarray, parts: list[jax.Array], axis: int = 0) -> jax.Array:
    """The matrix (rows, len(parts)) times the parts, stacked along a new axis.

    One expression for all rows: it compiles in a fifth of the time of one for each.
    """
    shape = [1] * (parts[0].ndim + 1)
    shape[axis] = len(matrix)
    columns = [column.reshape(shape).astype(parts[0].dtype) for column in matrix.T]
    terms = [column * jnp.expand_dims(part, axis) for column, part in zip(columns, parts, strict=True)]
    return functools.reduce(jnp.add, terms)


def _weighted(weights: np.ndarray, parts: list[jax.Array]) -> jax.Array:
    terms = [part if w == 1 else part * part.dtype.type(w) for w, part in zip(weights, parts, strict=True) if w]
    return functools.reduce(jnp.add, terms)
