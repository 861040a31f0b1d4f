"""Resizing images of floats on the host, as `torch.nn.functional.interpolate` does in its modes.

A matrix of weights resizes along one axis at a time.
"""

from collections.abc import Callable
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from unclip_jax.models.resize import cubic_weights, linear_weights

Kernel = Callable[[NDArray[np.float64]], NDArray[np.float64]]
ResampleMethod = Literal["nearest", "nearest-exact", "bilinear", "bicubic", "area"]


def check_method(name: str, value: object) -> ResampleMethod:
    """One of `ResampleMethod`. name: the argument's, for the ValueError."""
    for method in get_args(ResampleMethod):
        if value == method:
            chosen: ResampleMethod = method
            return chosen
    raise ValueError(f"{name} is {value!r}; accepted: {', '.join(get_args(ResampleMethod))}")


def resample(
    image: NDArray[np.float32], height: int, width: int, method: ResampleMethod, *, antialias: bool
) -> NDArray[np.float32]:
    """Resizes an image.

    Args:
        image: (H, W, C).
        height: Of the result.
        width: Of the result.
        method: PyTorch's mode, without aligned corners.
        antialias: Whether a reduction averages over all pixels that it replaces; of "bilinear" and "bicubic".

    Returns:
        (height, width, C).
    """
    for axis, new in enumerate((height, width)):
        if image.shape[axis] == new:
            continue
        weights = _weights(image.shape[axis], new, method, antialias).astype(np.float32)
        image = np.moveaxis(np.tensordot(weights, image, (1, axis)), 0, axis)
    return np.ascontiguousarray(image, np.float32)


def longest_side(height: int, width: int, side: int) -> tuple[int, int]:
    """The sides of an image whose longer one becomes `side`, rounded down as Marigold's. Raises ValueError for none."""
    longest = max(height, width)
    new = height * side // longest, width * side // longest
    if 0 in new:
        raise ValueError(f"image is {width}x{height} pixels: too thin for a longest side of {side}")
    return new


def _weights(old: int, new: int, method: ResampleMethod, antialias: bool) -> NDArray[np.float64]:
    """(new, old)."""
    places, ratio = np.arange(new), old / new
    match method:
        case "nearest":  # positions in float32, as in PyTorch
            return _picking((places.astype(np.float32) * np.float32(ratio)).astype(int), old)
        case "nearest-exact":
            return _picking(((places + 0.5) * ratio).astype(int), old)
        case "area":
            first, end = places * old // new, -(-(places + 1) * old // new)
            inside = (np.arange(old) >= first[:, None]) & (np.arange(old) < end[:, None])
            return inside / inside.sum(axis=1, keepdims=True)
        case "bilinear":
            return _smooth(old, new, 1, _triangle) if antialias else linear_weights(old, new, align_corners=False)
        case "bicubic":
            return _smooth(old, new, 2, _cubic) if antialias else cubic_weights(old, new)


def _picking(indices: NDArray[np.int64], old: int) -> NDArray[np.float64]:
    """The weights by which each new pixel is one old one."""
    return (np.arange(old) == np.minimum(indices, old - 1)[:, None]).astype(float)


def _smooth(old: int, new: int, reach: float, kernel: Kernel) -> NDArray[np.float64]:
    """A kernel as wide as a new pixel, or an old one where these are larger; cut off at the edges."""
    ratio = old / new
    scale = max(ratio, 1.0)
    centres = (np.arange(new) + 0.5) * ratio
    first = np.maximum((centres - reach * scale + 0.5).astype(int), 0)
    end = np.minimum((centres + reach * scale + 0.5).astype(int), old)
    columns = np.arange(old)
    inside = (columns >= first[:, None]) & (columns < end[:, None])
    weights = np.where(inside, kernel((columns + 0.5 - centres[:, None]) / scale), 0.0)
    return weights / weights.sum(axis=1, keepdims=True)


def _triangle(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.maximum(1 - np.abs(x), 0)


def _cubic(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Cubic convolution with a = -0.5, as Pillow's."""
    x = np.abs(x)
    near, far = (1.5 * x - 2.5) * x**2 + 1, -0.5 * (((x - 5) * x + 8) * x - 4)
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))
