"""Depth to image: an image is denoised to a prompt and keeps its depth.

image  -> depth estimator -> depth map, stretched to -1..1 -> a channel beside the latents --+
image  -> VAE -> latents -> noised to the level of `strength` -------------------------------+-> loop -> VAE -> images
prompt -> text encoder ---------------------------> text states -----------------------------+
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from unclip_jax.checkpoints.config import CheckpointConfig
from unclip_jax.conditioning.depth import estimator_pixels, load_depth_map
from unclip_jax.conditioning.vae_image import Resample
from unclip_jax.pipelines.arguments import DepthToImageArguments
from unclip_jax.pipelines.checks import check_request, check_solver, with_inputs
from unclip_jax.pipelines.init_image import (
    InitImage,
    check_init,
    count_prompts,
    from_image,
    latent_shape_of,
    load_each,
    load_init_images,
    resize_images,
)
from unclip_jax.pipelines.parts import Parts, encode, text_states, vae_encode
from unclip_jax.pipelines.pipeline import Pipeline, calls, streams
from unclip_jax.pipelines.request import Conditions, Request, Task
from unclip_jax.reference import Reference


@dataclasses.dataclass(frozen=True)
class Inputs:
    """views: (1, h, w, 3) per image, for the estimator; or depth_maps: (h, w) per image, given."""

    init: InitImage
    views: list[np.ndarray] | None
    depth_maps: list[np.ndarray] | None


def check(config: CheckpointConfig, a: DepthToImageArguments) -> Request[Inputs]:
    """Checks every argument; touches no device. Raises ValueError, FileNotFoundError."""
    images = load_init_images(a.image)
    solver = check_solver(config, a, a.strength, depth=True)
    original = solver.reference == Reference.ORIGINAL
    resample: Resample = "bicubic" if original else "lanczos"
    pixels = resize_images(config, images, a.height, a.width, resample)
    if original and a.strength == 1:
        # The original's demo begins with pure noise then, not with the image noised as far as its grid goes.
        solver = dataclasses.replace(solver, start_alpha_cumprod=np.float32(0))
    shape, prompts = latent_shape_of(config, pixels), count_prompts(a.prompt, len(pixels))
    request = check_request(config, a, solver, shape, a.prompt, a.negative_prompt, prompts)
    maps = None if a.depth_map is None else load_each("depth_map", a.depth_map, len(images), load_depth_map, "maps")
    views = _views(config, solver.reference, pixels, images) if maps is None else None
    return with_inputs(request, Inputs(check_init(config, a, pixels, request), views, maps))


def conditions(parts: Parts, request: Request[Inputs]) -> Conditions:
    """What the denoiser is told."""
    depth = depth_channel(parts, request)
    moments = vae_encode(parts, request.inputs.init.pixels)
    text, negative = text_states(parts, request)
    start = from_image(parts, request, request.inputs.init, moments)
    return Conditions(text, negative, start, channels=lambda chunk: chunk.of_prompts(depth))


def depth_channel(parts: Parts, request: Request[Inputs]) -> np.ndarray:
    """The depth maps as the UNet reads them, (images, h, w, 1) in -1..1."""
    height, width, _ = request.latent_shape
    maps: Sequence[np.ndarray] | None = request.inputs.depth_maps
    if maps is None:
        views = request.inputs.views or []
        # Together where they have one size: over all devices.
        groups = [np.concatenate(views)] if len({view.shape for view in views}) == 1 else views
        estimate = parts.programs.estimate_depth
        maps = [m for group in groups for m in encode(parts, "depth_estimator", estimate, group, "estimating depth")]
    resize = functools.partial(parts.programs.depth_condition, height=height, width=width)
    return np.concatenate([np.asarray(resize(depth[None])) for depth in maps])


def _views(
    config: CheckpointConfig, reference: Reference, pixels: np.ndarray, images: Sequence[np.ndarray]
) -> list[np.ndarray]:
    """What the estimator reads of each image: in the original the resized one."""
    if config.depth_estimator is None:
        raise ValueError("depth_map is missing, and this checkpoint has no depth estimator to make one")
    side = config.depth_estimator.image_size
    read = [(array + 1) / 2 for array in pixels] if reference == Reference.ORIGINAL else images
    return [estimator_pixels(image, reference, side)[None] for image in read]


class DepthToImagePipeline(Pipeline):
    """Changes images by prompts and keeps their depth."""

    accepts = ("depth-to-image",)
    diffusers_class = "StableDiffusionDepth2ImgPipeline"
    task = Task(DepthToImageArguments, check, conditions)

    @calls(DepthToImageArguments)
    def __call__(self) -> Any: ...

    @streams(DepthToImageArguments)
    def stream(self) -> Any: ...
