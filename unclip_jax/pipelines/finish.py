"""From latents to finished images: decoded, pasted back, checked, marked, in this order."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from unclip_jax.conditioning.crop import paste_back
from unclip_jax.distributed.mesh import own_rows
from unclip_jax.image_files import Rounding, to_uint8
from unclip_jax.pipelines.output import PipelineOutput
from unclip_jax.pipelines.parts import Parts, decode_latents, decode_to_uint8
from unclip_jax.pipelines.request import Conditions, Kept, Request
from unclip_jax.reference import Reference
from unclip_jax.safety import SafetyChecker
from unclip_jax.safety import check as check_safety
from unclip_jax.watermark import SMALLEST, embed_watermark


@dataclasses.dataclass(frozen=True)
class Marks:
    """What is done to finished images. watermark: its bytes; None: no mark. safety_checker: None: no check."""

    watermark: bytes | None = None
    safety_checker: SafetyChecker | None = None


def check_marks(marks: Marks, request: Request[Any], factor: int) -> None:
    """Raises ValueError for images that are to be marked or checked and cannot be. factor: the VAE's."""
    if marks == Marks():
        return
    if request.output_type != "pil":
        raise ValueError(f"output_type is {request.output_type!r}; a watermark or a safety checker needs 'pil'")
    sizes = {(factor * request.latent_shape[0], factor * request.latent_shape[1])}
    if request.kept is not None:
        sizes = {(kept.image.shape[0], kept.image.shape[1]) for kept in request.kept}
    for height, width in sizes:
        if marks.watermark is not None and height * width < SMALLEST:
            raise ValueError(f"images of {width}x{height} are too small for a watermark; want {SMALLEST} pixels")


def finish(
    parts: Parts, marks: Marks, request: Request[Any], conditions: Conditions, latents: np.ndarray
) -> PipelineOutput:
    """Latents (B, h, w, 4) -> what a call returns, with images as `output_type` asks."""
    rows = own_rows(parts.mesh, request.batch)
    images, flagged = latents[rows], None
    if request.output_type == "np":
        images = decode_latents(parts, latents, tiles(parts, request))
    elif request.output_type == "pil":
        images, flagged = finish_images(parts, marks, request, latents)
    return PipelineOutput(images, latents[rows], conditions.image_embeds, flagged, rows)


def finish_images(
    parts: Parts, marks: Marks, request: Request[Any], latents: np.ndarray
) -> tuple[list[Image.Image], list[bool] | None]:
    """Latents (B, h, w, 4) -> PIL images: pasted back, then black where flagged, then marked.

    Over several hosts each makes those of `own_rows`.
    """
    arrays = decode_to_uint8(parts, latents, rounding_of(parts.config.reference), tiles(parts, request))
    return finish_arrays(marks, request, arrays, own_rows(parts.mesh, len(latents)).tolist())


def images_of(parts: Parts, marks: Marks, request: Request[Any]) -> Callable[[np.ndarray], list[Image.Image]]:
    """What makes finished images of a request's latents."""
    return lambda latents: finish_images(parts, marks, request, latents)[0]


def finish_arrays(
    marks: Marks, request: Request[Any], arrays: Iterable[np.ndarray], rows: Sequence[int] | None = None
) -> tuple[list[Image.Image], list[bool] | None]:
    """The same of decoded images, (H, W, 3) uint8 each. rows: which of the request's these are; None: all."""
    images = [Image.fromarray(array) for array in arrays]
    if request.kept is not None:
        kept, rows = request.kept, range(len(images)) if rows is None else rows
        of_rows = [kept[min(row // request.repeats, len(kept) - 1)] for row in rows]
        images = [_pasted(image, part) for image, part in zip(images, of_rows, strict=True)]
    flagged = None
    if marks.safety_checker is not None:
        flagged = check_safety(marks.safety_checker, [np.asarray(image) for image in images])
        images = [Image.new("RGB", image.size) if bad else image for image, bad in zip(images, flagged, strict=True)]
    if marks.watermark is not None:
        images = [Image.fromarray(embed_watermark(np.asarray(image), marks.watermark)) for image in images]
    return images, flagged


def to_pil(reference: Reference, images: np.ndarray) -> list[Image.Image]:
    """(B, H, W, 3) in 0..1 -> PIL images, with the rounding of the checkpoint's reference."""
    return [Image.fromarray(array) for array in to_uint8(images, rounding_of(reference))]


def rounding_of(reference: Reference) -> Rounding:
    """How a reference makes 8 bits of pixels."""
    return "truncate" if reference == Reference.ORIGINAL else "round"


def tiles(parts: Parts, request: Request[Any]) -> int | None:
    """Images made in tiles are decoded in tiles, unless `Memory` has another way."""
    return None if request.tile is None or parts.memory.decoding != "whole" else request.tile[0]


def _pasted(image: Image.Image, kept: Kept) -> Image.Image:
    if kept.box is None:
        image = image.resize(kept.image.shape[1::-1], Image.Resampling.LANCZOS)
    return Image.fromarray(paste_back(np.asarray(image), kept.image, kept.mask, kept.box))
