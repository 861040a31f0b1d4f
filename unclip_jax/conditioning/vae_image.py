"""Images for the VAE's encoder: resized or padded to sizes that the networks take, in -1..1."""

from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from unclip_jax.conditioning.clip_image import ImageSource, load_image

Resample = Literal["lanczos", "bicubic"]
FILTERS = {"lanczos": Image.Resampling.LANCZOS, "bicubic": Image.Resampling.BICUBIC}


def load_init_image(source: ImageSource, name: str = "image") -> NDArray[Any]:
    """An image as uint8 (H, W, 3), or as float32 0..1 with its own values if it is an array (H, W, 3) of floats.

    Other sources go through `unclip_jax.conditioning.clip_image.load_image`, which rounds to 8 bits and raises its
    errors.
    """
    loaded = load_image(source, name)
    if isinstance(source, Image.Image) or not hasattr(source, "__array__"):
        return loaded
    array = np.asarray(source)
    return array.astype(np.float32) if _is_float(array) and array.shape == loaded.shape else loaded


def floor_size(image: NDArray[Any], multiple: int, name: str = "image") -> tuple[int, int]:
    """The image's height and width, each rounded down to a multiple. image: (H, W, ...).

    Raises:
        ValueError: A side is smaller than the multiple.
    """
    height, width = image.shape[:2]
    if min(height, width) < multiple:
        raise ValueError(f"{name} is {width}x{height} pixels; want sides of at least {multiple}")
    return height - height % multiple, width - width % multiple


def start_pixels(
    image: NDArray[Any],
    height: int | None = None,
    width: int | None = None,
    *,
    multiple: int,
    resample: Resample = "lanczos",
) -> NDArray[np.float32]:
    """A start image in the VAE's range, at a size that the networks take.

    Floats keep their values: they are resized to the nearest pixel, as diffusers resizes arrays. Source: diffusers'
    VaeImageProcessor.preprocess, bit for bit; the original's demos, up to the last bit.

    Args:
        image: (H, W, 3), uint8, or float32 in 0..1.
        height: None takes the image's, rounded down to a multiple.
        width: Likewise.
        multiple: What both sides must be multiples of.
        resample: "lanczos" for diffusers' pipelines and the original's `img2img`; "bicubic" for the upscaler of either
            and for the original's depth and inpainting demos.

    Returns:
        (height, width, 3) float32 in -1..1.

    Raises:
        ValueError: The size is not a multiple, or no size is given and the image is smaller than one multiple.
    """
    _check_filter(resample)
    if height is None or width is None:
        floor = floor_size(image, multiple)
        height, width = (f if given is None else given for f, given in zip(floor, (height, width), strict=True))
    for name, side in (("height", height), ("width", width)):
        if side < 1 or side % multiple:
            raise ValueError(f"{name} is {side}; want a positive multiple of {multiple}")
    return to_pixels(resize(image, height, width, resample))


def resize(image: NDArray[Any], height: int, width: int, resample: Resample = "lanczos") -> NDArray[Any]:
    """Resizes by Pillow's filter, or floats to the nearest pixel, as `torch.nn.functional.interpolate` does by default.

    Args:
        image: (H, W, 3) uint8, or (H, W, ...) floats.
        height: Of the result.
        width: Of the result.
        resample: Pillow's filter.

    Returns:
        (height, width, ...) of the same dtype.
    """
    if _is_float(image):
        return resize_nearest(image, height, width)
    return np.asarray(Image.fromarray(image).resize((width, height), FILTERS[resample]))


def resize_nearest(image: NDArray[Any], height: int, width: int) -> NDArray[Any]:
    """(H, W, ...) -> (height, width, ...): each pixel is the source pixel under its upper left corner.

    Source: `torch.nn.functional.interpolate` in its default mode, which computes positions in float32.
    """
    rows, columns = (
        np.minimum((np.arange(new, dtype=np.float32) * (np.float32(old) / np.float32(new))).astype(int), old - 1)
        for old, new in zip(image.shape[:2], (height, width), strict=True)
    )
    return image[rows[:, None], columns]


def pad_to_multiple(image: NDArray[Any], multiple: int = 64, least: int = 128) -> NDArray[Any]:
    """(H, W, ...) with the last row and column repeated until both sides are multiples, and at least `least`.

    Source: the original's gradio demos, which do not resize.
    """
    height, width = (max(-(-side // multiple) * multiple, least) - side for side in image.shape[:2])
    return np.pad(image, ((0, height), (0, width), *[(0, 0)] * (image.ndim - 2)), mode="edge")


def to_pixels(image: NDArray[Any]) -> NDArray[np.float32]:
    """uint8, or float32 in 0..1, of any shape -> float32 in -1..1."""
    unit = image.astype(np.float32) if _is_float(image) else image.astype(np.float32) / np.float32(255)
    return np.float32(2) * unit - np.float32(1)


def _is_float(array: NDArray[Any]) -> bool:
    return np.issubdtype(array.dtype, np.floating)


def _check_filter(resample: str) -> None:
    if resample not in get_args(Resample):
        raise ValueError(f"resample is {resample!r}; accepted: {', '.join(get_args(Resample))}")
