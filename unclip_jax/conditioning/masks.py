"""The inpainting mask, white where the model paints: at the image's size, and on the latents' grid.

The random masks for training an inpainting model are in `unclip_jax.training.masks`.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from unclip_jax.conditioning.clip_image import STORED, ImageSource, load_image, open_image
from unclip_jax.conditioning.vae_image import FILTERS, Resample, resize_nearest

Mask = Image.Image | NDArray[np.float32]
NAME = "mask_image"


def load_mask(source: ImageSource) -> Mask:
    """Reads a mask. Transparency is ignored, as in diffusers.

    Args:
        source: A PIL image, the path, address or bytes of an image file, an array of uint8 (H, W), (H, W, 1) or (H, W,
            3), or an array (H, W) or (H, W, 1) of floats from 0 to 1 or of booleans. White, 255, 1 or True is
            repainted.

    Returns:
        A PIL image in its own colour mode, upright; or float32 (H, W) in 0..1 for a mask of numbers.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The source is not a mask that can be read.
        OSError: As in `load_image`.
    """
    if isinstance(source, STORED):
        loaded = open_image(source, NAME)
        if loaded.mode == "F":
            return load_mask(np.asarray(loaded))
        if loaded.mode.startswith("I"):  # Pillow would clip 16-bit gray at 255
            return Image.fromarray(load_image(loaded, NAME)[..., 0])
        return loaded
    if not hasattr(source, "__array__"):
        raise ValueError(
            f"{NAME} is a {type(source).__name__}; want a PIL image, a path, an address, or an array (H, W)"
        )
    array = np.asarray(source)
    if array.dtype == np.uint8:
        if array.ndim == 3 and array.shape[2] == 1:
            array = array[..., 0]
        if array.size and (array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 3)):
            return Image.fromarray(np.ascontiguousarray(array))
    elif array.dtype == np.bool_ or np.issubdtype(array.dtype, np.floating):
        load_image(array.astype(np.float32), NAME)  # refuses shapes and values
        if array.ndim == 2 or array.shape[2] == 1:
            return array.reshape(array.shape[:2]).astype(np.float32)
    else:
        raise ValueError(f"{NAME} has dtype {array.dtype}; want uint8, bool, or floats from 0 to 1")
    raise ValueError(f"{NAME} has shape {array.shape}; want (H, W), not empty")


def mask_size(mask: Mask) -> tuple[int, int]:
    """The mask's height and width."""
    return (mask.height, mask.width) if isinstance(mask, Image.Image) else (mask.shape[0], mask.shape[1])


def check_same_size(mask: Mask, image: NDArray[Any]) -> None:
    """Checks that mask and image, (H, W, ...), have the same size.

    The original's demos draw the mask on the image. diffusers resizes both to one size, whatever they had, but needs
    them equal where it crops.

    Raises:
        ValueError: The sizes differ.
    """
    height, width = mask_size(mask)
    if (height, width) != image.shape[:2]:
        raise ValueError(
            f"{NAME} is {width}x{height} pixels, image is {image.shape[1]}x{image.shape[0]}; want the same size"
        )


def gray_mask(mask: Mask) -> Image.Image:
    """The mask as a PIL image of mode L."""
    if isinstance(mask, Image.Image):
        return mask.convert("L")
    return Image.fromarray(np.rint(mask * 255).astype(np.uint8))


def binary_mask(mask: Mask, height: int, width: int, resample: Resample = "lanczos") -> NDArray[np.float32]:
    """What is repainted, as an array of 0 and 1; 1 from half white on.

    A mask that is white everywhere repaints the whole image. Source: the mask processor of diffusers' inpainting
    pipeline; at the mask's own size the original's demos do the same.

    Args:
        mask: The mask.
        height: Of the result.
        width: Of the result.
        resample: Pillow's filter for images; arrays of floats are resized to the nearest.

    Returns:
        (height, width, 1) float32.

    Raises:
        ValueError: Nothing is white, which is a mistake.
    """
    if isinstance(mask, Image.Image):
        resized = mask if mask.size == (width, height) else mask.resize((width, height), FILTERS[resample])
        return binarized(np.asarray(resized.convert("L"), np.float32) / np.float32(255))
    return binarized(resize_nearest(mask, height, width))


def binarized(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """(H, W) in 0..1 -> (H, W, 1) of 0 and 1.

    Raises:
        ValueError: There is no 1.
    """
    white = values >= 0.5
    if not white.any():
        raise ValueError(f"{NAME} has nothing white, so there is nothing to repaint; white pixels are repainted")
    return white[..., None].astype(np.float32)


def masked_image(pixels: NDArray[np.float32], mask: NDArray[np.float32]) -> NDArray[np.float32]:
    """The image with mid gray, 0, where it is repainted. pixels: (..., H, W, 3) in -1..1; mask: (..., H, W, 1)."""
    return pixels * (mask < 0.5)


def latent_mask(mask: NDArray[np.float32], factor: int) -> NDArray[np.float32]:
    """A mask on the latents' grid: (H, W, 1) -> (H // factor, W // factor, 1), each cell its upper left pixel.

    Both references resize masks this way; what is thinner than a cell may vanish.
    """
    return resize_nearest(mask, mask.shape[0] // factor, mask.shape[1] // factor)
