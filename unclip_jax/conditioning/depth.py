"""The depth map of depth-to-image: what the estimator reads of a picture, and what the UNet reads of a map."""

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
# A map whose range is below this share of its values is constant: what differs is rounding.
CONSTANT = 4e-6
LARGEST = 1e30


def estimator_pixels(image: NDArray[Any], reference: Reference, side: int = SIDE) -> NDArray[np.float32]:
    """What the depth estimator reads of a picture: float32 (h, w, 3), about -1..1, h and w multiples of 32.

    image: uint8 (H, W, 3), or float32 (H, W, 3) in 0..1.
    reference "diffusers": squeezed into (side, side), bit for bit as transformers' DPTImageProcessor, which torchvision
    serves. "original": scaled in its proportions by that side's ratio to `side` which changes it less, each length
    rounded to a multiple of 32, by bicubic interpolation without antialiasing as OpenCV's; the caller gives it the
    picture in the size that is painted.

    Raises ValueError for another reference. Source of "original": MiDaS' transform for `dpt_hybrid`.
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
    """The height and width that the original gives its estimator for a picture of this size. At least 32."""
    scale = min(side / width, side / height, key=lambda ratio: (abs(1 - ratio), ratio == side / width))
    new_height, new_width = (int(np.rint(length * scale / MULTIPLE)) * MULTIPLE for length in (height, width))
    return max(new_height, MULTIPLE), max(new_width, MULTIPLE)


def resize_cubic(image: NDArray[np.float32], height: int, width: int) -> NDArray[np.float32]:
    """(H, W, C) float32 -> (height, width, C) by cubic convolution with a = -0.75: OpenCV's INTER_CUBIC.

    Pixels' centres lie at halves, edges are repeated, reductions skip pixels; values may overshoot.
    """
    rows, columns = (
        cubic_weights(old, new).astype(np.float32) for old, new in zip(image.shape[:2], (height, width), strict=True)
    )
    across = np.einsum("xw,hwc->hxc", columns, image, optimize=True)
    return np.einsum("yh,hxc->yxc", rows, across, optimize=True)


def depth_condition(depth: jax.Array, height: int, width: int) -> jax.Array:
    """A depth map as the UNet reads it, beside the latents: (B, height, width, 1) float32 in -1..1.

    depth: (B, h, w) of any range, larger is nearer. height, width: of the latents. Each map is resized bicubically,
    then stretched to -1..1 by itself. One that is constant, which says nothing, becomes -1 everywhere; both references
    divide 0 by 0 there.
    """
    with jax.default_matmul_precision("highest"):
        resized = resize_bicubic(depth.astype(jnp.float32)[..., None], height, width)
    least, most = (f(resized, axis=(1, 2, 3), keepdims=True) for f in (jnp.min, jnp.max))
    extent = most - least
    constant = extent <= CONSTANT * jnp.maximum(jnp.abs(least), jnp.abs(most))
    return jnp.where(constant, -1.0, 2 * (resized - least) / jnp.where(constant, 1.0, extent) - 1)


def load_depth_map(source: ImageSource) -> NDArray[np.float32]:
    """A given depth map, in the place of the estimator's: (H, W) float32 of its own range, larger is nearer.

    source: an array (H, W) or (H, W, 1) of floats or integers, or a gray picture of 8 or 16 bits or of floats: a PIL
        image, a path or address, or a file's bytes. Any size is taken: `depth_condition` resizes it.

    A map that is constant is one, too: `depth_condition` says what becomes of it.

    Raises FileNotFoundError for a file that is not there, ValueError for anything else: other shapes, a colour picture,
    values that are not finite or beyond 1e30.
    """
    depth = _values(source)
    if not np.isfinite(depth).all():
        raise ValueError("depth_map has values that are NaN or infinite; want finite numbers")
    if np.abs(depth).max() > LARGEST:
        raise ValueError(f"depth_map has values beyond {LARGEST:g}; want smaller ones: their range is stretched anyway")
    return depth


def _values(source: ImageSource) -> NDArray[np.float32]:
    name = "depth_map"
    if isinstance(source, STORED):
        picture = open_image(source, name)
        if picture.mode in ("L", "F") or picture.mode.startswith("I"):
            return np.asarray(picture).astype(np.float32)
        colours = load_image(picture, name)
        if (colours != colours[..., :1]).any():
            raise ValueError(f"{name} is a colour picture; want a gray one, or an array (H, W) of depths")
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
