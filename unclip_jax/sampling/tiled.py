"""Denoising images larger than the network's memory: overlapping tiles, averaged at every evaluation (MultiDiffusion).

Bar-Tal et al. 2023, arXiv:2302.08113. The solver still sees one image. Neighbouring tiles therefore agree at every
noise level, and there is no seam to hide afterwards.
"""

import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax.sampling.solvers.solver import Row

Denoise = Callable[[jax.Array, Row], jax.Array]


def tiled(denoise: Denoise, tile: int, overlap: int) -> Denoise:
    """A denoiser that runs `denoise` on one tile after another and blends each into the next.

    An image that fits into one tile is denoised exactly as without tiles. Otherwise all tiles have one shape, so the
    network is compiled once, and an evaluation needs the memory of one tile beside the image's own. In an overlap, a
    tile has no weight in the outer quarter at its own edge: a network whose receptive field is no larger than that
    gives the same result as without tiles.

    Args:
        denoise: (x (B, h, w, C), row) -> (B, h, w, C'), for any size up to `tile`. Whatever else it reads of a place,
            such as an upscaler's small image, is among the channels of x.
        tile: The side of a tile, in rows and columns of x.
        overlap: The least number of rows or columns that neighbours share, at most half a tile. For a network with
            levels, both are multiples of what its sides must be divisible by; then every tile's corner is, too.

    Returns:
        A function like `denoise`, for images of any size.

    Raises:
        ValueError: The tile or the overlap is invalid.
    """
    if tile < 1:
        raise ValueError(f"tile is {tile}; want at least 1")
    if not 0 <= overlap <= tile // 2:
        raise ValueError(f"overlap is {overlap}; want 0 to {tile // 2}, half a tile")

    def apply(x: jax.Array, row: Row) -> jax.Array:
        height, width = x.shape[1:3]
        if max(height, width) <= tile:
            return denoise(x, row)
        tops, lefts = (tile_starts(length, tile, overlap) for length in (height, width))
        down, across = (_weights(starts, min(tile, n)) for starts, n in ((tops, height), (lefts, width)))
        grid = [(i, j, top, left) for i, top in enumerate(tops) for j, left in enumerate(lefts)]
        places = jnp.asarray(grid, jnp.int32)
        size = (down.shape[1], across.shape[1])

        def add(number: jax.Array, total: jax.Array) -> jax.Array:
            i, j, top, left = places[number]
            corner = (0, top, left, 0)
            out = denoise(jax.lax.dynamic_slice(x, corner, (x.shape[0], *size, x.shape[3])), row)
            out = down[i][:, None, None] * across[j][:, None] * out.astype(jnp.float32)
            sofar = jax.lax.dynamic_slice(total, corner, out.shape)
            return jax.lax.dynamic_update_slice(total, sofar + out, corner)

        one = jax.ShapeDtypeStruct((x.shape[0], *size, x.shape[3]), x.dtype)
        channels = jax.eval_shape(denoise, one, row).shape[3]
        total = jnp.zeros((*x.shape[:3], channels), jnp.float32)
        return jax.lax.fori_loop(0, len(grid), add, total)

    return apply


def tile_starts(length: int, tile: int, overlap: int) -> list[int]:
    """The first index of each tile along one axis: every `tile - overlap`, with the last tile flush with the end."""
    if length <= tile:
        return [0]
    return [*range(0, length - tile, tile - overlap), length - tile]


def _weights(starts: list[int], size: int) -> jax.Array:
    """The weight of each tile at each of its places: (tiles, size) float32. They sum to 1 at every place.

    A tile fades in over the middle half of what it shares with the one before it, whose weight falls by as much. Where
    three overlap, the differences still sum to 1, and none is negative, since later tiles fade in later.
    """
    places = np.asarray(starts)[:, None] + np.arange(size) + 0.5  # (tiles, size)
    risen = [np.ones_like(places)]
    for before, start in itertools.pairwise(starts):
        shared = before + size - start
        share = np.clip(2 * (places - start) / shared - 0.5, 0, 1) if shared else (places >= start).astype(float)
        risen.append(np.sin(np.pi / 2 * share) ** 2)
    risen.append(np.zeros_like(places))
    return jnp.asarray(np.stack([risen[i][i] - risen[i + 1][i] for i in range(len(starts))]), jnp.float32)
