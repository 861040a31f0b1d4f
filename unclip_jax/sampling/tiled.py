"""Denoising images larger than the network's memory: overlapping tiles, averaged at every call (MultiDiffusion).

Bar-Tal et al. 2023, arXiv:2302.08113. The solver goes on seeing one image, so that neighbours agree at every noise
level and no seam is left to hide afterwards.
"""

import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax.sampling.solvers.solver import Row

Denoise = Callable[[jax.Array, Row], jax.Array]


def tiled(denoise: Denoise, tile: int, overlap: int) -> Denoise:
    """A denoiser that runs `denoise` on tiles, one after the other, and fades each into the next.

    denoise: (x (B, h, w, C), row) -> (B, h, w, C'), of any size up to `tile`; whatever else it reads of the place, such
        as an upscaler's small image, is among the channels of x. tile: rows and columns of a tile; overlap: those
        that neighbours share at least, at most half a tile. Where the network has levels, both are multiples of what
        its sides divide by, and then so is every tile's corner.

    A tile that is as large as the image makes no difference at all. Otherwise every tile has one shape, so that the
    network is compiled once, and a call holds beside the image one tile's memory. In an overlap a tile counts nothing
    in the outer quarter at its own edge: a network that looks no further than that far gives what it gives untiled.

    Raises ValueError for a tile or an overlap that is none.
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
    """Where tiles begin along one axis: every `tile - overlap` places, the last one flush with the end."""
    if length <= tile:
        return [0]
    return [*range(0, length - tile, tile - overlap), length - tile]


def _weights(starts: list[int], size: int) -> jax.Array:
    """(tiles, size) float32: how much each tile counts at each of its places. They sum to 1 at every place.

    A tile comes in over the middle half of what it shares with the one before it, and what it takes the other loses.
    Where three overlap, the differences still sum to 1, and none is negative, since later ones come in later.
    """
    places = np.asarray(starts)[:, None] + np.arange(size) + 0.5  # (tiles, size)
    risen = [np.ones_like(places)]
    for before, start in itertools.pairwise(starts):
        shared = before + size - start
        share = np.clip(2 * (places - start) / shared - 0.5, 0, 1) if shared else (places >= start).astype(float)
        risen.append(np.sin(np.pi / 2 * share) ** 2)
    risen.append(np.zeros_like(places))
    return jnp.asarray(np.stack([risen[i][i] - risen[i + 1][i] for i in range(len(starts))]), jnp.float32)
