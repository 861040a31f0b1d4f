"""Repainting a part of an image at full resolution: choosing the part, cutting it out, and putting it back."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from unclip_jax.conditioning.masks import NAME, Mask, binarized, gray_mask
from unclip_jax.conditioning.vae_image import FILTERS, Resample, to_pixels


class Box(NamedTuple):
    """A part of an image in pixels; right and bottom are exclusive."""

    left: int
    top: int
    right: int
    bottom: int


def crop_region(mask: Mask, height: int, width: int, padding: int) -> Box:
    """The part of an image around everything in its mask that is not black, in the proportions of the output.

    Its shorter side is lengthened to the output's proportions, equally on both sides and as far as the image reaches.
    Source: diffusers' VaeImageProcessor.get_crop_region, number for number.

    Args:
        mask: The mask.
        height: Of the output.
        width: Of the output.
        padding: Pixels to keep around the mask.

    Returns:
        The part.

    Raises:
        ValueError: The mask is black, or the padding is negative.
    """
    if not isinstance(padding, int | np.integer) or isinstance(padding, bool) or padding < 0:
        raise ValueError(f"padding_mask_crop is {padding!r}; want an integer from 0")
    marked = np.asarray(gray_mask(mask)) > 0
    if not marked.any():
        raise ValueError(f"{NAME} has nothing white, so there is nothing to repaint; white pixels are repainted")
    (top, bottom), (left, right) = (_extent(np.asarray(marked.any(axis=axis)), int(padding)) for axis in (1, 0))
    proportions = width / height
    if (right - left) / (bottom - top) > proportions:
        top, bottom = _lengthened(top, bottom, (right - left) / proportions, marked.shape[0])
    else:
        left, right = _lengthened(left, right, (bottom - top) * proportions, marked.shape[1])
    return Box(left, top, right, bottom)


def _extent(marked: NDArray[np.bool_], padding: int) -> tuple[int, int]:
    places = np.flatnonzero(marked)
    return max(int(places[0]) - padding, 0), min(int(places[-1]) + 1 + padding, len(marked))


def _lengthened(first: int, end: int, length: float, limit: int) -> tuple[int, int]:
    """The interval [first, end), lengthened to `length` around its middle, then moved and cut to lie in [0, limit)."""
    more = int(length - (end - first))
    first, end = first - more // 2, end + more - more // 2
    over = max(end - limit, 0)
    first, end = first - over, end - over
    if first < 0:
        first, end = 0, end - first
    return first, min(end, limit)


def cropped_pixels(
    image: NDArray[np.uint8], box: Box, height: int, width: int, resample: Resample = "lanczos"
) -> NDArray[np.float32]:
    """A part of an image, fitted into the output's size.

    If the part has other proportions it is centred, and its outermost pixels fill the rest. Source: diffusers'
    VaeImageProcessor.preprocess with `resize_mode="fill"`, bit for bit.

    Args:
        image: (H, W, 3) uint8.
        box: The part.
        height: Of the output.
        width: Of the output.
        resample: Pillow's filter.

    Returns:
        (height, width, 3) float32 in -1..1.
    """
    return to_pixels(np.asarray(_filled(Image.fromarray(image).crop(box), height, width, resample)))


def cropped_mask(mask: Mask, box: Box, height: int, width: int, resample: Resample = "lanczos") -> NDArray[np.float32]:
    """The same part of the mask, in the form of `unclip_jax.conditioning.masks.binary_mask`: (height, width, 1)."""
    part = (mask if isinstance(mask, Image.Image) else gray_mask(mask)).crop(box)
    return binarized(np.asarray(_filled(part, height, width, resample).convert("L"), np.float32) / np.float32(255))


def _filled(part: Image.Image, height: int, width: int, resample: Resample) -> Image.Image:
    wider = width / height < part.width / part.height
    across = width if wider else max(part.width * height // part.height, 1)
    down = max(part.height * width // part.width, 1) if wider else height
    fitted = part.resize((across, down), FILTERS[resample])
    left, top = width // 2 - across // 2, height // 2 - down // 2
    out = Image.new("RGB", (width, height))
    out.paste(fitted, (left, top))
    # An edge is stretched from a strip of width zero, for which Pillow extrapolates: its result is the reference.
    if wider and top > 0:
        for place, edge in ((0, 0), (top + down, down)):
            out.paste(fitted.resize((width, top), box=(0, edge, width, edge)), (0, place))
    elif not wider and left > 0:
        for place, edge in ((0, 0), (left + across, across)):
            out.paste(fitted.resize((left, height), box=(edge, 0, edge, height)), (place, 0))
    return out


def paste_back(
    painted: NDArray[np.uint8],
    image: NDArray[np.uint8],
    mask: Mask,
    box: Box | None = None,
    resample: Resample = "lanczos",
) -> NDArray[np.uint8]:
    """Puts what was painted into the image, wherever the mask is not black.

    Source: diffusers' VaeImageProcessor.apply_overlay, bit for bit.

    Args:
        painted: (h, w, 3) uint8. It is fitted into `box`, or has the image's size if there is no box.
        image: (H, W, 3) uint8; kept bit for bit where the mask is black.
        mask: Of the image's size. Its grays mix the two, so a blurred mask leaves no seam.
        box: Where the painted part belongs; None for the whole image.
        resample: Pillow's filter.

    Returns:
        (H, W, 3) uint8.

    Raises:
        ValueError: The sizes differ.
    """
    gray = gray_mask(mask)
    height, width = image.shape[:2]
    sizes = {NAME: (gray.height, gray.width)} | ({"the painted image": painted.shape[:2]} if box is None else {})
    for name, size in sizes.items():
        if size != (height, width):
            raise ValueError(f"{name} is {size[1]}x{size[0]} pixels, image is {width}x{height}; want the same size")
    under = Image.fromarray(painted)
    if box is not None:
        part, under = under, Image.new("RGB", (width, height))
        under.paste(_covering(part, box.bottom - box.top, box.right - box.left, resample), (box.left, box.top))
    under = under.convert("RGBA")
    # Through premultiplied colours, as the reference goes: grays of the mask are rounded there.
    kept = Image.new("RGBa", (width, height))
    kept.paste(Image.fromarray(image).convert("RGBA").convert("RGBa"), mask=ImageOps.invert(gray))
    under.alpha_composite(kept.convert("RGBA"))
    return np.asarray(under.convert("RGB"))


def _covering(image: Image.Image, height: int, width: int, resample: Resample) -> Image.Image:
    """Resizes an image to cover the size in its own proportions, and cuts off what overlaps on both sides."""
    wider = width / height > image.width / image.height
    across = width if wider else image.width * height // image.height
    down = image.height * width // image.width if wider else height
    out = Image.new("RGB", (width, height))
    fitted = image.resize((max(across, 1), max(down, 1)), FILTERS[resample])
    out.paste(fitted, (width // 2 - across // 2, height // 2 - down // 2))
    return out
