"""CMMD: the maximum mean discrepancy of CLIP embeddings (Jayasumana et al. 2024, arXiv:2401.09603).

Unlike FID it assumes no shape of the distributions and needs few images. It is a sum over all pairs, so parts of the
sum can be computed on different machines and added.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

SIGMA = 10.0  # the paper's bandwidth, for embeddings of unit length
SCALE = 1000.0  # the paper's, for legible numbers


@functools.partial(jax.jit, static_argnames="sigma")
def _block(x: jax.Array, y: jax.Array, sigma: float) -> jax.Array:
    inner = jnp.einsum("id,jd->ij", x, y, precision=jax.lax.Precision.HIGHEST)
    squared = jnp.square(x).sum(1)[:, None] + jnp.square(y).sum(1)[None] - 2 * inner
    return jnp.exp(-jnp.maximum(squared, 0) / (2 * sigma**2)).sum(axis=1)


def kernel_sum(x: ArrayLike, y: ArrayLike, sigma: float = SIGMA, block: int = 4096) -> float:
    """The Gaussian kernel summed over all pairs of rows of x and y, a block of pairs at a time.

    Sums over parts of x or of y add up.

    Args:
        x: (N, D), any array of rows, memory-mapped ones included.
        y: (M, D), likewise.
        sigma: The bandwidth.
        block: The number of rows of x and of y at a time.

    Returns:
        The sum.
    """
    x, y = np.asarray(x, np.float32), np.asarray(y, np.float32)
    total = 0.0
    for i in range(0, len(x), block):
        for j in range(0, len(y), block):
            total += float(np.asarray(_block(x[i : i + block], y[j : j + block], sigma), np.float64).sum())
    return total


def cmmd(reference: ArrayLike, generated: ArrayLike, sigma: float = SIGMA, block: int = 4096) -> float:
    """The squared discrepancy times 1000; 0 for equal sets.

    It is the biased estimate that the paper's code computes: pairs of a row with itself count.

    Args:
        reference: (N, D) embeddings, normalised here.
        generated: (M, D) embeddings, normalised here.
        sigma: The bandwidth.
        block: As in `kernel_sum`.

    Returns:
        The discrepancy.

    Raises:
        ValueError: There are no rows.
    """
    x, y = (_unit(each) for each in (reference, generated))
    within = kernel_sum(x, x, sigma, block) / len(x) ** 2 + kernel_sum(y, y, sigma, block) / len(y) ** 2
    return SCALE * (within - 2 * kernel_sum(x, y, sigma, block) / (len(x) * len(y)))


def _unit(embeddings: ArrayLike) -> np.ndarray:
    x = np.asarray(embeddings, np.float32)
    if x.ndim != 2 or not len(x):
        raise ValueError(f"embeddings have shape {x.shape}; want (N, D), N at least 1")
    return x / np.linalg.norm(x, axis=1, keepdims=True)
