"""The depth map of depth-to-image: the estimator's input for an image, and the UNet's input for a depth map."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from unclip_jax.conditioning.clip_image import STORED, ImageSource, load_image, open_image
from unclip_jax.conditioning.resize_8bit import resize_bicubic_8bit
from unclip_jax.conditioning.vae_image import to_pixels
from unclip_jax.models.resize import cubic_weights, resize_bicubic
from unclip_jax.reference import Reference

SIDE = 384  # near which the estimator was trained
MULTIPLE = 32  # what its sides divide by
# A map whose range is below this share of its values is constant: the differences are rounding.
CONSTANT = 4e-6
LARGEST = 1e30


def estimator_pixels(image: NDArray[Any], reference: Reference, side: int = SIDE) -> NDArray[np.float32]:
    """The depth estimator's input for an image: about -1..1, with sides that are multiples of 32.

    Args:
        image: (H, W, 3), uint8, or float32 in 0..1.
        reference: "diffusers": squeezed into (side, side), bit for bit as transformers' DPTImageProcessor on
            torchvision. "original": scaled in its proportions by the ratio to `side` of the side that this changes
            less, each length rounded to a multiple of 32, by bicubic interpolation without antialiasing as OpenCV's;
            the caller passes the image in the size that is painted. Source: MiDaS' transform for `dpt_hybrid`.
        side: The size near which the estimator was trained.

    Returns:
        (h, w, 3) float32.

    Raises:
        ValueError: The reference is unknown.
    """
    if reference == Reference.DIFFUSERS:
        if image.dtype != np.uint8:
            image = np.rint(np.asarray(image, np.float32) * 255).astype(np.uint8)
        return (resize_bicubic_8bit(image, side, side).astype(np.float32) - np.float32(127.5)) / np.float32(127.5)
    if reference != Reference.ORIGINAL:
        raise ValueError(f"reference is {reference!r}; accepted: {', '.join(Reference)}")
    height, width = image.shape[:2]
    unit = (to_pixels(image) + np.float32(1)) * np.float32(0.5)
    resized = resize_cubic(unit, *estimator_size(height, width, side))
    return (resized - np.float32(0.5)) / np.float32(0.5)


def estimator_size(height: int, width: int, side: int = SIDE) -> tuple[int, int]:
    """The height and width at which the original gives its estimator an image of this size. At least 32."""
    scale = min(side / width, side / height, key=lambda ratio: (abs(1 - ratio), ratio == side / width))
    new_height, new_width = (int(np.rint(length * scale / MULTIPLE)) * MULTIPLE for length in (height, width))
    return max(new_height, MULTIPLE), max(new_width, MULTIPLE)


def resize_cubic(image: NDArray[np.float32], height: int, width: int) -> NDArray[np.float32]:
    """Cubic convolution with a = -0.75, OpenCV's INTER_CUBIC: (H, W, C) float32 -> (height, width, C).

    Pixel centres are at halves, edges are repeated, reductions skip pixels, and values may overshoot.
    """
    rows, columns = (
        cubic_weights(old, new).astype(np.float32) for old, new in zip(image.shape[:2], (height, width), strict=True)
    )
    across = np.einsum("xw,hwc->hxc", columns, image, optimize=True)
    return np.einsum("yh,hxc->yxc", rows, across, optimize=True)


def depth_condition(depth: jax.Array, height: int, width: int) -> jax.Array:
    """A depth map as the UNet reads it, beside the latents.

    Each map is resized bicubically, then stretched to -1..1 on its own. A constant map, which holds no information,
    becomes -1 everywhere; both references divide 0 by 0 there.

    Args:
        depth: (B, h, w), of any range; larger is nearer.
        height: Of the latents.
        width: Of the latents.

    Returns:
        (B, height, width, 1) float32 in -1..1.
    """
    with jax.default_matmul_precision("highest"):
        resized = resize_bicubic(depth.astype(jnp.float32)[..., None], height, width)
    least, most = (f(resized, axis=(1, 2, 3), keepdims=True) for f in (jnp.min, jnp.max))
    extent = most - least
    constant = extent <= CONSTANT * jnp.maximum(jnp.abs(least), jnp.abs(most))
    return jnp.where(constant, -1.0, 2 * (resized - least) / jnp.where(constant, 1.0, extent) - 1)


def load_depth_map(source: ImageSource) -> NDArray[np.float32]:
    """Reads a depth map that is given instead of the estimator's; it may be constant, see `depth_condition`.

    Args:
        source: An array (H, W) or (H, W, 1) of floats or integers; or a gray image of 8 or 16 bits or of floats, as a
            PIL image, a path or address, or a file's bytes. Any size: `depth_condition` resizes it.

    Returns:
        (H, W) float32 of the map's own range; larger is nearer.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The source is a colour image or has another shape, or holds values that are not finite or beyond
            1e30.
    """
    depth = _values(source)
    if not np.isfinite(depth).all():
        raise ValueError("depth_map has values that are NaN or infinite; want finite numbers")
    if np.abs(depth).max() > LARGEST:
        raise ValueError(f"depth_map has values beyond {LARGEST:g}; scale the map down: only relative depth matters")
    return depth


def _values(source: ImageSource) -> NDArray[np.float32]:
    name = "depth_map"
    if isinstance(source, STORED):
        loaded = open_image(source, name)
        if loaded.mode in ("L", "F") or loaded.mode.startswith("I"):
            return np.asarray(loaded).astype(np.float32)
        colours = load_image(loaded, name)
        if (colours != colours[..., :1]).any():
            raise ValueError(f"{name} is a colour image; want a gray one, or an array (H, W) of depths")
        return colours[..., 0].astype(np.float32)
    if not hasattr(source, "__array__"):
        raise ValueError(
            f"{name} is a {type(source).__name__}; want an array (H, W), a PIL image, a path or an address"
        )
    array = np.asarray(source)
    if not (np.issubdtype(array.dtype, np.floating) or np.issubdtype(array.dtype, np.integer)):
        raise ValueError(f"{name} has dtype {array.dtype}; want floats or integers")
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    if array.ndim != 2 or not array.size:
        raise ValueError(f"{name} has shape {array.shape}; want (H, W), not empty")
    with np.errstate(over="ignore"):  # float64 beyond float32 becomes infinite, which is refused
        return array.astype(np.float32)
