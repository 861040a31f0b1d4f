"""Canny's edges, the picture that a ControlNet for edges was trained to read: equal to OpenCV's, pixel for pixel."""

import math

import numpy as np
from numpy.typing import NDArray

from unclip_jax.conditioning.clip_image import ImageSource, load_image

# tan(22.5 degrees) with 15 fractional bits, as OpenCV rounds it; tan(67.5 degrees) is larger by exactly 2.
FRACTION = 15
TAN_22 = 13573


def canny(image: ImageSource, low_threshold: float = 100, high_threshold: float = 200) -> NDArray[np.uint8]:
    """The edges of an image (Canny 1986), white on black: a hint for ControlNets that were trained on them.

    The image is read at its own size, so resize it before. Source: OpenCV's `Canny(image, low, high)` of the RGB
    image, with Sobel's derivatives over 3x3 pixels and |dx| + |dy| as their length; of the three channels the one with
    the longest gradient counts at each pixel.

    Args:
        image: A PIL image, path, address, bytes or array, as for `load_image`.
        low_threshold: Above this gradient a pixel belongs to an edge if the edge has a pixel above `high_threshold`.
            Gradients go up to 2040.
        high_threshold: At least `low_threshold`.

    Returns:
        (H, W, 3) uint8, 0 or 255, all channels equal.

    Raises:
        ValueError: A threshold is negative or not finite, or low is above high; or as in `load_image`.
        FileNotFoundError, OSError: As in `load_image`.
    """
    for name, value in (("low_threshold", low_threshold), ("high_threshold", high_threshold)):
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} is {value!r}; want a number of at least 0")
    if low_threshold > high_threshold:
        raise ValueError(f"low_threshold is {low_threshold!r}, above high_threshold, {high_threshold!r}")
    dx, dy = _strongest(*_sobel(load_image(image).astype(np.int32)))
    length = np.abs(dx) + np.abs(dy)
    thin = _ridge(dx, dy, length) & (length > math.floor(low_threshold))
    edges = _connected(thin, thin & (length > math.floor(high_threshold)))
    return np.repeat(np.where(edges, 255, 0).astype(np.uint8)[..., None], 3, axis=2)


def _sobel(image: NDArray[np.int32]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """The derivatives along x and y, (H, W, C) each; the outermost pixels are repeated beyond the border."""
    padded = np.pad(image, ((1, 1), (1, 1), (0, 0)), mode="edge")
    down = padded[:-2] + 2 * padded[1:-1] + padded[2:]
    across = padded[:, :-2] + 2 * padded[:, 1:-1] + padded[:, 2:]
    return down[:, 2:] - down[:, :-2], across[2:] - across[:-2]


def _strongest(dx: NDArray[np.int32], dy: NDArray[np.int32]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """(H, W) each: the derivatives of the channel with the longest gradient, the first of equal ones."""
    channel = np.argmax(np.abs(dx) + np.abs(dy), axis=2)[..., None]
    return np.take_along_axis(dx, channel, 2)[..., 0], np.take_along_axis(dy, channel, 2)[..., 0]


def _ridge(dx: NDArray[np.int32], dy: NDArray[np.int32], length: NDArray[np.int32]) -> NDArray[np.bool_]:
    """Where the gradient is longer than at both neighbours along it; beyond the border it is 0.

    The direction is rounded to one of four. Along an axis an equal neighbour to the right, or below, is allowed, so
    that an edge two pixels wide leaves one.
    """
    padded = np.pad(length, 1)
    height, width = length.shape

    def at(down: int, across: int) -> NDArray[np.int32]:
        return padded[1 + down : 1 + down + height, 1 + across : 1 + across + width]

    x, y = np.abs(dx), np.abs(dy) << FRACTION
    tan_22 = x * TAN_22
    horizontal, vertical = y < tan_22, y > tan_22 + (x << (FRACTION + 1))
    along_x = (length > at(0, -1)) & (length >= at(0, 1))
    along_y = (length > at(-1, 0)) & (length >= at(1, 0))
    falling = (length > at(-1, -1)) & (length > at(1, 1))
    rising = (length > at(-1, 1)) & (length > at(1, -1))
    diagonal = np.where((dx ^ dy) < 0, rising, falling)
    return np.select([horizontal, vertical], [along_x, along_y], diagonal)


def _connected(weak: NDArray[np.bool_], strong: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The weak pixels that are connected to a strong one by others, over sides and corners."""
    from scipy import ndimage  # slow to import

    labels, count = ndimage.label(weak, np.ones((3, 3)))
    kept = np.zeros(count + 1, bool)
    kept[labels[strong]] = True
    return kept[labels] & weak
