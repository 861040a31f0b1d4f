"""The invisible watermark that Stability's scripts put into their images: a few bytes, here "SDV2".

It is the method `dwtDct` of the library invisible-watermark, releases 0.1.5 to 0.2, with its default settings: every
bit is written many times into the low frequencies of one colour channel, and read back by a vote. Writing and reading
equal the library's bit for bit, and so do the limits. JPEG, resizing or cropping destroy the mark. With flat or strong
colours the vote can fail at once, so an unreadable mark proves nothing.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

MARK = b"SDV2"
SMALLEST = 256 * 256  # pixels; the library refuses smaller images, whose votes are too few
STEP = 36  # of the quantisation that carries the bits
BLOCK = 4  # side of the blocks of coefficients that carry a bit each
# OpenCV's 8-bit conversions are in fixed point with 14 bits behind the point.
POINT = 14
HALF = 1 << (POINT - 1)


def embed_watermark(image: NDArray[np.uint8], mark: bytes = MARK) -> NDArray[np.uint8]:
    """Puts a mark into an image, which `read_watermark` and the original's library find.

    Colours change by a few levels on the whole, and by many at sharp edges between colours, since the library also
    transposes each 2x2 square of the channel. The last H % 4 rows and W % 4 columns stay as they are, except for the
    rounding of the colour conversions.

    Args:
        image: (H, W, 3) uint8 RGB, at least 256 x 256 pixels.
        mark: The bytes.

    Returns:
        (H, W, 3) uint8 RGB.

    Raises:
        ValueError: The image has another shape or dtype or too few pixels, or the mark is empty or has more bits than
            the image has blocks of 8 x 8 pixels.
    """
    if not isinstance(mark, bytes):
        raise ValueError(f"mark is {mark!r:.40}; want bytes")
    bits = np.unpackbits(np.frombuffer(mark, np.uint8))
    _check(image, "mark", len(bits))
    luma, u, v = _to_yuv(image)
    area = _area(image)
    low, details = _haar(u[area])
    blocks = _blocks(low)
    position, value = _carrier(blocks)
    bit = np.resize(bits, len(blocks))
    moved = (np.abs(value) // STEP + 0.25 + 0.5 * bit) * STEP
    blocks[np.arange(len(blocks)), position] = np.where(value >= 0, moved, -moved)
    rows, columns = low.shape[0] // BLOCK * BLOCK, low.shape[1] // BLOCK * BLOCK
    low[:rows, :columns] = _from_blocks(blocks, rows, columns)
    # The library gives the inverse transform its two mixed details in the wrong order.
    lines, columns_, diagonal = details
    # Truncated, and never outside 0..255: the U of any colour is from 17 to 239, and moves by 13.5 at most.
    u[area] = _inverse_haar(low, (columns_, lines, diagonal)).astype(np.int32)
    return _from_yuv(luma, u, v)


def read_watermark(image: NDArray[np.uint8], length: int = len(MARK)) -> bytes:
    """Reads the mark of an image; without a mark the result is arbitrary.

    Args:
        image: (H, W, 3) uint8 RGB, at least 256 x 256 pixels.
        length: The number of bytes.

    Returns:
        The mark.

    Raises:
        ValueError: The image has another shape or dtype or too few pixels, or the length is 0 or has more bits than the
            image has blocks of 8 x 8 pixels.
    """
    if isinstance(length, bool) or not isinstance(length, int):
        raise ValueError(f"length is {length!r}; want a number of bytes")
    count = 8 * length
    _check(image, "length", count)
    _, u, _ = _to_yuv(image)
    low, _ = _haar(u[_area(image)])
    _, value = _carrier(_blocks(low))
    votes = np.abs(value) % STEP > STEP / 2
    bit = np.arange(len(votes)) % count
    share = np.bincount(bit, votes) / np.bincount(bit)
    return np.packbits(share * 255 > 127).tobytes()


def _check(image: NDArray[Any], argument: str, bits: int) -> None:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"image is {image.dtype} {image.shape}; want uint8 (H, W, 3)")
    height, width = image.shape[:2]
    if height * width < SMALLEST:
        raise ValueError(f"image is {width}x{height} pixels; a watermark needs at least 256x256 pixels in all")
    room = (height // 8) * (width // 8)
    if not 0 < bits <= room:
        raise ValueError(f"{argument} is {bits // 8} bytes; an image of {width}x{height} pixels holds 1 to {room // 8}")


def _area(image: NDArray[Any]) -> tuple[slice, slice]:
    return slice(image.shape[0] // 4 * 4), slice(image.shape[1] // 4 * 4)


def _to_yuv(image: NDArray[np.uint8]) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]]:
    """Three planes (H, W) as in OpenCV's COLOR_RGB2YUV: analogue YUV, the last two about 128; all in 0..255."""
    r, g, b = np.moveaxis(image.astype(np.int32), -1, 0)
    luma = _rounded(4899 * r + 9617 * g + 1868 * b)
    u = _rounded(8061 * (b - luma)) + 128
    v = _rounded(14369 * (r - luma)) + 128
    return luma, u, np.clip(v, 0, 255)


def _from_yuv(luma: NDArray[np.int32], u: NDArray[np.int32], v: NDArray[np.int32]) -> NDArray[np.uint8]:
    """OpenCV's COLOR_YUV2RGB: (H, W, 3)."""
    u, v = u - 128, v - 128
    r = luma + _rounded(18678 * v)
    g = luma + _rounded(-6472 * u - 9519 * v)
    b = luma + _rounded(33292 * u)
    return np.clip(np.stack([r, g, b], axis=-1), 0, 255).astype(np.uint8)


def _rounded(fixed: NDArray[np.int32]) -> NDArray[np.int32]:
    return (fixed + HALF) >> POINT


# The transform runs in the library's order, vertically first: another one rounds other coefficients to a multiple of
# the step, and truncates other pixels.
Plane = NDArray[np.float64]
Details = tuple[Plane, Plane, Plane]
_SCALE = 0.5**0.5


def _haar(x: NDArray[np.int32]) -> tuple[Plane, Details]:
    """One level of the orthonormal Haar transform, (H, W) -> 4 times (H / 2, W / 2).

    The low frequencies; and what changes downwards, to the right, and in both directions.
    """
    low, high = _split(x.astype(np.float64))
    (smooth, right), (down, both) = ((part.T for part in _split(half.T)) for half in (low, high))
    return smooth.copy(), (down, right, both)


def _inverse_haar(smooth: Plane, details: Details) -> Plane:
    down, right, both = details
    low, high = (_join(a.T, b.T).T for a, b in ((smooth, right), (down, both)))
    return _join(low, high)


def _split(x: Plane) -> tuple[Plane, Plane]:
    even, odd = _SCALE * x[0::2], _SCALE * x[1::2]
    return odd + even, even - odd


def _join(low: Plane, high: Plane) -> Plane:
    low, high = _SCALE * low, _SCALE * high
    return np.stack([low + high, low - high], axis=1).reshape(-1, low.shape[1])


def _blocks(plane: Plane) -> Plane:
    """The whole 4x4 blocks of a plane, row by row, as (blocks, 16)."""
    rows, columns = plane.shape[0] // BLOCK, plane.shape[1] // BLOCK
    whole = plane[: rows * BLOCK, : columns * BLOCK].reshape(rows, BLOCK, columns, BLOCK)
    return whole.swapaxes(1, 2).reshape(rows * columns, BLOCK * BLOCK)


def _from_blocks(blocks: Plane, rows: int, columns: int) -> Plane:
    """The inverse of `_blocks`, (rows, columns)."""
    return blocks.reshape(rows // BLOCK, columns // BLOCK, BLOCK, BLOCK).swapaxes(1, 2).reshape(rows, columns)


def _carrier(blocks: Plane) -> tuple[NDArray[np.intp], Plane]:
    """The position of each block's bit, and the coefficient there: (blocks,) each.

    It is the largest coefficient except the first.
    """
    position = np.argmax(np.abs(blocks[:, 1:]), axis=1) + 1
    return position, blocks[np.arange(len(blocks)), position]
