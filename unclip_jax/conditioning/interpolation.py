"""Moves in the space of CLIP embeddings: between images, and along the difference of two texts.

Pure functions of arrays (..., D). The embeddings are un-normalised, as Stable Diffusion's unCLIP takes them
(`image_embeds` of the pipeline): a move keeps an image's length as far as it has one.
"""

import jax
import jax.numpy as jnp
import numpy as np

# Where two directions are this close to equal or opposite, in radians, the sines' quotients have lost their digits.
_TOO_CLOSE = 1e-5


def slerp(start: jax.Array, end: jax.Array, share: jax.Array | float) -> jax.Array:
    """Spherical interpolation: sin((1 - s) w) / sin(w) start + sin(s w) / sin(w) end, w the angle between the two.

    start, end: (..., D), of any length; share: s, () or of their leading axes, 0 at start, 1 at end, others go on along
    the circle. Returns (..., D) float32. Ends of one length give that length all the way, at even speed. Directions
    that are nearly the same, or nearly opposite (no circle is shortest then), are interpolated in a straight line.
    Source: Shoemake 1985, with weights on the vectors as they are, as is usual for embeddings.
    """
    start, end = start.astype(jnp.float32), end.astype(jnp.float32)
    share = jnp.asarray(share, jnp.float32)[..., None]
    a, b = _unit(start), _unit(end)
    # Of the half angle's tangent: near 0 the arc cosine of a product has half the digits.
    angle = 2 * jnp.arctan2(_norm(a - b), _norm(a + b))
    straight = (angle < _TOO_CLOSE) | (angle > jnp.pi - _TOO_CLOSE)
    safe = jnp.where(straight, 1, angle)
    first = jnp.where(straight, 1 - share, jnp.sin((1 - share) * safe) / jnp.sin(safe))
    second = jnp.where(straight, share, jnp.sin(share * safe) / jnp.sin(safe))
    return first * start + second * end


def interpolate_path(embeds: jax.Array, count: int) -> jax.Array:
    """Even steps along the way that visits embeddings in order: (K, ..., D) -> (count, ..., D) float32.

    It begins with the first and ends with the last of K >= 2; each stretch is a `slerp`, all are of as many steps.
    Raises ValueError for fewer embeddings, or a count below 2.
    """
    if embeds.ndim < 2 or len(embeds) < 2:
        raise ValueError(f"embeds has shape {embeds.shape}; want (K, ..., D) with at least two embeddings")
    if count < 2:
        raise ValueError(f"count is {count}; want at least 2, both ends")
    place = np.linspace(0, len(embeds) - 1, count)
    before = np.minimum(place.astype(np.int32), len(embeds) - 2)
    share = (place - before).reshape(-1, *[1] * (embeds.ndim - 2))
    return slerp(embeds[before], embeds[before + 1], jnp.asarray(share, jnp.float32))


def interpolate_grid(corners: jax.Array, rows: int, columns: int) -> jax.Array:
    """A grid between images: (R, C, D), R and C >= 2 -> (rows, columns, D) float32.

    The given embeddings are its corners, and nodes on the way if there are more than four. Bilinear in `slerp`: down
    each side first, then across. Raises ValueError as `interpolate_path` does.
    """
    if corners.ndim != 3:
        raise ValueError(f"corners has shape {corners.shape}; want (R, C, D), two by two embeddings for four images")
    sides = interpolate_path(corners, rows)  # (rows, C, D)
    return interpolate_path(sides.swapaxes(0, 1), columns).swapaxes(0, 1)


def edit_by_text(image: jax.Array, source: jax.Array, target: jax.Array, share: jax.Array | float) -> jax.Array:
    """Moves an image's embedding towards what a target text says and a source text does not.

    image, source, target: (..., D), embeddings of one CLIP model (`unclip_jax.evaluation.features.embed_texts`), the
    texts' of any length; share: theta, () or of the leading axes, 0 for the image as it is; the paper goes up to 0.25
    to 0.5, at 1 nothing of the image is left. Returns (..., D) float32 of the image's length:
    slerp(image, |image| d, theta) with d the direction of target - source, both texts normalised. Equal texts leave the
    image as it is. Source: section 3.3 of the unCLIP paper, arXiv:2204.06125, whose embeddings are of length 1.

    Raises ValueError for embeddings of different widths: they are of different models.
    """
    widths = {array.shape[-1] for array in (image, source, target)}
    if len(widths) > 1:
        raise ValueError(
            f"image has width {image.shape[-1]}, source {source.shape[-1]}, target {target.shape[-1]}; want embeddings "
            "of one CLIP model"
        )
    image = image.astype(jnp.float32)
    difference = _unit(target.astype(jnp.float32)) - _unit(source.astype(jnp.float32))
    there = _norm(image) * _unit(difference)
    # What rounding leaves of a difference is no direction.
    return slerp(image, jnp.where(_norm(difference) > _TOO_CLOSE, there, image), share)


def noise_level_sweep(count: int, first: int = 0, last: int = 999) -> list[int]:
    """Even steps of unCLIP's noise level, both ends included: what to give as `noise_level`, one a copy of an image.

    With the rest kept (`latents`, `image_noise`, the prompt), what changes along it is how much of the image's
    embedding is left: at 0 its content, at 999 none of it. Raises ValueError for levels outside 0..999 or count < 2.
    """
    if count < 2 or not (0 <= first <= 999 and 0 <= last <= 999):
        raise ValueError(f"count is {count}, levels {first} to {last}; want at least 2, and levels in 0..999")
    return [round(level) for level in np.linspace(first, last, count).tolist()]


def _norm(x: jax.Array) -> jax.Array:
    """(..., D) -> (..., 1), with a gradient of 0 where the norm is."""
    square = jnp.sum(x**2, axis=-1, keepdims=True)
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)


def _unit(x: jax.Array) -> jax.Array:
    norm = _norm(x)
    return x / jnp.where(norm > 0, norm, 1)
