"""Editing in the space of CLIP embeddings: between images, and along the difference of two texts.

Pure functions of arrays (..., D). The embeddings are un-normalised, as Stable Diffusion's unCLIP takes them
(`image_embeds` of the pipeline): an edit keeps an image's length where it can.
"""

import jax
import jax.numpy as jnp
import numpy as np

# When two directions are this close to equal or opposite, in radians, the quotients of sines have lost their digits.
_TOO_CLOSE = 1e-5


def slerp(start: jax.Array, end: jax.Array, share: jax.Array | float) -> jax.Array:
    """Spherical interpolation: sin((1 - s) w) / sin(w) start + sin(s w) / sin(w) end, with w the angle between the two.

    If both ends have one length, so has every point, and the speed is even. Directions that are nearly the same, or
    nearly opposite (where no circle is shortest), are interpolated in a straight line. Source: Shoemake 1985, with
    weights on the vectors as they are, as is usual for embeddings.

    Args:
        start: (..., D), of any length.
        end: (..., D), of any length.
        share: s, () or of the leading axes; 0 at start, 1 at end. Other values continue along the circle.

    Returns:
        (..., D) float32.
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
    """Even steps along the path that visits embeddings in order; each section is a `slerp` of as many steps.

    Args:
        embeds: (K, ..., D) with K >= 2. The path begins at the first and ends at the last.
        count: The number of points, at least 2.

    Returns:
        (count, ..., D) float32.

    Raises:
        ValueError: There are fewer embeddings or points.
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
    """A grid between images, bilinear in `slerp`: down each side first, then across.

    Args:
        corners: (R, C, D) with R and C >= 2: the grid's corners, and nodes in between if there are more than four.
        rows: The number of rows, at least 2.
        columns: The number of columns, at least 2.

    Returns:
        (rows, columns, D) float32.

    Raises:
        ValueError: There are fewer embeddings, rows or columns.
    """
    if corners.ndim != 3:
        raise ValueError(f"corners has shape {corners.shape}; want (R, C, D), two by two embeddings for four images")
    sides = interpolate_path(corners, rows)  # (rows, C, D)
    return interpolate_path(sides.swapaxes(0, 1), columns).swapaxes(0, 1)


def edit_by_text(image: jax.Array, source: jax.Array, target: jax.Array, share: jax.Array | float) -> jax.Array:
    """Moves an image's embedding in the direction from a source text to a target text.

    Computes slerp(image, |image| d, theta), where d is the direction of target - source, both texts normalised. Equal
    texts leave the image as it is. Source: section 3.3 of the unCLIP paper, arXiv:2204.06125, whose embeddings have
    length 1.

    Args:
        image: (..., D).
        source: (..., D), a text embedding of the same CLIP model (`unclip_jax.evaluation.features.embed_texts`), of any
            length.
        target: (..., D), likewise.
        share: theta, () or of the leading axes. 0 keeps the image, 1 leaves nothing of it; the paper goes up to 0.25 to
            0.5.

    Returns:
        (..., D) float32, of the image's length.

    Raises:
        ValueError: The embeddings have different widths, so they come from different models.
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
    """Even steps of unCLIP's noise level, both ends included, to be given as `noise_level`, one per copy of an image.

    If everything else is kept (`latents`, `image_noise`, the prompt), the sweep shows how much of the image's embedding
    is left: all of it at 0, nothing at 999.

    Args:
        count: The number of levels, at least 2.
        first: The first level, 0..999.
        last: The last level, 0..999.

    Returns:
        The levels.

    Raises:
        ValueError: A number is out of range.
    """
    if count < 2 or not (0 <= first <= 999 and 0 <= last <= 999):
        raise ValueError(f"count is {count}, levels {first} to {last}; want at least 2, and levels in 0..999")
    return [round(level) for level in np.linspace(first, last, count).tolist()]


def _norm(x: jax.Array) -> jax.Array:
    """(..., D) -> (..., 1), with a gradient of 0 where the norm is 0."""
    square = jnp.sum(x**2, axis=-1, keepdims=True)
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)


def _unit(x: jax.Array) -> jax.Array:
    norm = _norm(x)
    return x / jnp.where(norm > 0, norm, 1)
