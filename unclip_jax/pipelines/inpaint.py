"""Inpainting: the white part of a mask is repainted to a prompt.

image without the hole -> VAE -> latents, with the mask: five channels that the UNet of 512-inpainting reads; or
image -> VAE -> latents, noised to each step's level and put back around the hole: any model of four channels
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax.checkpoints.config import CheckpointConfig
from unclip_jax.conditioning.crop import Box, crop_region, cropped_mask, cropped_pixels
from unclip_jax.conditioning.masks import Mask, binary_mask, check_same_size, latent_mask, load_mask, masked_image
from unclip_jax.conditioning.vae_image import Resample, floor_size
from unclip_jax.distributed.mesh import Chunk
from unclip_jax.pipelines.arguments import InpaintArguments
from unclip_jax.pipelines.checks import (
    check_flag,
    check_latent_shape,
    check_number,
    check_request,
    check_solver,
    optional_array,
    with_inputs,
)
from unclip_jax.pipelines.denoiser import Known
from unclip_jax.pipelines.init_image import (
    InitImage,
    check_init,
    count_prompts,
    from_image,
    latent_shape_of,
    load_each,
    load_init_images,
    resize_images,
    sample_latents,
)
from unclip_jax.pipelines.parts import Parts, from_noise, noise_of, text_states, vae_encode
from unclip_jax.pipelines.pipeline import Pipeline, calls, streams
from unclip_jax.pipelines.request import Conditions, Kept, Request, Task
from unclip_jax.pipelines.unclip import ImageCondition, check_own_condition, image_labels
from unclip_jax.reference import Reference
from unclip_jax.sampling.noise import Branch


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What inpainting alone has.

    Attributes:
        init: the images, or, where they are not encoded themselves, the images without the hole.
        condition: of unCLIP checkpoints.
        mask: (images, h, w, 1) of 0 and 1 on the latents' grid; 1 is repainted.
        masked: (images, H, W, 3) in -1..1, the images without the hole, for UNets that read them; None for the others.
        from_noise: whether the run begins with pure noise, or with the images.
        latents: (B, h, w, 4) initial noise; None: by the images' keys.
    """

    init: InitImage
    condition: ImageCondition | None
    mask: np.ndarray
    masked: np.ndarray | None
    from_noise: bool
    latents: np.ndarray | None

    @property
    def encodes_image(self) -> bool:
        """Whether the image itself is encoded: to begin with it, or to put it back around the hole."""
        return self.masked is None or not self.from_noise


def check(config: CheckpointConfig, a: InpaintArguments) -> Request[Inputs]:
    """Checks every argument; touches no device. Raises ValueError, FileNotFoundError."""
    if a.mask_image is None:
        raise ValueError("mask_image is missing: give a mask, whose white pixels are repainted")
    check_flag("paste_back", a.paste_back)
    images = load_init_images(a.image)
    masks = load_each("mask_image", a.mask_image, len(images), load_mask, "masks")
    from_noise = check_number("strength", a.strength, 0, 1) == 1
    solver = check_solver(config, a, None if from_noise else a.strength)
    original = solver.reference == Reference.ORIGINAL
    resample: Resample = "bicubic" if original else "lanczos"
    keeps = a.paste_back or a.padding_mask_crop is not None
    if original or keeps:
        for mask, image in zip(masks, images, strict=True):
            check_same_size(mask, image)
    if keeps and a.output_type != "pil":
        raise ValueError(f"output_type is {a.output_type!r}; images are pasted back only for 'pil'")
    if a.padding_mask_crop is None:
        pixels = resize_images(config, images, a.height, a.width, resample)
        holes = np.stack([binary_mask(mask, pixels.shape[1], pixels.shape[2], resample) for mask in masks])
        boxes: list[Box | None] = [None] * len(images)
    else:
        pixels, holes, boxes = _cropped(config, a, images, masks, resample)
    given, other = (("noise", a.noise), "latents") if from_noise else (("latents", a.latents), "noise")
    if given[1] is not None:
        raise ValueError(f"{given[0]} is given, but at strength {a.strength} the initial noise is {other!r}")
    shape, prompts = latent_shape_of(config, pixels), count_prompts(a.prompt, len(pixels))
    request = check_request(config, a, solver, shape, a.prompt, a.negative_prompt, prompts)
    masked = masked_image(pixels, holes) if config.task == "inpaint" else None
    encodes_image = masked is None or not from_noise
    encoded = pixels if encodes_image or masked is None else masked
    encodings = int(encodes_image) + (masked is not None)
    inputs = Inputs(
        init=check_init(config, a, encoded, request, encodings),
        condition=check_own_condition(config, a, images, prompts, a.condition_image),
        mask=np.stack([latent_mask(hole, config.vae.factor) for hole in holes]),
        masked=masked,
        from_noise=from_noise,
        latents=optional_array("latents", a.latents, (request.batch, *shape)),
    )
    kept = [Kept(_uint8(image), mask, box) for image, mask, box in zip(images, masks, boxes, strict=True)]
    return with_inputs(request, inputs, kept=kept if keeps else None)


def conditions(parts: Parts, request: Request[Inputs]) -> Conditions:
    """What the denoiser is told."""
    inputs = request.inputs
    moments = vae_encode(parts, inputs.init.pixels)
    embeds, labels = (None, None) if inputs.condition is None else image_labels(parts, inputs.condition)
    text, negative = text_states(parts, request)
    if inputs.from_noise:
        start = from_noise(parts, request, inputs.latents)
    else:
        start = from_image(parts, request, inputs.init, moments)
    channels, known = None, None
    if inputs.masked is None:
        known = _known(parts, request, moments)
    else:
        masked = vae_encode(parts, inputs.masked) if inputs.encodes_image else moments
        channels = _channels(parts, request, masked)
    return Conditions(text, negative, start, labels, channels, known, embeds)


def _channels(parts: Parts, request: Request[Inputs], masked: np.ndarray) -> Callable[[Chunk], jax.Array]:
    """The mask and the latents of the image without the hole. masked: the moments of its encoding."""
    inputs = request.inputs

    def channels(chunk: Chunk) -> jax.Array:
        latents = sample_latents(parts, request, inputs.init, masked, chunk, int(inputs.encodes_image))
        return jnp.concatenate([chunk.of_prompts(inputs.mask), latents], axis=-1)

    return channels


def _known(parts: Parts, request: Request[Inputs], moments: np.ndarray) -> Callable[[Chunk], Known]:
    """The image outside of the hole."""
    inputs = request.inputs
    given = inputs.latents if inputs.from_noise else inputs.init.noise

    def known(chunk: Chunk) -> Known:
        noise = noise_of(parts, given, Branch.LATENTS, request.latent_shape, chunk)
        latents = sample_latents(parts, request, inputs.init, moments, chunk)
        return Known(chunk.of_prompts(inputs.mask), latents, noise)

    return known


def _cropped(
    config: CheckpointConfig,
    a: InpaintArguments,
    images: Sequence[np.ndarray],
    masks: Sequence[Mask],
    resample: Resample,
) -> tuple[np.ndarray, np.ndarray, list[Box | None]]:
    """The parts around the masks, fitted into the output's size: pixels, masks, and where they were."""
    multiple, factor = config.vae.factor * config.unet.size_multiple, config.vae.factor
    padding: Any = a.padding_mask_crop
    pixels, holes = [], []
    boxes: list[Box | None] = []
    for image, mask in zip(images, masks, strict=True):
        height, width = floor_size(image, multiple)
        h, w, _ = check_latent_shape(
            config, height if a.height is None else a.height, width if a.width is None else a.width
        )
        box = crop_region(mask, h * factor, w * factor, padding)
        pixels.append(cropped_pixels(_uint8(image), box, h * factor, w * factor, resample))
        holes.append(cropped_mask(mask, box, h * factor, w * factor, resample))
        boxes.append(box)
    if len({array.shape for array in pixels}) > 1:
        raise ValueError("image: the images are of several sizes; give height and width")
    return np.stack(pixels), np.stack(holes), boxes


def _uint8(image: np.ndarray) -> np.ndarray:
    return image if image.dtype == np.uint8 else np.rint(image * 255).astype(np.uint8)


class InpaintPipeline(Pipeline):
    """Repaints the white part of a mask; with unCLIP checkpoints, guided by an image."""

    accepts = ("inpaint", "text-to-image", "variations")
    diffusers_class = "StableDiffusionInpaintPipeline"
    task = Task(InpaintArguments, check, conditions)

    @calls(InpaintArguments)
    def __call__(self) -> Any: ...

    @streams(InpaintArguments)
    def stream(self) -> Any: ...
