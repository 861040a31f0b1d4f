"""Encoding and decoding large images with less memory: by diffusers' tiles, or seamlessly, a band of rows at a time.

To the network, tiles are independent images: its normalisation and its attention see one tile each. The result
therefore depends on the tiling, and neighbours are blended where they overlap. Seamless decoding equals the plain one
up to rounding: what depends on the whole image still does, and only what lies between two such places runs in bands.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from unclip_jax.models.layers import Conv, GroupNorm, ResnetBlock, upsample_nearest
from unclip_jax.models.posterior import Posterior, posterior
from unclip_jax.models.vae import VAE

# Rows of a band of the seamless decoding, at every resolution.
BAND = 32


def decode_tiled(vae: VAE, z: jax.Array, tile: int) -> jax.Array:
    """`vae.decode` by the rule of diffusers' `AutoencoderKL.tiled_decode`. Tiles overlap by a quarter.

    Args:
        vae: The autoencoder.
        z: (B, h, w, latent_channels), unscaled latents.
        tile: The side of a tile in latent cells, a multiple of 4; diffusers' `tile_latent_min_size`.

    Returns:
        Images (B, f h, f w, 3) float32. If one tile holds everything they equal those of `vae.decode` exactly.

    Raises:
        ValueError: The tile is invalid.
    """
    _check_tile("tile", tile, 4)
    if max(z.shape[1:3]) <= tile:
        return vae.decode(z)
    return _tiled(vae.decode, z, tile, tile * vae.config.factor)


def encode_tiled(vae: VAE, x: jax.Array, tile: int) -> Posterior:
    """`vae.encode` by the rule of diffusers' `AutoencoderKL.encode` with tiling on.

    Args:
        vae: The autoencoder.
        x: Images (B, H, W, 3) in -1..1.
        tile: The side of a tile in pixels, a multiple of 4 f; diffusers' `tile_sample_min_size`.

    Returns:
        The posterior. Its moments are blended before the variance is clipped.

    Raises:
        ValueError: The tile is invalid.
    """
    _check_tile("tile", tile, 4 * vae.config.factor)
    if max(x.shape[1:3]) <= tile:
        return vae.encode(x)
    return posterior(_tiled(vae.moments, x, tile, tile // vae.config.factor))


def _check_tile(name: str, tile: int, multiple: int) -> None:
    if tile < 1 or tile % multiple:
        raise ValueError(f"{name} is {tile}; want a positive multiple of {multiple}")


def _tiled(network: Callable[[jax.Array], jax.Array], x: jax.Array, tile: int, out_tile: int) -> jax.Array:
    """Applies `network`, which maps `tile` rows and columns to `out_tile`, to overlapping tiles and blends them."""
    stride, extent = tile - tile // 4, out_tile // 4
    tops, lefts = range(0, x.shape[1], stride), range(0, x.shape[2], stride)
    # Tiles at the far edges are smaller. Those of one shape run one after the other through one compiled body.
    by_shape: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for top in tops:
        for left in lefts:
            shape = (min(tile, x.shape[1] - top), min(tile, x.shape[2] - left))
            by_shape.setdefault(shape, []).append((top, left))
    tiles: dict[tuple[int, int], jax.Array] = {}
    after = jnp.int32(0)
    for (height, width), corners in by_shape.items():

        def run(corner: jax.Array, height: int = height, width: int = width) -> jax.Array:
            size = (x.shape[0], height, width, x.shape[3])
            return network(jax.lax.dynamic_slice(x, (0, corner[0], corner[1], 0), size))

        outs = jax.lax.map(run, np.asarray(corners, np.int32) + after)
        # One shape after the other: side by side, as a compiler that sees no order may put them, they would need the
        # memory of all. So the next one's corners wait for a number of this one's, and add 0 for it.
        after = jnp.minimum(jnp.abs(outs[0, 0, 0, 0, 0]).astype(jnp.int32), 0)
        tiles |= {corner: outs[i] for i, corner in enumerate(corners)}
    rows = []
    for top in tops:
        row = []
        for left in lefts:
            # What a tile is blended with is its neighbour after that one's own blending.
            if top > 0:
                tiles[top, left] = _blend(tiles[top - stride, left], tiles[top, left], extent, axis=1)
            if left > 0:
                tiles[top, left] = _blend(tiles[top, left - stride], tiles[top, left], extent, axis=2)
            row.append(tiles[top, left][:, : out_tile - extent, : out_tile - extent])
        rows.append(jnp.concatenate(row, axis=2))
    return jnp.concatenate(rows, axis=1)


def _blend(before: jax.Array, after: jax.Array, extent: int, axis: int) -> jax.Array:
    """`after`, with its first `extent` rows (or columns) blended from the last ones of `before`."""
    extent = min(extent, before.shape[axis], after.shape[axis])
    weight = np.arange(extent) / extent
    shape = [extent if i == axis else 1 for i in range(4)]
    fade_in, fade_out = (w.astype(np.float32).reshape(shape) for w in (weight, 1 - weight))
    end = jax.lax.slice_in_dim(before, before.shape[axis] - extent, before.shape[axis], axis=axis)
    start, rest = jnp.split(after, [extent], axis=axis)
    return jnp.concatenate([end * fade_out + start * fade_in, rest], axis=axis)


class _Rows(NamedTuple):
    """A feature map that provides its rows on demand.

    read: (first, count) -> (B, count, W, C), the rows from `first` on. Rows outside the image may be requested (a
    convolution reads one beyond its band); their content is arbitrary, and the caller masks them. array: the map itself
    if it is stored; otherwise its rows are computed at every reading.
    """

    shape: tuple[int, int, int, int]
    read: Callable[[jax.Array, int], jax.Array]
    array: jax.Array | None = None


def decode_seamless(vae: VAE, z: jax.Array) -> jax.Array:
    """`vae.decode` with less memory and without seams: the same images up to rounding.

    Beside bands of `BAND` rows only two feature maps are in memory at a time: a residual block's input, which its
    output replaces in place, and the map between its convolutions. The wide maps after an upsampling are never whole:
    their rows are computed from the lower resolution whenever they are read, three times in all. That is the price.

    Args:
        vae: The autoencoder.
        z: (B, h, w, latent_channels), unscaled latents.

    Returns:
        Images (B, f h, f w, 3) float32.
    """
    decoder = vae.decoder
    x = _stored(decoder.mid_block(decoder.conv_in(vae.post_quant_conv(z.astype(vae.dtype)))))
    for level in decoder.up_blocks:
        for block in level.resnets:
            x = _resnet(block, x)
        if level.resample is not None:
            x = _convolved(level.resample, _upsampled(x))
    image = _convolved(decoder.conv_out, _activated(decoder.conv_norm_out, x))
    return _fill(image).astype(jnp.float32)


def _resnet(block: ResnetBlock, x: _Rows) -> _Rows:
    hidden = _stored(_fill(_convolved(block.conv1, _activated(block.norm1, x))))
    branch = _convolved(block.conv2, _activated(block.norm2, hidden))
    shortcut = block.conv_shortcut
    if shortcut is None and x.array is not None:
        # The first convolution, which reads neighbouring rows, is done: each row is now read once and can be replaced.
        return _stored(
            _each_band(x.array, lambda out, first, count: _slice(out, first, count) + branch.read(first, count))
        )

    def total(first: jax.Array, count: int) -> jax.Array:
        rows = x.read(first, count)
        return branch.read(first, count) + (rows if shortcut is None else shortcut(rows))

    return _stored(_fill(_Rows(branch.shape, total)))


def _stored(x: jax.Array) -> _Rows:
    def read(first: jax.Array, count: int) -> jax.Array:
        return jnp.take(x, jnp.clip(first + jnp.arange(count), 0, x.shape[1] - 1), axis=1, mode="clip")

    b, h, w, c = x.shape
    return _Rows((b, h, w, c), read, x)


def _upsampled(x: _Rows) -> _Rows:
    """`upsample_nearest`. A band with odd ends is cut from one more row at either end."""
    b, h, w, c = x.shape

    def read(first: jax.Array, count: int) -> jax.Array:
        wide = upsample_nearest(x.read(first // 2, count // 2 + 1))
        return jax.lax.dynamic_slice_in_dim(wide, first % 2, count, axis=1)

    return _Rows((b, 2 * h, 2 * w, c), read)


def _convolved(conv: Conv, x: _Rows) -> _Rows:
    """A 3x3 convolution, padded with zeros around the image."""
    height = x.shape[1]

    def read(first: jax.Array, count: int) -> jax.Array:
        rows = first - 1 + jnp.arange(count + 2)
        inside = ((rows >= 0) & (rows < height))[None, :, None, None]
        band = x.read(first - 1, count + 2)
        return conv(jnp.where(inside, band, 0), padding=((0, 0), (1, 1)))

    return _Rows((*x.shape[:3], conv.kernel.shape[-1]), read)


def _activated(norm: GroupNorm, x: _Rows) -> _Rows:
    """Group norm, with statistics over the whole image, and SiLU."""
    count = _band(x.shape[1])

    def of_band(index: jax.Array) -> tuple[jax.Array, jax.Array]:
        return norm.statistics(x.read(index * count, count))

    means, variances = jax.lax.map(of_band, jnp.arange(x.shape[1] // count))
    # Bands are equally large: the whole variance is that within the bands and that between them.
    mean = means.mean(axis=0)
    variance = variances.mean(axis=0) + jnp.square(means - mean).mean(axis=0)
    return _Rows(x.shape, lambda first, count: nnx.silu(norm.apply(x.read(first, count), mean, variance)))


def _fill(x: _Rows) -> jax.Array:
    """The whole map, computed a band at a time."""
    # A constant would be allocated when the program starts, for all maps at once: this one waits for its data.
    start = x.read(jnp.int32(0), 1)[0, 0, 0, 0]
    return _each_band(jnp.broadcast_to(start, x.shape), lambda _, first, count: x.read(first, count))


def _each_band(out: jax.Array, band: Callable[[jax.Array, jax.Array, int], jax.Array]) -> jax.Array:
    """Replaces `out` band by band, top to bottom, by `band(out, first, count)`."""
    count = _band(out.shape[1])

    def body(index: jax.Array, out: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(out, band(out, index * count, count), index * count, axis=1)

    return jax.lax.fori_loop(0, out.shape[1] // count, body, out)


def _slice(x: jax.Array, first: jax.Array, count: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, first, count, axis=1)


def _band(height: int) -> int:
    """The number of rows of a band. It divides the image, so that each row is computed once and all count equally."""
    return max(rows for rows in range(1, min(BAND, height) + 1) if height % rows == 0)
